"""Activation checkpointing: statistics move once a batch, gradients are those of the unchecked net."""

import copy

import pytest
import torch
from norm.steps import (
    ALL,
    ThreadLayer,
    assert_holds_no_graph,
    assert_same,
    assert_unmoved,
    buffers,
    grads,
    layer_of,
    with_backends,
)
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fastrbn.norm import RECIPES
from fastrbn.norm.recipes import Skip
from fastrbn.norm.replay import REMEMBERED

RECIPES_HERE = {
    **RECIPES,
    "few": RECIPES["default"].but(elements=5, order="strided"),
    "skipping": RECIPES["course"].but(skip=Skip(every=2, after=0)),
}
SERVED = pytest.mark.parametrize(("recipe", "backend"), with_backends(RECIPES_HERE, RECIPES_HERE))
MODES = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def net_of(recipe, backend, dtype=torch.float64):
    torch.manual_seed(3)
    norm = layer_of(4, recipe=RECIPES_HERE[recipe], backend=backend, dtype=dtype)
    return nn.Sequential(nn.Linear(3, 4, dtype=dtype), norm, nn.ReLU(inplace=True), nn.Linear(4, 4, dtype=dtype))


def data(n=8, bs=33, features=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(bs, features, generator=g, dtype=dtype) for _ in range(n)]


def everything(net, x):
    return {"dx": x.grad, **grads(net), **buffers(net)}


def compare(net, plain, checked, steps=6, tol=1e-12):
    """`plain(net, x, dy)` and `checked(net, x, dy)`, each forward and backward, over several steps on equal nets."""
    other = copy.deepcopy(net)
    for i, (x, dy) in enumerate(zip(data(steps), data(steps, features=4, seed=1), strict=True)):
        found = []
        for run, n in ((plain, net), (checked, other)):
            n.zero_grad()
            z = x.clone().requires_grad_()
            run(n, z, dy)
            found.append(everything(n, z))
        assert_same(found[1], found[0], tol, f"at step {i}")
        for layer in (m for m in other.modules() if hasattr(m, "_recent")):
            assert_holds_no_graph(layer)


@MODES
@SERVED
def test_a_checkpointed_net_trains_like_the_plain_one(recipe, backend, reentrant):
    compare(
        net_of(recipe, backend),
        lambda net, x, dy: net(x).backward(dy),
        lambda net, x, dy: checkpoint(net, x, use_reentrant=reentrant).backward(dy),
    )


@MODES
@SERVED
def test_a_layer_used_twice_in_a_segment_recalls_the_right_step_for_each_use(recipe, backend, reentrant):
    def twice(net):
        return lambda x: net[1](net[3](net[1](net[0](x)).tanh()))

    compare(
        net_of(recipe, backend),
        lambda net, x, dy: twice(net)(x).backward(dy),
        lambda net, x, dy: checkpoint(twice(net), x, use_reentrant=reentrant).backward(dy),
    )


@MODES
@SERVED
def test_a_layer_shared_by_two_segments_recalls_the_right_step_in_each(recipe, backend, reentrant):
    def run(net, x, dy, through):
        head = through(lambda x: net[:3](x), x)
        through(lambda h: net[1](net[3](h)), head).backward(dy)

    compare(
        net_of(recipe, backend),
        lambda net, x, dy: run(net, x, dy, lambda f, x: f(x)),
        lambda net, x, dy: run(net, x, dy, lambda f, x: checkpoint(f, x, use_reentrant=reentrant)),
    )


@MODES
@SERVED
@pytest.mark.parametrize("order", [1, -1], ids=["first-first", "last-first"])
def test_micro_batches_in_flight_recall_their_own_steps(order, recipe, backend, reentrant):
    def run(net, x, dy, through):
        flights = [through(net, x * (1 + k / 3) + k / 7) for k in range(5)]
        for y in flights[::order]:
            y.backward(dy)

    compare(
        net_of(recipe, backend),
        lambda net, x, dy: run(net, x, dy, lambda f, x: f(x)),
        lambda net, x, dy: run(net, x, dy, lambda f, x: checkpoint(f, x, use_reentrant=reentrant)),
        steps=3,
    )


@MODES
@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "skipping"], RECIPES_HERE))
def test_the_same_batch_in_every_step_recalls_the_latest_step(recipe, backend, reentrant):
    net = net_of(recipe, backend)[1:]
    other, x, dy = copy.deepcopy(net), data(1, features=4)[0], data(1, features=4, seed=1)[0]
    for _ in range(6):
        found = []
        for n, through in ((net, lambda f, x: f(x)), (other, lambda f, x: checkpoint(f, x, use_reentrant=reentrant))):
            n.zero_grad()
            z = x.clone().requires_grad_()
            through(n, z).backward(dy)
            found.append(everything(n, z))
        assert_same(found[1], found[0], 1e-12)


@MODES
@pytest.mark.parametrize("backend", ALL)
def test_evaluation_frozen_and_converted_layers_are_checkpointed_too(backend, reentrant):
    net = net_of("default", backend, torch.float32)
    for x, dy in zip(data(3, dtype=torch.float32), data(3, features=4, dtype=torch.float32), strict=True):
        checkpoint(net, x.requires_grad_(), use_reentrant=reentrant).backward(dy)
    assert len(net[1]._recent) == 3
    net.double()
    assert len(net[1]._recent) == 0  # it would have another dtype, or device
    compare(
        net,
        lambda net, x, dy: net(x).backward(dy),
        lambda net, x, dy: checkpoint(net, x, use_reentrant=reentrant).backward(dy),
    )
    for still in (net.eval(), net.train()):
        net[1].freeze()
        before = buffers(net)
        compare(
            still,
            lambda net, x, dy: net(x).backward(dy),
            lambda net, x, dy: checkpoint(net, x, use_reentrant=reentrant).backward(dy),
        )
        assert_unmoved(net, before)


@MODES
@pytest.mark.parametrize("backend", ALL)
def test_a_batch_with_nan_leaves_the_state_in_both_runs(backend, reentrant):
    net, dy = net_of("default", backend), data(1, features=4, seed=1)[0]
    for x in data(3):
        checkpoint(net, x.requires_grad_(), use_reentrant=reentrant).backward(dy)
    before, x = buffers(net), data(1)[0]
    x[2, 1] = float("nan")
    y = checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)
    y.backward(dy)
    assert y.isnan().any() and x.grad.isnan().any()
    assert_unmoved(net, before)


def test_checkpoint_sequential_moves_every_layer_once():
    layers = [m for i in range(4) for m in (nn.Linear(3, 3), layer_of(3), nn.ReLU())]
    net = nn.Sequential(*layers)
    y = checkpoint_sequential(net, 3, data(1, dtype=torch.float32)[0].requires_grad_(), use_reentrant=False)
    y.backward(torch.randn_like(y))
    assert [m.num_batches_tracked.item() for m in net if hasattr(m, "recipe")] == [1] * 4


@MODES
@pytest.mark.parametrize("backend", ALL)
def test_remembered_steps_are_bounded_and_hold_only_statistics(backend, reentrant):
    net = net_of("default", backend)
    for x, dy in zip(data(2 * REMEMBERED, bs=64), data(2 * REMEMBERED, bs=64, features=4), strict=True):
        checkpoint(net, x.requires_grad_(), use_reentrant=reentrant).backward(dy)
    kept = net[1]._recent
    assert len(kept) == REMEMBERED
    assert sum(t.numel() for taken in kept for t in taken if isinstance(t, torch.Tensor)) <= REMEMBERED * (4 * 4 + 5)
    assert all(t.untyped_storage().nbytes() <= 2 * 4 * 8 for m in kept for t in m if isinstance(t, torch.Tensor))
    assert len(copy.deepcopy(net)[1]._recent) == 0


def test_data_parallel_replicas_remember_separately():
    layer = layer_of()
    assert layer._replicate_for_data_parallel()._recent is not layer._recent


def test_batchnorm_and_the_threads_layer_count_a_checkpointed_batch_twice():
    x, dy = data(1, bs=8, dtype=torch.float32)[0], data(1, bs=8, dtype=torch.float32, seed=1)[0]
    for make in (nn.BatchNorm1d, ThreadLayer):
        plain, checked = make(3), make(3)
        plain(x)
        checkpoint(checked, x.clone().requires_grad_(), use_reentrant=True).backward(dy)
        if make is nn.BatchNorm1d:
            assert plain.num_batches_tracked == 1 and checked.num_batches_tracked == 2
        else:
            assert plain.samples == 8 and checked.samples == 16
        name = "running_mean" if make is nn.BatchNorm1d else "sums"
        assert not torch.allclose(getattr(plain, name), getattr(checked, name))
