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
    """Save the weights of the best epoch in one file: `model.load_state_dict(torch.load(path, weights_only=True))`.

    `.best` is the best value so far (None if there is none) and `.best_epoch` its epoch in its fit, from 0. Further
    fits of the same model continue the search while the file exists: only a better epoch replaces it. With another
    model, and in another process that does not resume, the search starts again. NaN is never the best.

    Under `EMA` the averages are saved, with and without validation. For a model wrapped by `torch.compile` the names
    are those of the model inside. To resume training, use `Checkpoint`.

    Parameters
    ----------
    path : str or Path, default "best.pt"
        The file, relative to the working directory at construction. It is written whole; missing folders are created.
        An existing file stays until the first epoch ends.
    monitor : str, default "valid_loss"
        Name of an average of `AvgStatsCallback`, which the run needs. A metric's name alone means that of validation.
    mode : {"min", "max"}, optional
        The better direction. Needed unless the name ends in `loss`, `accuracy`, `f1` or `iou`.

    Raises
    ------
    ValueError
        If `mode` is missing or wrong; in `begin_fit`, if the average will not be measured.
    OSError
        If `path` is a folder, or the file cannot be written, which ends the fit; the previous file stays.

    Examples
    --------
    >>> cbs = [partial(AvgStatsCallback, accuracy), partial(SaveBest, "best.pt", monitor="accuracy")]
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=cbs)
    >>> run.logger = lambda line: None
    >>> run.fit(2, learn)
    >>> learn.model.load_state_dict(torch.load("best.pt", weights_only=True))
    <All keys matched successfully>
    """

    def __init__(self, path: str | Path = "best.pt", monitor: str = "valid_loss", mode: str | None = None):
        self.path, self.monitor = Path(path).absolute(), Monitor(monitor, mode, "SaveBest")
        self.best: float | None = None
        self.best_epoch: int | None = None
        self._model: weakref.ref | None = None

    def begin_fit(self) -> None:
        if self.path.is_dir():
            raise IsADirectoryError(f"SaveBest needs a file; got the folder {self.path}: add a name, best.pt")
        model = self.run.learn.model
        if self._model is None or self._model() is not model or not self.path.exists():
            self.best, self.best_epoch, self._model = None, None, weakref.ref(model)
        self.monitor.begin(self.run)

    def after_epoch(self) -> None:
        value = self.monitor.value(self.run)
        if self.monitor.better(value, self.best):
            if rank() == 0:
                averaged = self.run.averaged  # set by EMA
                weights = plain_state_dict(self.run.learn.model) if averaged is None else averaged()
                file = io.BytesIO()
                torch.save({n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in weights.items()}, file)
                write_whole(self.path, file.getvalue())
            self.best, self.best_epoch = value, self.run.epoch

    def state_dict(self) -> dict:
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_epoch = state["best"], state["best_epoch"]

    def __getstate__(self):
        return {**super().__getstate__(), "_model": None}  # a copy is for another run

    def __repr__(self):
        return f"SaveBest({str(self.path)!r}, {self.monitor.name!r}, {self.monitor.mode!r})"
