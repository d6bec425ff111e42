"""Which implementation computes a layer's step, and the functional form that users call.

Every backend is a module with `normalize(x, weight, bias, state, plan)` and `evaluate(x, weight, bias, state, eps)`
as in `reference.py`. A new one is added to `_BACKENDS` and, when it is faster somewhere, to `choose`. Triton's is
imported when it is chosen, and not before.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import Module

from . import fused, native, reference
from .memory import may_run_again
from .recipes import Plan, Recipe, get_recipe, one_of
from .reference import NormState

_BACKENDS = {"reference": reference, "fused": fused, "native": native, "triton": None}
BACKENDS = ("auto", *_BACKENDS)
# "auto" takes the Triton kernels for CUDA tensors: to be switched on once they are measured to be faster on a device
_TRITON_BY_DEFAULT = False


def choose(
    x: Tensor,
    state: NormState,
    process_group=None,
    backend: str = "auto",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[str, str]:
    """The backend for `x`, and why, in words. Raises ValueError for an unknown name, or one that cannot serve."""
    one_of("backend", backend, BACKENDS)
    why_not = None
    if torch.compiler.is_compiling():
        why_not = "torch.compile fuses the plain formulas itself"
    elif x.is_meta or isinstance(x, FakeTensor):
        why_not = "a tensor without values has only the plain formulas"
    elif torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        why_not = "torch.func and forward-mode derivatives look into the plain formulas"
    elif get_proxy_mode() is not None:
        why_not = "make_fx records the plain formulas"
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
        return backend, "asked for by name"
    if why_not:
        return "reference", why_not
    if torch._C._len_torch_dispatch_stack():
        why_not = "a TorchDispatchMode sees no call of C"
    elif x.is_cpu and not torch.jit.is_tracing() and (why_not := native.why_not(x, weight, bias, state)) is None:
        return "native", "C kernels, one call forward and one backward"
    why = "PyTorch's fused operators and a backward in closed form"
    if why_not:
        why = f"{why}; not the C kernels: {why_not}"
    if _TRITON_BY_DEFAULT and x.device.type == "cuda":
        if (why_not := _why_not_triton(x, state)) is None:
            return "triton", "its kernels for CUDA tensors"
        why = f"{why}; not Triton's kernels: {why_not}"
    return "fused", why


def _why_not_triton(x: Tensor, state: NormState) -> str | None:
    if state.running_mean.dtype is not torch.float32 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return (
            f"it takes float32, bfloat16 and float16 input and float32 statistics, and got {x.dtype} and "
            f"{state.running_mean.dtype}"
        )
    if not _has_triton():
        return "the package triton is not installed"
    if x.device.type == "cuda" or (x.device.type == "cpu" and _implementation("triton").INTERPRETED):
        return None
    return f"it takes CUDA tensors, or CPU ones in a Python started with TRITON_INTERPRET=1; this one is on {x.device}"


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _implementation(name: str):
    if _BACKENDS[name] is None:
        from . import triton_kernels

        _BACKENDS[name] = triton_kernels
    return _BACKENDS[name]


def running_batch_norm(
    x: Tensor,
    state: NormState,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    mom: float = 0.1,
    eps: float = 1e-5,
    recipe: str | Recipe = "default",
    process_group=None,
    backend: str = "auto",
    recent: deque | None = None,
) -> Tensor:
    """Running batch norm as a function of its state.

    - `x`: (N, C, *), any floating dtype; the result has its shape, dtype and memory format.
    - `state`: `NormState.new(C)`; moved in place when `training`, read otherwise. It never holds a graph.
    - `weight`, `bias`: γ and β, (C,) or None.
    - `mom`, `recipe`: see `Recipe`. `eps`: added to the variance.
    - `process_group`: statistics are those of all its ranks' batches together; every rank must call.
    - `recent`: a deque that belongs to the state (`deque(maxlen=32)`), needed under activation checkpointing alone.

    An empty batch passes through and leaves the state alone. Raises ValueError for a wrong rank, channel count or
    dtype, and for a weight or bias of another size.
    """
    nf = state.running_mean.numel()
    check_input(x, nf)
    _check_parameters(nf, weight, bias)
    recipe = get_recipe(recipe)
    # torch.jit.trace would take what fused reads on the host for constants
    recorded = training and torch.jit.is_tracing()
    name = "reference" if recorded else choose(x, state, process_group, backend, weight, bias)[0]
    implementation = _implementation(name)
    if not training or (x.numel() == 0 and process_group is None):
        return implementation.evaluate(x, weight, bias, state, eps)
    twice = recent is not None and may_run_again()
    plan = Plan(recipe, mom, eps, process_group, recent, twice)
    return implementation.normalize(x, weight, bias, state, plan)


def check_input(x: Tensor, num_features: int, ranks: tuple[int, ...] = (), name: str = "running_batch_norm") -> None:
    """Raise ValueError unless x is floating, (N, C, *) with `num_features` channels and one of `ranks` (none: any)."""
    if torch.jit.is_tracing():  # sizes are tensors to a tracer, which must not become Python's
        return
    if ranks and x.dim() not in ranks or x.dim() < 2:
        rule = " or ".join(f"{r}d" for r in ranks) if ranks else "(N, C, *), at least 2d,"
        raise ValueError(f"{name} needs {rule} input; got {x.dim()}d of shape {tuple(x.shape)}: {_advice(x, ranks)}")
    if x.shape[1] != num_features:
        raise ValueError(
            f"{name} has {num_features} channels, so dimension 1 of its input must be {num_features}; got shape "
            f"{tuple(x.shape)}: build the layer with num_features={x.shape[1]} or permute the input to (N, C, *)"
        )
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} needs floating-point input; got {x.dtype}: convert it, as with x.float()")


def as_leaf(layer: Module, x: Proxy) -> Proxy:
    """A call of the layer in the graph that torch.fx is recording: a leaf, as the layers of torch.nn are."""
    path = x.tracer.path_of_module(layer)
    if not path:
        raise ValueError(
            f"torch.fx records a {type(layer).__name__} as one call of a module that holds it; got the layer alone: "
            "trace nn.Sequential(layer)"
        )
    return x.tracer.create_proxy("call_module", path, (x,), {})


def _check_parameters(nf: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """PyTorch's operators read a bias of any size, beyond its end too."""
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and not torch.jit.is_tracing() and p.numel() != nf:
            raise ValueError(f"{name} must have one number for each of {nf} channels; got shape {tuple(p.shape)}")


def _advice(x: Tensor, ranks: tuple[int, ...]) -> str:
    if x.dim() < 2 or (ranks and x.dim() < min(ranks)):
        return "add the missing dimensions, as with x[None] for the batch's"
    return "RunningBatchNorm takes any rank, RunningBatchNorm1d, 2d and 3d the ranks of nn.BatchNorm1d, 2d and 3d"
