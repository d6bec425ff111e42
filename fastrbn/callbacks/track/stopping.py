"""Ending a fit that does not improve any more."""

from __future__ import annotations

import math

from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelTrainException
from fastrbn.util import whole

from .monitor import Monitor


class EarlyStopping(Callback):
    """End the fit when a monitored average has not improved for some epochs.

    Afterwards `run.stop_reason` says so in a sentence. `.best` is the best value (None if there is none), `.best_epoch`
    its epoch, from 0, and `.waited` the number of epochs since. NaN is no improvement; epochs without a value do not
    count. The model keeps the last weights; to keep those of the best epoch, add `SaveBest`.

    Parameters
    ----------
    monitor : str, default "valid_loss"
        Name of an average of `AvgStatsCallback`, which the run needs. A metric's name alone means that of validation.
    patience : int, default 3
        The number of epochs in a row without improvement that ends the fit, 1 or more.
    min_delta : float, default 0.0
        What an improvement must exceed, 0 or more.
    mode : {"min", "max"}, optional
        The better direction. Needed unless the name ends in `loss`, `accuracy`, `f1` or `iou`.

    Raises
    ------
    ValueError
        If an argument is out of range; in `begin_fit`, if the average will not be measured.

    Examples
    --------
    >>> stopping = partial(EarlyStopping, "train_loss", patience=1, min_delta=10.0)
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[AvgStatsCallback, stopping])
    >>> run.logger = lambda line: None
    >>> run.fit(5, learn)
    >>> run.stop_reason   # doctest: +ELLIPSIS
    'train_loss has not fallen by more than 10 for 1 epoch (best: ... in epoch 0)'
    """

    def __init__(self, monitor: str = "valid_loss", patience: int = 3, min_delta: float = 0.0, mode: str | None = None):
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or not 0 <= min_delta < math.inf:
            raise ValueError(f"EarlyStopping: min_delta must be a finite number, 0 or more; got {min_delta!r}")
        self.patience, self.min_delta = whole("EarlyStopping: patience", patience), min_delta
        self.monitor = Monitor(monitor, mode, "EarlyStopping")
        self._clear()

    def _clear(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self._counted: int | None = None
        self.waited = 0

    def begin_fit(self) -> None:
        self._clear()
        self.monitor.begin(self.run)

    def begin_epoch(self) -> None:
        self._end_if_due()  # for a fit resumed from the checkpoint that it ended with

    def after_epoch(self) -> None:
        self._count()
        self._end_if_due()

    def _count(self) -> None:
        run = self.run
        value = self.monitor.value(run)
        if value is None or self._counted == run.epoch:
            return
        self._counted = run.epoch
        sign = 1 if self.monitor.mode == "min" else -1
        if self.monitor.better(value, None if self.best is None else self.best - sign * self.min_delta):
            self.best, self.best_epoch, self.waited = value, run.epoch, 0
        else:
            self.waited += 1

    def after_fit(self) -> None:
        if self.run.stop_reason is None:
            self.run.stop_reason = self._reason()  # resumed after the last epoch: no other begins

    def _end_if_due(self) -> None:
        if (reason := self._reason()) is not None:
            raise CancelTrainException(reason)

    def _reason(self) -> str | None:
        if self.waited < self.patience:
            return None
        verb = "fallen" if self.monitor.mode == "min" else "risen"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        best = "it was NaN throughout" if self.best is None else f"best: {self.best:.6g} in epoch {self.best_epoch}"
        epochs = f"{self.waited} epoch{'' if self.waited == 1 else 's'}"
        return f"{self.monitor.name} has not {verb}{by} for {epochs} ({best})"

    def state_dict(self) -> dict:
        if "run" in vars(self) and self.run._fitting:
            self._count()  # Checkpoint saves an epoch before this callback's turn
        kept = {"best": self.best, "best_epoch": self.best_epoch, "waited": self.waited}
        return {**kept, "counted": self._counted}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_epoch, self.waited = state["best"], state["best_epoch"], state["waited"]
        self._counted = state["counted"]

    def __repr__(self):
        return f"EarlyStopping({self.monitor.name!r}, patience={self.patience}, min_delta={self.min_delta})"
