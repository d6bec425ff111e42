"""The loop."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastrbn.util import suggestion

from . import optimiser
from . import resume as resuming
from .batch import length, pair
from .callback import RUN_STATE, SIGNALS, Callback, TrainEvalCallback
from .events import EVENTS, CancelBatchException, CancelEpochException, CancelTrainException
from .learner import Learner, check_instances, summary
from .parts import Parts

_SCOPES: dict[str, tuple[type[Exception], str | None]] = {  # what cancels each, and the next smaller one
    "batch": (CancelBatchException, None),
    "epoch": (CancelEpochException, "batch"),
    "train": (CancelTrainException, "epoch"),
}
_LENT = ("model", "opt", "loss_func", "data", "logger")  # callbacks may replace these for the length of a fit


class Runner:
    """Runs training: `run.fit(epochs, learn)` fires the events of `Callback` around each step.

    - `cbs`: callbacks; `cb_funcs`: callables that make one each (classes, `partial`s), as the course has it. Either
      takes both.
    - Every callback is reachable as `run.<name>` (`run.recorder`, a second one as `run.recorder_2`).
    - During a fit the run holds `learn model opt loss_func data epochs epoch n_epochs n_iter iter iters dl xb yb pred
      loss in_train logger stop_reason`. What callbacks replace of `model opt loss_func data logger` is put back after.
    - `stop_reason`: None after a fit that ran to its end, else a sentence.
    - `resumed_from`: the checkpoint that the fit goes on from, None if it begins anew.

    Source: fast.ai course, part 2 (2019), notebooks 04 and 09b. Unlike in 04, `return True` from a handler and
    `run.stop = True` end nothing (a warning says so): what a callback wants to stop, it stops by a `Cancel…Exception`.
    """

    def __init__(self, cbs=None, cb_funcs=None):
        self.__dict__.update(RUN_STATE, cbs=[], _fitting=False)
        self._parts = Parts()
        made = [_make(cb) for cb in (*_as_list(cbs), *_as_list(cb_funcs))]
        if not any(isinstance(cb, TrainEvalCallback) for cb in made):
            made.insert(0, TrainEvalCallback())
        self.add_cbs(made)

    def add_cbs(self, cbs) -> None:
        """Attach callbacks (or callables that make them). Added during a fit, they take part from the next one on."""
        for cb in map(_make, _as_list(cbs)):
            cb.set_runner(self)
            setattr(self, self._free_name(cb), cb)
            self.cbs.append(cb)
        self.cbs.sort(key=lambda cb: cb._order)
        if not self._fitting:
            self._handlers = self._resolve()

    def remove_cbs(self, cbs) -> None:
        """Take callbacks off again; during a fit, they take part until its end. ValueError for one that is not here."""
        for cb in _as_list(cbs):
            if not any(cb is known for known in self.cbs):
                raise ValueError(f"only a callback of this run can be removed; {cb!r} is none of {self.cbs}")
            self.cbs = [known for known in self.cbs if known is not cb]
            for name in [name for name, value in vars(self).items() if value is cb]:
                delattr(self, name)
        if not self._fitting:
            self._handlers = self._resolve()

    def claim(self, owner, **functions) -> None:
        """Take over parts of the step, for the fit that is under way; called in `begin_fit` by the callback `owner`.

        - `forward(function, *args)`: calls the model with the batch, and the loss function with `pred` and `yb`.
        - `weigh(loss)`: returns the loss to differentiate; `run.loss` stays as it is. Those of several classes are
          called one after the other.
        - `backward(loss)`: leaves gradients in the parameters.
        - `step(opt)`: moves the parameters.

        Events come as ever. RuntimeError when another callback has one of them.
        """
        if not self._fitting:
            raise RuntimeError(f"parts of the step are claimed for a fit, in begin_fit; {owner!r} claims outside one")
        self._parts.claim(type(owner).__name__, functions)

    def fit(self, epochs: int, learn: Learner | None = None, resume: str | Path | None = None) -> None:
        """Train for `epochs` passes over `learn.data.train_dl`.

        `after_fit` fires once for every callback, whatever happens; an error is raised again after it. Ctrl-C ends the
        fit without an error, and `stop_reason` says so.

        Parameters
        ----------
        epochs : int
            0 or more; in a resumed fit counted from the very beginning.
        learn : Learner, optional
            By default the one trained last.
        resume : path, optional
            A checkpoint, or a folder that `Checkpoint` wrote (the newest whole file is used). The fit goes on from
            there; make `learn` and callbacks as they were made for the fit that wrote it.

        Raises
        ------
        CheckpointError
            If the checkpoint cannot be read, or belongs to another model or optimiser.
        RuntimeError
            If a fit of this run is under way.
        """
        self._prepare(epochs, learn, resume)
        failed = False
        try:
            self._scope("train", self._all_epochs)
        except KeyboardInterrupt:
            self.stop_reason = f"interrupted (Ctrl-C) {self._where()}"
        except BaseException as e:
            failed, self.stop_reason = True, f"{type(e).__name__} {self._where(e)}: {e}"
            raise
        finally:
            self._finish(failed)

    def _all_epochs(self) -> None:
        self._scope("epoch", self, "begin_fit")
        for self.epoch in self._resume.epochs():
            self._scope("epoch", self._all_batches, "begin_epoch", self.data.train_dl)
            if self.data.valid_dl is not None:
                with torch.no_grad():
                    self._scope("epoch", self._all_batches, "begin_validate", self.data.valid_dl)
            self._scope("epoch", self, "after_epoch")

    def _all_batches(self, begin: str, dl: Any) -> None:
        self.dl, self.iters, self.iter = dl, length(dl), None
        self._scope("batch", self, begin)
        for self.iter, batch in self._resume.batches(dl):
            try:
                self._scope("batch", self._one_batch, batch)
            except (CancelEpochException, CancelTrainException) as e:
                self._scope("epoch" if isinstance(e, CancelTrainException) else "batch", self, "after_batch")
                raise
            self._scope("batch", self, "after_batch")
            if self.__dict__.get("stop") is True:
                self._warn_of_stop("run.stop = True")

    def _one_batch(self, batch: Any) -> None:
        fire, parts = self.__call__, self._parts  # self(event) takes twice as long
        self.xb, self.yb = pair(batch)
        fire("begin_batch")
        self.pred = parts.forward(self.model, self.xb)
        fire("after_pred")
        self.loss = parts.forward(self.loss_func, self.pred, self.yb)
        fire("after_loss")
        if self.in_train:
            parts.backward(parts.weigh(self.loss))
            self.update()

    def update(self) -> None:
        """The second half of a training step: from gradients to new parameters.

        A callback that has held gradients back calls it when there is no batch left to do so.
        """
        fire = self.__call__
        fire("after_backward")
        self._parts.step(self.opt)
        fire("after_step")
        self.opt.zero_grad()

    def _scope(self, what: str, call: Callable[..., None], *args: Any) -> None:
        """Call it. A cancel of `what` ("batch", "epoch", "train"), or of less, ends the call and nothing else; the
        matching after_cancel event follows, in which a further cancel of the same has nothing left to end."""
        cancel, less = _SCOPES[what]
        try:
            call(*args) if less is None else self._scope(less, call, *args)
        except cancel:
            with contextlib.suppress(cancel):
                self(f"after_cancel_{what}") if less is None else self._scope(less, self, f"after_cancel_{what}")

    def state_dict(self, phase: str) -> dict:
        """All that the rest of the fit depends on, in plain data (`torch.load(…, weights_only=True)` reads it back).

        `phase`: where the fit is: "train" in `after_batch`, "valid" in `begin_validate` (training batches are done,
        however many), "end" in `after_epoch`. Between these a step is half done, and its state not one to go on from.
        """
        return resuming.collect(self, phase)

    def summary(self, xb=None, learn=None):
        """`Learner.summary` of `learn` (default: the one trained last), whose batch goes through those callbacks first
        that change batches and need no fit for it, such as BatchTransformXCallback."""
        learn = self.learn if learn is None else learn
        if learn is None:
            raise TypeError("this run has not trained yet: say what to look at, run.summary(learn=learn)")
        return summary(learn, xb, self.cbs)

    def __call__(self, event: str) -> None:
        """Fire `event`: its handlers in order. An event nobody overrides costs a look into a dictionary."""
        try:
            for handler in self._handlers[event]:
                if handler() is True:
                    owner = getattr(handler, "__self__", handler)
                    self._warn_of_stop(f"return True in {type(owner).__name__}.{event}")
        except CancelTrainException as e:
            if self.stop_reason is None:
                owner = getattr(handler, "__self__", handler)  # a function set on an instance has no owner
                self.stop_reason = str(e) or f"cancelled by {type(owner).__name__} in {event}"
            raise

    def _warn_of_stop(self, how) -> None:
        """Warn, once a fit, of the ways in which other loops are ended."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{how} ends nothing: to end the fit a callback raises CancelTrainException, to end the epoch "
                f"CancelEpochException, to leave the batch CancelBatchException",
                stacklevel=2,
            )

    def _prepare(self, epochs, learn, resume) -> None:
        if self._fitting:
            raise RuntimeError("fit was called inside a fit: a run does one at a time; make a second Runner for it")
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise ValueError(f"epochs must be a whole number, 0 or more; got {epochs!r}")
        learn = self.learn if learn is None else learn
        missing = [a for a in ("model", "opt", "loss_func", "data") if not hasattr(learn, a)]
        if missing:
            raise TypeError(
                f"fit needs a Learner (it has model, opt, loss_func and data); got {type(learn).__name__} without "
                f"{', '.join(missing)}: write run.fit(epochs, learn)"
            )
        check_instances(learn.model, learn.opt, learn.loss_func)
        loop = {"the loop": ("step", "zero_grad")}
        optimiser.check(learn.opt, {**loop, **{type(cb).__name__: cb._needs_opt for cb in self.cbs}})
        self.__dict__.update(RUN_STATE, logger=self.logger, epochs=epochs, learn=learn, _warned=False)
        self.model, self.opt, self.loss_func, self.data = learn.model, learn.opt, learn.loss_func, learn.data
        self.epoch, self.n_iter, self.n_epochs, self.loss = 0, 0, 0.0, torch.tensor(0.0)
        self._borrowed = {name: getattr(self, name) for name in _LENT}
        self._parts.reset()
        for cb in self.cbs:
            cb.set_runner(self)  # a callback may have been in another run since
        self._handlers = self._resolve()
        self.resumed_from, state = (None, None) if resume is None else resuming.find(resume, self)
        self._resume = resuming.Resume(self, state)
        self.opt.zero_grad()  # an earlier fit may have been cut between backward and step
        self._fitting = True

    def _finish(self, failed: bool) -> None:
        """Fire `after_fit` for every callback, whatever the others do, and put back what was lent; raise the first
        error met here, unless the fit has `failed` and its own error is on the way."""
        failures = []
        for handler in self._handlers["after_fit"]:
            try:
                self._scope("train", handler)  # a cancel has its event, and nothing to end
            except BaseException as e:
                failures.append(e)
        self._fitting = self.in_train = False
        self.__dict__.update(self._borrowed, **SIGNALS)
        self._parts.reset()
        for name in ("pred", "loss"):  # the last batch's graph is not kept
            if isinstance(value := getattr(self, name), torch.Tensor):
                setattr(self, name, value.detach())
        first = None if failed or not failures else failures.pop(0)
        for e in failures:  # only one error can be raised; the others are shown
            print("fastrbn: one more error, in after_fit:", file=sys.stderr)
            traceback.print_exception(type(e), e, e.__traceback__)
        if first is not None:
            self.stop_reason = f"{type(first).__name__} {self._where(first)}: {first}"
            raise first

    def _resolve(self) -> dict[str, tuple]:
        """The handlers of each event, in order, and after them those of callbacks that want to be last in it: only
        methods that are not the base class's no-op."""

        def overrides(cb, event):
            return event in vars(cb) or getattr(type(cb), event) is not getattr(Callback, event)

        ordered = {e: sorted(self.cbs, key=lambda cb: e in cb._last) for e in EVENTS}  # noqa: B023
        return {e: tuple(getattr(cb, e) for cb in ordered[e] if overrides(cb, e)) for e in EVENTS}

    def _free_name(self, cb) -> str:
        name = cb.name
        if name in RUN_STATE or hasattr(type(self), name):
            raise ValueError(
                f"a callback named {type(cb).__name__} would be run.{name}, which is the run's own: rename the class"
            )
        taken, n = name, 1
        while taken in vars(self):
            n += 1
            taken = f"{name}_{n}"
        return taken

    def _where(self, error=None) -> str:
        """In words: the callback an error came from, phase, epoch, batch."""
        place = "in training" if self.in_train else "in validation"
        if self.iter is None:
            place = "before the first batch" if self.dl is None else f"{place} before its first batch"
        else:
            place = f"{place}, epoch {self.epoch}, batch {self.iter}"
        for frame, _ in traceback.walk_tb(error.__traceback__ if error else None):
            owner = frame.f_locals.get("self")
            if frame.f_code.co_name in EVENTS and isinstance(owner, Callback):
                return f"in {type(owner).__name__}.{frame.f_code.co_name}, {place}"
        return place

    def __getattr__(self, name):
        hint = "" if name.startswith("_") else suggestion(name, vars(self))
        raise AttributeError(f"the run has no attribute '{name}', and no callback of that name.{hint}")

    def __repr__(self):
        return f"Runner([{', '.join(type(cb).__name__ for cb in self.cbs)}])"


def _as_list(value) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _make(cb) -> Callback:
    made = cb() if callable(cb) and not isinstance(cb, Callback) else cb
    if not isinstance(made, Callback):
        raise TypeError(f"callbacks derive from fastrbn.Callback; got {made!r} of type {type(made).__name__}")
    return made
