"""recompute_statistics, and other code that collects statistics the same way: update_bn, Lightning's SWA."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from norm.steps import assert_same, buffers
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from fastrbn.norm import RECIPES, RunningBatchNorm, RunningBatchNorm1d, RunningBatchNorm2d, recompute_statistics

KINDS = pytest.mark.parametrize("kind", [RunningBatchNorm1d, nn.BatchNorm1d])


def mlp(*kinds, dropout=0.0):
    torch.manual_seed(0)
    layers, width = [], 6
    for kind in kinds:
        layers += [nn.Linear(width, 8), kind(8), nn.ReLU(), nn.Dropout(dropout)]
        width = 8
    return nn.Sequential(*layers, nn.Linear(width, 3))


def samples(n=60, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def of_first_layer(model, x):
    """Mean and variance of what the first norm sees, by the rule of its kind."""
    h = model[0](x).detach().double()
    return h.mean(0), h.var(0, correction=int(isinstance(model[1], nn.BatchNorm1d)))


@KINDS
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 59), max_size=6))
def test_the_statistics_are_those_of_all_samples_however_they_are_batched(kind, cuts):
    model, x = mlp(kind), samples()
    with torch.no_grad():
        model[1].running_mean.fill_(5.0)  # forgotten
    cuts = sorted({0, 60, *cuts})
    assert recompute_statistics(model, [(x[a:b], None) for a, b in zip(cuts, cuts[1:])]) is model
    mean, var = of_first_layer(model, x)
    assert torch.allclose(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    assert torch.allclose(model[1].running_var.double(), var, rtol=1e-5)
    assert model[1].num_batches_tracked == len(cuts) - 1


@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_deeper_layers_see_their_evaluation_input(batch_size):
    """Batches of one included, in which nn.BatchNorm's update makes everything zero."""
    model, x = mlp(*3 * [RunningBatchNorm1d]), samples(2000)
    recompute_statistics(model, x.split(batch_size))
    h = x
    for layer in model.eval():
        if isinstance(layer, RunningBatchNorm1d):
            off = (layer.running_mean - h.mean(0)) / (h.std(0) + 1e-3)  # a ReLU may leave almost nothing
            assert off.abs().max() < 0.1
        h = layer(h).detach()


def images():
    """16 classes that differ in a few directions."""
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(16, 6, generator=g) * 3
    y = torch.randint(0, 16, (2000,), generator=g)
    return centres[y] + torch.randn(2000, 6, generator=g), y


@pytest.mark.parametrize("update", [recompute_statistics, lambda model, loader: update_bn(loader, model)])
def test_averaged_weights_are_as_good_as_they_should_be(update):
    model, (x, y) = mlp(*3 * [RunningBatchNorm1d]), images()
    model[-1] = nn.Linear(8, 16)
    opt, averaged = torch.optim.SGD(model.parameters(), 0.3), AveragedModel(model)
    loader = list(zip(x.split(16), y.split(16), strict=True))
    for epoch in range(4):
        for xb, yb in loader:
            F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
            if epoch > 1:
                averaged.update_parameters(model)

    def loss(m):
        return F.cross_entropy(m.eval()(x), y).item()

    stale = loss(averaged)
    update(averaged, loader)
    exact = copy.deepcopy(averaged)
    for _ in range(4):  # of one layer after the other: what each sees with all before it at rest
        h = x
        for layer in exact.module.eval():
            if isinstance(layer, RunningBatchNorm1d):
                layer.running_mean.copy_(h.mean(0))
                layer.running_var.copy_(h.var(0, correction=0))
            h = layer(h).detach()
    assert loss(averaged) == pytest.approx(loss(exact), rel=0.03)
    assert loss(averaged) < 0.9 * loss(model) and loss(averaged) < 0.8 * stale


def test_lightnings_update_works():
    """Lightning assigns new tensors, zeroes the count in place and sets momentum to None."""
    model, x = mlp(RunningBatchNorm1d), samples()
    for xb in x.split(7):
        model(xb * 2 - 4)
    layer = model[1]
    layer.running_mean, layer.running_var = torch.zeros_like(layer.running_mean), torch.ones_like(layer.running_var)
    layer.momentum, kept = None, layer.momentum
    layer.num_batches_tracked *= 0
    with torch.no_grad():
        for xb in x.split(7):
            model(xb)
    layer.momentum = kept
    mean, var = of_first_layer(model, x)
    assert torch.allclose(layer.running_mean.double(), mean, atol=1e-5)
    assert torch.allclose(layer.running_var.double(), var, rtol=1e-5)
    assert layer.mom == layer.momentum == 0.1 and layer.num_batches_tracked == 9


def test_a_model_of_both_kinds_is_recomputed_and_a_frozen_layer_stays():
    model, x = mlp(RunningBatchNorm1d, nn.BatchNorm1d, RunningBatchNorm1d), samples()
    model(x)
    model[5].eval()
    model[1].momentum = 0.3
    model[9].freeze()
    frozen, modes = buffers(model[9]), [m.training for m in model.modules()]
    for update in (lambda: recompute_statistics(model, x.split(10)), lambda: update_bn(x.split(10), model.train())):
        before = model[1].running_mean.clone(), model[5].running_mean.clone()
        x = x + 1
        update()
        assert_same(buffers(model[9]), frozen, 0)
        assert not torch.equal(model[1].running_mean, before[0])
        assert not torch.equal(model[5].running_mean, before[1])
        assert model[9].frozen and model[1].momentum == 0.3
        if update.__code__.co_names[0] == "recompute_statistics":
            assert [m.training for m in model.modules()] == modes


def test_dropout_is_off_and_no_random_number_is_drawn():
    plain, dropped = mlp(*2 * [RunningBatchNorm1d]), mlp(*2 * [RunningBatchNorm1d], dropout=0.5)
    loader = torch.utils.data.DataLoader(samples(), batch_size=7, shuffle=True)
    before = torch.get_rng_state()
    for model in (plain, dropped):
        recompute_statistics(model.train(), loader)
        assert torch.equal(torch.get_rng_state(), before)
    assert_same(buffers(dropped), buffers(plain), 0)


def test_batches_may_be_tensors_or_sequences_and_inputs_may_be_nested():
    x = samples()
    wants = mlp(RunningBatchNorm1d)
    recompute_statistics(wants, [x[:30]])
    for loader in (
        [x[:30]],
        [(x[:30], 1)],
        [[x[:30]]],
        [{"x": x[:30]}],
        [((x[:30], 0.0), 1)],
        iter([x[:30]]),
        [x[:30], x],
        [(x[:30], 1, "a third item")],
        [{"x": x[:30], "add": 0.0}],
        [({"x": x[:30], "add": 0.0}, 1)],
        [{"x": x[:30], "labels": 1}],
    ):

        class Takes(nn.Sequential):
            def forward(self, x, add=0.0):
                return super().forward((x["x"] if isinstance(x, dict) else x) + add)

        model = Takes(*mlp(RunningBatchNorm1d))
        recompute_statistics(model, loader, device="cpu", batches=1)
        assert_same(buffers(model), buffers(wants), 0)


def test_unpack_reads_any_other_batch():
    x = samples()
    wants, model = mlp(RunningBatchNorm1d), mlp(RunningBatchNorm1d)
    recompute_statistics(wants, [x])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    recompute_statistics(averaged, [(0, x)], unpack=lambda batch: ((batch[1],), {}, None))
    assert_same(buffers(averaged.module), buffers(wants), 0)
    with pytest.raises(TypeError, match=r"got a dictionary with 'image', 'size'.*give the learner unpack="):
        recompute_statistics(model, [{"image": x, "size": 3}])


class Broken(Exception):
    pass


@pytest.mark.parametrize("what", ["error", "none", "nan"])
@KINDS
def test_an_error_restores_the_old_statistics(kind, what):
    model, x = mlp(kind, kind), samples()
    model(x)
    before, mode = buffers(model), model.training

    def loader():
        if what == "none":
            return
        yield x[:20]
        if what == "error":
            raise Broken
        yield torch.full((2, 6), float("nan"))

    expected = {
        "error": (Broken, None),
        "none": (ValueError, "at least one batch; the loader gave none"),
        "nan": (ValueError, "finite values; the input of '1' contained NaN or Inf"),
    }[what]
    with pytest.raises(expected[0], match=expected[1]):
        recompute_statistics(model, loader())
    assert_same(buffers(model), before, 0)
    assert model.training == mode and not model[1]._forward_pre_hooks


def test_wrong_arguments_are_refused():
    x = samples()
    with pytest.warns(
        UserWarning, match="no batch norm with running statistics.*in Linear; nothing was changed"
    ) as seen:
        recompute_statistics(nn.Linear(6, 3), [x])
    assert seen[0].filename == __file__
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(
            ValueError, match=r"batches to use \(None for all\), must be a whole number, 1 or more; got"
        ):
            recompute_statistics(mlp(RunningBatchNorm1d), [x], batches=wrong)
    with pytest.raises(ValueError, match="number of channels.*got LazyBatchNorm1d at '1'"):
        recompute_statistics(nn.Sequential(nn.Linear(6, 3), nn.LazyBatchNorm1d()), [x])
    with pytest.raises(TypeError, match="got tuple of 0.*unpack="):
        recompute_statistics(mlp(RunningBatchNorm1d), [()])


def test_a_shared_layer_gathers_all_its_inputs_in_a_compiled_model_too():
    norm, x = RunningBatchNorm2d(3), torch.randn(5, 3, 4, 4)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    compiled = torch.compile(model, backend="eager")
    assert recompute_statistics(compiled, [x]) is compiled
    first = x.var((0, 2, 3), correction=0)
    seen = torch.cat([x, ((x - x.mean((0, 2, 3), True)) / (first + 1e-5).sqrt().view(1, 3, 1, 1)).relu()])
    assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert norm.num_batches_tracked == 2 and norm.num_samples_tracked == 10 and norm.running_count == 80


# momentum None and 0, set from outside


@pytest.mark.parametrize("recipe", RECIPES)
def test_momentum_none_gives_the_exact_statistics_of_batches_of_any_size(recipe):
    layer, x = RunningBatchNorm(3, recipe=recipe), torch.randn(20, 3, 5) * 2 + 1
    layer(x + 7)
    layer.reset_running_stats()
    layer.momentum = None
    sizes = [1, 6, 2, 11]
    with torch.no_grad():
        outputs = [layer(part) for part in x.split(sizes)]
        layer(torch.full((2, 3, 5), float("inf")))  # does not count
        layer(x[:0])
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    assert torch.allclose(layer.running_mean, mean, atol=1e-6) and torch.allclose(layer.running_var, var)
    assert layer.num_samples_tracked == 20 and layer.num_batches_tracked == 4 and layer.running_count == 25
    assert torch.allclose(outputs[-1], layer.eval()(x[9:]))  # what normalises has this batch in it
    assert "momentum=None" in repr(layer) and copy.deepcopy(layer).momentum is None


def test_momentum_none_continues_a_batchnorm_checkpoint_like_batchnorm():
    theirs, x = nn.BatchNorm1d(3, momentum=None), torch.randn(4, 10, 3)
    ours = RunningBatchNorm1d(3)
    for batch in x[:3]:
        theirs(batch)
    ours.load_state_dict(theirs.state_dict())
    ours.momentum = None
    for layer in (theirs, ours):
        layer(x[3])
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)


def test_momentum_0_takes_a_step_that_moves_nothing():
    """SAM's second gradient must equal that of the layer's own backward pass."""
    a, b = (RunningBatchNorm(3) for _ in range(2))
    x, dy = torch.randn(2, 6, 3, 4)
    for layer in (a, b):
        layer(x).backward(dy)
    before, kept = buffers(a), a.momentum
    a.momentum = 0
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(xi * 2) for layer, xi in zip((a, b), inputs)]
    for y in outputs:
        y.backward(dy)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(inputs[0].grad, inputs[1].grad)
    assert_same(buffers(a), before, 0)
    a.momentum = kept
    a(x)
    assert a.num_batches_tracked == 2
    for wrong in (-0.1, 1.5, "x", True):
        with pytest.raises(ValueError, match="above 0 and at most 1; got"):
            a.momentum = wrong


def test_code_that_removes_statistics_is_refused_and_the_layer_is_unchanged():
    model = nn.Sequential(nn.Linear(6, 3), RunningBatchNorm1d(3))
    before = buffers(model)
    for take in (
        torch.func.replace_all_batch_norm_modules_,
        lambda m: setattr(m[1], "track_running_stats", False),
        lambda m: setattr(m[1], "running_var", None),
    ):
        with pytest.raises(ValueError, match="RunningBatchNorm1d normalises with its running statistics.*nn.GroupNorm"):
            take(model)
        assert_same(buffers(model), before, 0)


def test_fully_sharded_mixed_precision_and_weight_decay_find_the_layer():
    from torch.distributed.fsdp import MixedPrecision

    layer = RunningBatchNorm(3)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert isinstance(layer, tuple(MixedPrecision()._module_classes_to_ignore))
    assert not isinstance(RunningBatchNorm2d(3), nn.BatchNorm2d)  # what is fused or frozen by that class is not ours
