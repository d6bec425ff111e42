"""The layer's equations in plain differentiable PyTorch: the text to read and the oracle for the fast backends.

Per channel, over the n elements that the statistics read: batch mean m, biased batch variance v. State: running mean
M, running variance V, running count c. With the averaging rate λ of this step

    c  ← (1−λ)·c + λ·n            a = λ·n/c            this batch's share; 1 on the first step
    V  ← (1−a)·V + a·v + a(1−a)·(m−M)²                 the old M
    M  ← M + a·(m−M)
    x̂ = (x−M)/√(V+ε)             y = γ·x̂ + β

which is the moving average of sums, squares and counts of fast.ai's course (part 2, 2019, notebook 07) without its
cancellation. `exact` lets the gradient go through m and v, so through the share a of the statistics:

    dx = γ/σ · [ dy − a·mean(dy) − x̂·a·mean(dy·x̂) ]

`averaged` takes out of dy what a norm over many samples would: the share b from what this batch says, the rest from what
past ones said, running means A of mean(dy) and B of mean(dy·x̂), which move at λ too:

    ĉ  = (x−m)/σ                  z = mean(dy·ĉ)/max(v/σ², 1)       of this batch, v/σ² = mean(ĉ²): dy − mean(dy) − ĉ·z is
                                                                   orthogonal to 1 and ĉ, or less is taken out than that
    dx = γ/σ · [ dy − b·(mean(dy) + ĉ·z) − (1−b)·(A + x̂·B) ]        b: a, but at least what λ is at the start

At b = 1 it is batch norm's gradient, at b = 0 that of Moving Average Batch Normalization (ICLR 2020).

`norm/README.md` derives all this.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import merge_over_ranks, sum_over_ranks
from .recipes import Plan, at_least_one
from .replay import Step, is_batched, moving, recall, snapshot


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
    xw = x.to(torch.promote_types(x.dtype, state.running_mean.dtype))
    m, v, n = batch_statistics(xw, plan.recipe)
    bs = x.shape[0]
    if plan.process_group is not None:
        m, v, n, bs = merge_over_ranks(m, v, n, bs, plan.process_group)
    step = take_step(state, m, v, n, bs, plan)
    return normalize_by(step, xw, weight, bias, m, v, state, plan).to(x.dtype)


def take_step(state: NormState, m: Tensor, v: Tensor, n, bs, plan: Plan) -> Step:
    """Move the state by a batch of bs samples with statistics m, v over n elements a channel; or, when checkpointing
    runs a forward again, what its first run did."""
    with torch.no_grad(), moving(state):
        step = recall(plan.recent, m, v)
        if step is None:
            step = _advance(state, m.detach(), v.detach(), n, bs, plan)
            if plan.twice:
                plan.recent.append(step)
    return step


def normalize_by(step: Step, x: Tensor, weight, bias, m: Tensor, v: Tensor, state: NormState, plan: Plan) -> Tensor:
    """Normalise x by a step that was taken, differentiable in x, weight, bias and in the batch's statistics m and v as
    far as the recipe lets the gradient through them. A backward pass moves A and B in `state`."""
    recipe = plan.recipe
    if recipe.statistics == "batch":
        mean, var = (step.m, step.v) if recipe.backward == "detached" else (m, v)
    elif recipe.backward != "exact":
        mean, var = step.mean, step.var
    else:
        # the values are the step's; differences that are zero carry the gradient of M + a(m−M) and
        # (1−a)V + a·v + a(1−a)(m−M)² in m and v, where (1−a)(m−M) is m − the new M
        a = step.share
        dm, dv = (torch.where(step.moves, t - t.detach(), 0.0) for t in (m, v))
        mean = step.mean + a * dm
        off = torch.where(step.moves, step.m - step.mean, 0.0)
        var = step.var + a * dv + a * dm * ((1 - a) * dm + 2 * off)
    inv_std = (floored(var, step, plan) + plan.eps).rsqrt()
    x_hat = (x - per_channel(mean, x)) * per_channel(inv_std, x)
    y = _affine(x_hat, weight, bias)
    if recipe.backward == "averaged" and x.requires_grad and torch.is_grad_enabled():
        y = _Project.apply(y, x, weight, inv_std, state, plan.process_group, *step)
    return y


def gradients(x: Tensor, weight, bias, dy: Tensor, step: Step, state: NormState, plan: Plan) -> list[Tensor | None]:
    """The gradients of a step as a graph of x, weight, bias and dy, for backends whose own have none: second
    derivatives, and many dy at once. None for what needs no gradient; moves A and B."""
    with torch.enable_grad():
        wide = x.to(step.mean.dtype)
        m, v, _ = batch_statistics(wide, plan.recipe)
        y = normalize_by(step, wide, weight, bias, m, v, state, plan).to(x.dtype)
    given = [t if t is not None and t.requires_grad else None for t in (x, weight, bias)]
    wanted = [t for t in given if t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled()))
    return [None if t is None else next(found) for t in given]


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


def _advance(state: NormState, m: Tensor, v: Tensor, n, bs, plan: Plan) -> Step:
    recipe = plan.recipe
    old_mean, old_var, count, samples = snapshot(
        state.running_mean, state.running_var, state.running_count, state.num_samples_tracked
    )
    shift, spread = m - old_mean, v
    if recipe.statistics == "batch":
        spread = v * (n / at_least_one(n - 1))
    # a NaN or Inf in x is one in v; n is 0 when every rank's batch is empty
    seen = (spread + shift.square()).amax().isfinite() & (n > 0)
    moves = seen
    rate, start = recipe.rates(plan.mom, bs, samples.to(count.dtype))
    rate = torch.zeros_like(count) + rate
    if (skip := recipe.skip) is not None:
        skipped = skip.now(state.num_samples_tracked + bs, state.num_batches_tracked + 1)
        seen, moves = seen | skipped, seen & ~skipped  # a skipped step does not look at its batch
    state.num_samples_tracked.add_((seen * bs).to(torch.int64))
    state.num_batches_tracked.add_(seen)
    young = None if recipe.clamp is None else state.num_samples_tracked < recipe.clamp.samples
    if recipe.statistics == "batch":  # nn.BatchNorm's: from mean 0, variance 1, the variance unbiased where it can be
        a, moved = torch.ones_like(count), torch.zeros_like(count) + n
        mean, var = old_mean + rate * shift, old_var + rate * (spread - old_var)
    else:
        moved = torch.where(count < 0, n, rate * n + (1 - rate) * count)
        # a tensor over a tensor: 1 exactly on the first step, since any less lets a(1−a)(m−M)² swamp a small variance
        a = torch.where(moves, rate * n / moved, 0.0)
        mean, var = old_mean + a * shift, (1 - a) * old_var + a * v + a * (1 - a) * shift.square()
    mean, var = torch.where(moves, mean, old_mean), torch.where(moves, var, old_var)
    state.running_mean.copy_(mean)
    state.running_var.copy_(var)
    # as a vector: the compilers of torch 2.9 and 2.11 lose, without a word, what is written to a float64 scalar
    state.running_count.view(1).copy_(torch.where(moves, moved, count))
    # of the projection, what this batch says: never less than what it weighed at the start
    own = torch.where(moves, a.clamp_min(start), 0.0)
    return Step(m, v, *(t.to(m.dtype) for t in (mean, var, rate, a, own)), moves, young)


def floored(var: Tensor, step: Step, plan: Plan) -> Tensor:
    """The variance that normalises: V, or the recipe's floor where V is below it and the layer young."""
    if step.young is None:
        return var
    return torch.where(step.young, var.clamp_min(plan.recipe.clamp.floor(plan.eps)), var)


class _Project(torch.autograd.Function):
    """Identity in y; in the backward pass, moves A and B by this batch and gives x what the projection takes out of dy:
    −γ/σ·[b·(mean(dy) + ĉ·z) + (1−b)·(A + x̂·B)]. A second derivative takes A and B as constants."""

    @staticmethod
    def forward(y, *_):
        return y.clone()  # a view made here could not be changed in place, as by nn.ReLU(inplace=True)

    @staticmethod
    def setup_context(ctx, inputs, output):  # apart from `forward`, for torch.func
        _, x, weight, inv_std, ctx.state, ctx.group, *step = inputs
        ctx.save_for_backward(x, weight, inv_std, *step)  # a step's tensors apart: a tracer takes others for constants

    @staticmethod
    def backward(ctx, dy):
        x, weight, inv_std, *step = ctx.saved_tensors
        step, dims, n = Step(*step), all_but_channel(dy), dy.shape[0] * elements_per_sample(dy)
        c = (x - per_channel(step.m, x)) * per_channel(inv_std, x)
        sums = torch.stack([dy.sum(dims), (dy * c).sum(dims)])
        if ctx.group is not None:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "second derivatives through a process group are refused; got create_graph=True: leave it out, or "
                    "the process group"
                )
            sums, n = sum_over_ranks(sums, n, ctx.group)
        shift, slope = projection(sums / n, inv_std, step, ctx.state)
        x_hat = (x - per_channel(step.mean, x)) * per_channel(inv_std, x)
        scale = inv_std if weight is None else inv_std * weight
        out = -per_channel(scale, x) * (per_channel(shift, x) + per_channel(slope, x) * x_hat)
        return dy, out, *[None] * (4 + len(step))


def projection(means: Tensor, inv_std: Tensor, step: Step, state: NormState) -> Tensor:
    """What is taken out of dy as shift + slope·x̂, (2, C), from the batch's mean(dy) and mean(dy·ĉ), (2, C). Moves A, B."""
    u, z = means
    off = (step.m - step.mean) * inv_std  # mean(x̂), and x̂ = ĉ + off
    with torch.no_grad(), moving(state):
        average, weight = average_gradients(state, torch.stack([u, z + off * u]), step.rate)
    z, b = z / (step.v * inv_std.square()).clamp_min(1), step.own
    return b * torch.stack([u - off * z, z]) + (1 - b) / weight * average


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
