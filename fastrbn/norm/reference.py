"""The layer's equations in plain differentiable PyTorch: the text to read and the oracle for the fast backends.

Per channel, over the n elements that the statistics read: batch mean m, biased batch variance v. State: running mean
M, running variance V, running count c. With the averaging rate λ of this step

    c  ← (1−λ)·c + λ·n            a = λ·n/c            this batch's share; 1 on the first step
    V  ← (1−a)·V + a·v + a(1−a)·(m−M)²                 the old M
    M  ← M + a·(m−M)
    x̂ = (x−M)/√(V+ε)             y = γ·x̂ + β

which is the moving average of sums, squares and counts of fast.ai's course (part 2, 2019, notebook 07) without its
cancellation. The gradient goes through m and v, so through the share a of the statistics. `averaged` adds, for the
share 1−a that lies in the past, κ times what the past would have contributed: running means A of mean(dy) and B of
mean(dy·x̂) stand in for it (as in Moving Average Batch Normalization, ICLR 2020):

    dx = γ/σ · [ dy − (a·mean(dy) + κ(1−a)·A) − x̂·(a·mean(dy·x̂) + κ(1−a)·B) ]

`norm/README.md` derives all this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .recipes import Plan


class NormState(NamedTuple):
    """What a running batch norm remembers: tensors that a training step moves in place.

    For C channels: `running_mean`, `running_var`, `running_grad_mean` (A·w), `running_grad_proj` (B·w) of shape (C,);
    `running_count` (c, in elements a channel; −1: statistics taken over from elsewhere, as old as can be),
    `running_grad_weight` (w) of shape (), float; `num_samples_tracked`, `num_batches_tracked` of shape (), int64.
    Floats are float32, or float64 in a float64 layer.
    """

    running_mean: Tensor
    running_var: Tensor
    running_count: Tensor
    num_samples_tracked: Tensor
    num_batches_tracked: Tensor
    running_grad_mean: Tensor
    running_grad_proj: Tensor
    running_grad_weight: Tensor

    @classmethod
    def new(cls, num_features: int, device=None, dtype=torch.float32) -> NormState:
        """A state that has seen nothing: mean 0, variance 1, count 0."""

        def full(value, *shape):
            return torch.full(shape, value, device=device, dtype=dtype)

        def integer():
            return torch.zeros((), device=device, dtype=torch.int64)

        c = num_features
        return cls(full(0.0, c), full(1.0, c), full(0.0), integer(), integer(), full(0.0, c), full(0.0, c), full(0.0))


def evaluate(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, eps: float) -> Tensor:
    """Normalise with the state as it is: nn.BatchNorm's evaluation. x (N, C, *), result like x."""
    wide = torch.promote_types(x.dtype, state.running_mean.dtype)
    # copies: a training step may move the state before this forward's backward
    mean, inv_std = state.running_mean.to(wide, copy=True), (state.running_var.to(wide) + eps).rsqrt()
    x_hat = (x.to(wide) - _per_channel(mean, x)) * _per_channel(inv_std, x)
    return _affine(x_hat, weight, bias).to(x.dtype)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """One training step: move `state` by this batch, normalise with it. x (N, C, *) with N ≥ 1, result like x.

    A batch with NaN or Inf in what the statistics read leaves the whole state as it was, without asking the device;
    the result shows it.
    """
    recipe = plan.recipe
    wide = torch.promote_types(x.dtype, state.running_mean.dtype)
    xw = x.to(wide)
    m, v, n = _batch_statistics(xw, recipe)
    if recipe.backward == "detached":
        m, v = m.detach(), v.detach()
    if recipe.statistics == "batch":
        mean, var = m, v
        share = torch.ones((), dtype=wide, device=x.device)
        _track_as_batchnorm(state, m.detach(), v.detach(), n, x.shape[0], plan.rate)
    else:
        mean, var, share = _advance(state, m, v, n, x.shape[0], plan)
    inv_std = _inverse_deviation(var, state, plan)
    x_hat = (xw - _per_channel(mean, x)) * _per_channel(inv_std, x)
    y = _affine(x_hat, weight, bias)
    if recipe.backward == "averaged" and x.requires_grad and torch.is_grad_enabled():
        scale = inv_std if weight is None else inv_std * weight
        y = _RunningProjection.apply(y, xw, x_hat.detach(), scale.detach(), share, state, plan)
    return y.to(x.dtype)


def _batch_statistics(x: Tensor, recipe) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance a channel, and over how many elements."""
    bs, positions = x.shape[0], x[0, 0].numel()
    k = recipe.samples_read(bs, positions)
    if k < bs:
        x = x[:k] if recipe.order == "first" else x[:: bs // k][:k]
    v, m = torch.var_mean(x, dim=_all_but_channel(x), correction=0)
    return m, v, k * positions


def _advance(state: NormState, m: Tensor, v: Tensor, n: int, bs: int, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Move the state by a batch; return mean and variance, differentiable in m and v, and this batch's share a."""
    with torch.no_grad():
        finite = v.sum().isfinite()  # a NaN or Inf in x is one in v
        state.num_samples_tracked.add_(finite * bs)
        state.num_batches_tracked.add_(finite)
        moves = finite
        if (skip := plan.recipe.skip) is not None:
            skipped = (state.num_samples_tracked > skip.after) & (state.num_batches_tracked % skip.every == 0)
            moves = finite & ~skipped
        count = state.running_count
        moved = torch.where(count < 0, float(n), count + plan.rate * (n - count))
        a = torch.where(moves, plan.rate * n / moved, 0.0).to(m.dtype)
        state.running_count.copy_(torch.where(moves, moved, count))
        old_mean, old_var = state.running_mean.to(m.dtype, copy=True), state.running_var.to(m.dtype, copy=True)
    shift = torch.where(moves, m - old_mean, 0.0)
    mean = old_mean + a * shift
    var = old_var + a * torch.where(moves, v - old_var, 0.0) + a * (1 - a) * shift * shift
    state.running_mean.copy_(mean.detach())
    state.running_var.copy_(var.detach())
    return mean, var, a


def _track_as_batchnorm(state: NormState, m: Tensor, v: Tensor, n: int, bs: int, rate: float) -> None:
    """nn.BatchNorm's running statistics: from mean 0 and variance 1, the variance unbiased (biased where n is 1)."""
    finite = v.sum().isfinite()
    unbiased = v * (n / max(n - 1, 1))
    for running, new in ((state.running_mean, m), (state.running_var, unbiased)):
        running.copy_(torch.where(finite, running + rate * (new - running), running))
    state.running_count.copy_(torch.where(finite, float(n), state.running_count))
    state.num_samples_tracked.add_(finite * bs)
    state.num_batches_tracked.add_(finite)


def _inverse_deviation(var: Tensor, state: NormState, plan: Plan) -> Tensor:
    """1/√(V+ε), with the recipe's floor while the layer is young."""
    clamp = plan.recipe.clamp
    if clamp is None:
        return (var + plan.eps).rsqrt()
    young = state.num_samples_tracked < clamp.samples
    if clamp.variance is not None:
        var = torch.where(young, var.clamp_min(clamp.variance), var)
        return (var + plan.eps).rsqrt()
    return torch.where(young, (var + plan.eps).clamp_min(clamp.deviation**2), var + plan.eps).rsqrt()


class _RunningProjection(torch.autograd.Function):
    """Identity in y; in the backward pass, moves A and B by this batch and gives x the part −γ/σ·κ(1−a)·(A + x̂·B).

    A second derivative takes A, B and that part as constants.
    """

    @staticmethod
    def forward(ctx, y, x, x_hat, scale, share, state, plan):
        ctx.save_for_backward(x_hat, scale, share)
        ctx.state, ctx.plan = state, plan
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        x_hat, scale, share = ctx.saved_tensors
        with torch.no_grad():
            rate, kappa = ctx.plan.backward_rate, ctx.plan.recipe.kappa
            dims = _all_but_channel(dy)
            dy_mean, dy_proj = dy.mean(dims), (dy * x_hat).mean(dims)
            a, b, w = average_gradients(ctx.state, dy_mean, dy_proj, rate)
            past = kappa * (1 - share) * scale / w
            extra = _per_channel(-past * a, dy) - x_hat * _per_channel(past * b, dy)
        return dy, extra, None, None, None, None, None


def average_gradients(state: NormState, dy_mean: Tensor, dy_proj: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Move the averages of the gradient's reductions by this batch's, unless those are not finite; return A·w, B·w, w."""
    finite = (dy_mean.sum() + dy_proj.sum()).isfinite()
    pairs = (
        (state.running_grad_mean, dy_mean),
        (state.running_grad_proj, dy_proj),
        (state.running_grad_weight, torch.ones_like(state.running_grad_weight)),
    )
    for running, new in pairs:
        running.copy_(torch.where(finite, running + rate * (new - running), running))
    a, b, w = (running.to(dy_mean.dtype, copy=True) for running, _ in pairs)
    return a, b, w.clamp_min(torch.finfo(w.dtype).tiny)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x_hat = x_hat * _per_channel(weight, x_hat)
    return x_hat if bias is None else x_hat + _per_channel(bias, x_hat)


def _all_but_channel(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to broadcast over x (N, C, *)."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))
