"""What benchmarks have in common: the device, the machine and versions beside their numbers, their CSV files."""

import argparse
import csv
import datetime
import io
import os
import platform
import sys
from pathlib import Path

import torch

from fastrbn.trainer.settings import find_device
from fastrbn.util import write_whole


def device_name(name):
    """For argparse's `type`: the name of a device, if this machine has it."""
    try:
        return find_device(name, "a device of this machine, such as cpu")
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e).removeprefix("--device ")) from e


def device_names(names):
    """As `device_name`, for several with commas between them."""
    return ",".join(map(device_name, names.split(",")))


def machine(device=torch.device("cpu")):
    """Column names and values."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def in_words(about):
    return ", ".join(f"{k} {v}" for k, v in about.items())


def write_csv(path, rows, about):
    """Rows (dictionaries), each with `about` at its end; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, [*rows[0], *about], lineterminator="\n")
        out.writeheader()
        out.writerows({**row, **about} for row in rows)


def rows_of(path, kinds=None):
    """The rows of a CSV as text, none where there is no file yet. A damaged file ends the script with a sentence.

    `kinds` has the columns that the file must have, each with a function that raises ValueError for a wrong value.
    """
    if not path or not path.is_file():
        return []
    again = "and the same command measures again what is missing"
    try:
        with open(path, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as e:
        sys.exit(f"{path} must be a CSV file in UTF-8: {e}; move the file away, {again}")
    if rows and kinds and reader.fieldnames != [*kinds]:
        got = ",".join(reader.fieldnames)
        sys.exit(f"{path} must have the columns {','.join(kinds)}; got {got}: move the file away, {again}")
    for n, row in enumerate(rows, 1):
        try:
            if None in row or None in row.values():
                more = "more" if None in row else "fewer"
                raise ValueError(f"it must have {len(reader.fieldnames)} fields, and has {more}")
            for name, kind in (kinds or {}).items():
                kind(row[name])
        except ValueError as e:
            same = "it and the other rows of the same measurement"
            sys.exit(f"{path}, row {n} is damaged: {e}; delete {same}, or move the file away, {again}")
    return rows


def rewrite(path, rows):
    """All rows, with the columns of the first; the file is written whole or not at all. Makes the folder."""
    text = io.StringIO(newline="")
    out = csv.DictWriter(text, [*rows[0]], lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue())


def append(path, rows, about):
    """As `write_csv`, at the end of what the file has."""
    if not rows:
        return
    if not rows_of(path):
        write_csv(path, rows, about)
        return
    with open(path, "a", newline="") as f:
        csv.DictWriter(f, [*rows[0], *about], lineterminator="\n").writerows({**row, **about} for row in rows)


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
