"""Logs in files: CSV and TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastrbn.learn.callback import Callback
from fastrbn.learn.ranks import rank
from fastrbn.util import whole, write_whole

from .monitor import find_averages


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


class TensorBoardLogger(Callback):
    """Write losses, learning rate and averages for TensorBoard; `tensorboard --logdir <path>` shows them.

    Writes `loss/step` and `lr` (the last param group's) and, if the run has `AvgStatsCallback`, after each epoch
    `loss/train`, `loss/valid` and the same for each metric. The x axis is the number of training steps. Values stay on
    the device until the epoch ends. A resumed fit continues its curves. In a distributed run rank 0 writes.

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

    _needs_opt = ("param_groups", "lr")

    def __init__(self, path: str | Path | None = None, every: int = 10):
        self.path = None if path is None else Path(path).absolute()
        self.every = whole("TensorBoardLogger: every", every)
        if self.path is not None and self.path.is_file():
            raise ValueError(f"TensorBoardLogger needs a folder; got the file {self.path}: use another name")
        self._clear()

    def _clear(self) -> None:
        self._writer: Any = None  # a SummaryWriter, which is made by `_make`
        self._make: Callable[..., Any] | None = None
        self._rows: list[tuple[int, torch.Tensor, Any]] = []

    def begin_fit(self) -> None:
        self._clear()
        if rank() == 0:
            self._make = _summary_writer()

    def begin_epoch(self) -> None:
        if self._make is not None and self._writer is None:
            # a resumed fit discards what was written after its checkpoint
            begin, path = self.run.n_iter, self.path or Path("tensorboard").absolute()
            self._writer = self._make(str(path), purge_step=begin if self.run.resumed_from else None)

    def after_loss(self) -> None:
        run = self.run
        if self._writer is not None and run.in_train and run.n_iter % self.every == 0:
            lr = run.opt.param_groups[-1]["lr"]
            self._rows.append((run.n_iter, run.loss.detach(), lr.clone() if isinstance(lr, torch.Tensor) else lr))

    def after_epoch(self) -> None:
        if self._writer is None:
            return
        self._write_steps()
        stats = find_averages(self.run)
        for name, value in (stats.history[-1] if stats is not None and stats.history else {}).items():
            which, _, what = name.partition("_")
            if which in ("train", "valid") and value is not None:
                self._writer.add_scalar(f"{what}/{which}", value, self.run.n_iter)
        self._writer.flush()

    def after_fit(self) -> None:
        writer = self._writer
        try:
            if writer is not None:
                self._write_steps()
        finally:
            self._clear()
            if writer is not None:
                writer.close()

    def _write_steps(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            losses = torch.stack([loss.reshape(()) for _, loss, _ in rows]).tolist()
            for (step, _, lr), loss in zip(rows, losses):
                self._writer.add_scalar("loss/step", loss, step)
                self._writer.add_scalar("lr", float(lr), step)

    def __getstate__(self):
        return {"path": self.path, "every": self.every}

    def __setstate__(self, state):
        self._clear()
        super().__setstate__(state)

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
