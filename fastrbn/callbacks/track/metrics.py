"""Metrics: functions that are averaged over batches, and objects that accumulate over a pass."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastrbn.learn import checkpoint_file

_PROTOCOL = ("update", "compute", "reset")


def accuracy(out: torch.Tensor, yb: torch.Tensor) -> torch.Tensor:
    """The share of predictions that are right.

    Parameters
    ----------
    out : Tensor (N, classes, *)
        Scores; the largest along dimension 1 is the predicted class. One logit per sample, (N, 1) or (N,), means two
        classes: above 0 predicts class 1, as in `F.binary_cross_entropy_with_logits`.
    yb : Tensor (N, *)
        The classes. For one logit per sample they are 0 and 1, (N,) or (N, 1), of any dtype.

    Returns
    -------
    Tensor ()
        A float32 scalar from 0 to 1, on the device of `out`.

    Raises
    ------
    ValueError
        If the shapes do not match.

    Examples
    --------
    >>> accuracy(tensor([[0.9, 0.1], [0.2, 0.8]]), tensor([0, 0]))
    tensor(0.5000)

    References
    ----------
    fast.ai course, part 2 (2019), notebook 03.
    """
    if out.dim() == 1 or out.shape[1] == 1:
        guess, yb = (out > 0).reshape(len(out), *out.shape[2:]), yb.squeeze(1) if yb.dim() == max(out.dim(), 2) else yb
        predicted = guess.to(torch.uint8)
    else:
        guess = predicted = out.argmax(dim=1)
    if guess.shape != yb.shape:
        raise ValueError(
            f"accuracy needs one target for each row of the output; got an output of shape {tuple(out.shape)} and "
            f"targets of shape {tuple(yb.shape)}"
        )
    return (predicted == yb).mean(dtype=torch.float32)


class EpochMetric:
    """Compute a metric once per pass over all samples, for scores that are not averages of batches: F1, AUC.

    Predictions and targets stay in memory until the pass is over. For a score that can be updated batch by batch, write
    a class with `update(pred, yb)`, `compute()` and `reset()`.

    Parameters
    ----------
    function : callable
        `function(pred, yb)` takes the predictions and targets of the whole pass, joined along dimension 0, and returns
        one number. Its name is the name of the metric.

    Raises
    ------
    TypeError
        If `function` is not callable.

    Examples
    --------
    >>> def spread(pred, yb): return pred.std()
    >>> stats = AvgStatsCallback([accuracy, EpochMetric(spread)])
    >>> stats.columns[:4]
    ['epoch', 'train_loss', 'train_accuracy', 'train_spread']
    """

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], Any]):
        if not callable(function):
            raise TypeError(f"EpochMetric needs a function of (pred, yb), such as an F1 score; got {function!r}")
        self.function, self.__name__ = function, metric_name(function)
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._preds: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []

    def update(self, pred: torch.Tensor, yb: torch.Tensor) -> None:
        """Keep a batch."""
        self._preds.append(pred)
        self._targets.append(yb)

    def compute(self) -> Any:
        """The function's value over all batches since `reset`."""
        return self.function(torch.cat(self._preds), torch.cat(self._targets))

    def __repr__(self):
        return f"EpochMetric({self.__name__})"


def check(metric: Any) -> None:
    """Raise TypeError unless `metric` is a function of a batch or an object that accumulates."""
    has = [name for name in _PROTOCOL if callable(getattr(metric, name, None))]
    if isinstance(metric, type) and has:
        raise TypeError(
            f"a metric must be a function or an object; got the class {metric.__name__}: write {metric.__name__}()"
        )
    if has and len(has) < len(_PROTOCOL):
        lacks = ", ".join(name for name in _PROTOCOL if name not in has)
        raise TypeError(
            f"a metric that accumulates must have update(pred, yb), compute() and reset(); {metric!r} lacks {lacks}: "
            f"add what is missing, or pass a function of (pred, yb)"
        )
    if not has and not callable(metric):
        raise TypeError(f"a metric must be a function of (pred, yb), such as accuracy; got {metric!r}")


def accumulates(metric: Any) -> bool:
    """True if `metric` has the protocol of torchmetrics: `update(pred, yb)`, `compute()`, `reset()`."""
    return all(callable(getattr(metric, name, None)) for name in _PROTOCOL)


def metric_name(metric: Any) -> str:
    while isinstance(metric, functools.partial):
        metric = metric.func
    return getattr(metric, "__name__", type(metric).__name__).strip("<>")


def column_names(metrics: list) -> list[str]:
    """`loss` and the names of the metrics, numbered if several have the same name."""
    names = [metric_name(m) for m in metrics]
    unique = ["loss", *(n if names.count(n) == 1 else f"{n}_{names[:i].count(n) + 1}" for i, n in enumerate(names))]
    if taken := [n for n in unique if unique.count(n) > 1]:
        raise ValueError(
            f"names of metrics must be unique, and 'loss' is the name of the loss; got {', '.join(names)}: rename "
            f"{taken[0]!r}"
        )
    return unique


def measure(metric: Callable, pred: Any, yb: Any, name: str) -> torch.Tensor | float:
    """The value of a function for a batch: a float, or a tensor of one element without a graph."""
    return _number(_called(name, metric, pred, yb), name)


def update(metric: Any, pred: Any, yb: Any, name: str, first: bool) -> None:
    """Pass a batch to an object that accumulates. A module is moved to the device of the `first` batch of a pass."""
    if first and isinstance(metric, nn.Module) and isinstance(pred, torch.Tensor):
        metric.to(pred.device)
    _called(name, metric.update, pred, yb)


def compute(metric: Any, name: str) -> float:
    """The value that an object has accumulated. Waits for the device."""
    return float(_number(_called(name, metric.compute), name))


def state(metric: Any) -> dict:
    """A copy of the attributes of an object that are plain data."""
    kept = {}
    for name, value in vars(metric).items():
        try:
            kept[name] = copy.deepcopy(checkpoint_file.plain(value))
        except TypeError:  # not plain data, such as functions and modules
            continue
    return kept


def load_state(metric: Any, state: dict) -> None:
    vars(metric).update(copy.deepcopy(state))


def _called(name: str, function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as e:
        raise RuntimeError(f"the metric '{name}' failed: {type(e).__name__}: {e}") from e


def _number(value: Any, name: str) -> torch.Tensor | float:
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"the metric '{name}' must return one number for a batch; got shape {tuple(value.shape)}")
    return value.detach() if value.requires_grad else value
