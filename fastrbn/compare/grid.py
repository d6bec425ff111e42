"""A grid of cells: those not finished yet are trained, and each is in the CSV as soon as it is done."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import platform
import time
from contextlib import closing
from pathlib import Path

import torch

from fastrbn.util import write_whole

from . import table
from .cell import LR_RULES, NETS, Cell, code_of, key_of, load_images
from .norms import describe, get_norm
from .tasks import ZOO, get_task
from .workers import in_processes, in_this_process


@dataclasses.dataclass
class GridResult:
    """What a call of `run_grid` leaves.

    - `rows`: those of the CSV that belong to the grid, `{column: text}`, in the grid's order.
    - `failed`: cell → words, of those that raised or whose process died; the next call tries them again.
    - `interrupted`: whether Ctrl-C ended it; `todo`: how many cells are left, the failed ones included.
    """

    rows: list[dict[str, str]]
    failed: dict[Cell, str]
    interrupted: bool
    todo: int


def cells_of(norms, bs, seeds=(0,), lr_factors=(1.0,), data=("mnist",), net=("cnn",), **settings) -> list[Cell]:
    """The cells of all combinations, `settings` (`n_train`, `epochs`, `augment`) the same for each. With
    `data=["zoo"]`, `net` is a list of tasks, which have no such settings.

    In the order of work: by data set; then by seed, so that a grid that is cut short has a result for every norm; then
    small batches first, which take longest.
    """
    product = itertools.product(data, net, seeds, sorted(bs), lr_factors, norms)
    cells = [Cell(n, b, s, f, d, t, **settings) for d, t, s, b, f, n in product]
    for cell in cells:
        _check(cell)
    for norm in dict.fromkeys(norms):
        _try(norm)
    if not cells:
        raise ValueError(
            "a grid needs a norm, a batch size, a seed, a learning-rate factor, a data set and a net at least"
        )
    return list(dict.fromkeys(cells))


def _try(norm):
    describe(norm)  # raises for an unknown one
    try:
        get_norm(norm)(64)
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise ValueError(f"'{norm}' cannot be made: {e}") from e


def _check(cell):
    if cell.task:
        if (cell.n_train, cell.epochs, cell.augment) != (None, 1, False):
            raise ValueError(
                f"a task has data and length of its own: leave out n_train, epochs and augment for {cell.net}"
            )
    elif cell.net not in NETS:
        if cell.data == ZOO:
            get_task(cell.net)  # names those there are
        raise ValueError(f"net must be one of {', '.join(LR_RULES)}; got '{cell.net}'")
    for name, least in (("bs", 1), ("seed", 0), ("epochs", 1)):
        value = getattr(cell, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")
    if not 0 < cell.lr_factor < float("inf"):
        raise ValueError(f"a learning-rate factor is a finite number above 0; got {cell.lr_factor!r}")


def run_grid(cells, path, jobs=None, device="cpu", root=None, norms_every=None, log=print) -> GridResult:
    """Train those of `cells` that the CSV at `path` has no row for, and add one row for each.

    - `jobs`: processes, each with one CPU thread; None: a core each, on CUDA one. 0: all in this process.
    - `device`: "cpu", "cuda", or several such as "cuda:0,cuda:1", which processes take in turn.
    - `root`: where data sets are, None for $FASTRBN_DATA or a cache.
    - `norms_every`: record the norms of the convolutions' weights every so many steps, in a CSV a cell, in the folder
      `<path without .csv>_norms`; a cell without that file is trained again.
    - `log`: takes each line of progress.

    Finished are cells with the same settings, kind of device and version of fastrbn. Ctrl-C ends the call, not an
    error. A cell that fails is named, and does not stop the others. ValueError for a CSV of other columns or settings
    that fit no data; DataError or OSError for data that cannot be had: all before anything is trained.
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
    failed, interrupted = {}, False
    if todo:
        table.begin(path)
        failed, interrupted = _train(todo, keys, path, jobs, devices, root, norms_every, log)
    finished = {table.row_key(r): r for r in table.read_rows(path)}
    rows = [finished[keys[c]] for c in cells if keys[c] in finished]
    return GridResult(rows, failed, interrupted, len(cells) - len(rows))


def _train(todo, keys, path, jobs, devices, root, norms_every, log):
    failed, progress, about = {}, _Progress(todo, log), machine(devices[0])
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


def _outcome(row) -> str:
    if row["status"] == "refused":
        return f"refused: {row['note']}"
    lost = f" ({row['note']})" if row["note"] else ""
    return f"{row['accuracy']:.2f} %{lost}, {row['seconds']:.0f} s"


class _Progress:
    """A line a finished cell, with the time that is left at the pace so far."""

    def __init__(self, todo, log):
        self.log, self.total, self.done, self.began = log, len(todo), 0, time.perf_counter()
        self.all_work = sum(map(_work, todo))
        self.work = 0.0

    def add(self, cell, words):
        self.done += 1
        self.work += _work(cell)
        left = (time.perf_counter() - self.began) * (self.all_work / self.work - 1)
        eta = f"; about {_duration(left)} left" if self.done < self.total else ""
        self.log(f"[{self.done}/{self.total}] {cell}: {words}{eta}")


def _work(cell) -> float:
    # steps, and a little for each sample: what a cell takes in proportion to others
    if cell.task:
        return cell.task.n_steps(cell.bs) * (1 + cell.bs / 32)
    samples = (cell.n_train or 50_000) * cell.epochs
    return samples / cell.bs + samples / 32


def _duration(seconds) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _resolve_data(cells, root, log):
    """Each data set is loaded once here: what is wrong with it is said before processes start, and only one downloads.
    The cells with the name their data really have, and with the number of their training images."""
    resolved = {}
    for name in dict.fromkeys(c.data for c in cells if not c.task):
        images = load_images(name, root)
        if images.c < 2:
            raise ValueError(f"training needs images of two classes or more; {name} has one, {images.classes[0]}")
        real = images.name if images.name == f"{name}-jpeg" else name
        if real != name:
            log(f"{name} is not here in its own format: the JPEG images in the folder {real} are used, and called that")
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


def _warn_of_other_code(finished, keys, log):
    other = [k for k in set(keys.values()) if k in finished and finished[k]["code"] != code_of()]
    if other:
        log(
            f"note: {len(other)} of the finished cells were trained with other code of the norms or nets, of the same "
            f"version; delete their rows to train them again"
        )


def _norms_missing(path, key, finished, norms_every) -> bool:
    return bool(norms_every) and finished[key]["status"] != "refused" and not table.norms_path(path, key).is_file()


def _jobs(device) -> int:
    if torch.device(device).type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device) -> dict[str, str]:
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


def _count(n, what, plural="s") -> str:
    return f"{n} {what}{'' if n == 1 else plural}"
