"""Reading PyTorch's autograd nodes: their order, names, sizes and saved tensors. All use of private API is here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastrbn.util import items_of

_LEAF = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)  # AccumulateGrad
_SAVED: dict[type, list[str]] = {}  # the attributes in which each kind of node saves tensors
CHANGED = "modified by an inplace operation"  # part of autograd's error message


def root_of(tensor: Tensor) -> Any:
    """The node that receives a tensor's gradient; None if the tensor does not require grad."""
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def is_leaf(node: Any) -> bool:
    return type(node) is _LEAF


def reach(roots: Iterable[Any]) -> list[Any]:
    """All nodes reachable from `roots`, each once, in the order of a forward pass: inputs before their users."""
    order: list[Any] = []
    seen: set[Any] = set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(_inputs(root)))]  # no recursion: a leaking graph is as deep as the training is long
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


def _inputs(node: Any) -> list[Any]:
    """Operations first, then parameters, which therefore end up next to their users."""
    found = [child for child, _ in node.next_functions if child is not None]
    return sorted(found, key=is_leaf)


def count_nodes(root: Any, visit: Callable[[Any], object], limit: int) -> int:
    """Number of nodes from `root` on, up to about `limit`; `visit` is called with each non-leaf node."""
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
    """The sequence number that the next node made in this thread gets; later nodes get larger ones."""
    return torch._C._autograd._get_sequence_nr()


def made_at(node: Any) -> int:
    """A node's sequence number, see `clock`. Each thread counts separately."""
    return node._sequence_nr()


def notes(node: Any) -> dict[str, Any]:
    """A dictionary that lives as long as the node; it marks nodes without keeping them alive."""
    return node.metadata


def name_of(node: Any) -> str:
    """Autograd's name of the node, without its namespace."""
    return node.name().rpartition("::")[2]


def output_of(node) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    """Shape and dtype of the node's first output."""
    for one in getattr(node, "_input_metadata", ()):  # a backward node's inputs are the forward pass's outputs
        return tuple(one.shape), one.dtype
    return None, None


def saved_by(node: Any) -> tuple[list[Tensor], bool, list[Tensor | None]]:
    """Read what a node saved for its backward pass.

    Returns the saved tensors, whether they have been freed, and those that were changed in place since (None for one
    that torch before 2.10 does not show).

    Values packed by hooks on saved tensors (offloading, activation checkpointing) are not unpacked, because that may
    recompute a forward pass. torch before 2.10 does not say which values are packed, so there they are unpacked.
    """
    kind = type(node)
    if kind not in _SAVED:
        _SAVED[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    tensors: list[Tensor] = []
    freed, changed = False, []
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
                tensors += items_of(_unpacked(node, name, i, one), Tensor)
            except RuntimeError as error:
                if "been freed" in str(error):
                    freed = True
                elif CHANGED not in str(error):
                    raise
                elif i is None or not _unpacks(one):  # if several are saved together, one that changed makes all fail
                    changed.append(getattr(one, "data", None))
    own = getattr(node, "__dict__", {}) if isinstance(node, torch.autograd.function.BackwardCFunction) else {}
    return [*tensors, *items_of(own, Tensor)], freed, changed


def _unpacks(one: Any) -> bool:
    try:
        return hasattr(one, "unpack") and one.unpack() is not None
    except RuntimeError:
        return False


def _unpacked(node: Any, name: str, i: int | None, one: Any) -> Any:
    """The value of a saved tensor, or the packed one if a hook packed it."""
    if getattr(one, "unpack_hook", None) is not None:
        return one.data
    value = getattr(node, "saved_tensors" if name == "_raw_saved_tensors" else name.replace("_raw", "", 1))
    return value if i is None else value[i]


def memory_of(tensor: Tensor) -> tuple[object, int]:
    """A key that identifies the tensor's memory, and the number of bytes of it that the tensor uses."""
    try:
        storage = tensor.untyped_storage()
        key = (str(tensor.device), storage.data_ptr() or id(tensor))
        return key, min(storage.nbytes(), tensor.numel() * tensor.element_size())
    except (RuntimeError, NotImplementedError):  # sparse, or a tensor without storage
        return id(tensor), 0
