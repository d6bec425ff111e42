"""Schedules: hyper-parameters as functions of the position in a fit."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import warnings

from fastrbn.learn.callback import Callback


class Schedule:
    """A function of the position (0: start of the fit, 1: its end), made by an annealer; copies and pickles."""

    def __init__(self, make, start, end):
        self.make, self.start, self.end = make, start, end

    def __call__(self, pos):
        return self.make.formula(self.start, self.end, pos)

    def __repr__(self):
        return f"{self.make.__name__}({self.start!r}, {self.end!r})"


def annealer(formula):
    """Decorator: `formula(start, end, pos)` becomes `f(start, end)`, which gives a function of `pos` alone.

    Source: fast.ai course, part 2 (2019), notebook 05.
    """

    @functools.wraps(formula)
    def make(start, end):
        return Schedule(make, start, end)

    del make.__wrapped__  # help() shall show what the user passes
    make.formula = formula
    make.__signature__ = inspect.signature(lambda start, end: None)
    return make


@annealer
def sched_lin(start, end, pos):
    """A straight line."""
    return start + pos * (end - start)


@annealer
def sched_cos(start, end, pos):
    """Half a cosine: flat at both ends."""
    return start + (1 + math.cos(math.pi * (1 - pos))) * (end - start) / 2


@annealer
def sched_no(start, end, pos):
    """Constant: `start`, whatever `end` is."""
    return start


@annealer
def sched_exp(start, end, pos):
    """A straight line in the logarithm; `start` and `end` have the same sign, and neither is 0."""
    if start * end <= 0:
        raise ValueError(
            f"sched_exp needs two numbers of the same sign, neither of them 0; got {start} and {end}: take a small "
            f"number such as 1e-8 in place of 0, or sched_lin"
        )
    return start * (end / start) ** pos


class CombinedSchedule:
    """Schedules one after the other, each over its share of the way; made by `combine_scheds`."""

    def __init__(self, pcts, scheds):
        self.pcts, self.scheds = list(pcts), list(scheds)
        ends = list(itertools.accumulate(self.pcts))
        pieces = [(end - pct, end, s) for pct, end, s in zip(self.pcts, ends, self.scheds) if pct > 0]
        start, _, last = pieces[-1]
        self._pieces = [*pieces[:-1], (start, 1.0, last)]  # the sum of floats may miss 1 by a little

    def __call__(self, pos):
        for start, end, sched in self._pieces:
            if pos < end:
                break
        return sched(min(max((pos - start) / (end - start), 0.0), 1.0))

    def __repr__(self):
        return f"combine_scheds({self.pcts}, {self.scheds})"


def combine_scheds(pcts, scheds):
    """A schedule that follows each of `scheds` for its share in `pcts`.

    - `pcts`: shares of the way, none negative, sum 1; one fewer than `scheds`: the last one gets the rest.
    - `scheds`: functions of a position 0–1, such as `sched_cos(0.1, 0.6)`.

    `combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.2, 0.6, 0.1))` warms up for 30 % and decays for 70 %.

    Source: fast.ai course, part 2 (2019), notebook 05.
    """
    pcts, scheds = [float(p) for p in pcts], list(scheds)
    if not scheds:
        raise ValueError("combine_scheds needs one schedule at least; got none")
    if not all(callable(s) for s in scheds):
        wrong = next(s for s in scheds if not callable(s))
        raise TypeError(f"scheds are functions of a position, such as sched_cos(0.1, 0.6); got {wrong!r}")
    if any(not p >= 0 for p in pcts):
        raise ValueError(f"pcts are shares of the way, none negative; got {pcts}")
    total = math.fsum(pcts)
    if len(pcts) == len(scheds) - 1 and total <= 1 + 1e-6:
        pcts, total = [*pcts, max(1 - total, 0.0)], 1.0
    if len(pcts) != len(scheds):
        raise ValueError(
            f"combine_scheds needs a share for each schedule (the last may be left out); got {len(pcts)} shares for "
            f"{len(scheds)} schedules"
        )
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise ValueError(f"pcts must sum to 1; got {pcts}, which sum to {total:g}")
    return CombinedSchedule(pcts, scheds)


def cos_1cycle_anneal(start, high, end):
    """The two halves of a one-cycle schedule, up and down, for `combine_scheds`."""
    return [sched_cos(start, high), sched_cos(high, end)]


class ParamScheduler(Callback):
    """Sets a hyper-parameter of the optimiser before each training step.

    - `pname`: its name in the optimiser's param groups (`lr`, `weight_decay`, `momentum`). For optimisers of Adam's
      kind, which have no momentum, "momentum" means the first of `betas`, which plays its part.
    - `sched_funcs`: a function of the position in the fit (0–1), or one for each param group.

    The position moves with each batch; while the training loader has no length, only with each epoch, which a warning
    says. The last value stays in the optimiser after the fit.

    Source: fast.ai course, part 2 (2019), notebook 05.
    """

    _order = 1
    _needs_opt = ("param_groups",)

    def __init__(self, pname, sched_funcs):
        self.pname, self.sched_funcs = pname, sched_funcs
        for f in sched_funcs if isinstance(sched_funcs, (list, tuple)) else [sched_funcs]:
            if not callable(f):
                raise TypeError(
                    f"ParamScheduler('{pname}', …) needs a function of the position such as sched_lin(0.1, 0.01), or a "
                    f"list of them; got {f!r}"
                )

    def begin_fit(self):
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
                    f"{type(self.run.opt).__name__} has no hyper-parameter '{self.pname}': there are {', '.join(known)}"
                )

    def begin_batch(self):
        run = self.run
        if run.in_train:
            if run.iters is None and not self._told:
                self._told = True
                warnings.warn(
                    f"the training loader has no length, so schedules move only between epochs: this fit of {run.epochs} "
                    f"has as many values of each, and never the last one; give the loader or its data set a __len__",
                    stacklevel=2,
                )
            pos = run.n_epochs / run.epochs
            for group, f in zip(run.opt.param_groups, self._funcs):
                set_hyper_parameter(group, self.pname, f(pos))

    def __repr__(self):
        return f"ParamScheduler({self.pname!r}, {self.sched_funcs!r})"


def _hyper_parameters(group):
    names = [k for k in group if k != "params"]
    return [*names, "momentum"] if "betas" in group and "momentum" not in group else names


def set_hyper_parameter(group, name, value):
    if name not in group:  # momentum of Adam's kind
        name, value = "betas", (value, *group["betas"][1:])
    if hasattr(group[name], "fill_"):  # a compiled or captured optimiser keeps its rate in this very tensor
        group[name].fill_(value)
    else:
        group[name] = value
