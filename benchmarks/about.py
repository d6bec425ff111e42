"""What every benchmark keeps beside its numbers: where, with what and when they were measured."""

import csv
import datetime
import io
import os
import platform
from pathlib import Path

import torch

from fastrbn.util import write_whole


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


def rows_of(path):
    """The rows of a CSV, none where there is no file yet."""
    if not path or not path.is_file():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


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
