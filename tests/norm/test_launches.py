"""Kernels that a training step launches on CUDA, counted without a device; docs/layer-details.md has the table."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrbn.norm import RECIPES, NormState, fused
from fastrbn.norm.recipes import Plan

calls = []  # name and arguments of each launch


class Operators(TorchDispatchMode):
    """Appends to `calls` the operators that launch kernels on CUDA: all but views and allocations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if not func.is_view and name not in ("empty", "empty_like", "new_empty"):
            calls.append((name, args))
        return func(*args, **(kwargs or {}))


def launches(backend, affine=True, dtype=torch.float32, last=False, transposed=False):
    """Names of what a forward and a backward pass of the default recipe launch."""
    x, dy = torch.randn(2, 2, 8, 14, 14).to(dtype)
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    if transposed:
        dy = dy.mT.contiguous().mT
    wanted = [x.requires_grad_(), *(torch.ones(8, requires_grad=True) for _ in range(2 * affine))]
    weight, bias = wanted[1:] or (None, None)
    state, plan = NormState.new(8), Plan(RECIPES["default"], 0.1, 1e-5)
    calls.clear()
    with Operators():
        y = backend.normalize(x, weight, bias, state, plan)
        forward = len(calls)
        torch.autograd.grad(y, wanted, dy)
    names = [name for name, _ in calls]
    return names[:forward], names[forward:]


@pytest.fixture
def triton_backend(monkeypatch):
    """The Triton backend with kernels that are counted instead of run."""
    triton = pytest.importorskip("triton", reason="the package triton is not installed")
    from fastrbn.norm import triton_kernels

    if triton_kernels.INTERPRETED:
        pytest.skip("under the interpreter nothing is launched")
    launch = lambda kernel, grid: lambda *args, **options: calls.append((kernel.__name__, args))  # noqa: E731
    monkeypatch.setattr(triton.JITFunction, "__getitem__", launch)
    return triton_kernels


FORWARD, BACKWARD = ["statistics_kernel", "advance_kernel", "map_kernel"], ["sums_kernel", "settle_kernel", "dx_kernel"]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_triton_launches_three_kernels_each_way_and_no_operator(triton_backend, affine, dtype, last):
    assert launches(triton_backend, affine, dtype, last) == (FORWARD, BACKWARD)


def test_triton_copies_a_gradient_in_another_layout_than_the_input(triton_backend):
    assert launches(triton_backend, transposed=True) == (FORWARD, ["copy_", *BACKWARD])


@pytest.fixture
def cuda_fused(monkeypatch):
    """The fused backend with CUDA's way to the statistics."""

    def statistics(x, recipe, dtype):
        return *torch.batch_norm_update_stats(x, None, None, 0.0), x.numel() // x.shape[1]

    monkeypatch.setattr(fused, "statistics", statistics)
    return fused


def test_fused_launches_no_more_operators_than_the_documentation_says(cuda_fused):
    forward, backward = launches(cuda_fused)
    assert len(forward) <= 47 and len(backward) <= 44


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_fused_gives_the_backward_operator_every_tensor_that_cuda_needs(cuda_fused, affine):
    """On CUDA the operator fails without a weight or saved statistics, which the CPU's does not read."""
    launches(cuda_fused, affine)
    [args] = [args for name, args in calls if name == "native_batch_norm_backward"]
    assert all(t is not None and t.dtype is torch.float32 for t in args[:7])
