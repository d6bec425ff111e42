"""The reference's step with PyTorch's fused operators and a closed-form backward pass.

Forward: the statistics, `reference.take_step`, then `native_batch_norm` with the running statistics: one read and one
write of the activations. Backward: `native_batch_norm_backward` gives Σdy and Σdy·ĉ in one read of dy and x,
`reference.projection` gives what to subtract from dy, and dx = p·dy + q·x + r with one p, q and r per channel. The host
reads no values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .recipes import Plan, Recipe
from .reference import NormState, elements_per_sample, floored, per_channel, projection, read
from .replay import is_batched


def evaluate(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, eps: float) -> Tensor:
    """Same as `reference.evaluate`."""
    mean, var = state.running_mean, state.running_var
    # copied, because a training step may move the state before the backward pass; a traced forward has none
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        mean, var = mean.clone(), var.clone()
    return torch.nn.functional.batch_norm(x, mean, var, _as(weight, mean), _as(bias, mean), False, 0.0, eps)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """`reference.normalize` for non-empty batches without a process group; the recipe must not be `plain_only`."""
    return _Normalize.apply(x, weight, bias, state, plan)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, plan):
        step = reference.take_step(state, *statistics(x, plan.recipe, state.running_mean.dtype), x.shape[0], plan)
        mean, var = step.mean, floored(step.var, step, plan)
        y = torch.native_batch_norm(x, _as(weight, mean), _as(bias, mean), mean, var, False, 0.0, plan.eps)[0]
        ctx.save_for_backward(x, weight, bias)
        ctx.var, ctx.step, ctx.state, ctx.plan = var, step, state, plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        # PyTorch's operators would treat the statistics as constants in second derivatives; a batched dy is read-only
        if torch.is_grad_enabled() or is_batched(dy):
            return *reference.gradients(x, weight, bias, dy, ctx.step, ctx.state, ctx.plan), None, None
        step, var, eps, w = ctx.step, ctx.var, ctx.plan.eps, _as(weight, ctx.var)
        inv_std, dx = (var + eps).rsqrt_(), None
        # the sums do not depend on the weight, but CUDA's kernel needs one; it reads m and 1/σ, the CPU's m and V
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, inv_std, step.m, var, step.m, inv_std, False, eps, [False, True, True]
        )
        if ctx.needs_input_grad[0]:
            means = torch.stack((d_bias, d_weight)).div_(x.numel() // x.shape[1])
            taken, p = projection(means, inv_std, step, ctx.state), inv_std if w is None else inv_std * w
            shift, scale = taken.mul_(p).neg_()
            dx = torch.native_batch_norm(x, scale, shift, step.mean, var, False, 0.0, eps)[0]
            dx.addcmul_(dy, per_channel(p, x))
        d_weight = None if weight is None else _as(d_weight.addcmul_(d_bias, (step.m - step.mean) * inv_std), weight)
        return dx, d_weight, None if bias is None else _as(d_bias, bias), None, None


def statistics(x: Tensor, recipe: Recipe, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of what the recipe reads, and the number of elements per channel."""
    if x.device.type == "cpu":  # where PyTorch's fused operator is inexact for large means and in half precision
        return reference.batch_statistics(x.to(dtype), recipe)
    x = read(x, recipe)
    return *torch.batch_norm_update_stats(x, None, None, 0.0), x.shape[0] * elements_per_sample(x)


def _as(t: Tensor | None, like: Tensor) -> Tensor | None:
    """`t` in the dtype of `like`: PyTorch's operators do not mix half-precision parameters with float32 statistics."""
    return t if t is None or t.dtype is like.dtype else t.to(like.dtype)
