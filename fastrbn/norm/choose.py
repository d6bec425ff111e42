"""The choice of a backend for a layer's step, with its reason in words.

A backend is a module with the functions `normalize(x, weight, bias, state, plan)` and `evaluate(x, weight, bias, state,
eps)` of `reference.py`. To add one, list it in `_BACKENDS` and, where it is faster, in `choose`. The Triton backend is
imported only when it is chosen.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastrbn.util import one_of

from . import fused, native, reference
from .recipes import Recipe
from .reference import NormState

_BACKENDS: dict[str, ModuleType | None] = {"reference": reference, "fused": fused, "native": native, "triton": None}
BACKENDS = ("auto", *_BACKENDS)
# whether "auto" uses the Triton kernels for CUDA tensors; off until they are measured to be faster on a device
_TRITON_BY_DEFAULT = False


class Choice(NamedTuple):
    """A backend's name and the reason for its choice, in words."""

    name: str
    why: str


def implementation(name: str) -> Any:
    """The module of a backend, by name."""
    if _BACKENDS[name] is None:
        from . import triton_kernels

        _BACKENDS[name] = triton_kernels
    return _BACKENDS[name]


def choose(
    x: Tensor,
    state: NormState,
    weight: Tensor | None,
    bias: Tensor | None,
    recipe: Recipe | None,
    process_group: Any = None,
    backend: str = "auto",
) -> Choice:
    """Choose the backend for a training step of `recipe` on `x`, or for evaluation if `recipe` is None.

    Raises ValueError if `backend` is unknown or cannot be used here.
    """
    one_of("backend", backend, BACKENDS)
    why_not = None
    if torch.compiler.is_compiling():
        why_not = "torch.compile fuses the plain formulas by itself"
    elif x.is_meta or isinstance(x, FakeTensor):
        why_not = "a tensor without values needs the plain formulas"
    elif torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        why_not = "torch.func and forward-mode derivatives need the plain formulas"
    elif get_proxy_mode() is not None:
        why_not = "make_fx records the plain formulas"
    elif recipe is not None and torch.jit.is_tracing():
        why_not = "torch.jit.trace records the plain formulas"
    elif recipe is not None and recipe.plain_only:
        why_not = f"only the plain formulas implement the recipe '{recipe.name}'"
    elif process_group is not None:
        why_not = "statistics are merged over a process group"
    elif x.dtype is not (wide := state.running_mean.dtype) and (wide is torch.float64 or x.dtype is torch.float64):
        why_not = f"{x.dtype} input in a layer with {wide} statistics is computed in the wider one"
    if backend == "triton" and why_not is None:
        why_not = _why_not_triton(x, state)
    if backend == "native" and why_not is None:
        why_not = native.why_not(x, weight, bias, state)
    if backend not in ("auto", "reference") and why_not is not None:
        raise ValueError(f"backend '{backend}' cannot be used here: {why_not}; choose 'auto' or 'reference'")
    if backend != "auto":
        return Choice(backend, "requested by name")
    if why_not:
        return Choice("reference", why_not)
    if torch._C._len_torch_dispatch_stack():
        why_not = "a TorchDispatchMode cannot see a call into C"
    elif x.is_cpu and not torch.jit.is_tracing() and (why_not := native.why_not(x, weight, bias, state)) is None:
        return Choice("native", "C kernels, one call forward and one backward")
    why = "PyTorch's fused operators and a closed-form backward"
    if why_not:
        why = f"{why}; not the C kernels: {why_not}"
    if _TRITON_BY_DEFAULT and x.device.type == "cuda":
        if (why_not := _why_not_triton(x, state)) is None:
            return Choice("triton", "Triton kernels for CUDA tensors")
        why = f"{why}; not Triton's kernels: {why_not}"
    return Choice("fused", why)


def _why_not_triton(x: Tensor, state: NormState) -> str | None:
    if state.running_mean.dtype is not torch.float32 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return (
            f"it takes float32, bfloat16 or float16 input and float32 statistics; got {x.dtype} and "
            f"{state.running_mean.dtype}"
        )
    if not _has_triton():
        return "the package triton is not installed"
    if x.device.type == "cuda" or (x.device.type == "cpu" and implementation("triton").INTERPRETED):
        return None
    return f"it takes CUDA tensors, or CPU tensors if Python was started with TRITON_INTERPRET=1; got one on {x.device}"


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None
