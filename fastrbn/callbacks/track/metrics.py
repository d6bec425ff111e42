"""Metrics: functions that are averaged over batches, and objects that accumulate over a pass."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

from fastrbn.learn import checkpoint_file as checkpoints

_PROTOCOL = ("update", "compute", "reset")


def accuracy(out, yb):
    """Share of rows of `out` (N, classes, *) whose largest entry is at the target `yb` (N, *): float scalar tensor.

    One logit a sample, `out` (N, 1) or (N,), means two classes: `yb` holds 0 and 1, (N,) or (N, 1), of any dtype, and a
    logit above 0 stands for 1 (as `F.binary_cross_entropy_with_logits` has it).

    Source: fast.ai course, part 2 (2019), notebook 03.
    """
    if out.dim() == 1 or out.shape[1] == 1:
        guess, yb = (out > 0).reshape(len(out), *out.shape[2:]), yb.squeeze(1) if yb.dim() == max(out.dim(), 2) else yb
        fitting = guess.to(torch.uint8)
    else:
        guess = fitting = out.argmax(dim=1)
    if guess.shape != yb.shape:
        raise ValueError(
            f"accuracy needs a class for each row of the output; got an output of shape {tuple(out.shape)} and "
            f"targets of shape {tuple(yb.shape)}"
        )
    return (fitting == yb).mean(dtype=torch.float32)


class EpochMetric:
    """A metric of all samples of a pass at once, for scores that are no averages over batches: F1, AUC, correlation.

    - `function(pred, yb)`: gets the predictions and targets of the whole pass, joined along dimension 0, and returns one
      number.

    `AvgStatsCallback([accuracy, EpochMetric(f1)])`. Predictions and targets stay in memory until the pass is over. For
    a score that can be computed as it goes, write a class with `update(pred, yb)`, `compute()` and `reset()`.
    """

    def __init__(self, function):
        if not callable(function):
            raise TypeError(f"EpochMetric needs a function of (pred, yb) such as an F1 score; got {function!r}")
        self.function, self.__name__ = function, metric_name(function)
        self.reset()

    def reset(self) -> None:
        self._preds, self._targets = [], []

    def update(self, pred, yb) -> None:
        self._preds.append(pred)
        self._targets.append(yb)

    def compute(self):
        return self.function(torch.cat(self._preds), torch.cat(self._targets))

    def __repr__(self):
        return f"EpochMetric({self.__name__})"


def check(metric) -> None:
    """TypeError for what is neither a function of a batch nor an object that accumulates."""
    has = [name for name in _PROTOCOL if callable(getattr(metric, name, None))]
    if isinstance(metric, type) and has:
        raise TypeError(
            f"a metric is a function or an object; got the class {metric.__name__}: write {metric.__name__}()"
        )
    if has and len(has) < len(_PROTOCOL):
        lacks = ", ".join(name for name in _PROTOCOL if name not in has)
        raise TypeError(
            f"a metric that accumulates has update(pred, yb), compute() and reset(); {metric!r} lacks {lacks}: add what "
            f"is missing, or give a function of (pred, yb)"
        )
    if not has and not callable(metric):
        raise TypeError(f"a metric is a function of (pred, yb) such as accuracy; got {metric!r}")


def accumulates(metric) -> bool:
    """Whether it has the protocol of torchmetrics: `update(pred, yb)`, `compute()`, `reset()`."""
    return all(callable(getattr(metric, name, None)) for name in _PROTOCOL)


def metric_name(metric) -> str:
    while isinstance(metric, functools.partial):
        metric = metric.func
    return getattr(metric, "__name__", type(metric).__name__).strip("<>")


def column_names(metrics) -> list[str]:
    """`loss` and a name for each metric, numbered where several have the same."""
    names = [metric_name(m) for m in metrics]
    unique = ["loss", *(n if names.count(n) == 1 else f"{n}_{names[:i].count(n) + 1}" for i, n in enumerate(names))]
    if taken := [n for n in unique if unique.count(n) > 1]:
        raise ValueError(
            f"each average has a name of its own, and 'loss' is the loss's; got metrics named {', '.join(names)}: "
            f"rename {taken[0]!r}"
        )
    return unique


def measure(metric, pred, yb, name):
    """The value of a function for a batch: a float, or a scalar tensor without a graph."""
    return _number(_called(name, metric, pred, yb), name)


def update(metric, pred, yb, name, first) -> None:
    """Give an object that accumulates a batch; `first`: of a pass."""
    if first and isinstance(metric, nn.Module) and isinstance(pred, torch.Tensor):
        metric.to(pred.device)
    _called(name, metric.update, pred, yb)


def compute(metric, name) -> float:
    """What an object has accumulated. Waits for the device."""
    return float(_number(_called(name, metric.compute), name))


def state(metric) -> dict:
    """What of an object's attributes is plain data, copied."""
    kept = {}
    for name, value in vars(metric).items():
        try:
            kept[name] = copy.deepcopy(checkpoints.plain(value))
        except TypeError:  # functions, modules
            continue
    return kept


def load_state(metric, state) -> None:
    vars(metric).update(copy.deepcopy(state))


def _called(name, function, *args):
    try:
        return function(*args)
    except Exception as e:
        raise RuntimeError(f"the metric '{name}' failed: {type(e).__name__}: {e}") from e


def _number(value, name):
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"the metric '{name}' must return one number for a batch; got shape {tuple(value.shape)}")
    return value.detach() if value.requires_grad else value
