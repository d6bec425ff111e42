"""The CSV of a grid: a row a finished cell, appended whole; read again to go on, and to draw."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
from pathlib import Path

from fastrbn.util import write_whole

KEY = (
    "data",
    "net",
    "norm",
    "settings",
    "bs",
    "lr_factor",
    "seed",
    "n_train",
    "epochs",
    "augment",
    "device",
    "version",
)
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
    other columns, or with a damaged row.
    """
    path = Path(path)
    if not path.is_file():
        return []
    head, *rows = [*csv.reader(io.StringIO(_whole_lines(_text(path)), newline=""))] or [COLUMNS]
    if tuple(head) != COLUMNS:
        odd = sorted(set(head) ^ set(COLUMNS))
        raise ValueError(
            f"{path} has other columns than this version of fastrbn writes ({', '.join(odd) or 'in another order'}): "
            f"take another folder, or move that file away"
        )
    rows = [_row(path, n, fields) for n, fields in enumerate(rows, 1)]
    return list({row_key(row): row for row in rows}.values())


def _row(path, n, fields) -> dict[str, str]:
    """The `n`-th row; ValueError if it is damaged."""
    repair = "delete that row, and its cell is trained again"
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{path}, row {n} has {len(fields)} fields, not {len(COLUMNS)}: {repair}")
    row = dict(zip(COLUMNS, fields))
    for name in NUMBERS:
        try:
            number(row, name)
        except ValueError:
            raise ValueError(f"{path}, row {n}: {name} must be a number; got {row[name]!r}: {repair}") from None
    return row


def _text(path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e}; mend it, or take another folder") from e


def row_key(row) -> tuple[str, ...]:
    """What tells the row's cell from others."""
    return tuple(row[name] for name in KEY)


def number(row, name) -> float | None:
    """A column's number; None where it is empty."""
    return float(row[name]) if row[name] not in ("", None) else None


def begin(path) -> None:
    """Make `path` ready for `append`: with its header, without a line that was cut off."""
    path = Path(path)
    old = _text(path) if path.is_file() else ""
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


def norms_path(path, key) -> Path:
    """Where the norms of a cell's weights are, for the CSV at `path`."""
    words = dict(zip(KEY, key))
    stem = "-".join(
        words[k] if k in ("data", "net", "norm") else f"{k}{words[k]}"
        for k in ("data", "net", "norm", "bs", "lr_factor", "seed")
    )
    digest = hashlib.sha1("\0".join(key).encode(), usedforsecurity=False).hexdigest()[:8]
    path = Path(path)
    return path.parent / f"{path.stem}_norms" / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', stem)[:120]}-{digest}.csv"


def norms_text(norms) -> str:
    text = io.StringIO(newline="")
    out = csv.writer(text, lineterminator="\n")
    out.writerow(norms)
    out.writerows([step, *(f"{v:.6g}" for v in row)] for step, *row in zip(*norms.values()))
    return text.getvalue()


def read_norms(path) -> tuple[list[int], list[float]]:
    """(steps, norm of all convolutions' weights together) of a cell's file."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f))[1:]
    return [int(r[0]) for r in rows], [math.fsum(float(v) ** 2 for v in r[1:]) ** 0.5 for r in rows]


def _line(values) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow([str(v).replace("\n", " ") for v in values])
    return text.getvalue()


def _whole_lines(text) -> str:
    return text[: text.rfind("\n") + 1]
