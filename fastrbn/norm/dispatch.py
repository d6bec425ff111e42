"""Which implementation computes a layer's step, and the functional form that users call.

Every backend is a module with `normalize(x, weight, bias, state, plan)` and `evaluate(x, weight, bias, state, eps)`
as in `reference.py`. A new one is added to `_BACKENDS` and, when it is faster somewhere, to `choose`.
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from .recipes import Plan, Recipe, get_recipe, one_of
from .reference import NormState

_BACKENDS = {"reference": reference}
BACKENDS = ("auto", *_BACKENDS)


def choose(x: Tensor, backend: str = "auto") -> tuple[str, str]:
    """The backend that works on `x`, and why, in words. Raises ValueError for an unknown name."""
    one_of("backend", backend, BACKENDS)
    if backend != "auto":
        return backend, "asked for by name"
    return "reference", "the only one there is so far"


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
) -> Tensor:
    """Running batch norm as a function of its state.

    - `x`: (N, C, *), any floating dtype; the result has its shape, dtype and memory format.
    - `state`: `NormState.new(C)`; moved in place when `training`, read otherwise. It never holds a graph.
    - `weight`, `bias`: γ and β, (C,) or None.
    - `mom`, `recipe`: see `Recipe`. `eps`: added to the variance.

    An empty batch passes through and leaves the state alone. Raises ValueError for a wrong rank, channel count or
    dtype.
    """
    check_input(x, state.running_mean.numel())
    implementation = _BACKENDS[choose(x, backend)[0]]
    if not training or x.numel() == 0:
        return implementation.evaluate(x, weight, bias, state, eps)
    recipe, bs = get_recipe(recipe), x.shape[0]
    plan = Plan(recipe, recipe.rate(mom, bs), recipe.backward_rate(mom, bs), eps, process_group)
    return implementation.normalize(x, weight, bias, state, plan)


def check_input(x: Tensor, num_features: int, ranks: tuple[int, ...] = (), name: str = "running_batch_norm") -> None:
    """Raise ValueError unless x is a floating tensor (N, C, *) with C = num_features and one of `ranks` (any if none)."""
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
