"""The published recipes against the thread's arithmetic, and the rules of Recipe itself."""

import copy
import pickle
import re

import pytest
import torch
from checks import PUBLISHED, ClosedForm, SumsOracle, relative_error
from norm.steps import ALL

from fastrbn.norm import RECIPES, Memory, Recipe, RunningBatchNorm, get_recipe
from fastrbn.norm.recipes import rate_at_first, rate_backward

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


@pytest.mark.parametrize("elements", [None, 20])
@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0])
def test_averaged_backward_equals_the_closed_form(kappa, elements):
    recipe = RECIPES["default"].but(kappa=kappa, elements=elements)
    layer = RunningBatchNorm(3, recipe=recipe, dtype=torch.float64)
    for p in layer.parameters():
        p.data.normal_()
    oracle = ClosedForm(3, layer.weight.data, layer.bias.data, kappa=kappa, averaged=True)
    for i, (x, dy) in enumerate(batches(SHAPES)):
        bs, positions = x.shape[0], x[0, 0].numel()
        read = None if elements is None else slice(0, min(bs, -(-elements // positions)))
        want = oracle.step(x, dy, oracle.default_rate(x, read), rate_backward(0.1, bs, bs * positions), read)
        got = step(layer, x, dy)
        for what, value in zip(got, want, strict=True):
            assert relative_error(got[what], value) < 1e-10, f"{what} at step {i}"
        assert relative_error(layer.running_grad, torch.stack([oracle.a_sum, oracle.b_sum])) < 1e-10, f"step {i}"


@pytest.mark.parametrize("backend", ALL)
def test_a_steady_recipe_remembers_long_until_the_means_drift(backend):
    recipe = RECIPES["default"].but(steady=1000)
    layer = RunningBatchNorm(64, recipe=recipe, backend=backend, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)

    def rate_taken(x):
        before, n = layer.running_count.item(), len(x)
        layer(x)
        return (layer.running_count.item() - before) / (n - before) if n != before else None

    def draw(n):
        return torch.randn(n, 64, generator=g, dtype=torch.float64)

    layer(draw(16))
    for _ in range(200):
        layer(draw(16))
    calm = [rate_taken(draw(n)) for n in (8, 24) * 20]
    assert max(calm[0::2]) < 2.6 * 8 / 1000 and max(calm[1::2]) < 2.6 * 24 / 1000
    assert min(calm[0::2]) >= 8 / 1000 * (1 - 1e-9)
    layer.num_samples_tracked.fill_(12_000)
    assert rate_taken(draw(8) + 10) == pytest.approx(8 / (8 + 60))  # what `memory` allows is the most


@pytest.mark.parametrize("leaning", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_a_memory_binds_state_and_step_or_in_a_leaning_recipe_the_state_alone(backend, leaning):
    recipe = RECIPES["leaning"].but(leaning=leaning, backward="exact", elements=None, steady=None, clamp=None)
    layer = RunningBatchNorm(3, recipe=recipe, backend=backend, dtype=torch.float64)
    mean, var, count, samples = torch.zeros(3), torch.ones(3), 0.0, 0

    def moved(x, rate):
        n = x[:, 0].numel()
        now = rate * n + (1 - rate) * count
        a, m, v = rate * n / now, x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        return mean + a * (m - mean), (1 - a) * var + a * v + a * (1 - a) * (m - mean) ** 2, now

    for i, (x, dy) in enumerate(batches([*SHAPES, (900, 2, 2), (8, 3, 3), (12_000, 1, 1), (3, 5, 2)])):
        bs, leaf = len(x), x.clone().requires_grad_()
        bound = bs / (bs + min(max(0.02 * samples, 40), 400))
        used_mean, used_var, _ = moved(leaf, bs / (bs + 10) if leaning else bound)
        want = (leaf - used_mean.view(-1, 1, 1)) / (used_var.view(-1, 1, 1) + layer.eps).sqrt()
        want.backward(dy)
        mean, var, count = moved(x, bound)
        samples += bs
        got = step(layer, x, dy)
        for what, ours, theirs in (
            ("y", got["y"], want),
            ("dx", got["dx"], leaf.grad),
            ("running_mean", layer.running_mean, mean),
            ("running_var", layer.running_var, var),
        ):
            assert relative_error(ours, theirs) < 1e-10, f"{what} at step {i}"
        assert layer.running_count.item() == pytest.approx(count)


def test_a_memory_grows_with_what_was_seen_between_bounds_that_mom_sets():
    memory = RECIPES["leaning"].memory
    assert [memory.rate(0.1, 8, seen) for seen in (0, 2000, 10_000, 10**6)] == [8 / 48, 8 / 48, 8 / 208, 8 / 408]
    assert memory.rate(0.4, 8, 0) == 8 / 18 and memory.rate(0.4, 8, 10**6) == 8 / 108
    for numbers in ({"least": 0}, {"least": 9, "most": 8}, {"share": -1}):
        with pytest.raises(ValueError, match="`most` at least `least`"):
            Memory(**numbers)


def test_the_defaults_rate_starts_from_a_third_of_the_batch_between_bounds_that_mom_sets():
    sizes, memories = (1, 8, 60, 90, 120, 512), (20, 20, 20, 30, 40, 40)
    for bs, memory in zip(sizes, memories, strict=True):
        assert rate_at_first(0.1, bs, 1) == pytest.approx(bs / (bs + memory))
        assert rate_at_first(0.1, torch.tensor(bs), 1).item() == pytest.approx(bs / (bs + memory))
    assert rate_at_first(0.4, 8, 1) == pytest.approx(8 / 13) and rate_at_first(0.4, 512, 1) == pytest.approx(512 / 522)


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


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'skip-tenth'"):
        get_recipe("skip-tent")


@pytest.mark.parametrize(
    "bad",
    [
        {"backward": "exakt"},
        {"kappa": 2.0},
        {"elements": 0},
        {"statistics": "lagged"},
        {"order": "random"},
        {"steady": "long"},
        {"memory": Memory(), "statistics": "batch"},
        {"memory": 40},
        {"leaning": True},
    ],
)
def test_a_recipe_outside_its_rules_says_what_came(bad):
    value = next(iter(bad.values()))
    with pytest.raises(ValueError, match=re.escape(str(value))):
        Recipe("mine", **bad)


def test_recipes_are_hashable_and_survive_pickling():
    for recipe in RECIPES.values():
        assert pickle.loads(pickle.dumps(recipe)) == recipe
        assert len({recipe, recipe.but(), recipe.but()}) == 2


@pytest.mark.parametrize(
    ("elements", "bs", "positions", "want"),
    [(None, 8, 4, 8), (4096, 512, 1024, 16), (4096, 512, 64, 64), (10, 8, 4, 3), (99, 8, 4, 8)],
)
def test_statistics_read_whole_samples_until_they_have_enough(elements, bs, positions, want):
    assert RECIPES["default"].but(elements=elements).samples_read(bs, positions) == want


def test_strided_order_spreads_the_samples_over_the_batch():
    layer = RunningBatchNorm(1, recipe=RECIPES["batch"].but(elements=2, order="strided"))
    layer(torch.tensor([0.0, 10.0, 4.0, 10.0]).view(4, 1))
    assert layer.running_mean.item() == pytest.approx(0.1 * 2.0)
