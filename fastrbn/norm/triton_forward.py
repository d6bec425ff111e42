"""Triton programs of the forward pass: statistics, the step of the state, the affine map; and how tensors are read.

A tensor x (N, C, *) is read in place, in one of two ways. As *planes* (NCHW with many positions): a tile is ROWS
samples by COLS positions of one channel. As *columns* (channels last, (N, C), NCHW with few positions): x is a matrix
of width W, of whose columns `inner` neighbours make a channel (1 unless NCHW), and a tile is ROWS rows by COLS columns.
Either way elements are summed lane by lane over the tiles of a program (tile `slot`, `slot + slots`, …), then over its
lanes, and the programs' parts are merged in a fixed order by whoever needs them: no atomics, two runs agree to the bit.

Functions that are not called `…_kernel` are pieces; the kernels put them together, in one launch, two or three
(`triton_kernels` chooses). A launch never reads what it writes to the state: the launch before leaves the old values
in `work`, which is float32 and holds, with K = C in planes and W in columns:

- forward: count, mean − origin, M2 (slots, K) each | a flag a program: not finite | old count, skipped, young if this
  batch counts, young if it does not, λ by the drift, samples before | old mean, old variance, origin (C) each
- backward: Σdy, Σdy·(x−mean) (slots, K) each | flags | old weight | old A, B (C) each | u, z, u_read, z_read (C) each

What a forward pass leaves for the backward pass is its `moment`, float32: m, v, mean, variance (C) each | share, moves,
young (`memory.Moment`).
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Cut(NamedTuple):
    """How tensors are cut into tiles; each a tl.constexpr, so part of what a kernel is compiled for."""

    PLANES: tl.constexpr
    ROWS: tl.constexpr
    COLS: tl.constexpr
    VEC: tl.constexpr  # divides W (planes: positions), so that loads can be this wide
    STRIDED: tl.constexpr  # the statistics read every step-th sample
    PARTIAL: tl.constexpr  # the statistics do not read all samples


class Rule(NamedTuple):
    """What a recipe fixes; each a tl.constexpr."""

    FROZEN: tl.constexpr  # normalise with the state as it is: evaluation
    BATCH: tl.constexpr  # normalise with the batch's own statistics
    THROUGH: tl.constexpr  # the gradient goes through the statistics
    AVERAGED: tl.constexpr  # and through averages of past gradients
    TWICE: tl.constexpr  # this forward may be run again, and then be told by its batch's statistics
    SKIP_EVERY: tl.constexpr  # 0: never
    SKIP_AFTER: tl.constexpr
    YOUNG: tl.constexpr  # samples until which the floor holds; 0: no floor
    FLOOR: tl.constexpr  # of the variance
    MEMORY: tl.constexpr  # whether λ is bound by a memory in samples: `Recipe.memory`
    LEANING: tl.constexpr  # whether that binds the state only, not what normalises
    DRIFT: tl.constexpr  # whether λ depends on the drift of the means: `Recipe.steady`, and few elements


class Shape(NamedTuple):
    """Sizes that stay with a layer."""

    units: int  # W/VEC (planes: positions/VEC)
    channels: int
    inner: int  # columns a channel
    per_sample: int  # rows a sample


class Affine(NamedTuple):
    """γ and β (C,), or None."""

    weight: object
    bias: object


# sizes that change with the batch: compiling anew for some of their values would stall training
VARYING = ["rows", "tiles", "slots", "read_rows", "read_tiles", "parts", "flags", "step", "kept", "bs"]


@triton.jit
def relu(t, where):
    return tl.where(where <= 0, 0.0, t)  # this way round a NaN stays


@triton.jit
def load_values(at, mask, RELU: tl.constexpr):
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if RELU == "before":
        value = relu(value, value)
    return value


@triton.jit
def tile_corner(tile, block, shape, cut):
    """First row and column of a tile."""
    if cut.PLANES:
        across = tl.cdiv(shape.units * cut.VEC, cut.COLS)
        row, col = (tile // across) * cut.ROWS, (tile % across) * cut.COLS
    else:
        row, col = tile * cut.ROWS, block * cut.COLS
    return row, col


@triton.jit
def row_offsets(row, block, shape, step, cut, STRIDED: tl.constexpr):
    """Where rows begin in memory."""
    if STRIDED:
        row = (row // shape.per_sample) * (shape.per_sample * step) + row % shape.per_sample
    offset = row.to(tl.int64)  # x may have more than 2³¹ elements
    if cut.PLANES:
        offset = offset * shape.channels + block
    return offset * (shape.units * cut.VEC)


@triton.jit
def tile_at(tile, block, shape, rows, step, cut, STRIDED: tl.constexpr):
    """A tile's rows (ROWS, 1), where they begin in memory (ROWS, 1), columns (1, COLS), and the mask."""
    row, col = tile_corner(tile, block, shape, cut)
    row, col = tl.arange(0, cut.ROWS) + row, tl.arange(0, cut.COLS) + col
    mask = (row < rows)[:, None] & (col < shape.units * cut.VEC)[None, :]
    return row[:, None], row_offsets(row, block, shape, step, cut, STRIDED)[:, None], col[None, :], mask


@triton.jit
def elements_in(tile, block, shape, rows, cut):
    """How many elements a tile has for each key."""
    row, col = tile_corner(tile, block, shape, cut)
    number = tl.maximum(tl.minimum(rows - row, cut.ROWS), 0)
    if cut.PLANES:
        number *= tl.minimum(shape.units * cut.VEC - col, cut.COLS)
    return number


@triton.jit
def keys_of(block, shape, cut):
    """Where a program's sums belong among K, (1,) in planes and (COLS,) in columns; K; and the programs of a slot."""
    if cut.PLANES:
        key, keys, blocks = tl.arange(0, 1) + block, shape.channels, shape.channels
    else:
        key, keys = tl.arange(0, cut.COLS) + block * cut.COLS, shape.units * cut.VEC
        blocks = tl.cdiv(keys, cut.COLS)
    return key, keys, blocks


@triton.jit
def sum_lanes(t, cut):
    """(ROWS, COLS) -> sums for each key."""
    t = tl.sum(t, 0)
    if cut.PLANES:
        t = tl.sum(t, 0, keep_dims=True)
    return t


@triton.jit
def affine_of(c, affine, channels):
    w, b = tl.zeros_like(c).to(tl.float32) + 1, tl.zeros_like(c).to(tl.float32)
    if affine.weight is not None:
        w = tl.load(affine.weight + c, mask=c < channels, other=0.0).to(tl.float32)
    if affine.bias is not None:
        b = tl.load(affine.bias + c, mask=c < channels, other=0.0).to(tl.float32)
    return w, b


@triton.jit
def inverse_deviation(var, young, eps, rule):
    """1/√(V+ε) with the floor while young (0 or 1); and 1 where the variance is off the floor, 0 where it is on it."""
    free = tl.zeros_like(var) + 1
    if rule.YOUNG > 0:
        on_it = (tl.zeros_like(var) + young != 0) & (var < rule.FLOOR)
        var, free = tl.where(on_it, rule.FLOOR, var), tl.where(on_it, 0.0, 1.0)
    return tl.rsqrt(var + eps), free


@triton.jit
def normaliser(c, state, moment, eps, channels, rule):
    """Mean, 1/σ and whether off the floor, of channels c."""
    if rule.FROZEN:
        mean, var = state.running_mean + c, state.running_var + c
    elif rule.BATCH:
        mean, var = moment + c, moment + channels + c
    else:
        mean, var = moment + 2 * channels + c, moment + 3 * channels + c
    young = 0.0
    if rule.YOUNG > 0:
        young = tl.load(moment + 4 * channels + 2)
    mean, var = tl.load(mean, mask=c < channels, other=0.0), tl.load(var, mask=c < channels, other=1.0)
    inv, free = inverse_deviation(var, young, eps, rule)
    return mean, inv, free


@triton.jit
def all_finite(flag, flags):
    bad = tl.zeros((1024,), tl.float32)
    for i in range(0, flags, 1024):
        at = tl.arange(0, 1024) + i
        bad += tl.load(flag + at, mask=at < flags, other=0.0)
    return tl.sum(bad, 0) == 0


@triton.jit
def statistics(block, slot, x, state, work, shape, rows, tiles, slots, step, bs, cut, rule, RELU: tl.constexpr):
    """A program's count, mean and M2 (squares about the mean) for each of its keys; the first ones, the old state."""
    key, keys, blocks = keys_of(block, shape, cut)
    flag = work + 3 * slots * keys
    old = flag + slots * blocks
    samples, skipped = tl.load(state.num_samples_tracked), False
    if rule.SKIP_EVERY > 0:
        batch = tl.load(state.num_batches_tracked) + 1
        skipped = (samples + bs > rule.SKIP_AFTER) & (batch % rule.SKIP_EVERY == 0)
        if not rule.TWICE:  # nothing is read
            rows, tiles = tl.where(skipped, 0, rows), tl.where(skipped, 0, tiles)
    # sums of x − shift, the mean of the program's first tile: no large mean, and no outlier, cancels the rest
    _, start, col, mask = tile_at(slot, block, shape, rows, step, cut, cut.STRIDED)
    count = elements_in(slot, block, shape, rows, cut).to(tl.float32)
    value = load_values(x + start + col, mask, RELU)
    shift = sum_lanes(value, cut) / tl.maximum(count, 1.0)
    total = tl.where(mask, value - shift[None, :], 0.0)
    square = total * total
    for tile in range(slot + slots, tiles, slots):
        _, start, col, mask = tile_at(tile, block, shape, rows, step, cut, cut.STRIDED)
        off = tl.where(mask, load_values(x + start + col, mask, RELU) - shift[None, :], 0.0)
        total += off
        square += off * off
        count += elements_in(tile, block, shape, rows, cut).to(tl.float32)
    total, square = sum_lanes(total, cut), sum_lanes(square, cut)
    mean = total / tl.maximum(count, 1.0)
    m2 = square - total * mean
    m2 = tl.where(m2 < 0, 0.0, m2)
    # parts are told from the channel's first element: means of 1e4 rounded to float32 would be too coarse to merge
    c, to, inside = key // shape.inner, work + slot * keys + key, key < keys
    first = c.to(tl.int64) * (shape.units * cut.VEC if cut.PLANES else shape.inner)
    origin, gap = load_values(x + first, inside, RELU), mean + shift - tl.load(state.running_mean + c, mask=inside)
    tl.store(to, tl.zeros_like(mean) + count, mask=inside)
    tl.store(to + slots * keys, mean + (shift - origin), mask=inside)
    tl.store(to + 2 * slots * keys, m2, mask=inside)
    bad = tl.where(inside & ~(m2 + gap * gap < float("inf")), 1.0, 0.0)  # reference.advance's rule, part by part
    tl.store(flag + slot * blocks + block, tl.sum(bad, 0))
    if slot == 0:
        once, to, channels = inside & (key % shape.inner == 0), old + 6 + c, shape.channels
        tl.store(to, tl.load(state.running_mean + c, mask=once), mask=once)
        tl.store(to + channels, tl.load(state.running_var + c, mask=once), mask=once)
        tl.store(to + 2 * channels, origin, mask=once)
        if block == 0:
            tl.store(old, tl.load(state.running_count))
            if rule.SKIP_EVERY > 0:
                tl.store(old + 1, skipped.to(tl.float32))
            tl.store(old + 2, (samples + bs < rule.YOUNG).to(tl.float32))
            tl.store(old + 3, (samples < rule.YOUNG).to(tl.float32))
            tl.store(old + 5, samples.to(tl.float32))


@triton.jit
def merge_statistics(c, work, shape, parts, cut, PARTS: tl.constexpr):
    """Mean less origin and biased variance of channels c from all programs' parts, PARTS at a time (Chan's formula)."""
    keys, number = keys_of(0, shape, cut)[1], parts * shape.inner
    zero = tl.zeros_like(c).to(tl.float32)
    count, mean, m2 = zero, zero, zero
    for i in range(0, number, PARTS):
        part = tl.arange(0, PARTS) + i
        at = work + ((part // shape.inner) * keys + part % shape.inner)[:, None] + (c * shape.inner)[None, :]
        mask = (part < number)[:, None] & (c < shape.channels)[None, :]
        n = tl.load(at, mask=mask, other=0.0)
        means = tl.load(at + parts * keys, mask=mask, other=0.0)
        squares = tl.load(at + 2 * parts * keys, mask=mask, other=0.0)
        sum_n = tl.sum(n, 0)
        weight = n / tl.maximum(sum_n, 1.0)[None, :]
        near = tl.sum(weight * means, 0)
        off, both = means - near[None, :], count + sum_n
        gap, share = near - mean, sum_n / tl.maximum(both, 1.0)
        m2 += tl.sum(squares + n * off * off, 0) + gap * gap * count * share
        mean += gap * share
        count = both
    return mean, m2 / tl.maximum(count, 1.0)


@triton.jit
def between(a, least, most):
    return tl.minimum(tl.maximum(a, least), most)


@triton.jit
def rate_by_drift(work, shape, parts, flags, numbers, cut, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """λ of a recipe with `steady` into `work`, by one program: the mean over all channels is asked for."""
    old = work + 3 * parts * keys_of(0, shape, cut)[1] + flags
    total = tl.zeros((CHANNELS,), tl.float32)
    for i in range(0, shape.channels, CHANNELS):
        c = tl.arange(0, CHANNELS) + i
        inside = c < shape.channels
        mean = tl.load(old + 6 + c, mask=inside, other=0.0)
        var = tl.load(old + 6 + shape.channels + c, mask=inside, other=1.0)
        m, v = merge_statistics(c, work, shape, parts, cut, PARTS)
        gap = m + tl.load(old + 6 + 2 * shape.channels + c, mask=inside, other=0.0) - mean
        total += tl.where(inside, gap * gap / (var + numbers.eps), 0.0)
    drift = tl.maximum(numbers.n / shape.channels * tl.sum(total, 0), 1.0)
    memory = between(numbers.share * tl.load(old + 5), numbers.least, numbers.most)
    calm = tl.minimum(numbers.n / memory * drift * drift, numbers.rate)
    tl.store(old + 4, tl.where(tl.load(old) == 0, numbers.rate, calm))  # nothing drifts from nowhere


@triton.jit
def share_of(rate, new, n, count, moves):
    """As `reference.share_of`, with λ·n given."""
    moved = tl.where(count < 0, n, new + (1 - rate) * count)
    # rounded right: 1 on the first step, since any less lets a(1−a)(m−M)² swamp a small variance
    return tl.where(moves, tl.div_rn(new + 0 * count, moved), 0.0), moved


@triton.jit
def towards(mean, var, gap, v, a):
    """As `reference.towards`, with m−M given."""
    return mean + a * gap, (1 - a) * var + a * v + a * (1 - a) * gap * gap


@triton.jit
def advance(c, write, first, state, moment, work, shape, parts, flags, numbers, bs, cut, rule, PARTS: tl.constexpr):
    """Move the state of channels c by the batch: `write` to store it, `first` to store what channels share as well.
    Returns mean and variance to normalise with, and whether the layer is young. As `reference.advance`."""
    n, rate, new, channels, inside = numbers.n, numbers.rate, numbers.new, shape.channels, c < shape.channels
    flag = work + 3 * parts * keys_of(0, shape, cut)[1]
    old = flag + flags
    if rule.DRIFT:
        rate = tl.load(old + 4)
        new = rate * n
    leaning, new_leaning = rate, new
    if rule.MEMORY:
        memory = between(numbers.memory_share * tl.load(old + 5), numbers.memory_least, numbers.memory_most)
        rate = tl.minimum(rate, bs / (bs + memory))
        new = rate * n
    m, v = merge_statistics(c, work, shape, parts, cut, PARTS)
    old_mean = tl.load(old + 6 + c, mask=inside, other=0.0)
    old_var = tl.load(old + 6 + channels + c, mask=inside, other=1.0)
    m += tl.load(old + 6 + 2 * channels + c, mask=inside, other=0.0)
    count, seen = tl.load(old), all_finite(flag, flags)
    moves = seen
    if rule.SKIP_EVERY > 0:
        skipped = tl.load(old + 1) != 0
        seen, moves = seen | skipped, seen & (skipped == 0)
        if not rule.TWICE:  # nothing was read
            m, v = tl.where(skipped, old_mean, m), tl.where(skipped, old_var, v)
    young = tl.where(seen, tl.load(old + 2), tl.load(old + 3))
    gap = m - old_mean
    if rule.BATCH:
        a, moved = count * 0 + 1, n
        mean, var = old_mean + rate * gap, old_var + rate * (v * (n / tl.maximum(n - 1, 1.0)) - old_var)
    else:
        a, moved = share_of(rate, new, n, count, moves)
        mean, var = towards(old_mean, old_var, gap, v, a)
    mean, var = tl.where(moves, mean, old_mean), tl.where(moves, var, old_var)
    if write:
        tl.store(state.running_mean + c, mean, mask=inside)
        tl.store(state.running_var + c, var, mask=inside)
    if rule.LEANING:
        a, _ = share_of(leaning, new_leaning, n, count, moves)
        mean, var = towards(old_mean, old_var, gap, v, a)
        mean, var = tl.where(moves, mean, old_mean), tl.where(moves, var, old_var)
    if write:
        tl.store(moment + c, m, mask=inside)
        tl.store(moment + channels + c, v, mask=inside)
        tl.store(moment + 2 * channels + c, mean, mask=inside)
        tl.store(moment + 3 * channels + c, var, mask=inside)
    if first:
        tl.store(state.running_count, tl.where(moves, moved, count))
        tl.store(state.num_samples_tracked, tl.load(state.num_samples_tracked) + tl.where(seen, bs, 0))
        tl.store(state.num_batches_tracked, tl.load(state.num_batches_tracked) + tl.where(seen, 1, 0))
        tl.store(moment + 4 * channels, a)
        tl.store(moment + 4 * channels + 1, moves.to(tl.float32))
        tl.store(moment + 4 * channels + 2, young)
    if rule.BATCH:
        mean, var = m, v
    return mean, var, young


@triton.jit
def affine_map(block, slot, x, y, mean, inv, affine, c, shape, rows, tiles, slots, cut, RELU: tl.constexpr):
    """y = γ·(x−mean)/σ + β for a program's tiles; mean and 1/σ of its channels c."""
    w, b = affine_of(c, affine, shape.channels)
    for tile in range(slot, tiles, slots):
        _, start, col, mask = tile_at(tile, block, shape, rows, 1, cut, False)
        value = normalised(load_values(x + start + col, mask, RELU) - mean[None, :], inv * w, b)
        if RELU == "after":
            value = relu(value, value)
        tl.store(y + start + col, value, mask=mask)


@triton.jit
def normalised(off, scale, b):
    """off·scale + b, rounded once wherever it is compiled, so that the backward pass sees the signs of this pass."""
    zero = tl.zeros_like(off)
    return tl.fma(off, zero + scale[None, :], zero + b[None, :])


@triton.jit(do_not_specialize=VARYING)
def statistics_kernel(
    x, state, work, shape, rows, tiles, slots, step, bs, cut: tl.constexpr, rule: tl.constexpr, RELU: tl.constexpr
):
    """Parts of the statistics. `slots` programs for each block of channels."""
    blocks = tl.num_programs(0) // slots
    block, slot = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    statistics(block, slot, x, state, work, shape, rows, tiles, slots, step, bs, cut, rule, RELU)


@triton.jit(do_not_specialize=VARYING)
def rate_kernel(work, shape, numbers, parts, flags, cut: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """λ by the drift, for whatever moves the state next. One program."""
    rate_by_drift(work, shape, parts, flags, numbers, cut, CHANNELS, PARTS)


@triton.jit(do_not_specialize=VARYING)
def advance_kernel(
    state, moment, work, shape, numbers, parts, flags, bs,
    cut: tl.constexpr, rule: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The state and the moment after this batch, CHANNELS a program."""
    c = tl.arange(0, CHANNELS) + tl.program_id(0) * CHANNELS
    first = tl.program_id(0) == 0
    advance(c, True, first, state, moment, work, shape, parts, flags, numbers, bs, cut, rule, PARTS)


@triton.jit(do_not_specialize=VARYING)
def map_kernel(
    x, y, affine, state, moment, work, shape, numbers, rows, tiles, slots, parts, flags, bs,
    cut: tl.constexpr, rule: tl.constexpr, RELU: tl.constexpr, ADVANCE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y, with the moment as it is or, when ADVANCE, with the one that each program works out for its channels."""
    blocks = tl.num_programs(0) // slots
    block, slot = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = keys_of(block, shape, cut)[0] // shape.inner
    if ADVANCE:
        first = (slot == 0) & (block == 0)
        mean, var, young = advance(
            c, slot == 0, first, state, moment, work, shape, parts, flags, numbers, bs, cut, rule, PARTS
        )
        inv, free = inverse_deviation(var, young, numbers.eps, rule)
    else:
        mean, inv, free = normaliser(c, state, moment, numbers.eps, shape.channels, rule)
    affine_map(block, slot, x, y, mean, inv, affine, c, shape, rows, tiles, slots, cut, RELU)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    x, y, affine, state, moment, work, shape, numbers, rows, tiles, read_rows, read_tiles, step, bs,
    cut: tl.constexpr, rule: tl.constexpr, RELU: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The whole forward pass in one program, whose tiles are as wide as the tensor (columns)."""
    statistics(0, 0, x, state, work, shape, read_rows, read_tiles, 1, step, bs, cut, rule, RELU)
    tl.debug_barrier()  # what one thread has written, another may now read
    if rule.DRIFT:
        rate_by_drift(work, shape, 1, 1, numbers, cut, CHANNELS, PARTS)
        tl.debug_barrier()
    c = tl.arange(0, CHANNELS)
    advance(c, True, True, state, moment, work, shape, 1, 1, numbers, bs, cut, rule, PARTS)
    tl.debug_barrier()
    c = keys_of(0, shape, cut)[0] // shape.inner
    mean, inv, free = normaliser(c, state, moment, numbers.eps, shape.channels, rule)
    affine_map(0, 0, x, y, mean, inv, affine, c, shape, rows, tiles, 1, cut, RELU)
