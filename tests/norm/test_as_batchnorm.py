"""PyTorch's own tests of BatchNorm in spirit, on `recipe="batch"`, which is meant to be nn.BatchNorm in training.

Meant to differ, each with a test below: a batch of one value a channel trains; `momentum=None` is no cumulative
average; statistics stay float32 in a half-precision layer; a batch with NaN leaves the state; an empty batch counts
for nothing; the rank check comes before any other.
"""

import pytest
import torch
from norm.steps import HALF, assert_same, assert_unmoved, buffers, step
from torch import nn

from fastrbn.norm import RECIPES, RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d

PAIRS = {1: (RunningBatchNorm1d, nn.BatchNorm1d), 2: (RunningBatchNorm2d, nn.BatchNorm2d)}
PAIRS[3] = (RunningBatchNorm3d, nn.BatchNorm3d)
SHAPES = [(1, (7, 4)), (1, (5, 4, 3)), (2, (3, 4, 5, 6)), (2, (1, 4, 2, 2)), (3, (2, 4, 3, 2, 5)), (2, (6, 4, 61, 59))]


def twins(dim, recipe="batch", dtype=torch.float64, momentum=0.1, **settings):
    ours, theirs = PAIRS[dim]
    a = ours(4, recipe=recipe, dtype=dtype, momentum=momentum, **settings)
    b = theirs(4, dtype=dtype, momentum=momentum, **settings)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        p.data.normal_()
        q.data.copy_(p.data)
    return a, b


def shared(found):
    return {
        k: v for k, v in found.items() if k in ("y", "dx", "dweight", "dbias") or k.startswith(("running_", "num_b"))
    }


def assert_alike(ours, theirs, shape, tol=1e-10, steps=4, dtype=torch.float64, memory_format=torch.contiguous_format):
    for i in range(steps):
        x = (torch.randn(shape) * (i + 1) + i).to(dtype).contiguous(memory_format=memory_format)
        dy = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
        got, want = step(ours, x, dy), step(theirs, x, dy)
        assert got["y"].stride() == want["y"].stride()
        assert_same({k: got[k] for k in want}, want, tol, f"at step {i}")
    return x


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("dim", "shape"), SHAPES, ids=str)
def test_training_gives_batchnorms_outputs_gradients_and_buffers(dim, shape, affine):
    ours, theirs = twins(dim, affine=affine)
    x = assert_alike(ours, theirs, shape)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(("momentum", "eps"), [(1.0, 1e-5), (0.5, 1e-1), (0.01, 1e-12)])
def test_momentum_and_eps_have_batchnorms_meaning(momentum, eps):
    assert_alike(*twins(2, momentum=momentum, eps=eps), (3, 4, 5, 6))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_dtype_and_format_agrees_to_its_rounding(memory_format, dtype):
    ours, theirs = twins(2, dtype=torch.float32)
    tol = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert_alike(ours, theirs, (5, 4, 7, 6), tol, dtype=dtype, memory_format=memory_format)


def test_evaluation_mode_gradients_are_batchnorms():
    ours, theirs = twins(2)
    assert_alike(ours, theirs, (3, 4, 5, 6))
    before = buffers(ours)
    assert_alike(ours.eval(), theirs.eval(), (3, 4, 5, 6))
    assert_unmoved(ours, before)


def test_gradcheck_and_gradgradcheck_pass():
    ours, _ = twins(1)
    args = [torch.randn(5, 4, 2, dtype=torch.float64), ours.weight.detach().clone(), ours.bias.detach().clone()]
    args = [a.requires_grad_() for a in args]

    def f(x, weight, bias):  # its gradient does not look at the running statistics, so they may move meanwhile
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


def test_training_output_has_mean_0_and_deviation_1():
    ours, _ = twins(2, affine=False)
    y = ours(torch.randn(8, 4, 9, 9, dtype=torch.float64) * 5 + 3)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(4).double(), atol=1e-10)
    assert torch.allclose(y.var((0, 2, 3), unbiased=False), torch.ones(4).double(), atol=1e-4)


def test_running_statistics_move_by_momentum_from_mean_0_and_variance_1():
    ours, _ = twins(1, affine=False)
    x = torch.randn(10, 4, dtype=torch.float64) + 2
    ours(x)
    assert torch.allclose(ours.running_mean, 0.1 * x.mean(0))
    assert torch.allclose(ours.running_var, 0.9 + 0.1 * x.var(0))


def test_state_dicts_have_batchnorms_names_dtypes_and_defaults():
    ours, theirs = (m.state_dict() for m in twins(2, dtype=torch.float32))
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape
        if name not in ("weight", "bias"):
            assert torch.equal(ours[name], value)
    assert list(ours)[:4] == ["weight", "bias", "running_mean", "running_var"]


@pytest.mark.parametrize("dim", PAIRS)
def test_a_wrong_rank_or_channel_count_is_an_error_in_both(dim):
    ours, theirs = twins(dim, dtype=torch.float32)
    wrong_rank = torch.randn(2, 4, *[3] * (dim + 1))
    with pytest.raises(ValueError, match="got 4D|got 5D|got 6D"):
        theirs(wrong_rank)
    with pytest.raises(ValueError, match=f"got {dim + 3}d"):
        ours(wrong_rank)
    wrong_channels = torch.randn(2, 5, *[3] * dim)
    with pytest.raises(RuntimeError):
        theirs(wrong_channels)
    with pytest.raises(ValueError, match="has 4 channels"):
        ours(wrong_channels)


def test_a_large_constant_input_stays_finite_and_normalises_to_the_bias():
    ours, theirs = twins(2, dtype=torch.float32)
    x = torch.full((4, 4, 3, 3), 12345.678)
    want = theirs.bias.view(1, 4, 1, 1).expand(4, 4, 3, 3)
    assert torch.allclose(ours(x), want, atol=0.5) and torch.allclose(theirs(x), want, atol=0.5)


def test_elements_give_the_gradient_of_statistics_from_a_part_of_the_batch():
    """Batch norm whose statistics read 20 of 30 samples, against autograd on that formula."""
    ours, _ = twins(1, recipe=RECIPES["batch"].but(elements=60))
    x, dy = (torch.randn(30, 4, 3, dtype=torch.float64) for _ in range(2))
    got, z = step(ours, x, dy), x.clone().requires_grad_()
    v, m = torch.var_mean(z[:20], (0, 2), correction=0, keepdim=True)
    y = (z - m) / (v + ours.eps).sqrt() * ours.weight.view(1, 4, 1) + ours.bias.view(1, 4, 1)
    y.backward(dy)
    assert_same({k: got[k] for k in ("y", "dx")}, {"y": y, "dx": z.grad}, 1e-10)


# where we differ on purpose


def test_a_single_value_per_channel_trains_here_and_raises_there():
    ours, theirs = twins(1, dtype=torch.float32)
    x = torch.randn(1, 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        theirs(x)
    got = step(ours, x, torch.randn(1, 4))
    assert torch.allclose(got["y"], ours.bias.expand(1, 4), atol=1e-3) and got["dx"].abs().max() < 1e-2


def test_momentum_none_is_a_plain_momentum_here_and_a_cumulative_average_there():
    ours, theirs = RunningBatchNorm1d(4, momentum=None, recipe="batch"), nn.BatchNorm1d(4, momentum=None)
    x = torch.randn(8, 4)
    ours(x), theirs(x)
    assert ours.mom == 0.1 and torch.allclose(ours.running_mean, 0.1 * x.mean(0))
    assert torch.allclose(theirs.running_mean, x.mean(0))


def test_half_precision_keeps_float32_statistics_here_and_rounds_them_there():
    ours, theirs = (m.half() for m in twins(1, dtype=torch.float32))
    assert theirs.running_var.dtype == torch.float16 and ours.running_var.dtype == torch.float32


def test_a_nan_batch_leaves_the_state_here_and_not_there():
    ours, theirs = twins(1)
    x = torch.randn(5, 4, dtype=torch.float64)
    x[2, 1] = float("nan")
    before = buffers(ours)
    got, want = ours(x), theirs(x)
    assert torch.equal(got.isnan(), want.isnan()) and theirs.running_mean.isnan().any()
    assert_unmoved(ours, before)


def test_an_empty_batch_does_not_count_here():
    ours, theirs = twins(1, dtype=torch.float32)
    before = buffers(ours)
    assert ours(torch.randn(0, 4)).shape == theirs(torch.randn(0, 4)).shape == (0, 4)
    assert_unmoved(ours, before)
    assert theirs.num_batches_tracked == 1
