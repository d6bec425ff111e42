"""Forward hooks that are removed when they should be."""

from __future__ import annotations

import functools
import weakref

import torch


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
    """For `Hooks`: `hook.stats` is two lists, means and standard deviations, an entry for each call in training.

    Each call waits for the device; `ActivationStats` does not.

    Source: fast.ai course, part 2 (2019), notebook 06.
    """
    _append(hook, mod, outp, (torch.mean, torch.std))


def append_stats_hist(hook, mod, inp, outp):
    """As `append_stats`, with a third list: histograms of 40 bins from 0 to 10.

    Source: fast.ai course, part 2 (2019), notebook 06, which calls it `append_stats` too.
    """
    _append(hook, mod, outp, (torch.mean, torch.std, lambda out: out.histc(40, 0, 10)))


def _append(hook, mod, outp, functions):
    if not hasattr(hook, "stats"):
        hook.stats = tuple([] for _ in functions)
    if mod.training:
        out = outp.detach().float().cpu()
        for values, function in zip(hook.stats, functions):
            values.append(function(out))


def _call(reference, f, module, inp, outp):
    hook = reference()
    if hook is not None:
        f(hook, module, inp, outp)
