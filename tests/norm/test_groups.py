"""Several processes: one test per check of `ranks.py`, with two and with three gloo processes."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from norm.ranks import CHECKS
from norm.steps import ALL, assert_same, layer_of, step
from processes import run_ranks

from fastrbn.norm.groups import merge_over_ranks, sum_over_ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
TIMEOUT = 600


def results_of(world, folder):
    """The results of the checks in `ranks.py`, by rank."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return run_ranks(folder, world, "norm.ranks", env=env, timeout=TIMEOUT)


@pytest.fixture(scope="module", params=[2, 3], ids=["two ranks", "three ranks"])
def ranks(request, tmp_path_factory):
    return results_of(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [f.__name__ for f in CHECKS])
def test_ranks(ranks, name):
    results, errors = ranks
    for rank, (found, error) in enumerate(zip(results, errors, strict=True)):
        assert name in found, f"rank {rank} did not come to an end: hung, or a check before failed\n{error}"
        assert found[name] == "", f"rank {rank}: {found[name]}"


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ALL)
def test_a_group_of_one_is_the_layer_alone(alone, backend):
    a, b = layer_of(process_group=alone, dtype=torch.float64), layer_of(backend=backend, dtype=torch.float64)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        x, dy = (torch.randn(5, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
        assert_same(step(a, x, dy), step(b, x, dy), 1e-10)


def test_merging_reports_numbers_as_tensors_and_is_differentiable(alone):
    m, v = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var, n, bs = merge_over_ranks(m, v, 6, 2, alone)
    assert n.shape == bs.shape == () and (n, bs) == (6, 2)
    assert torch.autograd.gradcheck(lambda m, v: merge_over_ranks(m, v, 6, 2, alone)[:2], (m, v))
    sums, n = sum_over_ranks(torch.ones(2, 3), 5, alone)
    assert torch.equal(sums, torch.ones(2, 3)) and n == 5
