"""Shared by all contenders: MNIST as tensors, the course's net in plain PyTorch, and batches that keep the time."""

import time

import torch
from torch import nn

BS, LR = 64, 0.1
SEED = 0


def mnist(root):
    """(x, y) of 50,000 training images and of 10,000 for validation: float32 (N, 1, 28, 28), normalised; int64 (N,)."""
    from torchvision.datasets import MNIST

    files = MNIST(root)
    x = files.data[:, None].float() / 255
    x = (x - x[:50_000].mean()) / x[:50_000].std()
    return (x[:50_000], files.targets[:50_000]), (x[50_000:], files.targets[50_000:])


def net():
    """The course's net with nn.BatchNorm2d, 8, 16, 32, 64, 64 channels; the same weights each time."""
    torch.manual_seed(SEED)
    layers, c = [], 1
    for i, nf in enumerate([8, 16, 32, 64, 64]):
        size = 5 if i == 0 else 3
        layers += [nn.Conv2d(c, nf, size, 2, size // 2, bias=False), nn.ReLU(), nn.BatchNorm2d(nf)]
        c = nf
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


def tiny():
    """As small as a model can be, the same weights each time."""
    torch.manual_seed(SEED)
    return nn.Linear(10, 10)


class Batches:
    """A loader that costs nothing: a list of ready batches. `starts` has the time at which each epoch began."""

    def __init__(self, n):
        generator = torch.Generator().manual_seed(SEED)
        self.batches = [
            (torch.randn(8, 10, generator=generator), torch.randint(0, 10, (8,), generator=generator)) for _ in range(n)
        ]
        self.starts = []

    @property
    def dataset(self):
        """(x, y) of all batches, for what wants a dataset even so."""
        return tuple(torch.cat(part) for part in zip(*self.batches, strict=True))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.starts.append(time.perf_counter())
        return iter(self.batches)
