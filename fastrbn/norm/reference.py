"""The equations of running batch norm in plain, differentiable PyTorch.

This is the text to read, and the oracle that the fast backends are tested against. `norm/README.md` derives what is
stated here.

**Notation.** Everything is per channel. n is the number of elements that the statistics read of the batch x (N, C, *);
m and v are their mean and biased variance; dy is the gradient of the loss with respect to the output y; mean(·) is
taken over the whole batch; γ and β are the scale and the shift.

**State.** A running mean M, a running variance V and a running count c of elements. The recipe gives the averaging rate
λ of this step. Then

    c ← (1−λ)·c + λ·n
    a = λ·n/c                                   the batch's share of the statistics; 1 on the first step
    V ← (1−a)·V + a·v + a(1−a)·(m−M)²           with the old M
    M ← M + a·(m−M)

These are the moving averages of sums, squares and counts in fast.ai's course (part 2, 2019, notebook 07), rearranged so
that no two large numbers cancel.

**Output.** In training and evaluation alike, with σ = √(V+ε):

    x̂ = (x−M)/σ            y = γ·x̂ + β

**Gradient.** dβ = Σdy and dγ = Σdy·x̂. A recipe chooses one of three forms of dx. `detached` treats M and V as
constants: dx = γ/σ·dy. `exact` differentiates through m and v, and thus through the batch's share a of M and V; if
the statistics read all of x,

    dx = γ/σ · [ dy − a·mean(dy) − x̂·a·mean(dy·x̂) ]

A norm over many samples would remove the mean of dy and its component along x̂ completely, not just their share a. On a
small batch both are noisy. `averaged` removes a share b by this batch's estimate and the rest by A and B, running
averages of mean(dy) and mean(dy·x̂) over earlier batches that move at the same rate λ:

    ĉ = (x−m)/σ            z = mean(dy·ĉ)/max(mean(ĉ²), 1)            with v/σ² for mean(ĉ²)
    dx = γ/σ · [ dy − b·(mean(dy) + ĉ·z) − (1−b)·(A + x̂·B) ]

Where mean(ĉ²) is at least 1, dy − mean(dy) − ĉ·z is orthogonal to 1 and to ĉ; where it is less, less is removed. The
share b is a, but at least what λ is before the first sample. b = 1 gives the gradient of batch norm, b = 0 that of
Moving Average Batch Normalization (ICLR 2020).

A step that leaves the state unchanged, because the batch is not finite or the recipe skips it, has a = b = 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import merge_over_ranks, sum_over_ranks
from .recipes import Plan, Recipe, at_least_one
from .replay import Step, is_batched, moving, recall, snapshot


class NormState(NamedTuple):
    """The state of a running batch norm with C channels: tensors that a training step moves in place.

    Floating-point tensors are float32, or float64 in a float64 layer. A and B are counted from zero, so both are too
    small by their weight w and are divided by it when they are used.

    Parameters
    ----------
    running_mean, running_var : Tensor
        M and V, shape (C,).
    running_count : Tensor
        c in elements per channel, shape (). −1 marks imported statistics, which count as having unlimited history.
    num_samples_tracked, num_batches_tracked : Tensor
        Samples and batches seen, int64, shape ().
    running_grad : Tensor
        w·A and w·B, shape (2, C).
    running_grad_weight : Tensor
        w, shape ().

    Examples
    --------
    >>> state = NormState.new(3)
    >>> y = running_batch_norm(torch.randn(8, 3, 5), state)
    >>> state.running_mean.shape, state.num_samples_tracked
    (torch.Size([3]), tensor(8))
    """

    running_mean: Tensor
    running_var: Tensor
    running_count: Tensor
    num_samples_tracked: Tensor
    num_batches_tracked: Tensor
    running_grad: Tensor
    running_grad_weight: Tensor

    @classmethod
    def new(
        cls, num_features: int, device: torch.device | str | int | None = None, dtype: torch.dtype = torch.float32
    ) -> NormState:
        """Return the state before the first batch: mean 0, variance 1, count 0."""

        def full(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, device=device, dtype=dtype)

        def integer() -> Tensor:
            return torch.zeros((), device=device, dtype=torch.int64)

        c = num_features
        return cls(full(0.0, c), full(1.0, c), full(0.0), integer(), integer(), full(0.0, 2, c), full(0.0))


def evaluate(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, eps: float) -> Tensor:
    """Normalise x (N, C, *) with the state as it is, like nn.BatchNorm in evaluation. Returns x's shape and dtype."""
    wide = torch.promote_types(x.dtype, state.running_mean.dtype)
    # copied, because a training step may move the state before the backward pass of this forward
    mean, inv_std = state.running_mean.to(wide, copy=True), (state.running_var.to(wide) + eps).rsqrt()
    x_hat = (x.to(wide) - per_channel(mean, x)) * per_channel(inv_std, x)
    return _affine(x_hat, weight, bias).to(x.dtype)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """One training step: move `state` by the batch x (N, C, *), then normalise x with it. The result is like x.

    A batch leaves the whole state unchanged if what the statistics read of it contains NaN or Inf, or if its variance
    or its squared distance from the running mean overflows. This needs no sync with the device; the output shows it.
    """
    n: int | Tensor
    bs: int | Tensor
    xw = x.to(torch.promote_types(x.dtype, state.running_mean.dtype))
    m, v, n = batch_statistics(xw, plan.recipe)
    bs = x.shape[0]
    if plan.process_group is not None:
        m, v, n, bs = merge_over_ranks(m, v, n, bs, plan.process_group)
    step = take_step(state, m, v, n, bs, plan)
    return normalize_by(step, xw, weight, bias, m, v, state, plan).to(x.dtype)


def take_step(state: NormState, m: Tensor, v: Tensor, n: int | Tensor, bs: int | Tensor, plan: Plan) -> Step:
    """Move the state by a batch of bs samples with mean m and variance v over n elements per channel.

    When activation checkpointing runs a forward again, return the step of its first run and move nothing.
    """
    with torch.no_grad(), moving(state):
        step = recall(plan.recent, m, v)
        if step is None:
            step = _advance(state, m.detach(), v.detach(), n, bs, plan)
            if plan.twice:
                plan.recent.append(step)  # type: ignore[union-attr]  # set whenever `twice` is
    return step


def normalize_by(
    step: Step,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    m: Tensor,
    v: Tensor,
    state: NormState,
    plan: Plan,
) -> Tensor:
    """Normalise x with the statistics of a step that was already taken.

    Differentiable in x, weight and bias, and in the batch's statistics m and v as far as the recipe lets the gradient
    through them. An averaged backward pass moves A and B in `state`.
    """
    recipe = plan.recipe
    if recipe.statistics == "batch":
        mean, var = (step.m, step.v) if recipe.backward == "detached" else (m, v)
    elif recipe.backward != "exact":
        mean, var = step.mean, step.var
    else:
        # The step's own values, plus terms that are zero but carry the gradients of M + a(m−M) and of
        # (1−a)V + a·v + a(1−a)(m−M)² in m and v. In the latter, (1−a)(m−M) = m − (new M)
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


def gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, step: Step, state: NormState, plan: Plan
) -> list[Tensor | None]:
    """Gradients of a step for x, weight and bias, as a differentiable function of these and of dy. Moves A and B.

    The other backends call this for second derivatives and for batched dy. None stands for what needs no gradient.
    """
    with torch.enable_grad():
        wide = x.to(step.mean.dtype)
        m, v, _ = batch_statistics(wide, plan.recipe)
        y = normalize_by(step, wide, weight, bias, m, v, state, plan).to(x.dtype)
    given = [t if t is not None and t.requires_grad else None for t in (x, weight, bias)]
    wanted = [t for t in given if t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled()))
    return [None if t is None else next(found) for t in given]


def batch_statistics(x: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, int]:
    """m and v of what the recipe reads of x, each (C,), and n."""
    bs, positions = x.shape[0], elements_per_sample(x)
    x, k = read(x, recipe), recipe.samples_read(bs, positions)
    if bs * positions == 0:  # an empty rank of a process group, which has weight 0 in the merge
        zero = x.sum(all_but_channel(x))
        return zero, zero, 0
    v, m = torch.var_mean(x, dim=all_but_channel(x), correction=0)
    return m, v, k * positions


def read(x: Tensor, recipe: Recipe) -> Tensor:
    """The samples of x that the statistics read, as a view."""
    bs = x.shape[0]
    k = recipe.samples_read(bs, elements_per_sample(x))
    if k == bs:
        return x
    # not x[:: bs // k]: torch.compile treats a slice's step as a constant and would recompile for each value
    return x[:k] if recipe.order == "first" else x[: k * (bs // k)].unflatten(0, (k, -1))[:, 0]


def _advance(state: NormState, m: Tensor, v: Tensor, n: int | Tensor, bs: int | Tensor, plan: Plan) -> Step:
    """Move the state by a batch's statistics: the equations under **State** above, without branches on values."""
    recipe = plan.recipe
    old_mean, old_var, count, samples = snapshot(
        state.running_mean, state.running_var, state.running_count, state.num_samples_tracked
    )
    zero = torch.zeros_like(count)
    shift, spread = m - old_mean, v
    square = shift.square()
    if recipe.statistics == "batch":
        spread = v * (n / at_least_one(n - 1))
    # NaN or Inf in x gives NaN or Inf in v; a batch that is empty on every rank gives NaN
    seen = moves = (spread + square).amax() < math.inf
    rate, start = recipe.rates(plan.mom, bs, samples.to(count.dtype))
    rate = zero + rate
    if (skip := recipe.skip) is not None:
        skipped = skip.now(state.num_samples_tracked + bs, state.num_batches_tracked + 1)
        seen, moves = seen | skipped, seen & ~skipped  # a skipped batch counts as seen even if it is not finite
    state.num_samples_tracked.add_((seen * bs).to(torch.int64))
    state.num_batches_tracked.add_(seen)
    young = None if recipe.clamp is None else state.num_samples_tracked < recipe.clamp.samples
    if (
        recipe.statistics == "batch"
    ):  # nn.BatchNorm's rule: starts from mean 0 and variance 1, unbiased variance if n > 1
        a, moved = torch.ones_like(count), zero + n
        mean, var = old_mean + rate * shift, old_var + rate * (spread - old_var)
    else:
        new = rate * n
        moved = torch.where(count < 0, n, new + (1 - rate) * count)
        # dividing two tensors gives exactly 1 on the first step; with less, a(1−a)(m−M)² would swamp a small variance
        a = torch.where(moves, new / moved, zero)
        kept = 1 - a
        mean, var = old_mean + a * shift, kept * old_var + a * v + a * kept * square
    mean, var = torch.where(moves, mean, old_mean), torch.where(moves, var, old_var)
    state.running_mean.copy_(mean)
    state.running_var.copy_(var)
    # written as a vector: the compilers of torch 2.9 and 2.11 silently drop writes to a float64 scalar
    state.running_count.view(1).copy_(torch.where(moves, moved, count))
    # b: the batch's share of the projection, never below the rate at the start
    own = torch.where(moves, a.clamp_min(start), zero)
    mean, var, rate, a, own = (t.to(m.dtype) for t in (mean, var, rate, a, own))
    return Step(m, v, mean, var, rate, a, own, moves, young)


def floored(var: Tensor, step: Step, plan: Plan) -> Tensor:
    """The variance that normalises: V, or at least the recipe's floor while the layer is young."""
    if step.young is None:
        return var
    floor = plan.recipe.clamp.floor(plan.eps)  # type: ignore[union-attr]  # young is None without a clamp
    return torch.where(step.young, var.clamp_min(floor), var)


class _Project(torch.autograd.Function):
    """The averaged backward: the identity in y, whose backward pass subtracts the projection from the gradient of x.

    It moves A and B by this batch and gives x −γ/σ·[b·(mean(dy) + ĉ·z) + (1−b)·(A + x̂·B)]; γ/σ·dy comes from the affine
    map. Second derivatives treat A and B as constants.
    """

    @staticmethod
    def forward(y, *_):
        return y.clone()  # a view could not be changed in place afterwards, as nn.ReLU(inplace=True) does

    @staticmethod
    def setup_context(ctx, inputs, output):  # separate from `forward`, for torch.func
        _, x, weight, inv_std, ctx.state, ctx.group, *step = inputs
        ctx.save_for_backward(
            x, weight, inv_std, *step
        )  # tracers take tensors that are not saved this way for constants

    @staticmethod
    def backward(ctx, dy):
        x, weight, inv_std, *step = ctx.saved_tensors
        step, dims, n = Step(*step), all_but_channel(dy), dy.shape[0] * elements_per_sample(dy)
        c = (x - per_channel(step.m, x)) * per_channel(inv_std, x)
        sums = torch.stack([dy.sum(dims), (dy * c).sum(dims)])
        if ctx.group is not None:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "second derivatives through a process group are not supported; got create_graph=True: leave out "
                    "either"
                )
            sums, n = sum_over_ranks(sums, n, ctx.group)
        shift, slope = projection(sums / n, inv_std, step, ctx.state)
        x_hat = (x - per_channel(step.mean, x)) * per_channel(inv_std, x)
        scale = inv_std if weight is None else inv_std * weight
        out = -per_channel(scale, x) * (per_channel(shift, x) + per_channel(slope, x) * x_hat)
        return dy, out, *[None] * (4 + len(step))


def projection(means: Tensor, inv_std: Tensor, step: Step, state: NormState) -> Tensor:
    """The part that the averaged backward subtracts from dy: shift and slope of shift + slope·x̂, shape (2, C).

    `means` holds the batch's mean(dy) and mean(dy·ĉ), shape (2, C). Moves A and B.
    """
    u, z = means
    off = (step.m - step.mean) * inv_std  # mean(x̂), and x̂ = ĉ + off
    with torch.no_grad(), moving(state):
        average, weight = average_gradients(state, torch.stack([u, z + off * u]), step.rate)
    z, b = z / (step.v * inv_std.square()).clamp_min(1), step.own
    return b * torch.stack([u - off * z, z]) + (1 - b) / weight * average


def average_gradients(state: NormState, new: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Move A and B by a batch's mean(dy) and mean(dy·x̂), (2, C), unless these are not finite; return w·(A, B) and w.

    With batched upstream gradients (`is_grads_batched`), each is averaged separately and the state does not move.
    """
    finite, moved = new.sum().abs() < math.inf, []
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
    """The dimensions of x (N, C, *) without that of the channels."""
    return (0, *range(2, x.dim()))


def elements_per_sample(x: Tensor) -> int:
    """Elements per channel in one sample of x (N, C, *)."""
    return math.prod(x.shape[2:])


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` (C,), reshaped to broadcast over x (N, C, *)."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))
