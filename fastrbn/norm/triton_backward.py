"""Triton programs of the backward pass: one sweep over x and dy for sums, gradient or both, and what lies between.

dx = γ/σ·[dy − u − x̂·z], where u and z (C,) are what the statistics and the averages of the past let through, with
other u_read and z_read added in the rows that the statistics read. Tiles, parts and `work`: see `triton_forward`.
"""

import triton
import triton.language as tl

from .triton_forward import (
    VARYING,
    affine_of,
    all_finite,
    keys_of,
    load_values,
    normalised,
    normaliser,
    relu,
    sum_lanes,
    tile_at,
)

# fmt: off


@triton.jit
def sweep(
    block, slot, x, dy, dx, affine, state, moment, work, projection, shape, numbers, rows, tiles, slots, step, kept,
    cut, rule, RELU: tl.constexpr, SUMS: tl.constexpr, DX: tl.constexpr,
):
    """One reading of x and dy: a program's sums of dy and dy·(x−mean) for each key when SUMS, dx when DX, or both."""
    key, keys, blocks = keys_of(block, shape, cut)
    c, channels = key // shape.inner, shape.channels
    mean, inv, free = normaliser(c, state, moment, numbers.eps, channels, rule)
    w, b = affine_of(c, affine, channels)
    u, z, u_read, z_read = projection
    p = inv * w
    r, q, r_read, q_read = -p * u, -p * z * inv, -p * u_read, -p * z_read * inv
    sum_dy, sum_dot = tl.zeros((cut.ROWS, cut.COLS), tl.float32), tl.zeros((cut.ROWS, cut.COLS), tl.float32)
    for tile in range(slot, tiles, slots):
        row, start, col, mask = tile_at(tile, block, shape, rows, 1, cut, False)
        value = load_values(x + start + col, mask, RELU)
        grad = tl.load(dy + start + col, mask=mask, other=0.0).to(tl.float32)
        off = value - mean[None, :]
        if RELU == "after":
            grad = relu(grad, normalised(off, p, b))
        if SUMS:
            sum_dy += grad
            sum_dot += grad * off
        if DX:
            grad = grad * p[None, :]
            if rule.AVERAGED or (rule.THROUGH and not cut.PARTIAL):
                grad += off * q[None, :] + r[None, :]
            if rule.THROUGH and cut.PARTIAL:
                sample = row // shape.per_sample
                was_read = (sample % step == 0) & (sample // step < kept)
                grad += tl.where(was_read, off * q_read[None, :] + r_read[None, :], 0.0)
            if RELU == "before":
                grad = relu(grad, value)
            tl.store(dx + start + col, grad, mask=mask)
    if SUMS:
        sum_dy, sum_dot = sum_lanes(sum_dy, cut), sum_lanes(sum_dot, cut)
        to, inside = work + slot * keys + key, key < keys
        tl.store(to, sum_dy, mask=inside)
        tl.store(to + slots * keys, sum_dot, mask=inside)
        flag = work + 2 * slots * keys
        old = flag + slots * blocks
        bad = tl.where(inside & ~(tl.abs(sum_dy + sum_dot) < float("inf")), 1.0, 0.0)
        tl.store(flag + slot * blocks + block, tl.sum(bad, 0))
        if rule.AVERAGED:
            if slot == 0:
                once = inside & (key % shape.inner == 0)
                tl.store(old + 1 + c, tl.load(state.running_grad + c, mask=once), mask=once)
                tl.store(old + 1 + channels + c, tl.load(state.running_grad + channels + c, mask=once), mask=once)
                if block == 0:
                    tl.store(old, tl.load(state.running_grad_weight))


@triton.jit
def project(mean_dy, mean_dot, past_dy, past_dot, moment, free, channels, numbers, cut, rule):
    """The projection from means over all elements: this batch's of dy and dy·x̂, and the averages of past ones."""
    zero = tl.zeros_like(mean_dy)
    u, z, u_read, z_read = zero, zero, zero, zero
    if rule.AVERAGED:
        past = numbers.kappa * (1 - tl.load(moment + 4 * channels))
        u, z = past * past_dy, past * past_dot
    if rule.THROUGH:
        # the elements that were read carry all of the batch's share, `spread` times its mean over all elements
        share = tl.load(moment + 4 * channels) * numbers.spread
        u_read, z_read = share * mean_dy, share * mean_dot * free
        if not cut.PARTIAL:
            u, z = u + u_read, z + z_read
    return u, z, u_read, z_read


@triton.jit
def settle(
    c, write, first, state, moment, grads, work, shape, numbers, parts, flags, cut, rule, PARTS: tl.constexpr
):
    """Merge the sums of channels c, give γ and β their gradients, move the averages (`write`; `first`: and their
    weight), return the projection."""
    channels, keys, number, inside = shape.channels, keys_of(0, shape, cut)[1], parts * shape.inner, c < shape.channels
    mean, inv, free = normaliser(c, state, moment, numbers.eps, channels, rule)
    sum_dy, sum_dot = tl.zeros_like(inv), tl.zeros_like(inv)
    for i in range(0, number, PARTS):
        part = tl.arange(0, PARTS) + i
        at = work + ((part // shape.inner) * keys + part % shape.inner)[:, None] + (c * shape.inner)[None, :]
        mask = (part < number)[:, None] & inside[None, :]
        sum_dy += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        sum_dot += tl.sum(tl.load(at + parts * keys, mask=mask, other=0.0), 0)
    sum_dot *= inv
    if write:
        if grads.weight is not None:
            tl.store(grads.weight + c, sum_dot, mask=inside)
        if grads.bias is not None:
            tl.store(grads.bias + c, sum_dy, mask=inside)
    mean_dy, mean_dot = sum_dy / numbers.n_all, sum_dot / numbers.n_all
    past_dy, past_dot = tl.zeros_like(inv), tl.zeros_like(inv)
    if rule.AVERAGED:
        flag = work + 2 * parts * keys
        old = flag + flags
        finite, weight = all_finite(flag, flags), tl.load(old)
        past_dy = tl.load(old + 1 + c, mask=inside, other=0.0)
        past_dot = tl.load(old + 1 + channels + c, mask=inside, other=0.0)
        past_dy = tl.where(finite, past_dy + numbers.rate * (mean_dy - past_dy), past_dy)
        past_dot = tl.where(finite, past_dot + numbers.rate * (mean_dot - past_dot), past_dot)
        weight = tl.where(finite, weight + numbers.rate * (1 - weight), weight)
        if write:
            tl.store(state.running_grad + c, past_dy, mask=inside)
            tl.store(state.running_grad + channels + c, past_dot, mask=inside)
        if first:
            tl.store(state.running_grad_weight, weight)
        weight = tl.maximum(weight, 1e-30)
        past_dy, past_dot = past_dy / weight, past_dot / weight
    return project(mean_dy, mean_dot, past_dy, past_dot, moment, free, channels, numbers, cut, rule)


@triton.jit
def nothing(c):
    zero = tl.zeros_like(c).to(tl.float32)
    return zero, zero, zero, zero


@triton.jit
def stored_at(c, work, shape, parts, flags, cut):
    """Where in `work` the projection of channels c lies: u, then z, u_read, z_read C further each."""
    return work + 2 * parts * keys_of(0, shape, cut)[1] + flags + 1 + 2 * shape.channels + c


@triton.jit
def store_projection(at, c, channels, projection):
    u, z, u_read, z_read = projection
    tl.store(at, u, mask=c < channels)
    tl.store(at + channels, z, mask=c < channels)
    tl.store(at + 2 * channels, u_read, mask=c < channels)
    tl.store(at + 3 * channels, z_read, mask=c < channels)


@triton.jit
def load_projection(at, c, channels):
    u = tl.load(at, mask=c < channels, other=0.0)
    z = tl.load(at + channels, mask=c < channels, other=0.0)
    u_read = tl.load(at + 2 * channels, mask=c < channels, other=0.0)
    z_read = tl.load(at + 3 * channels, mask=c < channels, other=0.0)
    return u, z, u_read, z_read


@triton.jit(do_not_specialize=VARYING)
def sweep_kernel(
    x, dy, dx, affine, grads, state, moment, work, shape, numbers, rows, tiles, slots, parts, flags, step, kept,
    cut: tl.constexpr, rule: tl.constexpr, RELU: tl.constexpr, SUMS: tl.constexpr, DX: tl.constexpr,
    PROJECTION: tl.constexpr, PARTS: tl.constexpr,
):
    """`sweep`. PROJECTION says where dx has it from: "none", "stored" by settle_kernel, or "merged" here by each program
    for its channels."""
    blocks = tl.num_programs(0) // slots
    block, slot = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = keys_of(block, shape, cut)[0] // shape.inner
    if PROJECTION == "merged":
        first = (slot == 0) & (block == 0)
        projection = settle(
            c, slot == 0, first, state, moment, grads, work, shape, numbers, parts, flags, cut, rule, PARTS
        )
    elif PROJECTION == "stored":
        projection = load_projection(stored_at(c, work, shape, parts, flags, cut), c, shape.channels)
    else:
        projection = nothing(c)
    sweep(
        block, slot, x, dy, dx, affine, state, moment, work, projection, shape, numbers, rows, tiles, slots, step, kept,
        cut, rule, RELU, SUMS, DX,
    )


@triton.jit(do_not_specialize=VARYING)
def settle_kernel(
    grads, state, moment, work, shape, numbers, parts, flags,
    cut: tl.constexpr, rule: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):
    """Gradients of γ and β, averages and projection from the parts, CHANNELS a program."""
    c = tl.arange(0, CHANNELS) + tl.program_id(0) * CHANNELS
    first = tl.program_id(0) == 0
    projection = settle(c, True, first, state, moment, grads, work, shape, numbers, parts, flags, cut, rule, PARTS)
    store_projection(stored_at(c, work, shape, parts, flags, cut), c, shape.channels, projection)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    x, dy, dx, affine, grads, state, moment, work, shape, numbers, rows, tiles, step, kept,
    cut: tl.constexpr, rule: tl.constexpr, RELU: tl.constexpr, DX: tl.constexpr, CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The whole backward pass in one program, whose tiles are as wide as the tensor (columns)."""
    column = keys_of(0, shape, cut)[0] // shape.inner
    sweep(
        0, 0, x, dy, dx, affine, state, moment, work, nothing(column), shape, numbers, rows, tiles, 1, step, kept,
        cut, rule, RELU, True, False,
    )
    tl.debug_barrier()  # what one thread has written, another may now read
    c = tl.arange(0, CHANNELS)
    projection = settle(c, True, True, state, moment, grads, work, shape, numbers, 1, 1, cut, rule, PARTS)
    if DX:
        store_projection(stored_at(c, work, shape, 1, 1, cut), c, shape.channels, projection)
        tl.debug_barrier()
        projection = load_projection(stored_at(column, work, shape, 1, 1, cut), column, shape.channels)
        sweep(
            0, 0, x, dy, dx, affine, state, moment, work, projection, shape, numbers, rows, tiles, 1, step, kept,
            cut, rule, RELU, False, True,
        )
