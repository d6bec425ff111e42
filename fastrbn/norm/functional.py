"""Running batch norm as a function of its state, and the checks of what it is given."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module

from .choose import choose
from .recipes import Plan, Recipe, get_recipe
from .reference import NormState
from .replay import may_run_again


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
    dtype, and for a weight or bias of another size.
    """
    nf = state.running_mean.numel()
    check_input(x, nf)
    _check_parameters(nf, weight, bias)
    recipe = get_recipe(recipe)
    implementation = choose(x, state, weight, bias, recipe if training else None, process_group, backend).backend
    if not training or (x.numel() == 0 and process_group is None):
        return implementation.evaluate(x, weight, bias, state, eps)
    twice = recent is not None and may_run_again()
    plan = Plan(recipe, mom, eps, process_group, recent, twice)
    return implementation.normalize(x, weight, bias, state, plan)


def check_input(x: Tensor, num_features: int, ranks: tuple[int, ...] = (), name: str = "running_batch_norm") -> None:
    """Raise ValueError unless x is floating, (N, C, *) with `num_features` channels and one of `ranks` (none: any)."""
    if torch.jit.is_tracing():  # sizes are tensors to a tracer, which must not become Python's
        return
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


def as_leaf(layer: Module, x: Proxy) -> Proxy:
    """A call of the layer in the graph that torch.fx is recording: a leaf, as the layers of torch.nn are."""
    path = x.tracer.path_of_module(layer)
    if not path:
        raise ValueError(
            f"torch.fx records a {type(layer).__name__} as one call of a module that holds it; got the layer alone: "
            "trace nn.Sequential(layer)"
        )
    return x.tracer.create_proxy("call_module", path, (x,), {})


def _check_parameters(nf: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """PyTorch's operators read a bias of any size, beyond its end too."""
    if torch.jit.is_tracing():
        return
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.numel() != nf:
            raise ValueError(f"{name} must have one number for each of {nf} channels; got shape {tuple(p.shape)}")


def _advice(x: Tensor, ranks: tuple[int, ...]) -> str:
    if x.dim() < 2 or (ranks and x.dim() < min(ranks)):
        return "add the missing dimensions, as with x[None] for the batch's"
    return "RunningBatchNorm takes any rank, RunningBatchNorm1d, 2d and 3d the ranks of nn.BatchNorm1d, 2d and 3d"
