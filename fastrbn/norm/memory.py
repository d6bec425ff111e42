"""What a training step remembers beyond the state: the moment of the batch, so that it can be computed once more.

Activation checkpointing runs a forward pass again inside the backward pass. The state has moved by then; the second run
must neither move it again nor normalise with anything but what the first run used. So a layer keeps the moments of
its last forwards, and a forward that runs inside a backward pass takes back the one that fits its batch.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

REMEMBERED = 32  # forwards of one layer between a forward and its second run: micro-batches in flight, shared layers


class Moment(NamedTuple):
    """One step of one layer: the batch's statistics m, v, the ones M, V that normalise it, all (C,); its share a of them,
    whether the statistics moved, whether the layer is young (None: it has no clamp): tensors of shape () or numbers."""

    m: Tensor
    v: Tensor
    mean: Tensor
    var: Tensor
    share: Tensor | float
    moves: Tensor | bool
    young: Tensor | bool | None


def may_run_again() -> bool:
    """Whether this may be the first of two runs: activation checkpointing makes it without a graph (reentrant) or with
    hooks on what the graph saves. Other training steps remember nothing."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def running_again() -> bool:
    """Whether this forward runs inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recall(recent: deque | None, m: Tensor, v: Tensor) -> Moment | None:
    """Inside a backward pass, the remembered moment whose batch had statistics m and v; None in a first run.

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
    return Moment(*(None if c[0] is None else torch.stack(c)[nearest] for c in zip(*recent, strict=True)))


@torch.library.custom_op("fastrbn::snapshot", mutates_args=())
def _snapshot(tensors: list[Tensor]) -> list[Tensor]:
    if running_again():
        raise RuntimeError(
            "a compiled running batch norm takes no second run, since its statistics would move once more; it ran "
            "inside a backward pass, as by torch.utils.checkpoint around a compiled module: compile the function "
            "that calls checkpoint instead"
        )
    return [t.clone() for t in tensors]


@_snapshot.register_fake
def _(tensors):
    return [torch.empty_like(t) for t in tensors]


if hasattr(_snapshot, "register_effect"):  # not in torch 2.9
    from torch._library.effects import EffectType

    # what has an effect is not run again in the backward pass, not even in a checkpointed segment
    _snapshot.register_effect(EffectType.ORDERED)


def snapshot(*tensors: Tensor) -> list[Tensor]:
    """Copies of the state as it is before a step moves it.

    Under torch.compile an operator of its own, because the partitioner takes buffers for constants: it computes what
    the backward pass needs anew from a buffer that the forward pass has changed since (seen with torch 2.15: wrong
    gradients, no message). It does not look into an operator that it does not know.
    """
    if torch.compiler.is_compiling():
        return _snapshot(list(tensors))
    return [t.clone() for t in tensors]
