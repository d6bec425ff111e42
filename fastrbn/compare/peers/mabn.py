"""Moving average batch normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import PeerNorm, channels, others


class MABN(PeerNorm):
    """Moving average batch normalization over (N, C) or (N, C, *): moving averages forward and backward.

    It normalises with the mean square instead of the variance; centralised weights in the preceding layer make up for
    the mean (`centralize_weights`). With χ̄² the average of the mean of x² over the last m batches, and M its
    exponential average,

        z = x/χ̄, y = γ·r·z + β, where r = χ̄/√M within [1/r_max, r_max] is a constant for the gradient.

    Backward, with g = γ·r·dy, Ψ = ⟨g·z⟩ over the batch and Ψ̄ its average over the last m: dx = (g − z·Ψ̄)/χ̄.
    Evaluation divides by √M.

    Parameters
    ----------
    nf : int
        Number of channels C.
    window : int, default 32
        Samples to average over: m = window // N batches, at least one. From batch size 32 on, only M has a memory.
    mom : float, default 0.02
        Weight of the new χ̄² in M. It starts as 1/step, so that a short run is not evaluated with the initial value.
    eps : float, default 1e-5
        Added to mean squares.
    r_max : float, default 5
        Limit of r.
    warmup : (float, float), default (100, 1000)
        Steps that use the batch's own χ² and Ψ, and steps with r = 1. The first is at least m.

    Notes
    -----
    Each forward pass in training counts as a batch for χ̄, and each backward pass for Ψ̄. Gradients of gradients are
    not supported.

    Examples
    --------
    >>> net = centralize_weights(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), MABN(8), nn.ReLU()))
    >>> net(torch.randn(1, 3, 7, 7)).shape   # a batch of one trains
    torch.Size([1, 8, 5, 5])

    References
    ----------
    J. Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", ICLR 2020,
    section 4; window, momentum, limits and warm-up as in the authors' published settings for ImageNet.
    """

    running_square: Tensor
    squares: Tensor
    products: Tensor

    def __init__(
        self,
        nf: int,
        window: int = 32,
        mom: float = 0.02,
        eps: float = 1e-5,
        r_max: float = 5.0,
        warmup: tuple[float, float] = (100, 1000),
    ) -> None:
        super().__init__(nf)
        if not (0 < mom <= 1 and eps > 0 and r_max >= 1 and window >= 1):
            raise ValueError(
                f"MABN needs 0 < mom <= 1, eps > 0, and r_max and window of 1 or more; got mom={mom}, eps={eps}, "
                f"r_max={r_max}, window={window}"
            )
        self.window, self.mom, self.eps, self.r_max, self.warmup = window, mom, eps, r_max, tuple(warmup)
        self.register_buffer("running_square", torch.ones(nf))
        self.register_buffer("squares", torch.zeros(window, nf))  # of the last batches, newest first
        self.register_buffer("products", torch.zeros(window, nf))  # Ψ, likewise

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        x = x.to(self.running_square.dtype)
        if not self.training:
            return self._affine(x * channels((self.running_square + self.eps).rsqrt(), x))
        with torch.no_grad():
            step, m = self._next_step(), max(1, self.window // max(1, len(x)))
            m = m if step >= max(m, self.warmup[0]) else 1
            _push(self.squares, x.square().mean(others(x)))
            square = self.squares[:m].mean(0)
            root = (square + self.eps).sqrt()
            r = torch.ones_like(root)
            if step >= max(1, self.warmup[1]):
                r = (root / (self.running_square + self.eps).sqrt()).clamp_(1 / self.r_max, self.r_max)
            self.running_square.lerp_(square, max(self.mom, 1 / (step + 1)))
        z = _Averaged.apply(x, root, m, self.products)
        return torch.addcmul(channels(self.bias, z), z, channels(self.weight * r, z))

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, window={self.window}, mom={self.mom}, eps={self.eps}, r_max={self.r_max}, "
            f"warmup={self.warmup}"
        )


def _push(rows: Tensor, row: Tensor) -> None:
    """Insert a row at the front and drop the last one, in place."""
    rows.copy_(torch.cat([row[None], rows[:-1]]))


class _Averaged(torch.autograd.Function):
    """x/root, whose gradient uses the average of ⟨g·z⟩ over the last `m` batches, kept in `products`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, m: int, products: Tensor) -> Tensor:
        z = x / channels(root, x)
        ctx.save_for_backward(z, root)
        ctx.m, ctx.products = m, products
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        z, root = ctx.saved_tensors
        _push(ctx.products, (g * z).mean(others(z)))
        mean = ctx.products[: ctx.m].mean(0)
        return (g - z * channels(mean, z)) / channels(root, z), None, None, None
