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

A `leaning` recipe moves the state at a lower rate than λ; the step normalises with the M and V above all the same.

`norm/README.md` derives all this.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import merge_over_ranks, sum_over_ranks
from .memory import Moment, is_batched, moving, recall, snapshot
from .recipes import Plan, at_least_one, smaller


class NormState(NamedTuple):
    """What a running batch norm remembers: tensors that a training step moves in place.

    For C channels: `running_mean`, `running_var` of shape (C,); `running_count` (c, in elements a channel; −1:
    statistics taken over from elsewhere, as old as can be) of shape (); `running_grad` of shape (2, C), A and B times
    their weight w, `running_grad_weight`, of shape (); all float32, or float64 in a float64 layer.
    `num_samples_tracked`, `num_batches_tracked` of shape (), int64.
    """

    running_mean: Tensor
    running_var: Tensor
    running_count: Tensor
    num_samples_tracked: Tensor
    num_batches_tracked: Tensor
    running_grad: Tensor
    running_grad_weight: Tensor

    @classmethod
    def new(cls, num_features: int, device=None, dtype=torch.float32) -> NormState:
        """A state that has seen nothing: mean 0, variance 1, count 0."""

        def full(value, *shape):
            return torch.full(shape, value, device=device, dtype=dtype)

        def integer():
            return torch.zeros((), device=device, dtype=torch.int64)

        c = num_features
        return cls(full(0.0, c), full(1.0, c), full(0.0), integer(), integer(), full(0.0, 2, c), full(0.0))


def evaluate(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, eps: float) -> Tensor:
    """Normalise with the state as it is: nn.BatchNorm's evaluation. x (N, C, *), result like x."""
    wide = torch.promote_types(x.dtype, state.running_mean.dtype)
    # copies: a training step may move the state before this forward's backward
    mean, inv_std = state.running_mean.to(wide, copy=True), (state.running_var.to(wide) + eps).rsqrt()
    x_hat = (x.to(wide) - per_channel(mean, x)) * per_channel(inv_std, x)
    return _affine(x_hat, weight, bias).to(x.dtype)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """One training step: move `state` by this batch, normalise with it. x (N, C, *), result like x.

    A batch with NaN or Inf in what the statistics read, or so large that its variance or the square of its distance
    from the running mean overflows, leaves the whole state as it was, without asking the device; the result shows it.
    """
    recipe, bs = plan.recipe, x.shape[0]
    xw = x.to(torch.promote_types(x.dtype, state.running_mean.dtype))
    m, v, n = batch_statistics(xw, recipe)
    if plan.process_group is not None:
        m, v, n, bs = merge_over_ranks(m, v, n, bs, plan.process_group)
    with torch.no_grad(), moving(state):
        moment = recall(plan.recent, m, v)
        if moment is None:
            moment = advance(state, m.detach(), v.detach(), n, bs, plan)
            if plan.twice:
                plan.recent.append(moment)
    y, x_hat, inv_std = apply(xw, weight, bias, m, v, moment, plan)
    if recipe.backward == "averaged" and x.requires_grad and torch.is_grad_enabled():
        scale = inv_std if weight is None else inv_std * weight
        backward_rate = recipe.backward_rate(plan.mom, bs, bs * elements_per_sample(x))
        y = _RunningProjection.apply(y, xw, x_hat.detach(), scale.detach(), moment.share, state, backward_rate, plan)
    return y.to(x.dtype)


def apply(x: Tensor, weight, bias, m: Tensor, v: Tensor, moment: Moment, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x with what `moment` left: y, x̂ and 1/σ, differentiable in x, weight, bias and in the batch's
    statistics m and v as far as the recipe lets the gradient through them."""
    batch, detached = plan.recipe.statistics == "batch", plan.recipe.backward == "detached"
    if batch:
        mean, var = (moment.m, moment.v) if detached else (m, v)
    elif detached:
        mean, var = moment.mean, moment.var
    else:
        # the values are the moment's; differences that are zero carry the gradient of M + a(m−M) and
        # (1−a)V + a·v + a(1−a)(m−M)² in m and v, where (1−a)(m−M) is m − the new M
        a = moment.share
        dm, dv = (torch.where(moment.moves, t - t.detach(), 0.0) for t in (m, v))
        mean = moment.mean + a * dm
        off = torch.where(moment.moves, moment.m - moment.mean, 0.0)
        var = moment.var + a * dv + a * dm * ((1 - a) * dm + 2 * off)
    inv_std = inverse_deviation(var, moment.young, plan)
    x_hat = (x - per_channel(mean, x)) * per_channel(inv_std, x)
    return _affine(x_hat, weight, bias), x_hat, inv_std


def batch_statistics(x: Tensor, recipe) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance a channel, and over how many elements."""
    bs, positions = x.shape[0], elements_per_sample(x)
    x, k = read(x, recipe), recipe.samples_read(bs, positions)
    if bs * positions == 0:  # an empty rank of a group: its weight in the merge is 0
        zero = x.sum(all_but_channel(x))
        return zero, zero, 0
    v, m = torch.var_mean(x, dim=all_but_channel(x), correction=0)
    return m, v, k * positions


def read(x: Tensor, recipe) -> Tensor:
    """The samples of x that the statistics read, a view."""
    bs = x.shape[0]
    k = recipe.samples_read(bs, elements_per_sample(x))
    if k == bs:
        return x
    # not x[:: bs // k]: a slice's step is a constant to torch.compile, which would compile for each
    return x[:k] if recipe.order == "first" else x[: k * (bs // k)].unflatten(0, (k, -1))[:, 0]


def advance(state: NormState, m: Tensor, v: Tensor, n, bs, plan: Plan) -> Moment:
    """Move the state by a batch's statistics over n elements a channel of bs samples; call it without a graph."""
    recipe, rate = plan.recipe, plan.recipe.rate(plan.mom, bs, n)
    old_mean, old_var, count, samples = snapshot(
        state.running_mean, state.running_var, state.running_count, state.num_samples_tracked
    )
    shift, spread = m - old_mean, v
    if recipe.statistics == "batch":
        spread = v * (n / at_least_one(n - 1))
    # a NaN or Inf in x is one in v; n is 0 when every rank's batch is empty
    seen = (spread + shift.square()).amax().isfinite() & (n > 0)
    moves = seen
    samples = samples.to(count.dtype)
    if recipe.steady is not None:
        drift = n * (shift.square() / (old_var + plan.eps)).mean()
        calm = recipe.steady.rate(rate, n, drift, samples)
        rate = torch.where(count == 0, rate, calm)  # nothing drifts from nowhere
    kept = rate if recipe.memory is None else smaller(rate, recipe.memory.rate(plan.mom, bs, samples))
    if (skip := recipe.skip) is not None:
        skipped = skip.now(state.num_samples_tracked + bs, state.num_batches_tracked + 1)
        seen, moves = seen | skipped, seen & ~skipped  # a skipped step does not look at its batch
    state.num_samples_tracked.add_((seen * bs).to(torch.int64))
    state.num_batches_tracked.add_(seen)
    young = None if recipe.clamp is None else state.num_samples_tracked < recipe.clamp.samples

    def if_it_moves(mean, var):
        return torch.where(moves, mean, old_mean), torch.where(moves, var, old_var)

    if recipe.statistics == "batch":  # nn.BatchNorm's: from mean 0, variance 1, the variance unbiased where it can be
        a, moved = torch.ones_like(count), torch.zeros_like(count) + n
        mean, var = if_it_moves(old_mean + rate * shift, old_var + rate * (spread - old_var))
    else:
        a, moved = share_of(kept, n, count, moves)
        mean, var = if_it_moves(*towards(old_mean, old_var, m, v, a))
    state.running_mean.copy_(mean)
    state.running_var.copy_(var)
    if recipe.leaning:
        a = share_of(rate, n, count, moves)[0]
        mean, var = if_it_moves(*towards(old_mean, old_var, m, v, a))
    # as a vector: the compilers of torch 2.9 and 2.11 lose, without a word, what is written to a float64 scalar
    state.running_count.view(1).copy_(torch.where(moves, moved, count))
    return Moment(m, v, mean.to(m.dtype), var.to(m.dtype), a.to(m.dtype), moves, young)


def share_of(rate, n, count: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's share a at an averaging rate, and the running count then."""
    new = torch.zeros_like(count) + rate * n
    moved = torch.where(count < 0, n, new + (1 - rate) * count)
    # a tensor over a tensor: 1 exactly on the first step, since any less lets a(1−a)(m−M)² swamp a small variance
    return torch.where(moves, new / moved, 0.0), moved


def towards(mean: Tensor, var: Tensor, m: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance when a batch with m and v has the share a."""
    off = m - mean
    return mean + a * off, (1 - a) * var + a * v + a * (1 - a) * off.square()


def inverse_deviation(var: Tensor, young: Tensor | None, plan: Plan) -> Tensor:
    """1/√(V+ε), with the recipe's floor while the layer is young."""
    clamp = plan.recipe.clamp
    if clamp is None:
        return (var + plan.eps).rsqrt()
    if clamp.variance is not None:
        return (torch.where(young, var.clamp_min(clamp.variance), var) + plan.eps).rsqrt()
    return torch.where(young, (var + plan.eps).clamp_min(clamp.deviation**2), var + plan.eps).rsqrt()


class _RunningProjection(torch.autograd.Function):
    """Identity in y; in the backward pass, moves A and B by this batch and gives x the part −γ/σ·κ(1−a)·(A + x̂·B).

    A second derivative takes A, B and that part as constants.
    """

    @staticmethod
    def forward(ctx, y, x, x_hat, scale, share, state, rate, plan):
        ctx.save_for_backward(x_hat, scale, share)
        ctx.state, ctx.rate, ctx.plan = state, rate, plan
        return y.clone()  # a view made here could not be changed in place, as by nn.ReLU(inplace=True)

    @staticmethod
    def backward(ctx, dy):
        x_hat, scale, share = ctx.saved_tensors
        with torch.no_grad():
            dims, n = all_but_channel(dy), dy.shape[0] * elements_per_sample(dy)
            sums = torch.stack([dy.sum(dims), (dy * x_hat).sum(dims)])
            if ctx.plan.process_group is not None:
                sums, n = sum_over_ranks(sums, n, ctx.plan.process_group)
            with moving(ctx.state):
                average, w = average_gradients(ctx.state, sums / n, ctx.rate)
            past = ctx.plan.recipe.kappa * (1 - share) * scale / w * average
            extra = per_channel(-past[0], dy) - x_hat * per_channel(past[1], dy)
        return dy, extra, None, None, None, None, None, None


def average_gradients(state: NormState, new: Tensor, rate) -> tuple[Tensor, Tensor]:
    """Move the averages of the gradient's reductions (2, C) by a batch's, unless those are not finite; return them
    times their weight, and the weight.

    Many upstream gradients at once (`is_grads_batched`) are each averaged from the state as it is, and leave it there.
    """
    finite, moved = new.sum().isfinite(), []
    for running, value in ((state.running_grad, new), (state.running_grad_weight, 1.0)):
        moved.append(torch.where(finite, running + rate * (value - running), running))
        if not is_batched(new):
            running.copy_(moved[-1])
    average, w = (t.to(new.dtype) for t in moved)
    return average, w.clamp_min(torch.finfo(w.dtype).tiny)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x_hat = x_hat * per_channel(weight, x_hat)
    return x_hat if bias is None else x_hat + per_channel(bias, x_hat)


def all_but_channel(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def elements_per_sample(x: Tensor) -> int:
    """Elements a channel in one sample of x (N, C, *)."""
    return math.prod(x.shape[2:])


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to broadcast over x (N, C, *)."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))
