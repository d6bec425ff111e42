"""`ParamMagnitudes`: magnitudes of parameters over a fit."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrbn.learn.callback import Callback
from fastrbn.util import one_of, whole, write_whole

from .meter import OF_GRADS, Meter
from .rows import Rows, notice

_LABELS = {
    "rms": "root mean square",
    "max": "largest |value|",
    "update": "change in a step / value before (rms)",
    "grad_rms": "root mean square of the gradient",
    "grad_max": "largest |gradient|",
}
_STATS = ("max", "rms", "update")
_NOTHING = 0.01  # of the typical first magnitude: parameters that start below it have no scale of their own


class ParamMagnitudes(Callback):
    """Record the magnitude of every named parameter after training steps: is anything growing without bounds?

    Read afterwards `.steps` (list of `n_iter`), `.names` and `.values[stat]`, a float32 tensor on the host of shape
    (steps, names). `.growth()` ranks what blows up, and `.not_finite` names what went NaN or Inf. Numbers come to the
    host once an epoch; reading them during the fit waits for the device. They survive an error in the fit.

    Parameters
    ----------
    every : int, default 1
        Record steps whose `n_iter` is a multiple of this.
    stats : str or sequence of str, default ("max", "rms")
        Some of "max" (largest absolute value), "rms" (root mean square) and "update": the rms of what the step changed
        over the rms before it, about 1e-3 in a healthy fit; inf for what was 0.
    grads : bool, default False
        Record "max" and "rms" of the step's gradients too, as "grad_max" and "grad_rms": those of them in `stats`, or
        "grad_rms" if neither is. NaN where there is no gradient.
    keep : int, default 10_000
        Most rows kept. When they are there, every second one is dropped with a line in `run.logger`, and from then on
        half as many steps are recorded, and so on.

    Raises
    ------
    ValueError
        For an unknown statistic or counts that are too small.

    Notes
    -----
    Frozen parameters count, shared ones once under their first name; empty ones have 0, lazy and meta ones NaN. A new
    parameter is recorded from the next step on, that of a new module from the next epoch on, with NaN in the rows
    before; a removed one has NaN after. The rms of values beyond 1e19 is inf, for their squares overflow in float32.

    Small models (copies of 4 MiB on a CPU, 64 MiB elsewhere) cost a copy of the parameters on their device, and one
    more each for "update" and `grads`; large models a copy for "update" only.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[ParamMagnitudes])
    >>> run.fit(1, learn)
    >>> run.param_magnitudes.values["rms"].shape == (16, len(run.param_magnitudes.names))
    True
    >>> max(run.param_magnitudes.growth().values()) < 10
    True
    """

    def __init__(
        self, every: int = 1, stats: str | Sequence[str] = ("max", "rms"), grads: bool = False, keep: int = 10_000
    ):
        stats = (stats,) if isinstance(stats, str) else tuple(stats)
        if not stats or set(stats) - set(_STATS):
            raise ValueError(f"stats must be some of {', '.join(_STATS)}; got {stats}")
        self.every, self.grads, self.keep = whole("every", every), grads, whole("keep", keep, 2)
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
            return  # nothing to compare with
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
        """Make a new meter if parameters came, went or changed."""
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
        """Continue with these names: new columns begin with NaN, those that are gone end with it."""
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

    def state_dict(self) -> dict:
        """The rows so far. Waits for the device."""
        return {
            "steps": torch.tensor(self.steps),
            "names": list(self.names),
            "values": dict(self.values),
            "stride": self._rows.stride,
        }

    def load_state_dict(self, state: dict) -> None:
        if list(state["values"]) != list(self.stats):
            raise ValueError(
                f"ParamMagnitudes can continue only with the same stats; the saved ones are "
                f"{', '.join(state['values'])}, here they are {', '.join(self.stats)}: give stats and grads as in the "
                f"first fit"
            )
        self._meter, self._known, self._gone, self._absent = None, None, set(), set()
        self.names = list(state["names"])
        values = torch.stack(list(state["values"].values()), dim=1)
        self._rows.replace(state["steps"].tolist(), values, state.get("stride", 1))

    @property
    def steps(self) -> list[int]:
        """The `n_iter` of each row."""
        return self._rows.steps

    @property
    def values(self) -> dict[str, Tensor]:
        """A tensor of shape (steps, names) for each statistic."""
        return dict(zip(self.stats, self._fetch().unbind(1)))

    def growth(self, stat: str | None = None) -> dict[str, float]:
        """Return last over first magnitude by name, the largest first.

        A parameter that starts at almost nothing, such as a bias of 0, has no scale of its own. If it starts below a
        hundredth of the typical first magnitude (the upper quartile over all parameters), it is measured against the
        typical one: 1 while it stays below that, 10 when it is ten times as large.

        Only finite values count: for a parameter that went NaN or Inf, the last one before (see `not_finite`). A
        parameter that came later or is gone is judged by the rows that have it; one without a finite value is left out.

        Parameters
        ----------
        stat : str, optional
            One of `stats`; by default "rms" if it was recorded, else "max", else the first of `stats`.

        Returns
        -------
        dict of str to float
        """
        columns = {name: c[c.isfinite()] for name, c in zip(self.names, self._of(stat).double().unbind(1))}
        columns = {name: c for name, c in columns.items() if len(c)}
        first = {name: c[0] for name, c in columns.items()}
        if not any(first.values()):  # all started at 0: take their first other value
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
        """The parameters that went NaN or Inf, with the first recorded step that shows it, earliest first."""
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

    def plot(self, stat: str | None = None, kind: str = "map") -> Any:
        """Draw magnitudes over the steps.

        Parameters
        ----------
        stat : str, optional
            One of `stats`; by default as in `growth`.
        kind : str, default "map"
            "map": a row for each parameter, colour the magnitude. "lines": a line for each.

        Returns
        -------
        matplotlib Figure
        """
        from fastrbn import plots

        one_of("kind", kind, ("map", "lines"))
        values = self._of(stat)
        draw = plots.plot_magnitudes if kind == "map" else plots.plot_magnitude_lines
        return draw(values, self.names, self.steps, title=_LABELS[stat or self._default()])

    def to_csv(self, path: str | Path) -> None:
        """Write a row for each recorded step, with columns `step`, `<name>:<stat>`…; the whole file or nothing."""
        values, text = self.values, io.StringIO(newline="")
        out = csv.writer(text, lineterminator="\n")
        out.writerow(["step", *(f"{name}:{stat}" for stat in self.stats for name in self.names)])
        table = torch.cat([values[stat] for stat in self.stats], dim=1).tolist()
        out.writerows([step, *(f"{v:.7g}" for v in row)] for step, row in zip(self.steps, table))
        write_whole(path, text.getvalue())

    def to_tensorboard(self, log: Any) -> None:
        """Write what was recorded as scalars `<stat>/<name>`.

        Parameters
        ----------
        log : str, Path or SummaryWriter
            A folder for TensorBoard's event files, or a writer with `add_scalar` (of torch.utils.tensorboard or
            tensorboardX), which stays open.
        """
        if hasattr(log, "add_scalar"):
            self._write_scalars(log)
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ImportError(
                "to_tensorboard needs the package tensorboard, which is not installed: pip install tensorboard, "
                "or use to_csv"
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
            known = ", ".join(self.stats)
            raise ValueError(f"stat must be one of {known}; got {stat!r}: record it with ParamMagnitudes(stats=…)")
        return self.values[stat]

    def __getstate__(self):
        self._fetch()
        # the parameters are the model's; a copy starts afresh in its own fit
        return {**super().__getstate__(), "_meter": None, "_tables": [], "_known": None, "_armed": False}

    def __repr__(self):
        return f"ParamMagnitudes(every={self.every}, stats={self.stats})"
