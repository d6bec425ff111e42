"""Norms to compare running batch norm with that PyTorch does not have, written from their papers.

They are for `fastrbn compare`, in plain PyTorch without custom kernels, so their speed says nothing about the methods.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .weights import centralize_weights, standardize_weights

__all__ = [
    "MABN",
    "BatchRenorm",
    "BatchRenorm2d",
    "FilterResponseNorm2d",
    "OnlineNorm",
    "centralize_weights",
    "standardize_weights",
]


class _Norm(nn.Module):
    """Common parts of the norms with a memory: γ, β, the number of training steps, and the check of the shape."""

    num_batches_tracked: Tensor

    def __init__(self, nf: int) -> None:
        super().__init__()
        self.num_features = nf
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        self._steps: int | None = None  # the same number on the host, so that reading it does not wait for the device

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} needs (N, C) or (N, C, *) with C = {self.num_features}; got {tuple(x.shape)}"
            )

    def _next_step(self) -> int:
        """Return the number of training steps before this one, and count this one."""
        if self._steps is None:
            self._steps = int(self.num_batches_tracked)
        self.num_batches_tracked += 1
        self._steps += 1
        return self._steps - 1

    def _affine(self, z: Tensor) -> Tensor:
        return torch.addcmul(_channels(self.bias, z), z, _channels(self.weight, z))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._steps = None


def _channels(v: Tensor, x: Tensor) -> Tensor:
    """(*, C) to (*, C, 1, …), which broadcasts against x of shape (N, C, *)."""
    return v.reshape(v.shape + (1,) * (x.dim() - 2))


def _others(x: Tensor) -> list[int]:
    """All dimensions except that of the channels."""
    return [d for d in range(x.dim()) if d != 1]


class BatchRenorm(_Norm):
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
        var, mean = torch.var_mean(x, _others(x), correction=0)
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
        return torch.addcmul(_channels(shift, x), x, _channels(scale, x))

    def extra_repr(self) -> str:
        return f"{self.num_features}, mom={self.mom}, eps={self.eps}, r_max={self.r_max}, d_max={self.d_max}"


BatchRenorm2d = BatchRenorm  # the old name, from when it took only (N, C, H, W)


class FilterResponseNorm2d(nn.Module):
    """Filter response norm over (N, C, H, W) with its thresholded linear unit, which replaces ReLU.

    ν² is the mean of x² over H and W, for each sample and channel; y = γ·x/√(ν² + ε) + β; the output is max(y, τ), with
    τ learnt per channel. It uses neither the batch nor a mean, so training and evaluation are the same.

    Parameters
    ----------
    nf : int
        Number of channels C.
    eps : float, default 1e-6
        Constant part of ε. Where H·W is 1, x/√(x² + 1e-6) is almost the sign of x; for such layers the paper learns ε.
    learn_eps : float or None, default 1e-4
        ε = eps + |e|, with e learnt per channel from this value; with None, e = 0.
    activate : bool, default True
        False leaves out τ.

    Attributes
    ----------
    activates : bool
        If True, whoever builds the net needs no ReLU beside this layer.

    Examples
    --------
    >>> FilterResponseNorm2d(8)(torch.randn(1, 8, 5, 5)).shape
    torch.Size([1, 8, 5, 5])

    References
    ----------
    S. Singh, S. Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
    Neural Networks", CVPR 2020, section 3. The learning rate warm-up recommended there is not part of the layer.
    """

    def __init__(
        self, nf: int, eps: float = 1e-6, learn_eps: float | None = 1e-4, activate: bool = True
    ) -> None:
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

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, learnt={self.learnt_eps is not None}, activates={self.activates}"


class OnlineNorm(_Norm):
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
            y = (x - _channels(self.running_mean, x)) / _channels((self.running_var + self.eps).sqrt(), x)
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
        y = (x - _channels(mean, x)) / _channels(std, x)
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
        g = (g - _channels(rate * errors[:-1], y) * y) / _channels(std, y)
        means = _sample_means(g)
        errors = _recurrence(layer.error_1, torch.full_like(means, layer.alpha_b), means)
        layer.error_1.copy_(errors[-1])
        return g - _channels(rate * errors[:-1], y), None, None, None


class MABN(_Norm):
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
            return self._affine(x * _channels((self.running_square + self.eps).rsqrt(), x))
        with torch.no_grad():
            step, m = self._next_step(), max(1, self.window // max(1, len(x)))
            m = m if step >= max(m, self.warmup[0]) else 1
            _push(self.squares, x.square().mean(_others(x)))
            square = self.squares[:m].mean(0)
            root = (square + self.eps).sqrt()
            r = torch.ones_like(root)
            if step >= max(1, self.warmup[1]):
                r = (root / (self.running_square + self.eps).sqrt()).clamp_(1 / self.r_max, self.r_max)
            self.running_square.lerp_(square, max(self.mom, 1 / (step + 1)))
        z = _Averaged.apply(x, root, m, self.products)
        return torch.addcmul(_channels(self.bias, z), z, _channels(self.weight * r, z))

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
        z = x / _channels(root, x)
        ctx.save_for_backward(z, root)
        ctx.m, ctx.products = m, products
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        z, root = ctx.saved_tensors
        _push(ctx.products, (g * z).mean(_others(z)))
        mean = ctx.products[: ctx.m].mean(0)
        return (g - z * _channels(mean, z)) / _channels(root, z), None, None, None
