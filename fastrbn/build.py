"""A learner and a run in one call; one-cycle training, seeds, label smoothing and parameter groups."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from .callbacks import ParamScheduler, TorchScheduler, combine_scheds, cos_1cycle_anneal
from .callbacks.step.schedule import KeptRates, sets_rate
from .learn import Learner, Runner
from .learn.optimiser import check as check_opt
from .learn.optimiser import fused
from .learn.snapshot import plain_name
from .models import get_cnn_model, init_cnn
from .norm import RunningBatchNorm
from .util import is_number, matches, unmatched

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


def listify(o: Any) -> list:
    """Return `o` as a list.

    Parameters
    ----------
    o : object
        None gives an empty list, a list is returned itself, any other iterable except text is spread, and anything else
        becomes the only item.

    Returns
    -------
    list

    Examples
    --------
    >>> listify(None), listify("ab"), listify((1, 2))
    ([], ['ab'], [1, 2])

    References
    ----------
    fast.ai course, part 2 (2019), notebook 04.
    """
    if o is None:
        return []
    if isinstance(o, list):
        return o
    return list(o) if isinstance(o, Iterable) and not isinstance(o, (str, bytes)) else [o]


def param_groups(
    model: nn.Module, weight_decay: float = 1e-2, lr: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Split a model's parameters for an optimiser into groups with and without weight decay, and by learning rate.

    Norms, biases and everything else with fewer than two dimensions get no decay. A parameter that modules share is
    listed once, without decay if one of them is a norm.

    `TorchScheduler`, `Warmup` and `fit_one_cycle` keep the ratio of the groups' rates. `ParamScheduler` takes a
    schedule for each group.

    Parameters
    ----------
    model : nn.Module
        Any model.
    weight_decay : float, default 0.01
        Decay of the groups with decay. The default is AdamW's.
    lr : dict of str to float, optional
        Learning rates by names of parameters or modules (`body` covers all that is in it), with the wildcards of
        `fnmatch`: `*` stands for anything, dots included. The first that matches counts. The other parameters get the
        optimiser's rate.

    Returns
    -------
    list of dict
        Two groups for each rate, the one with decay first; at the end those with the optimiser's rate. Empty groups are
        left out. With `lr`, a group's "name" is its pattern, or "rest".

    Raises
    ------
    TypeError, ValueError
        If `model` is not a module, a number is out of range, or a pattern matches nothing that is not matched before.

    Examples
    --------
    >>> model = get_cnn_model(data, [8, 16], conv_rbn)
    >>> opt = optim.AdamW(param_groups(model, 0.05), lr=1e-3)
    >>> [group["weight_decay"] for group in opt.param_groups]
    [0.05, 0.0]

    A tenth of the rate for the first layers:

    >>> opt = optim.AdamW(param_groups(model, 0.05, lr={"[01]": 1e-4}), lr=1e-3)
    >>> [(group["name"], group["lr"], group["weight_decay"]) for group in opt.param_groups]
    [('[01]', 0.0001, 0.05), ('[01]', 0.0001, 0.0), ('rest', 0.001, 0.05), ('rest', 0.001, 0.0)]

    References
    ----------
    He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019, section 3.1.
    Decaying the scale of a norm, or what a norm cancels, changes the learning rate and not the function.
    """
    if not is_number(weight_decay) or not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a finite number, 0 or more; got {weight_decay!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs an nn.Module; got {model!r} of type {type(model).__name__}")
    spared = {p for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    params = list(model.named_parameters())
    decayed = {p for name, p in params if p.dim() > 1 and p not in spared and name.rpartition(".")[2] != "bias"}
    groups = []
    for settings, part in _by_rate(model, lr):
        decay, rest = [p for p in part if p in decayed], [p for p in part if p not in decayed]
        groups += [{"params": decay, "weight_decay": weight_decay, **settings}]
        groups += [{"params": rest, "weight_decay": 0.0, **settings}]
    return [group for group in groups if group["params"]]


def _by_rate(model: nn.Module, lr: Any) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
    """The settings of each rate, and its parameters in the model's order."""
    if lr is None:
        return [({}, list(model.parameters()))]
    if not isinstance(lr, Mapping) or not lr:
        raise TypeError(f"param_groups: lr gives rates by names, such as {{'body': 1e-4, 'head': 1e-3}}; got {lr!r}")
    for pattern, rate in lr.items():
        if not is_number(rate) or not 0 < rate < math.inf:
            raise ValueError(
                f"param_groups: lr[{pattern!r}] must be a finite number above 0; got {rate!r}: to train without a part "
                f"of the model, freeze(model, {pattern!r})"
            )
    left: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        left.setdefault(p, []).append(plain_name(name))
    if message := unmatched("param_groups", lr, [name for names in left.values() for name in names]):
        raise ValueError(message)
    parts: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
    for pattern, rate in lr.items():
        part = [p for p, names in left.items() if any(matches(name, pattern) for name in names)]
        if not part:
            raise ValueError(
                f"param_groups: all that {pattern!r} matches has a rate from an earlier pattern of lr, and the first "
                f"counts: put {pattern!r} before it"
            )
        parts.append(({"lr": rate, "name": pattern}, part))
        for p in part:
            del left[p]
    return [*parts, ({"name": "rest"}, list(left))]


def get_runner(
    model: nn.Module,
    data: Any,
    lr: float = 0.6,
    cbs: Any = None,
    opt_func: Callable[..., optim.Optimizer] | None = None,
    loss_func: Callable[..., Tensor] | None = F.cross_entropy,
    weight_decay: float | None = None,
    unpack: Callable[[Any], tuple[Any, Any, Any]] | None = None,
) -> tuple[Learner, Runner]:
    """Make a learner and a run for your own model; train with `run.fit(epochs, learn)`.

    Parameters
    ----------
    model : nn.Module
        Any model.
    data : DataBunch or similar
        Has `train_dl` and `valid_dl` (None for no validation); see `Learner`.
    lr : float, default 0.6
        Learning rate; the default is the course's.
    cbs : callable, Callback or list of them, optional
        Callbacks, or callables that make them, such as classes and `partial`s.
    opt_func : callable, default optim.SGD
        `opt_func(parameters, lr=lr)` makes the optimiser. The default is made with `fused=True`, one kernel for all
        parameters, unless the model has lazy parameters, others than float32 and float64, or a module with
        `sparse=True`. For sparse gradients without such a module, and for gradients that you set yourself in another
        memory layout than their parameters', pass `optim.SGD`.
    loss_func : callable or None, default F.cross_entropy
        `loss_func(pred, yb)` returns a scalar tensor. None: the model returns its loss.
    weight_decay : float, optional
        Weight decay for the optimiser, applied with `param_groups`. By default there is one group with the decay of
        `opt_func`.
    unpack : callable, optional
        `unpack(batch)` returns `(args, kwargs, target)`, for batches that `Learner` does not understand by itself.

    Returns
    -------
    (Learner, Runner)

    Raises
    ------
    TypeError, ValueError
        For arguments that cannot be trained with; the message names them.

    Examples
    --------
    >>> model = nn.Sequential(conv_rbn(1, 8), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
    >>> learn, run = get_runner(model, data, lr=0.1)
    >>> run.fit(1, learn)

    References
    ----------
    fast.ai course, part 2 (2019), notebook 05b.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {model!r} of type {type(model).__name__}")
    _check_data(data)
    if not is_number(lr) or not 0 <= lr < math.inf:
        raise ValueError(f"lr must be a finite number, 0 or more; got {lr!r}")
    opt_func = partial(optim.SGD, **fused(optim.SGD, model)) if opt_func is None else opt_func
    for name, func in (("opt_func", opt_func), ("loss_func", loss_func)):
        if not callable(func) and not (func is None and name == "loss_func"):
            raise TypeError(f"{name} must be callable; got {func!r}: pass the function or class itself")
    opt = opt_func(model.parameters() if weight_decay is None else param_groups(model, weight_decay), lr=lr)
    return Learner(model, opt, loss_func, data, unpack), Runner(cb_funcs=cbs)


def get_learn_run(
    nfs: Iterable[int],
    data: Any,
    lr: float,
    layer: Callable[..., nn.Module],
    cbs: Any = None,
    opt_func: Callable[..., optim.Optimizer] | None = None,
    uniform: bool = False,
    weight_decay: float | None = None,
    **kwargs: Any,
) -> tuple[Learner, Runner]:
    """Make a learner and a run for the course's CNN: `get_cnn_model`, `init_cnn` and `get_runner`.

    Parameters
    ----------
    nfs : iterable of int
        Channels of the stride-2 layers, such as [8, 16, 32, 64, 64].
    data, lr, cbs, opt_func, weight_decay : as in `get_runner`
    layer : callable
        Makes a layer, such as `conv_rbn`; see `get_cnn_layers`.
    uniform : bool, default False
        Draw the initial weights from a uniform instead of a normal distribution.
    **kwargs
        Passed to `layer`, such as `recipe="course"` or `leak=0.1`.

    Returns
    -------
    (Learner, Runner)

    Raises
    ------
    TypeError, ValueError
        For arguments that cannot be trained with; the message names them.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[Recorder])
    >>> run.fit(1, learn)
    >>> len(run.recorder.losses)   # one per training batch
    16

    References
    ----------
    fast.ai course, part 2 (2019), notebook 07.
    """
    _check_data(data)
    model = get_cnn_model(data, nfs, layer, **kwargs)
    init_cnn(model, uniform=uniform)
    return get_runner(model, data, lr=lr, cbs=cbs, opt_func=opt_func, weight_decay=weight_decay)


def _check_data(data: Any) -> None:
    missing = [name for name in ("train_dl", "valid_dl") if not hasattr(data, name)]
    if missing:
        raise TypeError(
            f"data must have train_dl and valid_dl (None for no validation); got {type(data).__name__} without "
            f"{' and '.join(missing)}: wrap the loaders, DataBunch(train_dl, valid_dl, c)"
        )


class LabelSmoothingCrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy with label smoothing: 1 − eps for the true class, and eps spread over all classes.

    The course's name for PyTorch's `CrossEntropyLoss(label_smoothing=eps)`. Takes predictions (N, classes, *) and class
    indices (N, *).

    Parameters
    ----------
    eps : float, default 0.1
        Share of the target that is spread, 0 to 1.
    reduction : {"mean", "sum", "none"}, default "mean"
        As in PyTorch.

    Raises
    ------
    ValueError
        For another `eps` or `reduction`.

    Examples
    --------
    >>> loss = LabelSmoothingCrossEntropy(0.1)
    >>> loss(torch.zeros(4, 10), torch.arange(4))
    tensor(2.3026)

    References
    ----------
    Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016; fast.ai course, part 2 (2019), notebook 10b.
    """

    def __init__(self, eps: float = 0.1, reduction: str = "mean"):
        if not is_number(eps) or not 0 <= eps <= 1:
            raise ValueError(f"LabelSmoothingCrossEntropy: eps must be a share of the target, 0 to 1; got {eps!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"LabelSmoothingCrossEntropy: reduction must be mean, sum or none; got {reduction!r}")
        super().__init__(label_smoothing=eps, reduction=reduction)

    def extra_repr(self) -> str:
        return f"eps={self.label_smoothing}, reduction={self.reduction!r}"


def fit_one_cycle(
    run: Runner,
    learn: Learner,
    epochs: int | None,
    lr_max: float | Sequence[float] | None = None,
    pct_start: float = 0.3,
    div: float = 25.0,
    div_final: float = 1e4,
    moms: Sequence[float] | None = (0.95, 0.85, 0.95),
    resume: Any = None,
    max_steps: int | None = None,
    validate_every: int | None = None,
) -> None:
    """Call `run.fit(epochs, learn)` with a one-cycle schedule of learning rate and momentum.

    The learning rate rises to `lr_max` and falls again, both along half a cosine; the momentum does the opposite.
    Afterwards the optimiser has its former rates and momenta, and the run its former callbacks. If the training loader
    has no length, the schedule moves only between epochs, with a warning: give it a `__len__`, or pass `max_steps`.

    Parameters
    ----------
    run : Runner
        Must not schedule the learning rate already.
    learn : Learner
        Model, optimiser, loss and data.
    epochs : int or None
        Length of the cycle; None if `max_steps` is the length.
    lr_max : float or sequence of float, optional
        Highest learning rate, or one for each parameter group. By default each group's own rate. With one rate for
        groups of different rates, such as those of `param_groups(model, lr=…)`, the largest reaches it, and the others
        keep their ratio to it.
    pct_start : float, default 0.3
        Share of the steps in which the rate rises.
    div : float, default 25
        The rate starts at lr_max / div.
    div_final : float, default 1e4
        The rate ends at lr_max / div_final.
    moms : three floats or None, default (0.95, 0.85, 0.95)
        Momentum (the first of `betas` for Adam and its kin) at the start, at the highest rate and at the end. None
        leaves it as it is, as does an optimiser without momentum or with a momentum of 0.
    resume, max_steps, validate_every : optional
        As in `run.fit`.

    Raises
    ------
    TypeError, ValueError
        For arguments out of range, an optimiser without parameter groups, or a run that schedules its rate already.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[Recorder])
    >>> fit_one_cycle(run, learn, 1, lr_max=0.5)
    >>> max(run.recorder.lrs[0]) <= 0.5
    True

    References
    ----------
    Smith, "A disciplined approach to neural network hyper-parameters", 2018. The defaults are those of
    `torch.optim.lr_scheduler.OneCycleLR`, except that `div_final` is relative to `lr_max`.
    """
    check_opt(learn.opt, {"fit_one_cycle": ("param_groups", "lr")})
    groups = learn.opt.param_groups
    rates = _rates(lr_max, [_value(g["lr"]) for g in groups])
    for name, value, least in (("div", div, 1), ("div_final", div_final, 1)):
        if not is_number(value) or not least <= value < math.inf:
            raise ValueError(f"fit_one_cycle: {name} divides lr_max and must be finite, 1 or more; got {value!r}")
    if not is_number(pct_start) or not 0 < pct_start < 1:
        raise ValueError(
            f"fit_one_cycle: pct_start must be a share of the steps, above 0 and below 1; got {pct_start!r}"
        )
    other = next((cb for cb in run.cbs if sets_rate(cb) or isinstance(cb, TorchScheduler)), None)
    if other is not None:
        raise ValueError(
            f"fit_one_cycle schedules 'lr', but the run has a {type(other).__name__} for it: leave one of them out"
        )
    shares = [pct_start, 1 - pct_start]
    cycles: list[Callable[[float], float]] = [
        combine_scheds(shares, cos_1cycle_anneal(lr / div, lr, lr / div_final)) for lr in rates
    ]
    cbs = [ParamScheduler("lr", cycles)]
    if moms is not None and _has_momentum(groups):
        cbs.append(ParamScheduler("momentum", combine_scheds(shares, cos_1cycle_anneal(*_three(moms)))))
    kept = KeptRates(learn.opt)
    run.add_cbs(cbs)
    try:
        run.fit(epochs, learn, resume, max_steps, validate_every)
    finally:
        run.remove_cbs(cbs)
        kept.restore()


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed the random generators of Python, NumPy and PyTorch (all devices).

    Call it before creating model and data. `get_dls` and `image_databunch` also have a seed of their own.

    Parameters
    ----------
    seed : int
        0 to 2³² − 1, NumPy's range.
    deterministic : bool, default False
        Make PyTorch use operations that give the same bits every time, and raise where there are none
        (`torch.use_deterministic_algorithms`). This is slower, mostly on CUDA, and lasts for the whole process; False
        changes no setting.

    Raises
    ------
    ValueError
        For a seed outside the range.

    Examples
    --------
    >>> seed_everything(3); first = torch.rand(2)
    >>> seed_everything(3); torch.equal(torch.rand(2), first)
    True
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything: seed must be a whole number from 0 to 2**32 - 1; got {seed!r}")
    if not isinstance(deterministic, bool):
        raise ValueError(f"seed_everything: deterministic must be True or False; got {deterministic!r}")
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it, set before its first use
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _rates(lr_max: Any, own: list[float]) -> list[float]:
    """The highest rate of each group; `own` are those that the groups have."""
    given = own if lr_max is None else list(lr_max) if isinstance(lr_max, (list, tuple)) else [lr_max]
    for rate in given:
        if not is_number(rate) or not 0 < rate < math.inf:
            raise ValueError(f"fit_one_cycle: lr_max must be a finite number above 0; got {rate!r}")
    if lr_max is None or isinstance(lr_max, (list, tuple)):
        if len(given) != len(own):
            raise ValueError(
                f"fit_one_cycle: lr_max must be one rate, or one for each of the optimiser's {len(own)} param groups; "
                f"got {len(given)}"
            )
        return given
    highest = max(own)
    return [lr_max * (rate / highest if highest else 1.0) for rate in own]


def _three(moms: Any) -> Sequence[float]:
    if not isinstance(moms, (list, tuple)) or len(moms) != 3 or not all(is_number(m) and 0 <= m < 1 for m in moms):
        raise ValueError(
            f"fit_one_cycle: moms must be three numbers from 0 to below 1, such as (0.95, 0.85, 0.95), or None; got "
            f"{moms!r}"
        )
    return moms


def _has_momentum(groups: list[dict]) -> bool:
    return all(g["betas"][0] if "betas" in g else g.get("momentum", 0) for g in groups)


def _value(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
