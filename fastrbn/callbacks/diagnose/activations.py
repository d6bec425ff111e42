"""`ActivationStats`: statistics of what modules return, for training steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastrbn.learn.callback import Callback
from fastrbn.util import items_of, whole

from .rows import Rows, notice

_SINGLE = 4  # numbers of a module beside its histogram: mean, deviation, share near zero, share of dead channels
_ALL = 1 - 1e-6  # a mean of ones, summed in float32


class ActivationStats(Callback):
    """Record mean, standard deviation, share near zero and histogram of what modules return in training steps.

    Read afterwards `.steps` (list of `n_iter`), `.names`, `.means`, `.stds`, `.near_zero` (share of all values),
    `.dead` (share of channels, dimension 1, that are near zero throughout the batch): float32 tensors on the host of
    shape (steps, names), NaN where a module was not called; and `.hists`, of shape (steps, names, bins). Numbers come
    to the host once an epoch; reading them during the fit waits for the device.

    Parameters
    ----------
    modules : module, str, or iterable of them, optional
        Modules of the model, or their qualified names. By default the model's children, or those of its only child.
    hist : bool, default True
        Keep histograms.
    bins : int, default 40
        Bins of a histogram.
    value_range : pair of float, default (-5.0, 5.0)
        Ends of the histogram, the upper one included. Values beyond are not counted.
    near : float, default 0.01
        Values smaller than this in absolute value are near zero.
    every : int, default 4
        Look at steps whose `n_iter` is a multiple of this. Looking at every step adds 46 % to the training step of the
        course's net on a CPU (batch 32); one in four adds 12 %.
    keep : int, default 10_000
        Most rows kept. When they are there, every second one is dropped with a line in `run.logger`, and from then on
        half as many steps are looked at, and so on.

    Raises
    ------
    ValueError
        For counts that are too small, an empty range, and, when the fit begins, modules that are not the model's.

    Notes
    -----
    Of an output that is a tuple, list or dictionary the first floating-point tensor counts; of several calls in a step
    the last one. Statistics are float32 for half precision. An output with NaN or Inf has no finite mean, its shares
    are NaN, and its histogram is that of the rest. A module that replaces another is looked at from the next epoch on.

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[ActivationStats])
    >>> run.fit(1, learn)
    >>> run.activation_stats.steps
    [0, 4, 8, 12]
    >>> run.activation_stats.hists.shape
    torch.Size([4, 5, 40])
    """

    def __init__(
        self,
        modules: Any = None,
        hist: bool = True,
        bins: int = 40,
        value_range: tuple[float, float] = (-5.0, 5.0),
        near: float = 0.01,
        every: int = 4,
        keep: int = 10_000,
    ):
        low, high = value_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"value_range must be two finite numbers, the smaller first; got {value_range!r}")
        self.modules, self.hist, self.bins = modules, hist, whole("bins", bins)
        self.value_range, self.near = (low, high), near
        self.every, self.keep = whole("every", every), whole("keep", keep, 2)
        self._clear([])
        self._types: list[str] = []

    @property
    def _bins(self) -> int:
        return self.bins if self.hist else 0

    def _clear(self, names):
        self.names, self._found, self._looking = names, {}, False
        self._hooked = {}  # number of the module: the module and its hook
        self._rows = Rows(self.keep, (len(names), _SINGLE + self._bins))

    def begin_fit(self):
        found = _modules_of(self.run.model, self.modules)
        self._clear(list(found))
        self._types = [type(module).__name__ for module in found.values()]
        self._hook(found)

    def begin_epoch(self):
        now = dict(self.run.model.named_modules())
        self._hook({name: now.get("" if name == "model" else name) for name in self.names})

    def _hook(self, modules):
        """Hook these modules; those that others have replaced lose their hook."""
        for i, (name, module) in enumerate(modules.items()):
            before, hook = self._hooked.get(i, (None, None))
            if module is before:
                continue
            if hook is not None:
                hook.remove()
                del self._hooked[i]
            if module is not None:
                # one by one: if the next one fails, after_fit removes these
                self._hooked[i] = module, module.register_forward_hook(functools.partial(self._look, i, name))

    def begin_batch(self):
        run = self.run
        self._found.clear()
        self._looking = run.in_train and self._rows.wants(run.n_iter, self.every)

    def _look(self, i, name, module, inp, outp):
        if self._looking and (out := _first_float(outp)) is not None:
            self._found[name] = _measured(out, self._bins, *self.value_range, self.near)

    def after_loss(self):
        run, found = self.run, self._found
        self._looking = False  # a checkpointed layer is called once more in the backward pass
        if run.in_train and found:
            missing = torch.full_like(home := next(iter(found.values())), torch.nan)
            self._rows.put(torch.stack([found.get(name, missing).to(home.device) for name in self.names])[None])
            self._rows.steps.append(run.n_iter)
            if self._rows.is_full():
                self._rows.thin()
                run.logger(notice("ActivationStats", self._rows, self.every))

    def after_epoch(self):
        self._rows.fetch()

    def after_fit(self):
        for _, hook in self._hooked.values():
            hook.remove()
        self._hooked, self._looking = {}, False
        self._found.clear()
        self._rows.fetch()

    @property
    def steps(self) -> list[int]:
        """The `n_iter` of each row."""
        return self._rows.steps

    @property
    def means(self) -> Tensor:
        """Mean of each output, of shape (steps, names)."""
        return self._rows.fetch()[..., 0]

    @property
    def stds(self) -> Tensor:
        """Standard deviation of each output, not corrected for the sample size."""
        return self._rows.fetch()[..., 1]

    @property
    def near_zero(self) -> Tensor:
        """Share of values near zero."""
        return self._share(2)

    @property
    def dead(self) -> Tensor:
        """Share of channels that are near zero throughout the batch; NaN for outputs of one dimension."""
        return self._share(3)

    def _share(self, column):
        rows = self._rows.fetch()
        return torch.where(rows[..., 0].isfinite(), rows[..., column], math.nan)  # NaN is not near zero

    @property
    def hists(self) -> Tensor:
        """Counts of each bin, of shape (steps, names, bins)."""
        return self._rows.fetch()[..., _SINGLE:]

    def plot(self) -> Any:
        """Draw mean, deviation, share near zero and share of dead channels over the steps, a line for each module.

        Returns the matplotlib Figure.
        """
        from fastrbn import plots

        return plots.plot_activations(self.means, self.stds, self.near_zero, self._titles(), self.steps, self.dead)

    def plot_hist(self) -> Any:
        """Draw histograms over the steps, an image for each module. ValueError if none were kept.

        Returns the matplotlib Figure.
        """
        from fastrbn import plots

        if not self.hist:
            raise ValueError("ActivationStats kept no histograms: make it with hist=True")
        return plots.plot_histograms(self.hists, self._titles(), self.steps, self.value_range)

    def _titles(self) -> list[str]:
        """Qualified name and type of each module."""
        return [f"{name} {kind}" for name, kind in zip(self.names, self._types)]

    def __getstate__(self):
        # the hooks are the model's; a copy of it takes copies of them along, which do nothing
        self._rows.fetch()
        return {**super().__getstate__(), "_hooked": {}, "_found": {}, "_looking": False}

    def __repr__(self):
        return f"ActivationStats(hist={self.hist})"


def _modules_of(model: nn.Module, wanted: Any) -> dict[str, nn.Module]:
    named = dict(model.named_modules())
    if wanted is None:
        parent, prefix = model, ""
        while len(inside := dict(parent.named_children())) == 1:
            only, parent = next(iter(inside.items()))
            prefix += f"{only}."
        return {prefix + n: m for n, m in inside.items()} or {prefix.rstrip(".") or "model": parent}
    names = {id(m): n or "model" for n, m in named.items()}
    found = {}
    several = hasattr(wanted, "__iter__") and not isinstance(wanted, (str, nn.Module))
    for m in wanted if several else [wanted]:
        name = m if isinstance(m, str) else names.get(id(m))
        if name is None or (isinstance(m, str) and m not in named):
            raise ValueError(
                f"ActivationStats needs modules of the model, or their names; got {m!r}. There are: "
                f"{', '.join(filter(None, named))}"
            )
        found[name] = named[m] if isinstance(m, str) else m
    return found


@torch.no_grad()
def _measured(x: Tensor, bins: int, low: float, high: float, near: float) -> Tensor:
    """The statistics of a floating-point tensor: float32 of shape (4 + bins,) on its device."""
    x = x.detach() if x.element_size() > 2 else x.detach().float()
    mean = x.mean()
    std = torch.linalg.vector_norm(x - mean) / math.sqrt(x.numel())  # std_mean takes up to five times as long on a CPU
    small = x.abs().lt_(near)  # 0 and 1, in the dtype of `x`
    if small.dim() > 1:
        channels = small.mean([d for d in range(small.dim()) if d != 1])
        share, dead = channels.mean(), channels.ge(_ALL).mean(dtype=small.dtype)
    else:
        share, dead = small.mean(), torch.full_like(mean, math.nan)
    stats = torch.stack([mean, std, share, dead]).float()
    return torch.cat([stats, x.histc(bins, low, high).float()]) if bins else stats


def _first_float(value: Any) -> Tensor | None:
    """The first dense floating-point tensor with values in nested lists, tuples and dictionaries."""
    found: Iterable[Tensor] = items_of(value, Tensor)
    return next((t for t in found if t.is_floating_point() and t.layout is torch.strided and t.numel()), None)
