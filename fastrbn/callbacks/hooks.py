"""Forward hooks that are removed when they should be, and statistics of what modules put out."""

from __future__ import annotations

import functools
import math
import weakref

import torch

from fastrbn.learn.callback import Callback

from ._rows import Rows, check_counts, notice


class ListContainer:
    """A list that takes an index, a slice, a list of indices or a mask of bools, and prints its length and first ten.

    Source: fast.ai course, part 2 (2019), notebook 06.
    """

    def __init__(self, items):
        self.items = [items] if not isinstance(items, (list, tuple, range)) and not _iterates(items) else list(items)

    def __getitem__(self, index):
        if isinstance(index, (list, tuple)):
            if index and isinstance(index[0], bool):
                if len(index) != len(self.items):
                    raise IndexError(f"a mask needs a bool for each of {len(self.items)} items; got {len(index)}")
                return [item for item, wanted in zip(self.items, index) if wanted]
            return [self.items[i] for i in index]
        return self.items[index]

    def __setitem__(self, index, value):
        self.items[index] = value

    def __delitem__(self, index):
        del self.items[index]

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)

    def __repr__(self):
        more = ", …" if len(self) > 10 else ""
        return f"{type(self).__name__} ({len(self)} items)\n[{', '.join(map(repr, self.items[:10]))}{more}]"


def _iterates(value) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes, torch.nn.Module))


def children(m) -> list[torch.nn.Module]:
    """The direct children of a module, as a list."""
    return list(m.children())


class _Removable:
    """Calls `remove()` at the end of its `with` block, and when it is deleted."""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.remove()

    def __del__(self):
        self.remove()


class Hook(_Removable):
    """A forward hook on module `m` that calls `f(hook, module, input, output)`; what `f` finds it keeps on the hook.

    Also a context manager: `with Hook(m, append_stats) as hook`. Removed with `remove()` or when the hook is deleted.

    Source: fast.ai course, part 2 (2019), notebook 06.
    """

    def __init__(self, m, f):
        # the module must not keep the hook alive, or it would never be deleted
        self._handle = m.register_forward_hook(functools.partial(_call, weakref.ref(self), f))

    def remove(self) -> None:
        """Take the hook off its module; a second time does nothing."""
        handle = self.__dict__.pop("_handle", None)  # missing when __init__ failed, gone when it was removed
        if handle is not None:
            handle.remove()


class Hooks(_Removable, ListContainer):
    """A `Hook` for each module of `ms` (a module: its children). A context manager that removes them all.

    Source: fast.ai course, part 2 (2019), notebook 06.
    """

    def __init__(self, ms, f):
        super().__init__([])
        for m in children(ms) if isinstance(ms, torch.nn.Module) else ms:
            self.items.append(Hook(m, f))

    def remove(self) -> None:
        """Take all hooks off; a second time does nothing."""
        for hook in self.__dict__.get("items", []):
            hook.remove()

    def __delitem__(self, index):
        for hook in self.items[index] if isinstance(index, slice) else [self.items[index]]:
            hook.remove()
        super().__delitem__(index)


def append_stats(hook, mod, inp, outp):
    """For `Hooks`: `hook.stats` is three lists, means, deviations and histograms (40 bins, 0–10), an entry for each
    call in training. Each call waits for the device; `ActivationStats` does not.

    Source: fast.ai course, part 2 (2019), notebook 06.
    """
    if not hasattr(hook, "stats"):
        hook.stats = ([], [], [])
    if mod.training:
        means, stds, hists = hook.stats
        out = outp.detach().float().cpu()
        means.append(out.mean())
        stds.append(out.std())
        hists.append(out.histc(40, 0, 10))


def _call(reference, f, module, inp, outp):
    hook = reference()
    if hook is not None:
        f(hook, module, inp, outp)


class ActivationStats(Callback):
    """Mean, standard deviation, share near zero and histogram of what modules put out, for each training step.

    - `modules`: modules of the model, or their qualified names; None: the model's children (those of its only child,
      if it has no other). Of an output that is a tuple, list or dictionary its first floating-point tensor counts, of
      several calls in a step the last one; what has no such tensor is passed over.
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

    def _clear(self, names):
        self.names, self._found, self._hooks, self._looking = names, {}, [], False
        self._rows = Rows(self.keep, (len(names), _SINGLE + (self.bins if self.hist else 0)))

    def begin_fit(self):
        found = _modules_of(self.run.model, self.modules)
        self._clear(list(found))
        for name, module in found.items():  # one by one: if the next one fails, those that are on go in after_fit
            self._hooks.append(module.register_forward_hook(functools.partial(self._look, name)))

    def begin_batch(self):
        run = self.run
        self._found.clear()
        self._looking = run.in_train and self._rows.wants(run.n_iter, self.every)

    @torch.no_grad()
    def _look(self, name, module, inp, outp):
        if self._looking:
            out = _first_float(outp)
            if out is not None:
                self._found[name] = self._measured(out.detach())

    def _measured(self, out):
        out = out if out.dtype in (torch.float32, torch.float64) else out.float()
        mean = out.mean()
        # torch.std_mean takes fifteen times as long on the CPU
        std = torch.linalg.vector_norm(out - mean) / math.sqrt(out.numel())
        near = out.abs().lt_(self.near)  # 0 and 1, in the dtype of `out`
        if near.dim() > 1:
            channels = near.mean([d for d in range(near.dim()) if d != 1])
            share, dead = channels.mean(), channels.ge(_ALL).mean(dtype=near.dtype)
        else:
            share, dead = near.mean(), torch.full_like(mean, math.nan)
        stats = torch.stack([mean, std, share, dead]).float()
        return torch.cat([stats, histogram(out, self.bins, *self.value_range)]) if self.hist else stats

    def after_loss(self):
        run, found = self.run, self._found
        self._looking = False  # a checkpointed layer is called once more in the backward pass
        if run.in_train and found:
            home = next(iter(found.values()))
            missing = torch.full_like(home, torch.nan)
            self._rows.put(torch.stack([found.get(name, missing).to(home.device) for name in self.names])[None])
            self._rows.steps.append(run.n_iter)
            if self._rows.is_full():
                self._rows.thin()
                run.logger(notice("ActivationStats", self._rows, self.every))

    def after_epoch(self):
        self._rows.fetch()

    def after_fit(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._looking = [], False
        self._found.clear()
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
        return self._rows.fetch()[..., _SINGLE:]

    def plot(self):
        """Mean, deviation, share near zero and of dead channels over the steps, a line for each module. Returns the
        matplotlib Figure."""
        from fastrbn import plots

        return plots.plot_activations(self.means, self.stds, self.near_zero, self.names, self.steps, self.dead)

    def plot_hist(self):
        """Histograms over the steps, an image for each module. Returns the matplotlib Figure."""
        from fastrbn import plots

        if not self.hist:
            raise ValueError("ActivationStats kept no histograms: make it with hist=True")
        return plots.plot_histograms(self.hists, self.names, self.steps, self.value_range)

    def __getstate__(self):
        # the hooks are the model's; a copy of it takes copies of them along, which look at nothing
        self._rows.fetch()
        return {**super().__getstate__(), "_hooks": [], "_found": {}, "_looking": False}

    def __repr__(self):
        return f"ActivationStats(hist={self.hist})"


_SINGLE = 4  # numbers of a module beside its histogram
_ALL = 1 - 1e-6  # a mean of ones, summed in float32


def _first_float(value):
    """The first floating-point tensor in an output that holds some values, or None."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() and value.layout is torch.strided and value.numel() else None
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return None
    return next((found for v in value if (found := _first_float(v)) is not None), None)


def histogram(x, bins, low, high):
    """How many values of `x` lie in each of `bins` equal bins from `low` to `high`, the upper end included, NaN and
    what lies beyond left out: float32 (bins,), as torch.histc, in half its time on the CPU."""
    if not x.is_cpu:
        return x.histc(bins, low, high).float()  # counting integers would wait for the device
    scale = bins / (high - low)
    place = x.flatten().mul(scale).add_(1 - low * scale).clamp_(0, bins + 1).nan_to_num_(nan=0.0)
    counts = torch.bincount(place.int(), minlength=bins + 2)  # the first and the last are beyond
    counts[-2] += torch.count_nonzero(x == high)
    return counts[1:-1].float()


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
    for m in wanted if isinstance(wanted, (list, tuple, ListContainer)) else [wanted]:
        name = m if isinstance(m, str) else names.get(id(m))
        if name is None or (isinstance(m, str) and m not in named):
            raise ValueError(
                f"ActivationStats needs modules of the model, or their names; got {m!r}. There are: "
                f"{', '.join(filter(None, named))}"
            )
        found[name] = named[m] if isinstance(m, str) else m
    return found
