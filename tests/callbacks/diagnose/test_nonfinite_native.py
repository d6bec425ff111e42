"""HaltOnNaN's C kernels: sizes at the edges of their loops, what they must not read, and memory that moves."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastrbn.callbacks.diagnose.nonfinite import native as _nonfinite_native
from fastrbn.callbacks.diagnose.nonfinite.native import known_finite
from fastrbn.callbacks.diagnose.nonfinite.state import KeptState

pytestmark = pytest.mark.skipif(_nonfinite_native.kernels() is None, reason="the C kernels are not to be had here")

BADS = [math.nan, math.inf, -math.inf]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 8191, 8192, 8193, 16500])
def test_one_bad_value_anywhere_is_seen(n, dtype):
    x = torch.randn(n).to(dtype)
    assert known_finite([x]) and known_finite([x, x])
    for at in {0, n // 2, n - 1}:
        for bad in BADS:
            y = x.clone()
            y[at] = bad
            assert not known_finite([y]) and not known_finite([x, y, x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_finite_values_are_finite(dtype):
    assert known_finite([torch.full((300,), torch.finfo(dtype).max, dtype=dtype)])


def test_channels_last_is_read_where_it_lies():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert known_finite([x])
    x[1, 2, 3, 4] = math.nan
    assert not known_finite([x])


class Answers(torch.Tensor):
    """A subclass, which may not hold what its memory does."""


UNKNOWN = {
    "integers": torch.ones(3, dtype=torch.int64),
    "complex": torch.ones(3, dtype=torch.complex64),
    "gaps": torch.ones(4, 6)[:, ::2],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "sparse": torch.eye(3).to_sparse(),
    "no memory": torch._efficientzerotensor((3,), dtype=torch.float32),
    "meta": torch.ones(3, device="meta"),
    "subclass": torch.ones(3).as_subclass(Answers),
    "empty": torch.ones(0),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_plain_memory_is_a_doubt(name):
    assert known_finite([torch.ones(3), UNKNOWN[name]]) is False


class Net(nn.Module):
    """Parameters and buffers of several sizes and dtypes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.wide = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.pair = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.register_buffer("flag", torch.tensor([True, False, True]))
        self.register_buffer("small", torch.tensor([1, -3], dtype=torch.int16))


def kept_of(model, opt=None):
    kept = KeptState(model, opt)
    kept.save()
    assert kept._layout.native
    return kept


def step(model, opt, scale=1.0):
    for p in model.parameters():
        p.grad = torch.randn_like(p) * scale
    opt.step()
    model.norm.running_mean.add_(1)
    model.norm.num_batches_tracked.add_(1)
    model.flag.logical_not_()
    model.small.mul_(2)


def whole(model, opt):
    states = {f"{i} {k}": v for i, s in enumerate(opt.state.values()) for k, v in s.items()}
    return copy.deepcopy({**model.state_dict(), **states})


def check(model, opt, expected):
    now = whole(model, opt)
    assert list(now) == list(expected)
    for name, value in expected.items():
        assert torch.equal(now[name], value), name


@pytest.mark.parametrize("threads", [1, 3])
def test_c_keeps_what_operators_keep_and_tells_the_same_norm(threads, monkeypatch):
    monkeypatch.setattr(_nonfinite_native, "_PIECE", 2**22 if threads == 1 else 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = Net()
        opt = torch.optim.Adam(model.parameters(), lr=0.1)
        kept = kept_of(model, opt)
        for _ in range(4):
            step(model, opt)
            assert kept.advance() == []
            params = torch.cat(
                [torch.view_as_real(p).flatten() if p.is_complex() else p.flatten() for p in model.parameters()]
            )
            assert kept.norm == pytest.approx(params.double().norm().item(), rel=1e-6)
        expected = whole(model, opt)
        step(model, opt)
        with torch.no_grad():
            model.wide[3] = math.nan
        assert kept.advance() == ["wide"]
        kept.restore()
        check(model, opt, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", BADS)
def test_a_bad_value_in_any_tensor_is_named_and_what_is_kept_stays(bad):
    model = Net()
    kept, expected = kept_of(model), copy.deepcopy(model.state_dict())
    named = [(n, t) for n, t in model.state_dict().items() if t.is_floating_point() or t.is_complex()]
    assert len(named) == 8
    for name, t in named:
        with torch.no_grad():
            for other in model.parameters():
                other.mul_(2)  # a copy made all the same would show
            t.flatten()[-1:].fill_(bad) if t.is_contiguous() else t.select(0, 0).fill_(bad)
        assert kept.advance() == [name]
        kept.restore()
        for n, value in expected.items():
            assert torch.equal(model.state_dict()[n], value), (name, n)


def _new_data(model):
    model.conv.weight.data = torch.randn(5, 3, 3, 3)


def _set_storage(model):
    with torch.no_grad():
        model.conv.bias.set_(torch.randn(5))


def _new_buffer(model):
    model.norm.running_mean = torch.randn(5)


def _other_size(model):
    model.wide.data = torch.randn(70, dtype=torch.float64)


def _double(model):
    model.double()


def _no_statistics(model):
    model.norm.running_var = None


MOVES = [_new_data, _set_storage, _new_buffer, _other_size, _double, _no_statistics]


@pytest.mark.parametrize("move", MOVES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [False, True])
def test_memory_that_moves_between_two_looks_is_followed(move, bad):
    model = Net()
    kept = kept_of(model)
    assert kept.advance() == []
    move(model)
    assert kept.advance() == []
    expected = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for t in model.parameters():
            t.mul_(3)
        model.conv.weight[0, 0, 0, 0] = math.nan if bad else 1.0
    assert kept.advance() == (["conv.weight"] if bad else [])
    expected = expected if bad else copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for t in model.parameters():
            t.mul_(5)
    kept.restore()
    assert list(model.state_dict()) == list(expected)
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_buffer_that_is_replaced_in_each_step_keeps_one_copy():
    model = Net()
    kept = kept_of(model)
    copies = kept._saved[1]
    for i in range(50):
        model.norm.running_mean = model.norm.running_mean + i
        assert kept.advance() == []
        assert kept._saved[1] is copies
    assert torch.equal(dict(kept._saved[0].values(copies))["buffer", "norm.running_mean"], model.norm.running_mean)


def test_large_numbers_whose_squares_overflow_are_kept():
    model = Net()
    kept = kept_of(model)
    with torch.no_grad():
        model.wide.fill_(1e200)
        model.conv.bias.fill_(1e30)
    assert kept.advance() == [] and kept.norm == math.inf
    with torch.no_grad():
        model.wide.zero_()
    kept.restore()
    assert (model.wide == 1e200).all()
    with torch.no_grad():
        model.wide.zero_()
    assert kept.advance() == [] and kept.norm == pytest.approx(math.sqrt(5) * 1e30)


def test_tensors_that_c_cannot_read_are_left_to_the_operators():
    for spoil in (
        lambda m: m.wide.data.half(),
        lambda m: torch._neg_view(torch.ones(3)),
        lambda m: torch.ones(4, 4)[::2],
    ):
        model = Net()
        model.register_buffer("odd", torch.zeros(1))
        model.odd = spoil(model)
        kept = KeptState(model, None)
        kept.save()
        assert not kept._layout.native
        expected = model.odd.clone()
        model.odd.zero_()
        kept.restore()
        assert torch.equal(model.odd, expected)


def test_without_a_compiler_halts_are_the_same(tmp_path):
    code = """if True:
        import warnings, torch; warnings.simplefilter("error")
        from types import SimpleNamespace
        from fastrbn import HaltOnNaN, ActivationStats, Learner, Runner
        from fastrbn.callbacks.diagnose import measure as _activations
        from fastrbn.callbacks.diagnose.nonfinite import native as _nonfinite_native
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        batches = [(torch.randn(2, 4) / (i != 3), torch.zeros(2, dtype=torch.int64)) for i in range(6)]
        data = SimpleNamespace(train_dl=batches, valid_dl=None)
        learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.cross_entropy, data)
        run = Runner([HaltOnNaN(), ActivationStats()])
        run.fit(1, learn)
        print(_nonfinite_native.kernels(), _activations.kernel("float"), run.stop_reason, len(run.activation_stats.means))
    """
    env = {**os.environ, "PATH": str(tmp_path), "CC": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("None None NaN or Inf in the forward pass of step 3")
    assert "first in the input" in done.stdout
