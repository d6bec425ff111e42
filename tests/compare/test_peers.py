"""The peers from their papers' formulas: float64, written out sample by sample, gradients included."""

import copy

import pytest
import torch
from torch import nn

from fastrbn.compare.peers import (
    MABN,
    BatchRenorm,
    BatchRenorm2d,
    FilterResponseNorm2d,
    OnlineNorm,
)
from fastrbn.models import conv_layer, resnet9
from fastrbn.norm.weights import centralize_weights, standardize_weights


def shaken(layer):
    """The layer in float64, with parameters that are not 0 and 1."""
    for p in layer.double().parameters():
        p.data.add_(torch.rand_like(p) / 2)
    return layer


def grads(y, tensors, dy):
    return torch.autograd.grad(y, tensors, dy, retain_graph=True)


# batch renormalisation


class RenormOracle:
    """Algorithm 1 of the paper, channel by channel, r and d as plain numbers."""

    def __init__(self, layer):
        self.mean, self.std, self.step = [0.0] * layer.num_features, [1.0] * layer.num_features, 0

    def __call__(self, layer, x, r_max, d_max):
        channels = []
        rate = max(layer.mom, 1 / (self.step + 1))
        for c in range(x.shape[1]):
            z = x[:, c]
            m = z.sum() / z.numel()
            s = (((z - m) ** 2).sum() / z.numel() + layer.eps) ** 0.5
            r, d = 1.0, 0.0
            if self.step:
                r = min(max(s.item() / self.std[c], 1 / r_max), r_max)
                d = min(max((m.item() - self.mean[c]) / self.std[c], -d_max), d_max)
            channels.append(layer.weight[c] * ((z - m) / s * r + d) + layer.bias[c])
            self.mean[c] += rate * (m.item() - self.mean[c])
            self.std[c] += rate * (s.item() - self.std[c])
        self.step += 1
        return torch.stack(channels, 1)


SHAPES = [(4, 3), (1, 3), (2, 3, 6), (4, 3, 5, 5), (1, 3, 2, 2), (1, 3, 1, 1), (2, 3, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_renorm_matches_the_papers_algorithm_and_gradients(shape):
    layer = shaken(BatchRenorm2d(3, mom=0.3, warmup=(1, 5, 3)))
    oracle = RenormOracle(layer)
    for step in range(7):
        x = (torch.randn(shape, dtype=torch.float64) * (1 + step) + 2 * step).requires_grad_()
        dy = torch.randn(shape, dtype=torch.float64)
        bounds = layer.bounds(step)
        got, want = layer(x), oracle(layer, x, *bounds)
        torch.testing.assert_close(got, want)
        inputs = [x, layer.weight, layer.bias]
        torch.testing.assert_close(grads(got, inputs, dy), grads(want, inputs, dy))
        torch.testing.assert_close(layer.running_mean.tolist(), oracle.mean)
        torch.testing.assert_close(layer.running_std.tolist(), oracle.std)


def test_batch_renorm_begins_as_batch_norm_and_relaxes_linearly():
    layer = BatchRenorm2d(2)
    assert [layer.bounds(s) for s in (0, 5000, 15_000, 25_000, 40_000, 10**6)] == [
        (1, 0),
        (1, 0),
        (1 + 2 * 10 / 35, 2.5),
        (1 + 2 * 20 / 35, 5),
        (3, 5),
        (3, 5),
    ]
    x = torch.randn(8, 2, 3, 3)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(2)(x))


def test_the_published_schedule_scales_with_the_run():
    assert BatchRenorm2d.scaled_warmup(160_000) == (5000, 40_000, 25_000)
    assert BatchRenorm2d.scaled_warmup(320) == (10, 80, 50)


def test_batch_renorm_evaluates_with_unchanged_running_statistics():
    layer = shaken(BatchRenorm2d(2))
    layer(torch.randn(4, 2, 3, 3).double() * 3 + 1)
    layer.eval()
    mean, std = layer.running_mean.clone(), layer.running_std.clone()
    x = torch.randn(1, 2, 1, 1).double()
    z = (x[0, :, 0, 0] - mean) / std
    torch.testing.assert_close(layer(x)[0, :, 0, 0], layer.weight * z + layer.bias)
    assert torch.equal(mean, layer.running_mean) and torch.equal(std, layer.running_std)


def test_a_short_run_of_batch_renorm_is_not_evaluated_with_initial_values():
    layer = BatchRenorm2d(1)
    for _ in range(5):
        layer(torch.randn(64, 1, 4, 4) * 3 + 7)
    assert layer.running_mean.item() == pytest.approx(7, abs=0.3) and layer.running_std.item() == pytest.approx(
        3, abs=0.3
    )


def test_a_loaded_or_copied_batch_renorm_continues_at_its_step():
    first, fresh = BatchRenorm2d(2, warmup=(2, 6, 6)), BatchRenorm2d(2, warmup=(2, 6, 6))
    fresh(torch.randn(2, 2, 2, 2))
    for _ in range(4):
        first(torch.randn(2, 2, 2, 2) + 1)
    fresh.load_state_dict(first.state_dict())
    twin, x = copy.deepcopy(first), torch.randn(2, 2, 2, 2)
    want = first(x)
    assert torch.equal(fresh(x), want) and torch.equal(twin(x), want)


# online normalization


class OnlineOracle:
    """Equations of section 3, one number at a time: no sums over a batch; autograd only for layer scaling and γ, β."""

    def __init__(self, layer):
        nf = layer.num_features
        self.mean, self.var, self.error_y, self.error_1 = [0.0] * nf, [1.0] * nf, [0.0] * nf, [0.0] * nf

    def forward(self, layer, x):
        a = layer.alpha_f
        y, self.std = torch.empty_like(x), torch.empty(x.shape[:2], dtype=x.dtype)
        for n, sample in enumerate(x):
            for c, z in enumerate(sample):
                self.std[n, c] = (self.var[c] + layer.eps) ** 0.5
                y[n, c] = (z - self.mean[c]) / self.std[n, c]
                m = z.sum().item() / z.numel()
                v = ((z - m) ** 2).sum().item() / z.numel()
                self.var[c] = a * self.var[c] + (1 - a) * v + a * (1 - a) * (m - self.mean[c]) ** 2
                self.mean[c] = a * self.mean[c] + (1 - a) * m
        return y

    def backward(self, layer, y, dy):
        b, dx = layer.alpha_b, torch.empty_like(y)
        for n in range(len(y)):
            for c in range(y.shape[1]):
                g = dy[n, c] - (1 - b) * self.error_y[c] * y[n, c]
                self.error_y[c] += (g * y[n, c]).sum().item() / g.numel()
                dx[n, c] = g / self.std[n, c] - (1 - b) * self.error_1[c]
                self.error_1[c] += dx[n, c].sum().item() / g.numel()
        return dx


def scaled(layer, y):
    """γ·y + β, divided by the sample's root mean square."""
    rows = []
    for sample in y:
        z = torch.stack([layer.weight[c] * v + layer.bias[c] for c, v in enumerate(sample)])
        rows.append(z / ((z * z).sum() / z.numel() + layer.eps) ** 0.5 if layer.layer_scaling else z)
    return torch.stack(rows)


@pytest.mark.parametrize("layer_scaling", [True, False])
@pytest.mark.parametrize("rest", [(), (4,), (3, 2), (2, 1, 2), (1, 1)], ids=str)
def test_online_norm_matches_the_papers_equations_for_changing_batch_sizes(rest, layer_scaling):
    layer = shaken(OnlineNorm(3, alpha_f=0.8, alpha_b=0.6, layer_scaling=layer_scaling))
    oracle = OnlineOracle(layer)
    for step, n in enumerate((1, 4, 2, 1, 5, 1)):
        x = (torch.randn(n, 3, *rest, dtype=torch.float64) * (1 + step) + step).requires_grad_()
        dy = torch.randn_like(x)
        y = oracle.forward(layer, x.detach()).requires_grad_()
        want = scaled(layer, y)
        got = layer(x)
        torch.testing.assert_close(got, want)
        to_y, *want_params = grads(want, [y, layer.weight, layer.bias], dy)
        want_dx = oracle.backward(layer, y.detach(), to_y)
        torch.testing.assert_close(grads(got, [x, layer.weight, layer.bias], dy), (want_dx, *want_params))
        for name, value in (("running_mean", oracle.mean), ("running_var", oracle.var)):
            torch.testing.assert_close(getattr(layer, name).tolist(), value)
        torch.testing.assert_close(layer.error_y.tolist(), oracle.error_y)
        torch.testing.assert_close(layer.error_1.tolist(), oracle.error_1)


def test_online_norm_depends_on_the_order_of_samples_but_not_on_batches():
    whole, parts = OnlineNorm(2, alpha_f=0.9), OnlineNorm(2, alpha_f=0.9)
    x = torch.randn(6, 2, 3) + 1
    torch.testing.assert_close(whole(x), torch.cat([parts(piece) for piece in x.split((1, 3, 2))]))
    torch.testing.assert_close(whole.running_var, parts.running_var)
    assert not torch.allclose(OnlineNorm(2, alpha_f=0.9)(x.flip(0)).flip(0), OnlineNorm(2, alpha_f=0.9)(x), atol=1e-3)


def test_the_control_process_makes_the_gradient_orthogonal_to_the_output_and_to_one():
    torch.manual_seed(0)
    layer = OnlineNorm(1, alpha_f=0.99, alpha_b=0.9, layer_scaling=False)
    along_y, along_1, plain = [], [], []
    for _ in range(600):
        x = (torch.randn(4, 1, 8) * 2 + 3).requires_grad_()
        y = layer(x)
        g = 0.5 * y.detach() + 1 + torch.randn_like(y)
        y.backward(g)
        along_y.append((x.grad * y.detach()).mean().item())
        along_1.append(x.grad.mean().item())
        plain.append((g * y.detach()).mean().item() / 2)
    late = slice(300, None)
    assert abs(sum(plain[late]) / 300) > 0.2, "without control the gradient has a part along y"
    assert abs(sum(along_y[late]) / 300) < 0.02 and abs(sum(along_1[late]) / 300) < 0.02


# moving average batch normalization


class MovingOracle:
    """Algorithm of section 4 with lists of all batches so far."""

    def __init__(self, nf):
        self.nf, self.squares, self.products, self.average, self.step = nf, [], [], [1.0] * nf, 0

    def forward(self, layer, x):
        n, self.step = len(x), self.step + 1
        m = max(1, layer.window // n)
        self.m = m if self.step > max(m, layer.warmup[0]) else 1
        self.squares.append([(x[:, c] ** 2).sum().item() / x[:, c].numel() for c in range(self.nf)])
        z, self.r, self.chi = torch.empty_like(x), [], []
        for c in range(self.nf):
            square = sum(s[c] for s in self.squares[-self.m :]) / self.m
            self.chi.append((square + layer.eps) ** 0.5)
            r = self.chi[c] / (self.average[c] + layer.eps) ** 0.5
            self.r.append(min(max(r, 1 / layer.r_max), layer.r_max) if self.step > max(1, layer.warmup[1]) else 1.0)
            rate = max(layer.mom, 1 / self.step)
            self.average[c] = (1 - rate) * self.average[c] + rate * square
            z[:, c] = x[:, c] / self.chi[c]
        return z

    def backward(self, layer, z, dy):
        g = torch.stack([dy[:, c] * layer.weight[c].item() * self.r[c] for c in range(self.nf)], 1)
        self.products.append([(g[:, c] * z[:, c]).sum().item() / g[:, c].numel() for c in range(self.nf)])
        psi = [sum(p[c] for p in self.products[-self.m :]) / self.m for c in range(self.nf)]
        dx = torch.stack([(g[:, c] - z[:, c] * psi[c]) / self.chi[c] for c in range(self.nf)], 1)
        weight = torch.stack([(dy[:, c] * z[:, c]).sum() * self.r[c] for c in range(self.nf)])
        return dx, weight, torch.stack([dy[:, c].sum() for c in range(self.nf)])


@pytest.mark.parametrize("rest", [(), (4,), (3, 2), (2, 1, 2), (1, 1)], ids=str)
def test_mabn_matches_the_papers_algorithm_for_changing_batch_sizes(rest):
    layer = shaken(MABN(3, window=6, mom=0.2, r_max=1.3, warmup=(3, 5)))
    oracle = MovingOracle(3)
    windows, renormalised = [], False
    for step, n in enumerate((2, 1, 3, 2, 1, 8, 1, 2, 1, 3)):
        x = (torch.randn(n, 3, *rest, dtype=torch.float64) * (1 + step / 3) + step / 3).requires_grad_()
        dy = torch.randn_like(x)
        z = oracle.forward(layer, x.detach())
        want = torch.stack([layer.weight[c] * oracle.r[c] * z[:, c] + layer.bias[c] for c in range(3)], 1)
        got = layer(x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads(got, [x, layer.weight, layer.bias], dy), oracle.backward(layer, z, dy))
        torch.testing.assert_close(layer.running_square.tolist(), oracle.average)
        windows.append(oracle.m)
        renormalised |= any(r != 1 for r in oracle.r)
    assert windows == [1, 1, 1, 3, 1, 1, 6, 3, 6, 2] and renormalised


def test_mabn_begins_as_normalisation_by_the_batchs_mean_square():
    layer, x = MABN(2).double(), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    plain = twin / (twin.square().mean((0, 2), keepdim=True) + 1e-5).sqrt()
    got, dy = layer(x), torch.randn_like(x)
    torch.testing.assert_close(got, plain)
    got.backward(dy)
    plain.backward(dy)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)  # the paper leaves ε out of the gradient


# both


@pytest.mark.parametrize("make", [OnlineNorm, MABN, BatchRenorm])
def test_evaluation_uses_the_running_statistics_and_changes_no_buffer(make):
    layer = shaken(make(2))
    for _ in range(3):
        layer(torch.randn(4, 2, 3).double() * 3 + 1).sum().backward()
    layer.eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    if make is OnlineNorm:
        z = (x[0] - layer.running_mean[:, None]) / (layer.running_var[:, None] + layer.eps) ** 0.5
    elif make is MABN:
        z = x[0] / (layer.running_square[:, None] + layer.eps) ** 0.5
    else:
        z = (x[0] - layer.running_mean[:, None]) / layer.running_std[:, None]
    want = layer.weight[:, None] * z + layer.bias[:, None]
    if make is OnlineNorm:
        want = want / (want.square().mean() + layer.eps) ** 0.5
    got, dy = layer(x), torch.randn_like(x)
    torch.testing.assert_close(got[0], want)
    torch.testing.assert_close(grads(got, [x], dy), grads(want, [x], dy[0]))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("make", [OnlineNorm, lambda nf: MABN(nf, window=4, warmup=(2, 5))], ids=["online", "mabn"])
def test_a_loaded_or_copied_layer_continues_like_the_original(make):
    def step(layer, x):
        x = x.clone().requires_grad_()
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum() + y.sum(), [x, layer.weight])

    first, fresh = make(2), make(2)
    step(fresh, torch.randn(1, 2, 2))
    for _ in range(6):
        step(first, torch.randn(2, 2, 2) + 1)
    fresh.load_state_dict(first.state_dict())
    twin = copy.deepcopy(first)
    for _ in range(2):
        x = torch.randn(2, 2, 2)
        want = step(first, x)
        assert all(torch.equal(a, b) for a, b in zip(step(fresh, x), want))
        assert all(torch.equal(a, b) for a, b in zip(step(twin, x), want))
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.parametrize("make", [OnlineNorm, MABN])
def test_bfloat16_input_is_normalised_in_float32(make):
    x = torch.randn(3, 2, 4).bfloat16()
    torch.testing.assert_close(make(2)(x), make(2)(x.float()))


# weights


LAYERS = [
    nn.Linear(5, 4),
    nn.Conv1d(6, 4, 3, groups=2),
    nn.Conv2d(3, 4, 3),
    nn.Conv3d(2, 4, 2),
    nn.ConvTranspose1d(6, 4, 3),
    nn.ConvTranspose2d(6, 4, 3, groups=2),
]


def weights_of_outputs(layer, w):
    """Of each output the weights that reach it."""
    if not getattr(layer, "transposed", False):
        return [w[o].reshape(-1) for o in range(len(w))]
    per_group, ins = w.shape[1], w.shape[0] // layer.groups
    return [w[g * ins : (g + 1) * ins, o].reshape(-1) for g in range(layer.groups) for o in range(per_group)]


@pytest.mark.parametrize("change", [standardize_weights, centralize_weights])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda m: type(m).__name__)
def test_weights_are_standardised_or_centralised_for_each_output_with_the_gradient(layer, change):
    layer = copy.deepcopy(layer).double()
    v = layer.weight.detach().clone().requires_grad_()
    change(nn.Sequential(layer, nn.GroupNorm(2, 4)))
    dw = torch.randn_like(v)
    got, loss = weights_of_outputs(layer, layer.weight), 0.0
    for w, raw, d in zip(got, weights_of_outputs(layer, v), weights_of_outputs(layer, dw)):
        mean = raw.sum() / raw.numel()
        want = raw - mean
        if change is standardize_weights:
            want = want / (((raw - mean) ** 2).sum() / raw.numel() + 1e-5) ** 0.5
        torch.testing.assert_close(w, want)
        loss = loss + (want * d).sum()
    (want_dv,) = torch.autograd.grad(loss, v)
    layer.weight.mul(dw).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, want_dv)


def test_only_layers_before_a_norm_change_once_and_only_with_several_weights_per_output():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 3, groups=4),
        MABN(4),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for change in (standardize_weights, standardize_weights, centralize_weights):
        assert change(net) is net
    x = torch.randn(2, 1, 5, 5)
    assert net(x).shape == (2, 3)
    assert [k for k, _ in net.named_parameters() if "weight" in k] == [
        "0.weight",
        "1.parametrizations.weight.original",
        "2.weight",
        "3.parametrizations.weight.original",
        "4.weight",
        "6.weight",
    ]
    assert len(net[1].parametrizations.weight) == 1


def test_the_state_of_parametrised_weights_loads_into_a_model_parametrised_likewise():
    def made():
        return centralize_weights(conv_layer(2, 4, norm=MABN))

    first, second, x = made(), made(), torch.randn(2, 2, 5, 5)
    first(x)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.eval()(x), first.eval()(x))
    nn.utils.parametrize.remove_parametrizations(first[0], "weight")
    torch.testing.assert_close(second(x), first(x))
    torch.testing.assert_close(first[0].weight.mean((1, 2, 3)), torch.zeros(4))


# filter response norm


def response_formula(layer, x):
    """Equations 1 to 3 of the paper, for each sample and channel."""
    rows = []
    for sample in x:
        channels = []
        for c, z in enumerate(sample):
            nu2 = (z * z).sum() / z.numel()
            eps = layer.eps + (abs(layer.learnt_eps[c]) if layer.learnt_eps is not None else 0)
            y = layer.weight[c] * z / (nu2 + eps) ** 0.5 + layer.bias[c]
            channels.append(torch.maximum(y, layer.threshold[c]) if layer.activates else y)
        rows.append(torch.stack(channels))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (1, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"learn_eps": None}, {"activate": False}], ids=str)
def test_filter_response_norm_matches_the_papers_formula_and_gradients(shape, kwargs):
    layer = shaken(FilterResponseNorm2d(2, **kwargs))
    if layer.learnt_eps is not None:
        layer.learnt_eps.data[0] *= -1  # its size is what counts
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    got, want = layer(x), response_formula(layer, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads(got, inputs, dy), grads(want, inputs, dy))
    torch.testing.assert_close(layer.eval()(x), got)


def test_filter_response_norm_replaces_relu():
    conv, norm = conv_layer(1, 4, norm=FilterResponseNorm2d)
    assert conv.bias is None and type(norm) is FilterResponseNorm2d
    kinds = [type(m) for m in resnet9(norm=FilterResponseNorm2d, width=4).modules()]
    assert kinds.count(FilterResponseNorm2d) == 8 and nn.ReLU not in kinds
    bare = conv_layer(1, 4, norm=lambda nf: FilterResponseNorm2d(nf, activate=False))
    assert len(bare) == 3, "without its threshold it needs the ReLU"
    with pytest.raises(ValueError, match="FilterResponseNorm2d is the activation too.*leak=0.1"):
        conv_layer(1, 4, norm=FilterResponseNorm2d, leak=0.1)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: BatchRenorm2d(2, mom=0), "0 < mom <= 1.*got mom=0"),
        (lambda: BatchRenorm2d(2, r_max=0.5), "r_max >= 1 .*got 0.5"),
        (lambda: FilterResponseNorm2d(2, eps=0), "above 0.*got 0"),
        (lambda: OnlineNorm(2, alpha_b=1), "0 <= alpha_f, alpha_b < 1 .*got 0.999, 1 and"),
        (lambda: MABN(2, window=0), "window of 1 or more.*window=0"),
        (lambda: MABN(2)(torch.zeros(2, 3, 4)), r"MABN needs .* with C = 2; got \(2, 3, 4\)"),
        (lambda: OnlineNorm(2)(torch.zeros(2)), r"OnlineNorm needs .* with C = 2; got \(2,\)"),
    ],
)
def test_invalid_settings_and_shapes_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.cuda
@pytest.mark.parametrize("make", [BatchRenorm, FilterResponseNorm2d, OnlineNorm, MABN])
def test_peers_give_the_same_on_cuda(make):
    here, there, x = make(3), make(3).cuda(), torch.randn(4, 3, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(there(x.cuda()).cpu(), here(x))
