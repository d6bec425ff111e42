"""Processes that each train one cell at a time. One that dies takes no other with it, and Ctrl-C is the parent's."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import deque
from multiprocessing import connection

from .cell import load_images, load_task, run_cell


def in_processes(cells, jobs: int, devices: list[str], root=None, norms_every=None):
    """Yield (cell, row or None, norms or None, words of the failure or None) as cells finish, in any order.

    `jobs` processes, each with one CPU thread, on `devices` in turn. Leaving the generator ends them, at once.
    """
    todo, workers = deque(cells), []
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
                if answer is None:  # it died: a crash in native code, or killed for memory
                    i = workers.index(worker)
                    workers[i] = _Worker(worker.device, root, norms_every)
                    answer = None, None, f"its process died with exit status {worker.exitcode()}"
                yield cell, *answer
    finally:
        for worker in workers:
            worker.end()


def in_this_process(cells, device: str, root=None, norms_every=None):
    """The same, one after the other, without a process of their own."""
    for cell in cells:
        yield cell, *_answer(cell, device, root, norms_every)


class _Worker:
    """A process and the cell it is at."""

    def __init__(self, device, root, norms_every):
        self.device, self.cell = device, None
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA, nor threads safely
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, device, root, norms_every), daemon=True)
        with _one_thread(), _deaf_to_ctrl_c():
            self.process.start()
        theirs.close()

    def give(self, cell) -> None:
        self.cell = cell
        with contextlib.suppress(OSError):  # it has died; take() finds out
            self.pipe.send(cell)

    def take(self):
        """The cell and its answer, None for a process that died."""
        cell, self.cell = self.cell, None
        try:
            return cell, self.pipe.recv()
        except (EOFError, OSError):
            return cell, None

    def exitcode(self):
        self.process.join(10)
        return self.process.exitcode

    def end(self) -> None:
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _work(pipe, device, root, norms_every) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone: nobody wants the answer
        while True:
            pipe.send(_answer(pipe.recv(), device, root, norms_every))


_IMAGES: dict = {}  # the data of the last cell: cells come sorted by it


def _answer(cell, device, root, norms_every):
    """(row, norms, None), or (None, None, what went wrong)."""
    try:
        key = cell.data, cell.net if cell.task else "", root
        if key not in _IMAGES:
            _IMAGES.clear()
            _IMAGES[key] = load_task(cell.net, root) if cell.task else load_images(cell.data, root)
        return *run_cell(cell, _IMAGES[key], device, norms_every), None
    except Exception:  # noqa: BLE001 - whatever it is, it costs this cell only and is shown
        return None, None, traceback.format_exc()


@contextlib.contextmanager
def _one_thread():
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
def _deaf_to_ctrl_c():
    """What is started here does not hear Ctrl-C, not even while it imports; this process hears it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it would lift the mask when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
