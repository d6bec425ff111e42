"""`Hook` and `Hooks`: forward hooks that are removed at the end of a block or with their object."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


class ListContainer:
    """A list that can be indexed by a number, a slice, a list of indices or a mask, and prints its first ten items.

    Parameters
    ----------
    items : list, tuple, iterable or object
        The items. Anything that is not iterable, and a string or a module, is a single item.

    Raises
    ------
    IndexError
        When a mask has another length than the list.

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.

    Examples
    --------
    >>> letters = ListContainer("a b c".split())
    >>> letters[[0, 2]], letters[[False, True, True]]
    (['a', 'c'], ['b', 'c'])
    >>> letters
    ListContainer (3 items)
    ['a', 'b', 'c']
    """

    def __init__(self, items: Any):
        self.items = [items] if not isinstance(items, (list, tuple, range)) and not _iterates(items) else list(items)

    def __getitem__(self, index: Any) -> Any:
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

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __repr__(self):
        more = ", …" if len(self) > 10 else ""
        return f"{type(self).__name__} ({len(self)} items)\n[{', '.join(map(repr, self.items[:10]))}{more}]"


def _iterates(value) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes, torch.nn.Module))


def children(m: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the direct children of a module as a list.

    Parameters
    ----------
    m : nn.Module
        Any module.

    Returns
    -------
    list of nn.Module

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.

    Examples
    --------
    >>> children(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    [Linear(in_features=4, out_features=8, bias=True), ReLU()]
    """
    return list(m.children())


class _Removable:
    """Calls `remove()` at the end of its `with` block and when it is deleted."""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.remove()

    def __del__(self):
        self.remove()


class Hook(_Removable):
    """A forward hook that can store what it sees on itself. Also a context manager.

    It is removed by `remove()`, at the end of its `with` block, or when it is deleted.

    Parameters
    ----------
    m : nn.Module
        The module to hook.
    f : callable
        Called as `f(hook, module, input, output)` after each forward pass of `m`.

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.

    Examples
    --------
    >>> layer = nn.Linear(4, 8)
    >>> with Hook(layer, append_stats) as hook:
    ...     _ = layer(torch.randn(16, 4))
    >>> [len(values) for values in hook.stats]
    [1, 1]
    """

    def __init__(self, m: torch.nn.Module, f: Callable[..., Any]):
        # the module must not keep the hook alive, or it would never be deleted
        self._handle = m.register_forward_hook(functools.partial(_call, weakref.ref(self), f))

    def remove(self) -> None:
        """Remove the hook from its module; a second call does nothing."""
        handle = self.__dict__.pop("_handle", None)  # missing when __init__ failed, gone when it was removed
        if handle is not None:
            handle.remove()


class Hooks(_Removable, ListContainer):
    """A list of hooks, one for each module. Also a context manager that removes them all.

    Parameters
    ----------
    ms : nn.Module or iterable of nn.Module
        The modules to hook; of a single module its children.
    f : callable
        Called as `f(hook, module, input, output)`; see `Hook`.

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> with Hooks(model, append_stats) as hooks:
    ...     _ = model(torch.randn(16, 4))
    >>> [len(hook.stats[0]) for hook in hooks]
    [1, 1]
    """

    def __init__(self, ms: torch.nn.Module | Iterable[torch.nn.Module], f: Callable[..., Any]):
        super().__init__([])
        for m in children(ms) if isinstance(ms, torch.nn.Module) else ms:
            self.items.append(Hook(m, f))

    def remove(self) -> None:
        """Remove all hooks; a second call does nothing."""
        for hook in self.__dict__.get("items", []):
            hook.remove()

    def __delitem__(self, index):
        for hook in self.items[index] if isinstance(index, slice) else [self.items[index]]:
            hook.remove()
        super().__delitem__(index)


def append_stats(hook: Any, mod: torch.nn.Module, inp: Any, outp: torch.Tensor) -> None:
    """Append mean and standard deviation of an output to `hook.stats`, in training mode only. A function for `Hooks`.

    Each call waits for the device; `ActivationStats` does not.

    Parameters
    ----------
    hook : Hook
        Gets `stats`, two lists: means and standard deviations.
    mod : nn.Module
        The hooked module.
    inp : tuple
        Its input, which is not used.
    outp : Tensor
        Its output.

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.

    Examples
    --------
    >>> layer = nn.Linear(4, 8)
    >>> with Hook(layer, append_stats) as hook:
    ...     _ = layer(torch.randn(16, 4))
    >>> len(hook.stats)
    2
    """
    _append(hook, mod, outp, (torch.mean, torch.std))


def append_stats_hist(hook: Any, mod: torch.nn.Module, inp: Any, outp: torch.Tensor) -> None:
    """Do what `append_stats` does, and append a histogram of 40 bins from 0 to 10 to a third list.

    Parameters
    ----------
    hook : Hook
        Gets `stats`, three lists.
    mod : nn.Module
        The hooked module.
    inp : tuple
        Its input, which is not used.
    outp : Tensor
        Its output.

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06, where it is called `append_stats` too.

    Examples
    --------
    >>> layer = nn.ReLU()
    >>> with Hook(layer, append_stats_hist) as hook:
    ...     _ = layer(torch.randn(16, 4))
    >>> hook.stats[2][0].shape
    torch.Size([40])
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
