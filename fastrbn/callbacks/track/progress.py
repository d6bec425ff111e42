"""A progress bar in terminals and notebooks, plain lines elsewhere."""

from __future__ import annotations

import collections
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastrbn.learn.callback import Callback
from fastrbn.learn.ranks import rank

_REDRAW = 0.5  # seconds between redraws; each reads the loss, which waits for the device
_SPEAK = 10.0  # seconds between lines if no bar can be drawn


class ProgressCallback(Callback):
    """Show progress and loss of the fit, and print the history as a table.

    In a terminal or notebook, fastprogress draws a bar for each pass. In a pipe, a file or a CI log, and without
    fastprogress, there are plain lines: the table, and progress every 10 seconds at most. The loss is the mean of the
    last 64 steps at most. Epochs are counted from 0, as `run.epoch` does.

    During the fit `run.logger` takes lists of strings as rows of the table, and strings as lines. The runner restores
    the old logger afterwards.

    Parameters
    ----------
    plot : bool, default False
        In a notebook, draw a curve of the training and validation losses that grows with the fit.

    Examples
    --------
    >>> cbs = [partial(AvgStatsCallback, accuracy), ProgressCallback]
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=cbs)
    >>> run.fit(1, learn)   # doctest: +ELLIPSIS
        epoch  train_loss  train_accuracy  valid_loss  valid_accuracy       time
            0   ...

    References
    ----------
    fast.ai course, part 2 (2019), notebook 09c.
    """

    def __init__(self, plot: bool = False):
        self.plot = plot
        self._next = 0.0  # when to draw again, on the monotonic clock
        self._display: Any = None  # a _Display during a fit

    def begin_fit(self) -> None:
        self._losses: collections.deque[torch.Tensor] = collections.deque(maxlen=64)
        kind = _Display if rank() != 0 else _Bars if _can_draw() else _Lines
        self._display = kind(self.run.epochs)
        self.run.logger = self._display.log

    def begin_epoch(self) -> None:
        self._begin_pass("train")

    def begin_validate(self) -> None:
        self._end_pass()
        self._begin_pass("valid")

    def after_loss(self) -> None:
        self._losses.append(self.run.loss.detach())

    def after_batch(self) -> None:
        if time.monotonic() >= self._next:
            run = self.run
            loss = self._mean_loss()
            self._display.draw(run.iter + 1, loss)
            self._draw_curve(loss)
            self._next = time.monotonic() + self._display.wait

    def after_epoch(self) -> None:
        self._end_pass()

    def after_fit(self) -> None:
        display, self._display = self._display, None
        if display is not None:  # None if begin_fit failed before it was made
            self._losses.clear()
            display.close()

    def _begin_pass(self, what: str) -> None:
        run = self.run
        self._what, self._display.epochs = what, run.epochs  # which callbacks may have changed in begin_fit
        self._display.begin_pass(what, run.epoch, run.iters)
        self._next = time.monotonic() + self._display.wait

    def _end_pass(self) -> None:
        if self.plot:
            self._draw_curve(self._mean_loss())
        self._losses.clear()
        self._display.end_pass()

    def _draw_curve(self, loss: float | None) -> None:
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

    if not in_notebook() and (sys.stdout is None or not sys.stdout.isatty()):
        return False
    try:
        import fastprogress.fastprogress  # noqa: F401 - imported here: it looks for a notebook, and may load matplotlib
    except ImportError:  # not installed, or without what it needs itself
        return False
    return True


def _pass_name(what: str, epoch: int, epochs: float) -> str:
    return f"epoch {epoch} {'' if epochs == math.inf else f'({epoch + 1} of {epochs}) '}{what}"


class _Log:
    """The logger during a fit: takes a string, or a list of strings for a row of the table."""

    table = True

    def __init__(self, write: Callable[[Any], None]):
        self._write = write

    def __call__(self, line: Any) -> None:
        self._write(line if isinstance(line, (list, tuple)) else str(line))


class _Display:
    """Shows nothing: all ranks but rank 0 use it."""

    wait = math.inf  # seconds between two calls of `draw`

    def __init__(self, epochs: float):
        self.epochs, self.log = epochs, _Log(self._write)

    def _write(self, line: str | Sequence[str]) -> None: ...

    def begin_pass(self, what: str, epoch: int, total: int | None) -> None: ...

    def draw(self, done: int, loss: float | None) -> None: ...

    def draw_curve(self, what: str, step: int, loss: float) -> None: ...

    def end_pass(self) -> None: ...

    def close(self) -> None: ...


class _Lines(_Display):
    """Plain text, a line at a time: no carriage returns, no escape codes."""

    def __init__(self, epochs: float):
        super().__init__(epochs)
        self.wait = _SPEAK
        self._widths: list[int] = []

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


class _Bars(_Display):
    """fastprogress, driven step by step, since its bars would rather do the iterating themselves."""

    def __init__(self, epochs: float):
        from fastprogress.fastprogress import master_bar, progress_bar

        super().__init__(epochs)
        self.wait = _REDRAW
        self._make, self._bar = progress_bar, None
        self._curves: dict[str, tuple[list, list]] = {"train": ([], []), "valid": ([], [])}
        self._master = master_bar(range(int(epochs) if 0 < epochs < math.inf else 1))  # an empty range makes it warn
        self._master.update(0)

    def _write(self, line):
        self._master.write(line, table=not isinstance(line, str))

    def begin_pass(self, what, epoch, total):
        self.end_pass()
        if 0 < epoch < self.epochs < math.inf:
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
