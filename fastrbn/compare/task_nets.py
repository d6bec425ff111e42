"""Nets of the tasks. Each takes `norm(channels, dims)`; `dims` is the number of axes after the channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrbn.models import Residual

Norm = Callable[[int, int], nn.Module | None]
Kinds = type[nn.Module] | tuple[type[nn.Module], ...]

_CONVS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def block(layer: Callable[..., nn.Module], norm: Norm, nf: int, dims: int, relu_first: bool = False) -> nn.Sequential:
    """`layer`, norm and ReLU, or ReLU before the norm. `layer(bias)` makes the convolution or linear layer."""
    made = norm(nf, dims)
    relu: list[nn.Module] = [] if getattr(made, "activates", False) else [nn.ReLU()]
    normed = [] if made is None else [made]
    return nn.Sequential(layer(bias=made is None), *(relu + normed if relu_first else normed + relu))


def conv(
    ni: int, nf: int, norm: Norm, dims: int = 2, ks: int = 3, stride: int = 1, relu_first: bool = False
) -> nn.Sequential:
    """A `block` with a convolution of `dims` dimensions."""

    def layer(bias: bool) -> nn.Module:
        return _CONVS[dims](ni, nf, ks, stride, ks // 2, bias=bias)

    return block(layer, norm, nf, dims, relu_first)


def dense(ni: int, nf: int, norm: Norm) -> nn.Sequential:
    """A `block` with a linear layer."""
    return block(lambda bias: nn.Linear(ni, nf, bias=bias), norm, nf, 0)


class Average(nn.Module):
    """(N, C, *) to (N, C): the mean over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def conv_net(
    norm: Norm,
    widths: Sequence[int],
    classes: int,
    dims: int = 2,
    strides: Sequence[int] | None = None,
    relu_first: bool = False,
    first_ks: int = 3,
    ni: int = 1,
) -> nn.Sequential:
    """Convolutions of the given widths, average pooling and a linear layer."""
    layers = []
    for i, nf in enumerate(widths):
        ks, stride = first_ks if i == 0 else 3, strides[i] if strides else 2
        layers.append(conv(ni, nf, norm, dims, ks, stride, relu_first))
        ni = nf
    return nn.Sequential(*layers, Average(), nn.Linear(ni, classes))


def course(norm: Norm, relu_first: bool = True) -> nn.Sequential:
    """The course's net for MNIST, with ReLU before the norm as in the course, or after it."""
    return conv_net(norm, [8, 16, 32, 64, 64], 10, relu_first=relu_first, first_ks=5)


def mlp(norm: Norm, ni: int, classes: int, width: int = 64, layers: int = 4) -> nn.Sequential:
    """Dense blocks and a linear layer."""
    return nn.Sequential(*(dense(width if i else ni, width, norm) for i in range(layers)), nn.Linear(width, classes))


def table_net(norm: Norm, features: int = 16) -> nn.Sequential:
    """The norm on the raw features, then an MLP."""
    first = norm(features, 0)
    return nn.Sequential(nn.Identity() if first is None else first, mlp(norm, features, 1, 48, 3))


class EncoderDecoder(nn.Module):
    """A U-Net: (N, ni, H, W) to (N, outputs, H, W), or (N, H, W) with one output.

    Level i has (i + 1)·width channels at a 2^i-th of the size; on the way up finer features are concatenated.
    """

    def __init__(self, norm: Norm, width: int = 8, levels: int = 3, ni: int = 1, outputs: int = 1) -> None:
        super().__init__()
        widths = [width * (i + 1) for i in range(levels)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, nf in enumerate(widths):
            first = conv(widths[i - 1] if i else ni, nf, norm, stride=2 if i else 1)
            self.down.append(nn.Sequential(first, conv(nf, nf, norm)))
        for nf in reversed(widths[:-1]):
            self.up.append(conv(2 * nf + width, nf, norm))
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        finer = []
        for down in self.down:
            x = down(x)
            finer.append(x)
        for up, fine in zip(self.up, finer[-2::-1]):
            x = up(torch.cat([_doubled(x), fine], 1))
        return self.head(x).squeeze(1)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2)


class Middle(nn.Module):
    """(N, C, H, W) to the middle, (N, C, size, size)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        top, left = ((n - self.size) // 2 for n in x.shape[2:])
        return x[..., top : top + self.size, left : left + self.size]


def inpainter(norm: Norm, width: int = 16, levels: int = 3) -> nn.Sequential:
    """A U-Net whose output is the middle 12×12 of an image in colour."""
    return nn.Sequential(EncoderDecoder(norm, width, levels, ni=3, outputs=3), Middle(12))


class Recurrent(nn.Module):
    """(N, T, ni) to classes, from the last h of h = tanh(norm(W·x_t + U·h)); all time steps share one norm."""

    def __init__(self, norm: Norm, ni: int = 14, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        made = norm(width, 0)
        self.width = width
        self.input = nn.Linear(ni, width, bias=made is None)
        self.hidden = nn.Linear(width, width, bias=False)
        self.norm = nn.Identity() if made is None else made
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.width)
        for part in x.unbind(1):
            h = torch.tanh(self.norm(self.input(part) + self.hidden(h)))
        return self.head(h)


class TwoPasses(nn.Module):
    """A discriminator's step: pairs (N, 2, *) to logits (N, 2), real ones in one pass and fakes in another."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pairs: Tensor) -> Tensor:
        return torch.cat([self.net(part) for part in pairs.unbind(1)], 1)


def vgg(norm: Norm) -> nn.Sequential:
    """A small VGG for CIFAR-10: pairs of convolutions, max pooling."""
    layers: list[nn.Module] = []
    ni = 3
    for nf in (16, 32, 64):
        layers += [conv(ni, nf, norm), conv(nf, nf, norm), nn.MaxPool2d(2)]
        ni = nf
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


def resnet(norm: Norm, width: int = 12) -> nn.Sequential:
    """A small ResNet for CIFAR-10."""

    def residual(nf: int) -> nn.Module:
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


def quick_resnet(norm: Norm) -> nn.Sequential:
    """A ResNet for CIFAR-10 that halves images at once: more accurate than `resnet` after the same time on a CPU."""
    return nn.Sequential(
        conv(3, 24, norm, ks=5, stride=2),
        conv(24, 48, norm),
        nn.MaxPool2d(2),
        Residual(conv(48, 48, norm), conv(48, 48, norm)),
        nn.MaxPool2d(2),
        conv(48, 96, norm),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def initialise(model: nn.Module, seed: int) -> None:
    """Kaiming normal weights and zero biases, a function of the seed; the last layer's weights are scaled by 0.3."""
    torch.manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layers[-1].weight.mul_(0.3)


def weights(model: nn.Module, kinds: Kinds = LAYERS) -> dict[str, tuple[str, nn.Parameter]]:
    """Full name and parameter of the weight of each module of `kinds`, also if the weight is computed from it."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            own = dict(module.named_parameters())
            key = "weight" if "weight" in own else "parametrizations.weight.original"
            found[name] = f"{name}.{key}", own[key]
    return found
