"""Statistics of what modules put out, for each training step."""

from __future__ import annotations

import functools
import math

import torch

from fastrbn.learn.callback import Callback

from .measure import SINGLE, first_float, measure_into, measured
from .rows import Rows, check_counts, notice


class ActivationStats(Callback):
    """Mean, standard deviation, share near zero and histogram of what modules put out, for each training step.

    - `modules`: modules of the model, or their qualified names; None: the model's children (those of its only child,
      if it has no other). Of an output that is a tuple, list or dictionary its first floating-point tensor counts, of
      several calls in a step the last one; what has no such tensor is passed over. A module that replaces one of them
      within the fit is looked at from the next epoch on.
    - `hist`: keep histograms, of `bins` bins over `value_range`, upper end included; what lies beyond is not counted.
    - `near`: what is smaller in absolute value is near zero.
    - `every`: look at each `every`-th step (`n_iter` 0, `every`, …).
    - `keep`: at most so many rows. When they are there, every second one is dropped with a line in `run.logger`, and
      from then on every second step is looked at, and so on.

    After the fit, and during it at the price of waiting for the device: `.steps` (list of `n_iter`), `.names`,
    `.means`, `.stds`, `.near_zero` (share of all values), `.dead` (share of channels, dimension 1, that are near zero
    throughout the batch): float tensors on the host, steps × names, NaN where a module was not called; and `.hists`
    (steps × names × bins). Numbers come over once an epoch. An output with NaN or Inf has no finite mean, and
    the shares are NaN then; its histogram is that of the rest.

    Source: fast.ai course, part 2 (2019), notebook 06.
    """

    def __init__(self, modules=None, hist=True, bins=40, value_range=(-5.0, 5.0), near=0.01, every=1, keep=10_000):
        check_counts(bins=(bins, 1), every=(every, 1), keep=(keep, 2))
        low, high = value_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"value_range must be two finite numbers, the smaller first; got {value_range!r}")
        self.modules, self.hist, self.bins, self.value_range, self.near = modules, hist, bins, (low, high), near
        self.every, self.keep = every, keep
        self._clear([])
        self._types = []

    @property
    def _bins(self) -> int:
        return self.bins if self.hist else 0

    def _clear(self, names):
        self.names, self._found, self._looking, self._block = names, {}, False, None
        self._hooked = {}  # of a module's number: the module and its hook
        self._rows = Rows(self.keep, (len(names), SINGLE + self._bins))

    def begin_fit(self):
        found = _modules_of(self.run.model, self.modules)
        self._clear(list(found))
        self._types = [type(module).__name__ for module in found.values()]
        self._hook(found)

    def begin_epoch(self):
        now = dict(self.run.model.named_modules())
        self._hook({name: now.get("" if name == "model" else name) for name in self.names})

    def _hook(self, modules):
        """Look at these modules; those that others have replaced are looked at no more."""
        for i, (name, module) in enumerate(modules.items()):
            before, hook = self._hooked.get(i, (None, None))
            if module is before:
                continue
            if hook is not None:
                hook.remove()
                del self._hooked[i]
            if module is not None:
                # one by one: if the next one fails, those that are on go in after_fit
                self._hooked[i] = module, module.register_forward_hook(functools.partial(self._look, i, name))

    def begin_batch(self):
        run = self.run
        self._found.clear()
        self._block = None
        self._looking = run.in_train and self._rows.wants(run.n_iter, self.every)

    def _look(self, i, name, module, inp, outp):
        if not self._looking or (out := first_float(outp)) is None:
            return
        what = (self._bins, *self.value_range, self.near)
        if torch.compiler.is_compiling() or not measure_into(self._row(i), out, *what):
            self._found[name] = measured(out, *what)
        else:
            self._found[name] = None  # it is in the step's block

    def _row(self, i) -> int:
        """The address of a module's row in the block that C writes to."""
        if self._block is None:
            shape = (len(self.names), SINGLE + self._bins)
            self._block = torch.full(shape, torch.nan, dtype=torch.float32, device="cpu")
        return self._block.data_ptr() + i * (SINGLE + self._bins) * 4

    def after_loss(self):
        run, found = self.run, self._found
        self._looking = False  # a checkpointed layer is called once more in the backward pass
        if run.in_train and found:
            self._rows.put(self._together(found)[None])
            self._rows.steps.append(run.n_iter)
            if self._rows.is_full():
                self._rows.thin()
                run.logger(notice("ActivationStats", self._rows, self.every))

    def _together(self, found):
        """The step's block, with what PyTorch's operators measured."""
        home = next((row for row in found.values() if row is not None), None)
        if home is None:
            return self._block
        found = {name: self._block[self.names.index(name)] if row is None else row for name, row in found.items()}
        missing = torch.full_like(home, torch.nan)
        return torch.stack([found.get(name, missing).to(home.device) for name in self.names])

    def after_epoch(self):
        self._rows.fetch()

    def after_fit(self):
        for _, hook in self._hooked.values():
            hook.remove()
        self._hooked, self._looking = {}, False
        self._found.clear()
        self._block = None
        self._rows.fetch()

    @property
    def steps(self) -> list[int]:
        """`n_iter` of each row."""
        return self._rows.steps

    @property
    def means(self) -> torch.Tensor:
        return self._rows.fetch()[..., 0]

    @property
    def stds(self) -> torch.Tensor:
        return self._rows.fetch()[..., 1]

    @property
    def near_zero(self) -> torch.Tensor:
        return self._share(2)

    @property
    def dead(self) -> torch.Tensor:
        return self._share(3)

    def _share(self, column):
        rows = self._rows.fetch()
        return torch.where(rows[..., 0].isfinite(), rows[..., column], math.nan)  # of NaN nothing is near zero

    @property
    def hists(self) -> torch.Tensor:
        return self._rows.fetch()[..., SINGLE:]

    def plot(self):
        """Mean, deviation, share near zero and of dead channels over the steps, a line for each module. Returns the
        matplotlib Figure."""
        from fastrbn import plots

        return plots.plot_activations(self.means, self.stds, self.near_zero, self._titles(), self.steps, self.dead)

    def plot_hist(self):
        """Histograms over the steps, an image for each module. Returns the matplotlib Figure."""
        from fastrbn import plots

        if not self.hist:
            raise ValueError("ActivationStats kept no histograms: make it with hist=True")
        return plots.plot_histograms(self.hists, self._titles(), self.steps, self.value_range)

    def _titles(self) -> list[str]:
        """Qualified name and type of each module."""
        return [f"{name} {kind}" for name, kind in zip(self.names, self._types)]

    def __getstate__(self):
        # the hooks are the model's; a copy of it takes copies of them along, which look at nothing
        self._rows.fetch()
        return {**super().__getstate__(), "_hooked": {}, "_found": {}, "_looking": False, "_block": None}

    def __repr__(self):
        return f"ActivationStats(hist={self.hist})"


def _modules_of(model, wanted) -> dict[str, torch.nn.Module]:
    named = dict(model.named_modules())
    if wanted is None:
        parent, prefix = model, ""
        while len(inside := dict(parent.named_children())) == 1:
            name, parent = next(iter(inside.items()))
            prefix += f"{name}."
        return {prefix + n: m for n, m in inside.items()} or {prefix.rstrip(".") or "model": parent}
    names = {id(m): n or "model" for n, m in named.items()}
    found = {}
    several = hasattr(wanted, "__iter__") and not isinstance(wanted, (str, torch.nn.Module))
    for m in wanted if several else [wanted]:
        name = m if isinstance(m, str) else names.get(id(m))
        if name is None or (isinstance(m, str) and m not in named):
            raise ValueError(
                f"ActivationStats needs modules of the model, or their names; got {m!r}. There are: "
                f"{', '.join(filter(None, named))}"
            )
        found[name] = named[m] if isinstance(m, str) else m
    return found
