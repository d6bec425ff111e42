"""Shapes, memory formats, dtypes and devices that users bring, and messages for those that are refused."""

import pytest
import torch
from checks import ClosedForm, relative_error
from norm.steps import (
    ALL,
    HALF,
    ThreadLayer,
    assert_same,
    assert_unmoved,
    buffers,
    layer_of,
    serving,
    step,
    with_backends,
)
from torch import nn

from fastrbn.norm import RECIPES, RunningBatchNorm, RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
BACKENDS = pytest.mark.parametrize("backend", ALL)
SHAPES = [(5, 3), (1, 3), (7, 3, 11), (1, 3, 1), (4, 3, 5, 7), (1, 3, 9, 2), (2, 3, 1, 1), (3, 3, 2, 5, 3)]
SHAPES += [(1, 3, 1, 1, 1), (2, 3, 2, 2, 2, 3), (6, 1), (3, 1, 4, 4), (1, 1)]


def pair(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    return (x * 2 + 0.5).to(dtype), (dy + 0.3).to(dtype)


def as_oracle(layer, x, dy, steps=3):
    """The default recipe's closed form over `steps` batches x + i: the results of `step` without the counts."""
    oracle = ClosedForm(x.shape[1], layer.weight.data, layer.bias.data, averaged=True)
    for i in range(steps):
        y, dx, dweight, dbias = oracle.step(x + i, dy, oracle.default_rate(len(x)))
    a_and_b = torch.stack([oracle.a_sum, oracle.b_sum])
    found = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "running_mean": oracle.mean}
    return {**found, "running_var": oracle.var, "running_grad": a_and_b}


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_rank_and_odd_shape_equals_the_closed_form(shape, backend):
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        x, dy = pair(shape, dtype)
        layer = layer_of(shape[1], backend=backend, dtype=dtype)
        for i in range(3):
            got = step(layer, x + i, dy)
        want = as_oracle(layer, x, dy)
        assert_same({k: got[k] for k in want}, want, tol)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("shape", [(16, 2048), (64, 4096), (3, 8192, 1), (9, 2048, 2)], ids=str)
def test_more_channels_than_samples_equal_the_closed_form_in_every_dtype(shape, dtype, tol):
    x, dy = pair(shape, dtype)
    x[0] *= 5  # the first sample must not matter
    want = as_oracle(layer_of(shape[1]), x, dy, steps=1)
    for backend in serving(dtype):
        got = step(layer_of(shape[1], backend=backend), x, dy)
        assert_same({k: got[k] for k in want}, want, tol, backend)


def test_a_wide_linear_layer_trains_under_autocast_to_bfloat16():
    net = nn.Sequential(nn.Linear(64, 8192), layer_of(8192, kind=RunningBatchNorm1d))
    x = torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        h = net[0](x).detach()
    dy = torch.randn(16, 8192).to(y.dtype)
    y.backward(dy)
    want = as_oracle(net[1], h, dy, steps=1)
    assert y.dtype == h.dtype == torch.bfloat16
    assert relative_error(y, want["y"]) < 1e-2 and relative_error(net[1].running_var, want["running_var"]) < 1e-5
    assert relative_error(net[0].weight.grad, want["dx"].mT @ x.double()) < 2e-2


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (0, 3, 4, 4), (0, 3, 2, 2, 2), (4, 3, 0), (4, 3, 0, 7)], ids=str)
@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "batch", "skip-tenth"]))
def test_an_empty_batch_passes_through_and_leaves_the_state(recipe, shape, backend):
    layer = layer_of(recipe=recipe, backend=backend)
    step(layer, *pair((4, 3, 5)))
    for mode in (True, False):
        layer.train(mode)
        before = buffers(layer)
        x, dy = pair(shape)
        got = step(layer, x, dy)
        assert got["y"].shape == got["dx"].shape == shape
        assert not got["dweight"].any() and not got["dbias"].any()
        assert_unmoved(layer, before)


def layouts(x):
    """The same values laid out in memory in other ways."""
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "channels first", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "sliced", torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2]
    yield "a part of the channels", torch.cat([x, x + 1], 1)[:, : x.shape[1]]
    yield "every second sample", torch.stack([x, -x], 1).flatten(0, 1)[::2]
    if x.dim() > 2:
        yield "channels last", x.movedim(1, -1).contiguous().movedim(-1, 1)


@BACKENDS
@pytest.mark.parametrize("elements", [None, 8])
@pytest.mark.parametrize("shape", [(33, 3), (19, 3, 7), (18, 3, 5, 6), (17, 3, 2, 4, 5), (17, 3, 40, 41)], ids=str)
def test_layout_in_memory_changes_no_value(shape, elements, backend):
    recipe = RECIPES["default"].but(elements=elements)
    x, dy = pair(shape, torch.float64)
    want = step(layer_of(recipe=recipe, backend=backend, dtype=torch.float64), x, dy)
    for name, z in layouts(x):
        assert torch.equal(z, x) and not (z.is_contiguous() and shape[0] > 1)
        assert_same(step(layer_of(recipe=recipe, backend=backend, dtype=torch.float64), z, dy), want, 1e-10, name)
    for name, up in layouts(dy):
        assert_same(step(layer_of(recipe=recipe, backend=backend, dtype=torch.float64), x, up), want, 1e-10, name)


@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "batch", "detached"]))
def test_expanded_inputs_and_upstream_gradients_work(recipe, backend):
    row, up = pair((1, 3, 1, 4), torch.float64)
    full, want = layer_of(recipe=recipe, backend=backend, dtype=torch.float64), row.expand(5, 3, 6, 4)
    other = layer_of(recipe=recipe, backend=backend, dtype=torch.float64)
    a, b = want.contiguous().requires_grad_(), row.clone().requires_grad_()
    y = full(a)
    y.backward(up.expand_as(want).contiguous())
    z = other(b.expand(5, 3, 6, 4))
    z.backward(up.expand_as(want))
    assert relative_error(z, y) < 1e-12
    assert relative_error(b.grad, a.grad.sum((0, 2), keepdim=True)) < 1e-10
    assert_unmoved(other, buffers(full)) if backend == "reference" else assert_same(
        buffers(other), buffers(full), 1e-10
    )


@DEVICES
@pytest.mark.parametrize("elements", [None, 8])
@pytest.mark.parametrize(("recipe", "backend"), with_backends(RECIPES))
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d], ids=["2d", "3d"])
def test_channels_last_is_kept_in_the_output_and_in_the_input_gradient(
    memory_format, recipe, elements, backend, device
):
    shape = (20, 3, 5, 6) if memory_format is torch.channels_last else (20, 3, 2, 5, 6)
    layer = layer_of(recipe=RECIPES[recipe].but(elements=elements), backend=backend).to(device)
    for mode in (True, True, False):
        layer.train(mode)
        x, dy = (t.to(device).contiguous(memory_format=memory_format) for t in pair(shape))
        for up in (dy, dy.contiguous()) if backend == "fused" else (dy,):
            dx, inner = [], x.clone().requires_grad_() * 1  # not a leaf, so autograd keeps the layout of its gradient
            inner.register_hook(dx.append)
            y = layer(inner)
            y.backward(up)
            assert y.is_contiguous(memory_format=memory_format)
            assert dx[0].is_contiguous(memory_format=memory_format)


@DEVICES
@pytest.mark.parametrize(
    ("recipe", "backend"), [(r, b) for r, b in with_backends(["default", "batch"]) if b in serving(HALF[0])]
)
@pytest.mark.parametrize("params", ["float32", "half"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_input_keeps_float32_statistics_and_its_own_dtype(dtype, params, recipe, backend, device):
    layer, oracle = (layer_of(recipe=recipe, backend=b) for b in (backend, "reference"))
    layer, oracle = (layer.to(dtype) if params == "half" else layer).to(device), oracle.double()
    oracle.weight.data, oracle.bias.data = layer.weight.data.double().cpu(), layer.bias.data.double().cpu()
    for seed, shape in enumerate([(6, 3, 5, 4), (1, 3, 7, 7), (5, 3, 61, 64)]):
        x, dy = pair(shape, dtype, seed)
        got = {k: v.cpu() for k, v in step(layer, x.to(device), dy.to(device)).items()}
        want = step(oracle, x.double(), dy.double())
        assert got["y"].dtype == got["dx"].dtype == dtype and got["dweight"].dtype == layer.weight.dtype
        assert got["running_mean"].dtype == got["running_var"].dtype == got["running_grad"].dtype == torch.float32
        for name in ("running_mean", "running_var"):  # summed in float32: exact but for its rounding
            assert torch.allclose(got[name].double(), want[name], rtol=1e-5, atol=1e-5), name
        assert_same(got, want, 2e-2 if dtype == torch.bfloat16 else 3e-3)


@DEVICES
@pytest.mark.parametrize("backend", serving(HALF[0]))
def test_float16_statistics_do_not_overflow(backend, device):
    x = (pair((8, 3, 16, 16))[0] * 500).to(torch.float16).to(device)  # variance 1e6, the largest float16 is 65504
    layer = layer_of(backend=backend).to(device)
    for _ in range(2):
        got = step(layer, x, pair(x.shape, torch.float16)[1].to(device))
    assert torch.allclose(layer.running_var, x.float().var((0, 2, 3), unbiased=False), rtol=1e-4)
    assert got["y"].isfinite().all() and got["dx"].isfinite().all() and layer.num_batches_tracked == 2


@DEVICES
@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_trains_a_convolution_and_its_norm(recipe, device):
    norm = layer_of(4, recipe=recipe)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2)).to(device)
    for seed in range(3):
        x, _ = pair((2, 3, 6, 6), seed=seed)
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden = net[:2](x.to(device))
            y = net[2:](hidden)
        y.backward(torch.randn_like(y))
        assert hidden.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    assert all(
        p.grad.isfinite().all() and p.grad.abs().sum() > 0 and p.dtype == torch.float32 for p in net.parameters()
    )


@DEVICES
@BACKENDS
@pytest.mark.parametrize("elements", [None, 100])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "2d"])
@pytest.mark.parametrize("shape", [(8, 3, 9, 11), (30, 3, 41, 37), (64, 3, 128, 80)], ids=["small", "20k", "650k"])
def test_a_large_mean_loses_no_precision(shape, layout, elements, backend, device):
    """Mean 1e4, deviation 0.1 in float32, whose spacing there is 0.001."""
    layer = RunningBatchNorm(3, recipe=RECIPES["default"].but(elements=elements, order="strided"), backend=backend)
    layer.to(device)
    for seed in range(2):
        x = 1e4 + 0.05 * pair(shape, seed=seed)[0].to(device)
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        x = x.permute(0, 2, 3, 1).reshape(-1, 3) if layout == "2d" else x
        y = layer(x)
    v, m = torch.var_mean(x.double(), dim=[d for d in range(x.dim()) if d != 1], correction=0)
    few = elements is not None or len(x) < 2000  # a sample's own noise; PyTorch's sums over few are not shifted
    assert (layer.running_mean - m).abs().max() < (0.04 if few else 0.003)
    assert (layer.running_var / v).sub(1).abs().max() < (0.6 if elements is not None else 0.05)
    assert (y.mean().abs() < 0.5) and 0.7 < y.std() < 1.3


def test_a_large_mean_loses_the_threads_variance_and_batchnorms_in_channels_last():
    x = 1e4 + 0.05 * pair((64, 3, 128, 80))[0]
    layer = ThreadLayer(3)
    layer(x)
    var = layer.squares / layer.count - (layer.sums / layer.count) ** 2
    assert (var / 0.01).sub(1).abs().max() > 10
    norm = nn.BatchNorm2d(3, momentum=1.0)
    norm(x.contiguous(memory_format=torch.channels_last))
    if norm.running_var.max() < 0.02:
        pytest.skip("this PyTorch adds up its channels_last statistics without that error")
    assert (norm.running_mean - x.double().mean((0, 2, 3))).abs().min() > 1  # ten deviations and more


@pytest.mark.parametrize(("recipe", "backend"), with_backends(RECIPES))
def test_without_affine_the_output_is_x_hat_and_there_are_no_parameters(recipe, backend):
    layer = RunningBatchNorm2d(3, affine=False, recipe=recipe, backend=backend)
    plain = RunningBatchNorm2d(3, recipe=recipe, backend=backend)
    assert list(layer.parameters()) == [] and layer.weight is None and layer.bias is None
    for seed in range(4):
        x, dy = pair((4, 3, 5, 5), seed=seed)
        got, want = step(layer, x, dy), step(plain, x, dy)
        assert_same(got, {k: v for k, v in want.items() if k not in ("dweight", "dbias")}, 1e-6)
    assert torch.allclose(layer.eval()(x), plain.eval()(x))


def test_batchnorm_and_the_thread_refuse_a_batch_of_one():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.randn(1, 3))
    with pytest.raises(ZeroDivisionError):
        ThreadLayer(3)(torch.randn(1, 3, 4))


BAD_INPUT = [
    (
        RunningBatchNorm,
        (3,),
        torch.float32,
        r"needs \(N, C, \*\), at least 2d, input; got 1d of shape \(3,\).*x\[None\]",
    ),
    (RunningBatchNorm, (), torch.float32, r"at least 2d, input; got 0d of shape \(\)"),
    (
        RunningBatchNorm1d,
        (2, 3, 4, 4),
        torch.float32,
        r"1d needs 2d or 3d input; got 4d of shape \(2, 3, 4, 4\).*any rank",
    ),
    (RunningBatchNorm2d, (3, 4, 4), torch.float32, r"2d needs 4d input; got 3d of shape \(3, 4, 4\).*x\[None\]"),
    (RunningBatchNorm2d, (2, 3), torch.float32, r"2d needs 4d input; got 2d of shape \(2, 3\).*add the missing"),
    (RunningBatchNorm3d, (2, 3, 4, 4), torch.float32, r"3d needs 5d input; got 4d of shape \(2, 3, 4, 4\)"),
    (
        RunningBatchNorm,
        (2, 5),
        torch.float32,
        r"has 3 channels.*must be 3; got shape \(2, 5\).*num_features=5 or permute",
    ),
    (RunningBatchNorm2d, (2, 4, 4, 3), torch.float32, r"must be 3; got shape \(2, 4, 4, 3\).*permute"),
    (RunningBatchNorm, (2, 3), torch.int64, r"needs floating-point input; got torch.int64.*x.float\(\)"),
    (RunningBatchNorm, (2, 3), torch.bool, r"needs floating-point input; got torch.bool"),
    (RunningBatchNorm, (2, 3), torch.complex64, r"needs floating-point input; got torch.complex64"),
]


@BACKENDS
@pytest.mark.parametrize(("kind", "shape", "dtype", "message"), BAD_INPUT)
def test_bad_input_is_refused_with_rule_and_advice_in_both_modes(kind, shape, dtype, message, backend):
    layer = kind(3, backend=backend)
    before = buffers(layer)
    for mode in (True, False):
        with pytest.raises(ValueError, match=message):
            layer.train(mode)(torch.zeros(shape, dtype=dtype))
    assert_unmoved(layer, before)


BAD_SETTINGS = [
    ({"nf": 0}, "the number of channels must be a whole number, 1 or more; got 0"),
    ({"nf": -2}, "got -2"),
    ({"nf": 2.5}, "got 2.5"),
    ({"nf": True}, "got True"),
    ({"nf": 3, "eps": 0.0}, "eps is added to the variance and must be above 0; got 0.0.*1e-5"),
    ({"nf": 3, "eps": -1e-5}, "must be above 0; got -1e-05"),
    ({"nf": 3, "eps": float("nan")}, "must be above 0; got nan"),
    ({"nf": 3, "mom": 0.0}, "above 0 and at most 1; got 0.0"),
    ({"nf": 3, "mom": 1.5}, "above 0 and at most 1; got 1.5"),
    ({"nf": 3, "mom": None}, "above 0 and at most 1; got None"),
    ({"nf": 3, "dtype": torch.int32}, "needs a floating-point dtype; got torch.int32"),
    ({"nf": 3, "recipe": "defualt"}, "got 'defualt'. Did you mean 'default'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused_by_the_constructor(settings, message):
    with pytest.raises(ValueError, match=message):
        RunningBatchNorm(**settings)


def test_momentum_as_the_third_argument_is_refused_with_advice():
    with pytest.raises(ValueError, match="affine must be True or False; got 0.1.*momentum=0.1"):
        RunningBatchNorm2d(3, 1e-5, 0.1)
    assert RunningBatchNorm2d(3, 1e-3, momentum=0.2).mom == 0.2


@pytest.mark.parametrize("kind", [RunningBatchNorm, RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d])
def test_batchnorms_keyword_arguments_are_accepted_by_every_kind_or_refused_with_the_reason(kind):
    layer = kind(3, eps=1e-3, momentum=0.2, affine=True, track_running_stats=True, bias=False)
    assert layer.mom == layer.momentum == 0.2 and layer.eps == 1e-3 and layer.track_running_stats is True
    assert layer.weight.shape == (3,) and layer.bias is None and "bias=False" in repr(layer)
    assert kind(3, affine=False).bias is None and "bias" not in repr(kind(3, affine=False))
    assert kind(3, momentum=None).momentum == 0.1  # as convert_batchnorm takes it
    with pytest.raises(ValueError, match=f"{kind.__name__} normalises with its running.*track_running_stats=False"):
        kind(3, track_running_stats=False)
    with pytest.raises(ValueError, match="bias must be True or False; got None"):
        kind(3, bias=None)
    with pytest.raises(ValueError, match="above 0 and at most 1; got 0"):
        kind(3, momentum=0)


@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "batch"]))
def test_without_bias_it_is_the_layer_with_a_bias_of_zero(recipe, backend):
    layer, plain = (layer_of(recipe=recipe, backend=backend, bias=bias) for bias in (False, True))
    nn.init.zeros_(plain.bias)
    for seed in range(3):
        got, want = step(layer, *pair((4, 3, 5), seed=seed)), step(plain, *pair((4, 3, 5), seed=seed))
        want.pop("dbias")
        assert_same(got, want, 1e-6)
    assert torch.equal(layer.eval()(torch.ones(2, 3)), plain.eval()(torch.ones(2, 3)))
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(3)) and layer.bias is None
