"""The Triton backend where there is no GPU: its kernels compile, and equal the reference under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrbn.norm import RECIPES, NormState, RunningBatchNorm
from fastrbn.norm.recipes import Plan, rate_course

triton = pytest.importorskip("triton", reason="the package triton is not installed")

from fastrbn.norm import triton_kernels as kernels  # noqa: E402

DEFAULT = RECIPES["default"]
pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter serves the CPU")


class _NoDevice:
    """As much of a driver as compiling for an H100 or H200 takes."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are run")
def test_every_kernel_compiles_for_a_device(monkeypatch, tmp_path):
    made = {}

    def compile_only(kernel, grid):
        def launch(*args, **options):
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            made.setdefault(kernel.__name__, []).append("cubin" in compiled.asm)

        return launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", _NoDevice())
    for shape, last, recipe, dtype in [
        ((8, 16, 24, 24), False, DEFAULT.but(elements=600, order="strided"), torch.bfloat16),
        ((64, 64, 24, 24), True, DEFAULT.but(rate=rate_course), torch.float16),
    ]:
        x, w = torch.zeros(shape, dtype=dtype), torch.ones(shape[1], requires_grad=True)
        x = (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).requires_grad_()
        y = kernels.normalize(x, w, w, NormState.new(shape[1]), Plan(recipe, 0.1, 1e-5))
        y.backward(torch.zeros_like(y))
    names = ("statistics", "advance", "map", "sums", "settle", "dx")
    assert made == {f"{name}_kernel": [True, True] for name in names}


def test_cpu_tensors_need_the_interpreter():
    layer = RunningBatchNorm(3, recipe=DEFAULT, backend="triton")
    with pytest.raises(
        ValueError, match="'triton' cannot be used here: it takes CUDA .*TRITON_INTERPRET=1.*on cpu; choose"
    ):
        layer(torch.randn(2, 3))
    with pytest.raises(ValueError, match="got torch.float64 and torch.float64; choose 'auto'"):
        RunningBatchNorm(3, recipe=DEFAULT, dtype=torch.float64, backend="triton")(torch.randn(2, 3).double())


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0" and triton.__version__ < "3.7",
    reason="this Triton's interpreter fails under this NumPy",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are run")
def test_the_kernels_equal_the_reference_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("test_triton.py")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
