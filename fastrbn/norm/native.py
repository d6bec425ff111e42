"""The reference's step in C, one call forward and one backward, for CPU tensors of the statistics' dtype.

`native_kernels.c` has the arithmetic; `fastrbn/native/` compiles it on first use. This module checks whether C can be
used, packs its arguments and connects it to autograd. Evaluation and forwards that checkpointing runs again go to
`fused`, second derivatives to `reference`.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastrbn import native

from . import fused, reference
from .recipes import Plan, Recipe
from .reference import NormState, elements_per_sample
from .replay import Step, is_batched, moving, running_again

_SOURCE = Path(__file__).with_name("native_kernels.c")
_REAL = {torch.float32: "float", torch.float64: "double"}
_FEW_POSITIONS = 64  # with fewer elements per channel and sample, sums run over columns instead of along rows
_WORTH_A_THREAD = 1 << 16  # elements
_MOST_THREADS = 64
# the structs of native_kernels.c: layout, then numbers, then pointers
_FORWARD = Struct("7q 2q 5d 10P")
_BACKWARD = Struct("7q q d 9P")
_SAVED = 5  # rows of one value per channel: 1/σ and the step's m, v, mean and variance; four numbers follow

evaluate = fused.evaluate


@lru_cache(maxsize=2)
def load(real: str) -> tuple[ctypes.CDLL | None, str]:
    """The kernels for `real` ("float" or "double") and "", or None and the reason in words."""
    library, why = native.load(_SOURCE, f"-DREAL={real}")
    if library is not None:
        for function in (library.rbn_forward, library.rbn_backward):
            function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int
    return library, why


def why_not(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState) -> str | None:
    """The reason why these tensors cannot go to C, or None. C reads raw memory, so every tensor is checked."""
    real, mean = x.dtype, state.running_mean
    if not x.is_cpu or real not in _REAL:
        return f"the C kernels take float32 and float64 tensors on the CPU; got {real} on {x.device}"
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ or _is_lazy(x):
        return f"the values of this {type(x).__name__} are not those in its memory"
    c = x.shape[1]
    for t, numel in zip(state, (c, c, 1, 1, 1, 2 * c, 1), strict=True):
        if not (t.is_cpu and t.is_contiguous() and t.numel() == numel):
            return "a tensor of the state is not contiguous, not on the CPU, or of the wrong size"
    if mean.dtype is not real or state.running_var.dtype is not real or state.running_count.dtype is not real:
        return f"the C kernels take input of the statistics' dtype; got {real} and {mean.dtype}"
    if state.running_grad.dtype is not real or state.running_grad_weight.dtype is not real:
        return "the state has more than one floating dtype"
    if state.num_samples_tracked.dtype is not torch.int64 or state.num_batches_tracked.dtype is not torch.int64:
        return "the state's counts are not int64"
    for p in (weight, bias):
        if p is not None and not (p.is_cpu and p.dtype is real and p.numel() == c and p.is_contiguous()):
            return f"weight or bias is not a contiguous CPU tensor of {c} values of {real}"
    return load(_REAL[real])[1] or None


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: NormState, plan: Plan) -> Tensor:
    """Same as `reference.normalize`, for tensors that `why_not` allows."""
    if plan.recent and running_again():
        return fused.normalize(x, weight, bias, state, plan)
    if not x.is_contiguous() and not x.movedim(1, -1).is_contiguous():
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if x.stride(1) == 1 else x.contiguous()
    return _Normalize.apply(x, weight, bias, state, plan)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, plan):
        recipe, eps = plan.recipe, plan.eps
        bs, c = x.shape[:2]
        layout = _layout(x, recipe)
        y, saved = torch.empty_like(x), torch.empty(_SAVED * c + 4, dtype=x.dtype)
        floor, young = (0.0, 0) if recipe.clamp is None else (recipe.clamp.floor(eps), recipe.clamp.samples)
        with moving(state):
            rate, start = recipe.rates(plan.mom, bs, state.num_samples_tracked.item())
            arguments = _FORWARD.pack(
                *layout, bs, _threads(x), rate, start, eps, floor, young,
                x.data_ptr(), y.data_ptr(), _pointer(weight), _pointer(bias),
                state[0].data_ptr(), state[1].data_ptr(), state[2].data_ptr(), state[3].data_ptr(), state[4].data_ptr(),
                saved.data_ptr(),
            )  # fmt: skip
            _call("rbn_forward", x, arguments)
        increment_version(state[:5])  # autograd cannot see writes in C; graphs that saved the state are stale now
        if plan.twice:
            plan.recent.append(_step(saved, c, rate, recipe))
        ctx.save_for_backward(x, weight, bias)
        ctx.saved, ctx.layout, ctx.rate, ctx.state, ctx.plan = saved, layout, rate, state, plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(dy):
            step = _step(ctx.saved, x.shape[1], ctx.rate, ctx.plan.recipe)
            return *reference.gradients(x, weight, bias, dy, step, ctx.state, ctx.plan), None, None
        state, c = ctx.state, x.shape[1]
        if dy.stride() != x.stride() or _is_lazy(dy):
            dy = torch.empty_like(x).copy_(dy)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # two tensors instead of two views of one: autograd would copy views, and uses these as they are
        d_weight, d_bias = torch.empty(c, dtype=x.dtype), torch.empty(c, dtype=x.dtype)
        arguments = _BACKWARD.pack(
            *ctx.layout, _threads(x), ctx.rate,
            dy.data_ptr(), x.data_ptr(), _pointer(dx), _pointer(weight), ctx.saved.data_ptr(),
            d_weight.data_ptr(), d_bias.data_ptr(), state[5].data_ptr(), state[6].data_ptr(),
        )  # fmt: skip
        with moving(state):
            _call("rbn_backward", x, arguments)
        if dx is not None:
            increment_version(state[5:])
        return dx, None if weight is None else d_weight, None if bias is None else d_bias, None, None


def _layout(x: Tensor, recipe: Recipe) -> tuple[int, ...]:
    """The fields of the struct Layout in native_kernels.c."""
    bs, c = x.shape[:2]
    positions = elements_per_sample(x)
    k = recipe.samples_read(bs, positions)
    every = bs // k if recipe.order == "strided" else 1
    if not x.is_contiguous():
        return bs * positions, c, 1, 1, positions, k, every
    few = positions < _FEW_POSITIONS
    return bs, c, positions, few, int(few), k, every


def _threads(x: Tensor) -> int:
    numel = x.numel()
    return 1 if numel < 2 * _WORTH_A_THREAD else min(torch.get_num_threads(), numel // _WORTH_A_THREAD, _MOST_THREADS)


def _is_lazy(t: Tensor) -> bool:
    """True if memory does not hold the tensor's values: a negation is pending, or it is a zero tensor."""
    return t.is_neg() or t._is_zerotensor()


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _call(name: str, x: Tensor, arguments: bytes) -> None:
    if getattr(load(_REAL[x.dtype])[0], name)(arguments) != 0:
        raise MemoryError(f"out of memory for the sums of a batch of shape {tuple(x.shape)}")


def _step(saved: Tensor, c: int, rate: float, recipe: Recipe) -> Step:
    """The step as `reference.py` knows it, from what C saved."""
    m, v, mean, var = (row.clone() for row in saved[: _SAVED * c].view(_SAVED, c)[1:])
    share, own, moves, young = (number.clone() for number in saved[_SAVED * c :])
    young = None if recipe.clamp is None else young != 0
    return Step(m, v, mean, var, saved.new_tensor(rate), share, own, moves != 0, young)
