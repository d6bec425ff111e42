"""The published recipes against the thread's arithmetic, and the rules of Recipe itself."""

import copy
import pickle
import re

import pytest
import torch
from checks import PUBLISHED, ClosedForm, SumsOracle, relative_error
from norm.steps import ALL, layer_of

from fastrbn.norm import RECIPES, Clamp, Memory, Recipe, RunningBatchNorm, Skip, get_recipe

SHAPES = [(2, 7, 5), (3, 5, 5), (1, 9, 4), (8, 3, 3), (4, 1, 1), (5, 6, 2), (2, 8, 8), (7, 2, 3)]


def batches(shapes, nf=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    for i, (bs, h, w) in enumerate(shapes):
        x = torch.randn(bs, nf, h, w, generator=g, dtype=torch.float64) * (0.02 + i % 3) + 0.5 * i
        yield x, torch.randn(bs, nf, h, w, generator=g, dtype=torch.float64)


def step(layer, x, dy):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return {"y": y, "dx": x.grad, "dweight": layer.weight.grad.clone(), "dbias": layer.bias.grad.clone()}


def pair(name, nf=3):
    torch.manual_seed(1)
    ours, oracle = RunningBatchNorm(nf, recipe=name, dtype=torch.float64), SumsOracle(nf, **PUBLISHED[name])
    for a, b in zip(ours.parameters(), oracle.parameters(), strict=True):
        a.data.normal_()
        b.data.copy_(a.data)
    return ours, oracle


def assert_same(ours, oracle, data):
    for i, (x, dy) in enumerate(data):
        got, want = step(ours, x, dy), step(oracle, x, dy)
        want["running_mean"], want["running_var"] = oracle.stats()
        got["running_mean"], got["running_var"] = ours.running_mean, ours.running_var
        for what in want:
            assert relative_error(got[what], want[what]) < 1e-10, f"{what} at step {i}"
        assert ours.running_count.item() == pytest.approx(oracle.count, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_equals_the_threads_sums_over_eight_changing_batches(name):
    assert_same(*pair(name), batches(SHAPES))


@pytest.mark.parametrize(("name", "first"), [("skip-alternate", 600), ("skip-tenth", 5200)])
def test_skipping_begins_after_the_threshold_and_follows_the_iteration(name, first):
    data = batches([(first, 1, 1), (first, 1, 1), *[(4, 2, 2)] * 10])
    ours, oracle = pair(name)
    assert_same(ours, oracle, data)
    assert ours.num_batches_tracked == 12


def test_a_skipped_step_leaves_mean_and_variance_alone_and_sends_no_gradient_through_them():
    ours, _ = pair("skip-alternate")
    ours(torch.randn(1001, 3, dtype=torch.float64))
    before = copy.deepcopy(ours.state_dict())
    x, dy = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    got = step(ours, x, dy)
    for name in ("running_mean", "running_var", "running_count"):
        assert torch.equal(ours.state_dict()[name], before[name])
    assert torch.allclose(got["dx"], dy * ours.weight * (ours.running_var + ours.eps).rsqrt())


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("elements", [None, 40, 4096])
def test_the_default_equals_the_closed_form_while_its_memory_grows(elements, backend):
    """Before, during and after the growth of the memory, which ends at 6,000 samples."""
    recipe = RECIPES["default"].but(elements=elements)
    layer = layer_of(recipe=recipe, backend=backend, dtype=torch.float64)
    oracle = ClosedForm(3, layer.weight.data, layer.bias.data, averaged=True)
    rates = []
    for i, (x, dy) in enumerate(batches([*SHAPES, (700, 2, 3), *SHAPES, (20_000, 1, 1), (25, 1, 2), *SHAPES])):
        bs, positions = x.shape[0], x[0, 0].numel()
        read = None if elements is None else slice(0, max(16, -(-elements // positions)))
        rates.append(oracle.default_rate(bs))
        want, got = oracle.step(x, dy, rates[-1], read), step(layer, x, dy)
        for what, value in zip(got, want, strict=True):
            assert relative_error(got[what], value) < 1e-10, f"{what} at step {i}"
        assert relative_error(layer.running_grad, torch.stack([oracle.a_sum, oracle.b_sum])) < 1e-10, f"step {i}"
        assert layer.running_grad_weight.item() == pytest.approx(oracle.w, rel=1e-12)
        assert layer.running_count.item() == pytest.approx(oracle.count, rel=1e-12)
    assert rates[0] == 2 / 22 and rates[9] == pytest.approx(2 / (2 + 732 / 20)) and rates[-1] == 7 / 307


def test_a_memory_grows_with_the_samples_seen_between_bounds_set_by_mom():
    memory = Memory()
    for seen, samples in ((0, 20), (400, 20), (2000, 100), (6000, 300), (10**9, 300)):
        assert memory(0.1, 8, seen) == 8 / (8 + samples)
        assert memory(0.1, torch.tensor(8), torch.tensor(seen)).item() == pytest.approx(8 / (8 + samples))
        assert memory(0.1, 8, torch.tensor(seen, dtype=torch.float64)).item() == pytest.approx(8 / (8 + samples))
    assert memory(0.4, 8, 0) == 8 / 13 and memory(0.4, 8, 10**6) == 8 / 83
    assert Memory(least=4, most=40, share=0.02)(0.1, 8, 10_000) == 8 / 208
    assert Memory(least=3, most=3, share=0)(0.1, 1, 10**6) == 1 / 31
    inf = float("inf")  # a rate of 0 leaves the first batch 0/0
    wrong = [
        {"least": 0},
        {"least": 9, "most": 8},
        {"share": -1},
        {"most": float("nan")},
        {"least": "3"},
        {"most": None},
    ]
    for numbers in (*wrong, {"least": inf, "most": inf}, {"share": inf}):
        with pytest.raises(ValueError, match="`most` at least `least`.*got Memory"):
            Memory(**numbers)


@pytest.mark.parametrize("backend", ALL)
def test_a_recipes_own_rate_moves_statistics_and_averages_alike(backend):
    """Every backend passes it mom, the batch size, and the samples seen before this batch."""
    recipe = RECIPES["default"].but(rate=lambda mom, bs, samples: mom * bs / (bs + samples + 1), clamp=None)
    layer = layer_of(recipe=recipe, backend=backend, dtype=torch.float64)
    oracle = ClosedForm(3, layer.weight.data, layer.bias.data, averaged=True)
    for x, dy in batches(SHAPES):
        bs, rate = len(x), recipe.rate(0.1, len(x), oracle.samples)
        want = oracle.step(x, dy, rate, start=0.1 * bs / (bs + 1), floor_samples=0)
        got = step(layer, x, dy)
        assert all(relative_error(got[what], value) < 1e-10 for what, value in zip(got, want, strict=True))
    assert layer.running_grad_weight.item() == pytest.approx(oracle.w, rel=1e-12)


@pytest.mark.parametrize("backend", ALL)
def test_with_count_minus_1_a_batchs_share_is_its_rate(backend):
    layer = layer_of(backend=backend, dtype=torch.float64)
    layer.running_count.fill_(-1)
    layer.running_mean.fill_(2.0)
    layer.num_samples_tracked.fill_(4000)
    x = torch.randn(8, 3, 5, dtype=torch.float64)
    layer(x)
    rate, m, v = 8 / (8 + 200), x.mean((0, 2)), x.var((0, 2), correction=0)
    assert torch.allclose(layer.running_mean, 2 + rate * (m - 2))
    assert torch.allclose(layer.running_var, 1 - rate + rate * v + rate * (1 - rate) * (m - 2) ** 2)
    assert layer.running_count == 40 and layer.num_samples_tracked == 4008


def test_batch_recipe_is_batchnorm_in_training_and_in_evaluation():
    torch.manual_seed(0)
    ours = RunningBatchNorm(3, recipe="batch", dtype=torch.float64)
    theirs = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    for x, dy in batches([s for s in SHAPES if s[0] * s[1] > 1]):
        if x[:, 0].numel() == 1:
            continue
        got, want = step(ours, x, dy), step(theirs, x, dy)
        for what in want:
            assert relative_error(got[what], want[what]) < 1e-10, what
    assert torch.allclose(ours.running_mean, theirs.running_mean, rtol=1e-12)
    assert torch.allclose(ours.running_var, theirs.running_var, rtol=1e-12)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), rtol=1e-10)


def test_gradcheck_of_the_exact_backward_with_the_state_set_back_before_each_evaluation():
    torch.manual_seed(0)
    layer = RunningBatchNorm(2, recipe=RECIPES["course"].but(clamp=None), dtype=torch.float64)
    layer(torch.randn(6, 2, 3, dtype=torch.float64) + 1)
    frozen = {k: v.clone() for k, v in layer.state_dict().items()}

    def f(x, weight, bias):
        layer.load_state_dict(frozen)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 4), (2,), (2,))]
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(1, 2, 5, 5), (1, 2, 1, 1), (1, 2)])
def test_a_batch_of_one_works_in_every_recipe(name, shape):
    layer = RunningBatchNorm(2, recipe=name)
    for _ in range(3):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(b.isfinite().all() for b in layer.buffers())


def test_early_clamp_holds_only_while_young_and_spares_the_state():
    layer = RunningBatchNorm(1, recipe="course")
    x = torch.randn(10, 1, 3, 3) * 1e-3
    assert layer(x).std() < 0.02  # divided by 0.1, not by 1e-3
    assert layer.running_var.item() < 1e-5
    assert layer(x).std() > 0.1  # twenty samples seen


def test_an_unknown_recipe_is_refused_with_the_closest_name():
    with pytest.raises(ValueError, match="Did you mean 'skip-tenth'"):
        get_recipe("skip-tent")


@pytest.mark.parametrize(
    "bad",
    [
        {"backward": "exakt"},
        {"rate": 0.1},
        {"rate": "course"},
        {"elements": 0},
        {"elements": 1.5},
        {"elements": True},
        {"elements": "4"},
        {"clamp": 0.01},
        {"skip": (2, 1000)},
        {"statistics": "lagged"},
        {"order": "random"},
        {"skip": Skip(2, 0), "statistics": "batch"},
    ],
)
def test_an_invalid_recipe_is_refused(bad):
    value = next(iter(bad.values()))
    with pytest.raises(ValueError, match=re.escape(str(value))):
        Recipe("mine", **bad)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Clamp(samples="x"), "number of samples up to which the floor holds, 0 or more; got 'x'"),
        (lambda: Clamp(samples=-1), "0 or more; got -1"),
        (lambda: Clamp(deviation=0.1), "one floor.*`deviation` with variance=None; got variance=0.01, deviation=0.1"),
        (lambda: Clamp(variance=None), "one floor.*got variance=None, deviation=None"),
        (lambda: Clamp(variance=float("nan")), "one floor.*got variance=nan"),
        (lambda: Skip(0, 1000), "`every`, the period in iterations, must be a whole number, 1 or more; got 0"),
        (lambda: Skip(2.5, 1000), "1 or more; got 2.5"),
        (lambda: Skip(2, -1), "number of samples seen before the first skip, 0 or more; got -1"),
        (lambda: Skip(2, None), "got None"),
    ],
)
def test_an_invalid_clamp_or_skip_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("bad", [0, 0.0, 1.5, -0.1, float("nan"), None, "0.1", Memory()], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_a_rate_outside_0_to_1_is_refused_and_leaves_the_state(backend, bad):
    for rate in (lambda mom, bs, samples: bad, lambda mom, bs, samples: bad if samples == 0 else 0.1):
        layer = layer_of(recipe=RECIPES["default"].but(rate=rate, name="mine"), backend=backend)
        before = {name: b.clone() for name, b in layer.named_buffers()}
        with pytest.raises(ValueError, match=rf"number in \(0, 1\]; that of 'mine' gave {re.escape(repr(bad))}"):
            layer(torch.randn(4, 3, 5))
        assert all(torch.equal(b, before[name]) for name, b in layer.named_buffers())


def test_recipes_are_hashable_and_survive_pickling():
    for recipe in RECIPES.values():
        assert pickle.loads(pickle.dumps(recipe)) == recipe
        assert len({recipe, recipe.but(), recipe.but()}) == 2


@pytest.mark.parametrize(
    ("elements", "bs", "positions", "want"),
    [
        (None, 800, 4, 800),
        (4096, 512, 1024, 16),
        (4096, 512, 64, 64),
        (4096, 512, 63, 66),  # whole samples
        (4096, 512, 1, 512),  # there are no more
        (4096, 8, 65536, 8),
        (10, 512, 400, 16),  # at least 16 samples, however large
        (10, 7, 4, 7),
        (1, 40, 0, 16),
    ],
)
def test_statistics_read_whole_samples_until_they_have_enough(elements, bs, positions, want):
    assert RECIPES["default"].but(elements=elements).samples_read(bs, positions) == want


def test_strided_order_spreads_the_samples_over_the_batch():
    for backend in ALL:
        recipe = RECIPES["default"].but(elements=2, order="strided")  # 16 samples
        layer, x = RunningBatchNorm(1, recipe=recipe, backend=backend), torch.full((50, 1), 1e3)
        x[0:48:3, 0] = torch.arange(16.0)
        layer(x)
        assert layer.running_mean.item() == pytest.approx(7.5)


@pytest.mark.parametrize("backend", ALL)
def test_samples_that_were_read_and_hardly_vary_do_not_multiply_the_gradient_of_the_others(backend):
    """A nearly dead channel: the projection never divides by a variance below the one that normalises."""
    layer = layer_of(recipe=RECIPES["default"].but(elements=40), backend=backend, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for spread in (1e-4, 0.0):
        x, dy = (torch.randn(40, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
        x[:16] *= spread
        got = step(layer, x, dy)
        inv_std = (layer.running_var + layer.eps).rsqrt().view(1, 3, 1)
        x_hat = (x - layer.running_mean.view(1, 3, 1)) * inv_std
        bound = 2 * x_hat.abs().amax() * (dy * x_hat).mean((0, 2)).abs().amax()  # as of the exact backward
        taken = dy - got["dx"] / (layer.weight.detach().view(1, 3, 1) * inv_std)
        assert taken.abs().amax() <= bound
