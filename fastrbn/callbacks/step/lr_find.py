"""The search for a learning rate, and the rules that read one off a sweep."""

from __future__ import annotations

import itertools
import math

from torch import nn

from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelEpochException, CancelTrainException
from fastrbn.learn.snapshot import Snapshot

from .schedule import set_hyper_parameter


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

    _order = 1
    _last = frozenset({"after_fit"})  # what others leave in the model at the end is taken back as well
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
                set_hyper_parameter(group, "lr", self._lr)

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
        if rule not in _RULES:
            raise ValueError(f"the rules of LR_Find are {', '.join(_RULES)}; got {rule!r}")
        losses = list(itertools.takewhile(math.isfinite, self.losses))
        return _RULES[rule](self.lrs, losses) if len(losses) >= 10 else None

    def plot(self, skip_last=0):
        """Loss against learning rate, with the suggestion. Returns the matplotlib Figure."""
        from fastrbn import plots

        n = max(len(self.lrs) - skip_last, 0)
        return plots.plot_lr_find(self.lrs[:n], self.losses[:n], self.suggestion)

    def __getstate__(self):
        return {**super().__getstate__(), "_snapshot": None}  # it holds the model


# The rules: functions of the rates and the finite losses of a sweep, at least ten of each; None: no rate.


def _windows(losses):
    """The middle of each window of a fifth of the sweep, up to the lowest mean, and its losses."""
    half = max(2, len(losses) // 10)
    windows = {i: losses[i - half : i + half + 1] for i in range(half, len(losses) - half)}
    lowest = min(windows, key=lambda i: math.fsum(windows[i]))
    return {i: window for i, window in windows.items() if i <= lowest}


def _steepest(lrs, losses):
    slopes = {i: _slope(window) for i, window in _windows(losses).items()}
    steepest = min(slopes, key=slopes.get)
    return lrs[steepest] if slopes[steepest] < 0 else None


def _minimum(lrs, losses):
    return None if _steepest(lrs, losses) is None else lrs[max(_windows(losses))] / 10


def _valley(lrs, losses):
    lengths, before = [1] * len(losses), [None] * len(losses)  # of the longest series that ends at each step
    for i, j in itertools.combinations(range(len(losses)), 2):
        if losses[j] < losses[i] and lengths[i] >= lengths[j]:
            lengths[j], before[j] = lengths[i] + 1, i
    end = lengths.index(max(lengths))
    series = [end]
    while before[series[-1]] is not None:
        series.append(before[series[-1]])
    return lrs[series[len(series) // 2]] if len(series) > 1 else None


def _slope(values):
    """Of the least-squares line through values at equal distances, but for a factor."""
    middle = (len(values) - 1) / 2
    return math.fsum((i - middle) * v for i, v in enumerate(values))


_RULES = {"steepest": _steepest, "minimum": _minimum, "valley": _valley}
