"""Which module a node of the graph came from: recorded while the model runs, or told by the parameters it uses."""

from __future__ import annotations

import collections
import contextlib
import functools

import torch

from . import walk

_NOTE = "fastrbn.module"
# what lies between a parameter and its use: these belong to whoever uses it
_PASSES_ON = ("T", "Transpose", "Permute", "View", "UnsafeView", "Expand", "Unsqueeze", "Squeeze", "ToCopy", "Alias")


@contextlib.contextmanager
def record_modules(model):
    """`with record_modules(model): loss = …`: nodes made in the block remember which module made them.

    `autograd_graph` reads it, whenever it is called. The innermost module counts. A module inside a compiled one is not
    seen: there the whole counts. The hooks are gone after the block, also after an error.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"record_modules needs an nn.Module; got {type(model).__name__}")
    open_calls, calls = collections.defaultdict(list), collections.Counter()
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


def _enter(open_calls, module, args):
    if not torch.compiler.is_compiling():
        open_calls[module].append(walk.clock())


def _leave(open_calls, calls, name, module, args, output):
    if torch.compiler.is_compiling() or not open_calls[module]:
        return
    start = open_calls[module].pop()
    calls[name] += 1
    note = (name, type(module).__name__, calls[name])
    kept = [b for b in module._buffers.values() if b is not None]  # one that forgets to detach is part of the graph
    stack = [t.grad_fn for t in (*walk._tensors(output), *kept) if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if walk.is_leaf(node) or walk.made_at(node) < start:
            continue
        walk.notes(node).setdefault(_NOTE, note)  # an inner module has been here before
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def modules_of(nodes, names: dict) -> list[tuple[str | None, str, int]]:
    """For each node (module, its class, number of the call), from the record or from the parameters that it uses.

    `nodes` in forward order; `names`: parameter → qualified name. Module None where nothing tells.
    """
    owner, found = {}, []
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
    """The innermost module that holds all of them."""
    if not owners:
        return None
    parts = [o.split(".") if o else [] for o in owners]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])


def groups(nodes, edges, depth: int | None) -> list[list[int]]:
    """Ids of nodes that form one box each at the level of modules, in forward order, so that no two boxes wait for each
    other: a module whose operations surround another's becomes two."""
    inner = any(n.module for n in nodes if n.kind == "op")  # the model's own operations stay single among its modules'
    keys = {n.id: _key(n, depth, inner) for n in nodes}
    after = collections.defaultdict(list)
    for a, b in edges:
        after[a].append(b)
    # steps down from one module into another on the way to the result: boxes of one level cannot wait for each other
    level = {}
    ops = [n.id for n in nodes if n.kind == "op"]
    for i in reversed(ops):
        level[i] = min((level[s] - (keys[s] != keys[i]) for s in after[i]), default=0)
    boxes = collections.defaultdict(list)
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


def _key(node, depth, inner):
    if node.kind != "op" or node.module is None or (node.module == "" and inner):
        return "op", node.id
    parts = node.module.split(".")
    if depth is None or len(parts) < depth:
        return "module", node.module, node.call
    return "module", ".".join(parts[:depth]), 0  # calls of what is inside say nothing of the whole
