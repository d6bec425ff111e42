"""Which implementation computes a layer's step, and the functional form that users call.

Every backend is a module with `normalize(x, weight, bias, state, plan)` and `evaluate(x, weight, bias, state, eps)`
as in `reference.py`. A new one is added to `_BACKENDS` and, when it is faster somewhere, to `choose`.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from . import fused, reference
from .recipes import Plan, Recipe, get_recipe, one_of
from .reference import NormState

_BACKENDS = {"reference": reference, "fused": fused}
BACKENDS = ("auto", *_BACKENDS)


def choose(x: Tensor, state: NormState, process_group=None, backend: str = "auto") -> tuple[str, str]:
    """The backend for `x`, and why, in words. Raises ValueError for an unknown name, or one that cannot serve."""
    one_of("backend", backend, BACKENDS)
    why_not = None
    if torch.compiler.is_compiling():
        why_not = "torch.compile fuses the plain formulas itself"
    elif process_group is not None:
        why_not = "statistics are merged over a process group"
    elif torch.promote_types(x.dtype, state.running_mean.dtype) != state.running_mean.dtype:
        why_not = f"{x.dtype} input in a layer with {state.running_mean.dtype} statistics is computed in the wider one"
    if backend == "fused" and why_not is not None:
        raise ValueError(f"backend 'fused' cannot be used here: {why_not}; choose 'auto' or 'reference'")
    if backend != "auto":
        return backend, "asked for by name"
    return ("reference", why_not) if why_not else ("fused", "PyTorch's fused operators and a backward in closed form")


def running_batch_norm(
    x: Tensor,
    state: NormState,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    mom: float = 0.1,
    eps: float = 1e-5,
    recipe: str | Recipe = "default",
    process_group=None,
    backend: str = "auto",
    recent: deque | None = None,
) -> Tensor:
    """Running batch norm as a function of its state.

    - `x`: (N, C, *), any floating dtype; the result has its shape, dtype and memory format.
    - `state`: `NormState.new(C)`; moved in place when `training`, read otherwise. It never holds a graph.
    - `weight`, `bias`: γ and β, (C,) or None.
    - `mom`, `recipe`: see `Recipe`. `eps`: added to the variance.
    - `process_group`: statistics are those of all its ranks' batches together; every rank must call.
    - `recent`: a deque that belongs to the state (`deque(maxlen=32)`), needed under activation checkpointing alone.

    An empty batch passes through and leaves the state alone. Raises ValueError for a wrong rank, channel count or
    dtype.
    """
    check_input(x, state.running_mean.numel())
    implementation = _BACKENDS[choose(x, state, process_group, backend)[0]]
    if not training or (x.numel() == 0 and process_group is None):
        return implementation.evaluate(x, weight, bias, state, eps)
    return implementation.normalize(x, weight, bias, state, Plan(get_recipe(recipe), mom, eps, process_group, recent))


def check_input(x: Tensor, num_features: int, ranks: tuple[int, ...] = (), name: str = "running_batch_norm") -> None:
    """Raise ValueError unless x is floating, (N, C, *) with `num_features` channels and one of `ranks` (none: any)."""
    if ranks and x.dim() not in ranks or x.dim() < 2:
        rule = " or ".join(f"{r}d" for r in ranks) if ranks else "(N, C, *), at least 2d,"
        raise ValueError(f"{name} needs {rule} input; got {x.dim()}d of shape {tuple(x.shape)}: {_advice(x, ranks)}")
    if x.shape[1] != num_features:
        raise ValueError(
            f"{name} has {num_features} channels, so dimension 1 of its input must be {num_features}; got shape "
            f"{tuple(x.shape)}: build the layer with num_features={x.shape[1]} or permute the input to (N, C, *)"
        )
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} needs floating-point input; got {x.dtype}: convert it, as with x.float()")


def _advice(x: Tensor, ranks: tuple[int, ...]) -> str:
    if x.dim() < 2 or (ranks and x.dim() < min(ranks)):
        return "add the missing dimensions, as with x[None] for the batch's"
    return "RunningBatchNorm takes any rank, RunningBatchNorm1d, 2d and 3d the ranks of nn.BatchNorm1d, 2d and 3d"
