"""Pictures of a model in training: magnitudes of parameters, statistics and histograms of module outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .figure import (
    BLANK,
    COLORS,
    GREY,
    SMALL,
    TEXT,
    WARNING,
    axes,
    dark,
    label_ends,
    last_finite,
    line_style,
    new_figure,
    outside_legend,
    smoothed,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Table = Sequence[Sequence[float]] | torch.Tensor
_PIXELS = 800  # columns of an image: no screen shows more
_NAMED = len(COLORS)  # lines with a colour and a name


def plot_magnitudes(values: Table, names: Sequence[str], steps: Sequence[int], title: str = "magnitude") -> Figure:
    """Draw magnitudes of parameters as a map: a row for each parameter, a column for each step.

    Parameters
    ----------
    values : Tensor, (steps, names)
        Magnitudes from 0, as in `ParamMagnitudes.values["rms"]`. What is 0 or missing stays grey; what is NaN or
        infinite after it was finite is orange. Of many steps, neighbours share a pixel with their largest value.
    names : sequence of str
        Qualified names, drawn from top to bottom.
    steps : sequence of int
        `n_iter` of each row, in equal distances.
    title : str, default "magnitude"
        What the values are, for the colour scale.

    Returns
    -------
    matplotlib.figure.Figure
        The colour is logarithmic.

    Examples
    --------
    >>> from fastrbn import plots
    >>> fig = plots.plot_magnitudes(torch.rand(20, 2), ["0.weight", "0.bias"], range(20))
    >>> [t.get_text() for t in fig.axes[0].get_yticklabels()]
    ['0.weight', '0.bias']
    """
    table = _table(values, names, steps)
    broken = _broken(table)
    shown = torch.where((table > 0) & table.isfinite(), table, torch.nan)
    longest = max(map(len, names), default=0)
    height = max(2.4, 1.2 + 0.2 * len(names))
    fig = new_figure(7.0 + 0.07 * longest, height)
    ax = axes(fig, title=f"{_capital(title)} of each parameter", xlabel="step", grid=False)
    extent = _extent(steps, (len(names) - 0.5, -0.5))
    if not shown.isnan().all():
        image = ax.imshow(_joined(shown).T.numpy(), norm="log", aspect="auto", interpolation="nearest", extent=extent)
        _color_bar(fig, image, ax, title, height)
    notes = ["grey: 0 or not there"] if (shown.isnan() & ~broken).any() else []
    if broken.any():
        orange = torch.tensor([int(WARNING[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        marks = _joined(broken.float()).T
        pixels = torch.cat([orange.expand(*marks.shape, 3), marks[..., None]], -1)
        ax.imshow(pixels.numpy(), aspect="auto", interpolation="nearest", extent=extent)
        notes.append("orange: NaN or infinite")
    ax.set_title("; ".join(notes), fontsize=SMALL, loc="right", color=dark(WARNING) if broken.any() else "black")
    ax.set_facecolor(BLANK)
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.tick_params(axis="y", length=0)
    if len(names):
        ax.set_ylim(len(names) - 0.5, -0.5)
    return fig


def plot_magnitude_lines(values: Table, names: Sequence[str], steps: Sequence[int], title: str = "magnitude") -> Figure:
    """Draw magnitudes of parameters over steps, a line for each, on a logarithmic axis.

    Parameters
    ----------
    values, names, steps, title
        As for `plot_magnitudes`. Of more than 8 parameters those that became NaN or infinite first, then those that
        grew most have a colour and their name; the others are grey. A line that breaks has a cross at its last finite
        value.

    Returns
    -------
    matplotlib.figure.Figure
        Names stand at the ends of their lines.

    Examples
    --------
    >>> from fastrbn import plots
    >>> fig = plots.plot_magnitude_lines(torch.rand(20, 2) + 1, ["0.weight", "0.bias"], range(20))
    >>> sorted(text.get_text() for text in fig.axes[0].texts)
    ['0.bias', '0.weight']
    """
    table = _table(values, names, steps)
    broken = _broken(table)
    # a line at 0 has no place on a logarithmic axis: it ends, and begins again
    shown = torch.where(table.isfinite() & (table > 0), table, torch.nan)
    chosen = range(len(names)) if len(names) <= _NAMED else _fastest(shown, broken, _NAMED)
    which = f": the {_NAMED} that grew most or broke" if len(chosen) < len(names) else ""
    fig = new_figure(9.0, 4.6)
    ax = axes(fig, title=f"{_capital(title)} of each parameter{which}", xlabel="step", ylabel=f"{title} (logarithmic)")
    ax.set_title("×: last value before NaN or infinity" if broken.any() else "", fontsize=SMALL, loc="right")
    styles = {column: line_style(i) for i, column in enumerate(chosen)}
    ends = []
    for column, name in enumerate(names):
        y, style = shown[:, column], styles.get(column)
        width = {"lw": 1.6, "zorder": 3} if style else {"lw": 0.8, "alpha": 0.7, "color": GREY}
        ax.plot(steps, y.numpy(), marker="o" if len(steps) == 1 else None, ms=4, **width, **(style or {}))
        last = last_finite(y)
        if last is None:
            continue
        if broken[:, column].any():
            _cross(ax, steps[last], float(y[last]), style["color"] if style else GREY)
        if style:
            ends.append((steps[last], float(y[last]), name, style["color"]))
    if not shown.isnan().all():
        ax.set_yscale("log")
    label_ends(ax, ends)
    return fig


def plot_activations(
    means: Table,
    stds: Table,
    near_zero: Table,
    names: Sequence[str],
    steps: Sequence[int],
    dead: Table | None = None,
) -> Figure:
    """Draw statistics of module outputs over steps, a line for each module; its running mean from 60 steps on.

    Parameters
    ----------
    means, stds : Tensor, (steps, names)
        Mean and standard deviation of each output. A line whose mean becomes NaN or infinite has a cross at its last
        finite value.
    near_zero : Tensor, (steps, names)
        Share of values near zero, 0 to 1.
    names : sequence of str
        Modules, in the order of the legend.
    steps : sequence of int
        `n_iter` of each row.
    dead : Tensor, (steps, names), optional
        Share of channels that are near zero throughout the batch, 0 to 1.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each statistic. Where values explode, the axis is logarithmic.

    Examples
    --------
    >>> from fastrbn import plots
    >>> table = torch.rand(20, 2)
    >>> [ax.get_ylabel() for ax in plots.plot_activations(table, table, table, ["0", "1"], range(20)).axes]
    ['mean', 'standard deviation', 'share near zero']
    """
    from matplotlib.lines import Line2D

    panels = [("mean", means), ("standard deviation", stds), ("share near zero", near_zero)]
    panels += [] if dead is None else [("share of dead channels", dead)]
    columns = 3 if len(panels) == 3 else 2
    rows = -(-len(panels) // columns)
    fig = new_figure(12.0 if columns == 3 else 10.0, 3.8 if rows == 1 else 6.4)
    grid = fig.add_gridspec(rows, columns)
    there = _table(means, names, steps).isfinite().any(1)
    end = last_finite(torch.where(there, 0.0, torch.nan))
    for i, (label, values) in enumerate(panels):
        table = _table(values, names, steps)
        called = f"{_capital(label)} of each output"
        ax = axes(fig, grid[i // columns, i % columns], called, "step", label)
        exploded = not label.startswith("share") and _scale(ax, table, signed=label == "mean")
        width = _draw_statistics(ax, table, steps, exploded, crosses=label == "mean")
        note = f" (light: each, dark: mean of {width})" if width > 1 else ""
        if end is not None and end > 0:
            ax.set_xlim(steps[0], steps[end])  # a line that ends early does so in all panels
            if end < len(steps) - 1:
                note = f" (nothing is finite from {steps[end + 1]} on)"
        ax.set_xlabel(f"step{note}", fontsize=TEXT)
        if label.startswith("share"):
            ax.set_ylim(-0.03, 1.03)
        elif not exploded and label != "mean":
            ax.set_ylim(bottom=0)
    outside_legend(fig, [Line2D([], [], **line_style(i)) for i in range(len(names))], names, "module")
    return fig


def _draw_statistics(ax: Axes, table: torch.Tensor, steps: Sequence[int], exploded: bool, crosses: bool) -> int:
    """Draw a line for each column; the number of steps that its running mean covers."""
    table = torch.where(table.isfinite(), table, torch.nan)
    broken = _broken(table).any(0)
    mean, width = (None, 1) if exploded else smoothed(table)
    for column in range(table.shape[1]):
        style, y = line_style(column), table[:, column]
        if mean is not None:
            ax.plot(steps, y.numpy(), color=style["color"], lw=0.5, alpha=0.15, zorder=1)
        shown = y if mean is None else mean[:, column]
        ax.plot(steps, shown.numpy(), lw=1.5, marker="o" if len(steps) == 1 else None, ms=4, **style)
        last = last_finite(shown)
        if crosses and broken[column] and last is not None:
            _cross(ax, steps[last], float(shown[last]), style["color"])
    return width


def plot_histograms(
    hists: Table, names: Sequence[str], steps: Sequence[int], value_range: tuple[float, float]
) -> Figure:
    """Draw histograms of module outputs over steps, an image for each module.

    Parameters
    ----------
    hists : Tensor, (steps, names, bins)
        Counts. NaN (the module was not called) stays grey.
    names : sequence of str
        Titles of the images: qualified name and type of each module.
    steps : sequence of int
        `n_iter` of each row.
    value_range : tuple of two floats
        Lower end of the first bin and upper end of the last one, drawn upwards.

    Returns
    -------
    matplotlib.figure.Figure
        One logarithmic colour scale for all: the share of a step's values in range, in percent, that each bin has.

    Examples
    --------
    >>> from fastrbn import plots
    >>> fig = plots.plot_histograms(torch.rand(20, 2, 40), ["0 Conv2d", "1 ReLU"], range(20), (-5.0, 5.0))
    >>> [ax.get_title("left") for ax in fig.axes[:2]]
    ['0 Conv2d', '1 ReLU']
    """
    counts = torch.as_tensor(hists).float()
    shares = 100 * counts / counts.sum(-1, keepdim=True).clamp(min=1)
    columns = min(len(names), 4) or 1
    rows = -(-len(names) // columns) or 1
    fig = new_figure(2.8 * columns + 1.2, 2.2 * rows + 0.5)
    grid = fig.add_gridspec(rows, columns)
    most = max(float(shares.nan_to_num().max()), 1.0) if shares.numel() else 1.0
    image = None
    for i, name in enumerate(names):
        xlabel = "step" if i + columns >= len(names) else ""
        ylabel = "output value" if i % columns == 0 else ""
        ax = axes(fig, grid[i // columns, i % columns], name, xlabel, ylabel, grid=False)
        ax.set_facecolor(BLANK)
        if len(steps):
            pixels = _joined(shares[:, i]).clamp(min=_LEAST_SHARE).T.numpy()
            image = ax.imshow(
                pixels, origin="lower", aspect="auto", cmap="magma", extent=_extent(steps, value_range), norm="log"
            )
            image.set_clim(_LEAST_SHARE, most)
    if image is not None:
        bar = _color_bar(fig, image, fig.axes, "% of the step's values in range\nin each bin (logarithmic)", 2.2 * rows)
        ticks = [10.0**e for e in range(-2, 3) if 10.0**e <= most]
        bar.set_ticks(ticks, labels=[f"≤ {ticks[0]:g}", *(f"{t:g}" for t in ticks[1:])])
    return fig


_LEAST_SHARE = 0.01  # percent; the lower end of the histograms' colours


def _table(values: Table, names: Sequence[str], steps: Sequence[int]) -> torch.Tensor:
    return torch.as_tensor(values).float().reshape(len(steps), len(names))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _color_bar(fig: Figure, image, ax, label: str, height: float):
    bar = fig.colorbar(image, ax=ax, pad=0.02, aspect=max(20, 5 * height))
    bar.set_label(label, fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    return bar


def _cross(ax: Axes, x: float, y: float, color: str) -> None:
    ax.plot([x], [y], marker="X", ms=7, color=color, mec=WARNING, ls="none", zorder=4, clip_on=False)


def _scale(ax: Axes, table: torch.Tensor, signed: bool) -> bool:
    """Make the axis logarithmic if the values explode: their largest is above 1000 times the middle one."""
    sizes = table[table.isfinite() & (table != 0)].abs()
    if not len(sizes) or sizes.max() <= 1000 * sizes.median():
        return False
    if not signed:
        ax.set_yscale("log")
        return True
    ax.set_yscale("symlog", linthresh=float(sizes.median()))
    low, high = math.ceil(sizes.median().log10()), math.floor(sizes.max().log10())
    step = max(1, math.ceil((high - low) / 3))
    powers = [10.0**e for e in range(low + step, high + 1, step)]
    least, most = float(table[table.isfinite()].min()), float(table[table.isfinite()].max())
    ax.set_yticks([t for t in (*(-p for p in reversed(powers)), 0.0, *powers) if least <= t <= most])
    return True


def _broken(table: torch.Tensor) -> torch.Tensor:
    """True where a column is NaN or infinite and has been finite before: before that, a gap is no fault."""
    finite = table.isfinite()
    return ~finite & finite.cummax(0).values if len(table) else finite


def _fastest(shown: torch.Tensor, broken: torch.Tensor, n: int) -> list[int]:
    """The columns that broke, the earliest first, then those that grew most; in the order of the model."""
    if not len(shown):
        return list(range(n))
    low, high = (f(torch.where(shown.isnan(), edge, shown), 0) for edge, f in ((9e37, torch.amin), (0.0, torch.amax)))
    growth = torch.where(high > 0, high / low, 0.0).tolist()
    intact = (~broken).float().cummin(0).values.sum(0).tolist()  # steps before it breaks
    return sorted(sorted(range(shown.shape[1]), key=lambda c: (intact[c], -growth[c]))[:n])


def _extent(steps: Sequence[int], vertical: tuple[float, float]) -> tuple[float, float, float, float] | None:
    if not len(steps):
        return None
    first, last = steps[0], steps[-1]
    half = (last - first) / max(len(steps) - 1, 1) / 2 or 0.5
    return (first - half, last + half, *vertical)


def _joined(table: torch.Tensor) -> torch.Tensor:
    """At most `_PIXELS` rows, each the largest of its neighbours, so that a single peak is seen."""
    if len(table) <= _PIXELS:
        return table
    edges = [i * len(table) // _PIXELS for i in range(_PIXELS + 1)]
    low = torch.where(table.isnan(), -torch.inf, table)
    rows = torch.stack([low[a:b].amax(0) for a, b in zip(edges, edges[1:])])
    return torch.where(rows.isinf(), torch.nan, rows)
