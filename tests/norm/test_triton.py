"""The Triton kernels against the reference: on CUDA where there is one, else on the CPU under Triton's interpreter.

The interpreter must be asked for before Triton is imported, so a normal run of this file runs it once more in a
process of its own; the tests of the first process then need a GPU. Sizes are tiny, the interpreter being slow: tiles
are made smaller still, so that there are many.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from norm.steps import assert_same, assert_unmoved, buffers, layer_of, step

from fastrbn.norm import RECIPES, Clamp, Memory, NormState, RunningBatchNorm, Skip, dispatch, reference
from fastrbn.norm.recipes import Plan

triton = pytest.importorskip("triton", reason="the package triton is not installed")

from fastrbn.norm import triton_cuts as cuts  # noqa: E402
from fastrbn.norm import triton_kernels as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")  # NumPy's, on NaN

if INTERPRETED:  # it looks through the language's modules at each call of a function, which took half of the time
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    def patch_once(module, *args, patch=interpreter._patch_builtin, known={}):
        if module not in known:
            known[module] = next((name for name in dir(module) if is_builtin(getattr(module, name))), None)
        if known[module] is None or is_builtin(getattr(module, known[module])):  # not patched at present
            patch(module, *args)

    interpreter._patch_builtin = patch_once

# how programs share the work: all by one; two launches a pass, the second merging; a launch between for that
REGIMES = {
    "one": cuts.Tuning(),
    "inside": cuts.Tuning(one_program=0, tile_bytes=256, columns=8, programs=2, merge=1 << 20, together=2),
    "between": cuts.Tuning(one_program=0, tile_bytes=256, columns=2, programs=2, merge=0, together=4),
}
# odd, prime, one sample, one position; few positions (read as columns) and many (as planes)
SHAPES = [(5, 3, 4, 5), (5, 3, 3, 7), (17, 3, 2, 2), (1, 3, 1, 37), (2, 3, 1, 1), (1, 3, 1, 1), (1, 3, 6, 3)]
# of what is rounded to the dtype, relative to its norm; the interpreter cuts bfloat16 off where a device rounds
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3 if INTERPRETED else 1e-3, torch.float16: 2e-4}
BASE = RECIPES["default"]
DEFAULT = BASE.but(elements=None)
PARTIAL = BASE.but(elements=30)


@pytest.fixture(autouse=True)
def _where_kernels_run(request, monkeypatch):
    if "anywhere" in request.node.name:
        return
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(t):  # whatever a kernel does not write shows
        return t.fill_(float("nan") if t.dtype.is_floating_point else True if t.dtype is torch.bool else 77)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))


@pytest.fixture
def regime(request, monkeypatch):
    monkeypatch.setattr(cuts, "TUNING", REGIMES[request.param])
    return request.param


regimes = pytest.mark.parametrize("regime", REGIMES, indirect=True)


def batches(shapes, dtype=torch.float32, last=None):
    """x of changing mean and scale, and dy; channels last every other time unless `last` says."""
    g = torch.Generator().manual_seed(0)
    for i, shape in enumerate(shapes):
        x = (torch.randn(shape, generator=g) * (0.3 + i % 3) + 2 - i).to(DEVICE, dtype)
        dy = torch.randn(shape, generator=g).to(DEVICE, dtype)
        yield (laid_out(t, i % 2 if last is None else last) for t in (x, dy))


def laid_out(t, last):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t


def layers(recipe, nf=3, **settings):
    return [layer_of(nf, recipe, backend, **settings).to(DEVICE) for backend in ("reference", "triton")]


def assert_agree(recipe, shapes=SHAPES, tol=1e-5, dtype=torch.float32, last=None, **settings):
    """Outputs, gradients and buffers of both backends, after each of the steps; the layers."""
    want_layer, got_layer = layers(recipe, shapes[0][1], **settings)
    for i, (x, dy) in enumerate(batches(shapes, dtype, last)):
        want, got = (step(layer, x, dy) for layer in (want_layer, got_layer))
        for what in ("y", "dx"):
            assert got[what].dtype == dtype and got[what].stride() == x.stride(), what
        rounded = {"y", "dx"} if dtype != torch.float32 else set()
        assert_same(pick(got, rounded), pick(want, rounded), tol, f"step {i}, {tuple(x.shape)}")
        rest = set(want) - rounded
        assert_same(pick(got, rest), pick(want, rest), 1e-5, f"step {i}, {tuple(x.shape)}")
    return want_layer, got_layer


def pick(found, names):
    return {name: found[name] for name in found if name in names}


def plan_of(recipe, **more):
    return Plan(recipe, 0.1, 1e-5, **more)


def on_device(*tensors):
    return [t.to(DEVICE).requires_grad_(t.requires_grad) for t in tensors]


# --- equal to the reference


@pytest.mark.parametrize(
    ("recipe", "regime"),
    [
        (DEFAULT, "one"),
        (DEFAULT, "inside"),
        (DEFAULT, "between"),
        (PARTIAL.but(order="strided"), "between"),
        (RECIPES["course"].but(skip=Skip(2, 6)), "inside"),
        (RECIPES["batch"].but(clamp=Clamp(11, variance=8.0)), "between"),
        (RECIPES["leaning"].but(elements=None, memory=Memory(least=0.1, most=3, share=0.5)), "inside"),
    ],
    ids=["one", "inside", "between", "partial", "skip", "batch", "leaning"],
    indirect=["regime"],
)
def test_every_regime_equals_the_reference_in_outputs_gradients_and_buffers(recipe, regime):
    assert_agree(recipe, SHAPES if recipe is DEFAULT else SHAPES[:4])


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPES["course"],
        RECIPES["skip-alternate"].but(skip=Skip(2, 6)),
        RECIPES["detached"],
        RECIPES["batch"].but(backward="averaged"),
        RECIPES["batch"].but(backward="detached"),
        PARTIAL.but(kappa=1.0, skip=Skip(3, 4)),
        RECIPES["course"].but(elements=1),
        RECIPES["leaning"],
        RECIPES["leaning"].but(memory=Memory(least=0.1, most=3, share=0.5), skip=Skip(3, 4)),
        DEFAULT.but(memory=Memory(least=0.1, most=3, share=0.5)),
        DEFAULT.but(clamp=Clamp(100, variance=0.8)),
        DEFAULT.but(clamp=Clamp(100, variance=None, deviation=0.9)),
    ],
    ids=[
        "exact",
        "alternate",
        "detached",
        "batch-averaged",
        "batch-detached",
        "partial",
        "few",
        "leaning",
        "leaning-skip",
        "memory",
        "clamp",
        "deviation",
    ],
)
def test_every_recipe_equals_the_reference(recipe):
    assert_agree(recipe, [SHAPES[i] for i in (0, 3, 2, 4)])


@pytest.mark.parametrize("regime", ["one", "inside"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_differs_from_the_reference_by_its_own_rounding_at_most(dtype, regime):
    assert_agree(DEFAULT, SHAPES[1:3], ROUNDING[dtype], dtype)


@pytest.mark.parametrize("regime", ["inside", "between"], indirect=True)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 3, 2, 5)], ids=["2d", "3d", "5d"])
def test_every_rank_and_layout_without_affine(shape, last, regime):
    assert_agree(PARTIAL, [shape, (1, *shape[1:])], last=last, affine=False)


@pytest.mark.parametrize("nf", [1, 13])
def test_the_defaults_take_one_channel_and_thirteen(nf, monkeypatch):
    monkeypatch.setattr(cuts, "TUNING", cuts.Tuning(one_program=0))
    assert_agree(DEFAULT, [(2, nf, 3, 11), (2, nf, 3, 11), (17, nf, 2, 2)])


@pytest.mark.parametrize(("name", "regime"), [("default", "between"), ("batch", "one")], indirect=["regime"])
def test_loaded_statistics_count_as_old(name, regime):
    theirs = torch.nn.BatchNorm2d(3)
    theirs.running_mean.copy_(torch.tensor([1.0, -2.0, 0.1]))
    theirs.running_var.copy_(torch.tensor([0.003, 2.0, 5.0]))
    theirs.num_batches_tracked.fill_(7)
    both = layers(BASE if name == "default" else name)
    for layer in both:
        layer.load_state_dict(theirs.state_dict())
        assert layer.running_count == -1
    for i, (x, dy) in enumerate(batches(SHAPES[1:3])):
        want, got = (step(layer, x, dy) for layer in both)
        assert_same(got, want, 1e-5, f"at step {i}")


def test_other_memory_layouts_are_made_contiguous_and_gradients_may_be_expanded():
    want_layer, got_layer = layers(DEFAULT, 4)
    x = torch.randn(6, 2, 5, 4, device=DEVICE).permute(0, 3, 2, 1)  # (6, 4, 5, 2), neither layout
    for dy in (torch.randn(6, 4, 5, 2, device=DEVICE), torch.tensor(0.5, device=DEVICE).expand(6, 4, 5, 2)):
        want, got = (step(layer, x, dy) for layer in (want_layer, got_layer))
        assert_same(got, want, 1e-5)


@regimes
def test_statistics_keep_their_digits_at_a_large_mean_and_beside_an_outlier(regime):
    x = torch.randn(4, 3, 5, 7, device=DEVICE) * 0.1 + 1e4
    x[:, 1] -= 1e4
    x[0, 1, 0, 0] = 1e3
    layer = layers(RECIPES["course"])[1]
    layer(x)
    var, mean = torch.var_mean(x.double(), dim=[0, 2, 3], correction=0)
    assert ((layer.running_mean - mean).abs() <= 1e-7 * mean.abs() + 1e-5 * var.sqrt()).all()
    assert torch.allclose(layer.running_var.double(), var, rtol=1e-5)


# --- what is not to move


@pytest.mark.parametrize(
    ("bad", "regime"), [("nan", "one"), ("nan", "inside"), ("inf", "between")], indirect=["regime"]
)
def test_a_batch_that_is_not_finite_leaves_the_whole_state_and_shows_in_its_channel_alone(bad, regime):
    both = layers(DEFAULT)
    x, dy = next(batches(SHAPES))
    for layer in both:
        step(layer, x, dy)
    before = buffers(both[1])
    x = x.clone()
    x[1, 1, 2, 3] = float(bad)
    want, got = (layer(x) for layer in both)
    assert_unmoved(both[1], before)
    assert not got[1, 1, 2, 3].isfinite()
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert got[:, ::2].isfinite().all()


@pytest.mark.parametrize("regime", REGIMES, indirect=True)
@pytest.mark.parametrize("recipe", [DEFAULT, RECIPES["batch"]], ids=["default", "batch"])
def test_a_finite_batch_whose_squares_overflow_leaves_the_whole_state(recipe, regime):
    [layer] = layers(recipe)[1:]
    x, dy = next(batches(SHAPES))
    for steps in range(2):
        before, huge = buffers(layer), x.clone()
        huge[:, 1] = 3e19
        layer(huge)
        assert_unmoved(layer, before)
        step(layer, x, dy)
        assert layer.num_batches_tracked == steps + 1 and layer.running_var.isfinite().all()


@pytest.mark.parametrize("recipe", [DEFAULT, RECIPES["batch"], None], ids=["default", "batch", "evaluation"])
@pytest.mark.parametrize("relu", ["none", "before", "after"])
def test_many_gradients_at_once_are_those_of_a_backward_each(relu, recipe):
    x, w, b = (t.requires_grad_() for t in on_device(torch.randn(3, 2, 5), torch.randn(2), torch.randn(2)))
    [dys] = on_device(torch.randn(4, 3, 2, 5))

    def forward():
        state = NormState.new(2, DEVICE)
        if recipe is None:
            return kernels.evaluate(x, w, b, state, 1e-5, relu)
        return kernels.normalize(x, w, b, state, plan_of(recipe), relu)

    got = torch.autograd.grad(forward(), (x, w, b), dys, is_grads_batched=True)
    for i, dy in enumerate(dys):
        for many, one in zip(got, torch.autograd.grad(forward(), (x, w, b), dy), strict=True):
            assert torch.allclose(many[i], one, rtol=1e-5, atol=1e-5)


@regimes
def test_a_gradient_that_is_not_finite_leaves_the_averages_and_shows(regime):
    layer = layers(DEFAULT)[1]
    x, dy = next(batches(SHAPES))
    step(layer, x, dy)
    before = layer.running_grad.clone(), layer.running_grad_weight.clone()
    dy = dy.clone()
    dy[0, 2, 0, 0] = float("inf")
    got = step(layer, x, dy)
    assert torch.equal(layer.running_grad, before[0]) and torch.equal(layer.running_grad_weight, before[1])
    assert not got["dx"][:, 2].isfinite().any() and got["dx"][:, :2].isfinite().all()


@pytest.mark.parametrize("regime", ["inside", "between"], indirect=True)
def test_a_skipped_step_reads_no_statistics(regime):
    layer = layers(RECIPES["course"].but(skip=Skip(2, 0)))[1]
    x, dy = next(batches(SHAPES))
    step(layer, x, dy)
    mean = layer.running_mean.clone()
    got = step(layer, torch.full_like(x, float("nan")), dy)
    assert layer.num_batches_tracked == 2 and torch.equal(layer.running_mean, mean)
    assert got["y"].isnan().all()


def test_parameters_and_inputs_that_need_no_gradient_get_none_and_the_averages_stay_without_x():
    for needs in [(True, False, False), (False, True, True), (False, False, True), (True, True, False)]:
        found = []
        for backend in (reference, kernels):
            g = torch.Generator().manual_seed(1)
            x, w, b, dy = on_device(*(torch.randn(s, generator=g) for s in ((3, 2, 5), (2,), (2,), (3, 2, 5))))
            inputs = [t.requires_grad_(need) for t, need in zip((x, w, b), needs, strict=True)]
            state = NormState.new(2, DEVICE)
            backend.normalize(*inputs, state, plan_of(DEFAULT)).backward(dy)
            found.append((*(t.grad for t in inputs), *state))
        for want, got in zip(*found, strict=True):
            assert (got is None) == (want is None)
            assert got is None or torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", ["weight", "bias"])
def test_one_of_weight_and_bias_may_be_missing(given):
    found = []
    for backend in (reference, kernels):
        g = torch.Generator().manual_seed(1)
        x, p, dy = on_device(*(torch.randn(s, generator=g) for s in ((3, 2, 5), (2,), (3, 2, 5))))
        inputs = {"weight": None, "bias": None, given: p.requires_grad_()}
        y = backend.normalize(x.requires_grad_(), *inputs.values(), NormState.new(2, DEVICE), plan_of(DEFAULT))
        y.backward(dy)
        found.append({"y": y, "dx": x.grad, "dp": p.grad})
    assert_same(found[1], found[0], 1e-5)


@regimes
def test_two_runs_agree_to_the_bit(regime):
    runs = []
    for _ in range(2):
        layer = layers(DEFAULT)[1]
        runs.append([step(layer, x, dy) for x, dy in batches(SHAPES[1:2])])
    for one, other in zip(*runs, strict=True):
        assert_same(one, other, 0)


# --- evaluation, second runs, second derivatives


@pytest.mark.parametrize("regime", ["one", "between"], indirect=True)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_evaluation_equals_the_reference_though_the_state_moves_before_its_backward(last, regime):
    both = layers(DEFAULT)
    for x, dy in batches(SHAPES[1:2], last=last):
        found = []
        for layer in both:
            step(layer, x, dy)
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            layer.zero_grad()
            y = layer.eval()(given)
            with torch.no_grad():
                assert torch.equal(layer(x), y)
                layer.train()(x + 3)
            y.backward(dy)
            found.append({"y": y, "dx": given.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad})
        assert_same(found[1], found[0], 1e-5)


def test_an_empty_batch_passes_through():
    layer = layers(DEFAULT)[1]
    before = buffers(layer)
    x = torch.zeros(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert_unmoved(layer, before)


@pytest.mark.parametrize(
    ("recipe", "reentrant"),
    [(DEFAULT, False), (RECIPES["course"].but(skip=Skip(2, 0)), True)],
    ids=["default", "skip"],
)
def test_checkpointing_moves_the_state_once_and_gives_the_same_gradients(recipe, reentrant):
    plain, again = (layers(recipe)[1] for _ in range(2))
    for shapes in (SHAPES[:2], SHAPES[2:4]):
        found = []
        for layer, run in (
            (plain, lambda f, x: f(x)),
            (again, lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=reentrant)),
        ):
            given = [(x.clone().requires_grad_(), dy) for x, dy in batches(shapes, last=False)]
            ys = [run(layer, x) for x, _ in given]  # two forwards in flight
            layer.zero_grad()
            torch.autograd.backward(ys, [dy for _, dy in given])
            grads = {f"dx{i}": x.grad for i, (x, _) in enumerate(given)}
            found.append({**grads, "dw": layer.weight.grad.clone(), **buffers(layer)})
        assert_same(
            pick(found[1], {*found[0]} - {"running_grad"}), pick(found[0], {*found[0]} - {"running_grad"}), 1e-5
        )


@pytest.mark.parametrize("relu", ["none", "before", "after"])
@pytest.mark.parametrize("recipe", [DEFAULT, RECIPES["batch"], None], ids=["default", "batch", "evaluation"])
def test_second_derivatives_are_the_references(recipe, relu):
    found = []
    for backend in (reference, kernels):
        g = torch.Generator().manual_seed(3)
        x, w, b, dy, v = on_device(
            *(torch.randn(s, generator=g) for s in ((3, 2, 5), (2,), (2,), (3, 2, 5), (3, 2, 5)))
        )
        inputs = [t.requires_grad_() for t in (x, w, b, dy)]
        state = NormState.new(2, DEVICE)

        def forward(x, w, b, backend=backend, state=state):
            more = {"relu": relu} if backend is kernels else {}
            x = x.relu() if backend is reference and relu == "before" else x
            if recipe is None:
                y = backend.evaluate(x, w, b, state, 1e-5, **more)
            else:
                y = backend.normalize(x, w, b, state, plan_of(recipe), **more)
            return y.relu() if backend is reference and relu == "after" else y

        (dx,) = torch.autograd.grad(forward(x, w, b), x, dy, create_graph=True)
        found.append(dict(zip("xwbd", torch.autograd.grad((dx * v).sum(), inputs, allow_unused=True), strict=True)))
    for name in "xwbd":
        want, got = (f[name] for f in found)
        want = torch.zeros_like(inputs["xwbd".index(name)]) if want is None else want
        assert got is None and not want.any() or torch.allclose(got, want, rtol=1e-4, atol=1e-5), name


# --- what the kernels do beside


@regimes
@pytest.mark.parametrize("where", ["before", "after"])
def test_relu_before_or_after_is_autograds(where, regime):
    for i, (x, dy) in enumerate(batches([(2, 3, 3, 7), (5, 3, 2, 2)])):
        x[0, 0, 0, 0] = 0.0  # where relu has two slopes, PyTorch's is 0
        found = []
        for fused in (False, True):
            state = NormState.new(3, DEVICE)
            g = torch.Generator().manual_seed(i)
            w, b = (t.requires_grad_() for t in on_device(torch.randn(3, generator=g), torch.randn(3, generator=g)))
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            if fused:
                y = kernels.normalize(given, w, b, state, plan_of(PARTIAL), relu=where)
            else:
                y = reference.normalize(given.relu() if where == "before" else given, w, b, state, plan_of(PARTIAL))
                y = y.relu() if where == "after" else y
            y.backward(dy)
            with torch.no_grad():
                if fused:
                    e = kernels.evaluate(x, w, b, state, 1e-5, relu=where)
                else:
                    e = reference.evaluate(x.relu() if where == "before" else x, w, b, state, 1e-5)
                    e = e.relu() if where == "after" else e
            found.append({"y": y, "e": e, "dx": given.grad, "dw": w.grad, "db": b.grad, **state._asdict()})
        assert_same(found[1], found[0], 1e-5, f"{where}, {tuple(x.shape)}")


def test_relu_lets_a_nan_through():
    x = torch.tensor([[1.0], [float("nan")], [-1.0]], device=DEVICE)
    for where in ("before", "after"):
        y = kernels.normalize(x, None, None, NormState.new(1, DEVICE), plan_of(DEFAULT), relu=where)
        assert y[1].isnan() and not y[::2].isnan().any()


def test_relu_elsewhere_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="got 'befor'. Did you mean 'before'"):
        kernels.normalize(torch.randn(2, 3), None, None, NormState.new(3), plan_of(DEFAULT), relu="befor")


def test_a_state_that_is_not_contiguous_is_refused():
    state = NormState.new(4, DEVICE)
    state = state._replace(running_mean=torch.zeros(8, device=DEVICE)[::2])
    with pytest.raises(ValueError, match="contiguous state: make it so"):
        kernels.normalize(torch.randn(2, 4, device=DEVICE), None, None, state, plan_of(DEFAULT))


# --- on a device alone


def _large(shape, dtype, last):
    x = torch.randn(shape, device=DEVICE, dtype=dtype) * 2 + 1
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("recipe", [DEFAULT, BASE, RECIPES["course"]], ids=["all", "some", "exact"])
@pytest.mark.parametrize("shape", [(32, 64, 14, 14), (64, 64, 32, 32), (16, 256, 7, 7), (128, 24, 57, 53)])
def test_cuda_real_sizes_equal_the_reference(shape, recipe, last, dtype):
    want_layer, got_layer = layers(recipe, shape[1])
    for i in range(3):
        x, dy = _large(shape, dtype, last), _large(shape, dtype, last)
        want, got = (step(layer, x, dy) for layer in (want_layer, got_layer))
        assert got["dx"].stride() == x.stride()
        assert_same(pick(got, {"y", "dx"}), pick(want, {"y", "dx"}), ROUNDING[dtype], f"step {i}")
        assert_same(pick(got, set(got) - {"y", "dx"}), pick(want, set(got) - {"y", "dx"}), 2e-5, f"step {i}")


@pytest.mark.skipif(INTERPRETED, reason="needs a device")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_cuda_more_elements_than_32_bits_count(last):
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free device memory")
    shape = (2**31 // (64 * 64 * 64) + 3, 64, 64, 64)
    x = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    for part in x:
        part.normal_()
    assert x.numel() > 2**31
    layer = layers(DEFAULT, 64)[1]
    x.requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    inv = (layer.running_var + layer.eps).rsqrt()
    for i in (0, len(x) // 2, len(x) - 1):
        want = (x[i].float() - layer.running_mean.view(-1, 1, 1)) * (inv * layer.weight).view(-1, 1, 1)
        want = want + layer.bias.view(-1, 1, 1)
        assert torch.allclose(y[i].float(), want, rtol=1e-2, atol=2e-2)
    assert x.grad[-1].float().abs().max() < 1e-2  # dy = 1 lies in what the gradient leaves out


@pytest.mark.skipif(INTERPRETED, reason="needs a device")
@pytest.mark.parametrize("shape", [(2, 8, 14, 14), (32, 64, 14, 14)])
def test_cuda_a_graph_records_a_step_and_nothing_waits_for_the_device(shape):
    recorded, plain = (layers(RECIPES["skip-tenth"].but(skip=Skip(3, 10)), shape[1])[1] for _ in range(2))
    x, dy = torch.zeros(shape, device=DEVICE, requires_grad=True), torch.zeros(shape, device=DEVICE)

    def run(layer):
        x.grad = None
        layer.zero_grad(set_to_none=True)
        y = layer(x)
        y.backward(dy)
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        run(recorded)
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    recorded.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(recorded)
    dx = x.grad
    recorded.reset_running_stats()
    for _ in range(7):
        new_x, new_dy = torch.randn(shape, device=DEVICE) + 1, torch.randn(shape, device=DEVICE)
        with torch.no_grad():
            x.copy_(new_x)
        dy.copy_(new_dy)
        graph.replay()
        want = step(plain, new_x, new_dy)
        assert_same({"y": y.detach(), "dx": dx, **buffers(recorded)}, pick(want, {"y", "dx", *buffers(plain)}), 1e-6)


# --- without kernels


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("tuning", REGIMES.values(), ids=REGIMES)
def test_anywhere_every_tile_belongs_to_one_program(tuning, last):
    for n, c, positions, kept in [(1, 1, 1, 1), (7, 5, 37, 3), (64, 64, 49, 64), (128, 3, 3136, 2), (33, 700, 4, 33)]:
        job = cuts.job_for(n, c, positions, last, 4, kept, 1, 132, tuning)
        planes, rows, cols, vec, _, partial = (f.value for f in job.cut)
        width = job.shape.units * vec
        assert job.rows * width * (c if planes else 1) == n * c * positions
        assert partial == (kept < n) and job.read_rows * n == job.rows * kept
        across = -(-width // cols)
        assert job.tiles == -(-job.rows // rows) * (across if planes else 1)
        assert job.blocks == (c if planes else across)
        for passage, tiles in ((job.statistics, job.read_tiles), (job.sums, job.tiles)):
            assert 1 <= passage.slots <= tiles and 1 <= passage.then <= job.tiles
            owners = [tile for slot in range(passage.slots) for tile in range(slot, tiles, passage.slots)]
            assert sorted(owners) == list(range(tiles))


def test_anywhere_batches_of_other_sizes_compile_nothing_new():
    for c, positions, last in [(64, 3136, False), (64, 3136, True), (256, 49, False), (512, 1, False)]:
        found = {
            (*(f.value for f in job.cut), job.common["num_warps"], job.channels, job.parts, job.parts_inside)
            for job in (cuts.job_for(n, c, positions, last, 2, n, 1, 132, cuts.Tuning()) for n in range(64, 600, 7))
        }
        assert len(found) == 1


def test_anywhere_rows_beyond_counting_are_refused():
    with pytest.raises(ValueError, match="takes at most 2147418112 rows.*choose backend 'fused'"):
        cuts.job_for(2**16, 2, 2**16, True, 2, 1, 1, 132, cuts.Tuning())


def test_anywhere_auto_takes_triton_on_cuda_when_switched_on(monkeypatch):
    on_cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, is_meta=False, is_cpu=False)
    state = NormState.new(2)
    assert dispatch.choose(on_cuda, state)[0] == "fused"
    monkeypatch.setattr(dispatch, "_TRITON_BY_DEFAULT", True)
    assert dispatch.choose(on_cuda, state) == ("triton", "its kernels for CUDA tensors")
    assert dispatch.choose(torch.randn(2, 2).bfloat16(), state)[0] == "fused"
    assert dispatch.choose(on_cuda, NormState.new(2, dtype=torch.float64))[0] == "reference"
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert dispatch.choose(on_cuda, state) == (
        "fused",
        "PyTorch's fused operators and a backward in closed form; not Triton's kernels: the package triton is not "
        "installed",
    )


class _NoDevice:
    """As much of a driver as compiling for an H100 or H200 takes."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="kernels are run")
def test_anywhere_every_kernel_compiles_for_a_device(monkeypatch, tmp_path):
    made = {}

    def compile_only(kernel, grid):
        def launch(*args, **options):
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            made.setdefault(kernel.__name__, []).append("cubin" in compiled.asm)

        return launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(kernels, "_processors", lambda device: 132)
    monkeypatch.setattr(triton.runtime.driver, "_active", _NoDevice())
    for shape, last, recipe, relu, dtype in [
        ((2, 8, 14, 14), False, DEFAULT, "none", torch.float32),
        ((8, 16, 24, 24), False, BASE.but(elements=600, order="strided"), "after", torch.bfloat16),
        ((64, 64, 24, 24), True, RECIPES["skip-tenth"], "before", torch.float16),
    ]:
        x, w = torch.zeros(shape, dtype=dtype), torch.ones(shape[1], requires_grad=True)
        x = laid_out(x, last).requires_grad_()
        state = NormState.new(shape[1])
        y = kernels.normalize(x, w, w, state, plan_of(recipe), relu=relu)
        if last:
            y = y + kernels.evaluate(x, w, w, state, 1e-5)
        y.backward(y)
    assert {name: len(done) for name, done in made.items() if all(done)} == {
        "forward_kernel": 1,
        "backward_kernel": 1,
        "statistics_kernel": 2,
        "advance_kernel": 1,
        "map_kernel": 3,
        "sweep_kernel": 5,
        "settle_kernel": 2,
    }


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
def test_anywhere_cpu_tensors_need_the_interpreter():
    layer = RunningBatchNorm(3, recipe=BASE, backend="triton")
    with pytest.raises(
        ValueError, match="'triton' cannot be used here: it takes CUDA .*TRITON_INTERPRET=1.*on cpu; choose"
    ):
        layer(torch.randn(2, 3))
    with pytest.raises(ValueError, match="got torch.float64 and torch.float64; choose 'auto'"):
        RunningBatchNorm(3, recipe=BASE, dtype=torch.float64, backend="triton")(torch.randn(2, 3).double())


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.5.0" and triton.__version__ < "3.7",
    reason="this Triton's interpreter fails under this NumPy",
)
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="kernels are run")
def test_anywhere_these_tests_pass_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
