"""The C kernels: sizes at the edges of their loops, guesses that mislead them, and machines that cannot build them."""

import os
import warnings

import pytest
import torch
from norm.steps import assert_same, layer_of, step

from fastrbn import native as build
from fastrbn.norm import RECIPES, NormState, RunningBatchNorm, native, running_batch_norm

pytestmark = pytest.mark.skipif(native.load("float")[0] is None, reason=native.load("float")[1] or "built")

# around 64 positions (rows or columns), 4 rows at a time, blocks of 128 rows and of 4096 positions
SHAPES = [(5, 3, 63), (5, 3, 64), (37, 3, 65), (1, 2, 4097), (2, 2, 8200), (131, 3, 2), (258, 5), (3, 1, 1), (1, 1, 64)]
SHAPES += [(129, 2, 7, 9), (6, 5, 13, 5), (2, 3, 2, 5, 7), (7, 33, 1, 1), (130, 1, 3)]
ORACLES = {torch.float64: 1e-10, torch.float32: 2e-5}


def data(shape, dtype=torch.float32, last=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    pair = [(2 * x + 3).to(dtype), (dy + 0.3 * x + 0.2).to(dtype)]
    return [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in pair] if last else pair


def assert_native_is_reference(shape, dtype=torch.float32, last=False, steps=3, **settings):
    nf = shape[1]
    wide = layer_of(nf, backend="reference", dtype=torch.float64, **settings)
    ours = layer_of(nf, backend="native", dtype=dtype, **settings)
    for i in range(steps):
        x, dy = data(shape, dtype, last, seed=i)
        want, got = step(wide, x.double(), dy.double()), step(ours, x, dy)
        assert got["y"].stride() == got["dx"].stride() == x.stride()
        assert_same(got, want, ORACLES[dtype], f"at step {i}")


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_at_the_edges_of_the_loops_equal_the_float64_reference(shape, last):
    for dtype in ORACLES:
        for order, elements in (("first", None), ("first", 40), ("strided", 40)):
            assert_native_is_reference(
                shape, dtype, last, recipe=RECIPES["default"].but(elements=elements, order=order)
            )


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_any_number_of_threads_gives_the_same_step(threads, last, monkeypatch):
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((35, 3, 65), (40, 2, 7), (1, 1, 200), (3, 1, 1), (300, 4)):
            for elements in (None, 30):
                recipe = RECIPES["default"].but(elements=elements, order="strided")
                assert_native_is_reference(shape, torch.float64, last, recipe=recipe)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(8, 8), (16, 16)])
def test_first_elements_far_from_the_mean_do_not_spoil_the_variance(size, last):
    x, dy = data((6, 3, *size), last=last)
    x = x * 1e-2
    x[0, :, 0] += 1e3  # the first guess of the mean reads these
    x[:, 1] += 1e4
    layer = layer_of(backend="native")
    step(layer, x, dy)
    var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    assert torch.allclose(layer.running_mean.double(), mean, rtol=1e-6)
    assert torch.allclose(layer.running_var.double(), var, rtol=1e-4)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_slices_and_expanded_gradients_are_made_contiguous(last):
    x, dy = data((6, 8, 9, 10), torch.float64, last)
    x, dy = x[::2, 1:4, :, 2:7], dy[::2, 1:4, :, :1].expand(3, 3, 9, 5)
    want, got = (step(layer_of(backend=b, dtype=torch.float64), x, dy) for b in ("reference", "native"))
    assert_same(got, want, 1e-10)


def test_a_tensor_with_a_pending_negation_is_not_read_from_raw_memory():
    x, dy = data((4, 3, 6), torch.float64)
    lazy = [torch._neg_view(-t) for t in (x, dy)]
    assert lazy[0].is_neg() and torch.equal(lazy[0], x)
    want = step(layer_of(backend="reference", dtype=torch.float64), x, dy)
    assert_same(step(layer_of(backend="native", dtype=torch.float64), x, lazy[1]), want, 1e-10)
    layer = layer_of(dtype=torch.float64)
    assert layer.explain(lazy[0]).startswith("fused")
    layer(lazy[0])
    assert torch.allclose(layer.running_mean, want["running_mean"])
    zero = torch._efficientzerotensor(x.shape, dtype=torch.float64)
    got, want = (step(layer_of(backend=b, dtype=torch.float64), x, zero) for b in ("native", "reference"))
    assert_same(got, want, 1e-10)


def test_autograd_notices_that_the_state_has_moved():
    layer, (x, dy) = layer_of(backend="native", dtype=torch.float64), data((4, 3, 6), torch.float64)
    penalty = (layer.running_mean * layer.weight).sum()  # saves the mean
    step(layer, x, dy)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()
    before = {name: b._version for name, b in layer.named_buffers()}
    step(layer, x, dy)
    assert all(b._version > before[name] for name, b in layer.named_buffers())


def test_parameters_and_states_of_another_size_never_reach_c():
    x = torch.randn(4, 3, 5)
    for name, bad in (("weight", torch.ones(2)), ("bias", torch.zeros(4))):
        with pytest.raises(ValueError, match=f"{name} must have one value for each of 3 channels; got shape"):
            running_batch_norm(x, NormState.new(3), **{name: bad})
    with pytest.raises(
        ValueError, match="'native' cannot be used here: weight or bias is not a contiguous CPU tensor of 3"
    ):
        running_batch_norm(x, NormState.new(3), torch.ones(3).double(), backend="native")
    short = NormState.new(3)._replace(running_grad=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="a tensor of the state is not contiguous, not on the CPU"):
        running_batch_norm(x, short, backend="native")
    strided = NormState.new(3)._replace(running_var=torch.ones(6)[::2])
    running_batch_norm(x, strided)  # by another backend
    assert strided.running_var.stride() == (2,)


def test_half_precision_is_left_to_the_fused_backend_and_refused_by_name():
    layer = RunningBatchNorm(3)
    assert "not the C kernels: the C kernels take float32 and float64" in layer.explain(torch.randn(2, 3).bfloat16())
    with pytest.raises(ValueError, match="'native' cannot be used here"):
        RunningBatchNorm(3, backend="native")(torch.randn(2, 3).bfloat16())


@pytest.fixture
def first_use(monkeypatch):
    """first_use(NAME=value) gives what a layer explains, and the warnings of a step, as if nothing had been loaded."""
    loaders = native.load, build.load
    monkeypatch.setattr(build, "_broken", {})

    def use(**env):
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        for load in loaders:
            load.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer, x = RunningBatchNorm(3), torch.randn(4, 3)
            said = layer.explain(x)
            layer(x).sum().backward()
        return said, [f"{w.category.__name__}: {w.message}" for w in caught]

    yield use
    for load in loaders:
        load.cache_clear()


def test_the_kernels_can_be_turned_off(first_use):
    said, warned = first_use(FASTRBN_NATIVE=0)
    assert said.startswith("fused") and "FASTRBN_NATIVE=0 turns the C kernels off" in said and not warned


def test_a_machine_without_a_compiler_trains_and_explain_says_so(first_use, tmp_path):
    said, warned = first_use(PATH=tmp_path, CC="")
    assert said.startswith("fused") and "there is no C compiler" in said and not warned


def test_a_failing_compiler_warns_once_and_training_continues(first_use, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no room on this planet >&2\nexit 1\n")
    broken.chmod(0o755)
    said, [warning] = first_use(CC=broken, XDG_CACHE_HOME=tmp_path)
    assert said.startswith("fused") and warning.startswith("RuntimeWarning")
    assert f"could not be built with {broken}: no room on this planet" in warning
    assert not [*tmp_path.rglob("*.so")]


def test_a_forked_process_trains_after_threads_have_run(monkeypatch):
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    layer, x = layer_of(backend="native"), data((8, 3, 70))[0]
    layer(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        child = os.fork()
    if child == 0:
        layer(x)
        os._exit(int(not layer.running_mean.isfinite().all()))
    assert os.waitpid(child, 0)[1] == 0
