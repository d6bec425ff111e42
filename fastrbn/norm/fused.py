"""The reference's step on PyTorch's fused operators, with the backward pass in closed form.

Forward: statistics of the elements the recipe reads, `reference.take_step`, then one affine map, `native_batch_norm`
with the running statistics for its own: one read and one write of the activations. Backward:
`native_batch_norm_backward` gives Σdy and Σdy·ĉ in one read of dy and x, `reference.projection` what is taken out of dy;
then dx = p·dy + q·x + r with p, q, r a channel. No value is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .recipes import Plan
from .reference import NormState, elements_per_sample, floored, per_channel, projection, read
from .replay import is_batched


def evaluate(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, eps: float) -> Tensor:
    """As `reference.evaluate`."""
    mean, var = state.running_mean, state.running_var
    # a training step may move the state before this forward's backward; a traced one has none
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        mean, var = mean.clone(), var.clone()
    return torch.nn.functional.batch_norm(x, mean, var, _as(weight, mean), _as(bias, mean), False, 0.0, eps)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """As `reference.normalize`, for batches with at least one element, without a process group, and recipes that have
    more than the plain formulas."""
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
        # for second derivatives, PyTorch's operators take the statistics as constants; a batched dy cannot be written to
        if torch.is_grad_enabled() or is_batched(dy):
            return *reference.gradients(x, weight, bias, dy, ctx.step, ctx.state, ctx.plan), None, None
        step, var, eps, w = ctx.step, ctx.var, ctx.plan.eps, _as(weight, ctx.var)
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, w, step.m, var, None, None, False, eps, [False, True, True]
        )
        inv_std, dx = (var + eps).rsqrt_(), None
        if ctx.needs_input_grad[0]:
            means = torch.stack((d_bias, d_weight)).div_(x.numel() // x.shape[1])
            taken, p = projection(means, inv_std, step, ctx.state), inv_std if w is None else inv_std * w
            shift, scale = taken.mul_(p).neg_()
            dx = torch.native_batch_norm(x, scale, shift, step.mean, var, False, 0.0, eps)[0]
            dx.addcmul_(dy, per_channel(p, x))
        d_weight = None if weight is None else _as(d_weight.addcmul_(d_bias, (step.m - step.mean) * inv_std), weight)
        return dx, d_weight, None if bias is None else _as(d_bias, bias), None, None


def statistics(x: Tensor, recipe, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of what the recipe reads, and over how many elements a channel."""
    if x.device.type == "cpu":  # PyTorch's fused ones lose a large mean there, or all but the digits of half precision
        return reference.batch_statistics(x.to(dtype), recipe)
    x = read(x, recipe)
    return *torch.batch_norm_update_stats(x, None, None, 0.0), x.shape[0] * elements_per_sample(x)


def _as(t: Tensor | None, like: Tensor) -> Tensor | None:
    """A parameter in the statistics' dtype: PyTorch's operators mix no half parameters with float statistics."""
    return t if t is None or t.dtype is like.dtype else t.to(like.dtype)
