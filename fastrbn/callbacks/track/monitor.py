"""What "best" means: one of the averages of an epoch, and whether it should fall or rise."""

from __future__ import annotations

import math

from fastrbn.util import suggestion

MODES = ("min", "max")


class Monitor:
    """Reads one column of `AvgStatsCallback.history` and compares.

    - `name`: a column such as `valid_loss` or `train_accuracy`; a metric's name alone means that of validation.
    - `mode`: "min" or "max"; None: "min" for names whose last word is `loss`, "max" for `accuracy`, else it must be given.
    - `owner`: whose setting it is, for the messages.
    """

    def __init__(self, name, mode, owner):
        if not isinstance(name, str):
            raise TypeError(f"{owner}: monitor is the name of an average such as 'valid_loss'; got {name!r}")
        last = name.rstrip("_0123456789").rpartition("_")[2]  # whole words: inaccuracy should fall
        known = {"loss": "min", "accuracy": "max"}.get(last)
        mode = known if mode is None else mode
        if mode not in MODES:
            raise ValueError(
                f"{owner}: mode says whether {name!r} should fall ('min') or rise ('max'); got {mode!r}: give one of "
                f"the two"
            )
        self.name, self.mode, self.owner = name, mode, owner

    def begin(self, run) -> None:
        """Find the column in `run`, or ValueError."""
        stats = next((cb for cb in run.cbs if hasattr(type(cb), "columns") and "history" in vars(cb)), None)
        if stats is None:
            raise ValueError(
                f"{self.owner} finds {self.name!r} among what AvgStatsCallback measures, and the run has none: give "
                f"both, as in cbs=[partial(AvgStatsCallback, accuracy), …]"
            )
        columns = [c for c in stats.columns if c not in ("epoch", "lr", "time")]
        self._column = self.name if self.name in columns else f"valid_{self.name}"
        if self._column not in columns:
            hint = suggestion(self.name, columns)
            raise ValueError(f"{self.owner}: monitor is one of {', '.join(columns)}; got {self.name!r}.{hint}")
        if self._column.startswith("valid_") and run.data.valid_dl is None:
            raise ValueError(
                f"{self.owner}: {self._column} is measured in validation, and there is none (data.valid_dl is None): "
                f"monitor='train_loss', or give validation data"
            )
        self._stats = stats

    def value(self, run) -> float | None:
        """Of the epoch that has just ended; None when it was not measured."""
        history = self._stats.history
        return history[-1][self._column] if history and history[-1]["epoch"] == run.epoch else None

    def better(self, value, best) -> bool:
        """Whether `value` beats `best` (None: nothing yet). NaN beats nothing, and a draw is no gain."""
        if value is None or math.isnan(value):
            return False
        return best is None or (value < best if self.mode == "min" else value > best)

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "_stats"}  # another callback
