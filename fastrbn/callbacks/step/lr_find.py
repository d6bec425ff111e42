"""The search for a learning rate, and the rules that read one off a sweep."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelEpochException, CancelTrainException
from fastrbn.learn.snapshot import Snapshot
from fastrbn.util import one_of

from .schedule import set_hyper_parameter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LR_Find(Callback):
    """Try learning rates from small to large, one per step, and leave everything as it was.

    The fit ends after the sweep, when the smoothed loss exceeds 10 times its best, or when the loss is not finite. It
    does not validate. Afterwards, also after an error or Ctrl-C, these are bit for bit what they were before the fit:
    parameters and buffers of the model and of the loss function, the optimiser, and the random states. Each step waits
    for the device to read the loss.

    Afterwards `.lrs` and `.losses` have a number for each step, and `.suggestion` is a rate (None if no rate can be
    suggested); `.suggest(rule)` knows other rules.

    Parameters
    ----------
    max_iter : int, default 100
        Steps of the sweep, 2 or more. A fit with fewer steps does not try the largest rates.
    min_lr : float, default 1e-6
        The first rate. Rates grow by the same factor each step.
    max_lr : float, default 10
        The last rate.

    Raises
    ------
    ValueError
        If `max_iter` or the rates are out of range.
    RuntimeError
        During the fit: another callback sets the learning rate before the step.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(LR_Find, max_iter=30)])
    >>> run.fit(2, learn)
    >>> run.stop_reason
    'LR_Find ended after 30 steps, the whole sweep'
    >>> 1e-6 < run.lr_find.suggestion < 10
    True

    References
    ----------
    Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3; fast.ai course, part 2
    (2019), notebook 05b.
    """

    _needs_opt = ("param_groups", "lr", "state")

    def __init__(self, max_iter: int = 100, min_lr: float = 1e-6, max_lr: float = 10):
        if not (isinstance(max_iter, int) and max_iter >= 2 and 0 < min_lr < max_lr):
            raise ValueError(
                f"LR_Find needs max_iter of 2 or more and 0 < min_lr < max_lr; got max_iter={max_iter}, "
                f"min_lr={min_lr}, max_lr={max_lr}"
            )
        self.max_iter, self.min_lr, self.max_lr = max_iter, min_lr, max_lr
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self._snapshot: Snapshot | None = None

    def begin_fit(self) -> None:
        run = self.run
        self.lrs, self.losses, self._smooth, self._best = [], [], 0.0, math.inf
        modules = [m for m in (run.model, run.learn.loss_func) if isinstance(m, nn.Module)]
        self._snapshot = Snapshot(modules, run.opt, (run.data.train_dl, run.data.valid_dl))
        self._passes = getattr(run.learn, "passes", 0)

    def begin_batch(self) -> None:
        if self.run.in_train:
            self._lr = self.min_lr * (self.max_lr / self.min_lr) ** (len(self.lrs) / (self.max_iter - 1))
            for group in self.run.opt.param_groups:
                set_hyper_parameter(group, "lr", self._lr)

    def after_loss(self) -> None:
        if not self.run.in_train:
            return
        self._check_rates()
        loss = self.run.loss.item()
        self.lrs.append(self._lr)
        self.losses.append(loss)
        # an exponential average over about five steps, corrected for its start at 0
        n, keep = len(self.losses), 0.8
        self._smooth = keep * self._smooth + (1 - keep) * loss
        smooth = self._smooth / (1 - keep**n)
        if not math.isfinite(loss):
            raise CancelTrainException(f"LR_Find ended after {n} steps: the loss is {loss} at lr {self._lr:.3g}")
        if smooth > self._best + 9 * abs(self._best):  # 10 times the best, and right for losses below 0
            raise CancelTrainException(
                f"LR_Find ended after {n} steps: at lr {self._lr:.3g} the loss is over 10 times its best"
            )
        self._best = min(self._best, smooth)

    def _check_rates(self) -> None:
        for group in self.run.opt.param_groups:
            if not math.isclose(float(group["lr"]), self._lr, rel_tol=1e-5):  # a rate in a tensor is rounded
                raise RuntimeError(
                    f"LR_Find sets the learning rate of each step; another callback changed {self._lr:.3g} to "
                    f"{float(group['lr']):.3g} before the step: remove schedules of 'lr' while searching for a rate"
                )

    def after_step(self) -> None:
        if len(self.lrs) >= self.max_iter:
            raise CancelTrainException(f"LR_Find ended after {self.max_iter} steps, the whole sweep")

    def begin_validate(self) -> None:
        raise CancelEpochException("LR_Find does not validate")

    def after_fit(self) -> None:
        if self._snapshot is not None:
            self.run.opt.zero_grad()
            snapshot, self._snapshot = self._snapshot, None
            snapshot.restore()
            with contextlib.suppress(AttributeError):  # see Passes
                self.run.learn.passes = self._passes

    @property
    def suggestion(self) -> float | None:
        """The rate at which the loss falls fastest: `suggest("steepest")`."""
        return self.suggest()

    def suggest(self, rule: str = "steepest") -> float | None:
        """Read a learning rate off the sweep.

        The rules use windows of a fifth of the sweep. On one curve they may differ thirtyfold; "valley" is the most
        careful. fastai's `lr_find` has all three as `steep`, `minimum` and `valley` (its default, by ESRI);
        Lightning's has "steepest".

        Parameters
        ----------
        rule : {"steepest", "minimum", "valley"}, default "steepest"
            "steepest": the middle of the window with the steepest fall, up to the window of the lowest mean loss: the
            rate at which the loss falls fastest per factor of the rate. "minimum": a tenth of the rate in the middle of
            the window of the lowest mean loss. "valley": the middle of the longest decreasing subsequence of the
            losses.

        Returns
        -------
        float or None
            The rate; None with fewer than 10 finite losses, or if the loss never falls.

        Raises
        ------
        ValueError
            If there is no such rule.
        """
        one_of("LR_Find.suggest: rule", rule, _RULES)
        losses = list(itertools.takewhile(math.isfinite, self.losses))
        return _RULES[rule](self.lrs, losses) if len(losses) >= 10 else None

    def plot(self, skip_last: int = 0) -> Figure:
        """Draw loss against learning rate, without the last `skip_last` steps, and mark what each rule suggests."""
        from fastrbn import plots

        n = max(len(self.lrs) - skip_last, 0)
        marks = {"minimum / 10" if rule == "minimum" else rule: self.suggest(rule) for rule in _RULES}
        return plots.plot_lr_find(self.lrs[:n], self.losses[:n], marks)

    def __getstate__(self):
        return {**super().__getstate__(), "_snapshot": None}  # the snapshot holds the model


# The rules take the rates and the finite losses of a sweep, at least ten, and return None if they find no rate.


def _windows(losses: list[float]) -> dict[int, list[float]]:
    """Windows of a fifth of the sweep by the index of their middle, up to the window with the lowest mean."""
    half = max(2, len(losses) // 10)
    windows = {i: losses[i - half : i + half + 1] for i in range(half, len(losses) - half)}
    lowest = min(windows, key=lambda i: math.fsum(windows[i]))
    return {i: window for i, window in windows.items() if i <= lowest}


def _steepest(lrs: list[float], losses: list[float]) -> float | None:
    slopes = {i: _slope(window) for i, window in _windows(losses).items()}
    steepest = min(slopes, key=slopes.__getitem__)
    return lrs[steepest] if slopes[steepest] < 0 else None


def _minimum(lrs: list[float], losses: list[float]) -> float | None:
    return None if _steepest(lrs, losses) is None else lrs[max(_windows(losses))] / 10


def _valley(lrs: list[float], losses: list[float]) -> float | None:
    lengths = [1] * len(losses)  # of the longest decreasing subsequence that ends at each step
    before: list[int | None] = [None] * len(losses)
    for i, j in itertools.combinations(range(len(losses)), 2):
        if losses[j] < losses[i] and lengths[i] >= lengths[j]:
            lengths[j], before[j] = lengths[i] + 1, i
    step: int | None = lengths.index(max(lengths))
    series = []
    while step is not None:
        series.append(step)
        step = before[step]
    return lrs[series[len(series) // 2]] if len(series) > 1 else None


def _slope(values: list[float]) -> float:
    """The slope of the least-squares line through equidistant values, up to a constant factor."""
    middle = (len(values) - 1) / 2
    return math.fsum((i - middle) * v for i, v in enumerate(values))


_RULES: dict[str, Callable[[list[float], list[float]], float | None]] = {
    "steepest": _steepest,
    "minimum": _minimum,
    "valley": _valley,
}
