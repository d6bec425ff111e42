"""Callback, the way to change training without touching the loop, and the one callback every run has."""

from __future__ import annotations

import copy
import re
import weakref
from typing import Any

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
    **dict.fromkeys(("epochs", "epoch", "n_epochs", "n_iter", "iter", "iters", "dl")),  # the position in the fit
    **dict.fromkeys(("xb", "yb", "pred", "loss")),  # the batch
    "in_train": False,
    "logger": print,
    "stop_reason": None,
    "resumed_from": None,
    **SIGNALS,
}

_VALIDATED = weakref.WeakSet()  # modules in evaluation mode because of a validation: training is their mode


def camel2snake(name: str) -> str:
    """`AvgStatsCallback` -> `avg_stats_callback`, `LR_Find` -> `lr_find` (course notebook 04)."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()


class Callback:
    """Base of all callbacks: override the events you need, leave the rest.

    - `_order` (int, default 0): callbacks run by ascending `_order`, those of equal order as they were given; in the
      events that `_last` names a callback runs after all others.
    - `self.run` is the `Runner`; reading an attribute the callback does not have reads the run's, so `self.loss` is
      the run's loss. Writing one of the run's own names (`self.loss = …`) raises: it would only shadow it.
    - An event whose name is misspelt raises when the class is made, with the nearest event.
    - Copies and pickles leave the run behind: they are callbacks to attach to another run.

    Source: fast.ai course, part 2 (2019), notebooks 04, 05b and 09b.
    """

    _order = 0
    _last = frozenset()
    _needs_opt = ()  # what the optimiser must have for this callback, of `optimiser.NEEDS`

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if name in EVENTS or name.startswith("_") or not callable(value):
                continue
            if near := nearest_event(name):
                raise TypeError(
                    f"{cls.__name__}.{name}: a callback's methods named begin_… and after_… must be events, and "
                    f"'{name}' is none, so it would never be called. Did you mean '{near}'? A helper method of this "
                    f"name needs another one, such as '_{name}'."
                )

    # The events, in the order of a fit. Each is a no-op that the loop does not even call unless it is overridden.

    def begin_fit(self):
        """Once, before everything: models, loaders and numbers of epochs are known (`model`, `data`, `epochs`)."""

    def begin_epoch(self):
        """Before the training batches of an epoch (`epoch` counts from 0)."""

    def begin_batch(self):
        """A batch is there as `xb`, `yb`; replace it with `self.run.xb = …`. Also in validation (`in_train`)."""

    def after_pred(self):
        """`pred` holds the model's output; replace it with `self.run.pred = …`."""

    def after_loss(self):
        """`loss` holds the loss, a tensor on the model's device. In validation, `after_batch` comes next."""

    def after_backward(self):
        """Gradients are there, the step is not taken yet: the place to clip or inspect them."""

    def after_step(self):
        """Parameters have moved, gradients are still there."""

    def after_batch(self):
        """The batch is over, also when it was cancelled; `n_iter` still is this batch's number in the first handler."""

    def begin_validate(self):
        """Before the validation batches, under `torch.no_grad`."""

    def after_epoch(self):
        """After validation: the place to bring numbers to the host, print and write."""

    def after_fit(self):
        """Once, always: after the last epoch, a cancel, an error or Ctrl-C. Undo here what `begin_fit` did."""

    def after_cancel_batch(self):
        """A `CancelBatchException` was raised; `after_batch` follows."""

    def after_cancel_epoch(self):
        """A `CancelEpochException` was raised."""

    def after_cancel_train(self):
        """A `CancelTrainException` was raised; `after_fit` follows."""

    # What a checkpoint keeps of the callback.

    def state_dict(self) -> dict:
        """What the rest of the fit, or what is shown of it, depends on: tensors, numbers, strings, and lists, tuples
        and dictionaries of these. Asked for between steps. Default: the states of torch schedulers that are attributes
        of the callback (`self.sched = CosineAnnealingLR(…)`); all else begins anew in a resumed fit. Containers that
        go on changing are copied."""
        return {name: _plain_counters(s.state_dict()) for name, s in vars(self).items() if isinstance(s, LRScheduler)}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave. Called in a resumed fit after `begin_fit`, and in the middle of an epoch
        again after `begin_epoch`; the run's `epoch` and `n_iter` follow."""
        if type(self).state_dict is not Callback.state_dict:
            return
        for name, saved in state.items():
            scheduler = vars(self).get(name)
            if not isinstance(scheduler, LRScheduler):
                raise ValueError(
                    f"the checkpoint holds the state of the scheduler {type(self).__name__}.{name}, and there is none "
                    f"here to take it over: make it in __init__ or begin_fit"
                )
            scheduler.load_state_dict(copy.deepcopy(saved))

    @property
    def name(self) -> str:
        """What the run calls this callback: the class name in snake case without a final 'Callback'."""
        name = re.sub(r"Callback$", "", type(self).__name__)
        return camel2snake(name or "callback")

    def set_runner(self, run) -> None:
        """Attach to `run`; the runner calls this."""
        self.__dict__["run"] = run

    def __getattr__(self, attr):
        # only reached when normal lookup failed; never ask the run for dunders, or copy and pickle recurse
        cls = type(self).__name__
        if attr.startswith("__"):
            raise AttributeError(f"{cls} has no attribute '{attr}'")
        run = self.__dict__.get("run")
        if run is None:
            raise AttributeError(
                f"{cls} has no attribute '{attr}', and it is not attached to a run: what belongs to the run can be "
                f"read once the callback was given to a Runner (Runner(cbs=[…]) or get_learn_run(…, cbs=[…]))"
            )
        try:
            return getattr(run, attr)
        except AttributeError:
            known = [*vars(self), *(n for n in dir(type(self)) if not n.startswith("__")), *vars(run)]
            raise AttributeError(
                f"neither {cls} nor its run has an attribute '{attr}'.{suggestion(attr, known)}"
            ) from None

    def __setattr__(self, attr, value):
        if attr in RUN_STATE:
            raise AttributeError(
                f"{type(self).__name__} may not set self.{attr}: '{attr}' is the run's, and a callback's own copy "
                f"would hide it. To change the run write self.run.{attr} = …; for a value of your own take another "
                f"name."
            )
        object.__setattr__(self, attr, value)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "run"}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def __repr__(self):
        return f"{type(self).__name__}()"


def _plain_counters(value):
    """MultiStepLR keeps its milestones in a Counter, which a checkpoint takes as a dictionary; it reads either."""
    if isinstance(value, dict):
        return {k: _plain_counters(v) for k, v in value.items()}
    return [_plain_counters(v) for v in value] if isinstance(value, list) else value


class TrainEvalCallback(Callback):
    """Puts the model into training or evaluation mode and counts: every Runner has one, in front.

    `n_iter` numbers the training batches from 0 over the whole fit; `n_epochs` is the number of epochs completed so
    far, fractional (0.25: a quarter of the first one), which schedules read. An epoch counts as one however many
    batches a loader gives beyond its length.

    Modules that were put into evaluation mode before the fit, while the model as a whole is in training mode, stay in
    it: `model.train(); model.norm.eval()` freezes a norm's statistics, also for later fits, until `model.norm.train()`
    or `model.train()`. The evaluation mode that validation leaves behind does not count, and a model that is in
    evaluation mode as a whole trains as a whole.
    """

    def begin_fit(self):
        run = self.run
        run.n_iter, run.n_epochs = 0, 0.0
        modules = list(run.model.modules())
        _VALIDATED.difference_update([m for m in modules if m.training])
        trains = run.model.training or run.model in _VALIDATED
        self._staying = [m for m in modules if trains and not m.training and m not in _VALIDATED]

    def begin_epoch(self):
        run = self.run
        run.in_train, run.n_epochs = True, float(run.epoch)
        run.model.train()
        staying = set(self._staying)
        for m in self._staying:
            if staying.issuperset(m.modules()):
                m.eval()
            else:
                m.training = False

    def after_batch(self):
        run = self.run
        if run.in_train:
            run.n_iter += 1
            if run.iters:
                run.n_epochs = run.epoch + min((run.iter + 1) / run.iters, 1.0)

    def begin_validate(self):
        run = self.run
        run.in_train = False
        _VALIDATED.update(m for m in run.model.modules() if m.training)
        run.model.eval()

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k != "_staying"}
