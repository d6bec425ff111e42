"""History in files: CSV, and what TensorBoard reads."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch

from fastrbn.learn.callback import Callback
from fastrbn.learn.ranks import rank
from fastrbn.util import write_whole


class CSVLogger(Callback):
    """Writes the history of `AvgStatsCallback` to a CSV file: a header, then a row for each epoch, the first being 0.

    - `path`: the file, relative to where the program is when this is made; folders that are missing are made.
    - `append`: keep the rows that are in the file (their columns must be the same); else a fit writes it anew.

    The file is whole on disk after each epoch, whatever happens after. An empty cell: not measured.
    """

    def __init__(self, path="history.csv", append=False):
        self.path, self.append = Path(path).absolute(), append

    def begin_fit(self):
        self._stats = _averages(self.run)
        if self._stats is None:
            raise ValueError(
                "CSVLogger writes what AvgStatsCallback measures, and the run has none: give both, as in "
                "cbs=[partial(AvgStatsCallback, accuracy), CSVLogger]"
            )
        if self.path.is_dir():
            raise IsADirectoryError(f"CSVLogger needs a file; got the folder {self.path}: add a name, history.csv")
        self._before = self._rows_there() if self.append and self.path.exists() else ""

    def after_epoch(self):
        if rank() != 0:
            return
        text = io.StringIO(newline="")
        out = csv.DictWriter(text, self._stats.columns, lineterminator="\n")
        if not self._before:
            out.writeheader()
        out.writerows(self._stats.history)
        write_whole(self.path, self._before + text.getvalue())

    def state_dict(self):
        """The rows of earlier fits, which `append` keeps; those of this one are AvgStatsCallback's."""
        return {"before": self._before}

    def load_state_dict(self, state):
        self._before = state["before"]  # by now the file has rows of this very fit as well

    def after_fit(self):
        self.__dict__.pop("_stats", None)  # a copy of this callback should not copy that one

    def _rows_there(self) -> str:
        try:
            text = self.path.read_text(encoding="utf-8")
            header = next(csv.reader(io.StringIO(text)), [])
        except (UnicodeDecodeError, csv.Error) as e:
            raise ValueError(
                f"CSVLogger(append=True) needs a CSV file in UTF-8; {self.path} is not: {e}. Take another path, or "
                f"append=False to write it anew"
            ) from e
        if header and header != self._stats.columns:
            raise ValueError(
                f"CSVLogger(append=True) needs a file with the columns {', '.join(self._stats.columns)}; {self.path} "
                f"has {', '.join(header)}: take another path, or append=False to write it anew"
            )
        return text if text.endswith("\n") or not text else text + "\n"

    def __repr__(self):
        return f"CSVLogger({str(self.path)!r})"


class TensorBoardLogger(Callback):
    """Writes losses, learning rate and averages for TensorBoard: `tensorboard --logdir <path>` shows them.

    - `path`: the folder, one a run; TensorBoard compares those below one folder. None: "tensorboard" in the current one
      (`fastrbn train` puts it into the run's).
    - `every`: loss and rate of each `every`-th training step; 10, since a curve has no more points to show.

    Written are `loss/step` and `lr` (the last param group's), and after each epoch, where the run has
    `AvgStatsCallback`, `loss/train`, `loss/valid` and so on for each metric; all over the number of training steps.
    Values stay on the device until the epoch ends. A fit that is resumed goes on in the same curves. Of many processes
    rank 0 writes.

    ImportError, before training, where the package tensorboard is missing: `pip install "fastrbn[tensorboard]"`.
    """

    _needs_opt = ("param_groups", "lr")

    def __init__(self, path=None, every=10):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of steps, 1 or more; got {every!r}")
        self.path, self.every = None if path is None else Path(path).absolute(), every
        if self.path is not None and self.path.is_file():
            raise ValueError(f"TensorBoardLogger needs a folder; got the file {self.path}: take another name")
        self._clear()

    def _clear(self):
        self._writer, self._make, self._rows = None, None, []

    def begin_fit(self):
        self._clear()
        if rank() == 0:
            self._make = _summary_writer()

    def begin_epoch(self):
        if self._make is not None and self._writer is None:
            # of a fit that is resumed, what was written after its checkpoint no longer counts
            begin, path = self.run.n_iter, self.path or Path("tensorboard").absolute()
            self._writer = self._make(str(path), purge_step=begin if self.run.resumed_from else None)

    def after_loss(self):
        run = self.run
        if self._writer is not None and run.in_train and run.n_iter % self.every == 0:
            lr = run.opt.param_groups[-1]["lr"]
            self._rows.append((run.n_iter, run.loss.detach(), lr.clone() if isinstance(lr, torch.Tensor) else lr))

    def after_epoch(self):
        if self._writer is None:
            return
        self._write_steps()
        stats = _averages(self.run)
        for name, value in (stats.history[-1] if stats is not None and stats.history else {}).items():
            which, _, what = name.partition("_")
            if which in ("train", "valid") and value is not None:
                self._writer.add_scalar(f"{what}/{which}", value, self.run.n_iter)
        self._writer.flush()

    def after_fit(self):
        writer = self._writer
        try:
            if writer is not None:
                self._write_steps()
        finally:
            self._clear()
            if writer is not None:
                writer.close()

    def _write_steps(self):
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


def _averages(run):
    """The callback of `run` that keeps a history of averages, None when there is none."""
    return next((cb for cb in run.cbs if hasattr(type(cb), "columns") and "history" in vars(cb)), None)


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError(
            f"TensorBoardLogger needs the package tensorboard, which cannot be imported ({e}): pip install "
            f'"fastrbn[tensorboard]", or use CSVLogger'
        ) from e
    return SummaryWriter
