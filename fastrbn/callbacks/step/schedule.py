"""Schedules: hyper-parameters as functions of the position in a fit."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from fastrbn.learn.batch import length
from fastrbn.learn.callback import Callback
from fastrbn.util import is_number, whole

from .gradients import GradientAccumulation


class Schedule:
    """A function of the position in the fit (0: start, 1: end), made by an annealer. It can be copied and pickled."""

    def __init__(self, make: Callable, formula: Callable, start: float, end: float):
        self.make, self.formula, self.start, self.end = make, formula, start, end

    def __call__(self, pos: float) -> float:
        return self.formula(self.start, self.end, pos)

    def __reduce__(self):
        return self.make, (self.start, self.end)  # pickle finds `make` by its name, and under it never the formula

    def __repr__(self):
        return f"{self.make.__name__}({self.start!r}, {self.end!r})"


def annealer(formula: Callable[[float, float, float], float]) -> Callable[[float, float], Schedule]:
    """Decorate `formula(start, end, pos)` so that calling it with `start` and `end` gives a function of `pos`.

    Parameters
    ----------
    formula : callable
        Takes the values at both ends and a position from 0 to 1, and returns the value there.

    Returns
    -------
    callable
        `f(start, end)`, which returns a schedule for `ParamScheduler` or `combine_scheds`.

    Examples
    --------
    >>> @annealer
    ... def sched_square(start, end, pos):
    ...     return start + (end - start) * pos**2
    >>> sched_square(1, 5)(0.5)
    2.0

    References
    ----------
    fast.ai course, part 2 (2019), notebook 05.
    """

    @functools.wraps(formula, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def make(start: float, end: float) -> Schedule:
        return Schedule(make, formula, start, end)

    del make.__wrapped__  # help() should show the parameters that the user passes
    return make


@annealer
def sched_lin(start, end, pos):
    """Go from `start` to `end` in a straight line.

    Parameters
    ----------
    start, end : float
        Values at positions 0 and 1.

    Returns
    -------
    Schedule
        A function of the position in the fit, 0 to 1.

    Examples
    --------
    >>> sched_lin(1, 5)(0.25)
    2.0

    References
    ----------
    fast.ai course, part 2 (2019), notebook 05.
    """
    return start + pos * (end - start)


@annealer
def sched_cos(start, end, pos):
    """Go from `start` to `end` along half a cosine, which is flat at both ends.

    Parameters
    ----------
    start, end : float
        Values at positions 0 and 1.

    Returns
    -------
    Schedule
        A function of the position in the fit, 0 to 1.

    Examples
    --------
    >>> [round(sched_cos(1, 5)(pos), 2) for pos in (0, 0.25, 0.5, 1)]
    [1.0, 1.59, 3.0, 5.0]

    References
    ----------
    fast.ai course, part 2 (2019), notebook 05.
    """
    return start + (1 + math.cos(math.pi * (1 - pos))) * (end - start) / 2


@annealer
def sched_no(start, end, pos):
    """Stay at `start`.

    Parameters
    ----------
    start : float
        The value.
    end : float
        Ignored; it is there so that all annealers are called alike.

    Returns
    -------
    Schedule
        A function of the position in the fit, 0 to 1.

    Examples
    --------
    >>> sched_no(0.1, 0.1)(0.5)
    0.1

    References
    ----------
    fast.ai course, part 2 (2019), notebook 05.
    """
    return start


@annealer
def sched_exp(start, end, pos):
    """Go from `start` to `end` by the same factor in equal distances: a straight line on a logarithmic axis.

    Parameters
    ----------
    start, end : float
        Values at positions 0 and 1. They have the same sign and are not 0.

    Returns
    -------
    Schedule
        A function of the position in the fit, 0 to 1. It raises ValueError for a zero or different signs.

    Examples
    --------
    >>> sched_exp(1, 4)(0.5)
    2.0

    References
    ----------
    fast.ai course, part 2 (2019), notebook 05.
    """
    if start * end <= 0:
        raise ValueError(
            f"sched_exp needs start and end of the same sign, and neither may be 0; got {start} and {end}: use a small "
            f"number such as 1e-8 instead of 0, or use sched_lin"
        )
    return start * (end / start) ** pos


class CombinedSchedule:
    """Schedules one after the other, each over its share of the fit; made by `combine_scheds`."""

    def __init__(self, pcts: Iterable[float], scheds: Iterable[Callable]):
        self.pcts, self.scheds = list(pcts), list(scheds)
        ends = list(itertools.accumulate(self.pcts))
        pieces = [(end - pct, end, s) for pct, end, s in zip(self.pcts, ends, self.scheds) if pct > 0]
        start, _, last = pieces[-1]
        self._pieces = [*pieces[:-1], (start, 1.0, last)]  # the rounded sum may differ from 1

    def __call__(self, pos: float) -> float:
        for start, end, sched in self._pieces:
            if pos < end:
                break
        return sched(min(max((pos - start) / (end - start), 0.0), 1.0))

    def __repr__(self):
        return f"combine_scheds({self.pcts}, {self.scheds})"


def combine_scheds(pcts: Iterable[float], scheds: Iterable[Callable[[float], float]]) -> CombinedSchedule:
    """Join schedules one after the other.

    Parameters
    ----------
    pcts : iterable of float
        The share of the fit that each schedule covers: 0 or more, with sum 1. With one share fewer than `scheds`, the
        last schedule covers the rest.
    scheds : iterable of callable
        Functions of a position from 0 to 1, such as `sched_cos(0.1, 0.6)`.

    Returns
    -------
    CombinedSchedule
        A function of the position in the fit, 0 to 1.

    Raises
    ------
    ValueError
        If a share is negative, the shares do not sum to 1, or their number does not match.
    TypeError
        If one of `scheds` is not callable.

    Examples
    --------
    Warm up for 30 % of the fit and decay for 70 %:

    >>> sched = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.2, 0.6, 0.1))
    >>> [round(sched(pos), 2) for pos in (0, 0.3, 1)]
    [0.2, 0.6, 0.1]

    References
    ----------
    fast.ai course, part 2 (2019), notebook 05.
    """
    pcts, scheds = [float(p) for p in pcts], list(scheds)
    if not scheds:
        raise ValueError("combine_scheds needs at least one schedule; got none")
    if not all(callable(s) for s in scheds):
        wrong = next(s for s in scheds if not callable(s))
        raise TypeError(f"scheds must be functions of a position, such as sched_cos(0.1, 0.6); got {wrong!r}")
    if any(not p >= 0 for p in pcts):
        raise ValueError(f"pcts must be shares of the fit, each 0 or more; got {pcts}")
    total = math.fsum(pcts)
    if len(pcts) == len(scheds) - 1 and total <= 1 + 1e-6:
        pcts, total = [*pcts, max(1 - total, 0.0)], 1.0
    if len(pcts) != len(scheds):
        raise ValueError(
            f"combine_scheds needs one share for each schedule (the last may be omitted); got {len(pcts)} shares for "
            f"{len(scheds)} schedules"
        )
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise ValueError(f"pcts must sum to 1; got {pcts}, with sum {total:g}")
    return CombinedSchedule(pcts, scheds)


def cos_1cycle_anneal(start: float, high: float, end: float) -> list[Schedule]:
    """Make the two halves of a one-cycle schedule, up and down, for `combine_scheds`.

    Parameters
    ----------
    start, high, end : float
        The first value, the highest one, and the last one.

    Returns
    -------
    list of Schedule
        Half a cosine from `start` to `high`, and one from `high` to `end`.

    Examples
    --------
    >>> cos_1cycle_anneal(0.2, 0.6, 0.1)
    [sched_cos(0.2, 0.6), sched_cos(0.6, 0.1)]

    References
    ----------
    fast.ai course, part 2 (2019), notebook 05.
    """
    return [sched_cos(start, high), sched_cos(high, end)]


class ParamScheduler(Callback):
    """Set a hyper-parameter of the optimiser before each training step.

    The position moves with each batch. While the training loader has no length it moves only between epochs, and a
    warning says so. The last value stays in the optimiser after the fit.

    Parameters
    ----------
    pname : str
        Name of the hyper-parameter in the optimiser's param groups, such as `lr`, `weight_decay` or `momentum`. For
        optimisers like Adam, which have no momentum, "momentum" means the first of `betas`.
    sched_funcs : callable or list of callable
        A function of the position in the fit, 0 to 1, or one for each param group.

    Raises
    ------
    TypeError
        If a schedule is not callable.
    ValueError
        In `begin_fit`: the optimiser does not have `pname`, or the number of schedules does not match its groups.

    Examples
    --------
    >>> warm_up = partial(ParamScheduler, "lr", combine_scheds([0.5, 0.5], cos_1cycle_anneal(0.1, 0.4, 0.01)))
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[warm_up, Recorder])
    >>> run.fit(1, learn)
    >>> [round(lr, 2) for lr in run.recorder.lrs[0][::4]]
    [0.1, 0.25, 0.4, 0.21]

    References
    ----------
    fast.ai course, part 2 (2019), notebook 05.
    """

    _needs_opt = ("param_groups",)

    def __init__(self, pname: str, sched_funcs: Callable[[float], float] | list[Callable[[float], float]]):
        self.pname, self.sched_funcs = pname, sched_funcs
        for f in sched_funcs if isinstance(sched_funcs, (list, tuple)) else [sched_funcs]:
            if not callable(f):
                raise TypeError(
                    f"ParamScheduler('{pname}', …) needs a function of the position such as sched_lin(0.1, 0.01), or a "
                    f"list of them; got {f!r}"
                )

    def begin_fit(self) -> None:
        groups, funcs, self._told = self.run.opt.param_groups, self.sched_funcs, False
        self._funcs = list(funcs) if isinstance(funcs, (list, tuple)) else [funcs] * len(groups)
        if len(self._funcs) != len(groups):
            raise ValueError(
                f"ParamScheduler('{self.pname}', …) needs one schedule, or one for each param group; got "
                f"{len(self._funcs)} schedules for {len(groups)} groups"
            )
        for group in groups:
            known = _hyper_parameters(group)
            if self.pname not in known:
                raise ValueError(
                    f"{type(self.run.opt).__name__} has no hyper-parameter '{self.pname}'; it has {', '.join(known)}"
                )

    def begin_batch(self) -> None:
        run = self.run
        if run.in_train:
            if run.iters is None and run.max_steps is None and not self._told:
                self._told = True
                warnings.warn(
                    f"the training loader has no length, so schedules move only between epochs: in this fit of "
                    f"{run.epochs} epochs each takes {run.epochs} values and does not reach its last; give the loader "
                    f"or its data set a __len__, or pass max_steps to fit",
                    stacklevel=2,
                )
            pos = run.pct_train
            for group, f in zip(run.opt.param_groups, self._funcs):
                set_hyper_parameter(group, self.pname, f(pos))

    def __repr__(self):
        return f"ParamScheduler({self.pname!r}, {self.sched_funcs!r})"


class Warmup(Callback):
    """Raise the learning rate over the first steps of each fit: step k of n takes k/n of it.

    It scales the rate that the optimiser has, or that a schedule sets, for the step alone. So it combines with
    `ParamScheduler`, with `TorchScheduler`, with a constant rate, and with a rate for each param group. Steps are
    those of the optimiser: under `GradientAccumulation` several batches make one.

    Parameters
    ----------
    steps : int, optional
        Length of the warm-up in steps, 1 or more. Give either this or `share`.
    share : float, optional
        Length as a share of all steps of the fit, above 0 and up to 1.

    Raises
    ------
    ValueError
        If not exactly one of the two is given, or it is out of range; in `begin_fit`, if the training loader has no
        length and `share` is given.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(Warmup, steps=4), Recorder])
    >>> run.fit(1, learn)
    >>> [round(lr, 3) for lr in run.recorder.lrs[0][:6]]
    [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]

    References
    ----------
    Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, section 2.2.
    """

    _needs_opt = ("param_groups", "lr")

    def __init__(self, steps: int | None = None, share: float | None = None):
        if (steps is None) == (share is None):
            raise ValueError(
                f"Warmup needs its length, either in steps or as a share of the fit; got steps={steps!r} and "
                f"share={share!r}: give one, such as Warmup(steps=500) or Warmup(share=0.05)"
            )
        if share is not None and not (is_number(share) and 0 < share <= 1):
            raise ValueError(f"Warmup: share is a share of the fit's steps, above 0 and up to 1; got {share!r}")
        self.steps = None if steps is None else whole("Warmup: steps", steps)
        self.share = share
        self._clear()

    def _clear(self) -> None:
        self._count, self._length = 0, self.steps or 1
        self._rates: list[Any] | None = None  # those that a step has scaled

    def begin_fit(self) -> None:
        self._clear()
        if self.share is not None:
            total = steps_in_fit(self.run)
            if total is None:
                raise ValueError(
                    "Warmup: the training loader has no length, so a share of the fit is not known: use Warmup(steps=…)"
                )
            self._length = max(round(self.share * total), 1)

    def begin_batch(self) -> None:
        if self.run.in_train:
            self._scale()

    def after_backward(self) -> None:
        self._scale()  # GradientAccumulation may take a step between batches

    def _scale(self) -> None:
        if self._rates is None and self._count + 1 < self._length:
            groups, factor = self.run.opt.param_groups, (self._count + 1) / self._length
            self._rates = [_copied(group["lr"]) for group in groups]
            for group, rate in zip(groups, self._rates):
                set_hyper_parameter(group, "lr", rate * factor)

    def after_step(self) -> None:
        self._count += 1
        self._restore()

    def after_batch(self) -> None:
        self._restore()  # in case it was cancelled

    def after_cancel_batch(self) -> None:
        self._restore()

    def after_fit(self) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._rates is not None:
            for group, rate in zip(self.run.opt.param_groups, self._rates):
                set_hyper_parameter(group, "lr", rate)
            self._rates = None

    def state_dict(self) -> dict:
        return {"count": self._count}

    def load_state_dict(self, state: dict) -> None:
        self._count = state["count"]

    def __getstate__(self):
        return {**super().__getstate__(), "_rates": None}

    def __repr__(self):
        return f"Warmup(steps={self.steps})" if self.share is None else f"Warmup(share={self.share})"


class KeptRates:
    """Keeps the rates and momenta of an optimiser, and what PyTorch's schedulers write beside them."""

    _NAMES = ("lr", "momentum", "betas", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")

    def __init__(self, opt: Any):
        self._opt, self._attributes = opt, set(vars(opt))
        self._groups = [{k: _copied(g[k]) for k in self._NAMES if k in g} for g in opt.param_groups]

    def restore(self) -> None:
        """Put everything back; rates in tensors go into the same tensors."""
        for group, kept in zip(self._opt.param_groups, self._groups):
            for name in self._NAMES:
                if name in kept:
                    set_hyper_parameter(group, name, kept[name])
                else:
                    group.pop(name, None)
        if hasattr(self._opt.step, "_wrapped_by_lr_sched"):  # an attribute that a scheduler has put over the method
            for name in {"step", "_opt_called"} - self._attributes:
                vars(self._opt).pop(name, None)


def steps_in_fit(run: Any) -> int | None:
    """The number of steps that the optimiser takes in the run's fit; None if the length of an epoch is not known."""
    n = next((cb.n for cb in run.cbs if isinstance(cb, GradientAccumulation)), 1)
    most = run.max_steps  # batches
    size = run._passes.every or length(run.data.train_dl)  # of an epoch
    if size is None:
        return most if n == 1 else None
    full, rest = divmod(min(run.epochs * size, math.inf if most is None else most), size or 1)
    return int(full * -(-size // n) + -(-rest // n))  # the end of an epoch makes a step of its own


def sets_rate(cb: Callback) -> bool:
    """True if the callback is a ParamScheduler of the learning rate."""
    return isinstance(cb, ParamScheduler) and cb.pname == "lr"


def _copied(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else value


def _hyper_parameters(group: dict[str, Any]) -> list[str]:
    names = [k for k in group if k != "params"]
    return [*names, "momentum"] if "betas" in group and "momentum" not in group else names


def set_hyper_parameter(group: dict[str, Any], name: str, value: Any) -> None:
    """Set `name` in a param group; "momentum" is the first of `betas` in optimisers like Adam."""
    if name not in group:
        name, value = "betas", (value, *group["betas"][1:])
    if hasattr(group[name], "fill_"):  # compiled and captured optimisers read the rate from this very tensor
        group[name].fill_(value)
    else:
        group[name] = value
