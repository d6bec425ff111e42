"""The average that a callback watches, and whether it should fall or rise."""

from __future__ import annotations

import math
import re
from typing import Any

from fastrbn.util import one_of


class Monitor:
    """Reads one column of `AvgStatsCallback.history` and compares its values.

    Parameters
    ----------
    name : str
        A column such as `valid_loss` or `train_accuracy`. A metric's name alone means that of validation.
    mode : {"min", "max"} or None
        The better direction. None: "min" for names whose last word is `loss`, "max" for `accuracy`, `f1` and `iou`;
        other names need it.
    owner : str
        The callback, for error messages.
    """

    def __init__(self, name: str, mode: str | None, owner: str):
        if not isinstance(name, str):
            raise TypeError(f"{owner}: monitor must be the name of an average such as 'valid_loss'; got {name!r}")
        last = re.sub(r"(_\d+|(?<!f)\d+)$", "", name).rpartition("_")[2]  # whole words, since inaccuracy should fall
        known = {"loss": "min", "accuracy": "max", "f1": "max", "iou": "max"}.get(last)
        mode = known if mode is None else mode
        if mode not in ("min", "max"):
            raise ValueError(
                f"{owner}: mode must say whether {name!r} should fall ('min') or rise ('max'); got {mode!r}: pass one "
                f"of the two"
            )
        self.name, self.mode, self.owner = name, mode, owner

    def begin(self, run: Any) -> None:
        """Find the column in `run`. ValueError, with the reason, if it will not be measured."""
        stats = find_averages(run)
        if stats is None:
            raise ValueError(
                f"{self.owner} needs an AvgStatsCallback in the run, which measures {self.name!r}: pass both, as in "
                f"cbs=[partial(AvgStatsCallback, accuracy), …]"
            )
        columns = [c for c in stats.columns if c not in ("epoch", "lr", "time")]
        self._column = self.name if self.name in columns else f"valid_{self.name}"
        if self._column not in columns:
            one_of(f"{self.owner}: monitor", self.name, columns)
        if self._column.startswith("valid_") and run.data.valid_dl is None:
            raise ValueError(
                f"{self.owner}: {self._column} is measured in validation, but data.valid_dl is None: use "
                f"monitor='train_loss', or pass validation data"
            )
        self._stats = stats

    def value(self, run: Any) -> float | None:
        """The value in the epoch that has just ended; None if it was not measured.

        ValueError if the metric has computed several numbers."""
        history = self._stats.history
        value = history[-1][self._column] if history and history[-1]["epoch"] == run.epoch else None
        if value is None and self._column in getattr(self._stats, "several", ()):
            raise ValueError(
                f"{self.owner} compares one number an epoch, and the metric {self._column} computes several: choose "
                f"another, or a metric that averages them"
            )
        return value

    def better(self, value: float | None, best: float | None) -> bool:
        """True if `value` beats `best` (None: no value yet). NaN never does, and neither does an equal value."""
        if value is None or math.isnan(value):
            return False
        return best is None or (value < best if self.mode == "min" else value > best)

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "_stats"}  # that is another callback


def find_averages(run: Any) -> Any:
    """The callback of `run` that keeps a history of averages, or None."""
    return next((cb for cb in run.cbs if hasattr(type(cb), "columns") and "history" in vars(cb)), None)
