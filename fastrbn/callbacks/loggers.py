"""History in files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from fastrbn.files import write_whole
from fastrbn.learn.callback import Callback


class CSVLogger(Callback):
    """Writes the history of `AvgStatsCallback` to a CSV file: a header, then a row for each epoch.

    - `path`: the file; folders that are missing are made.
    - `append`: keep the rows that are in the file (their columns must be the same); else a fit writes it anew.

    The file is whole on disk after each epoch, whatever happens after. An empty cell: not measured.
    """

    _order = 10  # after the averages of the epoch are in the history

    def __init__(self, path="history.csv", append=False):
        self.path, self.append = Path(path), append

    def begin_fit(self):
        self._stats = next((cb for cb in self.run.cbs if hasattr(type(cb), "columns") and "history" in vars(cb)), None)
        if self._stats is None:
            raise ValueError(
                "CSVLogger writes what AvgStatsCallback measures, and the run has none: give both, as in "
                "cbs=[partial(AvgStatsCallback, accuracy), CSVLogger]"
            )
        if self.path.is_dir():
            raise IsADirectoryError(f"CSVLogger needs a file; got the folder {self.path}: add a name, history.csv")
        self._before = self._rows_there() if self.append and self.path.exists() else ""

    def after_epoch(self):
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
        text = self.path.read_text()
        header = next(csv.reader(io.StringIO(text)), [])
        if header and header != self._stats.columns:
            raise ValueError(
                f"CSVLogger(append=True) needs a file with the columns {', '.join(self._stats.columns)}; {self.path} "
                f"has {', '.join(header)}: take another path, or append=False to write it anew"
            )
        return text if text.endswith("\n") or not text else text + "\n"

    def __repr__(self):
        return f"CSVLogger({str(self.path)!r})"
