"""Checkpoints to go on from after whatever ended a fit, and the weights of the best epoch."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import warnings
import weakref
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler

from fastrbn.learn import checkpoint_file as checkpoints
from fastrbn.learn.batch import gradients_are_whole
from fastrbn.learn.callback import Callback
from fastrbn.learn.checkpoint_file import CheckpointError
from fastrbn.learn.snapshot import plain_state_dict
from fastrbn.util import write_whole

from .changes import changed, looks
from .monitor import Monitor


class Checkpoint(Callback):
    """Saves all that a fit depends on, so that `run.fit(epochs, learn, resume=path)` goes on bit for bit.

    - `path`: the folder, relative to where the program is when this is made; files in it are named
      `checkpoint-<number>-step-<steps done>.pt`.
    - `every`: save after each `every`-th training step; None: after each epoch. The last epoch is always saved.
    - `keep`: this many of the newest files stay (default 2: should the disk damage one, there is the one before);
      None: all.
    - `monitor`: the name of an average such as "valid_loss" or of a metric (that of validation). Then each epoch is
      saved, and the best one's file stays beside the newest, at `.best_path`.
    - `mode`: "min" or "max", whether the monitored value should fall or rise; needed unless its name ends in `loss` or
      `accuracy`.
    - `on_interrupt`: after Ctrl-C let the batch end, save, and only then end the fit; a second Ctrl-C ends it at once.
      Not with loaders that have workers (Ctrl-C ends those too), nor where the program handles Ctrl-C itself.
    - `overwrite`: begin a new fit in a folder that holds another one's checkpoints, which are then deleted. Otherwise
      that is an error: forgetting `resume` costs nothing.

    Saved are the model (state_dict, buffers that it leaves out, `requires_grad`, public bool attributes such as
    `frozen`; what else a module keeps in plain attributes is not), gradients accumulated so far, the optimiser, the
    `state_dict` of every callback (those here that only diagnose define none and begin anew), the random states of
    Python, NumPy, PyTorch and the loaders, and the place in the epoch. All of it takes the place of what `learn` has
    when it is resumed, learning rates too.

    To resume, make model, optimiser, data and callbacks as before. `epochs` may be larger, with schedules stretched
    over the new length. The same machine and versions give the same bits where the operations do (on CUDA:
    `torch.use_deterministic_algorithms`). `BatchLoader` takes up an epoch in the middle at no cost. Other loaders begin
    it again under the random states from its start and run through the batches that are done; that is exact unless a
    sampler draws from the global generators batch by batch, or workers outlive epochs. In a distributed run rank 0
    saves, between batches that accumulate gradients only after the step, and the other ranks resume with random states
    of their own.

    A file is written beside the old ones under a temporary name, then renamed: whenever the process is killed, the last
    whole one is there. When a save fails (a full disk) the fit goes on with a warning, and ends with CheckpointError if
    the next one fails too, or if it was the last. A file is plain data, read without running code, with a checksum that
    is verified when it is read.
    """

    _needs_opt = ("param_groups", "state", "state_dict")

    def __init__(self, path, every=None, keep=2, monitor=None, mode=None, on_interrupt=True, overwrite=False):
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number, 1 or more, or None; got {value!r}")
        if mode is not None and monitor is None:
            raise ValueError(f"mode={mode!r} says what is best of a monitored value: give monitor as well, or neither")
        self.path, self.every, self.keep = Path(path).absolute(), every, keep
        if self.path.is_file() or self.path.suffix in (".pt", ".pth", ".ckpt"):
            raise ValueError(f"Checkpoint needs a folder, its files get names by themselves; got the file {self.path}")
        self.monitor = None if monitor is None else Monitor(monitor, mode, "Checkpoint")
        self.on_interrupt, self.overwrite = on_interrupt, overwrite
        self.best, self._best_name, self._wrote = None, None, set()
        self._clear()

    def _clear(self):
        self._failed, self._pending, self._asked, self._handler, self._watched = False, None, False, None, []
        self._due = self._told = False

    @property
    def best_path(self) -> Path | None:
        """The checkpoint of the best epoch by `monitor`; None so far, or without it. `best` is its value."""
        return None if self._best_name is None else self.path / self._best_name

    def begin_fit(self):
        run = self.run
        self._clear()
        self.best = self._best_name = None
        if self.monitor is not None:
            self.monitor.begin(run)
        if _rank() == 0:
            self._claim_folder()
        stateless = (cb for cb in run.cbs if type(cb).state_dict is Callback.state_dict)
        self._watched = [(cb, looks(cb)) for cb in stateless if not type(cb).__module__.startswith("fastrbn.")]
        loaders = (run.data.train_dl, run.data.valid_dl)
        # elsewhere Distributed takes it, and tells rank 0
        if self.on_interrupt and _rank() == 0 and not any(getattr(dl, "num_workers", 0) for dl in loaders):
            self._handler = _handle(self._interrupted)

    def begin_epoch(self):
        self._pending = None

    def after_batch(self):
        run = self.run
        if run.in_train:
            self._due = self._due or self._asked or self.every is not None and run.n_iter % self.every == 0
            if self._due and not gradients_are_whole(run):
                return  # a file holds those of one process: it is written when they are exchanged
            if self._due:
                self._save("train", final=self._asked)
        self._end_if_asked()

    def begin_validate(self):
        if self._handler is not None:  # an interrupt from here on should not cost the epoch
            self._pending = self.run.state_dict("valid")

    def after_epoch(self):
        run, self._pending = self.run, None
        last = run.epoch + 1 == run.epochs
        value = None if self.monitor is None else self.monitor.value(run)
        best = self.monitor is not None and self.monitor.better(value, self.best)
        if self.every is None or self.monitor is not None or last or self._asked or self._due:
            self._save("end", final=last or self._asked, best=value if best else None)
        self._end_if_asked()

    def after_fit(self):
        run, pending, asked = self.run, self._pending, self._asked
        if self._handler is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._clear()
        reason = run.stop_reason
        if pending is not None and _rank() == 0 and reason is not None and reason.startswith("interrupted"):
            # only now: the others have taken back what they lent the model
            self._write(pending, self._next_name(run.n_iter), final=True)
        if asked and reason is None:
            raise KeyboardInterrupt

    def state_dict(self):
        return {} if self.monitor is None else {"best": self.best, "best_name": self._best_name}

    def load_state_dict(self, state):
        self.best, self._best_name = state.get("best"), state.get("best_name")

    def _claim_folder(self):
        if self.path.is_file():
            raise NotADirectoryError(f"Checkpoint needs a folder; got the file {self.path}: take another name")
        self.path.mkdir(parents=True, exist_ok=True)
        there = [file for _, file in checkpoints.files(self.path)]
        source = self.run.resumed_from
        others = [file for file in there if file.name not in self._wrote]
        if others and not (source is not None and source.parent.resolve() == self.path.resolve()):
            if not self.overwrite:
                raise FileExistsError(
                    f"{self.path} holds checkpoints of another fit ({others[-1].name}): go on from them with "
                    f"run.fit(epochs, learn, resume={str(self.path)!r}), take another folder, or delete them with "
                    f"Checkpoint(…, overwrite=True)"
                )
            for file in others:
                file.unlink()
        for file in self.path.glob(".checkpoint-*.tmp"):  # of a process that was killed while it wrote
            file.unlink(missing_ok=True)

    def _interrupted(self, signum, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._asked = True
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended who reads it, as in `… 2>&1 | tee log`
            os.write(2, b"\nfastrbn: saving a checkpoint after this batch; Ctrl-C again stops at once, without one\n")

    def _end_if_asked(self):
        if self._asked:
            raise KeyboardInterrupt

    def _save(self, phase, final=False, best=None):
        self._due = False
        if _rank() != 0:
            return
        self._tell_of_stateless()
        before = self.best, self._best_name
        name = self._next_name(self.run.n_iter)
        if best is not None:
            self.best, self._best_name = best, name
        if not self._write(self.run.state_dict(phase), name, final):
            self.best, self._best_name = before

    def _next_name(self, step) -> str:
        there = checkpoints.files(self.path)
        return checkpoints.file_name(there[-1][0] + 1 if there else 1, step)

    def _write(self, state, name, final) -> bool:
        """Write, and drop what is beyond `keep`. False when it could not be written, and may be tried again."""
        try:
            checkpoints.write(self.path / name, state)
        except OSError as e:
            why = f"the checkpoint {self.path / name} could not be written ({e.strerror or e}); "
            there = checkpoints.files(self.path)
            why += f"the one before, {there[-1][1].name}, is whole" if there else "there is none before it"
            if final or self._failed:
                onward = "Make room and resume from it" if there else "Make room"
                raise CheckpointError(f"{why}. {onward}, or take another folder") from e
            warnings.warn(f"{why}. Training goes on; if the next one fails too it ends", RuntimeWarning, stacklevel=2)
            self._failed = True
            return False
        self._failed = False
        self._wrote.add(name)
        self._drop()
        return True

    def _drop(self):
        if self.keep is not None:
            for _, file in checkpoints.files(self.path)[: -self.keep]:
                if file.name != self._best_name:
                    file.unlink(missing_ok=True)

    def _tell_of_stateless(self):
        """Warn, once a fit, of what changes in the fit and no checkpoint holds: public attributes of callbacks, and torch
        schedulers that no callback has as an attribute."""
        if not self._told and any("initial_lr" in g for g in self.run.opt.param_groups):
            held = any(isinstance(v, LRScheduler) for cb in self.run.cbs for v in vars(cb).values())
            self._told = True
            if not held:
                warnings.warn(
                    "a torch scheduler sets the rates of this optimiser, and the checkpoint does not hold its state: make "
                    "it an attribute of a callback (self.sched = …), then it is saved and goes on in a resumed fit",
                    stacklevel=2,
                )
        found = [(cb, names) for cb, before in self._watched if (names := changed(before, looks(cb)))]
        if found:
            self._watched = []
            which = "; ".join(f"{type(cb).__name__} ({', '.join(names)})" for cb, names in found)
            warnings.warn(
                f"the checkpoint does not hold what these callbacks change as they go: {which}. A resumed fit begins "
                f"them anew. Define state_dict and load_state_dict in their classes; a state_dict that returns {{}} "
                f"says that this is well",
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


class SaveBest(Callback):
    """Keeps the weights of the best epoch in one file: `model.load_state_dict(torch.load(path, weights_only=True))`.

    - `path`: the file, written whole; folders that are missing are made. An old one stays until the first epoch ends. A
      relative path is one from where the program is when this is made.
    - `monitor`: the name of an average such as "valid_loss" (default) or of a metric (that of validation).
    - `mode`: "min" or "max", whether it should fall or rise; needed unless its name ends in `loss` or `accuracy`.

    `.best` is the best value so far, None before there is one, `.best_epoch` the number of its epoch in its fit, from 0.
    Further fits of the same model count on: only a better epoch replaces the file, as long as it is there. With another
    model, and in another process that does not resume, the search begins anew.

    Under `EMA` the averages are saved, with validation and without. Of a model that `torch.compile` has wrapped, the
    names are those of the model inside: load them into that one. An epoch of NaN is never the best. A file that cannot
    be written (OSError) ends the fit; the one before stays. To go on with training, use `Checkpoint`.
    """

    def __init__(self, path="best.pt", monitor="valid_loss", mode=None):
        self.path, self.monitor = Path(path).absolute(), Monitor(monitor, mode, "SaveBest")
        self.best = self.best_epoch = self._model = None

    def begin_fit(self):
        if self.path.is_dir():
            raise IsADirectoryError(f"SaveBest needs a file; got the folder {self.path}: add a name, best.pt")
        model = self.run.learn.model
        if self._model is None or self._model() is not model or not self.path.exists():
            self.best, self.best_epoch, self._model = None, None, weakref.ref(model)
        self.monitor.begin(self.run)

    def after_epoch(self):
        value = self.monitor.value(self.run)
        if self.monitor.better(value, self.best):
            if _rank() == 0:
                averaged = self.run.averaged  # by EMA
                weights = plain_state_dict(self.run.learn.model) if averaged is None else averaged()
                file = io.BytesIO()
                torch.save({name: _on_host(v) for name, v in weights.items()}, file)
                write_whole(self.path, file.getvalue())
            self.best, self.best_epoch = value, self.run.epoch

    def state_dict(self):
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state):
        self.best, self.best_epoch = state["best"], state["best_epoch"]

    def __getstate__(self):
        return {**super().__getstate__(), "_model": None}  # a copy is for another run

    def __repr__(self):
        return f"SaveBest({str(self.path)!r}, {self.monitor.name!r}, {self.monitor.mode!r})"


def _on_host(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _rank() -> int:
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _handle(handler):
    """Take over Ctrl-C where it has Python's own meaning; the handler, or None where it is somebody else's."""
    if threading.current_thread() is not threading.main_thread():
        return None
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return None
    signal.signal(signal.SIGINT, handler)
    return handler
