"""Averages of loss and metrics over an epoch."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastrbn.learn.batch import batch_size, reduction
from fastrbn.learn.callback import Callback
from fastrbn.learn.ranks import rank
from fastrbn.util import items_of

from . import metrics as _metrics
from .tape import Tape

_MANY = "…"  # in place of several numbers


class _Measure:
    """A metric, and the names of its values."""

    def __init__(self, metric: Any, names: list[str]):
        self.metric, self.names, self.accumulates = metric, names, _metrics.accumulates(metric)


class AvgStats:
    """Averages of loss and metrics over one pass, with each batch weighted by its size.

    The loss is the mean over samples, also for a loss function that sums them (`reduction="sum"`). `.names` are "loss"
    and the names of the metrics, less those of several numbers, which only `.values` has. `.objects` has the metrics
    that accumulate, by name.

    Parameters
    ----------
    metrics : callable, object or list, optional
        Functions `(pred, yb) -> scalar`, or objects that accumulate; see `AvgStatsCallback`.
    in_train : bool, default True
        True for the training pass. It uses copies of objects that accumulate, and changes the text.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn)
    >>> run.xb, run.yb = next(iter(data.valid_dl))
    >>> run.pred = learn.model(run.xb)
    >>> run.loss = F.cross_entropy(run.pred, run.yb)
    >>> stats = AvgStats(accuracy, in_train=False)
    >>> stats.accumulate(run)
    >>> stats.names, stats.count == len(run.yb)
    (['loss', 'accuracy'], True)

    References
    ----------
    fast.ai course, part 2 (2019), notebook 04.
    """

    def __init__(self, metrics: Any = None, in_train: bool = True):
        metrics = list(metrics) if isinstance(metrics, (list, tuple)) else [] if metrics is None else [metrics]
        for m in metrics:
            _metrics.check(m)
        self.metrics = [copy.deepcopy(m) if in_train and _metrics.accumulates(m) else m for m in metrics]
        self._measures = list(map(_Measure, self.metrics, _metrics.names_of(metrics)))
        self.names = ["loss", *(n for m in self._measures if _metrics.is_scalar(m.metric) for n in m.names)]
        self.in_train = in_train
        self._averaged = ["loss", *(m.names[0] for m in self._measures if not m.accumulates)]
        self.objects: dict[str, Any] = {}  # the metrics that accumulate; a collection by the name of its class
        for m in self._measures:
            if m.accumulates:
                name = _metrics.metric_name(m.metric) if _metrics.is_collection(m.metric) else m.names[0]
                self.objects[f"{name}_{len(self.objects) + 1}" if name in self.objects else name] = m.metric
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._sizes: list[int] = []
        self._tape, self._summed = Tape(len(self._averaged)), False
        self._placed = False  # whether modules are on the device of the predictions
        self._computed: dict[str, Any] | None = None
        for metric in self.objects.values():
            metric.reset()

    def accumulate(self, run: Any) -> None:
        """Add the run's current batch: its `pred`, `yb` and `loss`. Does not wait for the device."""
        xb, row = run.xb, [run.loss.detach()]
        if not self._sizes:
            self._summed = reduction(getattr(run.learn, "loss_func", None)) == "sum"
        if self.metrics:
            pred, yb = run.pred, run.yb
            pred = pred.detach() if isinstance(pred, torch.Tensor) else pred
            for m in self._measures:
                if m.accumulates:
                    _metrics.update(m.metric, pred, yb, m.names[0], place=not self._placed)
                else:
                    row.append(_metrics.measure(m.metric, pred, yb, m.names[0]))
            self._placed = True
        self._sizes.append(xb.shape[0] if isinstance(xb, torch.Tensor) else batch_size(xb))
        self._computed = None
        self._tape.add(row)

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(self._sizes)

    @property
    def values(self) -> dict[str, Any]:
        """Loss and metrics by name; empty before the first batch. Reading them waits for the device.

        One number is a float. Several are a tensor on the CPU, or a dictionary or list of what the metric computes.
        """
        if not self.count:
            return {}
        sums = dict(zip(self._averaged, self._sums()))
        if self._computed is None:
            self._computed = self._compute()
        order = [n for m in self._measures for n in m.names]
        found = {**{n: total / self.count for n, total in sums.items()}, **self._computed}
        return {n: found.pop(n) for n in ["loss", *order] if n in found} | found

    @property
    def all_stats(self) -> list[float]:
        """The averages multiplied by `count`. Reading them waits for the device."""
        if not self.count:
            return [0.0] * len(self.names)
        sums = dict(zip(self._averaged, self._sums()))
        return [sums[n] if n in sums else value * self.count for n, value in zip(self.names, self.avg_stats)]

    @property
    def avg_stats(self) -> list[float]:
        """Loss and metrics in the order of `names`; empty before the first batch. Reading them waits for the device.

        NaN stands for a metric that has computed several numbers, which are in `values`.
        """
        values = self.values
        return [v if isinstance(v := values.get(n), float) else math.nan for n in self.names] if values else []

    def _sums(self) -> list[float]:
        """Sums over samples of the loss and of the functions."""
        columns = self._tape.read()
        sums = [math.fsum(v * size for v, size in zip(column, self._sizes)) for column in columns]
        return [math.fsum(columns[0]), *sums[1:]] if self._summed else sums

    def _compute(self) -> dict[str, Any]:
        computed: dict[str, Any] = {}
        for m in self._measures:
            if m.accumulates:
                computed.update(_metrics.compute(m.metric, m.names))
        return computed

    def merge(self, gather: Callable[[Any], list]) -> None:
        """Replace the averages by those over all processes. Waits for the device.

        Objects with a method `merge(gather)`, as those of this package, merge what they have accumulated. Others must
        synchronise in `compute`, as torchmetrics' do; if their values differ, the mean is taken, with a warning.

        Parameters
        ----------
        gather : callable
            Takes a list of numbers, a tensor or None, and returns that of each process.
        """
        count, *sums = map(math.fsum, zip(*gather([self.count, *self._sums()])))
        if not count:
            return
        computed = {}
        for m in self._measures:
            if m.accumulates:
                computed.update(self._merged(m.names, m.metric, gather))
        self._sizes, self._summed, self._computed = [int(count)], False, computed
        columns = [torch.tensor([total / count], dtype=torch.float64) for total in sums]
        self._tape.load_state_dict({"columns": columns})

    def _merged(self, names: list[str], metric: Any, gather: Callable[[Any], list]) -> dict[str, Any]:
        if callable(getattr(metric, "merge", None)):
            metric.merge(gather)
            return _metrics.compute(metric, names)
        values: dict[str, Any] = {}
        if self.count or isinstance(metric, torch.nn.Module):  # torchmetrics' wait for all ranks
            with warnings.catch_warnings():
                if not self.count:
                    warnings.simplefilter("ignore")  # they warn without a batch
                values = _metrics.compute(metric, names)
        for name in names:
            every = [row for row in gather(_flat(self.count, values.get(name))) if row[0]]
            same = all(len(r) == len(every[0]) and r[1:].allclose(every[0][1:], 1e-6, equal_nan=True) for r in every)
            if all(len(row) == 2 for row in every) and isinstance(values.get(name, 0.0), float):
                weights, numbers = torch.stack(every).T
                values[name] = float(numbers[0] if same else (weights * numbers).sum() / weights.sum())
            if not same:
                warnings.warn(
                    f"the metric '{name}' is not merged over processes: the value shown is the mean over processes, or "
                    f"rank 0's if it has several numbers, which differs from the metric of all samples; give it a "
                    f"method merge(gather), or use a metric that synchronises (torchmetrics' do)",
                    stacklevel=3,
                )
        return values

    def state_dict(self) -> dict:
        """Values and sizes of the batches so far, and what objects have accumulated. Waits for the device."""
        objects = {name: _metrics.state(metric) for name, metric in self.objects.items()}
        more = {"summed": self._summed, "objects": objects}
        return {"names": list(self.names), "sizes": torch.tensor(self._sizes), **more, **self._tape.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`. ValueError if it has other metrics."""
        objects, saved = self.objects, state.get("objects", {})
        if state["names"] != self.names or len(state["columns"]) != len(self._averaged) or saved.keys() - objects:
            before, now = _listed(state["names"], saved), _listed(self.names, objects)
            raise ValueError(
                f"a resumed fit needs the metrics of the first one: the saved ones are {before}, now they are {now}"
            )
        self._sizes, self._summed, self._computed = state["sizes"].tolist(), state.get("summed", False), None
        self._placed = False
        for name, kept in saved.items():
            _metrics.load_state(objects[name], kept)
        self._tape.load_state_dict(state)

    def __repr__(self):
        if not self.count:
            return ""
        values = self.values
        shown = (f"{v:.6g}" if isinstance(v := values.get(n), float) else _MANY for n in self.names)
        return f"{'train' if self.in_train else 'valid'}: [{', '.join(shown)}]"


class AvgStatsCallback(Callback):
    """Average loss and metrics over each pass, print them after each epoch and keep them.

    Prints `train: [loss, metric…]` and `valid: […]` through `run.logger`. A logger with an attribute `table = True`,
    such as `ProgressCallback`'s, gets a header and rows as lists of strings. Values stay on the device until the epoch
    ends. The loss is the mean over samples, also for a loss function that sums them (`reduction="sum"`).

    `.history` has for each epoch a dictionary with `epoch train_loss train_<metric> valid_loss valid_<metric> lr time`:
    `lr` is the last param group's, `time` the seconds of the epoch, and a value is None if it was not measured (no
    validation). `.train_stats.values` and `.valid_stats.values` are dictionaries of the last epoch's values by name,
    and the only place of those with several numbers, such as `PerClassAccuracy`: these have no column in the table,
    the history and logs.

    Parameters
    ----------
    metrics : callable, object or list, optional
        A function `(pred, yb) -> scalar` is averaged over batches, weighted by their size. This is right for a mean
        over samples such as `accuracy`, and wrong, without an error, for scores of a whole pass such as F1, AUC or a
        correlation: the F1 score of an epoch is not the mean of the batches' scores. For those use `F1` and the other
        classes here, a metric of torchmetrics as it is, `EpochMetric(function)`, or any object with
        `update(pred, yb)`, `compute()` and `reset()`: it is reset before each pass, updated with each batch and
        computed after the pass. Validation uses the object itself, training a copy, `.train_stats.objects[name]`.
        A MetricCollection has a column for each of its metrics. No metric may be named `loss`.

    Raises
    ------
    TypeError
        If a metric is neither a function nor an object with these methods.
    ValueError
        If two columns would have the same name.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(AvgStatsCallback, accuracy)])
    >>> run.logger = lambda line: None   # by default it is print
    >>> run.fit(2, learn)
    >>> list(run.avg_stats.history[-1])
    ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'lr', 'time']

    References
    ----------
    fast.ai course, part 2 (2019), notebooks 04 and 09c.
    """

    def __init__(self, metrics: Any = None):
        self.train_stats, self.valid_stats = AvgStats(metrics, True), AvgStats(metrics, False)
        self.history: list[dict[str, Any]] = []
        self.several: set[str] = set()  # columns whose metric has computed several numbers, which `history` lacks

    @property
    def columns(self) -> list[str]:
        """The keys of a row of `history`."""
        names = self.train_stats.names
        return ["epoch", *(f"train_{n}" for n in names), *(f"valid_{n}" for n in names), "lr", "time"]

    def begin_fit(self) -> None:
        self.history, self.several = [], set()
        if getattr(self.run.logger, "table", False):
            self.run.logger([c for c in self.columns if c != "lr"])

    def begin_epoch(self) -> None:
        self.train_stats.reset()
        self.valid_stats.reset()
        self._start = time.perf_counter()

    def after_loss(self) -> None:
        run = self.run
        (self.train_stats if run.in_train else self.valid_stats).accumulate(run)

    def _fresh_stats(self) -> AvgStats:
        """New averages of the same metrics for a validation outside a fit. Objects that accumulate are reset."""
        stats = copy.copy(self.valid_stats)
        stats.reset()
        return stats

    def merge(self, gather: Callable[[list[float]], list[list[float]]]) -> None:
        """Replace the epoch's averages by those over all processes; `Distributed` calls this."""
        self.train_stats.merge(gather)
        self.valid_stats.merge(gather)

    def after_epoch(self) -> None:
        run, row = self.run, {"epoch": self.run.epoch}
        for stats, which in ((self.train_stats, "train"), (self.valid_stats, "valid")):
            values = stats.values
            for name in stats.names:
                value = values.get(name)
                row[f"{which}_{name}"] = value if isinstance(value, float) else None
                if value is not None and not isinstance(value, float):
                    self.several.add(f"{which}_{name}")
        # only now is the epoch's work done: reading the averages waited for the device
        row.update(lr=_rate(run.opt), time=time.perf_counter() - self._start)
        self.history.append(row)
        if getattr(run.logger, "table", False):
            run.logger([_MANY if k in self.several else _cell(k, v) for k, v in row.items() if k != "lr"])
        else:
            for text in filter(None, map(repr, (self.train_stats, self.valid_stats))):
                run.logger(text)

    def state_dict(self) -> dict:
        """The history, and the values and seconds of the current epoch. Waits for the device."""
        parts = {"train": self.train_stats.state_dict(), "valid": self.valid_stats.state_dict()}
        return {"history": [dict(row) for row in self.history], "seconds": time.perf_counter() - self._start, **parts}

    def load_state_dict(self, state: dict) -> None:
        self.train_stats.load_state_dict(state["train"])
        self.valid_stats.load_state_dict(state["valid"])
        if rank() != 0:  # rank 0 saved only its own batches, and they must count once
            self.train_stats.reset()
            self.valid_stats.reset()
        self.history = [dict(row) for row in state["history"]]
        self._start = time.perf_counter() - state["seconds"]

    def __repr__(self):
        return f"AvgStatsCallback({', '.join(self.train_stats.names[1:])})"


def _flat(count: int, value: Any) -> torch.Tensor:
    """`count` and all numbers in `value`, float64 (1 + numbers,)."""
    numbers = [torch.as_tensor(v).double().flatten() for v in items_of(value, (float, torch.Tensor))]
    return torch.cat([torch.tensor([count], dtype=torch.float64), *numbers])


def _listed(names: list[str], objects: Iterable[str]) -> str:
    return ", ".join([*names, *(n for n in objects if n not in names)])


def _rate(opt: Any) -> float | None:
    groups = getattr(opt, "param_groups", None)
    last = groups[-1] if groups else None
    return float(last["lr"]) if isinstance(last, dict) and "lr" in last else None


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "time":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes:02d}:{seconds:02d}"
    if isinstance(value, int):
        return str(value)
    return f"{value:.6f}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.3e}"
