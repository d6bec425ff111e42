"""From sizes and data to a learner and a run, in one call."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

import torch.nn.functional as F
from torch import nn, optim

from .learn import Learner, Runner
from .models import get_cnn_model, init_cnn
from .norm import RunningBatchNorm

__all__ = ["get_learn_run", "get_runner", "listify", "param_groups"]

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
