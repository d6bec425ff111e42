"""Processes that each train one cell at a time. One that dies does not affect the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .cell import Cell, load_images, load_task, run_cell

Answer = tuple[dict[str, Any] | None, dict[str, list] | None, str | None]  # row, norms, error text


def in_processes(
    cells: Iterable[Cell],
    jobs: int,
    devices: list[str],
    root: str | Path | None = None,
    norms_every: int | None = None,
) -> Generator[tuple[Any, ...], None, None]:
    """Yield (cell, row or None, norms or None, error text or None) as cells finish, in any order.

    It uses `jobs` processes, each with one CPU thread, on `devices` in turn. Closing the generator ends them at once.
    """
    todo = deque(cells)
    workers: list[_Worker] = []
    try:
        workers = [_Worker(devices[i % len(devices)], root, norms_every) for i in range(min(jobs, len(todo)))]
        while True:
            for worker in workers:
                if worker.cell is None and todo:
                    worker.give(todo.popleft())
            busy = [w for w in workers if w.cell is not None]
            if not busy:
                return
            ready = connection.wait([w.pipe for w in busy])
            for worker in [w for w in busy if w.pipe in ready]:
                cell, answer = worker.take()
                if answer is None:  # it died: native code crashed, or it was killed for memory
                    i = workers.index(worker)
                    workers[i] = _Worker(worker.device, root, norms_every)
                    answer = None, None, f"its process died with exit status {worker.exitcode()}"
                yield cell, *answer
    finally:
        for worker in workers:
            worker.end()


def in_this_process(
    cells: Iterable[Cell], device: str, root: str | Path | None = None, norms_every: int | None = None
) -> Generator[tuple[Any, ...], None, None]:
    """The same, one cell after another in this process."""
    for cell in cells:
        yield cell, *_answer(cell, device, root, norms_every)


class _Worker:
    """A process and the cell it is training."""

    def __init__(self, device: str, root: str | Path | None, norms_every: int | None) -> None:
        self.device = device
        self.cell: Cell | None = None
        context = multiprocessing.get_context("spawn")  # forked processes cannot use CUDA, nor threads safely
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, device, root, norms_every), daemon=True)
        with _one_thread(), _deaf_to_ctrl_c():
            self.process.start()
        theirs.close()

    def give(self, cell: Cell) -> None:
        """Send the process a cell."""
        self.cell = cell
        with contextlib.suppress(OSError):  # it has died; take() finds out
            self.pipe.send(cell)

    def take(self) -> tuple[Cell, Answer | None]:
        """The cell and its answer; None if the process died."""
        cell, self.cell = self.cell, None
        assert cell is not None, "give() comes before take()"
        try:
            return cell, self.pipe.recv()
        except (EOFError, OSError):
            return cell, None

    def exitcode(self) -> int | None:
        """Exit status of a process that died."""
        self.process.join(10)
        return self.process.exitcode

    def end(self) -> None:
        """End the process, by force if need be."""
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _work(pipe: Connection, device: str, root: str | Path | None, norms_every: int | None) -> None:
    """The loop of a worker process."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            pipe.send(_answer(pipe.recv(), device, root, norms_every))


_IMAGES: dict[tuple[Any, ...], Any] = {}  # the data of the last cell, since cells are sorted by it


def _answer(cell: Cell, device: str, root: str | Path | None, norms_every: int | None) -> Answer:
    """(row, norms, None), or (None, None, error text)."""
    try:
        key = cell.data, cell.net if cell.task else "", root
        if key not in _IMAGES:
            _IMAGES.clear()
            _IMAGES[key] = load_task(cell.net, root, device) if cell.task else load_images(cell.data, root)
        return *run_cell(cell, _IMAGES[key], device, norms_every), None
    except Exception:  # noqa: BLE001 - any error costs this cell only, and is reported
        return None, None, traceback.format_exc()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started here use one thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the child imports torch
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started here ignore Ctrl-C, also while they import; this process receives it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # starting it later would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
