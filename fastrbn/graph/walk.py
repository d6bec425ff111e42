"""Reading PyTorch's autograd nodes: their order, names and sizes, and what they save. What is no public API is here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

_LEAF = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)  # AccumulateGrad
_SAVED: dict[type, list[str]] = {}  # the names under which a kind of node saves tensors
CHANGED = "modified by an inplace operation"  # in the text of autograd's error


def root_of(tensor: Tensor):
    """The node that a tensor's gradient arrives at: its grad_fn, for a leaf the one that accumulates. None without."""
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def is_leaf(node) -> bool:
    return type(node) is _LEAF


def reach(roots) -> list:
    """All nodes from `roots` on, each once, in the order of a forward pass: inputs before what uses them."""
    order, seen = [], set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(_inputs(root)))]  # no recursion: graphs are as deep as training is long
        while stack:
            node, rest = stack[-1]
            for child in rest:
                if child not in seen:
                    seen.add(child)
                    stack.append((child, iter(_inputs(child))))
                    break
            else:
                order.append(node)
                stack.pop()
    return order


def _inputs(node):
    """Operations first, then parameters: these end up next to their use."""
    found = [child for child, _ in node.next_functions if child is not None]
    return sorted(found, key=is_leaf)


def count_nodes(root, visit, limit: int) -> int:
    """How many nodes there are from `root` on, at most about `limit`; `visit` is called with each that is no leaf."""
    seen, stack = {root}, [root]
    while stack and len(seen) < limit:
        node = stack.pop()
        if type(node) is _LEAF:
            continue
        visit(node)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return len(seen)


def clock() -> int:
    """The number that the next node made in this thread gets; nodes made later have larger ones."""
    return torch._C._autograd._get_sequence_nr()


def made_at(node) -> int:
    """A node's number in the sense of `clock`. Each thread counts by itself."""
    return node._sequence_nr()


def notes(node) -> dict:
    """A dictionary that lives as long as the node: to know it again without holding it, which would keep it alive."""
    return node.metadata


def name_of(node) -> str:
    return node.name().rpartition("::")[2]


def output_of(node) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    """Shape and dtype of the first output."""
    for one in getattr(node, "_input_metadata", ()):  # the inputs of a backward node are the outputs of the forward
        return tuple(one.shape), one.dtype
    return None, None


def saved_by(node) -> tuple[list[Tensor], bool, list[Tensor | None]]:
    """The tensors a node keeps for its backward; whether it has freed them; those that were changed in place since
    (None for one that torch before 2.10 does not show).

    What hooks on saved tensors have packed (offloading, activation checkpointing) is not unpacked: that may compute a
    forward pass again. torch before 2.10 does not tell, and there they run.
    """
    kind = type(node)
    if kind not in _SAVED:
        _SAVED[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    tensors, freed, changed = [], False, []
    for name in _SAVED[kind]:
        try:
            raw = getattr(node, name)
        except RuntimeError as error:
            if "been freed" not in str(error):
                raise
            freed = True
            continue
        for i, one in enumerate(raw) if isinstance(raw, (tuple, list)) else ((None, raw),):
            try:
                tensors += _tensors(_unpacked(node, name, i, one))
            except RuntimeError as error:
                if "been freed" in str(error):
                    freed = True
                elif CHANGED not in str(error):
                    raise
                elif i is None or not _unpacks(one):  # of several tensors, one fails for all
                    changed.append(getattr(one, "data", None))
    own = getattr(node, "__dict__", {}) if isinstance(node, torch.autograd.function.BackwardCFunction) else {}
    return tensors + _tensors(tuple(own.values())), freed, changed


def _unpacks(one) -> bool:
    try:
        return hasattr(one, "unpack") and one.unpack() is not None
    except RuntimeError:
        return False


def _unpacked(node, name, i, one):
    if getattr(one, "unpack_hook", None) is not None:
        return one.data
    value = getattr(node, "saved_tensors" if name == "_raw_saved_tensors" else name.replace("_raw", "", 1))
    return value if i is None else value[i]


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def memory_of(tensor: Tensor) -> tuple[object, int]:
    """What tells one piece of memory from another, and how many bytes of it this tensor keeps."""
    try:
        storage = tensor.untyped_storage()
        key = (str(tensor.device), storage.data_ptr() or id(tensor))
        return key, min(storage.nbytes(), tensor.numel() * tensor.element_size())
    except (RuntimeError, NotImplementedError):  # sparse, or without memory of its own
        return id(tensor), 0
