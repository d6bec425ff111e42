"""What a run of `fastrbn train` leaves behind. Each file is written whole or not at all, each for itself."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import torch

from fastrbn import plots
from fastrbn.learn import checkpoint_file as checkpoints
from fastrbn.util import write_whole

from .options import BAD_ARGUMENTS, ERROR, CliError

REPORT = "nan_report.txt"
CHECKPOINTS = "checkpoints"  # a folder
RESULTS = ("config.json", "model.pt", "history.csv", "curves.png", "params.png", REPORT, "nan_report.json", "nan_batch.pt")


def check_folder(folder: Path | None, force: bool) -> None:
    """CliError when results may not go to `folder`, before time is spent on making them."""
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise CliError(f"--out must be a folder; {folder} is a file: take another name", BAD_ARGUMENTS)
    if any(folder.iterdir()) and not force:
        raise CliError(
            f"--out {folder} is not empty: take another name, or --force to write over its results", BAD_ARGUMENTS
        )


def make_folder(folder: Path, numbered: bool = False) -> Path:
    """Make `folder`; if `numbered`, as a new one, with -2, -3, … where it exists: two runs may start in one second."""
    base, n = folder, 1
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=not numbered)
            return folder
        except OSError as e:
            if not (numbered and isinstance(e, FileExistsError)):
                raise _not_there(folder, e) from e
            n += 1
            folder = base.with_name(f"{base.name}-{n}")


def drop_results(folder: Path) -> None:
    """Delete the results of an earlier run in `folder`, which would pass for this one's."""
    try:
        for file in (*(folder / name for name in RESULTS), *(f for _, f in checkpoints.files(folder / CHECKPOINTS))):
            file.unlink(missing_ok=True)
    except OSError as e:
        raise _not_there(folder, e) from e


def _not_there(folder, error) -> CliError:
    return CliError(
        f"the results cannot go to {folder}: {error.strerror or error}; choose another folder with --out", ERROR
    )


def write_config(folder: Path, config: dict) -> None:
    """`config` as JSON, a line for each setting. CliError when it cannot be written."""
    file = folder / "config.json"
    try:
        # a name that is not UTF-8 has surrogates, for which these escapes are also JSON's
        write_whole(file, f"{_json(config)}\n".encode("utf-8", "backslashreplace"))
    except OSError as e:
        raise CliError(
            f"{file} could not be written: {e.strerror or e}; make room, or choose another folder with --out", ERROR
        ) from e


def _json(value, indent="") -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + "  "
    lines = (f"{inner}{json.dumps(str(k), ensure_ascii=False)}: {_json(v, inner)}" for k, v in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def write_results(folder: Path, model, stats, recorder, magnitudes, report=None) -> list[str]:
    """Write all results but the configuration; what went wrong, a sentence each: one failure costs one file."""
    writers = {
        "model.pt": lambda: _state_dict(model),
        "history.csv": lambda: _history(stats),
        "curves.png": lambda: _png(
            plots.plot_run(recorder.losses, recorder.lrs[-1] if recorder.lrs else [], rows(stats))
        ),
        "params.png": lambda: _png(magnitudes.plot()),
    }
    if report is not None:
        writers[REPORT] = lambda: f"{report}\n"
    failures = []
    for name, make in writers.items():
        try:
            write_whole(folder / name, make())
        except Exception as e:  # noqa: BLE001 - a full disk, a picture of odd numbers: the other files are still wanted
            failures.append(f"{folder / name} could not be written: {type(e).__name__}: {e}")
    return failures


def rows(stats) -> list[dict]:
    """The history, and where the fit ended within an epoch, a last row with the averages so far."""
    history, run = list(stats.history), stats.run
    begun = run.iter is not None or run.dl is not run.data.train_dl  # else the averages are still the last epoch's
    if run.epoch == len(history) and begun and stats.train_stats.count:
        row = dict.fromkeys(stats.columns)
        row["epoch"] = run.epoch
        for part, which in ((stats.train_stats, "train"), (stats.valid_stats, "valid")):
            row.update({f"{which}_{name}": value for name, value in zip(part.names, part.avg_stats)})
        row["lr"] = float(run.opt.param_groups[-1]["lr"])
        history.append(row)
    return history


def _history(stats) -> str:
    text = io.StringIO(newline="")
    out = csv.DictWriter(text, stats.columns, lineterminator="\n")
    out.writeheader()
    out.writerows(rows(stats))
    return text.getvalue()


def _state_dict(model) -> bytes:
    file = io.BytesIO()
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, file)
    return file.getvalue()


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
