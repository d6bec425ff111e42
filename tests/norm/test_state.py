"""The state of the layer: checkpoints, copies, dtypes, freezing, and batches that must not count."""

import copy
import io
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm.steps import ALL, ThreadLayer, assert_same, assert_unmoved, buffers, layer_of, step, with_backends
from torch import nn

from fastrbn.norm import RECIPES, RunningBatchNorm, RunningBatchNorm2d

ADDED = {"running_count", "num_samples_tracked", "running_grad", "running_grad_weight"}


def data(n, shape=(5, 3, 4, 2), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=g) * (1 + i % 3) + i / 2).to(dtype) for i in range(n)]


def trained(steps=4, **settings):
    layer = layer_of(**settings)
    for x, dy in zip(data(steps), data(steps, seed=1), strict=True):
        step(layer, x, dy)
    return layer


def assert_continues_alike(a, b, dtype=torch.float32):
    for x, dy in zip(data(3, seed=5, dtype=dtype), data(3, seed=6, dtype=dtype), strict=True):
        assert_same(step(a, x, dy), step(b, x, dy), 0)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(("recipe", "backend"), with_backends(RECIPES))
def test_a_saved_and_loaded_state_dict_continues_bit_for_bit(recipe, steps, backend):
    layer, fresh = trained(steps, recipe=recipe, backend=backend), RunningBatchNorm(3, recipe=recipe, backend=backend)
    for x in data(2, seed=3):  # a forward without its backward, and one in flight
        y = layer(x.requires_grad_())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    y.backward(torch.ones_like(y) * 0)  # of the layer alone
    fresh.load_state_dict(layer.state_dict())
    assert_continues_alike(layer, fresh)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("backend", ALL)
def test_layers_are_copied_and_saved_during_training(backend, how):
    layer = trained(recipe=RECIPES["default"].but(elements=7), backend=backend)
    with torch.no_grad():
        layer(data(1)[0])  # something to remember
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.recipe == layer.recipe
    assert not {b.data_ptr() for b in layer.buffers()} & {b.data_ptr() for b in other.buffers()}
    assert_continues_alike(layer, other)


def test_the_threads_layer_cannot_be_copied_after_a_training_step():
    layer = ThreadLayer(3)
    layer(data(1)[0].requires_grad_())
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(layer)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("old", [False, True], ids=["today's", "without num_batches_tracked"])
@pytest.mark.parametrize("batches", [0, 1, 50])
def test_a_batchnorm_checkpoint_loads_strictly_and_its_statistics_count(batches, old, backend):
    theirs = nn.BatchNorm2d(3)
    nn.init.normal_(theirs.weight)
    for x in data(batches):
        theirs(x)
    saved = theirs.state_dict()
    if old:
        del saved["num_batches_tracked"]
    keys = set(saved)
    layer = RunningBatchNorm2d(3, backend=backend)
    layer.load_state_dict(saved)
    assert set(saved) == keys  # the caller's dictionary is left as it was
    x = data(1, seed=4)[0]
    assert torch.allclose(layer.eval()(x), theirs.eval()(x), atol=1e-6)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    layer.train()(x * 30 + 100)
    rate = 5 / 25
    if batches == 0:  # nothing seen: the first batch counts fully
        assert torch.allclose(layer.running_mean, (x * 30 + 100).mean((0, 2, 3)))
    else:
        m = (x * 30 + 100).mean((0, 2, 3))
        assert torch.allclose(layer.running_mean, mean + rate * (m - mean))
        assert torch.all(layer.running_var > (1 - rate) * var)


def test_statistics_set_by_hand_count_as_imported():
    theirs = nn.BatchNorm2d(3)
    theirs.running_mean.fill_(2.0)
    layer = RunningBatchNorm2d(3)
    layer.load_state_dict(theirs.state_dict())
    layer(torch.zeros(1, 3, 2, 2))
    assert torch.all(layer.running_mean > 1.9)


def test_a_state_dict_without_the_additions_loads_strictly_into_batchnorm():
    layer, theirs = trained(kind=RunningBatchNorm2d), nn.BatchNorm2d(3)
    saved = layer.state_dict()
    assert set(saved) - set(theirs.state_dict()) == ADDED
    theirs.load_state_dict({k: v for k, v in saved.items() if k not in ADDED})
    x = data(1)[0]
    assert torch.equal(theirs.eval()(x), layer.eval()(x))


def test_a_state_dict_with_a_missing_or_unexpected_name_is_refused():
    saved = trained().state_dict()
    del saved["running_grad"]
    with pytest.raises(RuntimeError, match='Missing key.*"running_grad"'):
        RunningBatchNorm(3).load_state_dict(saved)
    with pytest.raises(RuntimeError, match='Unexpected key.*"surplus"'):
        RunningBatchNorm(3).load_state_dict({**trained().state_dict(), "surplus": torch.zeros(1)})


def test_a_half_precision_batchnorm_checkpoint_leaves_the_statistics_float32():
    theirs = nn.BatchNorm2d(3).half()
    theirs.running_mean.fill_(0.1)
    for assign in (False, True):
        with torch.device("meta"):
            layer = RunningBatchNorm2d(3)
        layer = layer if assign else RunningBatchNorm2d(3)
        layer.load_state_dict(theirs.state_dict(), assign=assign)
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
        assert all(not b.is_meta for b in layer.buffers())
        assert layer.running_count == -1


@pytest.mark.parametrize("move", ["half", "bfloat16", "to half", "to bfloat16", "type"])
def test_half_precision_leaves_the_statistics_float32_and_bit_exact(move):
    layer = trained()
    before = buffers(layer)
    kind = torch.bfloat16 if "bfloat16" in move else torch.float16
    {"half": layer.half, "bfloat16": layer.bfloat16, "type": lambda: layer.type(kind)}.get(
        move, lambda: layer.to(kind)
    )()
    assert layer.weight.dtype == layer.bias.dtype == kind
    assert_unmoved(layer, before)
    assert all(b.dtype == before[n].dtype for n, b in layer.named_buffers())
    x, dy = data(2, dtype=kind)
    got = step(layer, x, dy)
    assert got["y"].dtype == got["dx"].dtype == got["dweight"].dtype == kind


def test_double_makes_the_statistics_float64_and_float_brings_them_back():
    layer = trained().double()
    assert {b.dtype for b in layer.buffers()} == {torch.float64, torch.int64}
    step(layer, *data(2, dtype=torch.float64))
    assert {b.dtype for b in layer.float().buffers()} == {torch.float32, torch.int64}
    layer = RunningBatchNorm(3, dtype=torch.float64)
    before = buffers(layer)
    layer.half()
    assert layer.weight.dtype == torch.float16
    assert_unmoved(layer, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_made_in_half_precision_has_float32_statistics(dtype):
    assert RunningBatchNorm(3, dtype=dtype).running_var.dtype == torch.float32
    torch.set_default_dtype(dtype)
    try:
        assert RunningBatchNorm(3).running_var.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_layers_are_made_on_the_meta_device_and_filled_later():
    layer = RunningBatchNorm(3, device="meta")
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert_same(buffers(layer), buffers(RunningBatchNorm(3)), 0)
    layer = RunningBatchNorm(3, device="meta")
    layer.load_state_dict(trained().state_dict(), assign=True)
    assert_continues_alike(layer, trained())


@pytest.mark.parametrize("backend", ALL)
def test_freeze_survives_train_and_copies_until_unfreeze(backend):
    layer = trained(backend=backend)
    x, dy = data(2, seed=2)
    want, before = layer.eval()(x), buffers(layer)
    assert layer.train().freeze() is layer
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), nn.Sequential(layer).train()[0]):
        got = step(same, x, dy)
        assert torch.equal(got["y"], want)
        assert got["dweight"].abs().sum() > 0  # scale and shift still learn
        assert_unmoved(same, before)
    assert "frozen" in repr(layer)
    assert layer.unfreeze() is layer
    layer(x)
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1
    assert "frozen" not in repr(layer)


def test_reset_running_stats_forgets_everything_but_weight_and_bias():
    layer = trained()
    weight = layer.weight.clone()
    layer.reset_running_stats()
    assert_same(buffers(layer), buffers(RunningBatchNorm(3)), 0)
    assert torch.equal(layer.weight, weight)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(3)) and torch.equal(layer.bias, torch.zeros(3))


def test_the_repr_shows_the_recipe():
    assert repr(RunningBatchNorm2d(3, recipe="skip-tenth")) == (
        "RunningBatchNorm2d(3, mom=0.1, eps=1e-05, affine=True, recipe=skip-tenth)"
    )
    assert "recipe=course*" in repr(RunningBatchNorm(3, recipe=RECIPES["course"].but(elements=64)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("recipe", "backend"), with_backends(RECIPES))
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (9, 3, 70, 71)], ids=["small", "large"])
def test_a_batch_with_nan_or_inf_leaves_the_state_bit_identical_and_the_output_shows_it(
    shape, steps, recipe, bad, backend
):
    layer = trained(steps, recipe=recipe, backend=backend)
    before, (x, dy) = buffers(layer), data(2, shape)
    x[0, 2, 3, 1] = bad
    got = step(layer, x, dy)
    assert_unmoved(layer, before)
    assert not got["y"][:, 2].isfinite().all() and got["y"][:, :2].isfinite().all()
    assert not got["dx"][:, 2].isfinite().all() or not got["dweight"].isfinite().all()
    step(layer, *data(2))
    assert all(b.isfinite().all() for b in layer.buffers()) and layer.num_batches_tracked == steps + 1


@pytest.mark.parametrize("backend", ALL)
def test_a_nan_in_samples_that_the_statistics_do_not_read_leaves_them_finite(backend):
    layer = trained(recipe=RECIPES["default"].but(elements=16), backend=backend)  # reads 16 samples
    x, dy = data(2, (20, 3, 4, 2))
    clean, y = copy.deepcopy(layer), x.clone()
    y[18, 1, 0, 0] = float("nan")
    got, want = step(layer, y, dy), step(clean, x, dy)
    assert got["y"][18, 1].isnan().any()
    for name in ("running_mean", "running_var", "running_count", "num_batches_tracked"):
        assert torch.equal(got[name], want[name])
    assert layer.running_grad.isfinite().all()


@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "course", "batch"]))
def test_nan_in_the_upstream_gradient_leaves_the_averages_and_shows_in_the_input_gradient(recipe, backend):
    layer, (x, dy) = trained(recipe=recipe, backend=backend), data(2)
    before = buffers(layer)
    dy[0, 1, 0, 0] = float("nan")
    got = step(layer, x, dy)
    for name in ("running_grad", "running_grad_weight"):
        assert torch.equal(got[name], before[name])
    assert got["dx"][:, 1].isnan().any()
    assert got["running_mean"].isfinite().all() and layer.num_batches_tracked == 5


@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "batch"]))
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (9, 3, 70, 71), (40, 3)], ids=["small", "large", "flat"])
@pytest.mark.parametrize("huge", ["constant", "spread"])
def test_a_finite_batch_whose_squares_overflow_leaves_the_state_bit_identical(huge, shape, steps, recipe, backend):
    layer = trained(steps, recipe=recipe, backend=backend)
    before, (x, dy) = buffers(layer), data(2, shape)
    if huge == "constant":
        x[:, 1] = 3e19  # variance 0; its square is above float32's 3.4e38
    else:
        x[:, 1] *= 1e20
    got = step(layer, x, dy)
    for name in before:
        assert torch.equal(got[name], before[name]) or name.startswith("running_grad"), name
    for x, dy in zip(data(2), data(2, seed=1), strict=True):
        step(layer, x, dy)
    assert all(b.isfinite().all() for b in layer.buffers()) and layer.num_batches_tracked == steps + 2


@pytest.mark.parametrize("backend", ALL)
def test_threads_that_share_a_layer_lose_no_step(backend):
    layer, x = layer_of(16, backend=backend), torch.randn(8, 16)

    def train(layer, steps):
        for _ in range(steps):
            z = layer(x.clone().requires_grad_())
            z.square().sum().backward()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(train, layer, 60) for _ in range(3)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert layer.num_batches_tracked == 180 and layer.num_samples_tracked == 180 * 8
    alone = layer_of(16, backend=backend)
    train(alone, 180)
    assert_same(buffers(layer), buffers(alone), 1e-4)


def test_one_nan_batch_poisons_batchnorm_and_the_threads_layer_for_good():
    for layer, name in ((nn.BatchNorm2d(3), "running_mean"), (ThreadLayer(3), "sums")):
        with torch.no_grad():
            layer(torch.full((4, 3, 2, 2), float("nan")))
            for x in data(50):
                layer(x)
        assert getattr(layer, name).isnan().all()


# properties, over shapes, scales and momenta
shapes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
moms = st.floats(0.01, 1.0)
served = st.sampled_from(with_backends(RECIPES))
examples = settings(max_examples=40, deadline=None)


@examples
@given(st.lists(shapes, min_size=1, max_size=5), moms, served, st.floats(-100, 100), st.floats(0, 100))
def test_variance_and_counts_never_go_negative_and_the_share_stays_within_one(sizes, mom, served, at, spread):
    recipe, backend = served
    layer = RunningBatchNorm(2, mom=mom, recipe=recipe, backend=backend)
    for bs, h, w in sizes:
        x = torch.randn(bs, 2, h, w) * spread + at
        assert layer(x).isfinite().all()
        assert (layer.running_var >= 0).all()
        assert 0 < layer.running_count <= max(b * h * w for b, h, w in sizes) * (1 + 1e-5)
        assert x.mean((0, 2, 3)).sub(layer.running_mean).isfinite().all()
    assert layer.num_samples_tracked == sum(s[0] for s in sizes) and layer.num_batches_tracked == len(sizes)


@examples
@given(shapes, moms, served)
def test_the_first_batch_counts_fully_whatever_the_momentum(shape, mom, served):
    recipe, backend = served
    if recipe == "batch":
        return
    layer = RunningBatchNorm(2, mom=mom, recipe=recipe, backend=backend, dtype=torch.float64)
    x = torch.randn(shape[0], 2, *shape[1:], dtype=torch.float64)
    layer(x)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert torch.allclose(layer.running_mean, mean) and torch.allclose(layer.running_var, var)


@examples
@given(shapes, served, st.floats(0.5, 1e3), st.floats(-1e3, 1e3))
def test_training_output_does_not_change_when_all_input_is_scaled_and_shifted(shape, served, scale, shift):
    recipe, backend = RECIPES[served[0]].but(clamp=None), served[1]
    a, b = (RunningBatchNorm(2, eps=1e-12, recipe=recipe, backend=backend, dtype=torch.float64) for _ in range(2))
    for _ in range(3):
        x = torch.randn(shape[0], 2, *shape[1:], 3, dtype=torch.float64)
        assert torch.allclose(a(x), b(x * scale + shift), atol=1e-5)


@examples
@given(shapes, served)
def test_evaluation_is_one_affine_map_for_every_input(shape, served):
    recipe, backend = served
    layer = trained(recipe=recipe, backend=backend).double().eval()
    x, z = (torch.randn(shape[0], 3, *shape[1:], dtype=torch.float64) for _ in range(2))
    origin = layer(torch.zeros_like(x))
    assert torch.allclose(layer(2 * x - 3 * z) - origin, 2 * (layer(x) - origin) - 3 * (layer(z) - origin))
    perm = torch.randperm(shape[0])
    assert torch.equal(layer(x)[perm], layer(x[perm]))


@examples
@given(st.permutations(range(6)), st.integers(1, 5))
def test_regrouping_two_equal_passes_gives_the_statistics_of_their_weighted_union(order, cut):
    """At mom 1 every batch counts alone, at a fixed rate two batches weigh (1−λ) : λ, each by its elements."""
    x = torch.arange(6.0, dtype=torch.float64)[list(order)].view(6, 1).square()
    layer = RunningBatchNorm(1, mom=0.25, recipe=RECIPES["course"].but(rate=lambda m, bs, n: m), dtype=torch.float64)
    for part in (x[:cut], x[cut:]):
        layer(part)
    w = torch.cat([torch.full((cut,), 0.75), torch.full((6 - cut,), 1.0)]).double()
    w[:cut] *= 0.25
    w[cut:] *= 0.25
    mean = (w * x[:, 0]).sum() / w.sum()
    assert torch.allclose(layer.running_mean, mean)
    assert torch.allclose(layer.running_var, (w * (x[:, 0] - mean) ** 2).sum() / w.sum())


def test_ordinary_use_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(pickle.dumps(trained())).half().eval()(data(1, dtype=torch.float16)[0])
