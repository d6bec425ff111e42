"""An end when nothing gets better."""

from __future__ import annotations

import math

from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelTrainException

from .monitor import Monitor


class EarlyStopping(Callback):
    """Ends the fit when a monitored average has not got better for some epochs.

    - `monitor`: the name of an average such as "valid_loss" (default) or of a metric (that of validation); the run
      needs `AvgStatsCallback`.
    - `patience`: so many epochs in a row without a gain end the fit, 1 or more (default 3).
    - `min_delta`: what a gain must exceed, 0 or more (default 0.0).
    - `mode`: "min" or "max", whether it should fall or rise; needed unless its name ends in `loss` or `accuracy`.

    Afterwards `run.stop_reason` says so in a sentence; `.best` is the best value (None before there is one),
    `.best_epoch` its epoch, from 0, and `.waited` the epochs since. NaN is no gain; an epoch in which nothing was
    measured does not count. The model has the last weights: for those of the best epoch, add `SaveBest`.
    """

    def __init__(self, monitor="valid_loss", patience=3, min_delta=0.0, mode=None):
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"EarlyStopping: patience is a whole number of epochs, 1 or more; got {patience!r}")
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or not 0 <= min_delta < math.inf:
            raise ValueError(f"EarlyStopping: min_delta is a finite number, 0 or more; got {min_delta!r}")
        self.monitor, self.patience, self.min_delta = Monitor(monitor, mode, "EarlyStopping"), patience, min_delta
        self._clear()

    def _clear(self):
        self.best = self.best_epoch = self._counted = None
        self.waited = 0

    def begin_fit(self):
        self._clear()
        self.monitor.begin(self.run)

    def begin_epoch(self):
        self._end_if_due()  # a fit resumed from the checkpoint that it ended with

    def after_epoch(self):
        self._count()
        self._end_if_due()

    def _count(self):
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

    def _end_if_due(self):
        if self.waited < self.patience:
            return
        verb = "fallen" if self.monitor.mode == "min" else "risen"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        best = "it was NaN throughout" if self.best is None else f"best: {self.best:.6g} in epoch {self.best_epoch}"
        epochs = f"{self.waited} epoch{'' if self.waited == 1 else 's'}"
        raise CancelTrainException(f"{self.monitor.name} has not {verb}{by} for {epochs} ({best})")

    def state_dict(self):
        if "run" in vars(self) and self.run._fitting:
            self._count()  # the checkpoint of an epoch's end is written before this callback's turn
        kept = {"best": self.best, "best_epoch": self.best_epoch, "waited": self.waited}
        return {**kept, "counted": self._counted}

    def load_state_dict(self, state):
        self.best, self.best_epoch, self.waited = state["best"], state["best_epoch"], state["waited"]
        self._counted = state["counted"]

    def __repr__(self):
        return f"EarlyStopping({self.monitor.name!r}, patience={self.patience}, min_delta={self.min_delta})"
