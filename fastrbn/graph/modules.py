"""The module that each node of the graph came from: recorded while the model runs, or inferred from its parameters."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrbn.util import items_of

from . import walk
from .nodes import GraphNode

_NOTE = "fastrbn.module"
# operations between a parameter and its use; they belong to the module that uses it
_PASSES_ON = ("T", "Transpose", "Permute", "View", "UnsafeView", "Expand", "Unsqueeze", "Squeeze", "ToCopy", "Alias")


@contextlib.contextmanager
def record_modules(model: nn.Module) -> Iterator[None]:
    """Record which module makes each node while the block runs, for a later `autograd_graph`.

    The innermost module counts. Modules inside a compiled module are not seen; there the compiled module counts. The
    hooks are removed after the block, also after an error.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    context manager

    Raises
    ------
    TypeError
        If `model` is not an nn.Module.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> with record_modules(model):
    ...     loss = model(torch.randn(2, 4)).sum()
    >>> [(n.name, n.module) for n in autograd_graph(loss, model).nodes if "Relu" in n.name]
    [('ReluBackward0', '1')]
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"record_modules needs an nn.Module; got {type(model).__name__}")
    open_calls: dict[nn.Module, list[int]] = collections.defaultdict(list)
    calls: collections.Counter[str] = collections.Counter()
    handles = []
    try:
        for name, module in model.named_modules():
            if "_orig_mod" not in name.split("."):
                enter = functools.partial(_enter, open_calls)
                leave = functools.partial(_leave, open_calls, calls, name)
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(open_calls: dict[nn.Module, list[int]], module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        open_calls[module].append(walk.clock())


def _leave(
    open_calls: dict[nn.Module, list[int]],
    calls: collections.Counter[str],
    name: str,
    module: nn.Module,
    args: Any,
    output: Any,
) -> None:
    """Note the module at each node made since its call began."""
    if torch.compiler.is_compiling() or not open_calls[module]:
        return
    start = open_calls[module].pop()
    calls[name] += 1
    note = (name, type(module).__name__, calls[name])
    kept = [b for b in module._buffers.values() if b is not None]  # an undetached buffer is part of the graph
    stack = [t.grad_fn for t in (*items_of(output, Tensor), *kept) if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if walk.is_leaf(node) or walk.made_at(node) < start:
            continue
        walk.notes(node).setdefault(_NOTE, note)  # an inner module may have set it already
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def modules_of(nodes: Sequence[Any], names: dict[Tensor, str]) -> list[tuple[str | None, str, int]]:
    """For each node (module, its class, number of the call), as recorded or inferred from the parameters it uses.

    `nodes` are in forward order; `names` maps parameters to qualified names. The module is None if unknown.
    """
    owner: dict[Any, str | None] = {}
    found = []
    for node in nodes:
        if walk.is_leaf(node):
            owner[node] = _parent(names.get(node.variable))
            found.append((owner[node], "", 0))
            continue
        note = walk.notes(node).get(_NOTE)
        inputs = [child for child, _ in node.next_functions if child is not None]
        inferred = _common([o for child in inputs if (o := owner.get(child)) is not None])
        found.append(note or (inferred, "", 0))
        kind = walk.name_of(node).partition("Backward")[0]
        if len(inputs) == 1 and kind in _PASSES_ON and inputs[0] in owner:
            owner[node] = owner[inputs[0]]
    return found


def _parent(name: str | None) -> str | None:
    return None if name is None else name.rpartition(".")[0]


def _common(owners: list[str]) -> str | None:
    """The innermost module that contains all of them."""
    if not owners:
        return None
    parts = [o.split(".") if o else [] for o in owners]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])


def groups(nodes: Sequence[GraphNode], edges: Iterable[tuple[int, int]], depth: int | None) -> list[list[int]]:
    """Group node ids into boxes at the level of modules, in forward order and without cycles.

    A module whose operations surround those of another module becomes two boxes.
    """
    inner = any(n.module for n in nodes if n.kind == "op")  # if so, the model's own operations stay separate nodes
    keys = {n.id: _key(n, depth, inner) for n in nodes}
    after: dict[int, list[int]] = collections.defaultdict(list)
    for a, b in edges:
        after[a].append(b)
    # level: steps from one module into another on the way to the result; boxes of one level cannot depend on each other
    level: dict[int, int] = {}
    ops = [n.id for n in nodes if n.kind == "op"]
    for i in reversed(ops):
        level[i] = min((level[s] - (keys[s] != keys[i]) for s in after[i]), default=0)
    boxes: dict[Any, list[int]] = collections.defaultdict(list)
    for i in ops:
        boxes[level[i], keys[i]].append(i)
    place = {i: box for box, members in boxes.items() for i in members}
    first = min(level.values(), default=0) - 1
    for n in nodes:
        if n.kind != "op":
            users = {place[s] for s in after[n.id]}
            box = users.pop() if len(users) == 1 and n.kind == "parameter" else (first, ("leaf", n.id))
            if box[1][0] == "op":
                box = (first, ("leaf", n.id))
            boxes[box].append(n.id)
    return [sorted(boxes[box]) for box in sorted(boxes, key=lambda b: (b[0], min(boxes[b])))]


def _key(node: GraphNode, depth: int | None, inner: bool) -> tuple[Any, ...]:
    """What the nodes of one box have in common."""
    if node.kind != "op" or node.module is None or (node.module == "" and inner):
        return "op", node.id
    parts = node.module.split(".")
    if depth is None or len(parts) < depth:
        return "module", node.module, node.call
    return "module", ".".join(parts[:depth]), 0  # call numbers of inner modules do not apply to the outer one
