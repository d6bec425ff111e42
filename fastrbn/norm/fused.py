"""The reference's step on PyTorch's fused operators, with the backward pass in closed form.

Forward: statistics from the elements the recipe reads, then one affine map, `native_batch_norm` with the running
statistics for its own: one read and one write of the activations. Backward: `native_batch_norm_backward` gives Σdy and
Σdy·x̂ in one read of dy and x; then dx = p·dy + q·x + r with p, q, r a channel, where what only the elements read by the
statistics carry is added to their rows.

On the CPU the few scalars of a step are Python numbers, since reading one costs less there than computing with it;
elsewhere they stay on the device and `reference.advance` moves the state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .memory import Moment, recall
from .recipes import Plan
from .reference import NormState, all_but_channel, average_gradients, elements_per_sample, per_channel, rows_read

_SCALAR_LOOPS_PAY = 1 << 14  # elements up to which PyTorch's scalar statistics beat two vectorised passes, CPU


def evaluate(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, eps: float) -> Tensor:
    """As `reference.evaluate`."""
    mean, var = state.running_mean, state.running_var
    if torch.is_grad_enabled():  # a training step may move the state before this forward's backward
        mean, var = mean.clone(), var.clone()
    return torch.nn.functional.batch_norm(x, mean, var, _as(weight, mean), _as(bias, mean), False, 0.0, eps)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """As `reference.normalize`, for batches with at least one element and without a process group."""
    return _Normalize.apply(x, weight, bias, state, plan)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, plan):
        step = _advance_on_host if x.device.type == "cpu" else _advance_on_device
        moment = step(x, state, plan)
        mean, var = (moment.m, moment.v) if plan.recipe.statistics == "batch" else (moment.mean, moment.var)
        used, free = _floored(var, moment, plan)
        w = _as(weight, mean)
        y = torch.native_batch_norm(x, w, _as(bias, mean), mean, used, False, 0.0, plan.eps)[0]
        ctx.save_for_backward(x, weight, bias)
        ctx.mean, ctx.var, ctx.free, ctx.moment, ctx.state, ctx.plan = mean, used, free, moment, state, plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives: PyTorch's operators take the statistics as constants
            return *_differentiable_backward(ctx, x, weight, bias, dy), None, None
        w = _as(weight, ctx.mean)
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, w, ctx.mean, ctx.var, None, None, False, ctx.plan.eps, [False, True, True]
        )
        dx = _input_gradient(ctx, x, w, dy, d_weight, d_bias) if ctx.needs_input_grad[0] else None
        if weight is None:
            return dx, None, None, None, None
        return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None


def _input_gradient(ctx, x: Tensor, w: Tensor | None, dy: Tensor, d_weight: Tensor, d_bias: Tensor) -> Tensor:
    """dx = γ/σ·[dy − share-weighted means − x̂·share-weighted means], see `reference`."""
    recipe, moment, mean = ctx.plan.recipe, ctx.moment, ctx.mean
    bs, positions = x.shape[0], elements_per_sample(x)
    inv = (ctx.var + ctx.plan.eps).rsqrt_()
    p = inv if w is None else inv * w
    batch = past = None
    if recipe.backward != "detached" or recipe.statistics == "batch":
        sums = torch.stack([d_bias, d_weight])
        n = recipe.samples_read(bs, positions) * positions
        batch = sums * (moment.share / n)
        if ctx.free is not None:
            batch[1] *= ctx.free
        if recipe.backward == "averaged":
            past = _averaged(ctx.state, sums, bs, positions, moment.share, ctx.plan)
    rows = rows_read(recipe, bs, positions)
    everywhere = past
    if batch is not None and rows == slice(None):
        everywhere, batch = batch if past is None else past.add_(batch), None
    p_x = per_channel(p, x).to(x.dtype) if x.dtype == mean.dtype else per_channel(p, x)
    if everywhere is None:
        dx = torch.mul(dy, p_x).to(x.dtype)
    else:
        q, r = _as_affine(everywhere, p, inv, mean)
        dx = torch.native_batch_norm(x, q, r, torch.zeros_like(q), torch.ones_like(q), False, 0.0, 0.0)[0]
        dx.addcmul_(dy, p_x)
    if batch is not None:
        q, r = _as_affine(batch, p, inv, mean)
        dx[rows].addcmul_(x[rows], per_channel(q, x)).add_(per_channel(r, x))
    return dx


def _as_affine(reductions: Tensor, p: Tensor, inv: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """−p·(u + x̂·z) as q·x + r, for reductions (u, z) of shape (2, C)."""
    u, z = reductions.unbind()
    q = (z * p).mul_(inv).neg_()
    return q, (u * p).addcmul_(q, mean).neg_()


def _averaged(state: NormState, sums: Tensor, bs: int, positions: int, share, plan: Plan) -> Tensor:
    """Move the averages of the gradient's reductions by this batch's sums; return κ(1−a)·(A, B)."""
    n, rate, kappa = bs * positions, plan.recipe.backward_rate(plan.mom, bs), plan.recipe.kappa
    if sums.device.type != "cpu":
        average, w = average_gradients(state, sums / n, rate)
        return average.mul_(kappa * (1 - share) / w)
    w = state.running_grad_weight.item()
    if math.isfinite(sums.sum().item()):
        w += rate * (1 - w)
        state.running_grad.mul_(1 - rate).add_(sums, alpha=rate / n)
        state.running_grad_weight.fill_(w)
    return state.running_grad * (kappa * (1 - share) / max(w, 1e-30))


def _advance_on_device(x: Tensor, state: NormState, plan: Plan) -> Moment:
    m, v, n = _statistics(x, state, plan.recipe)
    moment = recall(plan.recent, m, v)
    return moment or _remember(reference.advance(state, m, v, n, x.shape[0], plan), plan)


def _advance_on_host(x: Tensor, state: NormState, plan: Plan) -> Moment:
    """`reference.advance` with Python numbers; a step that the recipe skips reads nothing of x."""
    recipe, bs = plan.recipe, x.shape[0]
    if recipe.skip is not None and torch._C._current_graph_task_id() == -1:
        samples, batches = state.num_samples_tracked.item() + bs, state.num_batches_tracked.item() + 1
        if recipe.skip.now(samples, batches):
            _count(state, samples, batches)
            mean, var = state.running_mean.clone(), state.running_var.clone()
            return _remember(Moment(mean, var, mean, var, 0.0, False, _young(samples, recipe)), plan)
    m, v, n = _statistics(x, state, recipe)
    moment = recall(plan.recent, m, v)
    if moment is not None:
        return moment
    if recipe.statistics == "batch":  # nobody waits for what follows, so it need not be the quickest
        return _remember(reference.advance(state, m, v, n, bs, plan), plan)
    mean, var, samples = state.running_mean, state.running_var, state.num_samples_tracked.item()
    a = 0.0
    moves = math.isfinite(v.sum().item())
    if moves:
        samples += bs
        rate, count = recipe.rate(plan.mom, bs), state.running_count.item()
        count = n if count < 0 else count + rate * (n - count)
        a = rate * n / count
        shift = m - mean
        mean.add_(shift, alpha=a)
        var.lerp_(v, a).addcmul_(shift, shift, value=a * (1 - a))
        state.running_count.fill_(count)
        _count(state, samples, state.num_batches_tracked.item() + 1)
    return _remember(Moment(m, v, mean.clone(), var.clone(), a, moves, _young(samples, recipe)), plan)


def _statistics(x: Tensor, state: NormState, recipe) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of what the recipe reads, and over how many elements a channel."""
    bs, positions = x.shape[0], elements_per_sample(x)
    x = x[rows_read(recipe, bs, positions)]
    n, dtype = x.shape[0] * positions, state.running_mean.dtype
    if x.device.type == "cpu" and x.numel() > _SCALAR_LOOPS_PAY and x.is_contiguous():
        # sums of x − s and of its square, s the first element of each channel, so that a large mean cancels nothing
        s = x[0].flatten(1)[:, 0].to(dtype) if x.dim() > 2 else x[0].to(dtype)
        d = x - per_channel(s, x)
        zero, one = torch.zeros_like(s), torch.ones_like(s)
        _, square, total = torch.ops.aten.native_batch_norm_backward(
            d, d, one, zero, one, None, None, False, 0.0, [False, True, True]
        )
        m = total / n
        return m + s, (square / n).addcmul_(m, m, value=-1).clamp_min_(0), n
    m, v = torch.batch_norm_update_stats(x, None, None, 0.0)
    return m.to(dtype), v.to(dtype), n


def _floored(var: Tensor, moment: Moment, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """The variance that normalises, with the recipe's floor while the layer is young; and where it is off the floor."""
    clamp = plan.recipe.clamp
    if clamp is None or moment.young is False:
        return var, None
    floor = clamp.deviation**2 - plan.eps if clamp.variance is None else clamp.variance
    if moment.young is True:
        return var.clamp_min(floor), var >= floor
    return torch.where(moment.young, var.clamp_min(floor), var), (var >= floor) | ~moment.young


def _differentiable_backward(ctx, x, weight, bias, dy):
    """The gradients as a graph of x, weight, bias and dy: the reference's, and the running part as a constant."""
    plan, moment = ctx.plan, _as_tensors(ctx.moment, x)
    m, v, _ = reference.batch_statistics(x, plan.recipe)
    y = reference.apply(x, weight, bias, m, v, moment, plan)[0].to(x.dtype)
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    dx, *others = (next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias))
    if plan.recipe.backward == "averaged" and dx is not None:
        with torch.no_grad():
            inv = (ctx.var + plan.eps).rsqrt()
            p = inv if weight is None else inv * weight
            x_hat = (x - per_channel(ctx.mean, x)) * per_channel(inv, x)
            sums = torch.stack([t.sum(all_but_channel(x)) for t in (dy, dy * x_hat)])
            u, z = _averaged(ctx.state, sums, x.shape[0], elements_per_sample(x), ctx.moment.share, plan) * p
        dx = dx - (per_channel(u, x) + x_hat * per_channel(z, x)).to(x.dtype)
    return dx, *others


def _as_tensors(moment: Moment, x: Tensor) -> Moment:
    return Moment(*(t if t is None or isinstance(t, Tensor) else torch.tensor(t, device=x.device) for t in moment))


def _as(t: Tensor | None, like: Tensor) -> Tensor | None:
    """A parameter in the statistics' dtype: PyTorch's operators mix no half parameters with float statistics."""
    return t if t is None else t.to(like.dtype)


def _count(state: NormState, samples: int, batches: int) -> None:
    state.num_samples_tracked.fill_(samples)
    state.num_batches_tracked.fill_(batches)


def _young(samples: int, recipe) -> bool:
    return recipe.clamp is not None and samples < recipe.clamp.samples


def _remember(moment: Moment, plan: Plan) -> Moment:
    if plan.recent is not None:
        plan.recent.append(moment)
    return moment
