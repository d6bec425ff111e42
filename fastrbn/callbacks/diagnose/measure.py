"""What `ActivationStats` measures of an output: in one call of C where it can, else with PyTorch's operators."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor
from torch.nn import Parameter

from fastrbn import native as native_build

SINGLE = 4  # numbers of a module beside its histogram: mean, deviation, share near zero, share of dead channels
_ALL = 1 - 1e-6  # a mean of ones, summed in float32
_SOURCE = Path(__file__).with_name("_activations.c")
_REAL = {torch.float32: "float", torch.float64: "double"}
_ARGUMENTS = Struct("5q3d2P")  # as the struct of _activations.c
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_WORTH_A_THREAD = 1 << 17  # values
_MOST_THREADS = 64
_MOST_VALUES = 2**32 - 1  # that a bin counts


@lru_cache(maxsize=2)
def kernel(real: str):
    """The compiled function for "float" or "double", where there is one."""
    library, _ = native_build.load(_SOURCE, f"-DREAL={real}")
    if library is None:
        return None
    library.activations.argtypes, library.activations.restype = (ctypes.c_char_p,), ctypes.c_int
    return library.activations


def measure_into(row: int, x: Tensor, bins: int, low: float, high: float, near: float) -> bool:
    """Write the 4 numbers and `bins` counts of `x` to the float32 numbers at address `row`. False: C cannot read `x`."""
    real = _REAL.get(x.dtype)
    if real is None or not (type(x) is Tensor or type(x) is Parameter) or not x.is_cpu or x.is_neg():
        return False
    shape = x.shape
    dims, numel = len(shape), x.numel()
    if x.is_contiguous():
        outer, channels = shape[:2] if dims > 1 else (1, 0)
        inner = numel // (outer * channels) if channels else numel
    elif dims in _LAST and x.is_contiguous(memory_format=_LAST[dims]):
        channels, inner = shape[1], 1
        outer = numel // channels
    else:
        return False
    function, address = kernel(real), x.data_ptr()
    if function is None or address == 0 or numel > _MOST_VALUES:
        return False
    threads = 1
    if numel >= 2 * _WORTH_A_THREAD:
        threads = min(torch.get_num_threads(), numel // _WORTH_A_THREAD, _MOST_THREADS)
    if function(_ARGUMENTS.pack(outer, channels, inner, bins, threads, low, high, near, address, row)) != 0:
        raise MemoryError(f"no memory left for {bins} bins of the histogram of an output")
    return True


@torch.no_grad()
def measured(x: Tensor, bins: int, low: float, high: float, near: float) -> Tensor:
    """The same as a float32 tensor (4 + bins,) on the device of `x`, for any strided floating-point tensor."""
    x = x.detach() if x.dtype in _REAL else x.detach().float()
    mean = x.mean()
    # torch.std_mean takes fifteen times as long on the CPU
    std = torch.linalg.vector_norm(x - mean) / math.sqrt(x.numel())
    small = x.abs().lt_(near)  # 0 and 1, in the dtype of `x`
    if small.dim() > 1:
        channels = small.mean([d for d in range(small.dim()) if d != 1])
        share, dead = channels.mean(), channels.ge(_ALL).mean(dtype=small.dtype)
    else:
        share, dead = small.mean(), torch.full_like(mean, math.nan)
    stats = torch.stack([mean, std, share, dead]).float()
    return torch.cat([stats, histogram(x, bins, low, high)]) if bins else stats


def histogram(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """How many values of `x` lie in each of `bins` equal bins from `low` to `high`, the upper end included, NaN and
    what lies beyond left out: float32 (bins,), as torch.histc, in half its time on the CPU."""
    if not x.is_cpu:
        return x.histc(bins, low, high).float()  # counting integers would wait for the device
    scale = bins / (high - low)
    place = x.flatten().mul(scale).add_(1 - low * scale).clamp_(0, bins + 1).nan_to_num_(nan=0.0)
    counts = torch.bincount(place.int(), minlength=bins + 2)  # the first and the last are beyond
    counts[-2] += torch.count_nonzero(x == high)
    return counts[1:-1].float()


def first_float(value) -> Tensor | None:
    """The first floating-point tensor in an output that holds some values, or None."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.layout is torch.strided and value.numel() else None
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return None
    return next((found for v in value if (found := first_float(v)) is not None), None)
