"""Checkpoints: files that a fit can go on from."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import get_worker_info

from fastrbn.learn import checkpoint_file
from fastrbn.learn.batch import gradients_are_whole
from fastrbn.learn.callback import Callback
from fastrbn.learn.checkpoint_file import CheckpointError
from fastrbn.learn.ranks import rank
from fastrbn.util import whole

from .monitor import Monitor


class Checkpoint(Callback):
    """Save everything that a fit depends on, so that `run.fit(epochs, learn, resume=path)` continues it bit for bit.

    A checkpoint holds the model, the optimiser, the `state_dict` of every callback, the random states and the position
    in the epoch. A file is plain data, written whole, with a checksum. If a save fails (a full disk), the fit continues
    with a warning; it ends with CheckpointError if the next save fails too, or if it was the last. In several processes
    rank 0 saves. docs/checkpoints.md says what is in a file, how to resume and what is exact.

    Parameters
    ----------
    path : str or Path
        The folder, relative to the working directory at construction. Files in it are named
        `checkpoint-<number>-step-<steps done>.pt`.
    every : int, optional
        Save after each `every`-th training step. Default: after each epoch. The last epoch is always saved.
    keep : int or None, default 2
        How many of the newest files stay; None: all. Two, so that there is another if the disk damages one.
    monitor : str, optional
        Name of an average such as "valid_loss". Each epoch is saved then, and the file of the best one, `.best_path`,
        stays beside the newest; `.best` is its value. A metric's name alone means that of validation.
    mode : {"min", "max"}, optional
        The better direction of `monitor`. Needed unless the name ends in `loss`, `accuracy`, `f1` or `iou`.
    on_interrupt : bool, default True
        After Ctrl-C, finish the batch, save, and then end the fit; a second Ctrl-C ends it at once. Not available while
        a loader has workers (Ctrl-C ends those too), or if the program handles Ctrl-C itself.
    overwrite : bool, default False
        Start a new fit in a folder with checkpoints of another one, and delete those. Otherwise that is an error, so
        that forgetting `resume` costs nothing.

    Raises
    ------
    ValueError
        If an argument is out of range, or `path` looks like a file.
    FileExistsError
        In `begin_fit`, if the folder has checkpoints of another fit.
    CheckpointError
        If two saves in a row fail, or the last one.

    Examples
    --------
    >>> cbs = [partial(Checkpoint, "ck", every=10), Recorder]
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=cbs)
    >>> run.fit(1, learn)
    >>> sorted(path.name for path in Path("ck").iterdir())
    ['checkpoint-0001-step-10.pt', 'checkpoint-0002-step-16.pt']
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=cbs)   # in another process
    >>> run.fit(2, learn, resume="ck")
    >>> len(run.recorder.losses)   # of both epochs
    32
    """

    _needs_opt = ("param_groups", "state", "state_dict")

    def __init__(
        self,
        path: str | Path,
        every: int | None = None,
        keep: int | None = 2,
        monitor: str | None = None,
        mode: str | None = None,
        on_interrupt: bool = True,
        overwrite: bool = False,
    ):
        for name, value in (("every", every), ("keep", keep)):
            if value is not None:
                whole(f"Checkpoint: {name}, unless it is None,", value)
        if mode is not None and monitor is None:
            raise ValueError(
                f"mode must be used together with monitor; got mode={mode!r} alone: add monitor, or remove mode"
            )
        self.path, self.every, self.keep = Path(path).absolute(), every, keep
        if self.path.is_file() or self.path.suffix in (".pt", ".pth", ".ckpt"):
            raise ValueError(f"Checkpoint needs a folder, in which it names the files itself; got the file {self.path}")
        self.monitor = None if monitor is None else Monitor(monitor, mode, "Checkpoint")
        self.on_interrupt, self.overwrite = on_interrupt, overwrite
        self.best: float | None = None
        self._best_name: str | None = None
        self._wrote: set[str] = set()
        self._clear()

    def _clear(self) -> None:
        self._failed = self._asked = self._due = self._told = False
        self._pending: dict | None = None  # the state at the start of validation
        self._handler: Callable | None = None
        self._watched: list[tuple[Callback, dict]] = []

    @property
    def best_path(self) -> Path | None:
        """The checkpoint of the best epoch by `monitor`, or None."""
        return None if self._best_name is None else self.path / self._best_name

    def begin_fit(self) -> None:
        run = self.run
        self._clear()
        self.best = self._best_name = None
        if self.monitor is not None:
            self.monitor.begin(run)
        if rank() == 0:
            self._claim_folder()
        stateless = (cb for cb in run.cbs if type(cb).state_dict is Callback.state_dict)
        self._watched = [(cb, _looks(cb)) for cb in stateless if not type(cb).__module__.startswith("fastrbn.")]
        if self.on_interrupt and rank() == 0:  # on other ranks Distributed handles Ctrl-C, and tells rank 0
            self._handler = _handle(self._interrupted)

    def begin_epoch(self) -> None:
        self._pending = None

    def after_batch(self) -> None:
        run = self.run
        if run.in_train:
            self._due = self._due or self._asked or self.every is not None and run.n_iter % self.every == 0
            if self._due and not gradients_are_whole(run):
                return  # a file has the gradients of one process: it is written once they are exchanged
            if self._due:
                self._save("train", final=self._asked)
        self._end_if_asked()

    def begin_validate(self) -> None:
        if self._handler is not None:  # so that an interrupt during validation does not cost the epoch
            self._pending = self.run.state_dict("valid")

    def after_epoch(self) -> None:
        run, self._pending = self.run, None
        last = run.epoch + 1 >= run.epochs or (run.max_steps is not None and run.n_iter >= run.max_steps)
        value = None if self.monitor is None else self.monitor.value(run)
        best = self.monitor is not None and self.monitor.better(value, self.best)
        if self.every is None or self.monitor is not None or last or self._asked or self._due:
            self._save("end", final=last or self._asked, best=value if best else None)
        self._end_if_asked()

    def after_fit(self) -> None:
        run, pending, asked = self.run, self._pending, self._asked
        if self._handler is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._clear()
        reason = run.stop_reason
        if pending is not None and rank() == 0 and reason is not None and reason.startswith("interrupted"):
            # only now have the other callbacks restored the model
            self._write(pending, self._next_name(run.n_iter), final=True)
        if asked and reason is None:
            raise KeyboardInterrupt

    def state_dict(self) -> dict:
        return {} if self.monitor is None else {"best": self.best, "best_name": self._best_name}

    def load_state_dict(self, state: dict) -> None:
        self.best, self._best_name = state.get("best"), state.get("best_name")

    def _claim_folder(self) -> None:
        if self.path.is_file():
            raise NotADirectoryError(f"Checkpoint needs a folder; got the file {self.path}: use another name")
        self.path.mkdir(parents=True, exist_ok=True)
        there = [file for _, file in checkpoint_file.files(self.path)]
        source = self.run.resumed_from
        others = [file for file in there if file.name not in self._wrote]
        if others and not (source is not None and source.parent.resolve() == self.path.resolve()):
            if not self.overwrite:
                raise FileExistsError(
                    f"{self.path} has checkpoints of another fit ({others[-1].name}): resume it with "
                    f"run.fit(epochs, learn, resume={str(self.path)!r}), or w.resume() in a loop with watch; use "
                    f"another folder, or delete them with Checkpoint(…, overwrite=True)"
                )
            for file in others:
                file.unlink()
        for file in self.path.glob(".checkpoint-*.tmp"):  # left by a process that was killed while writing
            file.unlink(missing_ok=True)

    def _interrupted(self, signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if get_worker_info() is not None or multiprocessing.active_children():  # Ctrl-C ends workers too
            raise KeyboardInterrupt
        self._asked = True
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the reader, as in `… 2>&1 | tee log`
            os.write(2, b"\nfastrbn: saving a checkpoint after this batch; Ctrl-C again stops at once, without one\n")

    def _end_if_asked(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def _save(self, phase: str, final: bool = False, best: float | None = None) -> None:
        self._due = False
        if rank() != 0:
            return
        self._tell_of_stateless()
        before = self.best, self._best_name
        name = self._next_name(self.run.n_iter)
        if best is not None:
            self.best, self._best_name = best, name
        if not self._write(self.run.state_dict(phase), name, final):
            self.best, self._best_name = before

    def _next_name(self, step: int) -> str:
        there = checkpoint_file.files(self.path)
        return checkpoint_file.file_name(there[-1][0] + 1 if there else 1, step)

    def _write(self, state: dict, name: str, final: bool) -> bool:
        """Write a file and drop those beyond `keep`. False if writing failed once; CheckpointError if it must not."""
        try:
            checkpoint_file.write(self.path / name, state)
        except OSError as e:
            why = f"the checkpoint {self.path / name} could not be written ({e.strerror or e}); "
            there = checkpoint_file.files(self.path)
            why += f"the previous one, {there[-1][1].name}, is intact" if there else "there is no previous one"
            if final or self._failed:
                onward = "Free disk space and resume from it" if there else "Free disk space"
                raise CheckpointError(f"{why}. {onward}, or use another folder") from e
            warnings.warn(f"{why}. Training goes on, unless the next one fails too", RuntimeWarning, stacklevel=2)
            self._failed = True
            return False
        self._failed = False
        self._wrote.add(name)
        self._drop()
        return True

    def _drop(self) -> None:
        if self.keep is not None:
            for _, file in checkpoint_file.files(self.path)[: -self.keep]:
                if file.name != self._best_name:
                    file.unlink(missing_ok=True)

    def _tell_of_stateless(self) -> None:
        """Warn, once a fit, of state that changes and is not saved.

        This is the case for public attributes of callbacks without a state_dict, and for torch schedulers that no
        callback has as an attribute.
        """
        if not self._told and any("initial_lr" in g for g in self.run.opt.param_groups):
            held = any(isinstance(v, LRScheduler) for cb in self.run.cbs for v in vars(cb).values())
            self._told = True
            if not held:
                warnings.warn(
                    "a torch scheduler sets the rates of this optimiser, but the checkpoint does not contain its "
                    "state: make it an attribute of a callback (self.sched = …), which saves it and restores it, or in "
                    "a loop of your own write watch(…, sched=…)",
                    stacklevel=2,
                )
        found = [(cb, names) for cb, before in self._watched if (names := _changed(before, _looks(cb)))]
        if found:
            self._watched = []
            which = "; ".join(f"{type(cb).__name__} ({', '.join(names)})" for cb, names in found)
            warnings.warn(
                f"the checkpoint does not contain these attributes, which callbacks change during the fit: {which}. A "
                f"resumed fit starts them afresh. Define state_dict and load_state_dict in the classes; if nothing "
                f"needs to be saved, a state_dict that returns {{}} silences this warning",
                stacklevel=2,
            )

    def __getstate__(self):
        kept = ("path", "every", "keep", "monitor", "on_interrupt", "overwrite", "best", "_best_name", "_wrote")
        return {k: vars(self)[k] for k in kept}

    def __setstate__(self, state):
        self._clear()
        super().__setstate__({**state, "_wrote": set(state["_wrote"])})

    def __repr__(self):
        return f"Checkpoint({str(self.path)!r}, every={self.every}, keep={self.keep})"


def _handle(handler: Callable) -> Callable | None:
    """Handle Ctrl-C by `handler` and return it; None, and no change, if the program handles Ctrl-C itself."""
    if threading.current_thread() is not threading.main_thread():
        return None
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return None
    signal.signal(signal.SIGINT, handler)
    return handler


def _looks(cb: Callback) -> dict[str, Any]:
    """Cheap fingerprints of the public attributes of a callback: when one differs, the attribute has changed."""
    looks: dict[str, Any] = {}
    for name, value in vars(cb).items():
        if name.startswith("_") or name == "run" or isinstance(value, LRScheduler):  # Callback.state_dict saves these
            continue
        if isinstance(value, (bool, int, float, str, type(None))):
            looks[name] = value
        elif isinstance(value, torch.Tensor):
            looks[name] = (id(value), value._version)
        elif isinstance(value, (list, dict, set)):
            looks[name] = (id(value), len(value))
        else:
            looks[name] = id(value)
    return looks


def _changed(before: dict, now: dict) -> list[str]:
    """The names of the attributes whose fingerprints differ."""
    nothing = object()
    return [name for name in {**before, **now} if before.get(name, nothing) != now.get(name, nothing)]
