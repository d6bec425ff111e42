"""Schedules: hyper-parameters as functions of the position in a fit, and the search for a learning rate."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import warnings

from torch import nn

from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelEpochException, CancelTrainException
from fastrbn.learn.snapshot import Snapshot

from .lr_rules import RULES


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
                _set(group, self.pname, f(pos))

    def __repr__(self):
        return f"ParamScheduler({self.pname!r}, {self.sched_funcs!r})"


def _hyper_parameters(group):
    names = [k for k in group if k != "params"]
    return [*names, "momentum"] if "betas" in group and "momentum" not in group else names


def _set(group, name, value):
    if name not in group:  # momentum of Adam's kind
        name, value = "betas", (value, *group["betas"][1:])
    if hasattr(group[name], "fill_"):  # a compiled or captured optimiser keeps its rate in this very tensor
        group[name].fill_(value)
    else:
        group[name] = value


class LR_Find(Callback):
    """Tries learning rates from small to large, one a step, and leaves everything as it was.

    - `max_iter`: steps of the sweep; the fit may have fewer, but then the largest rates are not tried.
    - `min_lr`, `max_lr`: first and last rate; the rates between grow by the same factor each step.

    The fit ends when the sweep is done, when the smoothed loss is above 10 times its best, or when the loss is not
    finite. There is no validation. After it `.lrs` and `.losses` hold a number for each step, `.suggestion` a rate
    (`.suggest(rule)` knows more rules than one), and model (parameters, buffers), optimiser and random states are bit
    for bit those from before the fit, also after an error or Ctrl-C; so are a loss function's parameters and buffers.
    Each step waits for the device, to read the loss. A rate that another callback sets before the step is an error.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3; fast.ai course,
    part 2 (2019), notebook 05b.
    """

    _needs_opt = ("param_groups", "lr", "state")

    def __init__(self, max_iter=100, min_lr=1e-6, max_lr=10):
        if not (isinstance(max_iter, int) and max_iter >= 2 and 0 < min_lr < max_lr):
            raise ValueError(
                f"LR_Find needs max_iter of 2 or more and 0 < min_lr < max_lr; got max_iter={max_iter}, "
                f"min_lr={min_lr}, max_lr={max_lr}"
            )
        self.max_iter, self.min_lr, self.max_lr = max_iter, min_lr, max_lr
        self.lrs, self.losses, self._snapshot = [], [], None

    def begin_fit(self):
        run = self.run
        self.lrs, self.losses, self._smooth, self._best = [], [], 0.0, math.inf
        modules = [m for m in (run.model, run.learn.loss_func) if isinstance(m, nn.Module)]
        self._snapshot = Snapshot(modules, run.opt, (run.data.train_dl, run.data.valid_dl))

    def begin_batch(self):
        if self.run.in_train:
            self._lr = self.min_lr * (self.max_lr / self.min_lr) ** (len(self.lrs) / (self.max_iter - 1))
            for group in self.run.opt.param_groups:
                _set(group, "lr", self._lr)

    def after_loss(self):
        if not self.run.in_train:
            return
        self._check_rates()
        loss = self.run.loss.item()
        self.lrs.append(self._lr)
        self.losses.append(loss)
        # an average over some five steps, without the pull of its start at 0
        n, keep = len(self.losses), 0.8
        self._smooth = keep * self._smooth + (1 - keep) * loss
        smooth = self._smooth / (1 - keep**n)
        if not math.isfinite(loss):
            raise CancelTrainException(f"LR_Find ended after {n} steps: the loss is {loss} at lr {self._lr:.3g}")
        if smooth > self._best + 9 * abs(self._best):  # 10 times the best, also for losses below 0
            raise CancelTrainException(
                f"LR_Find ended after {n} steps: at lr {self._lr:.3g} the loss is over 10 times its best"
            )
        self._best = min(self._best, smooth)

    def _check_rates(self):
        for group in self.run.opt.param_groups:
            if not math.isclose(float(group["lr"]), self._lr, rel_tol=1e-5):  # a rate in a tensor is rounded
                raise RuntimeError(
                    f"LR_Find sets the learning rate of each step; another callback has changed {self._lr:.3g} to "
                    f"{float(group['lr']):.3g} before the step: leave out schedules of 'lr' while you look for a rate"
                )

    def after_step(self):
        if len(self.lrs) >= self.max_iter:
            raise CancelTrainException(f"LR_Find ended after {self.max_iter} steps, the whole sweep")

    def begin_validate(self):
        raise CancelEpochException("LR_Find does not validate")

    def after_fit(self):
        if self._snapshot is not None:
            self.run.opt.zero_grad()
            snapshot, self._snapshot = self._snapshot, None
            snapshot.restore()

    @property
    def suggestion(self) -> float | None:
        """The rate at which the loss falls fastest: `suggest("steepest")`."""
        return self.suggest()

    def suggest(self, rule="steepest") -> float | None:
        """A rate, or None when there are fewer than 10 steps or the loss never falls. `rule`:

        - "steepest": the middle of the window of a fifth of the sweep with the steepest line through it, of those
          before the lowest: where the loss falls fastest per factor of the rate.
        - "minimum": a tenth of the rate at which the loss, as the mean over such windows, is lowest.
        - "valley": the middle of the longest series of steps, not always next to each other, each with a smaller loss
          than the one before.

        On one curve they may differ thirtyfold ("valley" is the most careful). Of the peers, fastai's `lr_find` has all
        three as `minimum`, `steep` and `valley` (its default, which it has from ESRI), Lightning's has "steepest".
        """
        if rule not in RULES:
            raise ValueError(f"the rules of LR_Find are {', '.join(RULES)}; got {rule!r}")
        losses = list(itertools.takewhile(math.isfinite, self.losses))
        return RULES[rule](self.lrs, losses) if len(losses) >= 10 else None

    def plot(self, skip_last=0):
        """Loss against learning rate, with the suggestion. Returns the matplotlib Figure."""
        from fastrbn import plots

        n = max(len(self.lrs) - skip_last, 0)
        return plots.plot_lr_find(self.lrs[:n], self.losses[:n], self.suggestion)

    def __getstate__(self):
        return {**super().__getstate__(), "_snapshot": None}  # it holds the model
