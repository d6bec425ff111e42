"""Metrics: functions that are averaged over batches, and objects that accumulate over a pass."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastrbn.learn import checkpoint_file

_PROTOCOL = ("update", "compute", "reset")


def accuracy(out: torch.Tensor, yb: torch.Tensor) -> torch.Tensor:
    """Return the share of predictions that are right.

    Parameters
    ----------
    out : Tensor (N, classes, *)
        Scores; the largest along dimension 1 is the predicted class. One logit per sample, (N, 1) or (N,), means two
        classes: above 0 predicts class 1, as in `F.binary_cross_entropy_with_logits`.
    yb : Tensor (N, *)
        The classes. For one logit per sample they are 0 and 1, (N,) or (N, 1), of any dtype. Every target counts, also
        those of -100 that `F.cross_entropy` ignores; `TopK(1)` leaves these out.

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
    predicted, yb = predicted_classes(out, yb, "accuracy")
    return (predicted == yb).mean(dtype=torch.float32)


def predicted_classes(out: torch.Tensor, yb: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted class and target, both (N, *), for the scores that `accuracy` takes."""
    if is_one_logit(out):
        # not bool, which equals no target but 0 and 1 and would index as a mask
        predicted = (out > 0).reshape(len(out), *out.shape[2:]).to(torch.uint8)
        target = yb.squeeze(1) if yb.dim() == max(out.dim(), 2) else yb
    else:
        predicted, target = out.argmax(dim=1), yb
    if predicted.shape != target.shape:
        more = ": give it yb.argmax(1) if they are one-hot or mixed" if yb.shape == out.shape else ""
        raise ValueError(
            f"{name} needs one target for each row of the output; got an output of shape {tuple(out.shape)} and "
            f"targets of shape {tuple(yb.shape)}{more}"
        )
    return predicted, target


def is_one_logit(out: torch.Tensor) -> bool:
    """True for scores (N,) and (N, 1, *): two classes, or one label."""
    return out.dim() == 1 or out.shape[1] == 1


class EpochMetric:
    """Compute a metric once per pass over all samples, for scores that are not averages of batches: F1, AUC.

    Predictions and targets stay in memory until the pass is over; under `Distributed` each process gets those of all.
    For a score that can be updated batch by batch, write a class with `update(pred, yb)`, `compute()` and `reset()`.

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

    def merge(self, gather: Callable[[Any], list]) -> None:
        """Replace this process's batches by those of all processes; `gather(value)` returns the value of each."""
        for kept in (self._preds, self._targets):
            every = gather(torch.cat(kept).cpu() if kept else None)
            device = kept[0].device if kept else None
            kept[:] = [t.to(device) for t in every if t is not None]

    def __repr__(self):
        return f"EpochMetric({self.__name__})"


def check(metric: Any) -> None:
    """Raise TypeError unless `metric` is a function of a batch or an object that accumulates; ValueError if empty."""
    has = [name for name in _PROTOCOL if callable(getattr(metric, name, None))]
    if isinstance(made_by := _innermost(metric), type):
        raise TypeError(
            f"a metric must be a function or an object; got {'the class' if metric is made_by else 'a partial of'} "
            f"{made_by.__name__}: write {made_by.__name__}({'' if metric is made_by else '…'})"
        )
    if has and len(has) < len(_PROTOCOL):
        lacks = ", ".join(name for name in _PROTOCOL if name not in has)
        raise TypeError(
            f"a metric that accumulates must have update(pred, yb), compute() and reset(); {metric!r} lacks {lacks}: "
            f"add what is missing, or pass a function of (pred, yb)"
        )
    if is_collection(metric) and not list(metric.keys()):
        raise ValueError(f"a collection of metrics must have at least one; got {metric!r}")
    if not has and not callable(metric):
        raise TypeError(f"a metric must be a function of (pred, yb), such as accuracy; got {metric!r}")


def accumulates(metric: Any) -> bool:
    """True if `metric` has the protocol of torchmetrics: `update(pred, yb)`, `compute()`, `reset()`."""
    return all(callable(getattr(metric, name, None)) for name in _PROTOCOL)


def metric_name(metric: Any) -> str:
    metric = _innermost(metric)
    return getattr(metric, "__name__", type(metric).__name__).strip("<>")


def _innermost(function: Any) -> Any:
    """The function inside partials."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def names_of(metrics: Sequence[Any]) -> list[list[str]]:
    """The names of each metric's values, numbered if several have the same.

    One name each, or the keys of an object that has them, such as torchmetrics' MetricCollection."""
    given = [list(map(str, m.keys())) if is_collection(m) else [metric_name(m)] for m in metrics]
    seen: Counter[str] = Counter()
    times = Counter(n for names in given for n in names)
    unique: list[list[str]] = []
    for names in given:
        unique.append([])
        for n in names:
            seen[n] += 1
            unique[-1].append(n if times[n] == 1 else f"{n}_{seen[n]}")
    flat = ["loss", *(n for names in unique for n in names)]
    if taken := [n for n in flat if flat.count(n) > 1]:
        raise ValueError(
            f"names of metrics must be unique, and 'loss' is the name of the loss; got "
            f"{', '.join(n for names in given for n in names)}: rename {taken[0]!r}"
        )
    return unique


def is_collection(metric: Any) -> bool:
    """True if `compute()` returns a dictionary whose keys are known before."""
    return accumulates(metric) and callable(getattr(metric, "keys", None))


def is_scalar(metric: Any) -> bool:
    """False if the metric says, by `scalar = False`, that it computes several numbers."""
    return bool(getattr(metric, "scalar", True))


def measure(metric: Callable, pred: Any, yb: Any, name: str) -> torch.Tensor | float:
    """The value of a function for a batch: a float, or a tensor of one element without a graph."""
    value = _called(name, metric, pred, yb)
    shape = getattr(value, "shape", ())
    if not (value.numel() == 1 if isinstance(value, torch.Tensor) else _is_float(value)):
        got = f"shape {tuple(shape)}" if shape else f"{value!r}"
        raise ValueError(
            f"the metric '{name}' must return one number for a batch; got {got}: return a mean over samples, or pass "
            f"an object with update(pred, yb), compute() and reset()"
        )
    return value.detach() if isinstance(value, torch.Tensor) else float(value)


def update(metric: Any, pred: Any, yb: Any, name: str, place: bool) -> None:
    """Pass a batch to an object that accumulates; if `place`, a module is moved to the device of `pred` before."""
    if place and isinstance(metric, nn.Module) and isinstance(pred, torch.Tensor):
        metric.to(pred.device)
    _called(name, metric.update, pred, yb)


def compute(metric: Any, names: list[str]) -> dict[str, Any]:
    """What an object has accumulated, by name: floats, and tensors on the CPU where there are several numbers.

    Waits for the device."""
    value = _called(names[0], metric.compute)
    if not (is_collection(metric) and isinstance(value, dict)):
        return {names[0]: _plain_value(value, names[0])}
    renamed = dict(zip(map(str, metric.keys()), names))
    return {renamed.get(str(key), str(key)): _plain_value(v, str(key)) for key, v in value.items()}


def state(metric: Any) -> dict:
    """A copy of the attributes of an object that are plain data; for a module, of those inside it as well."""
    if not isinstance(metric, nn.Module):
        return _plain_attributes(metric)
    # parameters are no state of a metric, but those of a network that it applies
    inside = {name: _plain_attributes(m) for name, m in metric.named_modules()}
    return {name: {k: v for k, v in kept.items() if k != "_parameters"} for name, kept in inside.items()}


def load_state(metric: Any, state: dict) -> None:
    if not isinstance(metric, nn.Module):
        vars(metric).update(copy.deepcopy(state))
        return
    modules: dict[str, Any] = dict(metric.named_modules())
    for name, kept in state.items():
        vars(modules[name]).update(copy.deepcopy(kept))


def _plain_attributes(thing: Any) -> dict:
    kept = {}
    for name, value in vars(thing).items():
        try:
            kept[name] = copy.deepcopy(checkpoint_file.plain(value))
        except TypeError:  # not plain data, such as functions and modules
            continue
    return kept


def _called(name: str, function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as e:
        why = " (the batch has no target: yb is None)" if len(args) == 2 and args[1] is None else ""
        raise RuntimeError(f"the metric '{name}' failed: {type(e).__name__}: {e}{why}") from e


def _plain_value(value: Any, name: str) -> Any:
    """A float for one number; tensors and containers of them on the CPU for several."""
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else value.detach().cpu()
    if isinstance(value, dict):
        return {str(k): _plain_value(v, name) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_value(v, name) for v in value]
    if _is_float(value):
        return float(value)
    if getattr(value, "shape", ()):  # an array of NumPy
        return torch.as_tensor(value)
    raise ValueError(
        f"the metric '{name}' must compute numbers: a number, a tensor, or a list, tuple or dictionary of them; got "
        f"{value!r}"
    )


def _is_float(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)
