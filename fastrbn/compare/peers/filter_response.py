"""Filter response norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

    def __init__(self, nf: int, eps: float = 1e-6, learn_eps: float | None = 1e-4, activate: bool = True) -> None:
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
