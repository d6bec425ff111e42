"""Magnitudes of parameters over a fit: is anything growing without bounds?"""

from __future__ import annotations

import csv
import io
import math

import torch

from fastrbn.files import write_whole
from fastrbn.learn.callback import Callback

_STATS = ("max", "rms")


class ParamMagnitudes(Callback):
    """Records the magnitude of each named parameter after training steps.

    - `every`: record each `every`-th step (`n_iter` 0, `every`, …).
    - `stats`: of "max" (largest absolute value) and "rms" (root mean square) those wanted.
    - `grads`: the same of the gradients that the step used, as "grad_max" and "grad_rms"; NaN where there is none.

    After the fit, and during it at the price of waiting for the device: `.steps` (list of `n_iter`), `.names`,
    `.values[stat]` (float32 tensor on the host, steps × names). Numbers come over once an epoch. Each fit begins anew;
    what was recorded survives its errors.
    """

    def __init__(self, every=1, stats=_STATS, grads=False):
        stats = (stats,) if isinstance(stats, str) else tuple(stats)
        if not (isinstance(every, int) and every >= 1):
            raise ValueError(f"every must be a whole number, 1 or more; got {every!r}")
        if not stats or set(stats) - set(_STATS):
            raise ValueError(f"stats are some of {', '.join(_STATS)}; got {stats}")
        self.every, self.grads = every, grads
        self.stats = (*stats, *(f"grad_{s}" for s in stats)) if grads else stats
        self._measured = stats
        self._clear([])

    def _clear(self, named):
        self.steps, self.names = [], [name for name, _ in named]
        self._params, self._new, self._host = [p for _, p in named], [], []
        self._root_sizes = torch.tensor([float(max(p.numel(), 1)) for _, p in named]).sqrt()

    def begin_fit(self):
        self._clear(list(self.run.model.named_parameters()))

    def after_step(self):
        step = self.run.n_iter
        if step % self.every == 0 and self._params:
            with torch.no_grad():
                scalars = _magnitudes(self._params, self._measured)
                if self.grads:
                    scalars += _magnitudes([p.grad for p in self._params], self._measured)
                self._new.append(torch.stack(scalars))
            self.steps.append(step)

    def after_epoch(self):
        self._fetch()

    def after_fit(self):
        self._fetch()
        self._params = []

    def _fetch(self):
        if self._new:
            fetched = torch.stack(self._new).cpu().float().reshape(-1, len(self.stats), len(self.names))
            for column, stat in zip(fetched.unbind(1), self.stats):
                if stat.endswith("rms"):
                    column /= self._root_sizes  # so far it is the root of the sum
            self._host.append(fetched)
            self._new = []

    def state_dict(self):
        """What was recorded. Waits for the device."""
        return {"steps": torch.tensor(self.steps), "names": list(self.names), "values": dict(self.values)}

    def load_state_dict(self, state):
        if list(state["values"]) != list(self.stats):
            raise ValueError(
                f"ParamMagnitudes can go on only with the same stats; the saved ones are {', '.join(state['values'])}, "
                f"here they are {', '.join(self.stats)}: give stats and grads as in the first fit"
            )
        self.steps, self._new = state["steps"].tolist(), []
        self._host = [torch.stack(list(state["values"].values()), dim=1)]

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """For each of `stats` a tensor (steps, names)."""
        self._fetch()
        if len(self._host) != 1:
            self._host = [torch.cat(self._host) if self._host else torch.empty(0, len(self.stats), len(self.names))]
        return dict(zip(self.stats, self._host[0].unbind(1)))

    def growth(self, stat=None) -> dict[str, float]:
        """Last over first magnitude by name, the largest first (`stat`: "rms" where it was recorded, else "max").

        What grew from 0 grew infinitely (`inf`); what stayed 0 did not grow (1). NaN counts as the largest.
        """
        values = self._of(stat)
        if not len(values):
            return {}
        ratios = {n: _ratio(b, a) for n, a, b in zip(self.names, values[0].tolist(), values[-1].tolist())}
        return dict(sorted(ratios.items(), key=lambda kv: (not math.isnan(kv[1]), -kv[1])))

    def plot(self, stat=None):
        """A row for each parameter, colour the magnitude over the steps. Returns the matplotlib Figure."""
        from fastrbn import plots

        values = self._of(stat)
        return plots.plot_magnitudes(values, self.names, self.steps, title=_LABELS[stat or self._default()])

    def to_csv(self, path) -> None:
        """Write a row for each recorded step, with columns `step`, `<name>:<stat>`…; whole or not at all."""
        values, text = self.values, io.StringIO(newline="")
        out = csv.writer(text, lineterminator="\n")
        out.writerow(["step", *(f"{name}:{stat}" for stat in self.stats for name in self.names)])
        table = torch.cat([values[stat] for stat in self.stats], dim=1).tolist()
        out.writerows([step, *(f"{v:.7g}" for v in row)] for step, row in zip(self.steps, table))
        write_whole(path, text.getvalue())

    def _default(self):
        return "rms" if "rms" in self.stats else self.stats[0]

    def _of(self, stat):
        stat = stat or self._default()
        if stat not in self.stats:
            raise ValueError(f"recorded were {', '.join(self.stats)}; got {stat!r}: give it in ParamMagnitudes(stats=…)")
        return self.values[stat]

    def __getstate__(self):
        self._fetch()
        return {**super().__getstate__(), "_params": []}  # they are the model's

    def __repr__(self):
        return f"ParamMagnitudes(every={self.every}, stats={self.stats})"


_LABELS = {
    "max": "largest |value|",
    "rms": "root mean square",
    "grad_max": "largest |gradient|",
    "grad_rms": "root mean square of the gradient",
}


def _ratio(last, first):
    if first == 0:
        return 1.0 if last == 0 else math.nan if math.isnan(last) else math.inf
    return last / first


def _magnitudes(tensors, stats) -> list[torch.Tensor]:
    """For each of `stats`, for each tensor, a scalar on the device of the first: the largest absolute value, or the
    root of the sum of squares. NaN in place of None."""
    home = next((t.device for t in tensors if t is not None), None)
    dense = [t if t is None or t.layout is torch.strided else t.coalesce().values() for t in tensors]
    where = [i for i, t in enumerate(dense) if t is not None and t.numel()]
    # half precision would overflow in sums of squares; foreach functions want absolute values real
    members = [dense[i].float() if dense[i].dtype in (torch.float16, torch.bfloat16) else dense[i] for i in where]
    scalars = []
    for stat in stats:
        found = _foreach(stat, members) if members else []
        if len(members) == len(tensors):
            scalars += found
        else:
            at = dict(zip(where, found))
            absent = torch.tensor(math.nan, device=home), torch.tensor(0.0, device=home)
            scalars += [at.get(i, absent[0] if t is None else absent[1]) for i, t in enumerate(dense)]
    return [s if s.device == home else s.to(home) for s in scalars]


def _foreach(stat, tensors):
    if stat == "rms":
        return torch._foreach_norm(tensors, 2)
    if tensors[0].device.type == "cpu":  # there the norm of order inf takes three times as long
        return torch._foreach_max(torch._foreach_abs(tensors))
    return torch._foreach_norm(tensors, math.inf)
