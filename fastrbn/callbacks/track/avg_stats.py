"""Averages of loss and metrics over an epoch."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fastrbn.learn.batch import batch_size, reduction
from fastrbn.learn.callback import Callback
from fastrbn.learn.ranks import rank

from . import metrics as _metrics
from .tape import Tape


class AvgStats:
    """Averages of loss and metrics over one pass, with each batch weighted by its size.

    The loss is the mean over samples, also for a loss function that sums them (`reduction="sum"`). `.names` are "loss"
    and the names of the metrics.

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
        self.names, self.in_train = _metrics.column_names(metrics), in_train
        self._objects = {n: m for n, m in zip(self.names[1:], self.metrics) if _metrics.accumulates(m)}
        self._averaged = [n for n in self.names if n not in self._objects]
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._sizes: list[int] = []
        self._tape, self._summed = Tape(len(self._averaged)), False
        self._computed: dict[str, float] | None = None
        for metric in self._objects.values():
            metric.reset()

    def accumulate(self, run: Any) -> None:
        """Add the run's current batch: its `pred`, `yb` and `loss`. Does not wait for the device."""
        xb, row, first = run.xb, [run.loss.detach()], not self._sizes
        if first:
            self._summed = reduction(getattr(run.learn, "loss_func", None)) == "sum"
        if self.metrics:
            pred, yb = run.pred, run.yb
            pred = pred.detach() if isinstance(pred, torch.Tensor) else pred
            for name, metric in zip(self.names[1:], self.metrics):
                if name in self._objects:
                    _metrics.update(metric, pred, yb, name, first)
                else:
                    row.append(_metrics.measure(metric, pred, yb, name))
        self._sizes.append(xb.shape[0] if isinstance(xb, torch.Tensor) else batch_size(xb))
        self._computed = None
        self._tape.add(row)

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(self._sizes)

    @property
    def all_stats(self) -> list[float]:
        """The averages multiplied by `count`. Reading them waits for the device."""
        columns, count = dict(zip(self._averaged, self._tape.read())), self.count
        sums = {n: math.fsum(v * size for v, size in zip(column, self._sizes)) for n, column in columns.items()}
        if self._summed:
            sums["loss"] = math.fsum(columns["loss"])
        if self._computed is None:
            self._computed = {n: _metrics.compute(m, n) for n, m in self._objects.items()} if count else {}
        sums.update((n, value * count) for n, value in self._computed.items())
        return [sums[n] for n in self.names] if count else [0.0] * len(self.names)

    @property
    def avg_stats(self) -> list[float]:
        """Loss and metrics in the order of `names`; empty before the first batch. Reading them waits for the device."""
        count = self.count
        return [total / count for total in self.all_stats] if count else []

    def merge(self, gather: Callable[[list[float]], list[list[float]]]) -> None:
        """Replace the averages by those over all processes. Waits for the device.

        Values of objects that accumulate are averaged too, with a warning if they differ. Objects that synchronise by
        themselves, such as torchmetrics', have the same value in each process.

        Parameters
        ----------
        gather : callable
            Takes this process's numbers and returns the numbers of each process.
        """
        every = gather([self.count, *self.all_stats])
        count, *sums = map(math.fsum, zip(*every))
        if not count:
            return
        averages = {n: total / count for n, total in zip(self.names, sums)}
        for i, name in enumerate(self.names, 1):  # numbers[0] is the count
            values = [numbers[i] / numbers[0] for numbers in every if numbers[0]]
            if name in self._objects and not all(math.isclose(v, values[0], rel_tol=1e-6) for v in values):
                warnings.warn(
                    f"the metric '{name}' is not merged over processes: the value shown is the mean over processes, "
                    f"which differs from the metric of all samples; use a metric that synchronises (torchmetrics' do)",
                    stacklevel=2,
                )
        self._sizes, self._summed = [int(count)], False
        self._computed = {n: averages[n] for n in self._objects}
        self._tape.load_state_dict(
            {"columns": [torch.tensor([averages[n]], dtype=torch.float64) for n in self._averaged]}
        )

    def state_dict(self) -> dict:
        """Values and sizes of the batches so far, and what objects have accumulated. Waits for the device."""
        objects = {name: _metrics.state(metric) for name, metric in self._objects.items()}
        more = {"summed": self._summed, "objects": objects}
        return {"names": list(self.names), "sizes": torch.tensor(self._sizes), **more, **self._tape.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`. ValueError if it has other metrics."""
        if state["names"] != self.names or len(state["columns"]) != len(self._averaged):
            raise ValueError(
                f"a resumed fit needs the metrics of the first one: the saved ones are {', '.join(state['names'])}, "
                f"now they are {', '.join(self.names)}"
            )
        self._sizes, self._summed, self._computed = state["sizes"].tolist(), state.get("summed", False), None
        for name, saved in state.get("objects", {}).items():
            _metrics.load_state(self._objects[name], saved)
        self._tape.load_state_dict(state)

    def __repr__(self):
        if not self.count:
            return ""
        return f"{'train' if self.in_train else 'valid'}: [{', '.join(f'{v:.6g}' for v in self.avg_stats)}]"


class AvgStatsCallback(Callback):
    """Average loss and metrics over each pass, print them after each epoch and keep them.

    Prints `train: [loss, metric…]` and `valid: […]` through `run.logger`. A logger with an attribute `table = True`,
    such as `ProgressCallback`'s, gets a header and rows as lists of strings. Values stay on the device until the epoch
    ends. The loss is the mean over samples, also for a loss function that sums them (`reduction="sum"`).

    `.history` has for each epoch a dictionary with `epoch train_loss train_<metric> valid_loss valid_<metric> lr time`:
    `lr` is the last param group's, `time` the seconds of the epoch, and a value is None if it was not measured (no
    validation).

    Parameters
    ----------
    metrics : callable, object or list, optional
        A function `(pred, yb) -> scalar` is averaged over batches, weighted by their size. This is right for a mean
        over samples such as `accuracy`, and wrong for scores of a whole pass such as F1 or AUC. For those use
        `EpochMetric(function)`, or an object with `update(pred, yb)`, `compute()` and `reset()`, as torchmetrics' have:
        it is reset before each pass, updated with each batch and computed after the pass. Validation uses the object
        itself, training a copy. No metric may be named `loss`.

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

    @property
    def columns(self) -> list[str]:
        """The keys of a row of `history`."""
        names = self.train_stats.names
        return ["epoch", *(f"train_{n}" for n in names), *(f"valid_{n}" for n in names), "lr", "time"]

    def begin_fit(self) -> None:
        self.history = []
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
            values: list[float | None] = [*stats.avg_stats] or [None] * len(stats.names)
            row.update({f"{which}_{name}": value for name, value in zip(stats.names, values)})
        # only now is the epoch's work done: reading the averages waited for the device
        row.update(lr=_rate(run.opt), time=time.perf_counter() - self._start)
        self.history.append(row)
        if getattr(run.logger, "table", False):
            run.logger([_cell(k, v) for k, v in row.items() if k != "lr"])
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
