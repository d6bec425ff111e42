"""From sizes and data to a learner and a run in one call; one-cycle schedules, seeds, and label smoothing."""

from __future__ import annotations

import math
import numbers
import os
import random
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn, optim

from .callbacks import ParamScheduler, combine_scheds, cos_1cycle_anneal
from .learn import Learner, Runner
from .learn.optimiser import check as check_opt
from .models import get_cnn_model, init_cnn
from .norm import RunningBatchNorm

__all__ = [
    "LabelSmoothingCrossEntropy",
    "fit_one_cycle",
    "get_learn_run",
    "get_runner",
    "listify",
    "param_groups",
    "seed_everything",
]

_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch norms of every rank, SyncBatchNorm, instance norms
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    RunningBatchNorm,
)


def listify(o) -> list:
    """`o` as a list: None is the empty one, a list stays itself, other iterables but text are spread, all else is its
    only item. Source: course notebook 04."""
    if o is None:
        return []
    if isinstance(o, list):
        return o
    return list(o) if isinstance(o, Iterable) and not isinstance(o, (str, bytes)) else [o]


def param_groups(model, weight_decay=1e-2) -> list[dict]:
    """The model's parameters for an optimiser in two groups: `weight_decay` for weights that multiply, none for norms,
    biases and all else of fewer than two dimensions.

    `optim.AdamW(param_groups(model, 0.05), lr=1e-3)`. The group with decay comes first; an empty one is left out. A
    parameter that two modules share is listed once, without decay if it belongs to a norm in one of them.

    Decaying the scale of a norm, or what a norm cancels anyway, acts on the learning rate and not on the function:
    He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019, section 3.1.
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, numbers.Real) or not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is a finite number, 0 or more; got {weight_decay!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs an nn.Module; got {model!r} of type {type(model).__name__}")
    spared = {p for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    params = [(name, p) for name, p in model.named_parameters()]
    decay = [p for name, p in params if p.dim() > 1 and p not in spared and name.rpartition(".")[2] != "bias"]
    known = set(decay)
    rest = [p for _, p in params if p not in known]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def get_runner(model, data, lr=0.6, cbs=None, opt_func=None, loss_func=F.cross_entropy, weight_decay=None):
    """`(learn, run)` for a model of your own; train with `run.fit(epochs, learn)`.

    - `data`: has `train_dl` and `valid_dl` (None: no validation), see `Learner`.
    - `lr`: learning rate, default 0.6, the course's.
    - `cbs`: callables that make callbacks (classes, `partial`s), or callbacks; one or a list.
    - `opt_func(parameters, lr=lr)`: makes the optimiser; default `optim.SGD`.
    - `loss_func(pred, yb)`: a scalar tensor.
    - `weight_decay`: given to `opt_func` in two groups, see `param_groups`; None (default): one group, and what
      `opt_func` does by itself.

    TypeError or ValueError for what cannot be trained. Source: course notebook 05b.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {model!r} of type {type(model).__name__}")
    _check_data(data)
    if isinstance(lr, bool) or not isinstance(lr, numbers.Real) or not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be a finite number, 0 or more; got {lr!r}")
    opt_func = optim.SGD if opt_func is None else opt_func
    for name, func in (("opt_func", opt_func), ("loss_func", loss_func)):
        if not callable(func):
            raise TypeError(f"{name} must be callable; got {func!r}: pass the function or class itself")
    opt = opt_func(model.parameters() if weight_decay is None else param_groups(model, weight_decay), lr=lr)
    return Learner(model, opt, loss_func, data), Runner(cb_funcs=cbs)


def get_learn_run(nfs, data, lr, layer, cbs=None, opt_func=None, uniform=False, weight_decay=None, **kwargs):
    """`(learn, run)` for the course's CNN: `get_cnn_model`, `init_cnn`, `get_runner`.

    - `nfs`: channels of the stride-2 layers, such as [8, 16, 32, 64, 64].
    - `layer`: what makes them, such as `conv_rbn`; `kwargs` go to it (`recipe="course"`, `leak=0.1`).
    - `uniform`: draw the initial weights uniformly instead of from a normal distribution.
    - `data`, `lr`, `cbs`, `opt_func`, `weight_decay`: see `get_runner`.

    Source: course notebook 07.
    """
    _check_data(data)
    model = get_cnn_model(data, nfs, layer, **kwargs)
    init_cnn(model, uniform=uniform)
    return get_runner(model, data, lr=lr, cbs=cbs, opt_func=opt_func, weight_decay=weight_decay)


def _check_data(data):
    missing = [name for name in ("train_dl", "valid_dl") if not hasattr(data, name)]
    if missing:
        raise TypeError(
            f"data must have train_dl and valid_dl (None for no validation); got {type(data).__name__} without "
            f"{' and '.join(missing)}: wrap the loaders, DataBunch(train_dl, valid_dl, c)"
        )


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
