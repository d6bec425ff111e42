"""Mixup and CutMix: train on mixtures of two samples and their losses."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch

from fastrbn.learn.batch import reduction as reduction_of
from fastrbn.learn.batch import unreduced
from fastrbn.learn.callback import Callback
from fastrbn.util import apply_to, items_of

_REMEMBERED = 32  # batches whose mixture is known; more than HaltOnNaN keeps for its replay


class _Mixing(Callback):
    """Replaces each training batch by mixtures of its samples, and the loss by the mixture of both targets' losses.

    If a run has several of them, the first one acts for all, and picks one at random for each batch.
    """

    def __init__(self, alpha: float):
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
            raise ValueError(
                f"{type(self).__name__}: alpha must be a finite number above 0, such as 0.4; got {alpha!r}"
            )
        self.alpha = float(alpha)
        self._clear()

    def _clear(self) -> None:
        self._team: list[_Mixing] = []
        self._whole: Any = None  # the loss function that is replaced, and the same without reduction
        self._each: Any = None
        self._reduction = ""
        self._draws: Any = None  # the distribution of λ
        self._mixed: collections.deque[tuple] = collections.deque(maxlen=_REMEMBERED)

    def begin_fit(self) -> None:
        self._clear()
        self._team = [cb for cb in self.run.cbs if isinstance(cb, _Mixing)]
        if self._team[0] is self:
            self._whole = self.run.loss_func
            if self._whole is None:
                raise ValueError(
                    f"{type(self).__name__} mixes the losses of two targets, and this learner has no loss function: "
                    f"give it one, Learner(model, opt, loss_func, data), and let the model return its predictions"
                )
            if any(isinstance(cb, MixUp) for cb in self._team):
                self._each, self._reduction = _for_each_sample(self._whole)
            self.run.loss_func = self._loss

    def begin_batch(self) -> None:
        run, team = self.run, self._team
        if not run.in_train or team[0] is not self:
            return
        xb, yb = run.xb, run.yb
        chosen = self if len(team) == 1 else team[int(torch.randint(len(team), ()))]
        chosen._check(xb, yb)
        run.xb, order, share = chosen._mix(xb)
        self._mixed.appendleft((yb, yb[order], share))

    def _check(self, xb: Any, yb: Any) -> None:
        name, inputs = type(self).__name__, [*items_of(xb, torch.Tensor)]
        if not inputs or not isinstance(yb, torch.Tensor) or not all(t.is_floating_point() for t in inputs):
            got = ", ".join(str(t.dtype) if isinstance(t, torch.Tensor) else type(t).__name__ for t in (xb, yb))
            raise TypeError(
                f"{name} needs floating-point inputs and one tensor of targets; got {got}: convert images to floats "
                f"first, or remove {name}"
            )
        for t in inputs:
            if t.dim() == 0 or len(t) != len(yb):
                got = f"{len(t)} samples" if t.dim() else "an input without dimensions"
                raise ValueError(f"{name} needs one target per sample; got {got} and {len(yb)} targets")

    def _mix(self, xb: Any) -> tuple[Any, torch.Tensor, torch.Tensor | float]:
        """The mixed inputs, the order of the samples mixed in, and the share that each sample keeps."""
        raise NotImplementedError

    def _loss(self, pred, yb):
        if not self.run.in_train:
            return self._whole(pred, yb)
        other, share = next((other, share) for own, other, share in self._mixed if own is yb)
        if isinstance(share, float):
            return share * self._whole(pred, yb) + (1 - share) * self._whole(pred, other)
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
        return f"{type(self).__name__}(alpha={self.alpha})"


class MixUp(_Mixing):
    """Train on mixtures of two samples: λ·x + (1 − λ)·x′, with the losses of both targets mixed in the same way.

    `run.xb` becomes the mixture of the batch and a shuffled copy of it; `run.yb` stays the true targets, which metrics
    see. In training `run.loss_func` gives λ·loss(pred, y) + (1 − λ)·loss(pred, y′) for the length of the fit, reduced
    as the loss function reduces. Class weights and `ignore_index` weigh samples within their loss, but the mean is over
    all samples. Validation is not mixed. λ and the order are drawn from PyTorch's generator of the batch's device.

    With `CutMix` in the same run, each batch gets one of the two at random.

    `xb` (N, *) must be a floating-point tensor, or several, and `yb` (N, *) a tensor. The loss function must be able to
    give a loss for each sample: a module with an attribute `reduction`, or a function with that parameter, as PyTorch's
    are.

    Parameters
    ----------
    alpha : float, default 0.4
        The course's value. λ is drawn for each sample from Beta(alpha, alpha), and the larger of λ and 1 − λ is used,
        so that each sample keeps at least half of its weight. Near 0 hardly anything is mixed, at 1 mixtures are
        uniform.

    Raises
    ------
    ValueError
        If `alpha` is not a finite number above 0; in the fit, if the loss function gives no loss for each sample.
    TypeError
        In the fit, if a batch is not floating-point inputs and a tensor of targets.

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
        super().__init__(alpha)

    def _mix(self, xb: Any) -> tuple[Any, torch.Tensor, torch.Tensor | float]:
        first = next(items_of(xb, torch.Tensor))
        share = self._draw(first)
        order = torch.randperm(len(first), device=first.device)

        def mixed(t: torch.Tensor) -> torch.Tensor:
            return torch.lerp(t[order], t, share.to(t.dtype).view(-1, *[1] * (t.dim() - 1)))

        return apply_to(xb, torch.Tensor, mixed), order, share

    def _draw(self, xb: torch.Tensor) -> torch.Tensor:
        if self._draws is None or self._draws.concentration1.device != xb.device:
            alpha = torch.tensor(self.alpha, device=xb.device)
            self._draws = torch.distributions.Beta(alpha, alpha, validate_args=False)
        share = self._draws.sample((len(xb),))
        return torch.maximum(share, 1 - share).to(xb.dtype)


class CutMix(_Mixing):
    """Paste a box of another image into each image, and mix the losses of both targets by area.

    `run.xb` becomes the batch with a box cut from a shuffled copy of it; `run.yb` stays the true targets, which metrics
    see. In training `run.loss_func` gives λ·loss(pred, y) + (1 − λ)·loss(pred, y′) for the length of the fit, where λ
    is the share of the image outside the box; any loss function works. Validation is not mixed. A batch has one box,
    which torchvision's v2.CutMix draws from PyTorch's CPU generator.

    With `MixUp` in the same run, each batch gets one of the two at random.

    `xb` (N, C, H, W) must be a floating-point tensor and `yb` (N,) or (N, K) a tensor with a target for each image.

    Parameters
    ----------
    alpha : float, default 1.0
        The share of the box is drawn from Beta(alpha, alpha): at 1 all shares are equally likely, near 0 the box is
        nothing or all of the image. 1 is the paper's value.

    Raises
    ------
    ValueError
        If `alpha` is not a finite number above 0; in the fit, if the batch does not hold images and a target for each.
    TypeError
        In the fit, if a batch is not a floating-point tensor and a tensor of targets.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[CutMix, partial(MixUp, 0.2), Recorder])
    >>> run.fit(1, learn)
    >>> len(run.recorder.losses)
    16

    References
    ----------
    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.
    """

    def __init__(self, alpha: float = 1.0):
        super().__init__(alpha)

    def _check(self, xb: Any, yb: Any) -> None:
        super()._check(xb, yb)
        if not isinstance(xb, torch.Tensor) or xb.dim() != 4 or yb.dim() > 2:
            got = ", ".join(str(tuple(t.shape)) for t in (*items_of(xb, torch.Tensor), yb))
            raise ValueError(
                f"CutMix needs images (N, C, H, W) and targets (N,) or (N, K), one for each image; got shapes {got}: "
                f"use MixUp, which mixes any shape"
            )

    def _mix(self, xb: Any) -> tuple[Any, torch.Tensor, torch.Tensor | float]:
        if self._draws is None:
            from torchvision.transforms import v2

            self._draws = v2.CutMix(alpha=self.alpha, num_classes=1)  # it draws the box; classes are not for it
        order = torch.randperm(len(xb), device=xb.device)
        params = self._draws.make_params([xb])
        x1, y1, x2, y2 = params["box"]
        mixed = xb.clone()
        mixed[..., y1:y2, x1:x2] = xb[..., y1:y2, x1:x2][order]
        return mixed, order, params["lam_adjusted"]


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
