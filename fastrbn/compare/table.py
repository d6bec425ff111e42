"""The files of a grid: a CSV with one row per finished cell, and CSVs with the norms of weights."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastrbn.util import write_whole

# the columns that identify a cell
KEY = tuple("data net norm settings bs lr_factor seed n_train epochs augment device version".split())
RESULTS = (
    *"lr status accuracy train_loss steps seconds note weight_norm_start weight_norm_end".split(),
    *"code machine python torch date".split(),
)
COLUMNS = (*KEY, *RESULTS)
NUMBERS = ("bs", "lr_factor", "seed", "epochs", "augment", "lr", "accuracy", "train_loss", "steps", "seconds")


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a grid's CSV.

    An incomplete last line (the machine went down while it was written) is left out.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    list of dict
        Columns as text, in the order of the file; of several rows for one cell the last. Empty if there is no such
        file.

    Raises
    ------
    ValueError
        If the file has other columns, or a damaged row.

    Examples
    --------
    >>> read_rows("nowhere.csv")
    []
    """
    path = Path(path)
    if not path.is_file():
        return []
    head, *lines = [*csv.reader(io.StringIO(_whole_lines(_text(path)), newline=""))] or [[*COLUMNS]]
    if tuple(head) != COLUMNS:
        odd = sorted(set(head) ^ set(COLUMNS))
        raise ValueError(
            f"{path} has other columns than this version of fastrbn writes ({', '.join(odd) or 'in another order'}): "
            f"use another folder, or move that file away"
        )
    rows = [_row(path, n, fields) for n, fields in enumerate(lines, 1)]
    return list({row_key(row): row for row in rows}.values())


def _row(path: Path, n: int, fields: list[str]) -> dict[str, str]:
    """Row number `n`. Raises ValueError if it is damaged."""
    repair = "delete that row to train its cell again"
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{path}, row {n} has {len(fields)} fields, not {len(COLUMNS)}: {repair}")
    row = dict(zip(COLUMNS, fields))
    for name in NUMBERS:
        try:
            number(row, name)
        except ValueError:
            raise ValueError(f"{path}, row {n}: {name} must be a number; got {row[name]!r}: {repair}") from None
    return row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e}; repair it, or use another folder") from e


def row_key(row: dict[str, str]) -> tuple[str, ...]:
    """The columns that identify the row's cell."""
    return tuple(row[name] for name in KEY)


def number(row: dict[str, str], name: str) -> float | None:
    """A column as a number; None if it is empty."""
    return float(row[name]) if row[name] not in ("", None) else None


def begin(path: str | Path) -> None:
    """Prepare `path` for `append`: with a header, without an incomplete line."""
    path = Path(path)
    old = _text(path) if path.is_file() else ""
    text = _whole_lines(old) or _line(COLUMNS)
    if text != old:
        write_whole(path, text)


def append(path: str | Path, row: dict[str, Any]) -> None:
    """Append one row with a single write; it is on disk when this returns."""
    data = _line(["" if row[name] is None else row[name] for name in COLUMNS]).encode()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(f"only part of a row was written to {path}; is the disk full? The part is ignored on reading")
        os.fsync(fd)
    finally:
        os.close(fd)


def norms_path(path: str | Path, key: tuple[str, ...]) -> Path:
    """The file with the norms of a cell's weights, for the CSV at `path`."""
    words = dict(zip(KEY, key))
    stem = "-".join(
        words[k] if k in ("data", "net", "norm") else f"{k}{words[k]}"
        for k in ("data", "net", "norm", "bs", "lr_factor", "seed")
    )
    digest = hashlib.sha1("\0".join(key).encode(), usedforsecurity=False).hexdigest()[:8]
    path = Path(path)
    return path.parent / f"{path.stem}_norms" / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', stem)[:120]}-{digest}.csv"


def norms_text(norms: dict[str, list]) -> str:
    """The norms of a cell's weights as CSV."""
    text = io.StringIO(newline="")
    out = csv.writer(text, lineterminator="\n")
    out.writerow(norms)
    out.writerows([step, *(f"{v:.6g}" for v in row)] for step, *row in zip(*norms.values()))
    return text.getvalue()


def read_norms(path: str | Path) -> tuple[list[int], list[float]]:
    """(steps, norm of all weights together) from a cell's file."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f))[1:]
    return [int(r[0]) for r in rows], [math.fsum(float(v) ** 2 for v in r[1:]) ** 0.5 for r in rows]


def _line(values: Iterable[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow([str(v).replace("\n", " ") for v in values])
    return text.getvalue()


def _whole_lines(text: str) -> str:
    return text[: text.rfind("\n") + 1]
