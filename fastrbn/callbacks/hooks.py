"""Forward hooks that are removed when they should be, and statistics of what modules put out."""

from __future__ import annotations

import functools
import weakref

import torch

from fastrbn.learn.callback import Callback


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
      if it has no other). Outputs that are not a floating-point tensor are passed over; of several calls in a step the
      last one counts.
    - `hist`: keep histograms, of `bins` bins over `value_range`; what lies beyond is not counted.
    - `near`: what is smaller in absolute value is near zero.

    After the fit, and during it at the price of waiting for the device: `.steps` (list of `n_iter`), `.names`,
    `.means`, `.stds`, `.near_zero` (float tensors on the host, steps × names; NaN where a module was not called) and
    `.hists` (steps × names × bins). Numbers come over once an epoch.

    Source: fast.ai course, part 2 (2019), notebook 06.
    """

    def __init__(self, modules=None, hist=True, bins=40, value_range=(-5.0, 5.0), near=0.01):
        self.modules, self.hist, self.bins, self.value_range, self.near = modules, hist, bins, value_range, near
        self._clear([])

    def _clear(self, names):
        self.steps, self.names, self._found, self._new, self._hooks = [], names, {}, [], []
        self._looking = False
        self._host = torch.empty(0, len(names), 3 + (self.bins if self.hist else 0))

    def begin_fit(self):
        found = _modules_of(self.run.model, self.modules)
        self._clear(list(found))
        self._hooks = [m.register_forward_hook(functools.partial(self._look, n)) for n, m in found.items()]

    def begin_batch(self):
        self._found.clear()
        self._looking = self.run.in_train

    @torch.no_grad()
    def _look(self, name, module, inp, outp):
        if self._looking and isinstance(outp, torch.Tensor) and outp.is_floating_point() and outp.numel():
            out = outp.detach().float()
            std, mean = torch.std_mean(out, correction=0)
            stats = torch.stack([mean, std, (out.abs() < self.near).mean(dtype=torch.float32)])
            if self.hist:
                stats = torch.cat([stats, out.histc(self.bins, *self.value_range)])
            self._found[name] = stats

    def after_loss(self):
        run = self.run
        if run.in_train and self._found:
            missing = torch.full_like(next(iter(self._found.values())), torch.nan)
            self._new.append(torch.stack([self._found.get(name, missing) for name in self.names]))
            self.steps.append(run.n_iter)

    def after_epoch(self):
        self._fetch()

    def after_fit(self):
        for hook in self._hooks:
            hook.remove()
        self._fetch()
        self._hooks = []
        self._found.clear()

    def _fetch(self):
        if self._new:
            self._host = torch.cat([self._host, torch.stack(self._new).cpu()])
            self._new = []
        return self._host

    @property
    def means(self) -> torch.Tensor:
        return self._fetch()[..., 0]

    @property
    def stds(self) -> torch.Tensor:
        return self._fetch()[..., 1]

    @property
    def near_zero(self) -> torch.Tensor:
        return self._fetch()[..., 2]

    @property
    def hists(self) -> torch.Tensor:
        return self._fetch()[..., 3:]

    def plot(self):
        """Mean, deviation and share near zero over the steps, a line for each module. Returns the Figure."""
        from fastrbn import plots

        return plots.plot_activations(self.means, self.stds, self.near_zero, self.names, self.steps)

    def plot_hist(self):
        """Histograms over the steps, an image for each module. Returns the Figure."""
        from fastrbn import plots

        if not self.hist:
            raise ValueError("ActivationStats kept no histograms: make it with hist=True")
        return plots.plot_histograms(self.hists, self.names, self.steps, self.value_range)

    def __getstate__(self):
        # the hooks are the model's; a copy of it takes copies of them along, which look at nothing
        self._fetch()
        return {**super().__getstate__(), "_hooks": [], "_found": {}, "_looking": False}

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
    for m in wanted if isinstance(wanted, (list, tuple, ListContainer)) else [wanted]:
        name = m if isinstance(m, str) else names.get(id(m))
        if name is None or (isinstance(m, str) and m not in named):
            raise ValueError(
                f"ActivationStats needs modules of the model, or their names; got {m!r}. There are: "
                f"{', '.join(filter(None, named))}"
            )
        found[name] = named[m] if isinstance(m, str) else m
    return found
