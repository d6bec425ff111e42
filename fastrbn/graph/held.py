"""Who keeps tensors with a graph alive: attributes of models, callbacks and anything else around a training."""

from __future__ import annotations

import gc
import itertools
import sys
import types
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import walk

_DEPTH, _ENDS = 5, 64  # how deep containers are searched, and how many items at each end of long ones
_MODULE_TABLES = frozenset(vars(nn.Module()))  # hooks and the like
_LIBRARIES = {"torch", "numpy", "matplotlib", "pandas", "IPython", "lightning", "pytorch_lightning", "fastai"}
_FOREIGN = (frozenset(sys.stdlib_module_names) | _LIBRARIES) - {"__main__"}
_NO_STATE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


class Held(NamedTuple):
    """An attribute that keeps tensors with a graph.

    `name` is its qualified name and `kind` one of "buffer", "attribute", "gradient", "state".
    """

    name: str
    kind: str
    tensors: list[Tensor]


class Changed(NamedTuple):
    """A tensor that was changed in place after `nodes` had saved it for their backward pass.

    `name` is its qualified name, or its shape if it has none; `kind` is one of "buffer", "attribute", "tensor",
    "parameter".
    """

    name: str
    kind: str
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} was changed in place after {', '.join(self.nodes)} had saved it"


_KINDS = ("buffer", "attribute", "tensor", "parameter")  # parameters last: an optimiser changes them in every step


def changed_in_place(tensor: Tensor, model: nn.Module) -> list[Changed]:
    """The tensors that the backward pass of `tensor` needs and that have been changed in place."""
    names = names_by_memory(model)
    nodes: dict[tuple[str, str], dict[str, None]] = {}
    for node in walk.reach([tensor.grad_fn]):
        for t in [] if walk.is_leaf(node) else walk.saved_by(node)[2]:
            name, kind = name_of(t, names)
            shape = "" if t is None else " " + ("×".join(map(str, t.shape)) or "number")
            nodes.setdefault((name or f"a tensor{shape}", kind), {})[walk.name_of(node)] = None
    found = [Changed(name, kind, tuple(of)) for (name, kind), of in nodes.items()]
    return sorted(found, key=lambda c: _KINDS.index(c.kind))


def names_by_memory(model: nn.Module) -> dict[Any, tuple[str, str]]:
    """(qualified name, kind) of parameters, buffers and tensor attributes, by their memory."""
    names: dict[Any, tuple[str, str]] = {}
    for prefix, module in model.named_modules():
        own = {n: t for n, t in vars(module).items() if isinstance(t, Tensor)}
        for kind, table in (("buffer", module._buffers), ("parameter", module._parameters), ("attribute", own)):
            for name, t in table.items():
                if t is not None and not nn.parameter.is_lazy(t) and t.numel():
                    names.setdefault(walk.memory_of(t)[0], (f"{prefix}.{name}".lstrip("."), kind))
    return names


def name_of(tensor: Tensor | None, names: dict[Any, tuple[str, str]]) -> tuple[str | None, str]:
    """(qualified name, kind) of a tensor; (None, "tensor") if it has no name."""
    return (None, "tensor") if tensor is None else names.get(walk.memory_of(tensor)[0], (None, "tensor"))


def of_model(
    model: nn.Module, prefix: str = "", buffers_only: bool = False, seen: set[int] | None = None
) -> list[Held]:
    """What the buffers, gradients and attributes of all modules hold; `seen` is as in `of_attributes`."""
    found: list[Held] = []
    seen = set() if seen is None else seen
    seen.update(id(m) for m in model.modules())
    for path, module in model.named_modules():
        base = f"{prefix}{path}." if path else prefix
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.grad_fn is not None:
                found.append(Held(base + name, "buffer", [buffer]))
        if buffers_only:
            continue
        for name, p in module._parameters.items():
            if p is not None and p.grad is not None and p.grad.grad_fn is not None:
                found.append(Held(f"{base}{name}.grad", "gradient", [p.grad]))
        found += of_attributes(module, base, _MODULE_TABLES, seen)
    return found


def of_attributes(
    owner: Any, base: str, without: Container[str] = frozenset(), seen: set[int] | None = None
) -> list[Held]:
    """What the attributes of an object hold, except those `without`; `seen` has the ids of objects not to enter."""
    seen = set() if seen is None else seen
    found = []
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if name not in without:
            found += _of_value(value, base + name, seen, _DEPTH)
    return found


def of_object(owner: Any, base: str, seen: set[int]) -> list[Held]:
    """What a module or any other object holds."""
    return of_model(owner, base) if isinstance(owner, nn.Module) else of_attributes(owner, base, (), seen)


def of_optimiser(opt: Any, names: dict[Tensor, str]) -> list[Held]:
    """What an optimiser's state holds; `names` maps parameters to names."""
    found = []
    for p, state in opt.state.items():
        name = names.get(p, "…") if isinstance(p, Tensor) else p
        found += [h._replace(kind="state") for h in _of_value(state, f"opt.state[{name}]", set(), _DEPTH)]
    return found


def _of_value(value: Any, name: str, seen: set[int], depth: int) -> list[Held]:
    if isinstance(value, Tensor):
        return [Held(name, "attribute", [value])] if value.grad_fn is not None else []
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, *_NO_STATE)) or id(value) in seen:
        return []
    if isinstance(value, nn.Module):
        return of_model(value, f"{name}.", seen=seen)
    items = _items(value)
    if items is not None:
        seen.add(id(value))
        inside = [h for item in items for h in _of_value(item, name, seen, depth - 1)]
        return _together(inside)
    if type(value).__module__.partition(".")[0] in _FOREIGN or not hasattr(value, "__dict__"):
        return []
    seen.add(id(value))
    return [h for n, v in list(vars(value).items()) for h in _of_value(v, f"{name}.{n}", seen, depth - 1)]


def _items(value: Any) -> list[Any] | None:
    """The items of a container, only both ends of a long one; None if it is not a container."""
    if isinstance(value, dict):
        value = value.values()
    if not isinstance(value, (list, tuple, set, frozenset, type({}.values()))) and type(value).__name__ != "deque":
        return None
    if len(value) <= 2 * _ENDS or isinstance(value, (set, frozenset)):
        return list(itertools.islice(value, 2 * _ENDS))
    return [*itertools.islice(value, _ENDS), *itertools.islice(reversed(value), _ENDS)]


def _together(found: list[Held]) -> list[Held]:
    """Merge the entries of each container into one."""
    joined: dict[str, Held] = {}
    for h in found:
        if h.name in joined:
            joined[h.name].tensors.extend(h.tensors)
        else:
            joined[h.name] = h
    return list(joined.values())


def found_by_collector(tensor: Tensor) -> str | None:
    """The global variable that holds a tensor or its container, as "module.name". Slow: searches all objects."""
    spaces: dict[int, str] = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType):
            spaces.setdefault(id(vars(module)), name)
    holders = [tensor, *(c for c in gc.get_referrers(tensor) if isinstance(c, (list, dict, set, tuple)))]
    for held in holders:
        for space in gc.get_referrers(held):
            if id(space) in spaces:
                for name, value in list(space.items()):
                    if value is held:
                        return f"{spaces[id(space)]}.{name}"
    return None


def steps_of(tensor: Tensor, step_of: Callable[[Any], int], limit: int) -> set[int]:
    """The steps, by `step_of(node)`, in which the nodes of a tensor's graph were made."""
    steps: set[int] = set()
    walk.count_nodes(tensor.grad_fn, lambda node: steps.add(step_of(node)), limit)
    return steps


def has_graph(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None
