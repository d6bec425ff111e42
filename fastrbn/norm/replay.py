"""A layer's memory of its last steps, so that activation checkpointing can compute one of them again.

Activation checkpointing runs a forward pass a second time, inside the backward pass, when the state has already moved.
The second run must not move the state again, and must normalise with the statistics of the first. So a layer keeps its
last steps, and a forward inside a backward pass looks up the step of its batch.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import nullcontext
from itertools import islice
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

_LOCKS: tuple[RLock, ...] = ()
REMEMBERED = 32  # steps kept per layer: micro-batches in flight and shared layers put others between the two runs


class Step(NamedTuple):
    """One training step of one layer, in the notation of `reference.py`."""

    m: Tensor  # (C,), and the next three
    v: Tensor
    mean: Tensor  # M and V, which normalise
    var: Tensor
    rate: Tensor  # λ, shape (), and all that follow
    share: Tensor  # a
    own: Tensor  # b
    moves: Tensor  # whether M and V moved
    young: Tensor | None  # whether the clamp applies; None without a clamp


def moving(state: Any) -> Any:
    """The lock that a step holds while it reads and moves `state`, so that threads can share a layer."""
    return nullcontext() if torch.compiler.is_compiling() else _LOCKS[id(state.running_count) // 64 % len(_LOCKS)]


def _new_locks() -> None:
    """Make the locks. States share a fixed number of them, so layers need not keep, copy or pickle their own."""
    global _LOCKS
    _LOCKS = tuple(RLock() for _ in range(64))


_new_locks()
if hasattr(os, "register_at_fork"):  # another thread may hold a lock when the process forks
    os.register_at_fork(after_in_child=_new_locks)


def is_batched(t: Tensor) -> bool:
    """True if t stands for a batch of tensors, like an upstream gradient under `is_grads_batched` or vmap."""
    return not torch.compiler.is_compiling() and (is_legacy_batchedtensor(t) or is_batchedtensor(t))


def may_run_again() -> bool:
    """True if this forward may be the first of two runs, so that its step must be remembered.

    Checkpointing makes the first run without a graph (reentrant) or with hooks on saved tensors.
    """
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def running_again() -> bool:
    """True if this forward runs inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recall(recent: deque | None, m: Tensor, v: Tensor) -> Step | None:
    """Inside a backward pass, the remembered step of the batch with statistics m and v; in a first run, None.

    The nearest step is taken, since a kernel may have summed in another order, and the latest of equal ones. On CUDA
    the search runs on the device, without a sync.
    """
    if not recent or not running_again():
        return None
    if len(recent) == 1:
        return recent[0]
    m, v, steps = m.detach(), v.detach(), list(recent)[::-1]
    distance = torch.stack([(old.m - m).square().sum() + (old.v - v).square().sum() for old in steps])
    nearest = distance.nan_to_num(torch.inf).argmin()
    if m.device.type == "cpu":
        return steps[nearest]
    columns: Any = zip(*steps, strict=True)
    return Step(*(None if c[0] is None else torch.stack(c)[nearest] for c in columns))  # type: ignore[arg-type]  # young


@torch.library.custom_op("fastrbn::snapshot", mutates_args=())
def _snapshot(tensors: list[Tensor]) -> Tensor:
    if running_again():
        raise RuntimeError(
            "a compiled running batch norm cannot run twice for one batch, since its statistics would move twice; it "
            "ran inside a backward pass, as with torch.utils.checkpoint around a compiled module: compile the function "
            "that calls checkpoint instead"
        )
    return torch.cat([t.to(tensors[0].dtype).flatten() for t in tensors])


_snapshot.register_fake(lambda tensors: tensors[0].new_empty(sum(t.numel() for t in tensors)))

_library = torch.library.Library("fastrbn", "FRAGMENT")
_library.define("saved_snapshot(Tensor[] tensors) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


# composite, so that the compiler runs this function while it records the forward and backward graphs
@torch.library.impl(_library, "saved_snapshot", "CompositeImplicitAutograd")
def _saved_snapshot(tensors):
    mode = get_proxy_mode()
    if mode is None:
        return _snapshot(tensors)
    nodes = mode.tracer.graph.nodes
    before = len(nodes)
    copy = _snapshot(tensors)
    for node in islice(reversed(nodes), len(nodes) - before):
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return copy


def snapshot(*tensors: Tensor) -> list[Tensor]:
    """The state as a step reads it before moving it: the tensors themselves, or a copy of them under torch.compile.

    The backward graph must not recompute what the step reads: the partitioner treats buffers as constants and would
    read values that the forward graph has changed since. So an operator that is opaque to the compiler makes the copy,
    one tensor of the first one's dtype, and its node is marked to be saved, also inside a checkpointed segment.
    """
    if not torch.compiler.is_compiling():
        return list(tensors)
    parts = torch.ops.fastrbn.saved_snapshot(tensors).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
