"""Pictures of a fit: losses and learning rates over steps, averages over epochs, the search for a rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .figure import (
    COLORS,
    MAIN,
    SMALL,
    TEXT,
    WARNING,
    axes,
    dark,
    floats,
    label_ends,
    last_finite,
    new_figure,
    smoothed,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Sequence[float] | torch.Tensor
Rows = Sequence[Mapping[str, Any]]
_PARTS = {"train": COLORS[0], "valid": COLORS[1]}
_DECADES = 50  # largest over smallest loss from which the axis is logarithmic


def plot_loss(losses: Values) -> Figure:
    """Draw the loss of each training step, from 60 steps on with a running mean over a thirtieth of them.

    Parameters
    ----------
    losses : sequence of float or Tensor
        One loss a step, as in `Recorder.losses`. NaN and infinite values are named, not drawn.

    Returns
    -------
    matplotlib.figure.Figure
        One pair of axes, logarithmic where the losses span more than a factor of 50.

    Examples
    --------
    >>> from fastrbn import plots
    >>> fig = plots.plot_loss([2.3, 1.7, 1.2])
    >>> fig.savefig("loss.png")
    """
    fig = new_figure()
    _draw_loss(fig, 111, losses)
    return fig


def plot_lr(lrs: Values) -> Figure:
    """Draw the learning rate of each training step.

    Parameters
    ----------
    lrs : sequence of float or Tensor
        One rate a step, as in `Recorder.lrs[-1]`.

    Returns
    -------
    matplotlib.figure.Figure
        One pair of axes, from 0 on.

    Examples
    --------
    >>> from fastrbn import plots
    >>> plots.plot_lr([0.1, 0.2, 0.1]).axes[0].get_ylabel()
    'learning rate'
    """
    fig = new_figure()
    _draw_lr(fig, 111, lrs)
    return fig


def plot_run(losses: Values, lrs: Values, history: Rows) -> Figure:
    """Draw a fit on one page: loss and learning rate of each step, and every measure of each epoch.

    Parameters
    ----------
    losses, lrs : sequence of float or Tensor
        One number a step, as in `Recorder.losses` and `Recorder.lrs[-1]`.
    history : sequence of dict
        One dict an epoch, as in `AvgStatsCallback.history`: `epoch`, and `train_<measure>` and `valid_<measure>` (None
        where there was no validation).

    Returns
    -------
    matplotlib.figure.Figure
        Steps above, epochs below. A single epoch has bars with their values in place of lines.

    Examples
    --------
    >>> from fastrbn import plots
    >>> history = [{"epoch": 0, "train_loss": 1.7, "valid_loss": 1.5}]
    >>> [ax.get_title("left") for ax in plots.plot_run([2.0, 1.4], [0.1, 0.1], history).axes]
    ['Loss of each step', 'Learning rate of each step', 'Loss of epoch 0']
    """
    names = _measured(history)
    columns = max(2, min(len(names), 4))
    heights = [3.2, *[_height(history)] * -(-len(names) // columns)]
    fig = new_figure(4.8 * columns, sum(heights))
    grid = fig.add_gridspec(len(heights), columns, height_ratios=heights)
    _draw_loss(fig, grid[0, : columns - 1], losses)
    _draw_lr(fig, grid[0, columns - 1], lrs)
    for i, name in enumerate(names):
        _draw_measure(fig, grid[1 + i // columns, i % columns], history, name)
    return fig


def plot_history(history: Rows) -> Figure:
    """Draw the loss and each metric over epochs, training beside validation.

    Parameters
    ----------
    history : sequence of dict
        As for `plot_run`.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each measure.

    Examples
    --------
    >>> from fastrbn import plots
    >>> history = [{"epoch": i, "train_loss": 2 - i, "valid_loss": None} for i in range(2)]
    >>> [ax.get_ylabel() for ax in plots.plot_history(history).axes]
    ['loss']
    """
    names = _measured(history)
    fig = new_figure(4.8 * max(len(names), 1), _height(history))
    grid = fig.add_gridspec(1, max(len(names), 1))
    for i, name in enumerate(names):
        _draw_measure(fig, grid[0, i], history, name)
    return fig


def plot_lr_find(lrs: Values, losses: Values, suggestion: float | Mapping[str, float | None] | None = None) -> Figure:
    """Draw loss against learning rate, with the suggested rates.

    Parameters
    ----------
    lrs, losses : sequence of float or Tensor
        One rate and one loss a step, as in `LR_Find.lrs` and `LR_Find.losses`.
    suggestion : float or dict of float, optional
        A rate, or rates by the rule they come from; None is left out.

    Returns
    -------
    matplotlib.figure.Figure
        The rate's axis is logarithmic. The loss's axis ends where the loss explodes.

    Examples
    --------
    >>> from fastrbn import plots
    >>> fig = plots.plot_lr_find([1e-3, 1e-2, 1e-1], [2.3, 2.0, 2.5], {"minimum": 1e-3})
    >>> [text.get_text() for text in fig.axes[0].texts]
    ['minimum: 0.001']
    """
    rates, values = floats(lrs), floats(losses)
    fig = new_figure()
    ax = axes(fig, xlabel="learning rate (logarithmic)", ylabel="loss")
    finite = values[values.isfinite()]
    low, top = math.inf, math.inf
    if len(finite):
        low, start = float(finite.min()), float(values[0] if values[0].isfinite() else finite.min())
        early = values[: len(values) // 2]  # the rates are still small there
        top = max([start + 0.6 * (start - low), *early[early.isfinite()].tolist()])
    seen = last_finite(torch.where(values > top, torch.nan, values))  # after it, the loss is off the axis
    mean, width = smoothed(values[: len(values) if seen is None else seen + 1].clamp(max=top), share=15)
    _draw_steps(ax, rates, values, mean)
    if len(rates) and rates.min() > 0:
        ax.set_xscale("log")
    if low < top < math.inf:
        ax.set_ylim(low - 0.08 * (top - low), top + 0.08 * (top - low))
    rules = suggestion if isinstance(suggestion, Mapping) else {"suggestion": suggestion}
    given = sorted(((rule, rate) for rule, rate in rules.items() if rate is not None), key=lambda item: item[1])
    for i, (rule, rate) in enumerate(given):
        _mark_rate(ax, rate, f"{rule}: {rate:.2g}", COLORS[1 + i], 4 + 1.4 * SMALL * i)
    pad = 8 + 1.4 * SMALL * len(given)
    ax.set_title(f"Loss at each learning rate{_light(width)}", fontsize=TEXT, loc="left", pad=pad)
    return fig


def _mark_rate(ax: Axes, rate: float, text: str, color: str, above: float) -> None:
    """A dashed line through the axes, with its text left of it and so many points above them."""
    ax.axvline(rate, color=color, lw=1.2, ls="--", zorder=1)
    # to the left: labels of higher rates are further up, and their lines further right
    line: dict[str, Any] = {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (1, 0)}
    style: dict[str, Any] = {"fontsize": SMALL, "color": dark(color), "ha": "right", "arrowprops": line}
    ax.annotate(text, (rate, 1), (0, above), ax.get_xaxis_transform(), "offset points", annotation_clip=False, **style)


def _draw_loss(fig: Figure, where, losses: Values) -> None:
    values = floats(losses)
    steps = torch.arange(len(values)).double()
    mean, width = smoothed(values)
    ax = axes(fig, where, f"Loss of each step{_light(width)}", "step", "loss")
    _draw_steps(ax, steps, values, mean)
    shown = values[values.isfinite()]
    if len(shown) and shown.min() > 0 and shown.max() / shown.min() > _DECADES:
        ax.set_yscale("log")
        if mean is not None:  # single steps of small batches come close to 0
            middle = mean[mean.isfinite()]
            ax.set_ylim(max(float(shown.min()), float(middle.min()) / 20) / 1.2, 1.2 * float(shown.max()))
    last = last_finite(values)
    if last is not None:
        end = float((values if mean is None else mean)[last])
        if last < len(values) - 1:
            ax.plot([last], [end], marker="X", ms=8, color=WARNING, ls="none")
            label_ends(ax, [(last, end, f"NaN or infinite\nfrom step {last + 1} on", WARNING)])
        else:
            label_ends(ax, [(last, end, f"{end:.3g}", MAIN)])


def _draw_steps(ax: Axes, x: torch.Tensor, values: torch.Tensor, mean: torch.Tensor | None) -> None:
    """The values, light and under their mean where they have one."""
    marker = "o" if len(values) == 1 else None
    raw: dict[str, Any] = {"lw": 1.6} if mean is None else {"lw": 0.8, "alpha": 0.3}
    ax.plot(x.tolist(), values.tolist(), color=MAIN, marker=marker, ms=4, **raw)
    if mean is not None:
        ax.plot(x[: len(mean)].tolist(), mean.tolist(), color=MAIN, lw=2)


def _light(width: int) -> str:
    return "" if width == 1 else f" (light), mean of {width} (dark)"


def _draw_lr(fig: Figure, where, lrs: Values) -> None:
    values = floats(lrs)
    ax = axes(fig, where, "Learning rate of each step", "step", "learning rate")
    ax.plot(values.tolist(), color=MAIN, lw=1.8, marker="o" if len(values) == 1 else None, ms=4)
    ax.set_ylim(bottom=0)
    last = last_finite(values)
    if last is not None:
        label_ends(ax, [(last, float(values[last]), f"{float(values[last]):.3g}", MAIN)])


def _draw_measure(fig: Figure, where, history: Rows, name: str) -> None:
    called = name[:1].upper() + name[1:]
    if len(history) == 1:
        ax = axes(fig, where, f"{called} of epoch {history[0]['epoch']}", name, grid=False)
        _draw_bars(ax, history[0], name)
        return
    ax = axes(fig, where, f"{called} of each epoch", "epoch", name)
    ends = []
    for part, color in _PARTS.items():
        points = [(row["epoch"], value) for row in history if (value := row[f"{part}_{name}"]) is not None]
        if not points:
            continue
        ax.plot(*zip(*points), color=color, lw=1.8, marker="o" if len(points) <= 30 else None, ms=3.5)
        finite = [p for p in points if math.isfinite(p[1])]
        if finite:
            x, y = finite[-1]
            ends.append((x, y, f"{part} {points[-1][1]:.4g}", color))
    label_ends(ax, ends)


def _draw_bars(ax: Axes, row: Mapping[str, Any], name: str) -> None:
    """What an epoch has of one measure, a bar with its value for each part."""
    values = [(part, value) for part in _PARTS if (value := row[f"{part}_{name}"]) is not None]
    lengths = [value if math.isfinite(value) else 0.0 for _, value in values]
    bars = ax.barh([part for part, _ in values], lengths, color=[_PARTS[part] for part, _ in values], height=0.6)
    ax.bar_label(bars, [f"{value:.4g}" for _, value in values], padding=4, fontsize=TEXT)
    ax.margins(x=0.2)
    if not any(lengths):
        ax.set(xlim=(0, 1), xticks=[])
    ax.set_ylim(max(len(values), 2) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, labelsize=TEXT)


def _height(history: Rows) -> float:
    """Inches of a panel over epochs."""
    return 1.5 if len(history) == 1 else 3.2


def _measured(history: Rows) -> list[str]:
    return [key.removeprefix("train_") for key in (history[0] if history else ()) if key.startswith("train_")]
