"""What a layer remembers of its last steps, so that one can be computed once more.

Activation checkpointing runs a forward pass again inside the backward pass. The state has moved by then; the second run
must neither move it again nor normalise with anything but what the first run used. So a layer keeps its last steps,
and a forward that runs inside a backward pass takes back the one that fits its batch.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import nullcontext
from itertools import islice
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

_LOCKS: tuple[RLock, ...] = ()
REMEMBERED = 32  # forwards of one layer between a forward and its second run: micro-batches in flight, shared layers


class Step(NamedTuple):
    """One training step of one layer: the batch's statistics m, v and the ones M, V that normalise it, all (C,); the
    averaging rate λ, the batch's share a of M and V and its share b of the projection, whether M and V moved, and whether
    the layer is young (None: it has no clamp), all tensors of shape ()."""

    m: Tensor
    v: Tensor
    mean: Tensor
    var: Tensor
    rate: Tensor
    share: Tensor
    own: Tensor
    moves: Tensor
    young: Tensor | None


def moving(state):
    """The lock that a step holds while it reads and moves this state, so that threads may share a layer."""
    return nullcontext() if torch.compiler.is_compiling() else _LOCKS[id(state.running_count) // 64 % len(_LOCKS)]


def _new_locks() -> None:
    """Locks for states in turn: few states share one, and no layer has to keep, copy or pickle its own."""
    global _LOCKS
    _LOCKS = tuple(RLock() for _ in range(64))


_new_locks()
if hasattr(os, "register_at_fork"):  # another thread may hold one at that moment
    os.register_at_fork(after_in_child=_new_locks)


def is_batched(t: Tensor) -> bool:
    """Whether t stands for many tensors at once, as an upstream gradient does under `is_grads_batched` and vmap."""
    return not torch.compiler.is_compiling() and (is_legacy_batchedtensor(t) or is_batchedtensor(t))


def may_run_again() -> bool:
    """Whether this may be the first of two runs: activation checkpointing makes it without a graph (reentrant) or with
    hooks on what the graph saves. Other training steps remember nothing."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def running_again() -> bool:
    """Whether this forward runs inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recall(recent: deque | None, m: Tensor, v: Tensor) -> Step | None:
    """Inside a backward pass, the remembered step whose batch had statistics m and v; None in a first run.

    The nearest one, should a kernel have summed in another order, and the latest of equals; on CUDA found on the
    device, without a sync.
    """
    if not recent or not running_again():
        return None
    if len(recent) == 1:
        return recent[0]
    m, v, recent = m.detach(), v.detach(), list(recent)[::-1]
    distance = torch.stack([(old.m - m).square().sum() + (old.v - v).square().sum() for old in recent])
    nearest = distance.nan_to_num(torch.inf).argmin()
    if m.device.type == "cpu":
        return recent[nearest]
    return Step(*(None if c[0] is None else torch.stack(c)[nearest] for c in zip(*recent, strict=True)))


@torch.library.custom_op("fastrbn::snapshot", mutates_args=())
def _snapshot(t: Tensor) -> Tensor:
    if running_again():
        raise RuntimeError(
            "a compiled running batch norm takes no second run, since its statistics would move once more; it ran "
            "inside a backward pass, as by torch.utils.checkpoint around a compiled module: compile the function "
            "that calls checkpoint instead"
        )
    return t.clone()


_snapshot.register_fake(torch.empty_like)

_library = torch.library.Library("fastrbn", "FRAGMENT")
_library.define("saved_snapshot(Tensor t) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


# composite: the compiler runs this function while it records the forward and backward graph
@torch.library.impl(_library, "saved_snapshot", "CompositeImplicitAutograd")
def _saved_snapshot(t):
    mode = get_proxy_mode()
    if mode is None:
        return _snapshot(t)
    nodes = mode.tracer.graph.nodes
    before = len(nodes)
    copy = _snapshot(t)
    for node in islice(reversed(nodes), len(nodes) - before):
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return copy


def snapshot(*tensors: Tensor) -> list[Tensor]:
    """Copies of the state as it is before a step moves it.

    Under torch.compile, the backward graph must not recompute them: the partitioner treats buffers as constants and
    would read values that the forward graph has changed since. So a copy is made by an operator that the compiler does
    not look into, and its node is marked to be saved, inside a checkpointed segment too.
    """
    if torch.compiler.is_compiling():
        return [torch.ops.fastrbn.saved_snapshot(t) for t in tensors]
    return [t.clone() for t in tensors]
