"""Running batch norm as a function of its state, and the checks of its arguments."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module

from .choose import choose, implementation
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
    process_group: Any = None,
    backend: str = "auto",
    recent: deque | None = None,
) -> Tensor:
    """Apply running batch norm to `x` as a function of an explicit state.

    An empty batch passes through and leaves the state unchanged.

    Parameters
    ----------
    x : Tensor
        Shape (N, C, *), any floating dtype and memory format.
    state : NormState
        From `NormState.new(C)`. Moved in place in training, only read otherwise. It never holds an autograd graph.
    weight, bias : Tensor or None, default None
        Scale γ and shift β, shape (C,).
    training : bool, default True
        Move the state by this batch before normalising with it.
    mom : float, default 0.1
        How fast the statistics move; see `RunningBatchNorm`.
    eps : float, default 1e-5
        Added to the variance.
    recipe : str or Recipe, default "default"
        How statistics are averaged; see `Recipe`.
    process_group : optional
        Use the statistics of the batches of all its ranks together. Every rank must call.
    backend : {"auto", "reference", "fused", "native", "triton"}, default "auto"
        Implementation; "auto" chooses by tensor and recipe.
    recent : deque, optional
        A `deque(maxlen=32)` that belongs to the state. Needed only under activation checkpointing.

    Returns
    -------
    Tensor
        Same shape, dtype and memory format as `x`.

    Raises
    ------
    ValueError
        If `x` has a wrong rank, number of channels or dtype, if `weight` or `bias` has another size, or if the recipe
        or backend is unknown or cannot be used here.

    Examples
    --------
    >>> state = NormState.new(3)
    >>> y = running_batch_norm(torch.randn(1, 3, 8, 8), state)   # a batch of one trains
    >>> y.shape, int(state.num_samples_tracked)
    (torch.Size([1, 3, 8, 8]), 1)
    """
    nf = state.running_mean.numel()
    check_input(x, nf)
    _check_parameters(nf, weight, bias)
    recipe = get_recipe(recipe)
    choice = choose(x, state, weight, bias, recipe if training else None, process_group, backend)
    module = implementation(choice.name)
    if not training or (x.numel() == 0 and process_group is None):
        return module.evaluate(x, weight, bias, state, eps)
    twice = recent is not None and may_run_again()
    plan = Plan(recipe, mom, eps, process_group, recent, twice)
    return module.normalize(x, weight, bias, state, plan)


def check_input(x: Tensor, num_features: int, ranks: tuple[int, ...] = (), name: str = "running_batch_norm") -> None:
    """Raise ValueError unless x is floating-point, (N, `num_features`, *), and of one of `ranks` if any are given."""
    if torch.jit.is_tracing():  # under tracing, sizes are tensors and must not be turned into Python numbers
        return
    if ranks and x.dim() not in ranks or x.dim() < 2:
        rule = " or ".join(f"{r}d" for r in ranks) if ranks else "(N, C, *), at least 2d,"
        raise ValueError(f"{name} needs {rule} input; got {x.dim()}d of shape {tuple(x.shape)}: {_advice(x, ranks)}")
    if x.shape[1] != num_features:
        raise ValueError(
            f"{name} has {num_features} channels, so dimension 1 of its input must be {num_features}; got shape "
            f"{tuple(x.shape)}: create the layer with num_features={x.shape[1]} or permute the input to (N, C, *)"
        )
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} needs floating-point input; got {x.dtype}: convert it, as with x.float()")


def as_leaf(layer: Module, x: Proxy) -> Proxy:
    """Record a call of the layer as a leaf in the graph that torch.fx is building, as for the layers of torch.nn."""
    path = x.tracer.path_of_module(layer)  # type: ignore[attr-defined]  # modules are traced by a Tracer, which has it
    if not path:
        raise ValueError(
            f"torch.fx records a {type(layer).__name__} as one call of a submodule; got the layer alone: trace "
            "nn.Sequential(layer)"
        )
    return x.tracer.create_proxy("call_module", path, (x,), {})


def _check_parameters(nf: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """Refuse parameters of another size: PyTorch's operators would read past the end of a short one."""
    if torch.jit.is_tracing():
        return
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.numel() != nf:
            raise ValueError(f"{name} must have one value for each of {nf} channels; got shape {tuple(p.shape)}")


def _advice(x: Tensor, ranks: tuple[int, ...]) -> str:
    if x.dim() < 2 or (ranks and x.dim() < min(ranks)):
        return "add the missing dimensions, such as the batch dimension with x[None]"
    return "RunningBatchNorm takes any rank, RunningBatchNorm1d, 2d and 3d the ranks of nn.BatchNorm1d, 2d and 3d"
