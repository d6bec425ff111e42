"""ActivationStats' C kernel against double precision and torch.histc: shapes, edges of bins, what it must not read."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrbn.callbacks import ActivationStats
from fastrbn.callbacks.diagnose import measure as _activations
from fastrbn.callbacks.diagnose.measure import measure_into, measured
from fastrbn.learn import Runner

pytestmark = pytest.mark.skipif(_activations.kernel("float") is None, reason="the C kernels are not to be had here")

RANGES = [(40, -5.0, 5.0), (7, 0.0, 1.0), (1, -2.0, -1.0), (16, 0.0, 6.0), (300, -0.3, 0.7)]
BLOCK = 2048


def in_c(x, bins=40, low=-5.0, high=5.0, near=0.01):
    """The row that C writes, with poison around it."""
    row = torch.full((1 + 4 + bins + 1,), -7.0)
    assert measure_into(row.data_ptr() + 4, x, bins, low, high, near)
    assert row[0] == row[-1] == -7, "it wrote beside its row"
    return row[1:-1]


def check(x, bins=40, low=-5.0, high=5.0, near=0.01):
    """Against double precision; counts against torch.histc, bin for bin."""
    row, wide, rel = in_c(x, bins, low, high, near), x.double(), 1e-5
    size = wide.abs().max().item()
    std = wide.std(correction=0).item()
    assert row[0].item() == pytest.approx(wide.mean().item(), rel=rel, abs=1e-6 * size)
    assert row[1].item() == pytest.approx(std, rel=rel, abs=1e-6 * size)
    small = x.abs() < torch.tensor(near, dtype=x.dtype)
    assert row[2].item() == pytest.approx(small.double().mean().item(), rel=1e-6)
    if x.dim() > 1:
        dead = small.movedim(1, 0).flatten(1).all(1).double().mean().item()
        assert row[3].item() == pytest.approx(dead, rel=1e-6)
    else:
        assert row[3].isnan()
    assert torch.equal(row[4:], x.histc(bins, low, high).float() if bins else row[4:])


@st.composite
def outputs(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=5))
    if draw(st.booleans()) and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([63, 64, 65, 257]))
    if math.prod(shape) > 20_000:
        shape = shape[:2]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=g, dtype=torch.float64) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    x = x + draw(st.sampled_from([0.0, 0.0, 3.0, -100.0]))
    if draw(st.booleans()):
        x = x.relu()
    if x.dim() > 1 and draw(st.booleans()):
        x[:, :: draw(st.integers(1, 3))] = 0.0  # dead channels
    x = x.to(dtype)
    if x.dim() in (4, 5) and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x


@settings(max_examples=150, deadline=None)
@given(outputs(), st.sampled_from([*RANGES, (0, -5.0, 5.0)]), st.sampled_from([0.01, 1e-12, 1.0]))
def test_its_numbers_are_those_of_double_precision_and_torchs_histogram(x, bins_and_range, near):
    check(x, *bins_and_range, near)


@settings(max_examples=50, deadline=None)
@given(outputs())
def test_its_numbers_are_those_of_the_operators(x):
    what = (40, -5.0, 5.0, 0.01)
    torch.testing.assert_close(in_c(x, *what)[:4], measured(x, *what)[:4], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("n", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_at_the_edges_of_its_blocks(n, dtype):
    x = torch.randn(n, dtype=dtype)
    check(x)
    check(x.view(1, n))
    check(x.view(n, 1))
    check(x.view(1, 1, n))


@pytest.mark.parametrize("bins, low, high", RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_at_the_edges_of_bins_and_beyond_go_where_torch_puts_them(bins, low, high, dtype):
    edges = torch.linspace(low, high, bins + 1, dtype=dtype)
    near = [torch.nextafter(edges, torch.full_like(edges, side)) for side in (-math.inf, math.inf)]
    far = torch.tensor([1e30, -1e30, 3e9, -3e9, 0.0, -0.0], dtype=dtype)
    x = torch.cat([edges, *near, far])
    assert torch.equal(in_c(x, bins, low, high)[4:], x.histc(bins, low, high).float())


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads, monkeypatch):
    monkeypatch.setattr(_activations, "_WORTH_A_THREAD", 10)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((5, 3, 65, 33), (301,), (130, 7)):
            for bins in (0, 40, 300):
                check(torch.randn(shape) + 100, bins, 97.0, 103.0)
    finally:
        torch.set_num_threads(before)


def test_a_mean_far_from_zero_does_not_spoil_the_deviation():
    x = torch.randn(64, 8, 100) * 1e-2 + 1e3
    assert in_c(x)[1].item() == pytest.approx(x.double().std(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf, math.nan]])
@pytest.mark.parametrize("at", [0, 5000])
def test_what_is_not_finite_shows_in_the_mean_and_the_histogram_is_of_the_rest(bad, at):
    x = torch.randn(2, 4, 1000)
    x.view(-1)[at : at + len(bad)] = torch.tensor(bad)
    what = (40, -5.0, 5.0, 0.01)
    row, expected = in_c(x, *what), measured(x, *what)
    assert str(row[0].item()) == str(expected[0].item()) and row[1].isnan()
    torch.testing.assert_close(row[2:4], expected[2:4])
    assert torch.equal(row[4:], x.nan_to_num(99, 99, 99).histc(40, -5, 5))


class Answers(torch.Tensor):
    """A subclass, which may not hold what its memory does."""


def test_what_is_no_plain_memory_is_left_to_the_operators():
    x, row = torch.randn(4, 6, 5), torch.zeros(8)
    others = [x[:, ::2], x.transpose(0, 1), x[:1].expand(3, 6, 5), x.half(), x.bfloat16(), torch._neg_view(x)]
    others += [x.as_subclass(Answers), torch._efficientzerotensor((4, 3)), torch.ones(3, device="meta")]
    for other in others:
        assert not measure_into(row.data_ptr(), other, 4, 0.0, 1.0, 0.01)
    assert not row.any()


def test_modules_that_c_reads_and_others_share_a_row(make_learn):
    class Half(torch.nn.Module):
        def forward(self, x):
            return x.half()

    class Full(torch.nn.Module):
        def forward(self, x):
            return x.float()

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), Half(), Full(), torch.nn.Linear(8, 3))
    run = Runner([ActivationStats(["3", "1", "0"])])
    run.fit(1, make_learn(model=model))
    stats = run.activation_stats
    assert stats.means.shape == (4, 3) and stats.means.isfinite().all()
    torch.testing.assert_close(stats.means[:, 1], stats.means[:, 2], atol=1e-3, rtol=0)
    assert (stats.hists[:, :2].sum(-1) == torch.tensor([18.0, 48.0])).all()


def test_a_default_dtype_or_an_interrupt_leaves_the_rows_whole(make_learn):
    class Ends(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return x

    torch.set_default_dtype(torch.float64)
    try:
        learn = make_learn(model=torch.nn.Sequential(torch.nn.Linear(4, 3), Ends(), torch.nn.Tanh()))
        run = Runner([ActivationStats])
        run.fit(1, learn)
    finally:
        torch.set_default_dtype(torch.float32)
    stats = run.activation_stats
    assert "KeyboardInterrupt" in run.stop_reason or "interrupt" in run.stop_reason.lower()
    assert stats.steps == [0, 1] and stats.means.shape == (2, 3) and stats.means.isfinite().all()
