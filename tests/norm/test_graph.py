"""The layer under autograd: shared layers, orders of backward, second derivatives, hooks."""

import copy

import pytest
import torch
from checks import SumsOracle, course_rate, relative_error
from norm.steps import (
    ALL,
    ThreadLayer,
    assert_holds_no_graph,
    assert_same,
    assert_unmoved,
    buffers,
    grads,
    layer_of,
    serving,
    with_backends,
)
from torch import nn

from fastrbn.norm import RECIPES

# with a loss that is not a sum: random upstream gradients
EXACT = RECIPES["course"].but(clamp=None)


def data(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for _ in range(8)]


def trained(recipe="default", backend="fused", nf=3, dtype=torch.float64):
    """A layer that has trained past its clamp."""
    layer = layer_of(nf, recipe=recipe, backend=backend, dtype=dtype)
    for x in data(7, nf, 3, 2, dtype=dtype, seed=9)[:4]:
        layer(x + 0.5).backward(x.flip(0))
    layer.zero_grad()
    return layer


def by_formula(layer, x, dy, mean, var, a, grad, rate):
    """dx for given statistics after the step, and A and B times their weight, moved at `rate` by this backward."""
    ch = lambda t: t.view(1, -1, *(1,) * (x.dim() - 2))  # noqa: E731
    dims = [d for d in range(x.dim()) if d != 1]
    inv = (var + layer.eps).rsqrt()
    x_hat = (x - ch(mean)) * ch(inv)
    new = torch.stack([dy.mean(dims), (dy * x_hat).mean(dims)])
    grad, weight = (old + rate * (value - old) for old, value in zip(grad, (new, 1.0), strict=True))
    c, b = (x - ch(x.mean(dims))) * ch(inv), max(a, len(x) / (len(x) + 20))
    square = torch.maximum(x.var(dims, correction=0), var) * inv**2
    own = ch(dy.mean(dims)) + c * ch((dy * c).mean(dims) / square)
    past = (ch(grad[0]) + x_hat * ch(grad[1])) / weight
    return ch(layer.weight * inv) * (dy - b * own - (1 - b) * past), (grad, weight)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_forwards_before_backwards_in_any_order_use_statistics_and_rate_of_their_own_step(order, backend):
    layer = trained("default", backend)
    xs = [(x[:bs] * (bs + 1) + bs).requires_grad_() for bs, x in zip((4, 2, 13), data(13, 3, 5), strict=False)]
    dys = [dy[: len(x)] for x, dy in zip(xs, data(13, 3, 5, seed=1), strict=False)]
    ys, taken = [], []
    for x in xs:
        ys.append(layer(x))
        rate = len(x) / (len(x) + 20)  # as young as the layer is, its memory is the least
        a = rate * 5 * len(x) / layer.running_count.clone()
        taken.append((layer.running_mean.clone(), layer.running_var.clone(), a, rate))
    for i in order:
        grad = layer.running_grad.clone(), layer.running_grad_weight.clone()
        ys[i].backward(dys[i])
        *step, rate = taken[i]
        want, moved = by_formula(layer, xs[i].detach(), dys[i], *step, grad, rate)
        assert relative_error(xs[i].grad, want) < 1e-10
        assert relative_error(layer.running_grad, moved[0]) < 1e-10
        assert relative_error(layer.running_grad_weight, moved[1]) < 1e-10
    assert_holds_no_graph(layer)


@pytest.mark.parametrize(
    ("recipe", "backend"), with_backends(["default", "course", "batch", "skip-alternate", "detached"])
)
def test_one_backward_through_a_shared_layer_is_the_sum_of_its_uses(recipe, backend):
    layer, x, dy = trained(recipe, backend), data(5, 3, 4), data(5, 3, 4, seed=1)
    other = copy.deepcopy(layer)
    z = x[0].clone().requires_grad_()
    (layer(z) * dy[0]).sum().add((layer(z * 2 + 1) * dy[1]).sum()).backward()
    inputs = [(x[0]).clone().requires_grad_(), (x[0] * 2 + 1).requires_grad_()]
    outputs = [other(t) for t in inputs]
    for i in (1, 0):  # autograd's order: the last use first
        outputs[i].backward(dy[i])
    assert relative_error(z.grad, inputs[0].grad + 2 * inputs[1].grad) < 1e-10
    assert_same({**grads(layer), **buffers(layer)}, {**grads(other), **buffers(other)}, 1e-10)


def test_a_layer_applied_twice_in_a_row_equals_the_float64_sums_with_autograd():
    ours, oracle = layer_of(recipe=EXACT, dtype=torch.float64), SumsOracle(3, course_rate)
    for a, b in zip(ours.parameters(), oracle.parameters(), strict=True):
        b.data.copy_(a.data)
    for x, dy in zip(data(6, 3, 4), data(6, 3, 4, seed=1), strict=True):
        pair = [x.clone().requires_grad_() for _ in range(2)]
        for layer, z in zip((ours, oracle), pair, strict=True):
            layer.zero_grad()
            layer(torch.tanh(layer(z))).backward(dy)
        assert relative_error(pair[0].grad, pair[1].grad) < 1e-10
        assert relative_error(ours.weight.grad, oracle.weight.grad) < 1e-10
        assert relative_error(ours.running_var, oracle.stats()[1]) < 1e-10


@pytest.mark.parametrize("backend", ALL)
def test_a_gan_step_with_a_norm_in_both_nets_trains_both(backend):
    def block(i, o):
        return nn.Sequential(nn.Linear(i, o), layer_of(o, backend=backend), nn.ReLU(inplace=True))

    gen, disc = nn.Sequential(block(5, 8), nn.Linear(8, 4)), nn.Sequential(block(4, 8), nn.Linear(8, 1))
    opts = [torch.optim.SGD(net.parameters(), 0.1) for net in (gen, disc)]
    loss = nn.BCEWithLogitsLoss()
    for real in data(6, 4, dtype=torch.float32)[:4]:
        fake = gen(torch.randn(6, 5))
        opts[1].zero_grad()
        (loss(disc(real), torch.ones(6, 1)) + loss(disc(fake.detach()), torch.zeros(6, 1))).backward()
        opts[1].step()
        opts[0].zero_grad()
        loss(disc(fake), torch.ones(6, 1)).backward()
        opts[0].step()
    assert all(p.grad.abs().sum() > 0 and p.isfinite().all() for p in gen.parameters())
    assert disc[0][1].num_batches_tracked == 12 and gen[0][1].num_batches_tracked == 4
    assert_holds_no_graph(disc[0][1])


def test_two_forwards_before_a_backward_fail_for_the_threads_layer():
    layer, x = ThreadLayer(3), data(6, 3, dtype=torch.float32)
    y = layer(x[0].clone().requires_grad_())
    layer(x[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(x[2])


def test_an_evaluation_forward_before_a_training_one_silently_gets_a_wrong_gradient_from_batchnorm():
    layer, x = nn.BatchNorm1d(3).eval(), data(6, 3, dtype=torch.float32)
    z = x[0].clone().requires_grad_()
    y = layer(z)
    right = x[2] * (layer.running_var + layer.eps).rsqrt()
    layer.train()(x[1] * 9)
    y.backward(x[2])
    assert relative_error(z.grad, right) > 0.5  # ours: the test below


@pytest.mark.parametrize("backend", ALL)
def test_an_evaluation_forward_goes_backward_after_a_training_step(backend):
    layer, x, dy = trained(backend=backend), data(6, 3, 2), data(6, 3, 2, seed=1)
    z = x[0].clone().requires_grad_()
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    y = layer.eval()(z)
    before = buffers(layer)
    layer.train()(x[1] * 9)
    after = buffers(layer)
    y.backward(dy[0])
    inv = (var + layer.eps).rsqrt().view(1, 3, 1)
    assert relative_error(z.grad, dy[0] * inv * layer.weight.view(1, 3, 1)) < 1e-12
    x_hat = (x[0] - mean.view(1, 3, 1)) * inv
    assert relative_error(layer.weight.grad, (dy[0] * x_hat).sum((0, 2))) < 1e-12
    assert relative_error(layer.bias.grad, dy[0].sum((0, 2))) < 1e-12
    assert_unmoved(layer, after)  # an evaluation's backward moves nothing
    assert not torch.equal(before["running_mean"], after["running_mean"])


@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "course", "batch"]))
def test_retain_graph_gives_the_same_gradient_twice_and_each_backward_moves_its_averages(recipe, backend):
    layer, x, dy = trained(recipe, backend), data(6, 3, 2)[0].requires_grad_(), data(6, 3, 2, seed=1)[0]
    y = layer(x)
    before = buffers(layer)
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    once = buffers(layer)
    second = torch.autograd.grad(y, x, dy)[0]
    if recipe == "default":  # each backward is one observation of the gradient
        assert not torch.equal(once["running_grad"], before["running_grad"])
        assert layer.running_grad_weight > once["running_grad_weight"]
        assert relative_error(second, first) < 0.2
    else:
        assert torch.equal(first, second)
        assert_unmoved(layer, before)


def test_a_gradient_penalty_equals_that_of_the_float64_sums():
    ours, oracle = layer_of(recipe=EXACT, dtype=torch.float64), SumsOracle(3, course_rate)
    for a, b in zip(ours.parameters(), oracle.parameters(), strict=True):
        b.data.copy_(a.data)
    for x, dy in zip(data(6, 3, 4), data(6, 3, 4, seed=1), strict=True):
        found = []
        for layer in (ours, oracle):
            layer.zero_grad()
            z = x.clone().requires_grad_()
            g = torch.autograd.grad((layer(z).tanh() * dy).sum(), z, create_graph=True)[0]
            (g.square() * dy).sum().backward()
            found.append({"dx": z.grad, "dw": layer.weight.grad, "db": layer.bias.grad, "g": g})
        for got in found[1:]:
            assert_same(got, found[0], 1e-9)
    assert_holds_no_graph(ours)


@pytest.mark.parametrize(("elements", "affine"), [(None, True), (5, False)])
def test_second_derivatives_agree_between_the_backends(elements, affine):
    recipe = RECIPES["default"].but(elements=elements)
    layers = [layer_of(recipe=recipe, backend=b, dtype=torch.float64, affine=affine) for b in ALL]
    for x, dy in zip(data(21, 3, 4), data(21, 3, 4, seed=1), strict=True):
        found = []
        for layer in layers:
            layer.zero_grad()
            z, up = x.clone().requires_grad_(), dy.clone().requires_grad_()
            g = torch.autograd.grad(layer(z), z, up, create_graph=True)[0]
            (g.square() * dy).sum().backward()
            found.append({"g": g, "dx": z.grad, "ddy": up.grad, **grads(layer), **buffers(layer)})
        for got in found[1:]:
            assert_same(got, found[0], 1e-9)


@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "course", "batch", "detached"]))
def test_each_batched_gradient_equals_that_of_a_separate_backward(recipe, backend):
    """Each averages its own gradient into the old A and B, which do not move."""
    layer, x, dys = trained(recipe, backend), data(4, 3, 3, 2)[0], torch.stack(data(4, 3, 3, 2, seed=1))
    twins = [copy.deepcopy(layer) for _ in dys]
    z = x.requires_grad_()
    y, before = layer(z), buffers(layer)
    got = torch.autograd.grad(y, (z, layer.weight, layer.bias), dys, is_grads_batched=True, retain_graph=True)
    assert_unmoved(layer, before)
    for i, (twin, dy) in enumerate(zip(twins, dys, strict=True)):
        z = x.detach().clone().requires_grad_()
        want = torch.autograd.grad(twin(z), (z, twin.weight, twin.bias), dy)
        assert all(relative_error(a[i], b) < 1e-10 for a, b in zip(got, want, strict=True))
    # and once more, with second derivatives
    [dx] = torch.autograd.grad(y, x, dys, is_grads_batched=True, create_graph=True)
    assert relative_error(dx, got[0]) < 1e-10 and dx.requires_grad


# torch's own rules of forward mode are scripted
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("training", [True, False])
def test_a_vectorized_jacobian_equals_the_row_by_row_one(training, strategy):
    layer, x = trained(EXACT, "auto").train(training), data(2, 3, 2)[0]
    want = torch.autograd.functional.jacobian(copy.deepcopy(layer), x)
    got = torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy=strategy)
    assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_derivatives_in_half_precision_do_not_overflow(dtype):
    x, dy = (t[0].to(dtype) for t in (data(6, 3, 4), data(6, 3, 4, seed=1)))
    found = []
    for backend in serving(dtype):
        layer, z = layer_of(backend=backend), (x * 300 + 700).requires_grad_()  # variance over 65504
        g = torch.autograd.grad(layer(z), z, dy, create_graph=True)[0]
        (g.float().square() * dy).sum().backward()
        assert g.isfinite().all() and layer.weight.grad.isfinite().all()
        found.append({"g": g.float() * 300, **grads(layer), **buffers(layer)})
    assert_same(*found, 2e-2)


@pytest.mark.parametrize(("recipe", "backend"), with_backends(RECIPES))
def test_training_forwards_without_a_graph_move_the_same_statistics(recipe, backend):
    layer = trained(recipe, backend)
    other = copy.deepcopy(layer)
    for x in data(4, 3, 2):
        layer(x.requires_grad_())
        with torch.no_grad():
            assert not other(x).requires_grad
    with torch.inference_mode():
        other(x)
    layer(x)
    assert_same(buffers(other), buffers(layer), 0)
    other(x).backward(x)  # and training goes on
    assert_holds_no_graph(other)


@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "course", "batch"]))
def test_gradient_accumulation_equals_stepping_the_micro_batches_one_after_the_other(recipe, backend):
    together, apart = trained(recipe, backend), trained(recipe, backend)
    total = {}
    for x, dy in zip(data(3, 3, 5), data(3, 3, 5, seed=1), strict=True):
        together(x).backward(dy)  # x needs no gradient: the averages rest; see the next test
        apart.zero_grad()
        apart(x).backward(dy)
        total = {k: total.get(k, 0) + g for k, g in grads(apart).items()}
    assert_same(grads(together), total, 1e-12)
    assert_unmoved(together, buffers(apart))


@pytest.mark.parametrize("backend", ALL)
def test_every_micro_batch_counts_as_a_batch_for_statistics_and_averages(backend):
    layer = trained("default", backend)
    net = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64), layer)
    batches, w = layer.num_batches_tracked.item(), layer.running_grad_weight.item()
    for x, dy in zip(data(5, 4), data(5, 3, seed=1), strict=True):
        net(x).backward(dy / 8)
        w += 5 / (5 + 20) * (1 - w)
    assert layer.num_batches_tracked == batches + 8
    assert layer.running_grad_weight.item() == pytest.approx(w)


@pytest.mark.parametrize("off", ["x", "weight", "bias", "weight bias", "x weight", "x bias"])
@pytest.mark.parametrize(("recipe", "backend"), with_backends(["default", "batch"]))
def test_any_gradient_can_be_switched_off_and_the_others_stay(recipe, off, backend):
    full, part = (trained(recipe, backend) for _ in range(2))
    x, dy = data(6, 3, 2)[0], data(6, 3, 2, seed=1)[0]
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_("x" not in off.split())
    for name in off.split():
        if name != "x":
            getattr(part, name).requires_grad_(False)
    full(a).backward(dy)
    part(b).backward(dy)
    if "x" not in off.split():
        assert torch.equal(a.grad, b.grad)
        assert_unmoved(part, buffers(full))
    want = {k: g for k, g in grads(full).items() if k[1:] not in off.split()}
    assert_same(grads(part), want, 1e-14)


@pytest.mark.parametrize("backend", ALL)
def test_hooks_of_every_kind_see_the_layer(backend):
    layer, seen = trained(backend=backend), []
    layer.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    layer.register_forward_hook(lambda m, args, y: seen.append("forward"))
    layer.register_full_backward_pre_hook(lambda m, dy: seen.append("backward pre"))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append(("backward", dx[0].shape, dy[0].shape)))
    x, dy = data(6, 3, 2)[0].requires_grad_(), data(6, 3, 2, seed=1)[0]
    y = layer(x)
    y.register_hook(lambda g: seen.append("tensor"))
    y.backward(dy)
    assert seen == ["pre", "forward", "tensor", "backward pre", ("backward", x.shape, x.shape)]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("affine", [True, False])
def test_the_output_can_be_changed_in_place(affine, backend):
    plain, inplace = (layer_of(backend=backend, dtype=torch.float64, affine=affine) for _ in range(2))
    for x, dy in zip(data(6, 3, 2), data(6, 3, 2, seed=1), strict=True):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(a).relu().backward(dy)
        inplace(b).relu_().backward(dy)
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("backend", ALL)
def test_changing_the_input_or_the_weight_before_backward_is_an_error_not_a_wrong_gradient(backend):
    layer, x = trained(backend=backend), data(6, 3, 2)
    for change in (lambda z: z.mul_(2), lambda z: layer.weight.data is None or layer.weight.detach().mul_(2)):
        leaf = x[0].clone().requires_grad_()
        z = leaf * 1
        y = layer(z)
        change(z)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(x[1])


@pytest.mark.parametrize("backend", ALL)
def test_the_graph_does_not_grow_over_steps_and_nothing_is_remembered_without_checkpointing(backend):
    layer = trained(backend=backend)
    for x in data(4, 3, 2):
        y = layer(x.requires_grad_())
        y.backward(x.detach())
        assert_holds_no_graph(layer)
    assert len(layer._recent) == 0
