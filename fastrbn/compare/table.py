"""The CSV of a grid: a row a finished cell, appended whole; read again to go on, and to draw."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from ..files import write_whole
from .cell import KEY

RESULTS = (
    "lr",
    "status",
    "accuracy",
    "train_loss",
    "steps",
    "seconds",
    "note",
    "weight_norm_start",
    "weight_norm_end",
    "code",
    "machine",
    "python",
    "torch",
    "date",
)
COLUMNS = (*KEY, *RESULTS)
NUMBERS = ("bs", "lr_factor", "seed", "epochs", "augment", "lr", "accuracy", "train_loss", "steps", "seconds")


def read_rows(path) -> list[dict[str, str]]:
    """The rows of `path`, as text, in order; of rows for the same cell the last. [] where there is no such file.

    A last line without an end (the machine went down while it was written) is left out. ValueError for a file with
    other columns.
    """
    path = Path(path)
    if not path.is_file():
        return []
    text = _whole_lines(path.read_text(encoding="utf-8"))
    if not text:
        return []
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if tuple(rows.fieldnames or ()) != COLUMNS:
        odd = sorted(set(rows.fieldnames or ()) ^ set(COLUMNS))
        raise ValueError(
            f"{path} has other columns than this version of fastrbn writes ({', '.join(odd) or 'in another order'}): "
            f"take another folder, or move that file away"
        )
    return list({row_key(row): row for row in rows}.values())


def row_key(row) -> tuple[str, ...]:
    """What tells the row's cell from others."""
    return tuple(row[name] for name in KEY)


def number(row, name) -> float | None:
    """A column's number; None where it is empty."""
    return float(row[name]) if row[name] not in ("", None) else None


def begin(path) -> None:
    """Make `path` ready for `append`: with its header, without a line that was cut off."""
    path = Path(path)
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    text = _whole_lines(old) or _line(COLUMNS)
    if text != old:
        write_whole(path, text)


def append(path, row) -> None:
    """Add one row: a single write at the end of the file, on the disk when this returns."""
    data = _line(["" if row[name] is None else row[name] for name in COLUMNS]).encode()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(f"{path} took only a part of a row: is the disk full? The part is left out when it is read")
        os.fsync(fd)
    finally:
        os.close(fd)


def _line(values) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow([str(v).replace("\n", " ") for v in values])
    return text.getvalue()


def _whole_lines(text) -> str:
    return text[: text.rfind("\n") + 1]
