"""A grid of cells: those not finished yet are trained, and each is in the CSV as soon as it is done."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fastrbn.util import one_of, whole, write_whole

from . import table
from .cell import NETS, Cell, code_of, key_of, load_images, split_size
from .norms import describe, get_norm
from .tasks import ZOO, get_task
from .workers import in_processes, in_this_process


@dataclasses.dataclass
class GridResult:
    """The result of `run_grid`.

    Parameters
    ----------
    rows : list of dict
        The grid's rows of the CSV, `{column: text}`, in the grid's order.
    failed : dict of Cell to str
        Error text of the cells that raised or whose process died. The next call tries them again.
    interrupted : bool
        Whether Ctrl-C ended the call.
    todo : int
        Number of cells that are not finished, including the failed ones.
    """

    rows: list[dict[str, str]]
    failed: dict[Cell, str]
    interrupted: bool
    todo: int


def cells_of(
    norms: Sequence[str],
    bs: Iterable[int],
    seeds: Iterable[int] = (0,),
    lr_factors: Iterable[float] = (1.0,),
    data: Iterable[str] = ("mnist",),
    net: Iterable[str] = ("cnn",),
    **settings: Any,
) -> list[Cell]:
    """The cells of all combinations, in the order of work.

    The order is by data set, then by seed, so that an incomplete grid has results for every norm, then by batch size,
    since small batches take longest.

    Parameters
    ----------
    norms, bs, seeds, lr_factors, data, net : sequence
        Values of the fields of `Cell`. With `data=["zoo"]`, `net` lists tasks.
    **settings
        `n_train`, `epochs` and `augment`, the same for all cells. Tasks do not have them.

    Returns
    -------
    list of Cell

    Raises
    ------
    ValueError
        If there is no combination, or a norm or value is invalid.

    Examples
    --------
    >>> [str(cell) for cell in cells_of(["default", "frn"], bs=[8, 2])][:2]
    ['mnist cnn default bs 2 seed 0', 'mnist cnn frn bs 2 seed 0']
    """
    product = itertools.product(data, net, seeds, sorted(bs), lr_factors, norms)
    cells = [Cell(n, b, s, f, d, t, **settings) for d, t, s, b, f, n in product]
    for cell in cells:
        _check(cell)
    for norm in dict.fromkeys(norms):
        _try(norm)
    if not cells:
        raise ValueError(
            "a grid needs at least a norm, a batch size, a seed, a learning-rate factor, a data set and a net"
        )
    return list(dict.fromkeys(cells))


def _try(norm: str) -> None:
    """Make the norm once, so that its errors come before training."""
    describe(norm)  # raises for an unknown one
    try:
        get_norm(norm)(64)
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise ValueError(f"'{norm}' cannot be made: {e}") from e


def _check(cell: Cell) -> None:
    if cell.task:
        if (cell.n_train, cell.epochs, cell.augment) != (None, 1, False):
            raise ValueError(
                f"a task has its own data and length: leave out n_train, epochs and augment for {cell.net}"
            )
    elif cell.net not in NETS:
        if cell.data == ZOO:
            get_task(cell.net)  # its error lists the tasks
        one_of("net", cell.net, NETS)
    for name, least in (("bs", 1), ("seed", 0), ("epochs", 1)):
        whole(name, getattr(cell, name), least)
    if not 0 < cell.lr_factor < float("inf"):
        raise ValueError(f"a learning-rate factor must be a finite number above 0; got {cell.lr_factor!r}")


def run_grid(
    cells: Iterable[Cell],
    path: str | Path,
    jobs: int | None = None,
    device: str = "cpu",
    root: str | Path | None = None,
    norms_every: int | None = None,
    log: Callable[[str], object] = print,
) -> GridResult:
    """Train the cells that have no row in a CSV yet, and add a row for each as soon as it is done.

    A finished cell is one with the same settings, kind of device and version of fastrbn. Ctrl-C ends the call without
    an error. A cell that fails is reported and does not stop the others.

    Parameters
    ----------
    cells : iterable of Cell
    path : str or Path
        The CSV file.
    jobs : int, optional
        Number of processes, each with one CPU thread; by default one per core, on CUDA one. 0 trains in this process.
    device : str, default "cpu"
        "cpu", "cuda", or several such as "cuda:0,cuda:1", which processes use in turn.
    root : str or Path, optional
        Folder of the data sets; by default $FASTRBN_DATA or a cache.
    norms_every : int, optional
        Record the norms of the convolutions' weights every so many steps, in one CSV per cell in the folder
        `<path without .csv>_norms`. A finished cell without that file is trained again.
    log : callable, default print
        Called with each line of progress.

    Returns
    -------
    GridResult

    Raises
    ------
    ValueError
        If the CSV has other columns, or settings do not fit the data; before anything is trained.
    DataError, OSError
        If data cannot be loaded; before anything is trained.

    Examples
    --------
    >>> result = run_grid(cells_of(["default"], bs=[8]), "cells.csv")   # doctest: +SKIP
    >>> result.rows[0]["accuracy"]                                      # doctest: +SKIP
    '98.41'
    """
    path = Path(path)
    devices = device.split(",")
    cells, finished = list(cells), {table.row_key(r): r for r in table.read_rows(path)}
    cells = _resolve_data(cells, root, log)
    keys = {cell: tuple(key_of(cell, devices[0]).values()) for cell in cells}
    todo = [c for c in cells if keys[c] not in finished or _norms_missing(path, keys[c], finished, norms_every)]
    jobs = min(_jobs(devices[0]) if jobs is None else jobs, len(todo))
    log(
        f"{_count(len(cells), 'cell')}, {len(cells) - len(todo)} finished, {len(todo)} to train"
        + (f" in {_count(jobs, 'process', 'es')} on {device}" if jobs and todo else "")
    )
    _warn_of_other_code(finished, keys, log)
    failed: dict[Cell, str] = {}
    interrupted = False
    if todo:
        table.begin(path)
        failed, interrupted = _train(todo, keys, path, jobs, devices, root, norms_every, log)
    finished = {table.row_key(r): r for r in table.read_rows(path)}
    rows = [finished[keys[c]] for c in cells if keys[c] in finished]
    return GridResult(rows, failed, interrupted, len(cells) - len(rows))


def _train(
    todo: list[Cell],
    keys: dict[Cell, tuple[str, ...]],
    path: Path,
    jobs: int,
    devices: list[str],
    root: str | Path | None,
    norms_every: int | None,
    log: Callable[[str], object],
) -> tuple[dict[Cell, str], bool]:
    """Train the cells and write their rows. Returns the failed ones, and whether it was interrupted."""
    failed: dict[Cell, str] = {}
    progress, about = _Progress(todo, log), machine(devices[0])
    if jobs:
        results = in_processes(todo, jobs, devices, root, norms_every)
    else:
        results = in_this_process(todo, devices[0], root, norms_every)
    try:
        with closing(results):
            for cell, row, norms, failure in results:
                if failure is not None:
                    failed[cell] = failure
                    progress.add(cell, f"FAILED: {failure.strip().splitlines()[-1]}")
                    continue
                if norms is not None:
                    write_whole(table.norms_path(path, keys[cell]), table.norms_text(norms))
                table.append(path, dict(zip(table.KEY, keys[cell])) | row | about)
                progress.add(cell, _outcome(row))
    except KeyboardInterrupt:
        return failed, True
    return failed, False


def _outcome(row: dict[str, Any]) -> str:
    if row["status"] == "refused":
        return f"refused: {row['note']}"
    lost = f" ({row['note']})" if row["note"] else ""
    return f"{row['accuracy']:.2f} %{lost}, {row['seconds']:.0f} s"


class _Progress:
    """Logs a line for each finished cell, with the estimated time left."""

    def __init__(self, todo: list[Cell], log: Callable[[str], object]) -> None:
        self.log, self.total, self.done, self.began = log, len(todo), 0, time.perf_counter()
        self.all_work = sum(map(_work, todo))
        self.work = 0.0

    def add(self, cell: Cell, words: str) -> None:
        """Log a finished cell."""
        self.done += 1
        self.work += _work(cell)
        left = (time.perf_counter() - self.began) * (self.all_work / self.work - 1)
        eta = f"; about {_duration(left)} left" if self.done < self.total else ""
        self.log(f"[{self.done}/{self.total}] {cell}: {words}{eta}")


def _work(cell: Cell) -> float:
    """Relative cost of a cell: its steps, and a little for each sample."""
    if cell.task:
        samples, groups = cell.task.at_once or cell.bs, (cell.task.at_once or cell.bs) / cell.bs
        return cell.task.n_steps(cell.bs) * (groups + samples / 32)
    samples = (cell.n_train or 50_000) * cell.epochs
    return samples / cell.bs + samples / 32


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _resolve_data(cells: list[Cell], root: str | Path | None, log: Callable[[str], object]) -> list[Cell]:
    """Load each data set once, so that errors come before processes start and only one process downloads.

    Returns the cells with the actual name of their data and number of training images.
    """
    resolved = {}
    for name in dict.fromkeys(c.data for c in cells if not c.task):
        images = load_images(name, root)
        if images.c < 2:
            raise ValueError(f"training needs images of two classes or more; {name} has one, {images.classes[0]}")
        bare, _ = split_size(name)
        real = f"{images.name}{name[len(bare) :]}" if images.name == f"{bare}-jpeg" else name
        if real != name:
            log(f"{name} was not found in its original format; using the JPEG images in {real}, and that name")
        resolved[name] = real, len(images.train)
    tasks = {name: len(get_task(name).data(root)[0]) for name in dict.fromkeys(c.net for c in cells if c.task)}
    checked = []
    for cell in cells:
        name, n = (ZOO, tasks[cell.net]) if cell.task else resolved[cell.data]
        if not cell.bs <= (n if cell.n_train is None else cell.n_train) <= n:
            raise ValueError(
                f"n_train must be from the batch size, {cell.bs}, to the {n} training images of "
                f"{cell.net if cell.task else cell.data}; got {cell.n_train}"
            )
        checked.append(dataclasses.replace(cell, data=name, n_train=cell.n_train or n))
    return list(dict.fromkeys(checked))


def _warn_of_other_code(
    finished: dict[tuple[str, ...], dict[str, str]],
    keys: dict[Cell, tuple[str, ...]],
    log: Callable[[str], object],
) -> None:
    other = [k for k in set(keys.values()) if k in finished and finished[k]["code"] != code_of()]
    if other:
        log(
            f"note: {len(other)} of the finished cells were trained with different code of the norms or nets, of the "
            f"same version; delete their rows to train them again"
        )


def _norms_missing(
    path: Path, key: tuple[str, ...], finished: dict[tuple[str, ...], dict[str, str]], norms_every: int | None
) -> bool:
    return bool(norms_every) and finished[key]["status"] != "refused" and not table.norms_path(path, key).is_file()


def _jobs(device: str) -> int:
    if torch.device(device).type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str) -> dict[str, str]:
    """The columns that say where a result comes from."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()
    return {
        "code": code_of(),
        "machine": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n} {what}{'' if n == 1 else plural}"
