"""The weights of the best epoch."""

from __future__ import annotations

import io
import weakref
from pathlib import Path

import torch

from fastrbn.learn.callback import Callback
from fastrbn.learn.ranks import rank
from fastrbn.learn.snapshot import plain_state_dict
from fastrbn.util import write_whole

from .monitor import Monitor


class SaveBest(Callback):
    """Keeps the weights of the best epoch in one file: `model.load_state_dict(torch.load(path, weights_only=True))`.

    - `path`: the file, written whole; folders that are missing are made. An old one stays until the first epoch ends. A
      relative path is one from where the program is when this is made.
    - `monitor`: the name of an average such as "valid_loss" (default) or of a metric (that of validation).
    - `mode`: "min" or "max", whether it should fall or rise; needed unless its name ends in `loss` or `accuracy`.

    `.best` is the best value so far, None before there is one, `.best_epoch` the number of its epoch in its fit, from 0.
    Further fits of the same model count on: only a better epoch replaces the file, as long as it is there. With another
    model, and in another process that does not resume, the search begins anew.

    Under `EMA` the averages are saved, with validation and without. Of a model that `torch.compile` has wrapped, the
    names are those of the model inside: load them into that one. An epoch of NaN is never the best. A file that cannot
    be written (OSError) ends the fit; the one before stays. To go on with training, use `Checkpoint`.
    """

    _order = 20  # after the averages of the epoch are in the history

    def __init__(self, path="best.pt", monitor="valid_loss", mode=None):
        self.path, self.monitor = Path(path).absolute(), Monitor(monitor, mode, "SaveBest")
        self.best = self.best_epoch = self._model = None

    def begin_fit(self):
        if self.path.is_dir():
            raise IsADirectoryError(f"SaveBest needs a file; got the folder {self.path}: add a name, best.pt")
        model = self.run.learn.model
        if self._model is None or self._model() is not model or not self.path.exists():
            self.best, self.best_epoch, self._model = None, None, weakref.ref(model)
        self.monitor.begin(self.run)

    def after_epoch(self):
        value = self.monitor.value(self.run)
        if self.monitor.better(value, self.best):
            if rank() == 0:
                averaged = vars(self.run).get("averaged")  # EMA's
                weights = plain_state_dict(self.run.learn.model) if averaged is None else averaged()
                file = io.BytesIO()
                torch.save({n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in weights.items()}, file)
                write_whole(self.path, file.getvalue())
            self.best, self.best_epoch = value, self.run.epoch

    def state_dict(self):
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state):
        self.best, self.best_epoch = state["best"], state["best_epoch"]

    def __getstate__(self):
        return {**super().__getstate__(), "_model": None}  # a copy is for another run

    def __repr__(self):
        return f"SaveBest({str(self.path)!r}, {self.monitor.name!r}, {self.monitor.mode!r})"
