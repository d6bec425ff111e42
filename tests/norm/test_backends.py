"""The fused and native backends against the reference: outputs, gradients and buffers over several steps."""

import pytest
import torch
from norm.steps import ALL, assert_same, assert_unmoved, buffers, layer_of, serving, step

from fastrbn.norm import RECIPES, NormState, Recipe, RunningBatchNorm, RunningBatchNorm2d, running_batch_norm
from fastrbn.norm.recipes import Clamp

SHAPES = [(2, 7, 5), (3, 5, 5), (1, 9, 4), (19, 3, 3), (4, 1, 1), (25, 1, 2), (2, 8, 8), (33, 2, 3)]
LARGE = [(5, 67, 61), (3, 101, 53), (1, 150, 129), (37, 21, 23), (2, 64, 64), (6, 59, 61)]  # over 16k elements
FAST_RECIPES = [name for name in RECIPES if not RECIPES[name].plain_only]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def batches(shapes, nf=3, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    """Odd batches whose mean and deviation drift, a quiet channel among them that the early clamp holds."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.02, 1.0, 3.0] * nf)[:nf].view(1, -1, 1, 1)
    for i, (bs, h, w) in enumerate(shapes):
        x = torch.randn(bs, nf, h, w, generator=g) * spread * (1 + i % 3) + 0.1 * i
        # sums of dy and dy·x̂ that do not nearly cancel: their rounding is not what is tested
        dy = torch.randn(bs, nf, h, w, generator=g) + 0.2 + 0.3 * (x - 0.1 * i) / spread
        yield x.to(dtype).contiguous(memory_format=memory_format), dy.to(dtype).contiguous(memory_format=memory_format)


def assert_backends_agree(shapes, dtype=torch.float32, memory_format=torch.contiguous_format, tol=None, **settings):
    wide = dtype if dtype == torch.float64 else None
    layers = [layer_of(backend=b, dtype=wide, **settings) for b in serving(dtype)]
    for i, (x, dy) in enumerate(batches(shapes, 3, dtype, memory_format)):
        want, *others = (step(layer, x, dy) for layer in layers)
        for layer, got in zip(layers[1:], others, strict=True):
            assert got["y"].dtype == got["dx"].dtype == dtype
            assert_same(got, want, tol or TOLERANCE[dtype], f"of {layer.backend} at step {i}")
    return layers


@pytest.mark.parametrize(
    ("affine", "memory_format"), [(True, torch.contiguous_format), (False, torch.channels_last)], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("elements", [None, 40, 4096])
@pytest.mark.parametrize("name", FAST_RECIPES)
def test_fast_equals_reference_over_eight_odd_batches(name, elements, affine, memory_format):
    for order in ("first", "strided") if elements == 40 else ("first",):
        recipe = RECIPES[name].but(elements=elements, order=order)
        settings = {"recipe": recipe, "affine": affine, "memory_format": memory_format}
        assert_backends_agree(SHAPES, torch.float64, **settings)
        assert_backends_agree(SHAPES, torch.float32, **settings)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FAST_RECIPES)
def test_fast_equals_reference_on_large_batches_of_every_dtype(name, dtype, memory_format):
    for elements in (None, 4096):
        recipe = RECIPES[name].but(elements=elements, order="strided")
        assert_backends_agree(LARGE, dtype, memory_format, recipe=recipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAST_RECIPES)
def test_fast_equals_reference_on_small_half_batches(name, dtype):
    assert_backends_agree(SHAPES, dtype, recipe=name)


@pytest.mark.parametrize("clamp", [Clamp(200, variance=0.5), Clamp(200, variance=None, deviation=0.7)])
def test_the_clamp_on_some_channels_only_stops_their_gradient_through_the_variance(clamp):
    recipe = Recipe("mine", clamp=clamp)
    layer = layer_of(recipe=recipe, dtype=torch.float64)
    held = 0
    for x, dy in batches(SHAPES, dtype=torch.float64):
        got = step(layer, x, dy)
        var, eps = got["running_var"], layer.eps
        used = var.clamp_min(0.5) + eps if clamp.variance else (var + eps).clamp_min(0.7**2)
        inv = used.rsqrt()
        x_hat = (x - got["running_mean"].view(1, -1, 1, 1)) * inv.view(1, -1, 1, 1)
        assert torch.allclose(got["y"], x_hat * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1))
        # where the floor holds, dx = γ/σ·(dy − a·mean(dy)) lies in no direction of x̂
        a = (dy - got["dx"] / (layer.weight * inv).view(1, -1, 1, 1))[:, 0]
        assert torch.allclose(a, a.mean().expand_as(a))
        held += int((var[0] < 0.4) & (var[1:] > 0.5).all())
    assert held >= 6  # the others are off the floor


@pytest.mark.parametrize("name", FAST_RECIPES)
def test_backends_agree_after_loading_statistics_from_a_batchnorm(name):
    theirs = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    theirs.running_mean.copy_(torch.tensor([1.0, -2.0, 0.1]))
    theirs.running_var.copy_(torch.tensor([0.003, 2.0, 5.0]))
    theirs.num_batches_tracked.fill_(7)
    layers = [layer_of(recipe=name, backend=b, dtype=torch.float64) for b in ALL]
    for layer in layers:
        layer.load_state_dict(theirs.state_dict())
        assert layer.running_count == -1
    for i, (x, dy) in enumerate(batches(SHAPES, dtype=torch.float64)):
        want, *others = (step(layer, x, dy) for layer in layers)
        for got in others:
            assert_same(got, want, 1e-10, f"at step {i}")


@pytest.mark.parametrize("size", [9, 200])  # above and below the switch to vectorised statistics
def test_a_channel_of_zeros_but_for_its_first_element_has_the_same_variance_on_every_backend(size):
    x = torch.zeros(2, 3, size, size)
    x[0, :, 0, 0] = torch.tensor([1.0, 30.0, -7.0])
    dy = torch.randn_like(x)
    want, *others = (step(layer_of(backend=b), x, dy) for b in ALL)
    for got in others:
        assert_same(got, want, 1e-5)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(1 << 15, 3), (40, 3, 501), (3, 3, 9, 31, 29)], ids=["2d", "3d", "5d"])
def test_statistics_of_large_inputs_of_every_rank_are_those_of_float64(shape, backend):
    x = torch.randn(shape) * 0.1 + 1e4
    layer = RunningBatchNorm(3, recipe=RECIPES["default"].but(elements=None), backend=backend)
    layer(x)
    var, mean = torch.var_mean(x.double(), dim=[d for d in range(len(shape)) if d != 1], correction=0)
    assert torch.allclose(layer.running_mean.double(), mean, rtol=1e-6)
    assert torch.allclose(layer.running_var.double(), var, rtol=1e-2)


def test_weight_alone_and_bias_alone_get_their_gradients_in_the_functional_form():
    x, dy = next(batches([(4, 5, 3)], dtype=torch.float64))
    for names in (("weight",), ("bias",), ("weight", "bias"), ()):
        found = []
        for backend in ALL:
            g = torch.Generator().manual_seed(5)
            given = {n: torch.randn(3, generator=g, dtype=torch.float64).requires_grad_() for n in names}
            state, z = NormState.new(3, dtype=torch.float64), x.clone().requires_grad_()
            y = running_batch_norm(z, state, **given, backend=backend)
            y.backward(dy)
            found.append({"y": y, "dx": z.grad, **{n: t.grad for n, t in given.items()}, **state._asdict()})
        for got in found[1:]:
            assert_same(got, found[0], 1e-10, str(names))


def test_functional_form_equals_the_layer():
    layer, state = layer_of(), NormState.new(3)
    for x, dy in batches(SHAPES):
        want, z = step(layer, x, dy), x.clone().requires_grad_()
        w, b = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
        y = running_batch_norm(z, state, w, b)
        y.backward(dy)
        assert_same({"y": y, "dx": z.grad, "dweight": w.grad, "dbias": b.grad, **state._asdict()}, want, 0)
    y = running_batch_norm(x, state, layer.weight, layer.bias, training=False)
    assert torch.equal(y, layer.eval()(x))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_serves_every_input_dtype_in_every_layer_dtype(dtype, x_dtype):
    layer, oracle = (layer_of(dtype=dtype, backend=b) for b in ("auto", "reference"))
    for x, dy in batches(SHAPES[:4], dtype=x_dtype):
        got, want = step(layer, x, dy), step(oracle, x, dy)
        assert got["y"].dtype == x_dtype and got["running_mean"].dtype == dtype
        assert_same(got, want, TOLERANCE[torch.bfloat16 if x_dtype == torch.bfloat16 else torch.float32])
    assert layer.eval()(x).dtype == x_dtype


def test_explain_names_the_backend_and_says_why():
    x = torch.randn(4, 3, 2, 2)
    assert RunningBatchNorm(3).explain(x).startswith("native: C kernels")
    assert RunningBatchNorm(3).explain(x.bfloat16()).startswith("fused: PyTorch's fused operators")
    assert "requested by name" in RunningBatchNorm(3, backend="reference").explain(x)
    assert RunningBatchNorm(3).explain(x.double()).startswith("reference: torch.float64 input")
    assert RunningBatchNorm(3, dtype=torch.float64).explain(x).startswith("reference: torch.float32 input")


def test_fused_by_name_says_what_it_cannot_serve_and_what_to_choose():
    layer = RunningBatchNorm2d(3, backend="fused")
    before = buffers(layer)
    with pytest.raises(ValueError, match="'fused' cannot be used here: torch.float64 input.*choose 'auto'"):
        layer(torch.randn(4, 3, 2, 2).double())
    assert_unmoved(layer, before)


PLAIN = [RECIPES["course"].but(clamp=Clamp(variance=None, deviation=0.1), name="by-deviation")]
PLAIN += [recipe for recipe in RECIPES.values() if recipe.plain_only]


@pytest.mark.parametrize("recipe", PLAIN, ids=lambda recipe: recipe.name)
def test_plain_recipes_run_only_on_the_reference_backend(recipe):
    x = torch.randn(4, 3, 2, 2)
    assert (
        RunningBatchNorm(3, recipe=recipe).explain(x)
        == f"reference: only the plain formulas implement the recipe '{recipe.name}'"
    )
    for backend in ("fused", "native"):
        layer = layer_of(recipe=recipe, backend=backend)
        before = buffers(layer)
        with pytest.raises(
            ValueError, match=f"'{backend}' cannot be used here: only the plain.*'{recipe.name}'.*'auto'"
        ):
            layer(x)
        assert_unmoved(layer, before)
        want = torch.nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
        assert torch.allclose(layer.eval()(x), want, atol=1e-6)  # evaluation has no recipe


def test_an_unknown_backend_is_refused_with_the_closest_name():
    with pytest.raises(ValueError, match="got 'fussed'. Did you mean 'fused'"):
        RunningBatchNorm(3, backend="fussed")
    with pytest.raises(ValueError, match="got 'referense'. Did you mean 'reference'"):
        running_batch_norm(torch.randn(2, 3), NormState.new(3), backend="referense")
