"""Batch renormalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PeerNorm, channels, others


class BatchRenorm(PeerNorm):
    """Batch renormalisation over (N, C) or (N, C, *): batch norm corrected towards the running statistics.

    With the batch's mean and standard deviation m, s (biased) and the running ones M, S, training computes y = γ·((x −
    m)/s·r + d) + β, where r = s/S is limited to [1/r_max, r_max] and d = (m − M)/S to ±d_max; both are constants for
    the gradient. Evaluation normalises with M and S.

    Parameters
    ----------
    nf : int
        Number of channels C.
    mom : float, default 0.01
        Weight of the new batch in M and S, as in the paper. It starts as 1/step, so that a run shorter than the memory
        is not evaluated with the initial values of the buffers; the paper's run of 160 thousand steps did not need
        that.
    eps : float, default 1e-5
        Added to variances.
    r_max, d_max : float, default 3 and 5
        Limits at the end of the warm-up.
    warmup : (float, float, float), default (5000, 40000, 25000)
        Steps of plain batch norm (r = 1, d = 0), and the steps at which r_max and d_max are reached, linearly from
        there. This is the published schedule, for some 160 thousand steps; `scaled_warmup` adapts it to another length.

    Notes
    -----
    It works with one element per channel, where s² = ε: the layer then passes d, to which there is no gradient.

    Examples
    --------
    >>> BatchRenorm(8, warmup=BatchRenorm.scaled_warmup(320)).bounds(step=10)
    (1.0, 0.0)

    References
    ----------
    S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", NeurIPS 2017,
    algorithm 1 and section 4.
    """

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self,
        nf: int,
        mom: float = 0.01,
        eps: float = 1e-5,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: tuple[float, float, float] = (5000, 40000, 25000),
    ) -> None:
        super().__init__(nf)
        if not (0 < mom <= 1 and eps > 0):
            raise ValueError(f"BatchRenorm needs 0 < mom <= 1 and eps > 0; got mom={mom}, eps={eps}")
        if not (r_max >= 1 and d_max >= 0):
            raise ValueError(f"BatchRenorm needs r_max >= 1 and d_max >= 0; got {r_max} and {d_max}")
        self.mom, self.eps, self.r_max, self.d_max = mom, eps, r_max, d_max
        self.warmup = tuple(warmup)
        self.register_buffer("running_mean", torch.zeros(nf))
        self.register_buffer("running_std", torch.ones(nf))

    @staticmethod
    def scaled_warmup(steps: int) -> tuple[float, float, float]:
        """The published schedule scaled to a run of `steps` steps: 1/32, 1/4 and 5/32 of it."""
        return steps / 32, steps / 4, steps * 5 / 32

    def bounds(self, step: int) -> tuple[float, float]:
        """r_max and d_max at `step`, counted from 0."""
        start, r_end, d_end = self.warmup

        def way(end: float) -> float:
            return float(step >= start) if end <= start else min(max((step - start) / (end - start), 0.0), 1.0)

        return 1 + (self.r_max - 1) * way(r_end), self.d_max * way(d_end)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if not self.training:
            return self._apply_to(x, self.running_mean, self.running_std, 1.0, 0.0)
        var, mean = torch.var_mean(x, others(x), correction=0)
        std = (var + self.eps).sqrt()
        with torch.no_grad():
            step = self._next_step()
            r_max, d_max = self.bounds(step)
            rate = max(self.mom, 1 / (step + 1))
            first = step == 0  # no running statistics to correct towards yet
            r = (std / self.running_std).clamp_(1 / r_max, r_max) if not first else torch.ones_like(std)
            d = ((mean - self.running_mean) / self.running_std).clamp_(-d_max, d_max) if not first else 0.0
            self.running_mean.lerp_(mean, rate)
            self.running_std.lerp_(std, rate)
        return self._apply_to(x, mean, std, r, d)

    def _apply_to(self, x: Tensor, mean: Tensor, std: Tensor, r: Tensor | float, d: Tensor | float) -> Tensor:
        scale = self.weight * r / std
        shift = self.bias + self.weight * d - mean * scale
        return torch.addcmul(channels(shift, x), x, channels(scale, x))

    def extra_repr(self) -> str:
        return f"{self.num_features}, mom={self.mom}, eps={self.eps}, r_max={self.r_max}, d_max={self.d_max}"


BatchRenorm2d = BatchRenorm  # the old name, from when it took only (N, C, H, W)
