"""Online normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import PeerNorm, channels


class OnlineNorm(PeerNorm):
    """Online normalization over (N, C) or (N, C, *): running statistics, and a control process for the gradient.

    The samples of a batch are processed one after another, in order. With μ and σ² of the samples before it, each
    becomes

        y = (x − μ)/σ, then μ ← α_f·μ + (1 − α_f)·m and σ² ← α_f·σ² + (1 − α_f)·v + α_f(1 − α_f)·(m − μ)²,

    where m and v are the sample's mean and variance over the positions of a channel (v is 0 for one position). The
    gradient does not go through μ and σ; two accumulated errors keep it orthogonal to y and to 1 on average. With means
    ⟨ ⟩ over the same positions, sample by sample,

        g̃ = g − (1 − α_b)·ε_y·y, then ε_y ← ε_y + ⟨g̃·y⟩;
        dx = g̃/σ − (1 − α_b)·ε_1, then ε_1 ← ε_1 + ⟨dx⟩.

    The output is γ·y + β, divided by its root mean square over the whole sample (layer scaling).

    Parameters
    ----------
    nf : int
        Number of channels C.
    alpha_f, alpha_b : float, default 0.999 and 0.99
        Decay per sample of the statistics and of the accumulated errors. A batch of N decays by their Nth power.
    eps : float, default 1e-5
        Added to σ² and to the mean square of layer scaling.
    layer_scaling : bool, default True
        Divide by the root mean square.

    Notes
    -----
    Evaluation differs from training only in that the statistics are constant. The accumulated errors are buffers that
    the backward pass changes. They have the scale of the gradient, so they are affected by a loss that is a mean over
    batches of changing size, or by the factor of a GradScaler. A second backward pass over a retained graph advances
    them again; gradients of gradients are not supported.

    Examples
    --------
    >>> OnlineNorm(8)(torch.randn(1, 8, 5, 5)).shape   # a batch of one trains
    torch.Size([1, 8, 5, 5])

    References
    ----------
    V. Chiley et al., "Online Normalization for Training Neural Networks", NeurIPS 2019, sections 3.1 to 3.3.
    """

    running_mean: Tensor
    running_var: Tensor
    error_y: Tensor
    error_1: Tensor

    def __init__(
        self, nf: int, alpha_f: float = 0.999, alpha_b: float = 0.99, eps: float = 1e-5, layer_scaling: bool = True
    ) -> None:
        super().__init__(nf)
        if not (0 <= alpha_f < 1 and 0 <= alpha_b < 1 and eps > 0):
            raise ValueError(
                f"OnlineNorm needs 0 <= alpha_f, alpha_b < 1 and eps > 0; got {alpha_f}, {alpha_b} and {eps}"
            )
        self.alpha_f, self.alpha_b, self.eps, self.layer_scaling = alpha_f, alpha_b, eps, bool(layer_scaling)
        self.register_buffer("running_mean", torch.zeros(nf))
        self.register_buffer("running_var", torch.ones(nf))
        self.register_buffer("error_y", torch.zeros(nf))
        self.register_buffer("error_1", torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        x = x.to(self.running_mean.dtype)
        if self.training:
            mean, std = self._advance(x.detach())
            y = _Controlled.apply(x, mean, std, self)
        else:
            y = (x - channels(self.running_mean, x)) / channels((self.running_var + self.eps).sqrt(), x)
        z = self._affine(y)
        if not self.layer_scaling:
            return z
        return z * (z.square().mean(list(range(1, z.dim())), keepdim=True) + self.eps).rsqrt()

    @torch.no_grad()
    def _advance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and deviation, (N, C) each, to normalise each sample with; updates the statistics."""
        self._next_step()
        v, m = torch.var_mean(x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), 2, correction=0)
        decay = torch.full_like(m, self.alpha_f)
        means = _recurrence(self.running_mean, decay, (1 - self.alpha_f) * m)
        spread = (1 - self.alpha_f) * (v + self.alpha_f * (m - means[:-1]).square())
        variances = _recurrence(self.running_var, decay, spread)
        self.running_mean.copy_(means[-1])
        self.running_var.copy_(variances[-1])
        return means[:-1], (variances[:-1] + self.eps).sqrt()

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, alpha_f={self.alpha_f}, alpha_b={self.alpha_b}, eps={self.eps}, "
            f"layer_scaling={self.layer_scaling}"
        )


def _recurrence(state: Tensor, factors: Tensor, terms: Tensor) -> Tensor:
    """s ← factor·s + term along the first dimension: all states, starting with the given one."""
    states = [state]
    for factor, term in zip(factors.unbind(0), terms.unbind(0)):
        states.append(torch.addcmul(term, factor, states[-1]))
    return torch.stack(states)


def _sample_means(x: Tensor) -> Tensor:
    """(N, C, *) to (N, C): means over the positions."""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


class _Controlled(torch.autograd.Function):
    """(x − mean)/std with the control process for its gradient; reads and changes the layer's two errors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, std: Tensor, layer: OnlineNorm) -> Tensor:
        y = (x - channels(mean, x)) / channels(std, x)
        ctx.save_for_backward(y, std)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (y, std), layer = ctx.saved_tensors, ctx.layer
        rate = 1 - layer.alpha_b
        # ⟨g̃y⟩ = ⟨gy⟩ − rate·ε_y·⟨y²⟩, so ε_y moves by a recurrence of the samples' means
        errors = _recurrence(layer.error_y, 1 - rate * _sample_means(y.square()), _sample_means(g * y))
        layer.error_y.copy_(errors[-1])
        g = (g - channels(rate * errors[:-1], y) * y) / channels(std, y)
        means = _sample_means(g)
        errors = _recurrence(layer.error_1, torch.full_like(means, layer.alpha_b), means)
        layer.error_1.copy_(errors[-1])
        return g - channels(rate * errors[:-1], y), None, None, None
