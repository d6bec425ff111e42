"""Nets of the tasks. Each takes `norm(channels, dims)`, dims being the number of axes after the channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.models import Residual

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def block(layer, norm, nf, dims, relu_first: bool = False):
    """`layer`, norm, ReLU, or with ReLU before the norm. `layer(bias)` makes the convolution or linear layer."""
    made = norm(nf, dims)
    relu = [] if getattr(made, "activates", False) else [nn.ReLU()]
    normed = [] if made is None else [made]
    return nn.Sequential(layer(bias=made is None), *(relu + normed if relu_first else normed + relu))


def conv(ni, nf, norm, dims=2, ks=3, stride=1, relu_first=False):
    def layer(bias):
        return _CONVS[dims](ni, nf, ks, stride, ks // 2, bias=bias)

    return block(layer, norm, nf, dims, relu_first)


def dense(ni, nf, norm):
    return block(lambda bias: nn.Linear(ni, nf, bias=bias), norm, nf, 0)


class Average(nn.Module):
    """(N, C, …) → (N, C): the mean over all positions."""

    def forward(self, x):
        return x.flatten(2).mean(2)


def conv_net(norm, widths, classes, dims=2, strides=None, relu_first=False, first_ks=3, ni=1):
    layers = []
    for i, nf in enumerate(widths):
        ks, stride = first_ks if i == 0 else 3, strides[i] if strides else 2
        layers.append(conv(ni, nf, norm, dims, ks, stride, relu_first))
        ni = nf
    return nn.Sequential(*layers, Average(), nn.Linear(ni, classes))


def course(norm, relu_first=True):
    """The course's net for MNIST, with ReLU before the norm as there, or after it."""
    return conv_net(norm, [8, 16, 32, 64, 64], 10, relu_first=relu_first, first_ks=5)


def mlp(norm, ni, classes, width=64, layers=4):
    return nn.Sequential(
        *(dense(width if i else ni, width, norm) for i in range(layers)), nn.Linear(width, classes)
    )


def table_net(norm, features=16):
    """The norm on the raw features, then an MLP."""
    first = norm(features, 0)
    return nn.Sequential(nn.Identity() if first is None else first, mlp(norm, features, 1, 48, 3))


class EncoderDecoder(nn.Module):
    """(N, 1, H, W) → (N, H, W): two halvings, and back with the finer features beside."""

    def __init__(self, norm, width=8):
        super().__init__()
        w = width
        self.fine = nn.Sequential(conv(1, w, norm), conv(w, w, norm))
        self.middle = nn.Sequential(conv(w, 2 * w, norm, stride=2), conv(2 * w, 2 * w, norm))
        self.coarse = nn.Sequential(conv(2 * w, 3 * w, norm, stride=2), conv(3 * w, 3 * w, norm))
        self.up_middle, self.up_fine = conv(5 * w, 2 * w, norm), conv(3 * w, w, norm)
        self.head = nn.Conv2d(w, 1, 1)

    def forward(self, x):
        fine = self.fine(x)
        middle = self.middle(fine)
        up = self.up_middle(torch.cat([_doubled(self.coarse(middle)), middle], 1))
        return self.head(self.up_fine(torch.cat([_doubled(up), fine], 1)))[:, 0]


def _doubled(x):
    return F.interpolate(x, scale_factor=2)


class Recurrent(nn.Module):
    """(N, T, ni) → classes, from the last h of h = tanh(norm(W·x_t + U·h)): one norm for all steps of the sequence."""

    def __init__(self, norm, ni=14, width=64, classes=10):
        super().__init__()
        made = norm(width, 0)
        self.width = width
        self.input = nn.Linear(ni, width, bias=made is None)
        self.hidden = nn.Linear(width, width, bias=False)
        self.norm = nn.Identity() if made is None else made
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        h = x.new_zeros(len(x), self.width)
        for part in x.unbind(1):
            h = torch.tanh(self.norm(self.input(part) + self.hidden(h)))
        return self.head(h)


class TwoPasses(nn.Module):
    """A discriminator's step: pairs (N, 2, …) → logits (N, 2), the real ones in one pass and the fakes in another."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pairs):
        return torch.cat([self.net(part) for part in pairs.unbind(1)], 1)


def vgg(norm):
    layers, ni = [], 3
    for nf in (16, 32, 64):
        layers += [conv(ni, nf, norm), conv(nf, nf, norm), nn.MaxPool2d(2)]
        ni = nf
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


def resnet(norm, width=12):
    def residual(nf):
        return Residual(conv(nf, nf, norm), conv(nf, nf, norm))

    w = width
    return nn.Sequential(
        conv(3, w, norm),
        conv(w, 2 * w, norm, stride=2),
        residual(2 * w),
        conv(2 * w, 4 * w, norm, stride=2),
        conv(4 * w, 4 * w, norm, stride=2),
        residual(4 * w),
        Average(),
        nn.Linear(4 * w, 10),
    )


def initialise(model, seed: int) -> None:
    """Kaiming normal weights and zero biases, a function of the seed alone; the last layer's are 0.3 times as large."""
    torch.manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, *_CONVS.values()))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layers[-1].weight.mul_(0.3)


def weights(model, kinds=(nn.Linear, *_CONVS.values())) -> dict[str, tuple[str, nn.Parameter]]:
    """For each module of `kinds` its weight's full name and parameter, also where the weight is computed from it."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            own = dict(module.named_parameters())
            key = "weight" if "weight" in own else "parametrizations.weight.original"
            found[name] = f"{name}.{key}", own[key]
    return found
