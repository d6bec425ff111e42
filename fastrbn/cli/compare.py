"""`fastrbn compare`: train a grid of cells, and write its table and pictures."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from fastrbn.compare import GridResult, cells_of, run_grid, split_norms, write_report
from fastrbn.data import DataError, DataNotFoundError
from fastrbn.trainer.settings import find_device
from fastrbn.util import locked, write_whole

from .options import BAD_ARGUMENTS, DONE, ERROR, INTERRUPTED, CliError
from .run_folder import make_folder

CELLS, FAILED = "cells.csv", "failed.txt"


def compare(args: Namespace) -> int:
    """Run `fastrbn compare` and return the exit status."""
    if args.table is not None:
        return _table(args.table)
    _check(args)
    path = args.out / CELLS
    try:
        cells = cells_of(
            split_norms(args.norms),
            args.bs,
            args.seeds,
            args.lr_factors,
            [f"{name}@{args.size}" if args.size else name for name in _data(args.data)],
            args.net,
            n_train=args.n_train,
            epochs=args.epochs,
            augment=args.augment,
        )
        with _folder(args.out):
            result = run_grid(cells, path, args.jobs, args.device, args.data_dir, args.record_norms, _line)
    except DataNotFoundError as e:
        raise CliError(str(e), BAD_ARGUMENTS) from e
    except (DataError, BlockingIOError) as e:
        raise CliError(str(e)) from e
    except OSError as e:
        raise CliError(
            f"{e.filename or args.out}: {e.strerror or e}; once that is mended, the same command goes on"
        ) from e
    except ValueError as e:
        raise CliError(str(e), BAD_ARGUMENTS) from e
    if result.rows:
        print()
        _table(args.out)
    return _outcome(result, len(cells), args.out)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make and lock the folder `path`; remove a new one in which nothing was written."""
    new = not path.exists()
    make_folder(path)
    try:
        with locked(path):
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # it has results
                path.rmdir()


def _line(text: str) -> None:
    print(text, flush=True)


def _data(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    names = [part.rstrip("/") or part for part in parts]  # as the same folder with and without it has the same cells
    if not names or len(set(names)) < len(names):
        raise ValueError(f"DATA is a data set or several with commas between them, each once; got '{text}'")
    return names


def _check(args: Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise CliError(f"--out must be a folder; {args.out} is a file: take another name", BAD_ARGUMENTS)
    known = "cpu, cuda, or devices such as cuda:0,cuda:1 of this machine"
    try:
        kinds = {find_device(name, known).partition(":")[0] for name in args.device.split(",")}
    except ValueError as e:
        raise CliError(str(e), BAD_ARGUMENTS) from e
    if len(kinds) > 1:
        raise CliError(f"--device takes devices of one kind; got '{args.device}'", BAD_ARGUMENTS)


def _table(folder: Path) -> int:
    """Write and print the report of the CSV in `folder`."""
    try:
        text, files = write_report(folder / CELLS)
    except ValueError as e:
        raise CliError(f"{e}: give the folder that `fastrbn compare --out` was given", BAD_ARGUMENTS) from e
    print(text)
    print(f"written: {', '.join(map(str, files))}", flush=True)
    return DONE


def _outcome(result: GridResult, asked: int, folder: Path) -> int:
    """Print how the grid ended, and return the exit status."""
    log = folder / FAILED
    if not result.failed:
        log.unlink(missing_ok=True)
    else:
        write_whole(log, "\n\n".join(f"{cell}\n{words}" for cell, words in result.failed.items()) + "\n")
        for cell, words in result.failed.items():
            print(f"fastrbn compare: failed: {cell}: {words.strip().splitlines()[-1]}", file=sys.stderr)
    kept = f"{asked - result.todo} of {asked} cells are finished, in {folder / CELLS}"
    if result.interrupted:
        print(f"interrupted (Ctrl-C): {kept}; the same command goes on with the others", file=sys.stderr)
        return INTERRUPTED
    if result.failed:
        print(f"{kept}; {log} says where the others failed, and the same command tries them again", file=sys.stderr)
        return ERROR
    return DONE
