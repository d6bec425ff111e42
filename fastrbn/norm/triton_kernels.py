"""The reference's step in Triton, for CUDA tensors, or CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

There are three launches forward (3 reads or writes of the activations) and three backward (5). In the first, about
`PROGRAMS` programs share the tensor and write partial sums. In the second, a few programs merge these and move the
state of each channel. In the third, many programs write y or dx, and one of them moves the numbers that all channels
share. So no program reads what another one writes in the same launch. Without atomics, two runs agree bit for bit;
without host reads, a CUDA graph can record a step.

A tensor x (N, C, *) is read in place as a matrix: for each channel, N rows of its positions (NCHW), or N·positions rows
of C channels (channels last, (N, C)). A tile has ROWS × COLS elements. Other batch sizes need no new compilation.
"""

from __future__ import annotations

import math
from collections import namedtuple
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from . import fused, reference
from .recipes import Memory, Plan, Recipe
from .reference import NormState, elements_per_sample
from .replay import Step, is_batched, moving, running_again

# These affect only speed; estimated, not yet measured on a device
TILE = 4096  # elements per tile, 16 per thread
PROGRAMS = 512  # that write partial sums; a power of two, because one tile merges all parts of a channel
_MERGED = 4  # channels per merging program

evaluate = fused.evaluate


# Compile-time constants, fixed for a layer and a dtype. PLANES: a row belongs to one channel. VEC divides the row
# length, so loads can be this wide. STRIDED: the statistics read every step-th sample
Cut = namedtuple("Cut", "PLANES ROWS COLS VEC STRIDED")
# sizes fixed for a layer: units of VEC columns per row, channels, rows per sample
Shape = namedtuple("Shape", "units channels per_sample")


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """`reference.normalize` for non-empty batches without a process group; the recipe must not be `plain_only`."""
    if plan.recent and running_again():
        return fused.normalize(x, weight, bias, state, plan)
    if not all(t.is_contiguous() for t in state):
        raise ValueError("the triton backend needs contiguous state tensors: call .contiguous() on them")
    x, (weight, bias) = x.resolve_neg(), (t if t is None else t.resolve_neg().contiguous() for t in (weight, bias))
    if not x.is_contiguous() and not x.movedim(1, -1).is_contiguous():
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if x.stride(1) == 1 else x.contiguous()
    return _Normalize.apply(x, weight, bias, state, plan)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, plan):
        recipe, count = plan.recipe, state.running_count
        bs, c = x.shape[:2]
        job, y, (eps, floor, until) = _job(x, recipe), torch.empty_like(x), _limits(plan)
        work, saved = _floats(x, (4 * c + job.blocks) * job.parts_read), _floats(x, 4 * c + 6)
        rate, bounds = None, (1.0, 1.0, 0.0)
        if isinstance(recipe.rate, Memory):
            bounds = map(float, recipe.rate.bounds(plan.mom))
        else:
            rates = recipe.rates(plan.mom, bs, state.num_samples_tracked.float())
            rate = torch.stack([torch.zeros_like(count) + r for r in rates])
        with moving(state), torch.cuda.device_of(x):
            statistics_kernel[job.blocks, job.parts_read](
                x, state.running_mean, work, *job.read, job.step, job.cut, num_warps=8
            )
            advance_kernel[triton.cdiv(c, _MERGED),](
                *(work, state.running_mean, state.running_var, count, state.num_samples_tracked, saved, rate, *bounds),
                *(c, job.parts_read, job.blocks * job.parts_read, bs, job.n_read, until, PROGRAMS, _MERGED),
            )
            map_kernel[job.grid](
                *(x, y, weight, bias, saved, *state[2:5], *job.all, bs, eps, floor, job.cut), num_warps=8
            )
        increment_version(state[:5])  # autograd cannot see writes in these kernels
        if plan.twice:
            plan.recent.append(_step(saved, c, recipe))
        ctx.save_for_backward(x, weight, bias)
        ctx.saved, ctx.job, ctx.state, ctx.plan = saved, job, state, plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        saved, job, state, plan, c = ctx.saved, ctx.job, ctx.state, ctx.plan, x.shape[1]
        if torch.is_grad_enabled() or is_batched(dy):
            return *reference.gradients(x, weight, bias, dy, _step(saved, c, plan.recipe), state, plan), None, None
        if dy.stride() != x.stride() or dy.is_neg() or dy._is_zerotensor():
            dy = torch.empty_like(x).copy_(dy)
        wanted = zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
        dx, d_weight, d_bias = (torch.empty_like(t) if needed else None for t, needed in wanted)
        averages, (eps, floor, _) = (None, None) if dx is None else state[5:], _limits(plan)
        work, slopes = _floats(x, (2 * c + job.blocks) * job.parts), _floats(x, 3 * c + 1)
        with moving(state), torch.cuda.device_of(x):
            sums_kernel[job.blocks, job.parts](x, dy, saved, work, *job.all, eps, floor, job.cut, num_warps=8)
            settle_kernel[triton.cdiv(c, _MERGED),](
                *(work, saved, weight, d_weight, d_bias, *averages, slopes, c, job.parts, job.blocks * job.parts),
                *(job.n, eps, floor, PROGRAMS, _MERGED),
            )
            if dx is not None:
                dx_kernel[job.grid](x, dy, dx, saved, slopes, averages[1], *job.all, job.cut, num_warps=8)
                increment_version(averages)
        return dx, d_weight, d_bias, None, None


def _job(x: Tensor, recipe: Recipe) -> SimpleNamespace:
    """The division of a tensor of x's size between programs; `…_read` describes the part that the statistics read."""
    n, c = x.shape[:2]
    positions = elements_per_sample(x)
    kept = recipe.samples_read(n, positions)
    step = n // kept if recipe.order == "strided" else 1
    planes = positions > 1 and x.is_contiguous()
    width, per_sample = (positions, 1) if planes else (c, positions)
    cols = min(triton.next_power_of_2(width), TILE // 4 if planes else TILE // 64)
    across, vec = triton.cdiv(width, cols), math.gcd(width, 16 // x.dtype.itemsize)
    blocks, across = (c, across) if planes else (across, 1)
    tiles, tiles_read = (triton.cdiv(k * per_sample, TILE // cols) * across for k in (n, kept))
    shape = Shape(width // vec, c, per_sample)
    return SimpleNamespace(
        cut=Cut(*map(tl.constexpr, (planes, TILE // cols, cols, vec, step > 1))),
        all=(shape, n * per_sample, tiles),  # rows, and tiles per block
        read=(shape, kept * per_sample, tiles_read),
        step=step,
        blocks=blocks,  # of channels
        parts=min(tiles, max(PROGRAMS // blocks, 1)),  # programs that share the sums of a block
        parts_read=min(tiles_read, max(PROGRAMS // blocks, 1)),
        grid=(blocks, min(tiles, 1 << 15)),  # for a map; a launch allows no more
        n=float(n * positions),  # elements per channel
        n_read=float(kept * positions),
    )


def _floats(x: Tensor, number: int) -> Tensor:
    return x.new_empty(number, dtype=torch.float32)


def _limits(plan: Plan) -> tuple[float, float, int]:
    """ε, the floor of the variance, and the number of samples from which it no longer holds."""
    clamp = plan.recipe.clamp
    floor, until = (0.0, 0) if clamp is None else (clamp.floor(plan.eps), clamp.samples)
    return float(plan.eps), float(floor), until


def _step(saved: Tensor, c: int, recipe: Recipe) -> Step:
    """The step as `reference.py` knows it, from what the kernels saved."""
    m, v, mean, var = (row.clone() for row in saved[: 4 * c].view(4, c))
    rate, share, own, moves, young = (number.clone() for number in saved[4 * c : 4 * c + 5])
    return Step(m, v, mean, var, rate, share, own, moves != 0, None if recipe.clamp is None else young != 0)


# arguments that change with the batch; specialising on their values would recompile during training
VARYING = ["rows", "tiles", "step", "parts", "flags", "bs", "until"]


@triton.jit
def load(at, mask):
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def channels_of(block, shape, cut):
    """The channel of each column of a tile, and whether it exists."""
    if cut.PLANES:
        c = tl.zeros((cut.COLS,), tl.int32) + block
    else:
        c = tl.arange(0, cut.COLS) + block * cut.COLS
    return c, c < shape.channels


@triton.jit
def tile_at(tile, block, rows, step, shape, cut, STRIDED: tl.constexpr):
    """Rows of a tile (ROWS,), and the addresses and the mask of its elements (ROWS, COLS).

    STRIDED: rows are counted in every step-th sample only.
    """
    width, tile = shape.units * cut.VEC, tl.cast(tile, tl.int64)  # x may have more than 2³¹ elements
    if cut.PLANES:
        across = tl.cdiv(width, cut.COLS)
        row, col = (tile // across) * cut.ROWS, (tile % across) * cut.COLS
    else:
        row, col = tile * cut.ROWS, block * cut.COLS
    row, col = row + tl.arange(0, cut.ROWS), col + tl.arange(0, cut.COLS)
    mask, at = (row < rows)[:, None] & (col < width)[None, :], row
    if STRIDED:
        at = (row // shape.per_sample) * step * shape.per_sample + row % shape.per_sample
    if cut.PLANES:
        at = at * shape.channels + block
    return row, (at * width)[:, None] + col[None, :], mask


@triton.jit
def per_column(tile, cut):
    """For each column, the sum over all of its channel in the tile."""
    total = tl.sum(tile, 0)
    if cut.PLANES:
        total = tl.zeros_like(total) + tl.sum(total, 0)
    return total


@triton.jit
def store_rows(to, stride, values, mask):
    for i in tl.static_range(len(values)):
        tl.store(to + i * stride, values[i], mask=mask)


@triton.jit
def all_good(at, flags):
    bad = tl.zeros((1024,), tl.float32)
    for i in range(0, flags, 1024):
        flag = tl.arange(0, 1024) + i
        bad += tl.load(at + flag, mask=flag < flags, other=0.0)
    return tl.sum(bad, 0) == 0


@triton.jit
def parts_at(work, channels, parts, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels of a merging program and whether they exist; addresses and mask of their parts (PARTS, CHANNELS)."""
    c, part = tl.arange(0, CHANNELS) + tl.program_id(0) * CHANNELS, tl.arange(0, PARTS)
    at, mask = work + part[:, None] * channels + c[None, :], (part < parts)[:, None] & (c < channels)[None, :]
    return c, c < channels, at, mask


@triton.jit
def normaliser(c, inside, saved, channels, eps, floor):
    """The mean and 1/σ that normalise channels c."""
    mean = load(saved + 2 * channels + c, inside)
    var = tl.load(saved + 3 * channels + c, mask=inside, other=1.0)
    floor = tl.where(tl.load(saved + 4 * channels + 4) != 0, floor, float("-inf"))  # while the layer is young
    return mean, tl.rsqrt(tl.where(var < floor, floor, var) + eps)


@triton.jit(do_not_specialize=VARYING)
def statistics_kernel(x, running_mean, work, shape, rows, tiles, step, cut: tl.constexpr):
    """For each part of a channel: number of elements, mean of its first tile, mean minus that, and variance.

    Written to `work` one after the other, (parts, C) each, followed by one flag per program.
    """
    block, slot, slots = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, inside = channels_of(block, shape, cut)
    row, at, mask = tile_at(slot, block, rows, step, shape, cut, cut.STRIDED)
    # sums of x − shift, where shift is near the mean, so that a large mean costs no precision
    shift = per_column(load(x + at, mask), cut)
    shift = shift / tl.maximum(per_column(mask.to(tl.float32), cut), 1.0)
    number = tl.zeros((cut.ROWS, cut.COLS), tl.float32)
    total, square = number, number
    for tile in range(slot, tiles, slots):
        row, at, mask = tile_at(tile, block, rows, step, shape, cut, cut.STRIDED)
        off = tl.where(mask, load(x + at, mask) - shift[None, :], 0.0)
        number += mask.to(tl.float32)
        total += off
        square += off * off
    number = per_column(number, cut)
    mean = per_column(total, cut) / tl.maximum(number, 1.0)
    var = per_column(square, cut) / tl.maximum(number, 1.0) - mean * mean
    var = tl.where(var < 0, 0.0, var)  # a NaN stays
    to, all_parts = work + slot * shape.channels + c, slots * shape.channels
    store_rows(to, all_parts, (number, shift, mean, var), inside)
    # the rule of reference._advance, part by part; the factor 4 keeps merges of good parts from overflowing
    gap = mean + (shift - load(running_mean + c, inside))
    bad, flag = inside & ~(4 * (var + gap * gap) < float("inf")), slot * tl.num_programs(0) + block
    tl.store(work + 4 * all_parts + flag, tl.sum(tl.where(bad, 1.0, 0.0), 0))


@triton.jit(do_not_specialize=VARYING)
def advance_kernel(
    work, running_mean, running_var, count, samples, saved, rate, least, most, memory, channels, parts, flags, bs, n,
    until, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge the parts (Chan's formula) and move the means and variances.

    Writes to `saved`: m, v, new mean and new variance, (C,) each, then λ, the shares a and b, whether the state moves,
    whether the layer is young, and the new count.
    """
    c, inside, at, mask = parts_at(work, channels, parts, PARTS, CHANNELS)
    all_parts = parts * channels
    number, origin = load(at, mask), load(work + all_parts + c, inside)
    means = load(at + all_parts, mask) - origin[None, :] + load(at + 2 * all_parts, mask)
    weight = number / tl.maximum(tl.sum(number, 0), 1.0)[None, :]
    m = tl.sum(weight * means, 0)
    means -= m[None, :]
    v = tl.sum(weight * (load(at + 3 * all_parts, mask) + means * means), 0)
    m += origin
    # reference._advance
    moves = all_good(work + 4 * all_parts, flags)
    old_mean, old_var = load(running_mean + c, inside), load(running_var + c, inside)
    old_count, seen = tl.load(count), tl.load(samples)
    if rate is None:
        start = bs / (bs + least)
        rate = bs / (bs + tl.minimum(tl.maximum(memory * seen.to(tl.float32), least), most))
    else:
        start = tl.load(rate + 1)
        rate = tl.load(rate)
    moved = tl.where(old_count < 0, n, rate * n + (1 - rate) * old_count)
    # correctly rounded, so exactly 1 on the first step
    a = tl.where(moves, tl.div_rn(rate * n, moved), 0.0)
    gap = m - old_mean
    mean = tl.where(moves, old_mean + a * gap, old_mean)
    var = tl.where(moves, (1 - a) * old_var + a * v + a * (1 - a) * gap * gap, old_var)
    tl.store(running_mean + c, mean, mask=inside)
    tl.store(running_var + c, var, mask=inside)
    store_rows(saved + c, channels, (m, v, mean, var), inside)
    if tl.program_id(0) == 0:
        young = seen + tl.where(moves, bs, 0) < until
        moved = tl.where(moves, moved, old_count)
        own = tl.where(moves, tl.maximum(a, start), 0.0)
        store_rows(saved + 4 * channels, 1, (rate, a, own, moves.to(tl.float32), young.to(tl.float32), moved), None)


@triton.jit(do_not_specialize=VARYING)
def map_kernel(
    x, y, weight, bias, saved, count, samples, batches, shape, rows, tiles, bs, eps, floor, cut: tl.constexpr
):  # fmt: skip
    """y = γ·(x−M)/σ + β; one program also moves the counts."""
    block, slot = tl.program_id(0), tl.program_id(1)
    c, inside = channels_of(block, shape, cut)
    mean, scale = normaliser(c, inside, saved, shape.channels, eps, floor)
    shift = tl.zeros_like(mean)
    if weight is not None:
        scale *= load(weight + c, inside)
    if bias is not None:
        shift += load(bias + c, inside)
    if (block == 0) & (slot == 0):
        moves = tl.load(saved + 4 * shape.channels + 3) != 0
        tl.store(count, tl.load(saved + 4 * shape.channels + 5))
        tl.store(samples, tl.load(samples) + tl.where(moves, bs, 0))
        tl.store(batches, tl.load(batches) + tl.where(moves, 1, 0))
    for tile in range(slot, tiles, tl.num_programs(1)):
        row, at, mask = tile_at(tile, block, rows, 1, shape, cut, False)
        off = load(x + at, mask) - mean[None, :]
        tl.store(y + at, off * scale[None, :] + shift[None, :], mask=mask)


@triton.jit(do_not_specialize=VARYING)
def sums_kernel(x, dy, saved, work, shape, rows, tiles, eps, floor, cut: tl.constexpr):
    """Partial sums of dy and of dy·ĉ, (parts, C) each in `work`, followed by one flag per program."""
    block, slot, slots = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, inside = channels_of(block, shape, cut)
    mean, inv = normaliser(c, inside, saved, shape.channels, eps, floor)
    m = load(saved + c, inside)
    sum_dy = tl.zeros((cut.ROWS, cut.COLS), tl.float32)
    sum_dot = sum_dy
    for tile in range(slot, tiles, slots):
        row, at, mask = tile_at(tile, block, rows, 1, shape, cut, False)
        grad = load(dy + at, mask)
        sum_dy += grad
        sum_dot += grad * tl.where(mask, load(x + at, mask) - m[None, :], 0.0)
    sum_dy, sum_dot = per_column(sum_dy, cut), per_column(sum_dot, cut) * inv
    to, all_parts = work + slot * shape.channels + c, slots * shape.channels
    store_rows(to, all_parts, (sum_dy, sum_dot), inside)
    bad = inside & ~(slots * (tl.abs(sum_dy) + tl.abs(sum_dot)) < float("inf"))
    flag = slot * tl.num_programs(0) + block
    tl.store(work + 2 * all_parts + flag, tl.sum(tl.where(bad, 1.0, 0.0), 0))


@triton.jit(do_not_specialize=VARYING)
def settle_kernel(
    work, saved, weight, d_weight, d_bias, running_grad, running_grad_weight, slopes, channels, parts, flags, n, eps,
    floor, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge the sums, write the gradients of γ and β, and move the averages A and B.

    Writes to `slopes` the coefficients of dx, (C,) each, for dy, x − M and 1, then the new weight of the averages.
    """
    c, inside, at, mask = parts_at(work, channels, parts, PARTS, CHANNELS)
    all_parts = parts * channels
    mean, inv = normaliser(c, inside, saved, channels, eps, floor)
    off = (load(saved + c, inside) - mean) * inv
    sum_dy, sum_dot = tl.sum(load(at, mask), 0), tl.sum(load(at + all_parts, mask), 0)
    sum_dot_x_hat = sum_dot + off * sum_dy
    if d_weight is not None:
        tl.store(d_weight + c, sum_dot_x_hat, mask=inside)
    if d_bias is not None:
        tl.store(d_bias + c, sum_dy, mask=inside)
    if running_grad is not None:  # reference.projection
        finite, total = all_good(work + 2 * all_parts, flags), tl.load(running_grad_weight)
        rate, own = tl.load(saved + 4 * channels), tl.load(saved + 4 * channels + 2)
        a, b = load(running_grad + c, inside), load(running_grad + channels + c, inside)
        a = tl.where(finite, a + rate * (sum_dy / n - a), a)
        b = tl.where(finite, b + rate * (sum_dot_x_hat / n - b), b)
        total = tl.where(finite, total + rate * (1 - total), total)
        store_rows(running_grad + c, channels, (a, b), inside)
        if tl.program_id(0) == 0:
            tl.store(slopes + 3 * channels, total)
        z = sum_dot / n / tl.maximum(load(saved + channels + c, inside) * inv * inv, 1.0)
        past = (1 - own) / tl.maximum(total, 1e-30)
        shift, slope = own * (sum_dy / n - off * z) + past * a, own * z + past * b
        p = inv
        if weight is not None:
            p *= load(weight + c, inside)
        store_rows(slopes + c, channels, (p, -p * inv * slope, -p * shift), inside)


@triton.jit(do_not_specialize=VARYING)
def dx_kernel(x, dy, dx, saved, slopes, total, shape, rows, tiles, cut: tl.constexpr):
    """dx from the slopes; one program also moves the weight of the averages."""
    block, slot, channels = tl.program_id(0), tl.program_id(1), shape.channels
    c, inside = channels_of(block, shape, cut)
    mean, p = load(saved + 2 * channels + c, inside)[None, :], load(slopes + c, inside)[None, :]
    q, r = load(slopes + channels + c, inside)[None, :], load(slopes + 2 * channels + c, inside)[None, :]
    if (block == 0) & (slot == 0):
        tl.store(total, tl.load(slopes + 3 * channels))
    for tile in range(slot, tiles, tl.num_programs(1)):
        row, at, mask = tile_at(tile, block, rows, 1, shape, cut, False)
        off = load(x + at, mask) - mean
        tl.store(dx + at, load(dy + at, mask) * p + off * q + r, mask=mask)


INTERPRETED = not isinstance(map_kernel, triton.JITFunction)
