"""The loop: `fit`, `_all_epochs`, `_all_batches`, `_one_batch`, `update`; each calls the next."""

from __future__ import annotations

import contextlib
import math
import numbers
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrbn.util import suggestion, whole

from . import optimiser
from . import predict as prediction
from . import resume as resuming
from .batch import length
from .callback import RUN_STATE, SIGNALS, Callback, TrainEvalCallback
from .events import EVENTS, CancelBatchException, CancelEpochException, CancelTrainException
from .learner import Learner, check_instances, summary
from .parts import Parts
from .passes import Passes
from .predict import Predictions
from .unpack import Unpack

if TYPE_CHECKING:
    from fastrbn.summary import Summary

_SCOPES: dict[str, tuple[type[Exception], str | None]] = {  # what cancels each, and the next smaller one
    "batch": (CancelBatchException, None),
    "epoch": (CancelEpochException, "batch"),
    "train": (CancelTrainException, "epoch"),
}


class Runner:
    """Run training: `run.fit(epochs, learn)` fires the events of `Callback` around each step.

    Every callback is reachable by its name: `run.recorder`, a second one as `run.recorder_2`. During a fit the run
    holds `learn model opt loss_func data epochs max_steps epoch n_epochs n_iter iter iters dl xb yb pred loss in_train
    logger stop_reason`. Callbacks may replace `model opt loss_func data logger`; they are put back after the fit.

    `stop_reason` is None after a fit that ran to its end, otherwise a sentence. `resumed_from` is the checkpoint that
    the fit continued from, or None.

    To stop something, a callback raises one of the `Cancel…Exception`s. Unlike in the course's notebook 04, `return
    True` and `run.stop = True` do not end the fit; a warning says so.

    Parameters
    ----------
    cbs : callback, or list of callbacks, optional
    cb_funcs : callable, or list of callables, optional
        Each makes a callback (a class, a `partial`), as in the course. Either parameter takes both kinds.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn)
    >>> run = Runner([Recorder, AvgStatsCallback(accuracy)])
    >>> run.logger = lambda line: None  # otherwise: print
    >>> run.fit(1, learn)
    >>> len(run.recorder.losses)
    16

    References
    ----------
    fast.ai course, part 2 (2019), notebooks 04 and 09b.
    """

    _outside = False  # True in the copy of a run that validates or predicts outside a fit
    _missing: str | None = None  # in an event that `_every` fires: what there is none of to cancel

    def __init__(self, cbs: Any = None, cb_funcs: Any = None):
        self.cbs: list[Callback] = []
        self.__dict__.update(RUN_STATE)
        self._fitting = self._warned = False
        self._parts = Parts()
        self._passes = Passes(self)
        made = [_make(cb) for cb in (*_as_list(cbs), *_as_list(cb_funcs))]
        if not any(isinstance(cb, TrainEvalCallback) for cb in made):
            made.insert(0, TrainEvalCallback())
        self.add_cbs(made)

    def add_cbs(self, cbs: Any) -> None:
        """Attach callbacks, or callables that make them. Those added during a fit take part from the next one on."""
        for cb in [_make(cb) for cb in _as_list(cbs)]:
            cb.set_runner(self)
            setattr(self, self._free_name(cb), cb)
            self.cbs.append(cb)
        self.cbs.sort(key=lambda cb: cb._order)
        if not self._fitting:
            self._handlers = self._resolve()

    def remove_cbs(self, cbs: Any) -> None:
        """Remove callbacks; those removed during a fit take part until its end. ValueError if one is not attached."""
        for cb in _as_list(cbs):
            if not any(cb is known for known in self.cbs):
                raise ValueError(f"only a callback of this run can be removed; {cb!r} is not among {self.cbs}")
            self.cbs = [known for known in self.cbs if known is not cb]
            for name in [name for name, value in vars(self).items() if value is cb]:
                delattr(self, name)
        if not self._fitting:
            self._handlers = self._resolve()

    def claim(self, owner: Callback, **functions: Callable[..., Any]) -> None:
        """Take over parts of the step for the current fit. A callback calls it in `begin_fit`.

        Events stay as they are. RuntimeError if another callback has claimed the part already.

        Parameters
        ----------
        owner : Callback
            The callback that calls; errors name it.
        forward : callable, optional
            `forward(function, *args)` calls the model with the batch, and the loss function with `pred` and `yb`.
        weigh : callable, optional
            `weigh(loss)` returns the loss to differentiate; `run.loss` stays as it is. Callbacks of several classes may
            claim it; they are called one after the other.
        backward : callable, optional
            `backward(loss)` leaves gradients in the parameters.
        step : callable, optional
            `step(opt)` moves the parameters.
        """
        if not self._fitting:
            raise RuntimeError(
                f"parts of the step can be claimed only during a fit; {owner!r} claims them outside one: call claim in "
                f"begin_fit"
            )
        self._parts.claim(type(owner).__name__, functions)

    @property
    def pct_train(self) -> float:
        """The share of the fit's training that is done, 0 to 1; schedules follow it.

        By epochs (`n_epochs`) or by `max_steps`, whichever ends the fit first.
        """
        by_epochs = (self.n_epochs or 0.0) / (self._passes.limit or 1)
        return by_epochs if self.max_steps is None else max(by_epochs, self.n_iter / (self.max_steps or 1))

    def fit(
        self,
        epochs: int | None = None,
        learn: Learner | None = None,
        resume: str | Path | None = None,
        max_steps: int | None = None,
        validate_every: int | None = None,
    ) -> None:
        """Train for `epochs` passes over `learn.data.train_dl`, or for `max_steps` batches.

        `after_fit` fires once for every callback, whatever happens; an error is raised again after it. Ctrl-C ends the
        fit without an error, and `stop_reason` says so.

        Parameters
        ----------
        epochs : int, optional
            0 or more; a resumed fit counts from the very beginning. None if `max_steps` is the length.
        learn : Learner, optional
            By default the one trained last.
        resume : path, optional
            A checkpoint, or a folder that `Checkpoint` wrote (the newest whole file is used). The fit continues from
            there; make `learn` and callbacks as they were made for the fit that wrote it.
        max_steps : int, optional
            End the fit after this many training batches in all, within a pass too. The last, shorter epoch is validated
            as usual, and schedules reach their end. With both `epochs` and `max_steps`, whichever comes first ends the
            fit. With `GradientAccumulation(n)` an optimiser step takes `n` batches.
        validate_every : int, optional
            Validate after every `validate_every` training batches and at the end, instead of after each pass. That
            number of batches is then an epoch for events, `run.epoch`, history and callbacks: averages, `Checkpoint`,
            `SaveBest`, loggers, and the patience of `EarlyStopping` count by it. The model is trained on the same
            batches as without it.

        Raises
        ------
        ValueError
            If a number is out of range, there is neither `epochs` nor `max_steps`, or the loader has no length, which
            `epochs` with `validate_every` needs.
        CheckpointError
            If the checkpoint cannot be read, or belongs to another model or optimiser.
        RuntimeError
            If a fit of this run is under way, or the loader has no batches left to reach `max_steps`.

        Examples
        --------
        >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[AvgStatsCallback])   # 16 batches a pass
        >>> run.logger = lambda line: None
        >>> run.fit(None, learn, max_steps=40, validate_every=10)
        >>> run.n_iter, len(run.avg_stats.history)
        (40, 4)
        """
        self._prepare(epochs, learn, resume, max_steps, validate_every)
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

    def validate(self, data: Any = None, learn: Learner | None = None) -> dict[str, Any]:
        """Measure loss and metrics over a loader, as the validation of a fit does, and return them.

        The model is in evaluation mode and without gradients; afterwards modes and random states are as before. The
        callbacks that transform batches take part, see `Callback`; none records or prints. The weights are those that
        the model holds: after a fit with `EMA` the trained ones, unless `run.ema.put()` or `EMA(keep=True)` replaced
        them. In several processes each one measures all that its loader yields.

        Parameters
        ----------
        data : loader, DataBunch, Dataset or (x, y), optional
            As for `predict`. Default: the validation data of `learn`.
        learn : Learner, optional
            By default the one trained last.

        Returns
        -------
        dict
            `loss`, averaged over samples, and each metric of the run's AvgStatsCallback by its name: a float, or what a
            metric of several numbers computes. Objects that accumulate, such as a ConfusionMatrix, hold this validation
            afterwards.

        Raises
        ------
        RuntimeError
            Inside a fit of this run; if model and batch are on different devices.
        ValueError
            If there is no validation data or no batch.

        Examples
        --------
        >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(AvgStatsCallback, accuracy)])
        >>> sorted(run.validate(learn=learn))
        ['accuracy', 'loss']
        """
        return prediction.validate(self, data, learn)

    def predict(
        self, data: Any = None, learn: Learner | None = None, *, losses: bool = False, tta: Any = None
    ) -> Predictions:
        """Return the model's outputs for a loader, data set or tensor, with the targets if there are any.

        As in `validate`, the run's callbacks prepare the batches, and the run stays as it is. A loader is used as it
        is; one that shuffles gives its own order, with a warning.

        Parameters
        ----------
        data : loader, DataBunch, Dataset, Tensor, array, tuple or dict, optional
            A DataBunch means its validation loader, as the default does for `learn.data`. Floats in a tensor or array,
            and a tuple or dictionary, are a batch of any size, as the learner's loaders yield it. Bytes (uint8), and
            what is in a Dataset, are converted as the validation loader converts its own data, if that is a
            `BatchLoader`. Samples are along dimension 0.
        learn : Learner, optional
            By default the one trained last.
        losses : bool, default False
            Also return the loss of each sample. A loss function that has no `reduction` is called sample by sample.
        tta : str, callable or list of these, optional
            Test-time augmentation: "hflip" and "vflip" mirror images, a function takes and returns the inputs `xb`
            after callbacks have prepared them. Outputs (N,) or (N, C) of all versions and of the batch itself are
            averaged. They are averaged as they are, so that logits remain logits and no guess about them is needed; for
            logits this is the geometric mean of the probabilities.

        Returns
        -------
        Predictions
            A named tuple of `preds`, `targets` and `losses`, on the CPU.

        Raises
        ------
        RuntimeError
            Inside a fit of this run; if model and batch are on different devices; if a callback cancels a batch.
        ValueError
            If there is no batch; if an output does not have one row for each sample, as with a single sample in place
            of a batch.
        TypeError
            If `data` is something else.

        Examples
        --------
        >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn)
        >>> run.fit(1, learn)
        >>> preds, targets, _ = run.predict()
        >>> preds.shape == (len(targets), 10)
        True
        >>> xb, yb = next(iter(data.valid_dl))
        >>> torch.equal(run.predict(xb).preds, preds[: len(xb)])
        True
        >>> run.predict(data.valid_ds, losses=True, tta="hflip").losses.shape == targets.shape
        True

        References
        ----------
        fastai's `Learner.get_preds` and `Learner.tta`.
        """
        return prediction.predict(self, data, learn, losses, tta)

    def _all_epochs(self) -> None:
        self._every("epoch", "begin_fit")
        optimiser.check_closure(self.opt, self._parts.claims)
        for self.epoch in self._passes.epochs():
            self._scope("epoch", self._all_batches, "begin_epoch", self.data.train_dl)
            if self.data.valid_dl is not None:
                with torch.no_grad():
                    self._scope("epoch", self._all_batches, "begin_validate", self.data.valid_dl)
            self._every("epoch", "after_epoch")

    def _all_batches(self, begin: str, dl: Any) -> None:
        self.iters = self._passes.iters(dl) if begin == "begin_epoch" else length(dl)
        self.dl, self.iter = dl, None
        self._every("batch", begin)
        for self.iter, batch in self._passes.batches(dl):
            try:
                self._scope("batch", self._one_batch, batch)
            except (CancelEpochException, CancelTrainException) as e:
                self._every("epoch" if isinstance(e, CancelTrainException) else "batch", "after_batch")
                raise
            self._every("batch", "after_batch")
            if self.__dict__.get("stop") is True:
                self._warn_of_stop("run.stop = True")

    def _one_batch(self, batch: Any) -> None:
        fire, parts, unpack = self.__call__, self._parts, self._unpack  # self(event) takes twice as long
        self.xb, self.yb = unpack(batch)
        fire("begin_batch")
        self.pred = unpack.call_model(self.model, self.xb, parts.forward)
        fire("after_pred")
        self.loss = unpack.call_loss(self.loss_func, self.pred, self.yb, parts.forward)
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

    def _scope(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        """Return the result of the call. A cancel of `what` ("batch", "epoch", "train"), or of less, ends the call and
        nothing else; the matching after_cancel event follows, in which a further cancel of the same has nothing left to
        end."""
        cancel, less = _SCOPES[what]
        try:
            return call(*args) if less is None else self._scope(less, call, *args)
        except cancel:
            with contextlib.suppress(cancel):
                self(f"after_cancel_{what}") if less is None else self._scope(less, self, f"after_cancel_{what}")

    def _every(self, what: str, event: str) -> None:
        """Fire an event in which there is no `what` to cancel: such a cancel ends its own handler, not the others."""
        self._missing = what  # not an argument: subclasses override `__call__(event)`
        self(event)
        self._missing = None

    def state_dict(self, phase: str) -> dict[str, Any]:
        """All that the rest of the fit depends on, as plain data (`torch.load(…, weights_only=True)` reads it).

        Parameters
        ----------
        phase : str
            Where the fit is: "train" in `after_batch`, "valid" in `begin_validate` (all training batches are done),
            "end" in `after_epoch`. Between these a step is half done, and its state cannot be resumed.

        Returns
        -------
        dict
            Its tensors are the model's own, not copies.
        """
        return resuming.collect(self, phase)

    def summary(self, xb: Any = None, learn: Learner | None = None) -> Summary:
        """`Learner.summary`, with the first batch prepared by the callbacks that need no fit for it.

        Parameters
        ----------
        xb : optional
            A batch as the model takes it; by default the first of the training data, transformed by callbacks such as
            BatchTransformXCallback.
        learn : Learner, optional
            By default the one trained last.

        Returns
        -------
        Summary
        """
        learn = self.learn if learn is None else learn
        if learn is None:
            raise TypeError("this run has not trained yet: name the learner, run.summary(learn=learn)")
        return summary(learn, xb, self.cbs)

    def __call__(self, event: str) -> None:
        """Call the event's handlers in order. One dict lookup if nobody handles it."""
        missing, self._missing = self._missing, None  # a handler may fire other events
        try:
            for handler in self._handlers[event]:
                if (handler() if missing is None else self._scope(missing, handler)) is True:
                    self._warn_of_stop(f"return True in {_owner(handler)}.{event}")
        except CancelTrainException as e:
            if self.stop_reason is None:
                self.stop_reason = str(e) or f"cancelled by {_owner(handler)} in {event}"
            raise

    def _warn_of_stop(self, how: str) -> None:
        """Warn, once a fit, of what ends other loops but not this one."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{how} ends nothing: to end the fit a callback raises CancelTrainException, to end the epoch "
                f"CancelEpochException, to skip the rest of the batch CancelBatchException",
                stacklevel=2,
            )

    def _prepare(
        self,
        epochs: int | None,
        learn: Any,
        resume: str | Path | None,
        max_steps: int | None = None,
        validate_every: int | None = None,
    ) -> None:
        if self._fitting:
            raise RuntimeError("fit was called inside a fit: a run does one at a time; make a second Runner for it")
        if epochs is not None or max_steps is None:
            epochs = whole("epochs", epochs, 0)
        max_steps = None if max_steps is None else whole("max_steps", max_steps)
        every = None if validate_every is None else whole("validate_every", validate_every)
        learn = self.learn if learn is None else learn
        missing = [a for a in ("model", "opt", "loss_func", "data") if not hasattr(learn, a)]
        if missing:
            raise TypeError(
                f"fit needs a Learner (it has model, opt, loss_func and data); got {type(learn).__name__} without "
                f"{', '.join(missing)}: write run.fit(epochs, learn)"
            )
        check_instances(learn.model, learn.opt, learn.loss_func)
        optimiser.check(
            learn.opt, {"the loop": ("step", "zero_grad"), **{_owner(cb): cb._needs_opt for cb in self.cbs}}
        )
        self._unpack = Unpack.of(learn)
        self.__dict__.update(RUN_STATE, logger=self.logger, epochs=math.inf if epochs is None else epochs, learn=learn)
        self.model, self.opt, self.loss_func, self.data = learn.model, learn.opt, learn.loss_func, learn.data
        self.epoch, self.n_iter, self.n_epochs, self.loss = 0, 0, 0.0, torch.tensor(0.0)
        self._lent = {name: getattr(self, name) for name in ("model", "opt", "loss_func", "data", "logger")}
        self._warned = False
        self._parts.reset()
        for cb in self.cbs:
            cb.set_runner(self)  # it may have been in another run since
        self._handlers = self._resolve()
        self._passes = Passes(self, epochs, max_steps, every)
        self._passes.plan()
        if resume is not None:
            self.resumed_from, self._passes.state = resuming.find(resume, self)
        self.opt.zero_grad()  # an earlier fit may have ended between backward and step
        self._fitting = True

    def _finish(self, failed: bool) -> None:
        """Fire `after_fit` for every callback, and put back what they replaced. Raise the first error met here, unless
        the fit has `failed`: then its own error is under way."""
        failures: list[BaseException] = []
        for handler in self._handlers["after_fit"]:
            try:
                self._scope("train", handler)
            except BaseException as e:
                failures.append(e)
        self._fitting = self.in_train = False
        self.__dict__.update(self._lent, **SIGNALS)
        self._parts.reset()
        self._passes.close()
        for name in ("pred", "loss"):  # the last batch's graph is not kept
            if isinstance(value := getattr(self, name), torch.Tensor):
                setattr(self, name, value.detach())
        first = None if failed or not failures else failures.pop(0)
        for error in failures:  # only one error can be raised; the others are shown
            print("fastrbn: one more error, in after_fit:", file=sys.stderr)
            traceback.print_exception(type(error), error, error.__traceback__)
        if first is not None:
            self.stop_reason = f"{type(first).__name__} {self._where(first)}: {first}"
            raise first

    def _resolve(self) -> dict[str, tuple[Callable[[], Any], ...]]:
        """The handlers of each event, in order: methods that override the base class's no-op. Callbacks that name the
        event in `_last` come last."""

        def overrides(cb: Callback, event: str) -> bool:
            if self._outside and event not in cb._outside_fit:
                return False
            return event in vars(cb) or getattr(type(cb), event) is not getattr(Callback, event)

        ordered = {e: sorted(self.cbs, key=lambda cb: e in cb._last) for e in EVENTS}  # noqa: B023
        return {e: tuple(getattr(cb, e) for cb in ordered[e] if overrides(cb, e)) for e in EVENTS}

    def _free_name(self, cb: Callback) -> str:
        name = cb.name
        if name in RUN_STATE or hasattr(type(self), name):
            raise ValueError(f"the name `{name}` is reserved on Runner; rename the class {type(cb).__name__}")
        taken, n = name, 1
        while taken in vars(self):
            n += 1
            taken = f"{name}_{n}"
        return taken

    def _where(self, error: BaseException | None = None) -> str:
        """In words: the callback that an error came from, phase, epoch, batch."""
        place = "in training" if self.in_train else "in validation"
        if self.iter is None:
            place = "before the first batch" if self.dl is None else f"{place} before its first batch"
        else:
            place = f"{place}, epoch {self.epoch}, batch {self.iter}"
        for frame, _ in traceback.walk_tb(error.__traceback__ if error else None):
            owner = frame.f_locals.get("self")
            if frame.f_code.co_name in EVENTS and isinstance(owner, Callback):
                return f"in {_owner(owner)}.{frame.f_code.co_name}, {place}"
        return place

    def __getattr__(self, name: str) -> Any:
        hint = "" if name.startswith("_") else suggestion(name, vars(self))
        raise AttributeError(f"the run has no attribute '{name}', and no callback of that name.{hint}")

    def __repr__(self) -> str:
        return f"Runner([{', '.join(map(_owner, self.cbs))}])"


def _owner(handler: Any) -> str:
    """The class name of a callback, or of a handler's callback."""
    return type(getattr(handler, "__self__", handler)).__name__


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _make(cb: Any) -> Callback:
    made = cb() if callable(cb) and not isinstance(cb, Callback) else cb
    if not isinstance(made, Callback):
        raise TypeError(f"callbacks derive from fastrbn.Callback; got {made!r} of type {type(made).__name__}")
    if not isinstance(made._order, numbers.Real):
        raise TypeError(
            f"a callback's _order must be a number: callbacks run in ascending order of it; {type(made).__name__} has "
            f"_order = {made._order!r}"
        )
    return made
