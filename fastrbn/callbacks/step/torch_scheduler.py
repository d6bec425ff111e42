"""PyTorch's learning-rate schedulers as a callback."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from fastrbn.callbacks.track.monitor import Monitor, direction
from fastrbn.learn.callback import Callback
from fastrbn.util import one_of

from .lr_find import LR_Find
from .schedule import KeptRates, sets_rate, steps_in_fit


class TorchScheduler(Callback):
    """Drive a scheduler of `torch.optim.lr_scheduler`.

    Each fit makes a new scheduler, which starts from the optimiser's rates. Afterwards, also after an error, the
    optimiser has its former rates and momenta. A checkpoint holds the scheduler, and a resumed fit continues with it.

    The scheduler moves only if the optimiser has moved: batches that `GradientAccumulation` collects, and steps that
    `MixedPrecision` skips, do not count.

    Parameters
    ----------
    make : callable
        `make(opt)` returns the scheduler: `partial(CosineAnnealingLR, T_max=10)`, or a lambda for several that are
        joined. If it has a parameter `total_steps`, like `OneCycleLR`, it gets the number of times that the scheduler
        moves in the fit.
    per : {"step", "epoch"}, optional
        When the scheduler moves: after each step of the optimiser, or after each epoch. As in PyTorch's documentation
        the default is "epoch". It is "step" for OneCycleLR, for CyclicLR, and if `make` takes `total_steps`.
    monitor : str, optional
        For `ReduceLROnPlateau`: the name of an average of `AvgStatsCallback`, which the run needs. By default
        "valid_loss". A metric's name alone means that of validation.

    Raises
    ------
    TypeError
        If `make` is not a function, or does not return a scheduler of the optimiser.
    ValueError
        If `per` is unknown; in `begin_fit`, if another callback sets the rate too, if `monitor` is not measured or does
        not suit the scheduler, or if `make` takes `total_steps` and the training loader has no length.

    Examples
    --------
    >>> from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
    >>> cosine = partial(TorchScheduler, partial(CosineAnnealingLR, T_max=4))
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[cosine, Recorder])
    >>> run.fit(4, learn)
    >>> [round(lr, 3) for lr in run.recorder.lrs[0][::16]]   # one rate per epoch of 16 batches
    [0.1, 0.085, 0.05, 0.015]
    >>> one_cycle = partial(TorchScheduler, partial(OneCycleLR, max_lr=0.4))   # moves after each step
    """

    _needs_opt = ("param_groups", "lr")

    def __init__(self, make: Callable[..., LRScheduler], per: str | None = None, monitor: str | None = None):
        if isinstance(make, LRScheduler) or not callable(make):
            raise TypeError(
                f"TorchScheduler needs a function that makes a scheduler for the optimiser, since each fit makes its "
                f"own; got {make!r}: write TorchScheduler(partial(CosineAnnealingLR, T_max=10))"
            )
        if per is not None:
            one_of("TorchScheduler: per", per, ("step", "epoch"))
        if monitor is not None:
            direction(monitor, "TorchScheduler")
        self.make, self.per, self.monitor = make, per, monitor
        self.scheduler: Any = None
        self._clear()

    def _clear(self) -> None:
        self._kept: KeptRates | None = None
        self._hook: Any = None
        self._monitor: Monitor | None = None
        self._per, self._moved = self.per, False

    def begin_fit(self) -> None:
        self._clear()
        run, opt = self.run, self.run.opt
        others = [
            cb for cb in run.cbs if cb is not self and (sets_rate(cb) or isinstance(cb, (LR_Find, TorchScheduler)))
        ]
        if others:
            raise ValueError(
                f"TorchScheduler sets the learning rate, and so does {others[0]!r}: leave one of them out, or join "
                f"PyTorch's schedulers by SequentialLR or ChainedScheduler"
            )
        self._kept = KeptRates(opt)
        for group in opt.param_groups:  # what an earlier scheduler has left there would be the base of this one
            group["initial_lr"] = copy.deepcopy(group["lr"])
        more = {"total_steps": self._total_steps()} if _takes_total_steps(self.make) else {}
        self.scheduler = self.make(opt, **more)
        if not isinstance(self.scheduler, LRScheduler) or getattr(self.scheduler, "optimizer", opt) is not opt:
            raise TypeError(
                f"TorchScheduler: make must return a scheduler of torch.optim.lr_scheduler for the optimiser that it "
                f"is given; got {self.scheduler!r}"
            )
        if self._per is None:
            self._per = "step" if more or isinstance(self.scheduler, (OneCycleLR, CyclicLR)) else "epoch"
        self._begin_monitor()
        self._hook = opt.register_step_post_hook(self._note)

    def _total_steps(self) -> int:
        self._per = self._per or "step"
        total: Any = steps_in_fit(self.run) if self._per == "step" else self.run.epochs
        if total in (None, math.inf):
            raise ValueError(
                "TorchScheduler: the training loader has no length, so the total_steps that make takes are not known: "
                "give them yourself, as in partial(OneCycleLR, max_lr=0.1, total_steps=1000)"
            )
        return max(total, 1)

    def _begin_monitor(self) -> None:
        kind = type(self.scheduler).__name__
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            if self.monitor is not None:
                raise ValueError(f"TorchScheduler: {kind} takes no monitor; got {self.monitor!r}: leave it out")
            return
        if self._per == "step":
            raise ValueError(f"TorchScheduler: {kind} follows an average of the epoch: leave out per='step'")
        name, mode = self.monitor or "valid_loss", self.scheduler.mode
        if direction(name, "TorchScheduler") not in (mode, None):
            verb, other = ("rise", "max") if mode == "min" else ("fall", "min")
            raise ValueError(
                f"TorchScheduler: {name!r} should {verb}, and the {kind} has mode={mode!r}: make it with mode={other!r}"
            )
        self._monitor = Monitor(name, mode, "TorchScheduler")
        self._monitor.begin(self.run)

    def _note(self, opt: Any, args: Any, kwargs: Any) -> None:
        self._moved = True

    def after_step(self) -> None:
        if self._per == "step":
            self._advance()

    def after_epoch(self) -> None:
        if self._per == "epoch":
            value = () if self._monitor is None else (self._monitor.value(self.run),)
            if value != (None,):
                self._advance(*value)

    def _advance(self, *value: Any) -> None:
        if self._moved:  # otherwise a rate would be skipped
            self._moved = False
            self.scheduler.step(*value)

    def after_fit(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self._kept is not None:
            self._kept.restore()
        self._clear()

    def state_dict(self) -> dict:
        """The scheduler's state."""
        return {"class": type(self.scheduler).__name__, "moved": self._moved, **super().state_dict()}

    def load_state_dict(self, state: dict) -> None:
        here = type(self.scheduler).__name__
        if state["class"] != here:
            raise ValueError(
                f"a resumed fit needs the scheduler of the first one: the saved one is a {state['class']}, "
                f"TorchScheduler has made a {here}"
            )
        self._moved = state["moved"]
        if self._moved:
            self.scheduler.optimizer._opt_called = True  # else PyTorch warns: it only knows the steps of this process
        self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))

    def __getstate__(self):
        kept = ("make", "per", "monitor")
        return {k: vars(self)[k] for k in kept}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.scheduler = None
        self._clear()

    def __repr__(self):
        more = [f"{k}={v!r}" for k, v in (("per", self.per), ("monitor", self.monitor)) if v is not None]
        return f"TorchScheduler({', '.join([_shown(self.make), *more])})"


def _takes_total_steps(make: Callable[..., Any]) -> bool:
    """True if `make` has a parameter `total_steps` for which nothing has been given yet."""
    try:
        known = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return False
    if isinstance(make, functools.partial) and "steps_per_epoch" in make.keywords:  # OneCycleLR's other form
        return False
    return "total_steps" in known and known["total_steps"].default in (None, inspect.Parameter.empty)


def _shown(make: Any) -> str:
    if isinstance(make, functools.partial):
        given = [*map(repr, make.args), *(f"{k}={v!r}" for k, v in make.keywords.items())]
        return f"partial({', '.join([_shown(make.func), *given])})"
    return getattr(make, "__name__", repr(make))
