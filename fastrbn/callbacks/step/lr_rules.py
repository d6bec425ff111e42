"""Rules that read a learning rate off a sweep: functions of its rates and finite losses, ten or more; None: no rate."""

from __future__ import annotations

import itertools
import math


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


RULES = {"steepest": _steepest, "minimum": _minimum, "valley": _valley}
