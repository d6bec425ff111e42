"""The peers from their papers' formulas: float64, written out sample by sample, gradients included."""

import copy

import pytest
import torch
from torch import nn

from fastrbn.models import conv_layer, resnet9
from fastrbn.peers import BatchRenorm2d, FilterResponseNorm2d


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


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (1, 3, 2, 2), (1, 3, 1, 1)], ids=str)
def test_batch_renorm_is_the_papers_algorithm_with_its_gradients_over_several_steps(shape):
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


def test_batch_renorm_begins_as_batch_norm_and_relaxes_on_straight_lines():
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


def test_the_published_schedule_keeps_its_shares_in_a_run_of_another_length():
    assert BatchRenorm2d.scaled_warmup(160_000) == (5000, 40_000, 25_000)
    assert BatchRenorm2d.scaled_warmup(320) == (10, 80, 50)


def test_batch_renorm_evaluates_with_its_running_statistics_and_leaves_them_alone():
    layer = shaken(BatchRenorm2d(2))
    layer(torch.randn(4, 2, 3, 3).double() * 3 + 1)
    layer.eval()
    mean, std = layer.running_mean.clone(), layer.running_std.clone()
    x = torch.randn(1, 2, 1, 1).double()
    z = (x[0, :, 0, 0] - mean) / std
    torch.testing.assert_close(layer(x)[0, :, 0, 0], layer.weight * z + layer.bias)
    assert torch.equal(mean, layer.running_mean) and torch.equal(std, layer.running_std)


def test_a_short_run_of_batch_renorm_does_not_evaluate_with_the_values_it_began_with():
    layer = BatchRenorm2d(1)
    for _ in range(5):
        layer(torch.randn(64, 1, 4, 4) * 3 + 7)
    assert layer.running_mean.item() == pytest.approx(7, abs=0.3) and layer.running_std.item() == pytest.approx(
        3, abs=0.3
    )


def test_a_loaded_or_copied_batch_renorm_goes_on_at_its_step():
    first, fresh = BatchRenorm2d(2, warmup=(2, 6, 6)), BatchRenorm2d(2, warmup=(2, 6, 6))
    fresh(torch.randn(2, 2, 2, 2))
    for _ in range(4):
        first(torch.randn(2, 2, 2, 2) + 1)
    fresh.load_state_dict(first.state_dict())
    twin, x = copy.deepcopy(first), torch.randn(2, 2, 2, 2)
    want = first(x)
    assert torch.equal(fresh(x), want) and torch.equal(twin(x), want)


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
def test_filter_response_norm_is_the_papers_formula_with_its_gradients(shape, kwargs):
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


def test_filter_response_norm_takes_the_place_of_relu():
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
        (lambda: BatchRenorm2d(2, r_max=0.5), "r_max of 1 or more.*got 0.5"),
        (lambda: FilterResponseNorm2d(2, eps=0), "above 0.*got 0"),
    ],
)
def test_settings_that_make_no_norm_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("make", [BatchRenorm2d, FilterResponseNorm2d])
def test_peers_run_on_cuda_as_on_the_cpu(make):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    here, there, x = make(3), make(3).cuda(), torch.randn(4, 3, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(there(x.cuda()).cpu(), here(x))
