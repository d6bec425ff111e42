"""The numbers of a fit for a function, JSON lines, TensorBoard and CSV files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastrbn.learn.callback import Callback
from fastrbn.learn.ranks import rank
from fastrbn.util import whole, write_whole

from .monitor import find_averages

_WAIT = 10.0  # seconds between two times that steps are handed over within an epoch; each waits for the device


class CSVLogger(Callback):
    """Write the history of `AvgStatsCallback` to a CSV file: a header, and a row for each epoch.

    The file is complete on disk after each epoch. An empty cell means that the value was not measured. In a distributed
    run rank 0 writes.

    Parameters
    ----------
    path : str or Path, default "history.csv"
        The file, relative to the working directory at construction. Missing folders are created.
    append : bool, default False
        Keep the rows in the file, whose columns must be the same. Otherwise each fit overwrites it.

    Raises
    ------
    ValueError
        In `begin_fit`: the run has no `AvgStatsCallback`, or rows cannot be appended to the file.
    IsADirectoryError
        In `begin_fit`, if `path` is a folder.

    Examples
    --------
    >>> cbs = [partial(AvgStatsCallback, accuracy), partial(CSVLogger, "history.csv")]
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=cbs)
    >>> run.logger = lambda line: None
    >>> run.fit(1, learn)
    >>> Path("history.csv").read_text().splitlines()[0]
    'epoch,train_loss,train_accuracy,valid_loss,valid_accuracy,lr,time'
    """

    def __init__(self, path: str | Path = "history.csv", append: bool = False):
        self.path, self.append = Path(path).absolute(), append

    def begin_fit(self) -> None:
        self._stats = find_averages(self.run)
        if self._stats is None:
            raise ValueError(
                "CSVLogger needs an AvgStatsCallback in the run, whose history it writes: pass both, as in "
                "cbs=[partial(AvgStatsCallback, accuracy), CSVLogger]"
            )
        if self.path.is_dir():
            raise IsADirectoryError(f"CSVLogger needs a file; got the folder {self.path}: add a name, history.csv")
        self._before = self._rows_there() if self.append and self.path.exists() else ""

    def after_epoch(self) -> None:
        if rank() != 0:
            return
        text = io.StringIO(newline="")
        out = csv.DictWriter(text, self._stats.columns, lineterminator="\n")
        if not self._before:
            out.writeheader()
        out.writerows(self._stats.history)
        write_whole(self.path, self._before + text.getvalue())

    def state_dict(self) -> dict:
        """The rows of earlier fits, which `append` keeps. AvgStatsCallback saves those of this fit."""
        return {"before": self._before}

    def load_state_dict(self, state: dict) -> None:
        self._before = state["before"]  # the file also has rows of this fit

    def after_fit(self) -> None:
        self.__dict__.pop("_stats", None)  # so that a copy of this callback does not copy that one

    def _rows_there(self) -> str:
        try:
            text = self.path.read_text(encoding="utf-8")
            header = next(csv.reader(io.StringIO(text)), [])
        except (UnicodeDecodeError, csv.Error) as e:
            raise ValueError(
                f"CSVLogger(append=True) needs a CSV file in UTF-8; {self.path} is not: {e}. Use another path, or "
                f"append=False to overwrite it"
            ) from e
        if header and header != self._stats.columns:
            raise ValueError(
                f"CSVLogger(append=True) needs a file with the columns {', '.join(self._stats.columns)}; {self.path} "
                f"has {', '.join(header)}: use another path, or append=False to overwrite it"
            )
        return text if text.endswith("\n") or not text else text + "\n"

    def __repr__(self):
        return f"CSVLogger({str(self.path)!r})"


class _Logger(Callback):
    """Hands the numbers of a fit to `_write(numbers, step)` on rank 0: after each epoch the averages, and with `every`
    the loss and rate of each `every`-th training step."""

    _needs_opt = ("param_groups", "lr")

    def __init__(self, every: int | None):
        self.every = None if every is None else whole(f"{type(self).__name__}: every", every)
        self._earlier = 0  # steps of earlier fits
        self._clear()

    def _clear(self) -> None:
        self._open, self._next = False, math.inf
        self._rows: list[tuple[int, torch.Tensor, Any]] = []

    def begin_fit(self) -> None:
        self._clear()
        if self.every is None and find_averages(self.run) is None:
            raise ValueError(
                f"{type(self).__name__} has nothing to log: add an AvgStatsCallback to the run, whose averages it logs "
                f"after each epoch, or pass every=n to log the loss of each n-th step"
            )

    def begin_epoch(self) -> None:
        if not self._open and rank() == 0:
            self._begin()
            self._open, self._next = True, time.monotonic() + _WAIT

    def after_loss(self) -> None:
        run = self.run
        if self.every is not None and self._open and run.in_train and run.n_iter % self.every == 0:
            lr = run.opt.param_groups[-1]["lr"]
            self._rows.append((run.n_iter, run.loss.detach(), lr.clone() if isinstance(lr, torch.Tensor) else lr))
            if time.monotonic() >= self._next:
                self._write_steps()

    def after_epoch(self) -> None:
        if self._open:
            self._write_steps()
            if numbers := _averages(self.run):
                self._write(numbers, self._earlier + self.run.n_iter)

    def after_fit(self) -> None:
        try:
            if self._open:
                self._write_steps()
        finally:
            self._earlier += self.run.n_iter
            if self._open:
                self._end()
            self._clear()

    def _write_steps(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            losses = torch.stack([loss.mean() for _, loss, _ in rows]).tolist()
            for (step, _, lr), loss in zip(rows, losses):
                self._write({"step_loss": loss, "lr": float(lr)}, self._earlier + step)
        self._next = time.monotonic() + _WAIT

    def _begin(self) -> None:
        """Before the first number of a fit."""

    def _write(self, numbers: dict[str, Any], step: int) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """After the last number of a fit."""

    def state_dict(self) -> dict:
        """The number of steps of earlier fits. Steps that have not been handed over yet are; waits for the device."""
        if self._open:
            self._write_steps()
        return {"earlier": self._earlier}

    def load_state_dict(self, state: dict) -> None:
        self._earlier = state["earlier"]

    def __getstate__(self):
        kept = {k: v for k, v in super().__getstate__().items() if not k.startswith("_")}
        return {**kept, "_earlier": 0}  # a copy is for another run

    def __setstate__(self, state):
        self._clear()
        super().__setstate__(state)


def _averages(run: Any) -> dict[str, Any]:
    """The row of `AvgStatsCallback.history` for the epoch that has just ended, without values not measured."""
    stats = find_averages(run)
    row = stats.history[-1] if stats is not None and stats.history else {}
    return {name: value for name, value in row.items() if value is not None} if row.get("epoch") == run.epoch else {}


class Log(_Logger):
    """Call `function(numbers, step)` with the numbers of a fit, for any logging tool.

    `Log(wandb.log)` is all that Weights & Biases needs, and `Log(mlflow.log_metrics)` all that MLflow needs.

    `numbers` is a dictionary of Python numbers. After each epoch it holds the row of `AvgStatsCallback`: `epoch
    train_loss train_<metric> valid_loss valid_<metric> lr time`. With `every` it holds `step_loss` and `lr` (the last
    param group's) of a training step; steps come late, at the end of the epoch or after some seconds, so that none
    waits for the device. `step` is the number of training batches so far: `run.n_iter`, which keeps counting in further
    fits and in a resumed fit. After a kill the resumed fit repeats the steps that came after its checkpoint. In several
    processes rank 0 calls the function.

    Parameters
    ----------
    function : callable
        Takes the dictionary and the step. An error that it raises ends the fit.
    every : int, optional
        Also log loss and rate of each `every`-th training step. Default: averages only.

    Raises
    ------
    TypeError
        If `function` is not callable.
    ValueError
        If `every` is not a whole number of at least 1; in `begin_fit`, if there is nothing to log.

    Examples
    --------
    >>> rows = []
    >>> log = Log(lambda numbers, step: rows.append((step, numbers["valid_accuracy"])))
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(AvgStatsCallback, accuracy)])
    >>> run.add_cbs(log)
    >>> run.logger = lambda line: None
    >>> run.fit(2, learn)
    >>> [step for step, _ in rows]
    [16, 32]
    """

    def __init__(self, function: Callable[[dict[str, Any], int], Any], every: int | None = None):
        if not callable(function):
            raise TypeError(f"Log needs a function of (numbers, step), such as wandb.log; got {function!r}")
        super().__init__(every)
        self.function = function

    def _write(self, numbers: dict[str, Any], step: int) -> None:
        self.function(numbers, step)

    def __repr__(self):
        return f"Log({getattr(self.function, '__name__', None) or repr(self.function)}, every={self.every})"


class JSONLLogger(_Logger):
    """Write the numbers of a fit as JSON lines: a line for each epoch, and for each `every`-th step.

    A line is an object with `step` and the numbers that `Log` describes; `pandas.read_json(path, lines=True)` reads the
    file. NaN and infinities, which JSON does not have, are written as null; what was not measured is left out. Each
    line is written at once and survives a kill. A resumed fit cuts off what was written after its checkpoint, an
    incomplete last line included, and continues. Further fits add their lines. In several processes rank 0 writes.

    Parameters
    ----------
    path : str or Path, default "history.jsonl"
        The file, relative to the working directory at construction (`fastrbn train` puts it into the run's folder).
        Missing folders are created.
    every : int, optional
        Also write loss and rate of each `every`-th training step. Default: averages only.
    append : bool, default False
        Keep the lines in the file. Otherwise the first fit of this logger overwrites it, unless it is a resumed one.

    Raises
    ------
    ValueError
        If `every` is not a whole number of at least 1; in `begin_fit`, if there is nothing to log.
    IsADirectoryError
        In `begin_fit`, if `path` is a folder.

    Examples
    --------
    >>> cbs = [partial(AvgStatsCallback, accuracy), partial(JSONLLogger, "history.jsonl")]
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=cbs)
    >>> run.logger = lambda line: None
    >>> run.fit(2, learn)
    >>> len(Path("history.jsonl").read_text().splitlines())
    2
    """

    def __init__(self, path: str | Path = "history.jsonl", every: int | None = None, append: bool = False):
        super().__init__(every)
        self.path, self.append = Path(path).absolute(), append
        self._keeps = append  # the lines in the file

    def _clear(self) -> None:
        super()._clear()
        self._file: Any = None
        self._size: int | None = None  # of the file when the checkpoint was written

    def begin_fit(self) -> None:
        if self.path.is_dir():
            raise IsADirectoryError(f"JSONLLogger needs a file; got the folder {self.path}: add a name, history.jsonl")
        super().begin_fit()

    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as f:
            there = f.seek(0, os.SEEK_END)
            keep = there if self._size is None else self._size
            if keep > there:
                warnings.warn(
                    f"{self.path} has {there} bytes, and had {keep} when the checkpoint {self.run.resumed_from} was "
                    f"written: lines of earlier steps are missing",
                    stacklevel=2,
                )
            f.truncate(min(keep, there) if self._keeps or self.run.resumed_from else 0)
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)  # a killed process may have left part of a line
        self._file, self._keeps = open(self.path, "a", encoding="utf-8", newline="\n", buffering=1), True

    def _write(self, numbers: dict[str, Any], step: int) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        self._file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")

    def _end(self) -> None:
        self._file.close()

    def state_dict(self) -> dict:
        """The number of steps of earlier fits, and the size of the file."""
        return {**super().state_dict(), "size": None if self._file is None else self._file.tell()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._size = state["size"]

    def __setstate__(self, state):
        super().__setstate__(state)
        self._keeps = self.append

    def __repr__(self):
        return f"JSONLLogger({str(self.path)!r}, every={self.every})"


class TensorBoardLogger(_Logger):
    """Write losses, learning rate and averages for TensorBoard; `tensorboard --logdir <path>` shows them.

    Writes `loss/step` and `lr` (the last param group's) and, if the run has `AvgStatsCallback`, after each epoch
    `loss/train`, `loss/valid` and the same for each metric. The x axis is the number of training steps, which keeps
    counting in further fits. Values stay on the device for some seconds, at most until the epoch ends. A resumed
    fit continues its curves. In several processes rank 0 writes.

    Parameters
    ----------
    path : str or Path, optional
        The folder, one for each run; TensorBoard compares those below one folder. Default: "tensorboard" in the working
        directory (`fastrbn train` uses the run's folder).
    every : int, default 10
        Write loss and rate of each `every`-th training step. Ten, because a curve shows no more points.

    Raises
    ------
    ValueError
        If `every` is not a whole number of at least 1, or `path` is a file.
    ImportError
        In `begin_fit`, if the package tensorboard is missing: `pip install "fastrbn[tensorboard]"`.

    Examples
    --------
    >>> cbs = [partial(AvgStatsCallback, accuracy), partial(TensorBoardLogger, "runs/first")]
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=cbs)
    >>> run.fit(1, learn)   # doctest: +SKIP
    """

    def __init__(self, path: str | Path | None = None, every: int = 10):
        super().__init__(whole("TensorBoardLogger: every", every))
        self.path = None if path is None else Path(path).absolute()
        if self.path is not None and self.path.is_file():
            raise ValueError(f"TensorBoardLogger needs a folder; got the file {self.path}: use another name")

    def _clear(self) -> None:
        super()._clear()
        self._writer: Any = None  # a SummaryWriter, which is made by `_make`
        self._make: Callable[..., Any] | None = None
        self._averages: tuple[int, dict[str, Any]] = (-1, {})

    def begin_fit(self) -> None:
        super().begin_fit()
        if rank() == 0:
            self._make = _summary_writer()

    def _begin(self) -> None:
        # a resumed fit discards what was written after its checkpoint
        begin = self._earlier + self.run.n_iter if self.run.resumed_from else None
        assert self._make is not None
        self._writer = self._make(str(self.path or Path("tensorboard").absolute()), purge_step=begin)
        if self._averages[0] == begin:  # an epoch has the number of the next step: it is discarded too
            self._write(self._averages[1], self._averages[0])

    def _write(self, numbers: dict[str, Any], step: int) -> None:
        for name, value in numbers.items():
            which, _, what = name.partition("_")
            if which in ("train", "valid", "step"):
                self._writer.add_scalar(f"{what}/{which}", value, step)
            elif name == "lr" and "epoch" not in numbers:
                self._writer.add_scalar(name, value, step)
        if "epoch" in numbers:
            self._averages = (step, numbers)
            self._writer.flush()

    def _end(self) -> None:
        self._writer.close()

    def state_dict(self) -> dict:
        """The number of steps of earlier fits, and the last averages with their step."""
        return {**super().state_dict(), "last": self._averages}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._averages = state["last"]

    def __repr__(self):
        return f"TensorBoardLogger({'' if self.path is None else repr(str(self.path))})"


def _summary_writer() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError(
            f"TensorBoardLogger needs the package tensorboard, which could not be imported ({e}): pip install "
            f'"fastrbn[tensorboard]", or use CSVLogger'
        ) from e
    return SummaryWriter
