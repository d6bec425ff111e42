"""What a fit writes down: loss and learning rate of each step, averages of each epoch."""

from __future__ import annotations

import copy
import math
import time
import warnings

import torch

from fastrbn.learn.batch import batch_size, reduction
from fastrbn.learn.callback import Callback
from fastrbn.learn.ranks import rank

from . import metrics as _metrics
from .metrics import EpochMetric, accuracy

__all__ = ["AvgStats", "AvgStatsCallback", "EpochMetric", "Recorder", "accuracy"]

_CHUNK = 64  # scalars kept one by one before they are joined on their device: more are slower, they leave the cache


class _Tape:
    """Rows of scalars that stay on their device until someone reads them, then come over in one go."""

    def __init__(self, width):
        self._new, self._joined, self._columns = [], [[] for _ in range(width)], [[] for _ in range(width)]

    def add(self, row) -> None:
        self._new.append(row)
        if len(self._new) >= _CHUNK:
            self._join()

    def _join(self):
        for joined, column in zip(self._joined, zip(*self._new)):
            tensors = [v if isinstance(v, torch.Tensor) else torch.tensor(float(v)) for v in column]
            joined.append(torch.stack(tensors).flatten())
        self._new = []

    def read(self) -> list[list[float]]:
        """A list for each column."""
        self._join()
        for joined, column in zip(self._joined, self._columns):
            if joined:
                column.extend(torch.cat(joined).tolist())
                joined.clear()
        return self._columns

    def state_dict(self) -> dict:
        return {"columns": [torch.tensor(column, dtype=torch.float64) for column in self.read()]}

    def load_state_dict(self, state) -> None:
        self.__init__(len(state["columns"]))
        self._columns = [column.tolist() for column in state["columns"]]

    def __getstate__(self):
        return {"_new": [], "_joined": [[] for _ in self._columns], "_columns": self.read()}


class Recorder(Callback):
    """Keeps loss and learning rates of each training step; a batch that was cancelled before its loss leaves none.

    - `.losses`: a float for each step. They stay on the device during an epoch; reading them waits for it.
    - `.lrs`: for each param group a list with a rate for each step.

    Both begin anew with each fit and survive its errors.

    Source: fast.ai course, part 2 (2019), notebooks 05 and 05b.
    """

    _needs_opt = ("param_groups", "lr")

    def __init__(self):
        self._tape, self._lrs, self._lrs_on_device = _Tape(1), [], False

    def begin_fit(self):
        groups = self.run.opt.param_groups
        self._tape, self._lrs = _Tape(1), [[] for _ in groups]
        self._lrs_on_device = any(isinstance(g["lr"], torch.Tensor) for g in groups)

    def after_loss(self):
        run = self.run
        if run.in_train:
            self._tape.add((run.loss.detach(),))
            for lrs, group in zip(self._lrs, run.opt.param_groups):
                lr = group["lr"]
                lrs.append(lr.clone() if self._lrs_on_device and isinstance(lr, torch.Tensor) else lr)

    def after_epoch(self):
        self._tape.read()

    def after_fit(self):
        self._tape.read()

    def state_dict(self):
        """Losses and rates so far. Waits for the device."""
        return {"losses": self._tape.state_dict(), "lrs": [torch.tensor(r, dtype=torch.float64) for r in self.lrs]}

    def load_state_dict(self, state):
        self._tape.load_state_dict(state["losses"])
        self._lrs = [rates.tolist() for rates in state["lrs"]]

    @property
    def losses(self) -> list[float]:
        return self._tape.read()[0]

    @property
    def lrs(self) -> list[list[float]]:
        if self._lrs_on_device:  # a compiled or captured optimiser keeps its rate in a tensor
            for lrs in self._lrs:
                lrs[:] = map(float, lrs)
        return self._lrs

    def plot_lr(self, pgid=-1):
        """Learning rate of param group `pgid` over the steps. Returns the matplotlib Figure."""
        from fastrbn import plots

        return plots.plot_lr(self._group(pgid))

    def plot_loss(self, skip_last=0):
        """Loss over the steps, without the last `skip_last`. Returns the matplotlib Figure."""
        from fastrbn import plots

        return plots.plot_loss(self.losses[: max(len(self.losses) - skip_last, 0)])

    def plot(self, skip_last=0, pgid=-1):
        """Loss against learning rate, as after `LR_Find`. Returns the matplotlib Figure."""
        from fastrbn import plots

        n = max(len(self.losses) - skip_last, 0)
        return plots.plot_lr_find(self._group(pgid)[:n], self.losses[:n])

    def _group(self, pgid):
        if not self._lrs:
            raise ValueError("the Recorder has nothing to plot: it has not been part of a fit yet")
        return self.lrs[pgid]


class AvgStats:
    """Averages of loss and metrics over a pass, each batch weighted by its size.

    - `metrics`: a function `(pred, yb) -> scalar`, or an object that accumulates, with `update(pred, yb)`, `compute()`
      and `reset()` (torchmetrics' are); or a list of them. See `AvgStatsCallback`.
    - `in_train`: whether it is the training pass, for the text. A training pass has copies of objects that accumulate.

    `.avg_stats` is `[loss, metric, …]` in floats, `.names` what they are, `.count` the number of samples. The loss is
    the mean over samples, also of a loss function that sums them (`reduction="sum"`).

    Source: fast.ai course, part 2 (2019), notebook 04.
    """

    def __init__(self, metrics=None, in_train=True):
        metrics = list(metrics) if isinstance(metrics, (list, tuple)) else [] if metrics is None else [metrics]
        for m in metrics:
            _metrics.check(m)
        self.metrics = [copy.deepcopy(m) if in_train and _metrics.accumulates(m) else m for m in metrics]
        self.names, self.in_train = _metrics.column_names(metrics), in_train
        self._objects = {n: m for n, m in zip(self.names[1:], self.metrics) if _metrics.accumulates(m)}
        self._averaged = [n for n in self.names if n not in self._objects]
        self.reset()

    def reset(self) -> None:
        self._sizes, self._tape, self._computed, self._summed = [], _Tape(len(self._averaged)), None, False
        for metric in self._objects.values():
            metric.reset()

    def accumulate(self, run) -> None:
        """Take the run's current batch: `pred`, `yb` and `loss`."""
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
        return sum(self._sizes)

    @property
    def all_stats(self) -> list[float]:
        """The sums that `avg_stats` divides by `count`."""
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
        count = self.count
        return [total / count for total in self.all_stats] if count else []

    def merge(self, gather) -> None:
        """Become the averages over several processes; `gather(numbers)` gives the numbers of each, a list a process.
        What objects accumulate is averaged too, with a warning where the processes' values differ: one that merges by
        itself (torchmetrics' do) has the same in each. Waits for the device."""
        every = gather([self.count, *self.all_stats])
        count, *sums = map(math.fsum, zip(*every))
        if not count:
            return
        averages = {n: total / count for n, total in zip(self.names, sums)}
        for i, name in enumerate(self.names, 1):
            values = [numbers[i] / numbers[0] for numbers in every if numbers[0]]
            if name in self._objects and not all(math.isclose(v, values[0], rel_tol=1e-6) for v in values):
                warnings.warn(
                    f"the metric '{name}' does not merge over processes: what is shown is the mean of theirs, which is "
                    f"not the metric of all samples",
                    stacklevel=2,
                )
        self._sizes, self._summed = [int(count)], False
        self._computed = {n: averages[n] for n in self._objects}
        self._tape.load_state_dict(
            {"columns": [torch.tensor([averages[n]], dtype=torch.float64) for n in self._averaged]}
        )

    def state_dict(self) -> dict:
        """The values of each batch so far and its size, and what objects have accumulated. Waits for the device."""
        objects = {name: _metrics.state(metric) for name, metric in self._objects.items()}
        more = {"summed": self._summed, "objects": objects}
        return {"names": list(self.names), "sizes": torch.tensor(self._sizes), **more, **self._tape.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`. ValueError where that measured other things."""
        if state["names"] != self.names or len(state["columns"]) != len(self._averaged):
            raise ValueError(
                f"averages can go on only with the same metrics; the saved ones are {', '.join(state['names'])}, here "
                f"they are {', '.join(self.names)}: give the metrics of the first fit"
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
    """Averages loss and metrics over each pass, prints them after each epoch and keeps them.

    - `metrics`: one or a list. A function `(pred, yb) -> scalar` is averaged over batches, each weighted by its size:
      right for a mean over samples such as `accuracy`, wrong for scores of a whole pass such as F1 or AUC. Those are
      `EpochMetric(function)`, or an object with `update(pred, yb)`, `compute()` and `reset()`, such as torchmetrics':
      reset before each pass, updated with each batch, computed after it. Validation has the object itself, training
      a copy. A metric may not be named `loss`.
    - `.history`: for each epoch a dictionary with `epoch train_loss train_<metric> valid_loss valid_<metric> lr time`;
      `lr` is the last param group's, `time` the epoch's in seconds, None what was not measured (no validation).

    The loss is the mean over samples, also of a loss function that sums them (`reduction="sum"`).

    Prints `train: [loss, metric…]` and `valid: […]` through `run.logger`; a logger with an attribute `table = True`
    (`ProgressCallback`'s) gets a header and rows, lists of strings. Values stay on the device until the epoch ends.

    Source: fast.ai course, part 2 (2019), notebooks 04 and 09c.
    """

    def __init__(self, metrics=None):
        self.train_stats, self.valid_stats = AvgStats(metrics, True), AvgStats(metrics, False)
        self.history = []

    @property
    def columns(self) -> list[str]:
        """The keys of a row of `history`."""
        names = self.train_stats.names
        return ["epoch", *(f"train_{n}" for n in names), *(f"valid_{n}" for n in names), "lr", "time"]

    def begin_fit(self):
        self.history = []
        if getattr(self.run.logger, "table", False):
            self.run.logger([c for c in self.columns if c != "lr"])

    def begin_epoch(self):
        self.train_stats.reset()
        self.valid_stats.reset()
        self._start = time.perf_counter()

    def after_loss(self):
        run = self.run
        (self.train_stats if run.in_train else self.valid_stats).accumulate(run)

    def merge(self, gather):
        """For `Distributed`: from here on the epoch's averages are those of all processes."""
        self.train_stats.merge(gather)
        self.valid_stats.merge(gather)

    def after_epoch(self):
        run, row = self.run, {"epoch": self.run.epoch}
        for stats, which in ((self.train_stats, "train"), (self.valid_stats, "valid")):
            values = stats.avg_stats or [None] * len(stats.names)
            row.update({f"{which}_{name}": value for name, value in zip(stats.names, values)})
        # the averages above waited for the device: only now is the epoch's work done
        row.update(lr=_rate(run.opt), time=time.perf_counter() - self._start)
        self.history.append(row)
        if getattr(run.logger, "table", False):
            run.logger([_cell(k, v) for k, v in row.items() if k != "lr"])
        else:
            for text in filter(None, map(repr, (self.train_stats, self.valid_stats))):
                run.logger(text)

    def state_dict(self):
        """The history, and of the epoch under way the averages' parts and the seconds. Waits for the device."""
        parts = {"train": self.train_stats.state_dict(), "valid": self.valid_stats.state_dict()}
        return {"history": [dict(row) for row in self.history], "seconds": time.perf_counter() - self._start, **parts}

    def load_state_dict(self, state):
        self.train_stats.load_state_dict(state["train"])
        self.valid_stats.load_state_dict(state["valid"])
        if rank() != 0:  # rank 0 saved its own parts: they count once
            self.train_stats.reset()
            self.valid_stats.reset()
        self.history = [dict(row) for row in state["history"]]
        self._start = time.perf_counter() - state["seconds"]

    def __repr__(self):
        return f"AvgStatsCallback({', '.join(self.train_stats.names[1:])})"


def _rate(opt) -> float | None:
    groups = getattr(opt, "param_groups", None)
    last = groups[-1] if groups else None
    return float(last["lr"]) if isinstance(last, dict) and "lr" in last else None


def _cell(name, value) -> str:
    if value is None:
        return "-"
    if name == "time":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes:02d}:{seconds:02d}"
    if isinstance(value, int):
        return str(value)
    return f"{value:.6f}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.3e}"
