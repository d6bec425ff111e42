"""Data of the tasks, drawn from a fixed seed or taken from MNIST and CIFAR-10.

Each function takes the folder of the data sets and returns x, y, validation x, validation y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrbn.data import Dataset, load_dataset

_images = lru_cache(2)(load_dataset)  # several tasks share a data set

Root = str | Path | None
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def _draw(seed: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[int, int], Tensor]]:
    """Functions that draw uniform numbers in 0-1, normal numbers, and classes."""
    g = torch.Generator().manual_seed(seed)
    return (
        lambda *shape: torch.rand(shape, generator=g),
        lambda *shape: torch.randn(shape, generator=g),
        lambda n, c: torch.randint(0, c, (n,), generator=g),
    )


def _split(x: Tensor, y: Tensor, n: int) -> Tensors:
    return x[:n], y[:n], x[n:], y[n:]


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def shapes(root: Root = None, gain: bool = False, n: int = 3000, n_valid: int = 400, size: int = 24) -> Tensors:
    """Three discs or squares on waves and noise, (N, 1, size, size); y is 1 inside a shape.

    With `gain` each image has its own gain (log-normal, σ 0.7) and offset (normal).
    """
    rand, randn, _ = _draw(1)
    total, axis = n + n_valid, torch.arange(size).float()
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")
    x, y = torch.zeros(total, size, size), torch.zeros(total, size, size)
    for _ in range(3):
        dx, dy = xx - rand(total, 1, 1) * size, yy - rand(total, 1, 1) * size
        radius, round_, level = 2 + rand(total, 1, 1) * 4, rand(total, 1, 1) < 0.5, 0.5 + 0.5 * rand(total, 1, 1)
        inside = torch.where(round_, (dx**2 + dy**2).sqrt(), torch.maximum(dx.abs(), dy.abs()) / 0.9) < radius
        x, y = torch.where(inside, level, x), torch.where(inside, 1.0, y)
    x = x + 0.3 * randn(*x.shape) + 0.5 * torch.sin(xx * rand(total, 1, 1) + yy * rand(total, 1, 1))
    if gain:
        x = x * torch.exp(0.7 * randn(total, 1, 1)) + randn(total, 1, 1)
    return _split(_standardised(x).unsqueeze(1), y, n)


def signals(root: Root = None, n: int = 4000, n_valid: int = 1000, length: int = 96, classes: int = 6) -> Tensors:
    """A short burst on a slow wave with noise, (N, 1, length); the class is the burst's frequency.

    Each signal has its own gain and offset.
    """
    rand, randn, pick = _draw(2)
    total, t = n + n_valid, torch.arange(length).float()
    y = pick(total, classes)
    frequency, place = (0.15 + 0.08 * y).unsqueeze(1), 20 + rand(total, 1) * (length - 40)
    burst = torch.sin(frequency * t + 2 * math.pi * rand(total, 1)) * torch.exp(-(((t - place) / 14) ** 2))
    slow = 0.5 * torch.sin(0.1 * rand(total, 1) * t + 2 * math.pi * rand(total, 1))
    x = (burst + slow + 0.35 * randn(total, length)) * torch.exp(0.7 * randn(total, 1)) + randn(total, 1)
    return _split(_standardised(x).unsqueeze(1), y, n)


def volumes(root: Root = None, n: int = 3000, n_valid: int = 600, size: int = 10) -> Tensors:
    """A ball, cube, octahedron, cylinder or three crossed bars with noise, (N, 1, size, size, size); 5 classes."""
    rand, randn, pick = _draw(3)
    total, axis = n + n_valid, torch.arange(size).float()
    y = pick(total, 5)
    zyx = torch.meshgrid(axis, axis, axis, indexing="ij")
    dz, dy, dx = ((a - (2.5 + rand(total, 1, 1, 1) * (size - 5))).abs() for a in zyx)
    s = 1.5 + 1.5 * rand(total, 1, 1, 1)
    bars = [(a < 1.4 * s) & (b < 0.9) & (c < 0.9) for a, b, c in ((dx, dy, dz), (dy, dz, dx), (dz, dx, dy))]
    bodies = [
        (dx**2 + dy**2 + dz**2).sqrt() < s,
        torch.maximum(torch.maximum(dx, dy), dz) < 0.85 * s,
        dx + dy + dz < 1.5 * s,
        ((dx**2 + dy**2).sqrt() < 0.7 * s) & (dz < 1.3 * s),
        bars[0] | bars[1] | bars[2],
    ]
    x = torch.stack(bodies)[y, torch.arange(total)] * (0.6 + 0.6 * rand(total, 1, 1, 1))
    return _split(_standardised(x + 0.15 * randn(*x.shape)).unsqueeze(1), y, n)


def table(root: Root = None, n: int = 6000, n_valid: int = 1500, features: int = 16) -> Tensors:
    """Raw features with very different scales and offsets, (N, features), and a smooth function of them, (N, 1)."""
    rand, randn, _ = _draw(4)
    total = n + n_valid
    x = randn(total, features) * torch.exp(1.5 * randn(features)) + 3 * randn(features)
    z = (x - x.mean(0)) / x.std(0)
    y = torch.tanh(z @ randn(features, 24) / 4) @ randn(24, 1) + 0.5 * z[:, :1] * z[:, 1:2]
    return _split(x, y / y.std() + 0.1 * randn(total, 1), n)


def digits(root: Root = None, n: int = 12_000, n_valid: int = 4000, halved: bool = False) -> Tensors:
    """The first images of MNIST, (N, 1, 28, 28), or (N, 1, 14, 14) if `halved`."""
    images = _images("mnist", root)
    x, valid_x = (
        F.avg_pool2d((part.x[:m].float() / 255 - images.mean[0]) / images.std[0], 1 + halved)
        for part, m in ((images.train, n), (images.valid, n_valid))
    )
    return x, images.train.y[:n], valid_x, images.valid.y[:n_valid]


FRAMES = 8
"""Frames of a clip in `filmed`."""


def filmed(root: Root = None, n: int = 2000, reach: int = 2, noise: float = 0.2) -> Tensors:
    """`n` images of MNIST as clips of `FRAMES` noisy frames in which the digit wanders; validation on plain images.

    Each frame moves the digit by up to a pixel along each axis, at most `reach` pixels from its place.
    """
    rand, randn, _ = _draw(5)
    x, y, valid_x, valid_y = digits(root, n)
    at, shifts = torch.zeros(2, len(x)), []
    for _ in range(FRAMES):
        at = (at + (3 * rand(2, len(x))).floor() - 1).clamp(-reach, reach)
        shifts.append(at.long() + reach)
    windows = F.pad(x[:, 0], [reach] * 4, value=x.min().item()).unfold(1, 28, 1).unfold(2, 28, 1)
    frames = torch.stack([windows[torch.arange(len(x)), dy, dx] for dy, dx in shifts], 1).flatten(0, 1)
    return (frames + noise * randn(*frames.shape)).unsqueeze(1), y.repeat_interleave(FRAMES), valid_x, valid_y


def small_digits(root: Root = None, flat: bool = False) -> Tensors:
    """Halved MNIST as sequences of rows, (N, 14, 14), or (N, 196) if `flat`."""
    x, y, valid_x, valid_y = digits(root, halved=True)
    return (x.flatten(1), y, valid_x.flatten(1), valid_y) if flat else (x[:, 0], y, valid_x[:, 0], valid_y)


def other_digits(root: Root = None, n: int = 2000, n_valid: int = 4000) -> Tensors:
    """Images of MNIST that look different: rotated by a quarter turn, dark on light, with half the contrast."""
    x, y, valid_x, valid_y = digits(root, n, n_valid)
    return 1 - 0.5 * x.rot90(1, (2, 3)), y, 1 - 0.5 * valid_x.rot90(1, (2, 3)), valid_y


def real_and_fake(root: Root = None) -> Tensors:
    """Pairs (N, 2, 1, 14, 14) of a real digit and a fake one; y is (1, 0).

    A fake has the upper half of one digit and the lower half of another.
    """
    x, _, valid_x, _ = digits(root, halved=True)

    def pairs(real: Tensor) -> tuple[Tensor, Tensor]:
        others = real.roll(1, 0)
        fake = torch.cat([others[:, :, :7], others.roll(1, 0)[:, :, 7:]], 2)
        return torch.stack([real, fake], 1), torch.tensor([1.0, 0.0]).expand(len(real), 2)

    return *pairs(x), *pairs(valid_x)


ANIMALS, VEHICLES = (2, 3, 4, 5, 6, 7), (0, 1, 8, 9)  # classes of CIFAR-10


def cifar(root: Root = None, n: int = 8000, n_valid: int = 2000, classes: Sequence[int] = range(10)) -> Tensors:
    """A fixed random part of CIFAR-10, (N, 3, 32, 32), or of some of its classes, numbered from 0."""
    images, wanted = _images("cifar10", root), torch.tensor(classes)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (images.mean, images.std))

    def part(data: Dataset, m: int) -> tuple[Tensor, Tensor]:
        members = torch.nonzero(torch.isin(data.y, wanted))[:, 0]
        i = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(0))[:m]]
        return (data.x[i].float() / 255 - mean) / std, torch.searchsorted(wanted, data.y[i])

    return *part(images.train, n), *part(images.valid, n_valid)


def canvases(root: Root = None, n: int = 3000, n_valid: int = 300, cells: int = 2, cell: int = 14) -> Tensors:
    """Digits of MNIST on clutter, (N, 1, cells·cell, cells·cell); y is each pixel's class.

    Class 0 is background, c + 1 the digit c. Each of cells×cells places has a digit with probability 0.8. Digits differ
    in size, brightness and offset from their place. Behind them are as many fragments of other digits; the whole has
    slow illumination and noise.
    """
    images = _images("mnist", root)
    x, y = _drawn_canvases(images.train, n, cells, cell, seed=5)
    valid_x, valid_y = _drawn_canvases(images.valid, n_valid, cells, cell, seed=6)
    mean, std = x.mean(), x.std()
    return (x - mean) / std, y, (valid_x - mean) / std, valid_y


def _drawn_canvases(part: Dataset, n: int, cells: int, cell: int, seed: int) -> tuple[Tensor, Tensor]:
    rand, randn, pick = _draw(seed)
    size = cells * cell
    x, y = torch.zeros(n, 1, size, size), torch.zeros(n, size, size, dtype=torch.int64)

    def placed(image: Tensor, place: Tensor) -> Tensor:
        """Each image with a side of 0.9 to 1.3 cells and its centre at `place`, from -1 to 1."""
        zoom = cells / (0.9 + 0.4 * rand(n, 1, 1))
        theta = zoom * torch.cat([torch.eye(2).expand(n, 2, 2), -place.unsqueeze(2)], 2)
        return F.grid_sample(image, F.affine_grid(theta, [n, 1, size, size], align_corners=False), align_corners=False)

    rows, columns = torch.arange(28.0).view(28, 1), torch.arange(28.0)
    for _ in range(cells**2):
        top, left = 5 + 10 * rand(n, 1, 1, 1), 5 + 10 * rand(n, 1, 1, 1)
        window = ((rows - top - 4).abs() < 4) & ((columns - left - 4).abs() < 4)
        fragment = placed(part.x[pick(n, len(part))].float() / 255 * window, 2 * rand(n, 2) - 1)
        x = torch.maximum(x, (0.4 + 0.6 * rand(n, 1, 1, 1)) * fragment)
    for at in range(cells**2):
        i, there = pick(n, len(part)), rand(n, 1, 1, 1) < 0.8
        centre = torch.tensor([2 * (at % cells) + 1, 2 * (at // cells) + 1]) / cells - 1
        ink = there * placed(part.x[i].float() / 255, centre + 0.6 / cells * (rand(n, 2) - 0.5))
        x = x + ink * (0.4 + 0.6 * rand(n, 1, 1, 1) - x)
        y = torch.where(ink[:, 0] > 0.5, part.y[i].view(n, 1, 1) + 1, y)
    axis, slope = torch.linspace(-0.5, 0.5, size), 2 * rand(n, 2, 1, 1) - 1
    light = axis.view(size, 1) * slope[:, :1] + axis * slope[:, 1:]
    return x * (1 + light) + 0.5 * light + 0.1 * randn(*x.shape), y


def inpainting(root: Root = None, n: int = 8000, n_valid: int = 1000) -> Tensors:
    """Images of CIFAR-10 without their middle, (N, 3, 32, 32); y is that middle, (N, 3, 12, 12)."""
    x, _, valid_x, _ = cifar(root, n, n_valid)
    middle = (..., slice(10, 22), slice(10, 22))
    y, valid_y = x[middle].clone(), valid_x[middle].clone()
    x[middle] = valid_x[middle] = 0
    return x, y, valid_x, valid_y
