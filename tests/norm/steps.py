"""Shared by the tests of the layer: one training step with everything it changes, test layers, the thread's layer."""

import math

import torch
from torch import nn

from fastrbn.norm import RECIPES, RunningBatchNorm

FAST = ("fused", "native")  # on the CPU
ALL = ("reference", *FAST)
HALF = (torch.bfloat16, torch.float16)


def with_backends(names, recipes=RECIPES):
    """(name, backend) for each named recipe on each CPU backend that has it."""
    return [(name, b) for name in names for b in ALL if b == "reference" or not recipes[name].plain_only]


def serving(dtype):
    """The backends that take input of this dtype on the CPU."""
    return [b for b in ALL if b != "native" or dtype not in HALF]


def layer_of(nf=3, recipe="default", backend="auto", dtype=torch.float32, kind=RunningBatchNorm, **settings):
    """A layer with random weight and bias (the same for the same arguments)."""
    layer = kind(nf, recipe=recipe, backend=backend, dtype=dtype, **settings)
    g = torch.Generator().manual_seed(nf)
    for p in layer.parameters():
        p.data.copy_(torch.randn(nf, generator=g, dtype=torch.float64) + 0.5)
    return layer


def buffers(layer):
    return {name: b.clone() for name, b in layer.named_buffers()}


def grads(layer):
    return {f"d{name}": p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def step(layer, x, dy):
    """One forward and backward pass under the upstream gradient dy: the output, every gradient and every buffer."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, **grads(layer), **buffers(layer)}


def assert_same(got, want, tol, note=""):
    """Assert that entries are within `tol` of `want`'s, relative to their norm (absolute below 1); 0: bit for bit."""
    assert got.keys() == want.keys()
    for name in want:
        a, b = got[name].detach(), want[name].detach()
        assert a.shape == b.shape, f"{name} {note}"
        if tol == 0 or not b.dtype.is_floating_point:
            assert torch.equal(a, b), f"{name} {note}: {a} is not {b}"
        else:
            a, b = a.double(), b.double()
            assert (a - b).norm() <= tol * b.norm().clamp_min(1.0), f"{name} {note}: {(a - b).norm()} of {b.norm()}"


def assert_unmoved(layer, before):
    assert_same(buffers(layer), before, 0)


def assert_holds_no_graph(layer):
    """Assert that no buffer and no remembered step requires a gradient or has a graph."""
    remembered = [t for taken in layer._recent for t in taken if isinstance(t, torch.Tensor)]
    for t in [*layer.buffers(), *remembered]:
        assert not t.requires_grad and t.grad_fn is None and t._base is None


class ThreadLayer(nn.Module):
    """Behaves like the layers of the course and the thread: running sums in the graph, moved in place."""

    def __init__(self, nf, mom=0.1, eps=1e-5):
        super().__init__()
        self.mom, self.eps, self.samples = mom, eps, 0
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        for name, shape in (("sums", nf), ("squares", nf), ("count", ())):
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, x):
        shape, dims = (1, -1) + (1,) * (x.dim() - 2), [d for d in range(x.dim()) if d != 1]
        if self.training:
            for b in (self.sums, self.squares):
                b.detach_()
            rate = 1 - (1 - self.mom) / math.sqrt(len(x) - 1)
            self.sums.lerp_(x.sum(dims), rate)
            self.squares.lerp_((x * x).sum(dims), rate)
            self.count.lerp_(torch.tensor(x.numel() / x.shape[1]), rate)
            self.samples += len(x)
        mean = self.sums / self.count
        var = self.squares / self.count - mean * mean
        if self.samples < 20:
            var = var.clamp_min(0.01)
        factor = self.weight / (var + self.eps).sqrt()
        return x * factor.view(shape) + (self.bias - mean * factor).view(shape)
