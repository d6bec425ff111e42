"""Magnitudes of parameters over a fit: is anything growing without bounds?"""

from __future__ import annotations

import csv
import io
import math

import torch

from fastrbn.learn.callback import Callback
from fastrbn.util import write_whole

from .meter import OF_GRADS, Meter
from .rows import Rows, check_counts, notice

_LABELS = {
    "rms": "root mean square",
    "max": "largest |value|",
    "update": "change in a step / value before (rms)",
    "grad_rms": "root mean square of the gradient",
    "grad_max": "largest |gradient|",
}
_STATS = ("max", "rms", "update")
_KINDS = ("map", "lines")
_NOTHING = 0.01  # of the magnitude that is typical at the start: what begins below it has no scale of its own


class ParamMagnitudes(Callback):
    """Records the magnitude of each named parameter after training steps.

    - `every`: record each `every`-th step (`n_iter` 0, `every`, …).
    - `stats`: those wanted of "max" (largest absolute value), "rms" (root mean square) and "update": the rms of what
      this step changed over the rms before it, some 1e-3 in a healthy fit; inf for what was 0.
    - `grads`: "max" and "rms" of the gradients that the step used too, as "grad_max" and "grad_rms" (of those in
      `stats`; "grad_rms" when neither is); NaN where there is none.
    - `keep`: at most so many rows. When they are there, every second one is dropped with a line in `run.logger`, and
      from then on every second step is recorded, and so on.

    After the fit, and during it at the price of waiting for the device: `.steps` (list of `n_iter`), `.names`,
    `.values[stat]` (float32 tensor on the host, steps × names). Numbers come over once an epoch. Each fit begins anew;
    what was recorded survives its errors. `.growth()` names what blows up, `.not_finite` what went NaN or Inf.

    Frozen parameters count, shared ones once, under their first name; empty ones have 0, lazy and meta ones NaN. What
    comes within a fit is there from the next step on (what a new module brings, or has another shape: from the next
    epoch on), with NaN in the rows before; what is gone has NaN after. The rms of values beyond 1e19 is inf: their
    squares are, in float32.

    Of a small model (copies of 4 MiB on a CPU, 64 elsewhere) it keeps a copy of the parameters on their device, and one
    each for "update" and `grads`; of a large one a copy for "update", and none else. What it costs:
    `benchmarks/callbacks.py`.
    """

    def __init__(self, every=1, stats=("max", "rms"), grads=False, keep=10_000):
        stats = (stats,) if isinstance(stats, str) else tuple(stats)
        check_counts(every=(every, 1), keep=(keep, 2))
        if not stats or set(stats) - set(_STATS):
            raise ValueError(f"stats are some of {', '.join(_STATS)}; got {stats}")
        self.every, self.grads, self.keep = every, grads, keep
        of_grads = [s for s in stats if s != "update"] or ["rms"]
        self.stats = (*stats, *(OF_GRADS + s for s in of_grads)) if grads else stats
        self._clear([])

    def _clear(self, names):
        self.names, self._gone, self._absent = names, set(), set()
        self._rows = Rows(self.keep, (len(self.stats), len(names)))
        self._meter, self._tables, self._known, self._armed = None, [], None, False

    def begin_fit(self):
        self._clear([name for name, _ in self.run.model.named_parameters()])

    def begin_epoch(self):
        self._tables = [m._parameters for m in self.run.model.modules()]
        self._known = None

    def after_backward(self):
        self._armed = False
        if "update" in self.stats and self._rows.wants(self.run.n_iter, self.every):
            self._look_up()
            self._meter.before()
            self._armed = True

    def after_step(self):
        step = self.run.n_iter
        if not self._rows.wants(step, self.every):
            return
        if "update" not in self.stats:
            self._look_up()
        elif not self._armed:
            return  # there is nothing to compare with
        if not self._meter.names:
            return
        self._meter.after()
        self._rows.steps.append(step)
        if self._meter.is_full():
            self._flush()
        if self._rows.is_full():
            self._flush()
            self._rows.thin()
            self.run.logger(notice("ParamMagnitudes", self._rows, self.every))

    def _look_up(self):
        """Make the meter anew when parameters came, went, or are not what they were."""
        known = [id(p) for table in self._tables for p in table.values()]
        if known == self._known:
            return
        named, self._known = list(self.run.model.named_parameters()), known
        if self._meter is None or not self._meter.is_of(named):
            self._flush()
            self._rename([name for name, _ in named])
            self._meter = Meter(named, self.stats)
            self._absent = set(self._meter.absent)

    def _rename(self, names):
        """Go on with these names: columns that are new begin with NaN, those that are gone end with it."""
        self._gone = set(self.names) - set(names)
        every = [*self.names, *(n for n in names if n not in set(self.names))]
        if every != self.names:
            before = self._rows.fetch()
            after = torch.full((len(before), len(self.stats), len(every)), math.nan)
            after[..., : before.shape[-1]] = before
            self._rows.replace(self._rows.steps, after, self._rows.stride)
            self.names = every

    def after_epoch(self):
        self._fetch()

    def after_fit(self):
        self._fetch()
        self._meter, self._tables, self._known = None, [], None

    def _flush(self):
        if self._meter is None or not self._meter.count:
            return
        block = self._meter.flush()
        if self._meter.names != self.names:
            at = torch.tensor([self.names.index(n) for n in self._meter.names], dtype=torch.int64, device=block.device)
            whole = block.new_full((*block.shape[:2], len(self.names)), math.nan)
            block = whole.index_copy_(2, at, block)
        self._rows.put(block)

    def _fetch(self):
        self._flush()
        return self._rows.fetch()

    def state_dict(self):
        """What was recorded. Waits for the device."""
        return {
            "steps": torch.tensor(self.steps),
            "names": list(self.names),
            "values": dict(self.values),
            "stride": self._rows.stride,
        }

    def load_state_dict(self, state):
        if list(state["values"]) != list(self.stats):
            raise ValueError(
                f"ParamMagnitudes can go on only with the same stats; the saved ones are {', '.join(state['values'])}, "
                f"here they are {', '.join(self.stats)}: give stats and grads as in the first fit"
            )
        self._meter, self._known, self._gone, self._absent = None, None, set(), set()
        self.names = list(state["names"])
        values = torch.stack(list(state["values"].values()), dim=1)
        self._rows.replace(state["steps"].tolist(), values, state.get("stride", 1))

    @property
    def steps(self) -> list[int]:
        """`n_iter` of each row."""
        return self._rows.steps

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """For each of `stats` a tensor (steps, names)."""
        return dict(zip(self.stats, self._fetch().unbind(1)))

    def growth(self, stat=None) -> dict[str, float]:
        """Last over first magnitude by name, the largest first.

        Where a parameter begins at next to nothing, such as a bias of 0, that ratio says nothing. What begins below a
        hundredth of the typical first magnitude (the upper quartile over all parameters) is measured against the
        typical one: 1 while it stays below that, 10 when it is ten times as large.

        Only finite values count: of a parameter that went NaN or Inf, the last one before (see `not_finite`). A
        parameter that came later or is gone is judged by the rows that have it; what never had a finite value is left
        out.

        Parameters
        ----------
        stat : str, optional
            One of `stats`; by default "rms" where it was recorded, else "max", else the first of `stats`.

        Returns
        -------
        dict of str to float
        """
        columns = {name: c[c.isfinite()] for name, c in zip(self.names, self._of(stat).double().unbind(1))}
        columns = {name: c for name, c in columns.items() if len(c)}
        first = {name: c[0] for name, c in columns.items()}
        if not any(first.values()):  # all were 0: from their first other value on
            first = {name: c[c > 0][0] if (c > 0).any() else c[0] for name, c in columns.items()}
        begun = [v for v in first.values() if v > 0]
        if not begun:
            return dict.fromkeys(columns, 1.0)
        typical, ratios = torch.stack(begun).quantile(0.75, interpolation="higher"), {}
        for name, c in columns.items():
            own = first[name]
            tiny = own < _NOTHING * typical
            ratios[name] = (c[-1].clamp(min=typical) / typical if tiny else c[-1] / own).item()
        return dict(sorted(ratios.items(), key=lambda kv: -kv[1]))

    @property
    def not_finite(self) -> dict[str, int]:
        """The parameters whose values went NaN or Inf, with the first recorded step that shows it, in that order."""
        stat = "max" if "max" in self.stats else self._default()
        found = {}
        for name, column in zip(self.names, self.values[stat].unbind(1)):
            there = column.isnan().logical_not().nonzero().flatten().tolist()
            first = there[0] if there else 0  # NaN before: it came later
            last = (there[-1] + 1 if there else 0) if name in self._gone else len(column)
            bad = column.isnan() if stat == "update" else column.isfinite().logical_not()  # that is inf from 0 on
            rows = bad[first:last].nonzero().flatten().tolist()
            if rows and (there or name not in self._absent):
                found[name] = self.steps[first + rows[0]]
        return dict(sorted(found.items(), key=lambda kv: kv[1]))

    def plot(self, stat=None, kind="map"):
        """Magnitudes over the steps. Returns the matplotlib Figure.

        - `stat`: one of `stats`; by default as in `growth`.
        - `kind`: "map", a row for each parameter, colour the magnitude; or "lines", a line for each.
        """
        from fastrbn import plots

        if kind not in _KINDS:
            raise ValueError(f"kind is one of {', '.join(_KINDS)}; got {kind!r}")
        values = self._of(stat)
        draw = plots.plot_magnitudes if kind == "map" else plots.plot_magnitude_lines
        return draw(values, self.names, self.steps, title=_LABELS[stat or self._default()])

    def to_csv(self, path) -> None:
        """Write a row for each recorded step, with columns `step`, `<name>:<stat>`…; whole or not at all."""
        values, text = self.values, io.StringIO(newline="")
        out = csv.writer(text, lineterminator="\n")
        out.writerow(["step", *(f"{name}:{stat}" for stat in self.stats for name in self.names)])
        table = torch.cat([values[stat] for stat in self.stats], dim=1).tolist()
        out.writerows([step, *(f"{v:.7g}" for v in row)] for step, row in zip(self.steps, table))
        write_whole(path, text.getvalue())

    def to_tensorboard(self, log) -> None:
        """Write what was recorded as scalars `<stat>/<name>`.

        - `log`: a folder for TensorBoard's event files, or a writer with `add_scalar` (SummaryWriter of
          torch.utils.tensorboard or tensorboardX), which stays open.
        """
        if hasattr(log, "add_scalar"):
            self._write_scalars(log)
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ImportError(
                "to_tensorboard needs the package tensorboard, which is not installed here: pip install tensorboard, "
                "or take to_csv"
            ) from e
        with SummaryWriter(str(log)) as writer:
            self._write_scalars(writer)

    def _write_scalars(self, writer):
        for stat, table in self.values.items():
            for name, column in zip(self.names, table.T.tolist()):
                for step, value in zip(self.steps, column):
                    writer.add_scalar(f"{stat}/{name}", value, step)

    def _default(self):
        return next((s for s in ("rms", "max") if s in self.stats), self.stats[0])

    def _of(self, stat):
        stat = stat or self._default()
        if stat not in self.stats:
            raise ValueError(f"recorded were {', '.join(self.stats)}; got {stat!r}: give it in ParamMagnitudes(stats=…)")
        return self.values[stat]

    def __getstate__(self):
        self._fetch()
        # the parameters are the model's; a copy of what was recorded within a fit begins anew in its own
        return {**super().__getstate__(), "_meter": None, "_tables": [], "_known": None, "_armed": False}

    def __repr__(self):
        return f"ParamMagnitudes(every={self.every}, stats={self.stats})"
