"""Who keeps tensors with a graph: the attributes of a model, of callbacks, of whatever training leaves lying around."""

from __future__ import annotations

import gc
import itertools
import sys
import types
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import walk

_DEPTH, _ENDS = 5, 64  # how deep containers are looked into; of long ones the first and the last so many
_MODULE_TABLES = frozenset(vars(nn.Module()))  # hooks and the like
_FOREIGN = (frozenset(sys.stdlib_module_names) | {"torch", "numpy", "matplotlib", "pandas", "IPython"}) - {"__main__"}
_NO_STATE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


class Held(NamedTuple):
    """An attribute by its qualified name, what it is ("buffer", "attribute", "gradient", "state"), and the tensors with
    a graph in it."""

    name: str
    kind: str
    tensors: list[Tensor]


def of_model(model: nn.Module, prefix: str = "", buffers_only: bool = False) -> list[Held]:
    """What buffers, gradients and attributes of all modules keep."""
    found, seen = [], {id(m) for m in model.modules()}
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


def of_attributes(owner, base: str, without=frozenset(), seen=None) -> list[Held]:
    """What the attributes of an object keep, those `without` left out. `seen`: ids of objects not to enter."""
    seen = set() if seen is None else seen
    found = []
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if name not in without:
            found += _of_value(value, base + name, seen, _DEPTH)
    return found


def of_object(owner, base: str, seen) -> list[Held]:
    """What an object keeps, a module or any other."""
    return of_model(owner, base) if isinstance(owner, nn.Module) else of_attributes(owner, base, (), seen)


def of_optimiser(opt, names: dict) -> list[Held]:
    """What an optimiser's state keeps; `names`: parameter → name."""
    found = []
    for p, state in opt.state.items():
        name = names.get(p, "…") if isinstance(p, Tensor) else p
        found += [h._replace(kind="state") for h in _of_value(state, f"opt.state[{name}]", set(), _DEPTH)]
    return found


def _of_value(value, name, seen, depth) -> list[Held]:
    if isinstance(value, Tensor):
        return [Held(name, "attribute", [value])] if value.grad_fn is not None else []
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, *_NO_STATE)) or id(value) in seen:
        return []
    if isinstance(value, nn.Module):
        return of_model(value, f"{name}.")
    items = _items(value)
    if items is not None:
        seen.add(id(value))
        inside = [h for item in items for h in _of_value(item, name, seen, depth - 1)]
        return _together(inside)
    if type(value).__module__.partition(".")[0] in _FOREIGN or not hasattr(value, "__dict__"):
        return []
    seen.add(id(value))
    return [h for n, v in list(vars(value).items()) for h in _of_value(v, f"{name}.{n}", seen, depth - 1)]


def _items(value):
    """What a container holds, of a long one both ends; None for what is none."""
    if isinstance(value, dict):
        value = value.values()
    if not isinstance(value, (list, tuple, set, frozenset, type({}.values()))) and type(value).__name__ != "deque":
        return None
    if len(value) <= 2 * _ENDS or isinstance(value, (set, frozenset)):
        return list(itertools.islice(value, 2 * _ENDS))
    return [*itertools.islice(value, _ENDS), *itertools.islice(reversed(value), _ENDS)]


def _together(found: list[Held]) -> list[Held]:
    """The elements of one container count as one."""
    joined: dict[str, Held] = {}
    for h in found:
        if h.name in joined:
            joined[h.name].tensors.extend(h.tensors)
        else:
            joined[h.name] = h
    return list(joined.values())


def found_by_collector(tensor: Tensor) -> str | None:
    """The global variable that holds a tensor, or a container with it, as "module.name". Searches all objects: slow."""
    spaces = {}
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


def steps_of(tensor, step_of, limit: int) -> set[int]:
    """The steps, by `step_of(node)`, in which the nodes of a tensor's graph were made."""
    steps = set()
    walk.count_nodes(tensor.grad_fn, lambda node: steps.add(step_of(node)), limit)
    return steps


def has_graph(tensor) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None
