"""Callback: how to change training without touching the loop. TrainEvalCallback: the one that every run has."""

from __future__ import annotations

import copy
import re
import weakref
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from fastrbn.util import suggestion

from .events import EVENTS, nearest_event

# What callbacks tell one another during a fit, with the values that hold outside one.
SIGNALS: dict[str, Any] = {
    "samples": None,  # samples in the batch over all processes; set by Distributed, which has one share of them
    "accumulating": False,  # more batches add to this one's gradients before the step; set in begin_batch
    "apart": False,  # gradients have been added up in each process alone, not yet over all; set by Distributed
    "averaged": None,  # a function that returns the averaged weights, which SaveBest saves; set by EMA
}
# All that the run holds, with the values of a new Runner. A callback reads these as its own attributes, and writes
# them as `self.run.loss = …`: `self.loss = …` would only hide the run's, and raises.
RUN_STATE: dict[str, Any] = {
    **dict.fromkeys(("learn", "model", "opt", "loss_func", "data")),  # what is trained
    **dict.fromkeys(("epochs", "max_steps")),  # the length of the fit
    **dict.fromkeys(("epoch", "n_epochs", "n_iter", "iter", "iters", "dl")),  # the position in it
    **dict.fromkeys(("xb", "yb", "pred", "loss")),  # the batch
    "in_train": False,
    "logger": print,
    "stop_reason": None,
    "resumed_from": None,
    **SIGNALS,
}

_VALIDATED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # in evaluation mode only because of a validation


def camel2snake(name: str) -> str:
    """Convert a class name to snake case.

    Parameters
    ----------
    name : str

    Returns
    -------
    str

    Examples
    --------
    >>> camel2snake("AvgStatsCallback"), camel2snake("LR_Find")
    ('avg_stats_callback', 'lr_find')

    References
    ----------
    fast.ai course, part 2 (2019), notebook 04.
    """
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()


class Callback:
    """Base of all callbacks: override the events you need.

    - `_order` (int, default 0): callbacks run by ascending `_order`, equal ones in the order in which they were given.
      In the events that `_last` names, a callback runs after all others. `fastrbn.callbacks.ORDER` lists the package's
      own.
    - `_outside_fit` (set of events, default `begin_batch` and `after_pred`): the events in which a callback takes part
      in `run.validate` and `run.predict`. Your callback that transforms batches or predictions therefore does so there
      too; anything that counts or records in these two events sets `_outside_fit = frozenset()`. There a copy of the
      callback runs, with `in_train` False, so that attributes it sets are not changed. `fastrbn.callbacks.OUTSIDE_FIT`
      lists the package's own callbacks that take part.
    - `self.run` is the `Runner`. Attributes that the callback does not have are read from the run, so `self.loss` is
      the run's loss. Writing one of the run's names (`self.loss = …`) raises, because it would only hide the run's.
    - A misspelt event raises when the class is made, with the nearest event.
    - Copies and pickles leave the run behind; attach them to another run.

    Examples
    --------
    >>> class StopEarly(Callback):
    ...     def after_step(self):
    ...         if self.n_iter == 2:
    ...             raise CancelTrainException("three steps are enough")
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[StopEarly])
    >>> run.fit(1, learn)
    >>> run.stop_reason
    'three steps are enough'

    References
    ----------
    fast.ai course, part 2 (2019), notebooks 04, 05b and 09b.
    """

    _order = 0
    _last: frozenset[str] = frozenset()
    _outside_fit: frozenset[str] = frozenset({"begin_batch", "after_pred"})
    _needs_opt: tuple[str, ...] = ()  # what the optimiser must have for this callback, by names of `optimiser.NEEDS`
    _eager: str | None = None  # why steps cannot be replayed as CUDA graphs with this callback, in words

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if name in EVENTS or name.startswith("_") or not callable(value):
                continue
            if near := nearest_event(name):
                raise TypeError(
                    f"{cls.__name__}.{name}: a callback's methods named begin_… and after_… must be events, and "
                    f"'{name}' is not an event, so it would never be called. Did you mean '{near}'? If it is a helper "
                    f"method, rename it, for example to '_{name}'."
                )

    # The events, in the order of a fit. The loop calls only those that are overridden.

    def begin_fit(self) -> None:
        """Once, before everything else: `model`, `data` and `epochs` are known."""

    def begin_epoch(self) -> None:
        """Before the training batches of an epoch (`epoch` counts from 0)."""

    def begin_batch(self) -> None:
        """The batch is in `xb` and `yb`; replace it with `self.run.xb = …`. Also in validation (`in_train`).

        `xb` is a tuple or a dictionary if the model takes several inputs, `yb` None without a target; see `Learner`.
        """

    def after_pred(self) -> None:
        """`pred` holds the model's output; replace it with `self.run.pred = …`."""

    def after_loss(self) -> None:
        """`loss` holds the loss, a tensor on the model's device. In validation, `after_batch` comes next."""

    def after_backward(self) -> None:
        """Gradients are ready, the step is not taken yet: clip or inspect them here."""

    def after_step(self) -> None:
        """Parameters have moved, gradients are still there."""

    def after_batch(self) -> None:
        """The batch is over, even if it was cancelled. In the first handler `n_iter` still is this batch's number."""

    def begin_validate(self) -> None:
        """Before the validation batches, under `torch.no_grad`."""

    def after_epoch(self) -> None:
        """After validation: bring numbers to the host, print and write here."""

    def after_fit(self) -> None:
        """Once, always: after the last epoch, a cancel, an error or Ctrl-C. Undo here what `begin_fit` did."""

    def after_cancel_batch(self) -> None:
        """A `CancelBatchException` was raised; `after_batch` follows."""

    def after_cancel_epoch(self) -> None:
        """A `CancelEpochException` was raised."""

    def after_cancel_train(self) -> None:
        """A `CancelTrainException` was raised; `after_fit` follows."""

    # What a checkpoint keeps of the callback

    def state_dict(self) -> dict[str, Any]:
        """State that the rest of the fit, or its output, depends on: tensors, numbers, strings, and lists, tuples and
        dictionaries of these. Called between steps; copy containers that keep changing.

        By default the states of torch schedulers that are attributes of the callback (`self.sched =
        CosineAnnealingLR(…)`); everything else starts fresh in a resumed fit.
        """
        return {name: _plain_counters(s.state_dict()) for name, s in vars(self).items() if isinstance(s, LRScheduler)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Called in a resumed fit after `begin_fit`, and again after `begin_epoch` if it resumes within an epoch; the
        run's `epoch` and `n_iter` are set after it.
        """
        if type(self).state_dict is not Callback.state_dict:
            return
        for name, saved in state.items():
            scheduler = vars(self).get(name)
            if not isinstance(scheduler, LRScheduler):
                raise ValueError(
                    f"the checkpoint holds the state of the scheduler {type(self).__name__}.{name}, which does not "
                    f"exist here: make it in __init__ or begin_fit"
                )
            scheduler.load_state_dict(copy.deepcopy(saved))

    @property
    def name(self) -> str:
        """The run's attribute that holds this callback: the class name in snake case without a final 'Callback'."""
        name = re.sub(r"Callback$", "", type(self).__name__)
        return camel2snake(name or "callback")

    def set_runner(self, run: Any) -> None:
        """Attach to `run`. The Runner calls this."""
        self.__dict__["run"] = run

    def __getattr__(self, attr: str) -> Any:
        # never ask the run for dunders, or copy and pickle recurse
        cls = type(self).__name__
        if attr.startswith("__"):
            raise AttributeError(f"{cls} has no attribute '{attr}'")
        run = self.__dict__.get("run")
        if run is None:
            raise AttributeError(
                f"{cls} has no attribute '{attr}', and it is not attached to a run: the run's attributes can be read "
                f"once the callback has been given to a Runner (Runner(cbs=[…]) or get_learn_run(…, cbs=[…]))"
            )
        try:
            return getattr(run, attr)
        except AttributeError:
            known = [*vars(self), *(n for n in dir(type(self)) if not n.startswith("__")), *vars(run)]
            raise AttributeError(
                f"neither {cls} nor its run has an attribute '{attr}'.{suggestion(attr, known)}"
            ) from None

    def __setattr__(self, attr: str, value: Any) -> None:
        if attr in RUN_STATE:
            raise AttributeError(
                f"{type(self).__name__} may not set self.{attr}: '{attr}' belongs to the run, and an attribute of "
                f"the callback would hide it. To change the run's, write self.run.{attr} = …; for your own value use "
                f"another name."
            )
        object.__setattr__(self, attr, value)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _plain_counters(value: Any) -> Any:
    """Turn Counters into dictionaries, as checkpoints need: MultiStepLR has its milestones in one and reads both."""
    if isinstance(value, dict):
        return {k: _plain_counters(v) for k, v in value.items()}
    return [_plain_counters(v) for v in value] if isinstance(value, list) else value


class TrainEvalCallback(Callback):
    """Put the model into training or evaluation mode, and count batches. Every Runner has one, first at its order.

    `n_iter` numbers the training batches of the whole fit from 0. `n_epochs` is the number of epochs completed so far,
    fractional (0.25: a quarter of the first). An epoch counts as one even if the loader yields more
    batches than its length.

    Modules that were in evaluation mode before the fit, while the model as a whole was in training mode, stay in it:
    `model.train(); model.norm.eval()` freezes a norm's statistics, also for later fits, until `model.norm.train()` or
    `model.train()`. The evaluation mode that validation leaves behind does not count. A model that is in evaluation
    mode as a whole trains as a whole.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn)
    >>> run.fit(2, learn)
    >>> run.n_iter, run.n_epochs
    (32, 2.0)
    """

    def begin_fit(self) -> None:
        run = self.run
        run.n_iter, run.n_epochs = 0, 0.0
        modules = list(run.model.modules())
        _VALIDATED.difference_update([m for m in modules if m.training])
        trains = run.model.training or run.model in _VALIDATED
        self._staying = [m for m in modules if trains and not m.training and m not in _VALIDATED]

    def begin_epoch(self) -> None:
        run = self.run
        run.in_train, run.n_epochs = True, float(run.epoch)
        run.model.train()
        staying = set(self._staying)
        for m in self._staying:
            if staying.issuperset(m.modules()):
                m.eval()
            else:
                m.training = False

    def after_batch(self) -> None:
        run = self.run
        if run.in_train:
            run.n_iter += 1
            if run.iters:
                run.n_epochs = run.epoch + min((run.iter + 1) / run.iters, 1.0)

    def begin_validate(self) -> None:
        run = self.run
        run.in_train = False
        _VALIDATED.update(m for m in run.model.modules() if m.training)
        run.model.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_staying"}
