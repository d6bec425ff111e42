"""Mixup: train on mixtures of two samples and their losses."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch

from fastrbn.learn.batch import reduction as reduction_of
from fastrbn.learn.batch import unreduced
from fastrbn.learn.callback import Callback

_REMEMBERED = 32  # batches whose mixture is known; more than HaltOnNaN keeps for its replay


class MixUp(Callback):
    """Train on mixtures of two samples: λ·x + (1 − λ)·x′, with the losses of both targets mixed in the same way.

    `run.xb` becomes the mixture of the batch and a shuffled copy of it; `run.yb` stays the true targets, which metrics
    see. In training `run.loss_func` gives λ·loss(pred, y) + (1 − λ)·loss(pred, y′) for the length of the fit, reduced
    as the loss function reduces. Class weights and `ignore_index` weigh samples within their loss, but the mean is over
    all samples. Validation is not mixed. λ and the order are drawn from PyTorch's generator of the batch's device.

    `xb` (N, *) must be a floating-point tensor and `yb` (N, *) a tensor. The loss function must be able to give a loss
    for each sample: a module with an attribute `reduction`, or a function with that parameter, as PyTorch's are.

    Parameters
    ----------
    alpha : float, default 0.4
        λ is drawn for each sample from Beta(alpha, alpha), and the larger of λ and 1 − λ is used, so that each sample
        keeps at least half of its weight. Near 0 hardly anything is mixed, at 1 mixtures are uniform.

    Raises
    ------
    ValueError
        If `alpha` is not a finite number above 0; in the fit, if the loss function gives no loss for each sample.
    TypeError
        In the fit, if a batch is not a floating-point tensor and a tensor of targets.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(MixUp, alpha=0.2), Recorder])
    >>> run.fit(1, learn)
    >>> len(run.recorder.losses)
    16

    References
    ----------
    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; fast.ai course, part 2 (2019), notebook 10b.
    """

    def __init__(self, alpha: float = 0.4):
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
            raise ValueError(f"MixUp: alpha must be a finite number above 0, such as 0.4; got {alpha!r}")
        self.alpha = float(alpha)
        self._clear()

    def _clear(self) -> None:
        self._whole: Any = None  # the loss function that is replaced, and the same without reduction
        self._each: Any = None
        self._reduction = ""
        self._beta: torch.distributions.Beta | None = None
        self._mixed: collections.deque[tuple] = collections.deque(maxlen=_REMEMBERED)

    def begin_fit(self) -> None:
        self._clear()
        self._whole = self.run.loss_func
        self._each, self._reduction = _for_each_sample(self._whole)
        self.run.loss_func = self._loss

    def begin_batch(self) -> None:
        run = self.run
        if not run.in_train:
            return
        xb, yb = run.xb, run.yb
        _check(xb, yb)
        share = self._draw(xb)
        order = torch.randperm(len(xb), device=xb.device)
        run.xb = torch.lerp(xb[order], xb, share.view(-1, *[1] * (xb.dim() - 1)))
        self._mixed.appendleft((yb, yb[order], share))

    def _draw(self, xb: torch.Tensor) -> torch.Tensor:
        if self._beta is None or self._beta.concentration1.device != xb.device:
            alpha = torch.tensor(self.alpha, device=xb.device)
            self._beta = torch.distributions.Beta(alpha, alpha, validate_args=False)
        share = self._beta.sample((len(xb),))
        return torch.maximum(share, 1 - share).to(xb.dtype)

    def _loss(self, pred, yb):
        if not self.run.in_train:
            return self._whole(pred, yb)
        other, share = next((other, share) for own, other, share in self._mixed if own is yb)
        losses, others = (_by_sample(self._each(pred, y), share, self._reduction) for y in (yb, other))
        losses = torch.lerp(others, losses, share.to(losses.dtype))
        return losses.sum() if self._reduction == "sum" else losses.mean()

    def after_fit(self) -> None:
        self._clear()

    def __getstate__(self):
        return {"alpha": self.alpha}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._clear()

    def __repr__(self):
        return f"MixUp(alpha={self.alpha})"


def _check(xb: Any, yb: Any) -> None:
    if not (isinstance(xb, torch.Tensor) and isinstance(yb, torch.Tensor) and xb.is_floating_point()):
        got = ", ".join(str(t.dtype) if isinstance(t, torch.Tensor) else type(t).__name__ for t in (xb, yb))
        raise TypeError(
            f"MixUp needs batches of one floating-point tensor and one tensor of targets; got {got}: convert images to "
            f"floats first, or remove MixUp"
        )
    if len(xb) != len(yb):
        raise ValueError(f"MixUp needs one target per sample; got {len(xb)} samples and {len(yb)} targets")


def _for_each_sample(loss_func: Any) -> tuple[Callable, str]:
    """The loss function without reduction, and how it reduces: "mean" or "sum"."""
    reduction = reduction_of(loss_func)
    if reduction not in ("mean", "sum"):
        name = getattr(loss_func, "__name__", None) or repr(loss_func)
        raise ValueError(
            f"MixUp needs a loss function that can give a loss for each sample, and otherwise gives their mean or sum: "
            f"a module with an attribute reduction, or a function with that parameter, such as F.cross_entropy; got "
            f"{name}{'' if reduction is None else f' with reduction={reduction!r}'}"
        )
    return unreduced(loss_func), reduction


def _by_sample(losses: torch.Tensor, share: torch.Tensor, reduction: str) -> torch.Tensor:
    """Losses (N, *) as (N,): those of one sample (pixels, labels) become their mean or sum, as the loss reduces."""
    if losses.dim() == 0 or len(losses) != len(share):
        raise ValueError(
            f"with reduction='none' the loss function must give a loss for each of {len(share)} samples; got shape "
            f"{tuple(losses.shape)}"
        )
    if losses.dim() == 1:
        return losses
    return losses.flatten(1).sum(1) if reduction == "sum" else losses.flatten(1).mean(1)
