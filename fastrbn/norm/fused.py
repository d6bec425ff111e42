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
from .memory import Moment, is_batched, moving, recall, running_again
from .recipes import Plan
from .reference import NormState, all_but_channel, average_gradients, elements_per_sample, per_channel, read

_SCALAR_LOOPS_PAY = 1 << 14  # elements up to which PyTorch's scalar statistics beat two vectorised passes, CPU
_ROWS = 1 << 11  # elements a channel that PyTorch's channels_last statistics add up at a time, CPU


def evaluate(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, eps: float) -> Tensor:
    """As `reference.evaluate`."""
    mean, var = state.running_mean, state.running_var
    # a training step may move the state before this forward's backward; a traced one has none
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        mean, var = mean.clone(), var.clone()
    return torch.nn.functional.batch_norm(x, mean, var, _as(weight, mean), _as(bias, mean), False, 0.0, eps)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """As `reference.normalize`, for batches with at least one element and without a process group."""
    return _Normalize.apply(x, weight, bias, state, plan)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, plan):
        step = _advance_on_host if x.device.type == "cpu" else _advance_on_device
        with moving(state):
            moment = step(x, state, plan)
        mean, var = (moment.m, moment.v) if plan.recipe.statistics == "batch" else (moment.mean, moment.var)
        free = None
        if moment.young is not None and moment.young is not False:
            var, free = _floored(var, moment, plan)
        y = torch.native_batch_norm(x, _as(weight, mean), _as(bias, mean), mean, var, False, 0.0, plan.eps)[0]
        ctx.save_for_backward(x, weight, bias)
        ctx.mean, ctx.var, ctx.free, ctx.moment, ctx.state, ctx.plan = mean, var, free, moment, state, plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        # for second derivatives, PyTorch's operators take the statistics as constants; a batched dy cannot be written to
        if torch.is_grad_enabled() or is_batched(dy):
            return *_differentiable_backward(ctx, x, weight, bias, dy), None, None
        w = _as(weight, ctx.mean)
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, w, ctx.mean, ctx.var, None, None, False, ctx.plan.eps, [False, True, True]
        )
        dx = _input_gradient(ctx, x, w, dy, d_weight, d_bias) if ctx.needs_input_grad[0] else None
        d_weight = None if weight is None else _as(d_weight, weight)
        return dx, d_weight, None if bias is None else _as(d_bias, bias), None, None


def _input_gradient(ctx, x: Tensor, w: Tensor | None, dy: Tensor, d_weight: Tensor, d_bias: Tensor) -> Tensor:
    """dx = γ/σ·dy − γ/σ·(u + x̂·z), where u and z are the shares of mean(dy) and mean(dy·x̂) as in `reference`."""
    plan, moment, mean, var = ctx.plan, ctx.moment, ctx.mean, ctx.var
    recipe, bs, positions = plan.recipe, x.shape[0], elements_per_sample(x)
    k = recipe.samples_read(bs, positions)
    p = (var + plan.eps).rsqrt_()
    if w is not None:
        p *= w
    everywhere = in_rows = None
    if recipe.backward != "detached":
        sums = torch.stack((d_bias, d_weight))
        if recipe.backward == "averaged":
            everywhere = _averaged(ctx.state, sums, bs * positions, bs, moment.share, plan)
        in_rows = sums.mul_(moment.share / (k * positions))
        if ctx.free is not None:
            in_rows[1] *= ctx.free
        if k == bs:
            everywhere, in_rows = in_rows if everywhere is None else everywhere.add_(in_rows), None
    p_x = per_channel(p, x)
    if everywhere is None:
        dx = torch.mul(dy, p_x, out=torch.empty_like(x))  # laid out as x is, whatever dy is
    else:
        dx = _minus(everywhere, p, x, mean, var, plan.eps).addcmul_(dy, p_x)
    if in_rows is not None:
        read(dx, recipe).add_(_minus(in_rows, p, read(x, recipe), mean, var, plan.eps))
    return dx


def _minus(reductions: Tensor, p: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """−p·(u + x̂·z) for reductions (u, z) of shape (2, C), which are used up: the affine map of another γ and β."""
    shift, scale = reductions.mul_(p).neg_().unbind()
    return torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, eps)[0]


def _averaged(state: NormState, sums: Tensor, n: int, bs: int, share, plan: Plan) -> Tensor:
    """Move the averages of the gradient's reductions by this batch's sums; return κ(1−a)·(A, B)."""
    rate, kappa = plan.recipe.backward_rate(plan.mom, bs, n), plan.recipe.kappa
    with moving(state):
        if sums.device.type != "cpu" or is_batched(sums):
            average, w = average_gradients(state, sums / n, rate)
            return average * (kappa * (1 - share) / w)
        w = state.running_grad_weight.item()
        if math.isfinite(sums.sum().item()):
            w += rate * (1 - w)
            state.running_grad.mul_(1 - rate).add_(sums, alpha=rate / n)
            state.running_grad_weight.fill_(w)
        return state.running_grad * (kappa * (1 - share) / max(w, 1e-30))


def _advance_on_device(x: Tensor, state: NormState, plan: Plan) -> Moment:
    m, v, n = _statistics(x, state, plan.recipe)
    moment = recall(plan.recent, m, v)
    return moment or _remember(plan, reference.advance(state, m, v, n, x.shape[0], plan))


def _advance_on_host(x: Tensor, state: NormState, plan: Plan) -> Moment:
    """`reference.advance` with Python numbers; a step that the recipe skips reads nothing of x."""
    recipe, bs = plan.recipe, x.shape[0]
    if recipe.skip is not None and not running_again():
        samples, batches = state.num_samples_tracked.item() + bs, state.num_batches_tracked.item() + 1
        if recipe.skip.now(samples, batches):
            _count(state, samples, batches)
            mean, var = state.running_mean.clone(), state.running_var.clone()
            # a second run is told by its batch's statistics
            m, v, _ = _statistics(x, state, recipe) if plan.twice else (mean, var, 0)
            return _remember(plan, Moment(m, v, mean, var, 0.0, False, _young(samples, recipe)))
    m, v, n = _statistics(x, state, recipe)
    moment = recall(plan.recent, m, v)
    if moment is not None:
        return moment
    if recipe.statistics == "batch":  # nobody waits for what follows, so it need not be the quickest
        return _remember(plan, reference.advance(state, m, v, n, bs, plan))
    mean, var, samples = state.running_mean, state.running_var, state.num_samples_tracked.item()
    a, leaning = 0.0, None
    shift = m - mean
    moves = math.isfinite(torch.addcmul(v, shift, shift).amax().item())
    if moves:
        samples += bs
        rate, count = recipe.rate(plan.mom, bs, n), state.running_count.item()
        # nothing drifts from nowhere, and with enough elements the rate is the smaller one at any drift
        if recipe.steady is not None and count != 0 and n < rate * recipe.steady.most:
            drift = n * (shift.square() / (var + plan.eps)).mean().item()
            rate = recipe.steady.rate(rate, n, drift, samples - bs)
        kept = rate if recipe.memory is None else min(rate, recipe.memory.rate(plan.mom, bs, samples - bs))
        into_state, moved = _share(kept, n, count)
        a = into_state
        if recipe.leaning:
            a, _ = _share(rate, n, count)
            leaning = mean.add(shift, alpha=a), _towards(var.clone(), v, shift, a)
        mean.add_(shift, alpha=into_state)
        _towards(var, v, shift, into_state)
        state.running_count.fill_(moved)
        _count(state, samples, state.num_batches_tracked.item() + 1)
    mean, var = leaning or (mean.clone(), var.clone())
    return _remember(plan, Moment(m, v, mean, var, a, moves, _young(samples, recipe)))


def _share(rate: float, n: int, count: float) -> tuple[float, float]:
    """As `reference.share_of`, with Python's numbers."""
    moved = n if count < 0 else count + rate * (n - count)
    return rate * n / moved, moved


def _towards(var: Tensor, v: Tensor, shift: Tensor, a: float) -> Tensor:
    return var.lerp_(v, a).addcmul_(shift, shift, value=a * (1 - a))


def _statistics(x: Tensor, state: NormState, recipe) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of what the recipe reads, and over how many elements a channel."""
    x = read(x, recipe)
    n, dtype = x.shape[0] * elements_per_sample(x), state.running_mean.dtype
    if x.device.type == "cpu" and n > _ROWS and (rows := x.movedim(1, -1)).is_contiguous():
        return *_statistics_of_rows(rows.flatten(0, -2), dtype), n
    if x.device.type == "cpu" and x.numel() > _SCALAR_LOOPS_PAY and x.is_contiguous():
        # sums of x − s and of its square, s near the mean of each channel, so that a large mean cancels nothing
        s = x[: 1 + 8 // elements_per_sample(x)].movedim(1, 0).flatten(1)[:, :64].to(dtype).mean(1)
        d = x - per_channel(s, x)
        zero, one = torch.zeros_like(s), torch.ones_like(s)
        _, square, total = torch.ops.aten.native_batch_norm_backward(
            d, d, one, zero, one, None, None, False, 0.0, [False, True, True]
        )
        m = total / n
        return m + s, (square / n).addcmul_(m, m, value=-1).clamp_min_(0), n
    if x.dtype is dtype or x.device.type != "cpu":
        return *torch.batch_norm_update_stats(x, None, None, 0.0), n
    # on the CPU it answers in the dtype of the running statistics, else in x's, where half the digits are lost
    unused = torch.zeros(2, x.shape[1], dtype=dtype)
    return *torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0), n


def _statistics_of_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the columns of x (n, C), block by block and from near the mean.

    PyTorch's own loop adds all n up in one float32: at mean 1e4 that is off by up to thousands of deviations. A block
    stays in the cache for the loop's second pass, so the subtraction costs nothing that can be measured.
    """
    near = x[:64].to(dtype).mean(0)
    scratch = torch.empty(_ROWS, x.shape[1], dtype=dtype)
    blocks = x.split(_ROWS)
    found = (torch.batch_norm_update_stats(torch.sub(b, near, out=scratch[: len(b)]), None, None, 0.0) for b in blocks)
    m, v = (torch.stack(s) for s in zip(*found, strict=True))
    share = torch.tensor([len(b) / len(x) for b in blocks], dtype=dtype).unsqueeze(1)
    mean = (share * m).sum(0)
    return mean + near, (share * (v + (m - mean).square_())).sum(0)


def _floored(var: Tensor, moment: Moment, plan: Plan) -> tuple[Tensor, Tensor]:
    """The variance that normalises, with the recipe's floor while the layer is young; and where it is off the floor."""
    clamp = plan.recipe.clamp
    floor = clamp.deviation**2 - plan.eps if clamp.variance is None else clamp.variance
    if moment.young is True:
        return var.clamp_min(floor), var >= floor
    return torch.where(moment.young, var.clamp_min(floor), var), (var >= floor) | ~moment.young


def _differentiable_backward(ctx, x, weight, bias, dy):
    """The gradients as a graph of x, weight, bias and dy: the reference's, and the running part as a constant."""
    plan, moment = ctx.plan, _as_tensors(ctx.moment)
    with torch.enable_grad():
        wide = x.to(ctx.mean.dtype)
        m, v, _ = reference.batch_statistics(wide, plan.recipe)
        y = reference.apply(wide, weight, bias, m, v, moment, plan)[0].to(x.dtype)
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=torch.is_grad_enabled()))
    dx, *others = (next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias))
    if plan.recipe.backward == "averaged" and dx is not None:
        with torch.no_grad():
            inv = (ctx.var + plan.eps).rsqrt()
            p = inv if weight is None else inv * weight
            x_hat = (x - per_channel(ctx.mean, x)) * per_channel(inv, x)
            sums = torch.stack([t.sum(all_but_channel(x)) for t in (dy, dy * x_hat)])
            n, bs = x.shape[0] * elements_per_sample(x), x.shape[0]
            u, z = _averaged(ctx.state, sums, n, bs, ctx.moment.share, plan) * p
        dx = dx - (per_channel(u, x) + x_hat * per_channel(z, x)).to(x.dtype)
    return dx, *others


def _as_tensors(moment: Moment) -> Moment:
    kind = {float: moment.mean.dtype, bool: torch.bool}
    device = moment.mean.device
    return Moment(*(torch.tensor(t, dtype=kind[type(t)], device=device) if type(t) in kind else t for t in moment))


def _as(t: Tensor | None, like: Tensor) -> Tensor | None:
    """A parameter in the statistics' dtype: PyTorch's operators mix no half parameters with float statistics."""
    return t if t is None or t.dtype is like.dtype else t.to(like.dtype)


def _count(state: NormState, samples: int, batches: int) -> None:
    state.num_samples_tracked.fill_(samples)
    state.num_batches_tracked.fill_(batches)


def _young(samples: int, recipe) -> bool:
    return recipe.clamp is not None and samples < recipe.clamp.samples


def _remember(plan: Plan, moment: Moment) -> Moment:
    if plan.twice:
        plan.recent.append(moment)
    return moment
