"""`fastrbn predict`, `eval` and `export`: what is done with the model of a run."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from argparse import Namespace
from pathlib import Path

from fastrbn.data import DataError, DataNotFoundError
from fastrbn.export import KINDS
from fastrbn.saved_run import Evaluation, ImagePrediction, RunError, SavedRun, load_run, predictions
from fastrbn.util import write_whole

from .options import BAD_ARGUMENTS, DONE, ERROR, CliError


def predict(args: Namespace) -> int:
    """Run `fastrbn predict` and return the exit status."""
    if args.csv is not None and args.csv.is_dir():
        raise CliError(f"--csv must be a file; {args.csv} is a folder: add a name", BAD_ARGUMENTS)
    run = _load(args.run, args.weights, args.device)
    top, rows, bad = min(args.top, len(run.classes)), [], 0
    for source, found in predictions(run, args.images):
        if isinstance(found, Exception):
            bad += 1
            print(f"fastrbn predict: {source} cannot be read: {_why(found, source)}", file=sys.stderr)
            continue
        rows.append([str(source), *_ranked(run, found, top)])
        print("\t".join(rows[-1]), flush=True)
    if args.csv is not None:
        _write_csv(args.csv, rows, top)
    if bad:
        of = f"{bad} of {bad + len(rows)}"
        print(f"fastrbn predict: error: {of} could not be read; the others are above", file=sys.stderr)
    return ERROR if bad else DONE


def _ranked(run: SavedRun, found: ImagePrediction, top: int) -> list[str]:
    values, which = found.probabilities.topk(top)
    return [text for p, i in zip(values.tolist(), which.tolist()) for text in (run.classes[i], f"{p:.4f}")]


def _why(error: Exception, source: object) -> str:
    """Pillow and the system repeat the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).replace(f" '{source}'", "") or type(error).__name__


def _write_csv(path: Path, rows: list[list[str]], top: int) -> None:
    names = [
        "path",
        *(f"{name}{'' if n == 0 else f'_{n + 1}'}" for n in range(top) for name in ("label", "probability")),
    ]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    try:
        write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))  # a name need not be UTF-8
    except OSError as e:
        raise CliError(f"--csv {path} cannot be written: {e.strerror or e}; the lines are above") from e


def eval(args: Namespace) -> int:  # called like its command
    """Run `fastrbn eval` and return the exit status."""
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise CliError(f"--data-dir must be a folder; there is none at {args.data_dir}", BAD_ARGUMENTS)
    run = _load(args.run, args.weights, args.device)
    if args.data_dir is not None:
        run.settings = dataclasses.replace(run.settings, data_dir=args.data_dir)
    try:
        found = run.evaluate(args.data, args.split)
    except DataNotFoundError as e:
        other = (
            "" if args.data is not None else " Where else are they? See --data-dir, or --data for a folder of images."
        )
        raise CliError(f"{e}{other}", BAD_ARGUMENTS) from e
    except DataError as e:
        raise CliError(str(e)) from e
    except RunError as e:  # other classes
        raise CliError(str(e), BAD_ARGUMENTS) from e
    n, own = int(found.confusion.sum()), args.data is None and args.split == "valid"
    what = {"valid": "validation images", "test": "test images"}[args.split]
    what = what if args.data is None else f"images in {args.data}"
    print(f"{run.settings.title}, weights of {run.weights}, {n} {what}")
    before = run.trained if own else None
    beside = "" if before is None else f"; in training, epoch {before['epoch']}: {_measured(before)}"
    print(f"loss {found.loss:.4f}, accuracy {found.accuracy:.2%}{beside}")
    if args.per_class:
        _table(run, found)
    return DONE


def _measured(row: dict) -> str:
    return f"loss {row['valid_loss']:.4f}, accuracy {row['valid_accuracy']:.2%}"


def _table(run: SavedRun, found: Evaluation) -> None:
    """Print a line for each class that has images."""
    counts = dict(zip(run.classes, found.confusion.sum(1).tolist()))
    width = max(map(len, found.per_class))
    print(f"{'class':{max(width, 5)}}  images  accuracy")
    for name, share in found.per_class.items():
        print(f"{name:{max(width, 5)}}  {counts[name]:6}  {share:8.2%}")


def export(args: Namespace) -> int:
    """Run `fastrbn export` and return the exit status."""
    run = _load(args.run, args.weights, "cpu")
    path = args.out or args.run / f"model{KINDS[args.to]}"
    try:
        difference = run.export(path, args.to)
    except (ImportError, RuntimeError) as e:
        raise CliError(str(e)) from e
    except OSError as e:
        raise CliError(f"{path} cannot be written: {e.strerror or e}; take another name with --out") from e
    print(f"{path}: scores differ from the model's by {difference:.1e} at most")
    return DONE


def _load(folder: Path, weights: str, device: str) -> SavedRun:
    try:
        run = load_run(folder, weights, device)
    except ValueError as e:
        raise CliError(str(e), BAD_ARGUMENTS) from e
    if not run.results:
        print(f"{folder} has not ended yet, or was killed: using {run.weights.name}", file=sys.stderr)
    return run
