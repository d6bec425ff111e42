"""Norms that running batch norm is compared with and that PyTorch does not have, written from their papers.

They are here for `fastrbn compare`, plain and without own kernels: their speed says nothing about the method's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BatchRenorm2d", "FilterResponseNorm2d"]


class BatchRenorm2d(nn.Module):
    """Batch renormalisation over (N, C, H, W): batch norm, corrected towards the running statistics.

    With the batch's mean and deviation m, s (biased) and the running ones M, S, training computes
    y = γ·((x − m)/s·r + d) + β, where r = s/S within [1/r_max, r_max] and d = (m − M)/S within ±d_max, both constants
    to the gradient. Evaluation normalises with M and S.

    - `nf`: C. `eps` (1e-5): added to variances.
    - `mom` (0.01, the paper's): the weight of the new batch in M and S. It starts as 1/step, so that a run shorter than
      the memory is not evaluated with the values the buffers begin with; the paper, 160 thousand steps long, had no
      need to say.
    - `r_max` (3), `d_max` (5): the bounds at the end of the warm-up.
    - `warmup` (5000, 40000, 25000): steps of plain batch norm (r = 1, d = 0), and the steps at which r_max and d_max
      are reached, on a straight line from there. The published schedule, for some 160 thousand steps; `scaled_warmup`
      fits it to another length.

    Works at one element a channel, where s² = ε: the layer then passes d, to which there is no gradient.

    Source: S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    NeurIPS 2017, algorithm 1 and section 4.
    """

    def __init__(self, nf, mom=0.01, eps=1e-5, r_max=3.0, d_max=5.0, warmup=(5000, 40000, 25000)):
        super().__init__()
        if not (0 < mom <= 1 and eps > 0):
            raise ValueError(f"BatchRenorm2d needs 0 < mom <= 1 and eps > 0; got mom={mom}, eps={eps}")
        if not (r_max >= 1 and d_max >= 0):
            raise ValueError(f"BatchRenorm2d needs r_max of 1 or more and d_max of 0 or more; got {r_max} and {d_max}")
        self.num_features, self.mom, self.eps, self.r_max, self.d_max = nf, mom, eps, r_max, d_max
        self.warmup = tuple(warmup)
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        self.register_buffer("running_mean", torch.zeros(nf))
        self.register_buffer("running_std", torch.ones(nf))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        self._steps = None  # the same number on the host: bounds and rate are read from it without waiting

    @staticmethod
    def scaled_warmup(steps: int) -> tuple[float, float, float]:
        """The published schedule with its share of a run of `steps` steps: 1/32, 1/4 and 5/32 of it."""
        return steps / 32, steps / 4, steps * 5 / 32

    def bounds(self, step: int) -> tuple[float, float]:
        """r_max and d_max in force at `step`, counted from 0."""
        start, r_end, d_end = self.warmup

        def way(end):
            return float(step >= start) if end <= start else min(max((step - start) / (end - start), 0.0), 1.0)

        return 1 + (self.r_max - 1) * way(r_end), self.d_max * way(d_end)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._affine(x, self.running_mean, self.running_std, 1.0, 0.0)
        if self._steps is None:
            self._steps = int(self.num_batches_tracked)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        std = (var + self.eps).sqrt()
        with torch.no_grad():
            r_max, d_max = self.bounds(self._steps)
            rate = max(self.mom, 1 / (self._steps + 1))
            first = self._steps == 0  # there is nothing to correct towards yet
            r = (std / self.running_std).clamp_(1 / r_max, r_max) if not first else torch.ones_like(std)
            d = ((mean - self.running_mean) / self.running_std).clamp_(-d_max, d_max) if not first else 0.0
            self.running_mean.lerp_(mean, rate)
            self.running_std.lerp_(std, rate)
            self.num_batches_tracked += 1
            self._steps += 1
        return self._affine(x, mean, std, r, d)

    def _affine(self, x, mean, std, r, d):
        scale = self.weight * r / std
        shift = self.bias + self.weight * d - mean * scale
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1))

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._steps = None

    def extra_repr(self):
        return f"{self.num_features}, mom={self.mom}, eps={self.eps}, r_max={self.r_max}, d_max={self.d_max}"


class FilterResponseNorm2d(nn.Module):
    """Filter response norm over (N, C, H, W) with its thresholded linear unit, which takes the place of ReLU.

    ν² = mean of x² over H and W, for each sample and channel; y = γ·x/√(ν² + ε) + β; output max(y, τ), with τ learnt
    for each channel. No batch, no mean: training and evaluation are one.

    - `nf`: C.
    - `eps` (1e-6): the constant part of ε. Where H·W is 1, x/√(x² + 1e-6) is all but the sign of x; for such layers
      the paper learns ε.
    - `learn_eps` (1e-4): ε = eps + |e| with e learnt for each channel from this value; None: e = 0.
    - `activate` (True): False leaves out τ.

    `activates` tells who builds the net that no ReLU is needed beside it.

    Source: S. Singh, S. Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of
    Deep Neural Networks", CVPR 2020, section 3. The learning rate warm-up recommended there is not the layer's.
    """

    def __init__(self, nf, eps=1e-6, learn_eps=1e-4, activate=True):
        super().__init__()
        if not eps > 0 or (learn_eps is not None and not learn_eps > 0):
            raise ValueError(
                f"FilterResponseNorm2d needs eps and learn_eps above 0 (or learn_eps=None); got {eps} and {learn_eps}"
            )
        self.num_features, self.eps, self.activates = nf, eps, bool(activate)
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        self.learnt_eps = None if learn_eps is None else nn.Parameter(torch.full((nf,), float(learn_eps)))
        self.threshold = nn.Parameter(torch.zeros(nf)) if activate else None

    def forward(self, x: Tensor) -> Tensor:
        eps = self.eps if self.learnt_eps is None else self.eps + self.learnt_eps.abs().view(-1, 1, 1)
        scale = self.weight.view(-1, 1, 1) * (x.square().mean((2, 3), keepdim=True) + eps).rsqrt()
        y = torch.addcmul(self.bias.view(-1, 1, 1), x, scale)
        return y if self.threshold is None else torch.maximum(y, self.threshold.view(-1, 1, 1))

    def extra_repr(self):
        return f"{self.num_features}, eps={self.eps}, learnt={self.learnt_eps is not None}, activates={self.activates}"
