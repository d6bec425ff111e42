"""The reference's step in Triton: CUDA, or CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

Three launches forward (3 reads or writes of the activations), three backward (5):

- partial sums: `PROGRAMS` programs or so share the tensor, and each leaves what it found for its channels;
- a merge: few programs put the parts together and move the state;
- a map: y, or dx.

A launch never reads what another program of it writes: the merge moves what belongs to a channel, the map after it the
numbers that all channels share. There are no atomics, so two runs agree to the bit, and nothing is asked of the device,
so a CUDA graph can record a step. Batches of other sizes compile no new kernels. Evaluation and the second run under
activation checkpointing are `fused`'s, second derivatives `reference`'s.

A tensor x (N, C, *) is read in place as a matrix of rows: N rows of the positions of one channel, C of those (NCHW), or
N·positions rows of C channels (channels last, (N, C)). A tile is ROWS of its rows by COLS of its columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from . import fused, reference
from .recipes import Memory, Plan, Recipe
from .reference import NormState, elements_per_sample
from .replay import Step, is_batched, moving, running_again

# what only speed depends on; reasoned, not yet measured on a device
TILE = 4096  # elements of a tile: 16 a thread
PROGRAMS = 512  # that sum; a merge takes the parts of a channel as one tile, so a power of two
_MERGED = 4  # channels a merging program

evaluate = fused.evaluate


class Cut(NamedTuple):
    """What kernels are compiled for; it stays with a layer and a dtype."""

    PLANES: tl.constexpr  # a row is of one channel
    ROWS: tl.constexpr
    COLS: tl.constexpr
    VEC: tl.constexpr  # divides a row, so that loads can be this wide
    STRIDED: tl.constexpr  # the statistics read every step-th sample
    PARTIAL: tl.constexpr  # the statistics do not read all samples


class Shape(NamedTuple):
    """Sizes that stay with a layer."""

    units: int  # of VEC columns a row
    channels: int
    per_sample: int  # rows


class Job(NamedTuple):
    """How programs share tensors of one size, and what the statistics read of them."""

    shape: Shape
    cut: Cut
    blocks: int  # of channels
    rows: int
    rows_read: int
    step: int
    n: float  # elements a channel that are read
    n_all: float

    def parts(self, rows: int) -> int:
        """How many programs share a block of channels to sum over its first rows."""
        return min(self.tiles(rows), max(PROGRAMS // self.blocks, 1))

    def tiles(self, rows: int) -> int:
        """Tiles of a block, or as many as a launch takes."""
        planes, tall, cols, vec = (field.value for field in self.cut[:4])
        across = triton.cdiv(self.shape.units * vec, cols) if planes else 1
        return min(triton.cdiv(rows, tall) * across, 1 << 15)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """As `reference.normalize`, for batches with at least one element, without a process group, and recipes that have
    more than the plain formulas."""
    if plan.recent and running_again():
        return fused.normalize(x, weight, bias, state, plan)
    if not all(t.is_contiguous() for t in state):
        raise ValueError("the triton backend needs a contiguous state: make its tensors so with .contiguous()")
    x = x.resolve_neg()
    if not x.is_contiguous() and not x.movedim(1, -1).is_contiguous():
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if x.stride(1) == 1 else x.contiguous()
    return _Normalize.apply(x, weight, bias, state, plan)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, plan):
        recipe, c, count = plan.recipe, x.shape[1], state.running_count
        job, y, bs = _job(x, recipe), torch.empty_like(x), x.shape[0]
        parts = job.parts(job.rows_read)
        work, saved = _floats(x, (4 * c + job.blocks) * parts), _floats(x, 4 * c + 5)
        rate, bounds = None, (1.0, 1.0, 0.0)
        if isinstance(recipe.rate, Memory):
            bounds = tuple(map(float, recipe.rate.bounds(plan.mom)))
        else:
            samples = state.num_samples_tracked.to(count.dtype)
            rate = torch.zeros_like(count) + recipe.rate(plan.mom, bs, samples)
        with moving(state), torch.cuda.device_of(x):
            statistics_kernel[(job.blocks, parts)](
                x, state.running_mean, work, job.shape, job.rows_read, job.step, job.cut, num_warps=8
            )
            advance_kernel[(triton.cdiv(c, _MERGED),)](
                work, state.running_mean, state.running_var, count, state.num_samples_tracked, saved, rate, *bounds, c,
                parts, job.blocks * parts, bs, job.n, _floor(plan)[1], PROGRAMS, _MERGED,
            )  # fmt: skip
            map_kernel[(job.blocks, job.tiles(job.rows))](
                x, y, _contiguous(weight), _contiguous(bias), saved, count, state.num_samples_tracked,
                state.num_batches_tracked, job.shape, job.rows, bs, plan.eps, _floor(plan)[0], job.cut, num_warps=8,
            )  # fmt: skip
        increment_version(state[:5])  # autograd sees no write of these kernels'
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
        dx, d_weight, d_bias = (
            torch.empty_like(t) if needed else None
            for t, needed in zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        averages, eps, floor = (None, None), float(plan.eps), _floor(plan)[0]
        if plan.recipe.backward == "averaged" and dx is not None:
            averages = state[5:]
        parts = job.parts(job.rows)
        work, slopes = _floats(x, (2 * c + job.blocks) * parts), _floats(x, 5 * c + 1)
        with moving(state), torch.cuda.device_of(x):
            sums_kernel[(job.blocks, parts)](
                x, dy, saved, work, job.shape, job.rows, eps, floor, job.cut, num_warps=8
            )
            settle_kernel[(triton.cdiv(c, _MERGED),)](
                work, saved, _contiguous(weight), d_weight, d_bias, *averages, slopes, c, parts, job.blocks * parts,
                job.n, job.n_all, eps, floor, job.cut, PROGRAMS, _MERGED,
            )  # fmt: skip
            if dx is not None:
                dx_kernel[(job.blocks, job.tiles(job.rows))](
                    x, dy, dx, saved, slopes, averages[1], job.shape, job.rows, job.rows_read, job.step, job.cut,
                    num_warps=8,
                )  # fmt: skip
        if averages[0] is not None:
            increment_version(averages)
        return dx, d_weight, d_bias, None, None


def _job(x: Tensor, recipe: Recipe) -> Job:
    n, c = x.shape[:2]
    positions = elements_per_sample(x)
    kept = recipe.samples_read(n, positions)
    step = n // kept if recipe.order == "strided" else 1
    planes = positions > 1 and x.is_contiguous()
    width, per_sample, blocks = (positions, 1, c) if planes else (c, positions, 1)
    cols = min(triton.next_power_of_2(width), TILE // 4 if planes else TILE // 64)
    vec = 16 // x.dtype.itemsize
    while width % vec:
        vec //= 2
    cut = Cut(*map(tl.constexpr, (planes, TILE // cols, cols, vec, step > 1, kept < n)))
    blocks = c if planes else triton.cdiv(c, cols)
    n_read, n_all = float(kept * positions), float(n * positions)
    return Job(Shape(width // vec, c, per_sample), cut, blocks, n * per_sample, kept * per_sample, step, n_read, n_all)


def _floor(plan: Plan) -> tuple[float, int]:
    """Of the variance, and until how many samples."""
    clamp = plan.recipe.clamp
    return (0.0, 0) if clamp is None else (float(clamp.floor(plan.eps)), clamp.samples)


def _step(saved: Tensor, c: int, recipe: Recipe) -> Step:
    m, v, mean, var = (row.clone() for row in saved[: 4 * c].view(4, c))
    rate, share, moves, young = (number.clone() for number in saved[4 * c : 4 * c + 4])
    return Step(m, v, mean, var, rate, share, moves != 0, None if recipe.clamp is None else young != 0)


def _floats(x: Tensor, number: int) -> Tensor:
    return torch.empty(number, dtype=torch.float32, device=x.device)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.resolve_neg().contiguous()


# what changes with the batch: compiling anew for some of its values would stall training
VARYING = ["rows", "rows_read", "step", "parts", "flags", "bs", "until"]


@triton.jit
def channels_of(block, shape, cut):
    """The channel of each column of a tile, and whether there is one."""
    if cut.PLANES:
        c = tl.zeros((cut.COLS,), tl.int32) + block
    else:
        c = tl.arange(0, cut.COLS) + block * cut.COLS
    return c, c < shape.channels


@triton.jit
def tiles_of(rows, shape, cut):
    tiles = tl.cdiv(rows, cut.ROWS)
    if cut.PLANES:
        tiles = tiles * tl.cdiv(shape.units * cut.VEC, cut.COLS)
    return tiles


@triton.jit
def tile_at(tile, block, rows, step, shape, cut, STRIDED: tl.constexpr):
    """A tile's rows (ROWS,), where its elements lie in memory and which are there (ROWS, COLS). STRIDED: its rows are
    counted in every step-th sample."""
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
    """The sum of each column's channel, in every column of it."""
    total = tl.sum(tile, 0)
    if cut.PLANES:
        total = tl.zeros_like(total) + tl.sum(total, 0)
    return total


@triton.jit
def leave(bad, flags):
    """A program's flag: whether anything that it found is bad."""
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(flags + at, tl.sum(tl.where(bad, 1.0, 0.0), 0))


@triton.jit
def all_good(at, flags):
    bad = tl.zeros((1024,), tl.float32)
    for i in range(0, flags, 1024):
        flag = tl.arange(0, 1024) + i
        bad += tl.load(at + flag, mask=flag < flags, other=0.0)
    return tl.sum(bad, 0) == 0


@triton.jit
def normaliser(c, inside, saved, channels, eps, floor):
    """Mean, 1/σ, and 1 where the variance is free, 0 where it is at its floor, of channels c."""
    mean = tl.load(saved + 2 * channels + c, mask=inside, other=0.0)
    var = tl.load(saved + 3 * channels + c, mask=inside, other=1.0)
    floor = tl.where(tl.load(saved + 4 * channels + 3) != 0, floor, float("-inf"))  # while the layer is young
    return mean, tl.rsqrt(tl.where(var < floor, floor, var) + eps), tl.where(var < floor, 0.0, 1.0)


@triton.jit(do_not_specialize=VARYING)
def statistics_kernel(x, running_mean, work, shape, rows, step, cut: tl.constexpr):
    """A part of a channel: elements, the mean of its first tile, mean − that, and the variance. All (parts, C) in
    `work`, one after the other; then a flag for each program."""
    block, slot, slots = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, inside = channels_of(block, shape, cut)
    _, at, mask = tile_at(slot, block, rows, step, shape, cut, cut.STRIDED)
    # sums of x − shift, near the mean: what a large mean has in front of the digits cancels nothing
    shift = per_column(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), cut)
    shift = shift / tl.maximum(per_column(mask.to(tl.float32), cut), 1.0)
    number = tl.zeros((cut.ROWS, cut.COLS), tl.float32)
    total, square = number, number
    for tile in range(slot, tiles_of(rows, shape, cut), slots):
        _, at, mask = tile_at(tile, block, rows, step, shape, cut, cut.STRIDED)
        off = tl.where(mask, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - shift[None, :], 0.0)
        number += mask.to(tl.float32)
        total += off
        square += off * off
    number = per_column(number, cut)
    some = tl.maximum(number, 1.0)
    mean = per_column(total, cut) / some
    var = per_column(square, cut) / some - mean * mean
    var = tl.where(var < 0, 0.0, var)  # a NaN stays
    to, all_parts = work + slot * shape.channels + c, slots * shape.channels
    tl.store(to, number, mask=inside)
    tl.store(to + all_parts, shift, mask=inside)
    tl.store(to + 2 * all_parts, mean, mask=inside)
    tl.store(to + 3 * all_parts, var, mask=inside)
    # the rule of reference._advance, part by part; 4: so that no merge of good parts overflows
    gap = mean + (shift - tl.load(running_mean + c, mask=inside, other=0.0))
    leave(inside & ~(4 * (var + gap * gap) < float("inf")), work + 4 * all_parts)


@triton.jit(do_not_specialize=VARYING)
def advance_kernel(
    work, running_mean, running_var, count, samples, saved, rate, least, most, memory, channels, parts, flags, bs, n,
    until, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge the parts (Chan's formula), move means and variances, and leave in `saved` the batch's m, v, the new mean
    and variance, (C,) each, and λ, the share, whether the state moves, whether the layer is young, the new count."""
    c, part = tl.arange(0, CHANNELS) + tl.program_id(0) * CHANNELS, tl.arange(0, PARTS)
    inside, all_parts = c < channels, parts * channels
    at, mask = work + part[:, None] * channels + c[None, :], (part < parts)[:, None] & inside[None, :]
    number = tl.load(at, mask=mask, other=0.0)
    origin = tl.load(work + all_parts + c, mask=inside, other=0.0)
    means = tl.load(at + 2 * all_parts, mask=mask, other=0.0)
    means += tl.load(at + all_parts, mask=mask, other=0.0) - origin[None, :]
    weight = number / tl.maximum(tl.sum(number, 0), 1.0)[None, :]
    m = tl.sum(weight * means, 0)
    means -= m[None, :]
    v = tl.sum(weight * (tl.load(at + 3 * all_parts, mask=mask, other=0.0) + means * means), 0)
    m += origin
    # reference._advance
    moves = all_good(work + 4 * all_parts, flags)
    old_mean, old_var = tl.load(running_mean + c, mask=inside, other=0.0), tl.load(running_var + c, mask=inside, other=1.0)
    old_count, seen = tl.load(count), tl.load(samples)
    if rate is None:
        rate = bs / (bs + tl.minimum(tl.maximum(memory * seen.to(tl.float32), least), most))
    else:
        rate = tl.load(rate).to(tl.float32)
    moved = tl.where(old_count < 0, n, rate * n + (1 - rate) * old_count)
    # rounded right: exactly 1 on the first step
    a = tl.where(moves, tl.div_rn(rate * n, moved), 0.0)
    gap = m - old_mean
    mean = tl.where(moves, old_mean + a * gap, old_mean)
    var = tl.where(moves, (1 - a) * old_var + a * v + a * (1 - a) * gap * gap, old_var)
    tl.store(running_mean + c, mean, mask=inside)
    tl.store(running_var + c, var, mask=inside)
    tl.store(saved + c, m, mask=inside)
    tl.store(saved + channels + c, v, mask=inside)
    tl.store(saved + 2 * channels + c, mean, mask=inside)
    tl.store(saved + 3 * channels + c, var, mask=inside)
    if tl.program_id(0) == 0:
        to = saved + 4 * channels
        tl.store(to, rate)
        tl.store(to + 1, a)
        tl.store(to + 2, moves.to(tl.float32))
        tl.store(to + 3, (seen + tl.where(moves, bs, 0) < until).to(tl.float32))
        tl.store(to + 4, tl.where(moves, moved, old_count))


@triton.jit(do_not_specialize=VARYING)
def map_kernel(
    x, y, weight, bias, saved, count, samples, batches, shape, rows, bs, eps, floor, cut: tl.constexpr
):  # fmt: skip
    """y = γ·(x−M)/σ + β; one program moves the counts."""
    block, slot = tl.program_id(0), tl.program_id(1)
    c, inside = channels_of(block, shape, cut)
    mean, scale, _ = normaliser(c, inside, saved, shape.channels, eps, floor)
    shift = tl.zeros_like(mean)
    if weight is not None:
        scale *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        shift += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if (block == 0) & (slot == 0):
        moves = tl.load(saved + 4 * shape.channels + 2) != 0
        tl.store(count, tl.load(saved + 4 * shape.channels + 4))
        tl.store(samples, tl.load(samples) + tl.where(moves, bs, 0))
        tl.store(batches, tl.load(batches) + tl.where(moves, 1, 0))
    for tile in range(slot, tiles_of(rows, shape, cut), tl.num_programs(1)):
        _, at, mask = tile_at(tile, block, rows, 1, shape, cut, False)
        off = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        tl.store(y + at, off * scale[None, :] + shift[None, :], mask=mask)


@triton.jit(do_not_specialize=VARYING)
def sums_kernel(x, dy, saved, work, shape, rows, eps, floor, cut: tl.constexpr):
    """A part's sums of dy and of dy·x̂, (parts, C) each in `work`, then a flag for each program."""
    block, slot, slots = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, inside = channels_of(block, shape, cut)
    mean, inv, _ = normaliser(c, inside, saved, shape.channels, eps, floor)
    sum_dy = tl.zeros((cut.ROWS, cut.COLS), tl.float32)
    sum_dot = sum_dy
    for tile in range(slot, tiles_of(rows, shape, cut), slots):
        _, at, mask = tile_at(tile, block, rows, 1, shape, cut, False)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        sum_dy += grad
        sum_dot += grad * (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :])
    sum_dy, sum_dot = per_column(sum_dy, cut), per_column(sum_dot, cut) * inv
    to, all_parts = work + slot * shape.channels + c, slots * shape.channels
    tl.store(to, sum_dy, mask=inside)
    tl.store(to + all_parts, sum_dot, mask=inside)
    leave(inside & ~(slots * (tl.abs(sum_dy) + tl.abs(sum_dot)) < float("inf")), work + 2 * all_parts)


@triton.jit(do_not_specialize=VARYING)
def settle_kernel(
    work, saved, weight, d_weight, d_bias, running_grad, running_grad_weight, slopes, channels, parts, flags, n, n_all,
    eps, floor, cut: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge the sums, give γ and β their gradients, move the averages A and B, and leave the `slopes` (C,) of dx in dy,
    x − M and 1, and the latter two of what rows that were read have beside; then the averages' new weight."""
    c, part = tl.arange(0, CHANNELS) + tl.program_id(0) * CHANNELS, tl.arange(0, PARTS)
    inside, all_parts = c < channels, parts * channels
    at, mask = work + part[:, None] * channels + c[None, :], (part < parts)[:, None] & inside[None, :]
    sum_dy = tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    sum_dot = tl.sum(tl.load(at + all_parts, mask=mask, other=0.0), 0)
    if d_weight is not None:
        tl.store(d_weight + c, sum_dot, mask=inside)
    if d_bias is not None:
        tl.store(d_bias + c, sum_dy, mask=inside)
    _, inv, free = normaliser(c, inside, saved, channels, eps, floor)
    rate, share = tl.load(saved + 4 * channels), tl.load(saved + 4 * channels + 1)
    in_rows, in_rows_dot = share * sum_dy / n, share * sum_dot * free / n
    everywhere, everywhere_dot = tl.zeros_like(inv), tl.zeros_like(inv)
    if not cut.PARTIAL:
        everywhere, everywhere_dot = in_rows, in_rows_dot
    if running_grad is not None:  # reference.average_gradients
        finite, total = all_good(work + 2 * all_parts, flags), tl.load(running_grad_weight)
        a = tl.load(running_grad + c, mask=inside, other=0.0)
        b = tl.load(running_grad + channels + c, mask=inside, other=0.0)
        a = tl.where(finite, a + rate * (sum_dy / n_all - a), a)
        b = tl.where(finite, b + rate * (sum_dot / n_all - b), b)
        total = tl.where(finite, total + rate * (1 - total), total)
        tl.store(running_grad + c, a, mask=inside)
        tl.store(running_grad + channels + c, b, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(slopes + 5 * channels, total)
        past = (1 - share) / tl.maximum(total, 1e-30)
        everywhere += past * a
        everywhere_dot += past * b
    p = inv
    if weight is not None:
        p *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(slopes + c, p, mask=inside)
    tl.store(slopes + channels + c, -p * inv * everywhere_dot, mask=inside)
    tl.store(slopes + 2 * channels + c, -p * everywhere, mask=inside)
    tl.store(slopes + 3 * channels + c, -p * inv * in_rows_dot, mask=inside)
    tl.store(slopes + 4 * channels + c, -p * in_rows, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def dx_kernel(
    x, dy, dx, saved, slopes, running_grad_weight, shape, rows, rows_read, step, cut: tl.constexpr
):  # fmt: skip
    """dx from the slopes; one program moves the averages' weight."""
    block, slot, channels = tl.program_id(0), tl.program_id(1), shape.channels
    c, inside = channels_of(block, shape, cut)
    mean = tl.load(saved + 2 * channels + c, mask=inside, other=0.0)[None, :]
    p = tl.load(slopes + c, mask=inside, other=0.0)[None, :]
    q = tl.load(slopes + channels + c, mask=inside, other=0.0)[None, :]
    r = tl.load(slopes + 2 * channels + c, mask=inside, other=0.0)[None, :]
    q_read = tl.load(slopes + 3 * channels + c, mask=inside, other=0.0)[None, :]
    r_read = tl.load(slopes + 4 * channels + c, mask=inside, other=0.0)[None, :]
    if running_grad_weight is not None:
        if (block == 0) & (slot == 0):
            tl.store(running_grad_weight, tl.load(slopes + 5 * channels))
    for tile in range(slot, tiles_of(rows, shape, cut), tl.num_programs(1)):
        row, at, mask = tile_at(tile, block, rows, 1, shape, cut, False)
        off = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32) * p + off * q + r
        if cut.PARTIAL:
            was_read = row < rows_read
            if cut.STRIDED:
                sample = row // shape.per_sample
                was_read = (sample % step == 0) & (sample // step * shape.per_sample < rows_read)
            grad += tl.where(was_read[:, None], off * q_read + r_read, 0.0)
        tl.store(dx + at, grad, mask=mask)


INTERPRETED = not isinstance(map_kernel, triton.JITFunction)
