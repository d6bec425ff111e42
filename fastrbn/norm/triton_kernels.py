"""The reference's step in Triton: CUDA, or CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

Launches a step, forward + backward (units: one read or write of the activations):

- 1 + 1 where one program can take the whole tensor;
- 2 + 2 (3 + 5 units) where each program of the second launch can merge what the first left for its channels: planes,
  and channels last up to medium size. The first launch sums, the second moves the state and writes y, or dx;
- 3 + 3 (same units) otherwise: a launch between merges, so that it is not done many times over;
- backward 2 launches (3 units) where dx needs no sums of this batch: `detached`, evaluation.

Few elements in a recipe with `steady` take one launch more, where there are several: λ is by the drift of all channels.
A step that the recipe skips reads nothing of x but to normalise it: 2 units forward. Nothing is asked of the device,
so a CUDA graph can record a step. Batches of other sizes compile no new kernels, unless they have fewer rows than a
tile. The programs are in `triton_forward` and `triton_backward`, how they share the work in `triton_cuts`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import fused
from . import triton_backward as backward
from . import triton_cuts as cuts
from . import triton_forward as forward
from .memory import Moment, is_batched, recall, running_again
from .recipes import Plan, Recipe, one_of
from .reference import NormState, elements_per_sample
from .triton_forward import Affine, Rule

INTERPRETED = not isinstance(forward.map_kernel, triton.JITFunction)
RELU = ("none", "before", "after")
_INTERPRETED_PROCESSORS = 2


def evaluate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, eps: float, relu: str = "none"
) -> Tensor:
    """As `reference.evaluate`; `relu` as in `normalize`."""
    one_of("relu", relu, RELU)
    if x.numel() == 0:
        return fused.evaluate(x, weight, bias, state, eps)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Evaluate.apply(x, weight, bias, state, eps, relu)
    return _map(*_laid_out(x), weight, bias, state, None, eps, _FROZEN, relu)[0]


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan, relu: str = "none"
) -> Tensor:
    """As `reference.normalize`, for batches with at least one element and without a process group.

    `relu`: "before" normalises relu(x), "after" gives relu of the result; neither costs a pass.
    """
    one_of("relu", relu, RELU)
    return _Normalize.apply(x, weight, bias, state, plan, relu)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, plan, relu):
        ctx.save_for_backward(x, weight, bias)
        ctx.state, ctx.plan, ctx.eps, ctx.relu = state, plan, plan.eps, relu
        y, ctx.moment, ctx.job, ctx.rule = _step(x, weight, bias, state, plan, relu)
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_backward(ctx, dy), None, None, None


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, eps, relu):
        ctx.save_for_backward(x, weight, bias)
        # copies: a training step may move the state before this forward's backward
        state = state._replace(running_mean=state.running_mean.clone(), running_var=state.running_var.clone())
        ctx.state, ctx.plan, ctx.eps, ctx.relu = state, None, eps, relu
        ctx.moment, ctx.rule = None, _FROZEN
        y, ctx.job = _map(*_laid_out(x), weight, bias, state, None, eps, _FROZEN, relu)
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_backward(ctx, dy), None, None, None


def _backward(ctx, dy):
    # the kernels have no graph, and take one dy
    make = _differentiable if torch.is_grad_enabled() or is_batched(dy) else _gradients
    return make(ctx, *ctx.saved_tensors, dy)


class _Numbers(NamedTuple):
    """Of a forward pass: elements n a channel that the statistics read, λ, λ·n, ε, the recipe's `Steady` and `Memory`."""

    n: float
    rate: float
    new: float
    eps: float
    least: float
    most: float
    share: float
    memory_least: float
    memory_most: float
    memory_share: float


class _BackwardNumbers(NamedTuple):
    """Elements a channel, over those read; λ_b, κ, ε."""

    n_all: float
    spread: float
    rate: float
    kappa: float
    eps: float


def _step(x, weight, bias, state: NormState, plan: Plan, relu: str):
    """Move the state and normalise: y, the moment, the job and the rule."""
    recipe, bs, channels = plan.recipe, x.shape[0], x.shape[1]
    if not all(t.is_contiguous() for t in (state.running_mean, state.running_var, state.running_grad)):
        raise ValueError("the triton backend needs a contiguous state: make it so with .contiguous()")
    kept = recipe.samples_read(bs, elements_per_sample(x)) * elements_per_sample(x)
    rate = float(recipe.rate(plan.mom, bs, kept))
    # with enough elements the rate is the smaller one at any drift
    drift = recipe.steady is not None and kept < rate * recipe.steady.most
    rule = _rule(recipe, plan.eps, plan.twice, drift=drift)
    if plan.recent and running_again():
        seen = x.relu() if relu == "before" else x
        found = recall(plan.recent, *fused._statistics(seen, state, recipe)[:2])
        if found is not None:
            moment = _packed(found)
            y, job = _map(*_laid_out(x), weight, bias, state, moment, plan.eps, rule, relu, recipe)
            return y, moment, job, rule
    x, last = _laid_out(x)
    job = _job(x, last, recipe)
    y, affine = torch.empty_like(x), _affine(weight, bias)
    work, moment = _floats(job.forward_work, x), _floats(4 * channels + 3, x)
    numbers = _Numbers(job.n, rate, rate * job.n, float(plan.eps), *_steady(recipe), *_memory(recipe, plan.mom))
    s, flags, common = job.statistics, job.statistics.slots * job.blocks, job.common
    with _on(x.device):
        if job.one:
            forward.forward_kernel[(1,)](
                x, y, affine, state, moment, work, job.shape, numbers, job.rows, job.tiles, job.read_rows,
                job.read_tiles, job.step, bs, job.cut, rule, relu, job.channels, job.parts, **common,
            )  # fmt: skip
        else:
            forward.statistics_kernel[(flags,)](
                x, state, work, job.shape, job.read_rows, job.read_tiles, s.slots, job.step, bs, job.cut, rule, relu,
                **common,
            )  # fmt: skip
            if drift:
                forward.rate_kernel[(1,)](
                    work, job.shape, numbers, s.slots, flags, job.cut, job.channels, job.parts, **_MERGING
                )
            if not s.inside:
                forward.advance_kernel[(triton.cdiv(channels, job.channels),)](
                    state, moment, work, job.shape, numbers, s.slots, flags, bs, job.cut, rule, job.channels,
                    job.parts, **_MERGING,
                )  # fmt: skip
            forward.map_kernel[(s.then * job.blocks,)](
                x, y, affine, state, moment, work, job.shape, numbers, job.rows, job.tiles, s.then, s.slots, flags, bs,
                job.cut, rule, relu, s.inside, job.parts_inside, **common,
            )  # fmt: skip
    if plan.twice:
        plan.recent.append(_unpacked(moment, channels, recipe))
    return y, moment, job, rule


def _map(x, last: bool, weight, bias, state, moment, eps: float, rule, relu: str, recipe=None):
    """y for a moment, or a frozen state, that is known; and the job."""
    job = _job(x, last, recipe)
    y, numbers = torch.empty_like(x), _Numbers(0.0, 0.0, 0.0, float(eps), *_NO_BOUNDS, *_NO_BOUNDS)
    with _on(x.device):
        forward.map_kernel[(job.tiles * job.blocks,)](
            x, y, _affine(weight, bias), state, moment, None, job.shape, numbers, job.rows, job.tiles, job.tiles, 0, 0,
            0, job.cut, rule, relu, False, job.parts_inside, **job.common,
        )  # fmt: skip
    return y, job


def _gradients(ctx, x, weight, bias, dy):
    """dx, dγ, dβ, None where not needed; moves the averages of the gradient's reductions. No plan: evaluation."""
    plan, state, moment, relu, job, rule = ctx.plan, ctx.state, ctx.moment, ctx.relu, ctx.job, ctx.rule
    (x, last), (need_x, need_weight, need_bias, *_) = _laid_out(x), ctx.needs_input_grad
    if not (_is_channels_last(dy) if last else dy.is_contiguous()):
        dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
    averaged = through = False
    kappa = rate = 0.0
    if plan is not None and need_x:
        through, averaged = plan.recipe.backward != "detached", plan.recipe.backward == "averaged"
    elif plan is not None:
        rule = _rule(plan.recipe, ctx.eps, False, False)
    if averaged:
        kappa, rate = plan.recipe.kappa, plan.recipe.backward_rate(plan.mom, job.bs, int(job.n_all))
    numbers = _BackwardNumbers(job.n_all, job.n_all / job.n, float(rate), float(kappa), float(ctx.eps))
    dx = torch.empty_like(x) if need_x else None
    grads = Affine(torch.empty_like(weight) if need_weight else None, torch.empty_like(bias) if need_bias else None)
    affine, work, s, flags = _affine(weight, bias), _floats(job.backward_work, x), job.sums, job.sums.slots * job.blocks

    def sweep(slots, sums, dx_too, projection):
        backward.sweep_kernel[(slots * job.blocks,)](
            x, dy, dx, affine, grads, state, moment, work, job.shape, numbers, job.rows, job.tiles, slots, s.slots,
            flags, job.step, job.kept, job.cut, rule, relu, sums, dx_too, projection, job.parts_inside, **job.common,
        )  # fmt: skip

    def settle():
        backward.settle_kernel[(triton.cdiv(x.shape[1], job.channels),)](
            grads, state, moment, work, job.shape, numbers, s.slots, flags, job.cut, rule, job.channels, job.parts,
            **_MERGING,
        )  # fmt: skip

    with _on(x.device):
        if not (need_weight or need_bias or through):
            sweep(job.tiles, False, True, "none")
        elif job.one:
            backward.backward_kernel[(1,)](
                x, dy, dx, affine, grads, state, moment, work, job.shape, numbers, job.rows, job.tiles, job.step,
                job.kept, job.cut, rule, relu, need_x, job.channels, job.parts, **job.common,
            )  # fmt: skip
        elif not through:  # dx, if any, waits for no sums of this batch
            sweep(s.slots, True, need_x, "none")
            settle()
        else:
            sweep(s.slots, True, False, "none")
            if not s.inside:
                settle()
            sweep(s.then, False, True, "merged" if s.inside else "stored")
    return dx, *grads


def _differentiable(ctx, x, weight, bias, dy):
    """The gradients as a graph of x, weight, bias and dy; the reference's, in float32."""
    plan, eps, relu, state = ctx.plan, ctx.eps, ctx.relu, ctx.state
    with torch.enable_grad():
        given, dy = x.float(), dy.float()
        given = given.relu() if relu == "before" else given
    if relu == "after":
        with torch.no_grad():
            y, _ = _map(*_laid_out(x), weight, bias, state, ctx.moment, eps, ctx.rule, "none")
        dy = dy.masked_fill(y <= 0, 0.0)
    if plan is None:
        with torch.enable_grad():
            y = torch.nn.functional.batch_norm(
                given, state.running_mean, state.running_var, _float(weight), _float(bias), False, 0.0, eps
            )
        wanted = [t for t in (given, weight, bias) if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled()))
        dx, *others = (next(found) if t is not None and t.requires_grad else None for t in (given, weight, bias))
    else:
        moment = _unpacked(ctx.moment, x.shape[1], plan.recipe)
        mean, var = (moment.m, moment.v) if plan.recipe.statistics == "batch" else (moment.mean, moment.var)
        if moment.young is not None:
            var, _ = fused._floored(var, moment, plan)
        parts = SimpleNamespace(plan=plan, moment=moment, state=state, mean=mean, var=var)
        dx, *others = fused._differentiable_backward(parts, given, weight, bias, dy)
    if dx is not None:
        dx = (dx.masked_fill(given <= 0, 0.0) if relu == "before" else dx).to(x.dtype)
    return dx, *others


_MERGING = {"num_warps": 4, "enable_fp_fusion": True}
_FROZEN = Rule(*map(tl.constexpr, (True, False, False, False, False, 0, 0, 0, 0.0, False, False, False)))
_NO_BOUNDS = 1.0, 1.0, 0.0


def _steady(recipe: Recipe) -> tuple[float, float, float]:
    s = recipe.steady
    return _NO_BOUNDS if s is None else (float(s.least), float(s.most), float(s.share))


def _memory(recipe: Recipe, mom: float) -> tuple[float, float, float]:
    return _NO_BOUNDS if recipe.memory is None else tuple(map(float, recipe.memory.bounds(mom)))


@lru_cache(maxsize=256)
def _rule(recipe: Recipe, eps: float, twice: bool = False, for_x: bool = True, drift: bool = False) -> Rule:
    """What the recipe's kernels are compiled for; `for_x`: x needs a gradient, so the averages move."""
    skip, clamp, batch = recipe.skip, recipe.clamp, recipe.statistics == "batch"
    through, averaged = for_x and recipe.backward != "detached", for_x and recipe.backward == "averaged"
    every, after = (0, 0) if skip is None else (skip.every, skip.after)
    young, floor = 0, 0.0
    if clamp is not None:
        young, floor = clamp.samples, clamp.deviation**2 - eps if clamp.variance is None else clamp.variance
    bounds = recipe.memory is not None, recipe.leaning, drift
    settings = (False, batch, through, averaged, twice, every, after, young, float(floor), *bounds)
    return Rule(*map(tl.constexpr, settings))


def _job(x: Tensor, last: bool, recipe: Recipe | None) -> cuts.Job:
    """How programs share x out; no recipe: no statistics are read."""
    n, c, positions = x.shape[0], x.shape[1], elements_per_sample(x)
    kept = n if recipe is None else recipe.samples_read(n, positions)
    step = 1 if recipe is None or recipe.order == "first" else n // kept
    return cuts.job_for(n, c, positions, last, x.dtype.itemsize, kept, step, _processors(x.device), cuts.TUNING)


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """x, contiguous if it is in neither of the two layouts; and whether its channels come last in memory."""
    if x.is_contiguous():
        return x, False
    return (x, True) if _is_channels_last(x) else (x.contiguous(), False)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def _unpacked(moment: Tensor, channels: int, recipe: Recipe) -> Moment:
    """What the kernels left, in tensors of its own."""
    fields = [t.clone() for t in moment[: 4 * channels].view(4, channels)]
    share, moves, young = moment[4 * channels :].clone().unbind()
    return Moment(*fields, share.clone(), moves != 0, None if recipe.clamp is None else young != 0)


def _packed(moment: Moment) -> Tensor:
    """As the kernels take it."""
    m, v, mean, var, *scalars = fused._as_tensors(moment)
    scalars = [torch.zeros_like(scalars[0]) if t is None else t.to(m.dtype) for t in scalars]
    return torch.cat([m, v, mean, var, torch.stack(scalars)])


def _affine(weight: Tensor | None, bias: Tensor | None) -> Affine:
    return Affine(_contiguous(weight), _contiguous(bias))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _float(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.float()


def _floats(number: int, x: Tensor) -> Tensor:
    return torch.empty(number, dtype=torch.float32, device=x.device)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device):
    """Triton launches on the current device, whichever its tensors are on."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
