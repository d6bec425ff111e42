"""`Runner.validate` and `Runner.predict`: the loop's validation pass alone, on a copy of the run."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrbn.random_state import RandomState
from fastrbn.util import apply_to, items_of, suggestion

from . import source
from .batch import batch_size, reduction, unreduced
from .callback import RUN_STATE
from .events import EVENTS, CancelEpochException
from .parts import Parts
from .unpack import Unpack

_LEARNER = ("model", "opt", "loss_func", "data")
_FLIPS: dict[str, int] = {"hflip": -1, "vflip": -2}  # the dimension that each turns round


class Predictions(NamedTuple):
    """The result of `Runner.predict`: tensors on the CPU with one row per sample, in the loader's order.

    Parameters
    ----------
    preds : Tensor, or tuple, list or dict of tensors
        The model's outputs as it returns them, so logits if the loss function takes logits.
    targets : Tensor, or tuple, list or dict of tensors, or None
        None if the batches have no target.
    losses : Tensor (N,) or None
        The loss of each sample, if `losses=True` asked for it.
    """

    preds: Any
    targets: Any
    losses: Tensor | None


def validate(run: Any, data: Any, learn: Any) -> dict[str, Any]:
    """See `Runner.validate`."""
    data, learn = _learner(run, data, learn, "validate")
    unpack, judge = Unpack.of(learn), _Judge(run, learn)
    _pass(run, learn, unpack, source.batches(data, learn, unpack), judge)
    return judge.numbers()


def predict(run: Any, data: Any, learn: Any, losses: bool, tta: Any) -> Predictions:
    """See `Runner.predict`."""
    data, learn = _learner(run, data, learn, "predict")
    unpack, keep = _Predicting(learn, losses, _versions(tta)), _Keep()
    dl = source.batches(data, learn, unpack)
    source.warn_of_order(dl)
    _pass(run, learn, unpack, dl, keep)
    return keep.joined(losses)


def examples(run: Any, data: Any, learn: Any, n: int, worst: bool) -> tuple[Any, Predictions]:
    """Inputs, as the model gets them, of `n` samples with their predictions: the first ones, or those with the highest
    loss, the worst first."""
    data, learn = _learner(run, data, learn, "predict")
    unpack = _Predicting(learn, losses=worst)
    found = _Examples(n, worst)
    _pass(run, learn, unpack, source.batches(data, learn, unpack), found)
    if found.kept is None:
        raise ValueError("at least one batch is needed; the loader gave none")
    xb, *kept = found.kept
    return xb, Predictions(*kept)


# The pass


def _learner(run: Any, data: Any, learn: Any, what: str) -> tuple[Any, Any]:
    """`data` and the learner, which may stand in the place of the data, as in `run.validate(learn)`."""
    if run._fitting:
        raise RuntimeError(
            f"{what} was called inside a fit, whose batch and position it would replace: call it after the fit, or on "
            f"a second Runner, Runner(…).{what}(learn=self.learn)"
        )
    if learn is None and all(hasattr(data, name) for name in _LEARNER):
        data, learn = None, data
    learn = run.learn if learn is None else learn
    if learn is None:
        raise TypeError(f"this run has not trained yet: name the learner, run.{what}(learn=learn)")
    if not all(hasattr(learn, name) for name in _LEARNER):
        raise TypeError(f"learn must be a Learner, with {', '.join(_LEARNER)}; got {type(learn).__name__}")
    return data, learn


def _pass(run: Any, learn: Any, unpack: Unpack, dl: Any, collector: _Collector) -> None:
    """One validation pass over `dl` in a copy of the run, with copies of the callbacks that take part.

    The run, its callbacks, random states and the modes of modules stay as they are.
    """
    aside = copy.copy(run)
    copies = {id(cb): copy.copy(cb) for cb in run.cbs if cb._outside_fit}
    vars(aside).update({name: copies[id(cb)] for name, cb in vars(run).items() if id(cb) in copies})
    lent = {"model": learn.model, "opt": learn.opt, "loss_func": learn.loss_func, "data": learn.data, "logger": _silent}
    vars(aside).update(RUN_STATE, **lent, learn=learn, epochs=1, epoch=0, n_iter=0, n_epochs=0.0)
    vars(aside).update(cbs=[*copies.values()], _lent=lent, _unpack=unpack, _parts=Parts(), _fitting=True, _outside=True)
    for cb in aside.cbs:
        cb.set_runner(aside)
    collector.run, aside._handlers = aside, aside._resolve()
    for event in EVENTS:
        if handler := getattr(collector, event, None):
            aside._handlers[event] += (handler,)
    modes = [(m, m.training) for m in learn.model.modules()]

    def validation() -> None:
        aside._scope("epoch", aside, "begin_fit")
        learn.model.eval()
        aside._scope("epoch", aside._all_batches, "begin_validate", dl)

    with RandomState([dl]), torch.no_grad():
        failed = True
        try:
            aside._scope("train", validation)
            failed = False
        except RuntimeError as e:
            if differs := _devices_differ(aside):
                raise RuntimeError(differs) from e
            raise
        finally:
            aside._finish(failed)
            for m, training in modes:
                m.training = training


def _silent(line: object) -> None:
    """The logger of a pass, whose lines would look like the fit's."""


def _devices_differ(run: Any) -> str:
    """A message if the model and the batch at hand are on different devices."""
    there = {str(p.device) for p in run.model.parameters()}
    batch = {str(t.device) for t in items_of(run.xb, Tensor)}
    if not there or batch <= there:
        return ""
    return (
        f"model and batch must be on one device; the model is on {', '.join(sorted(there))}, the batch on "
        f"{', '.join(sorted(batch))}: give the run a CudaCallback, or move one of them"
    )


class _Collector:
    """Its methods that are events follow those of all callbacks. No callback itself: it belongs to one pass."""

    run: Any

    def after_cancel_epoch(self) -> None:
        raise RuntimeError("a callback cancelled the pass (CancelEpochException), so its result would be of a part")

    def after_cancel_train(self) -> None:
        raise RuntimeError("a callback cancelled the pass (CancelTrainException), so its result would be of a part")


class _Judge(_Collector):
    """Averages the loss, and measures with the metrics of the run's AvgStatsCallback."""

    def __init__(self, run: Any, learn: Any):
        self.stats = [cb._fresh_stats() for cb in run.cbs if hasattr(cb, "_fresh_stats")]
        self.summed = reduction(learn.loss_func) == "sum"
        self.values: list[Tensor] = []
        self.sizes: list[int] = []

    def after_loss(self) -> None:
        run = self.run
        for stats in self.stats:
            stats.accumulate(run)
        self.values.append(run.loss.detach().mean())  # it may be of each sample
        self.sizes.append(batch_size(run.xb))

    def numbers(self) -> dict[str, Any]:
        """The averages over samples, by name; of a metric with several numbers a tensor or what it computes."""
        if not sum(self.sizes):
            raise ValueError("validate needs at least one batch; the loader gave none, or callbacks cancelled all")
        values = torch.stack(self.values).tolist()
        weights = [1] * len(values) if self.summed else self.sizes
        found: dict[str, Any] = {"loss": math.fsum(v * w for v, w in zip(values, weights)) / sum(self.sizes)}
        for stats in self.stats:
            found.update(stats.values)
        return found


class _Keep(_Collector):
    """Keeps predictions, targets and losses on the CPU."""

    def __init__(self) -> None:
        self.preds: list[Any] = []
        self.targets: list[Any] = []
        self.losses: list[Tensor] = []

    def after_pred(self) -> None:
        run = self.run
        _check_rows(run.pred, run.xb)
        self.preds.append(_on_cpu(run.pred))
        self.targets.append(_on_cpu(run.yb))

    def after_loss(self) -> None:
        if isinstance(self.run.loss, Tensor):
            self.losses.append(_on_cpu(self.run.loss))

    def after_cancel_batch(self) -> None:
        raise RuntimeError("a callback cancelled a batch (CancelBatchException), whose predictions would be missing")

    def joined(self, losses: bool) -> Predictions:
        """All batches as one."""
        if not self.preds:
            raise ValueError("predict needs at least one batch; the loader gave none")
        preds, targets = _leafwise(_joined, self.preds), _leafwise(_joined, self.targets)
        return Predictions(preds, targets, torch.cat(self.losses) if losses else None)


class _Examples(_Collector):
    """Keeps inputs and predictions of some samples; see `examples`."""

    def __init__(self, n: int, worst: bool):
        self.n, self.worst = n, worst
        self.kept: Any = None

    def after_loss(self) -> None:
        run = self.run
        _check_rows(run.pred, run.xb)
        rows = (run.xb, run.pred, run.yb, run.loss)
        rows = apply_to(_on_cpu(rows), Tensor, lambda t: t if t.dim() else None)  # without numbers of a whole batch
        if self.kept is not None:
            rows = _leafwise(_joined, [self.kept, rows])
        if self.worst:
            order = rows[3].nan_to_num(math.inf).argsort(descending=True, stable=True)[: self.n]
        else:
            order = torch.arange(min(self.n, batch_size(rows[0])))
        self.kept = apply_to(rows, Tensor, lambda t: t[order])
        if not self.worst and len(order) == self.n:
            raise CancelEpochException

    def after_cancel_epoch(self) -> None:
        """There are enough."""


def _on_cpu(value: Any) -> Any:
    return apply_to(value, Tensor, lambda t: t.detach().cpu())


def _check_rows(pred: Any, xb: Any) -> None:
    """ValueError unless every tensor of the output has a row for each sample; numbers, such as a loss, may be in it."""
    leaves = [t for t in items_of(pred, Tensor) if t.dim()]
    if not leaves:
        raise ValueError(
            f"predict needs a model that returns tensors with a row for each sample; got "
            f"{'one number' if isinstance(pred, Tensor) else type(pred).__name__}: set self.run.pred in after_pred of "
            f"a callback"
        )
    n = len(xb) if isinstance(xb, Tensor) and xb.dim() else len(leaves[0])
    if wrong := [tuple(t.shape) for t in leaves if len(t) != n]:
        raise ValueError(
            f"predict joins outputs along dimension 0, which must be the samples; a batch of {n} gave shape "
            f"{wrong[0]}: for a single sample x pass x[None], otherwise keep what has a row for each sample, "
            f"self.run.pred = …, in after_pred of a callback"
        )


def _leafwise(function: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    """`function` of the values at each leaf, in the first one's structure."""
    first = values[0]
    if isinstance(first, Mapping):
        made: Any = copy.copy(first) if isinstance(first, dict) else {}
        for key in first:
            made[key] = _leafwise(function, [value[key] for value in values])
        return made
    if isinstance(first, (list, tuple)) and next(items_of(first, Tensor), None) is not None:
        items = [_leafwise(function, list(column)) for column in zip(*values)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if dataclasses.is_dataclass(first):
        parts = _leafwise(function, [{f.name: getattr(v, f.name) for f in dataclasses.fields(v)} for v in values])
        return dataclasses.replace(first, **parts)  # type: ignore[type-var]  # no class: classes are no outputs
    return function(values)


def _joined(parts: list[Any]) -> Any:
    """The batches' values at one leaf as one; numbers, one a batch, are stacked."""
    first = parts[0]
    if isinstance(first, Tensor):
        parts = [part if part.dim() else part[None] for part in parts]
        if len(shapes := {tuple(part.shape[1:]): tuple(part.shape) for part in parts}) > 1:
            raise ValueError(
                f"predict joins the values of all batches along dimension 0, and their other dimensions differ: "
                f"{', '.join(map(str, [*shapes.values()][:2]))}: predict batch by batch, or bring them to one shape, "
                f"self.run.pred = … and self.run.yb = …, in after_pred of a callback"
            )
        return torch.cat(parts)
    if isinstance(first, (list, tuple)):  # such as names, one for each sample
        return [value for part in parts for value in part]
    return None if first is None else parts


class _Predicting(Unpack):
    """Outputs averaged over versions of a batch, and losses of each sample in place of their mean."""

    def __init__(self, learn: Any, losses: bool, versions: Sequence[Callable[[Any], Any]] = ()):
        super().__init__(learn.model, getattr(learn, "unpack", None), learn.loss_func is None)
        self.versions, self.each = versions, _each_loss(learn.loss_func) if losses else None

    def call_model(self, model: Any, xb: Any, forward: Callable[..., Any] | None = None) -> Any:
        if len(self.versions) < 2:
            return super().call_model(model, xb, forward)
        outputs = [  # of a copy each: function and model may change it in place
            super(_Predicting, self).call_model(model, tfm(apply_to(xb, Tensor, Tensor.clone)), forward)
            for tfm in self.versions
        ]
        return _leafwise(_mean, outputs)

    def call_loss(self, loss_func: Any, pred: Any, yb: Any, forward: Callable[..., Any]) -> Any:
        if self.each is None:
            return None
        if yb is None:
            raise ValueError("losses need targets, and the batches have none: pass pairs (x, y), or leave losses out")
        return self.each(pred, yb, forward)


# Test-time augmentation


def _versions(tta: Any) -> list[Callable[[Any], Any]]:
    """The functions of xb whose outputs are averaged: the batch as it is, and those of `tta`."""
    found: list[Callable[[Any], Any]] = [lambda xb: xb]
    for item in tta if isinstance(tta, (list, tuple)) else [] if tta is None else [tta]:
        if isinstance(item, str) and item in _FLIPS:
            found.append(functools.partial(_flipped, name=item))
        elif callable(item):
            found.append(item)
        else:
            raise ValueError(
                f"tta must be {', '.join(map(repr, _FLIPS))}, a function of xb, or a list of these; got {item!r}."
                f"{suggestion(item, _FLIPS)}"
            )
    return found


def _flipped(xb: Any, name: str) -> Tensor:
    if not isinstance(xb, Tensor) or xb.dim() != 4:
        got = f"a tensor of shape {tuple(xb.shape)}" if isinstance(xb, Tensor) else type(xb).__name__
        raise ValueError(f"tta={name!r} needs batches of images (N, C, H, W); got {got}: pass a function of xb")
    return xb.flip(_FLIPS[name])


def _mean(outputs: list[Any]) -> Any:
    """The mean of the outputs at one leaf."""
    first = outputs[0]
    if not isinstance(first, Tensor):
        return first
    if not first.is_floating_point() or first.dim() > 2:
        raise ValueError(
            f"tta averages numbers of shape (N,) or (N, C); got {str(first.dtype).removeprefix('torch.')} of shape "
            f"{tuple(first.shape)}: an output with places in it would have to be turned back first"
        )
    return torch.stack(outputs).mean(0)


# Losses of each sample


def _each_loss(loss_func: Any) -> Callable[..., Tensor]:
    """A function `(pred, yb, forward)` of the losses (N,) of the samples."""
    if loss_func is None:
        raise ValueError(
            "the losses of samples need a loss function; this learner has none (loss_func=None), and its model returns "
            "the loss of a whole batch"
        )
    reduces, each = reduction(loss_func), unreduced(loss_func)

    def losses(pred: Any, yb: Any, forward: Callable[..., Any]) -> Tensor:
        n, found = batch_size(yb), None
        if n != batch_size(pred):
            raise ValueError(f"losses need a target for each sample; got {batch_size(pred)} samples and {n} targets")
        if each is not None:
            try:
                found = forward(each, pred, yb)
            except Exception:  # noqa: BLE001 - it does not reduce as its name says; below it fails with its own error
                found = None
        if isinstance(found, Tensor) and found.dim() and len(found) == n:
            rest = found.flatten(1) if found.dim() > 1 else found[:, None]
            return rest.mean(1) if reduces in ("mean", "none") else rest.sum(1)
        return torch.stack([forward(loss_func, _one(pred, i), _one(yb, i)).mean() for i in range(n)])

    return losses


def _one(value: Any, i: int) -> Any:
    return apply_to(value, Tensor, lambda t: t[i : i + 1] if t.dim() else t)
