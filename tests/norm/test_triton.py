"""The Triton kernels against the reference: on CUDA where there is one, else on the CPU under Triton's interpreter.

The interpreter must be asked for before Triton is imported, so without it these tests need a GPU, and
`test_triton_anywhere.py` runs this file once more in a process with it. Sizes are tiny because the interpreter is slow:
tiles are made smaller still, so that there are many.
"""

import os

import pytest
import torch
from norm.steps import assert_same, assert_unmoved, buffers, layer_of, step

from fastrbn.norm import RECIPES, NormState, reference
from fastrbn.norm.recipes import Plan, rate_course

triton = pytest.importorskip("triton", reason="the package triton is not installed")

from fastrbn.norm import triton_kernels as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),  # NumPy's, on NaN
    *([] if INTERPRETED else [pytest.mark.cuda]),
]

if INTERPRETED:  # it looks through the language's modules at each call of a function, which took half of the time
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    def patch_once(module, *args, patch=interpreter._patch_builtin, known={}):
        if module not in known:
            known[module] = next((name for name in dir(module) if is_builtin(getattr(module, name))), None)
        if known[module] is None or is_builtin(getattr(module, known[module])):  # not patched at present
            patch(module, *args)

    interpreter._patch_builtin = patch_once

# odd, prime, one sample, one position, many positions
SHAPES = [(5, 3, 4, 5), (17, 3, 2, 2), (40, 3, 1, 3), (1, 3, 1, 37), (2, 3, 1, 1)]
# of what is rounded to the dtype, relative to its norm; the interpreter cuts bfloat16 off where a device rounds
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3 if INTERPRETED else 1e-3, torch.float16: 5e-4}
DEFAULT = RECIPES["default"]
RULES = {
    "default": DEFAULT,
    "course's rate": DEFAULT.but(rate=rate_course),
    "strided": DEFAULT.but(elements=30, order="strided"),
    "few": DEFAULT.but(elements=30, clamp=None),
    "by samples": DEFAULT.but(rate=lambda mom, bs, samples: 1 - (1 - mom) * 0.5 ** (samples / 64)),
}


@pytest.fixture(autouse=True)
def _tiles_and_memory(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(kernels, "TILE", 64)
        monkeypatch.setattr(kernels, "PROGRAMS", 8)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))  # unwritten: seen


def batch(shape, i=0, dtype=torch.float32, last=False):
    g = torch.Generator().manual_seed(i)
    x = (torch.randn(shape, generator=g) * (0.3 + i % 3) + 2 - i).to(DEVICE, dtype)
    dy = torch.randn(shape, generator=g).to(DEVICE, dtype)
    return [t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t for t in (x, dy)]


def layers(recipe, nf=3, **settings):
    return [layer_of(nf, recipe, backend, **settings).to(DEVICE) for backend in ("reference", "triton")]


def assert_agree(both, x, dy, tol=1e-5, note=""):
    want, got = (step(layer, x, dy) for layer in both)
    assert got["y"].stride() == x.stride() and got["dx"].dtype == x.dtype
    for name in want:
        assert_same({name: got[name]}, {name: want[name]}, tol if name in ("y", "dx") else 1e-5, note)


# the layout decides where elements lie; of the rules, those of which elements are read meet it
@pytest.mark.parametrize(
    "rule, last",
    [*((rule, False) for rule in RULES), *((rule, True) for rule in ("default", "strided"))],
)
def test_outputs_gradients_and_buffers_over_several_steps_equal_the_references(rule, last):
    both = layers(RULES[rule])
    for i, shape in enumerate(SHAPES):
        assert_agree(both, *batch(shape, i, last=last), note=f"step {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_differs_by_its_own_rounding_at_most(dtype):
    both = layers(DEFAULT)
    for i, shape in enumerate(SHAPES[:3]):
        assert_agree(both, *batch(shape, i, dtype, i % 2), ROUNDING[dtype])


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 3, 2, 5)], ids=str)
def test_every_rank_without_affine(shape):
    assert_agree(layers(DEFAULT, shape[1], affine=False), *batch(shape))


def test_statistics_keep_their_digits_at_a_large_mean_and_beside_an_outlier():
    x = torch.randn(4, 3, 5, 7, device=DEVICE) * 0.1 + 1e4
    x[:, 1] -= 1e4
    x[0, 1, 0, 0] = 1e3
    layer = layers(DEFAULT)[1]
    layer(x)
    var, mean = torch.var_mean(x.double(), dim=[0, 2, 3], correction=0)
    assert ((layer.running_mean - mean).abs() <= 1e-7 * mean.abs() + 1e-5 * var.sqrt()).all()
    assert torch.allclose(layer.running_var.double(), var, rtol=1e-5)  # the share is exactly 1 too


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e19])
def test_a_batch_that_is_not_finite_leaves_the_whole_state(bad):
    [layer] = layers(DEFAULT)[1:]
    for _ in range(2):
        x, dy = batch(SHAPES[0])
        before = buffers(layer)
        x[1, 1, 2, 3] = bad
        layer(x)
        assert_unmoved(layer, before)
        step(layer, *batch(SHAPES[0]))


def test_a_gradient_that_is_not_finite_leaves_the_averages():
    [layer] = layers(DEFAULT)[1:]
    x, dy = batch(SHAPES[0])
    step(layer, x, dy)
    before = layer.running_grad.clone(), layer.running_grad_weight.clone()
    dy[0, 2, 0, 0] = float("inf")
    dx = step(layer, x, dy)["dx"]
    assert torch.equal(layer.running_grad, before[0]) and torch.equal(layer.running_grad_weight, before[1])
    assert not dx[:, 2].isfinite().any() and dx[:, :2].isfinite().all()


def test_loaded_statistics_count_as_old():
    theirs = torch.nn.BatchNorm2d(3)
    theirs.running_var.copy_(torch.tensor([0.003, 2.0, 5.0]))
    both = layers(DEFAULT)
    for layer in both:
        layer.load_state_dict(theirs.state_dict())
        assert layer.running_count == -1
    for i in range(2):
        assert_agree(both, *batch(SHAPES[0], i))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_moves_the_state_once_and_gives_the_same_gradients(reentrant):
    found = []
    for again in (False, True):
        [layer] = layers(DEFAULT)[1:]
        (x, dy), run = batch(SHAPES[0]), torch.utils.checkpoint.checkpoint
        x.requires_grad_()
        (run(layer, x, use_reentrant=reentrant) if again else layer(x)).backward(dy)
        found.append({"dx": x.grad, "dw": layer.weight.grad, **buffers(layer)})
    assert_same(found[1], found[0], 1e-5)


@pytest.mark.parametrize("many", [False, True], ids=["second", "batched"])
def test_second_derivatives_and_batched_gradients_equal_the_references(many):
    found = []
    for backend in (reference, kernels):
        g = torch.Generator().manual_seed(3)
        x, w, b = (torch.randn(s, generator=g).to(DEVICE).requires_grad_() for s in ((3, 2, 5), (2,), (2,)))
        dys = torch.randn((4, 3, 2, 5), generator=g).to(DEVICE)
        y = backend.normalize(x, w, b, NormState.new(2, DEVICE), Plan(DEFAULT, 0.1, 1e-5))
        if many:
            grads = torch.autograd.grad(y, (x, w, b), dys, is_grads_batched=True)
        else:
            (dx,) = torch.autograd.grad(y, x, dys[0], create_graph=True)
            grads = torch.autograd.grad((dx * dys[1]).sum(), (x, w))
        found.append(dict(zip("xwb", grads, strict=False)))
    assert_same(found[1], found[0], 1e-5)


def test_a_state_that_is_not_contiguous_is_refused():
    state = NormState.new(4, DEVICE)._replace(running_mean=torch.zeros(8, device=DEVICE)[::2])
    with pytest.raises(ValueError, match="contiguous state tensors: call"):
        kernels.normalize(torch.randn(2, 4, device=DEVICE), None, None, state, Plan(DEFAULT, 0.1, 1e-5))
