"""Around a fit: one-cycle schedules, seeds, and a loss that does not ask for certainty."""

from __future__ import annotations

import math
import numbers
import os
import random

import torch
from torch import nn

from .callbacks import ParamScheduler, combine_scheds, cos_1cycle_anneal
from .learn.optimiser import check as check_opt

__all__ = ["LabelSmoothingCrossEntropy", "fit_one_cycle", "seed_everything"]


class LabelSmoothingCrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy against targets of 1 − eps for the true class and eps spread over all classes.

    - `eps`: 0 to 1 (default 0.1).
    - `reduction`: "mean" (default), "sum" or "none".

    Takes predictions (N, classes, *) and targets (N, *) of classes. The course's name for PyTorch's
    `CrossEntropyLoss(label_smoothing=eps)`.

    Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016; fast.ai course, part 2 (2019),
    notebook 10b.
    """

    def __init__(self, eps=0.1, reduction="mean"):
        if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 <= eps <= 1:
            raise ValueError(f"LabelSmoothingCrossEntropy: eps is a share of the target, 0 to 1; got {eps!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"LabelSmoothingCrossEntropy: reduction is mean, sum or none; got {reduction!r}")
        super().__init__(label_smoothing=eps, reduction=reduction)

    def extra_repr(self) -> str:
        return f"eps={self.label_smoothing}, reduction={self.reduction!r}"


def fit_one_cycle(
    run, learn, epochs, lr_max, pct_start=0.3, div=25.0, div_final=1e4, moms=(0.95, 0.85, 0.95), resume=None
):
    """`run.fit(epochs, learn)` with a learning rate that rises to `lr_max` and falls again, both along half a cosine.

    - `lr_max`: the highest rate, or one for each param group.
    - `pct_start`: the share of the steps in which it rises (default 0.3).
    - `div`, `div_final`: it begins at `lr_max / div` (default 25) and ends at `lr_max / div_final` (default 1e4).
    - `moms`: momentum (of Adam's kind the first of `betas`) at the start, at the top and at the end; it falls while the
      rate rises. An optimiser without momentum, or with a momentum of 0, is left without. None: leave it as it is.
    - `resume`: a checkpoint to go on from, as in `run.fit`.

    A training loader without a length moves the cycle only between epochs, with a warning: give it a `__len__`.

    Afterwards the optimiser has its own rates and momenta again, and the run its own callbacks. ValueError or TypeError
    for what cannot be, and when the run schedules its rate already.

    Source: Smith, "A disciplined approach to neural network hyper-parameters", 2018; the defaults are those of
    `torch.optim.lr_scheduler.OneCycleLR`, with its final division relative to `lr_max`.
    """
    check_opt(learn.opt, {"fit_one_cycle": ("param_groups", "lr")})
    groups = learn.opt.param_groups
    rates = _rates(lr_max, len(groups))
    for name, value, least in (("div", div, 1), ("div_final", div_final, 1)):
        if not _is_number(value) or not least <= value < math.inf:
            raise ValueError(f"fit_one_cycle: {name} divides lr_max, a finite number of 1 or more; got {value!r}")
    if not _is_number(pct_start) or not 0 < pct_start < 1:
        raise ValueError(f"fit_one_cycle: pct_start is a share of the steps, above 0 and below 1; got {pct_start!r}")
    if any(isinstance(cb, ParamScheduler) and cb.pname == "lr" for cb in run.cbs):
        raise ValueError("fit_one_cycle schedules 'lr', and the run has a ParamScheduler for it: leave one of them out")
    shares = [pct_start, 1 - pct_start]
    cycles = [combine_scheds(shares, cos_1cycle_anneal(lr / div, lr, lr / div_final)) for lr in rates]
    cbs = [ParamScheduler("lr", cycles)]
    if moms is not None and _has_momentum(groups):
        cbs.append(ParamScheduler("momentum", combine_scheds(shares, cos_1cycle_anneal(*_three(moms)))))
    kept = [{k: _value(g[k]) for k in ("lr", "momentum", "betas") if k in g} for g in groups]
    run.add_cbs(cbs)
    try:
        run.fit(epochs, learn, resume=resume)
    finally:
        run.remove_cbs(cbs)
        for group, values in zip(learn.opt.param_groups, kept):
            for k, value in values.items():
                if isinstance(group[k], torch.Tensor):  # a compiled or captured optimiser keeps its rate in this one
                    group[k].fill_(value)
                else:
                    group[k] = value


def seed_everything(seed, deterministic=False) -> None:
    """Seed the generators of Python, NumPy and PyTorch (all devices), so that what follows can be repeated.

    - `seed`: 0 to 2³² − 1, which is what NumPy takes.
    - `deterministic`: have PyTorch choose operations that give the same bits each time, and raise where there are none
      (`torch.use_deterministic_algorithms`); slower, on CUDA above all. It stays so for the whole process; False
      (default) changes no setting.

    Call it before model and data are made. `get_dls` and `image_databunch` take a seed of their own besides.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything: seed is a whole number from 0 to 2**32 - 1; got {seed!r}")
    if not isinstance(deterministic, bool):
        raise ValueError(f"seed_everything: deterministic is True or False; got {deterministic!r}")
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first use
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _rates(lr_max, n) -> list[float]:
    rates = list(lr_max) if isinstance(lr_max, (list, tuple)) else [lr_max] * n
    if len(rates) != n:
        raise ValueError(
            f"fit_one_cycle: lr_max is one rate, or one for each of the optimiser's {n} param groups; got {len(rates)}"
        )
    for rate in rates:
        if not _is_number(rate) or not 0 < rate < math.inf:
            raise ValueError(f"fit_one_cycle: lr_max is a finite number above 0; got {rate!r}")
    return rates


def _three(moms):
    if not isinstance(moms, (list, tuple)) or len(moms) != 3 or not all(_is_number(m) and 0 <= m < 1 for m in moms):
        raise ValueError(
            f"fit_one_cycle: moms is three numbers, 0 or more and below 1, such as (0.95, 0.85, 0.95), or None; got "
            f"{moms!r}"
        )
    return moms


def _has_momentum(groups) -> bool:
    return all(g["betas"][0] if "betas" in g else g.get("momentum", 0) for g in groups)


def _value(value):
    return value.item() if isinstance(value, torch.Tensor) else value


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
