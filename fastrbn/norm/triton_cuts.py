"""How tensors are cut into tiles, and tiles dealt to programs: for `triton_kernels`, from sizes alone.

Everything here is a Python number worked out once for each size of tensor. What kernels are compiled for (`Cut`, warps)
depends on the layer and the dtype, not on the batch, but for batches of fewer rows than a tile has.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from triton.language import constexpr

from .triton_forward import Cut, Shape

_MOST = 2**31 - 2**16  # rows, and columns: they are counted in 32 bits, offsets in 64


class Tuning(NamedTuple):
    """Choices that only speed depends on. Reasoned, not yet measured on a device."""

    tile_bytes: int = 8192  # of one operand: with 16 elements a thread, two to four loads of 16 bytes in flight
    one_program: int = 8192  # elements up to which a single program takes the whole tensor
    one_width: int = 4096  # and its widest row
    narrow: int = 16  # positions up to which NCHW is read as columns, planes having rows too short to coalesce
    columns: int = 128  # of a tile, at most, where x is read as columns
    positions: int = 1024  # and where it is read as planes
    merge: int = 2048  # parts that every program may merge for itself
    together: int = 2048  # of those, at a time
    patience: int = 4  # tiles that a program takes one after another rather than leave more parts than that
    programs: int = 4  # a processor for sums, and twice as many where each first merges parts


TUNING = Tuning()


class Passage(NamedTuple):
    """How sums are gathered and used: by `slots` programs a block of channels; then by `then` programs a block, each of
    which merges the parts for itself if `inside`."""

    slots: int
    inside: bool
    then: int


class Job(NamedTuple):
    """How programs share out the tensors of one size."""

    shape: Shape
    cut: Cut
    rows: int
    tiles: int  # a block
    blocks: int
    read_rows: int
    read_tiles: int
    bs: int
    kept: int  # samples that the statistics read: every step-th
    step: int
    n: float  # elements a channel that they read, and all
    n_all: float
    one: bool
    common: dict  # options of a launch
    statistics: Passage
    sums: Passage
    channels: int  # a program, where a launch of its own merges; or all
    parts: int  # merged at a time there
    parts_inside: int  # and where every program does
    forward_work: int  # floats, see `triton_forward`
    backward_work: int


@lru_cache(maxsize=4096)
def job_for(
    n: int, c: int, positions: int, last: bool, itemsize: int, kept: int, step: int, processors: int, tuning: Tuning
) -> Job:
    """The job for x of n samples, c channels, `positions` elements a channel each, `last`: channels last. Statistics
    read every step-th sample, `kept` of them. Raises ValueError where rows or columns are beyond counting."""
    one = n * c * positions <= tuning.one_program and (c if last else c * positions) <= tuning.one_width
    planes = not (last or one or positions <= tuning.narrow)
    inner = 1 if planes or last else positions
    per_sample = positions if last else 1
    rows, width = n * per_sample, positions if planes else c * inner
    if max(rows, width) > _MOST:
        raise ValueError(
            f"the triton backend takes at most {_MOST} rows and columns; got {rows} rows of {width}: choose backend "
            f"'fused' or split the batch"
        )
    elements, warps = tuning.tile_bytes // itemsize, 4 if itemsize == 4 else 8
    if one:
        cols, warps, elements = _power_of_two(width), 8, 4096
    else:
        cols = _columns(width, min(elements, tuning.positions if planes else tuning.columns))
    tile_rows = min(max(elements // cols, 1), _power_of_two(rows))
    blocks, across = (c, -(-width // cols)) if planes else (-(-width // cols), 1)
    tiles, read_rows = -(-rows // tile_rows) * across, kept * per_sample
    read_tiles = -(-read_rows // tile_rows) * across
    channels_a_program = 1 if planes else cols

    def passage(summed: int) -> Passage:
        if one:
            return Passage(1, False, 1)
        most = tuning.merge // channels_a_program
        slots, inside = min(summed, -(-processors * tuning.programs // blocks)), inner == 1
        if inside and slots > most and summed <= most * tuning.patience:
            slots = most
        inside = inside and slots <= most
        then = min(tiles, -(-2 * processors * tuning.programs // blocks)) if inside else tiles
        return Passage(_evenly(summed, slots), inside, _evenly(tiles, then))

    statistics, sums = passage(read_tiles), passage(tiles)
    keys, channels = c if planes else width, _power_of_two(c) if one else min(8, _power_of_two(c))
    vec = math.gcd(width, 16 // itemsize)
    return Job(
        Shape(width // vec, c, inner, per_sample),
        Cut(*map(constexpr, (planes, tile_rows, cols, vec, step > 1, kept < n))),
        rows,
        tiles,
        blocks,
        read_rows,
        read_tiles,
        n,
        kept,
        step,
        float(kept * positions),
        float(n * positions),
        one,
        {"num_warps": warps, "enable_fp_fusion": True},
        statistics,
        sums,
        channels,
        max(min(128, tuning.together // channels), 1),
        max(min(64, tuning.together // channels_a_program), 1),
        (3 * keys + blocks) * statistics.slots + 6 + 3 * c,
        (2 * keys + blocks) * sums.slots + 1 + 6 * c,
    )


def _power_of_two(n: int) -> int:
    """The next one from n upwards."""
    return 1 << (n - 1).bit_length()


def _columns(width: int, most: int) -> int:
    """The widest power of two that leaves at most a tenth of a tile's columns empty, or else wastes the least."""
    if width <= most // 2:
        return _power_of_two(width)
    choices = [most >> i for i in range(5) if most >> i >= 16] or [most]
    full = {cols: width / (-(-width // cols) * cols) for cols in choices}
    return next((cols for cols in choices if full[cols] >= 0.9), max(choices, key=full.get))


def _evenly(tiles: int, slots: int) -> int:
    """As many programs as it takes for each to have the same number of tiles, the last one perhaps fewer."""
    return -(-tiles // -(-tiles // slots))
