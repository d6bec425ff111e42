"""A progress bar in terminals and notebooks, plain lines anywhere else."""

from __future__ import annotations

import collections
import math
import sys
import time

import torch

from fastrbn.learn.callback import Callback
from fastrbn.learn.ranks import rank

_REDRAW = 0.5  # seconds between looks at the loss, each of which waits for the device
_SPEAK = 10.0  # seconds between lines where a bar cannot be drawn


class ProgressCallback(Callback):
    """Shows how far the fit is, with the loss (the mean of the last 64 steps at most), and makes history a table.

    - `plot`: in a notebook, a curve of the training and validation losses that grows with the fit.

    In a terminal or notebook there is a bar for each pass, drawn by fastprogress. In a pipe, a file or a CI log there
    are plain lines: the table, and one on progress every 10 seconds at most. `run.logger` takes lists of strings as rows
    of the table, and strings as lines; the runner puts the old logger back after the fit. Epochs are counted from 0, as
    `run.epoch` and the table count them.

    Source: fast.ai course, part 2 (2019), notebook 09c.
    """

    def __init__(self, plot=False):
        self.plot = plot
        self._display = None

    def begin_fit(self):
        self._losses = collections.deque(maxlen=64)
        kind = _Nothing if rank() != 0 else _Bars if _can_draw() else _Lines
        self._display = kind(self.run.epochs)
        self.run.logger = self._display.log

    def begin_epoch(self):
        self._begin_pass("train")

    def begin_validate(self):
        self._end_pass()
        self._begin_pass("valid")

    def after_loss(self):
        self._losses.append(self.run.loss.detach())

    def after_batch(self):
        if time.monotonic() >= self._next:
            run = self.run
            loss = self._mean_loss()
            self._display.draw(run.iter + 1, loss)
            self._draw_curve(loss)
            self._next = time.monotonic() + self._display.wait

    def after_epoch(self):
        self._end_pass()

    def after_fit(self):
        display, self._display = self._display, None
        if display is not None:  # else begin_fit failed before it was made
            self._losses.clear()
            display.close()

    def _begin_pass(self, what):
        run = self.run
        self._what = what
        self._display.begin_pass(what, run.epoch, run.iters)
        self._next = time.monotonic() + self._display.wait

    def _end_pass(self):
        if self.plot:
            self._draw_curve(self._mean_loss())
        self._losses.clear()
        self._display.end_pass()

    def _draw_curve(self, loss):
        if self.plot and loss is not None:
            self._display.draw_curve(self._what, self.run.n_iter, loss)

    def _mean_loss(self) -> float | None:
        if not self._losses:
            return None
        return torch.stack([loss.reshape(()) for loss in self._losses]).mean().item()

    def __getstate__(self):
        return {"plot": self.plot, "_display": None}  # a copy shows its own fit

    def __repr__(self):
        return f"ProgressCallback(plot={self.plot})"


def _can_draw() -> bool:
    from fastrbn.plots import in_notebook

    return in_notebook() or (sys.stdout is not None and sys.stdout.isatty())


def _pass_name(what, epoch, epochs) -> str:
    return f"epoch {epoch} ({epoch + 1} of {epochs}) {what}"


class _Lines:
    """Plain text, a line at a time: no carriage returns, no escape codes."""

    def __init__(self, epochs):
        self.wait, self.epochs, self._widths = _SPEAK, epochs, []
        self.log = _Log(self._write)

    def _write(self, line):
        if not isinstance(line, str):
            if len(line) != len(self._widths):  # the header
                self._widths = [max(len(cell), 9) for cell in line]
            line = "  ".join(cell.rjust(width) for cell, width in zip(line, self._widths))
        print(line, flush=True)

    def begin_pass(self, what, epoch, total):
        self._pass, self._total, self._start = _pass_name(what, epoch, self.epochs), total, time.monotonic()

    def draw(self, done, loss):
        share = f" of {self._total} ({100 * done // self._total} %)" if self._total else ""
        loss = "" if loss is None else f", loss {loss:.4g}"
        print(f"{self._pass}: {done}{share} batches in {time.monotonic() - self._start:.0f} s{loss}", flush=True)

    def draw_curve(self, what, step, loss):
        """There is nowhere to draw it."""

    def end_pass(self):
        """A line that is written stays."""

    def close(self):
        """Nothing is open."""


class _Nothing:
    """Of many processes rank 0 speaks for all."""

    def __init__(self, epochs):
        self.wait, self.log = math.inf, _Log(lambda line: None)

    def begin_pass(self, what, epoch, total):
        """Silence."""

    def draw(self, done, loss):
        """Silence."""

    def draw_curve(self, what, step, loss):
        """Silence."""

    def end_pass(self):
        """Silence."""

    def close(self):
        """Silence."""


class _Bars:
    """fastprogress, driven step by step: its bars want to do the iterating themselves."""

    def __init__(self, epochs):
        # imported here: it looks for a notebook when it is, and where it finds one it may import matplotlib
        from fastprogress.fastprogress import master_bar, progress_bar

        self.wait, self.epochs = _REDRAW, epochs
        self._make, self._bar, self._curves = progress_bar, None, {"train": ([], []), "valid": ([], [])}
        self._master = master_bar(range(max(epochs, 1)))  # it warns when there is nothing to count
        self._master.update(0)
        self.log = _Log(self._write)

    def _write(self, line):
        self._master.write(line, table=not isinstance(line, str))

    def begin_pass(self, what, epoch, total):
        self.end_pass()
        if 0 < epoch < self.epochs:
            self._master.update(epoch)
        if total != 0:
            self._bar = self._make(range(0), total="noinfer" if total is None else total, parent=self._master)
            self._bar.prefix = f"{_pass_name(what, epoch, self.epochs)}:"
            self._bar.update(0)

    def draw(self, done, loss):
        if self._bar is not None and (self._bar.total is None or done < self._bar.total):
            self._bar.comment = "" if loss is None else f"loss {loss:.4f}"
            self._bar.update(done)

    def draw_curve(self, what, step, loss):
        xs, ys = self._curves[what]
        xs.append(step)
        ys.append(loss)
        self._master.update_graph(list(self._curves.values()))

    def end_pass(self):
        if self._bar is not None:
            self._bar.on_iter_end()
            self._bar = None

    def close(self):
        self.end_pass()
        self._master.on_iter_end()


class _Log:
    """What `run.logger` becomes: called with a string, or with a list of strings for a row of the table."""

    table = True

    def __init__(self, write):
        self._write = write

    def __call__(self, line):
        self._write(line if isinstance(line, (list, tuple)) else str(line))
