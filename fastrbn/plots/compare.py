"""Pictures of a grid of norms: accuracy against batch size or learning rate, norms of weights over steps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from .figure import COLORS, MARKS, SMALL, TEXT, axes, dark, new_figure, outside_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec
    from matplotlib.lines import Line2D

Point = Mapping[str, Any]
Lines = Mapping[str, Sequence[Point]]
Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]
_ENDS = {"at chance": "chance", "diverged": "NaN", "refused": "refused"}  # how seeds are lost, and the word of a cell
_CELL, _ROW = 0.7, 0.19  # inches: width of a cell of the table under the axes, height of one of its lines


def plot_comparison(
    panels: Iterable[tuple[str, Lines]],
    xlabel: str = "batch size",
    dashed: Collection[str] = (),
    ylabel: str = "validation accuracy, %",
) -> Figure:
    """Draw the accuracy of norms against batch size, or another number above 0, with the seeds that were lost.

    Parameters
    ----------
    panels : iterable of (str, dict)
        Title, and the points of each norm. A point is a dict of `x`; `mean` and `std` of the seeds that trained, in
        percent (None where there is none); `total`, the number of seeds; and of these `at chance`, `diverged` and
        `refused`.
    xlabel : str, default "batch size"
        What `x` is; its axis is logarithmic.
    dashed : collection of str, default ()
        Norms whose lines are dashed.
    ylabel : str, default "validation accuracy, %"
        What `mean` is.

    Returns
    -------
    matplotlib.figure.Figure
        The axis begins where the better three quarters of the cells can be told apart. A table under it has what is
        below, and how many seeds ended in NaN, at chance, or were refused.

    Examples
    --------
    >>> from fastrbn import plots
    >>> point = {"x": 8, "mean": 98.2, "std": 0.1, "total": 3, "at chance": 0, "diverged": 0, "refused": 0}
    >>> fig = plots.plot_comparison([("mnist", {"default": [point], "batchnorm": [{**point, "mean": 97.5}]})])
    """
    shared, given = _split_titles(panels)
    styles = _styles((lines for _, lines in given), dashed)
    width = max((_width(lines) for _, lines in given), default=5.0)
    columns = max(min(len(given), 3, int(15 / width)), 1)
    floors = [_limits([p for points in lines.values() for p in points]) for _, lines in given]
    tables = [_table(lines, floor) for (_, lines), (floor, _) in zip(given, floors)]
    deep = [sum(map(_depth, tables[i].values())) for i in range(len(given))]
    heights = [h for i in range(0, len(given), columns) for h in (3.4, _ROW * max(deep[i : i + columns]))] or [3.4]
    fig, grid = _laid_out(width, columns, [max(h, 0.02) for h in heights], shared)
    for i, ((title, lines), limits, table) in enumerate(zip(given, floors, tables)):
        row, column = divmod(i, columns)
        upper = axes(fig, grid[2 * row, column], _wrapped(title, width), "" if table else xlabel)
        if column == 0:
            upper.set_ylabel(ylabel, fontsize=TEXT)
        _draw_lines(upper, lines, styles, limits)
        if table:
            upper.tick_params(labelbottom=False)
            lower = axes(fig, grid[2 * row + 1, column], "", xlabel, grid=False)
            _draw_table(lower, table, styles)
            _set_x(lower, lines)
    outside_legend(fig, _handles(styles), list(styles), "norm")
    return fig


def plot_weight_norms(panels: Iterable[tuple[str, Curves]], dashed: Collection[str] = ()) -> Figure:
    """Draw the norm of a net's weights over training steps, a line for each kind of normalisation.

    Parameters
    ----------
    panels : iterable of (str, dict)
        Title, and (steps, norms of the weights) of each normalisation.
    dashed : collection of str, default ()
        The normalisations whose lines are dashed.

    Returns
    -------
    matplotlib.figure.Figure
        The axis is logarithmic where norms differ by more than a factor of 3. A line that ends before the others
        (training was stopped), or in NaN or infinity, has a cross at its last finite value.

    Examples
    --------
    >>> from fastrbn import plots
    >>> fig = plots.plot_weight_norms([("batch size 8", {"default": ([0, 10], [19.0, 23.5])})])
    """
    shared, given = _split_titles(panels)
    styles = _styles((curves for _, curves in given), dashed)
    columns = max(min(len(given), 3), 1)
    fig, grid = _laid_out(4.4, columns, [3.4] * max(-(-len(given) // columns), 1), shared)
    for i, (title, curves) in enumerate(given):
        row, column = divmod(i, columns)
        ax = axes(fig, grid[row, column], _wrapped(title, 4.4), "step")
        if column == 0:
            ax.set_ylabel("norm of the convolutions' weights", fontsize=TEXT)
        _draw_curves(ax, curves, styles)
    outside_legend(fig, _handles(styles, marks=False), list(styles), "norm")
    return fig


def _split_titles(panels: Iterable[tuple[str, Any]]) -> tuple[str, list[tuple[str, Any]]]:
    """What the titles of several panels begin with, and the panels with the rest of their titles."""
    given = list(panels)
    parts = [title.split(", ") for title, _ in given]
    shared = commonprefix([p[:-1] for p in parts]) if len(given) > 1 else []
    return ", ".join(shared), [(", ".join(p[len(shared) :]), data) for p, (_, data) in zip(parts, given)]


def _laid_out(width: float, columns: int, heights: Sequence[float], title: str) -> tuple[Figure, GridSpec]:
    """A figure with a title over all panels, and its grid; sizes in inches."""
    fig = new_figure(width * columns + 1.8, sum(heights) + 0.9)
    if title:
        fig.suptitle(title, fontsize=TEXT)
    return fig, fig.add_gridspec(len(heights), columns, height_ratios=heights)


def _wrapped(title: str, width: float) -> str:
    return "\n".join(textwrap.wrap(title, int(width * 13)))


def _styles(series: Iterable[Iterable[str]], dashed: Collection[str]) -> dict[str, dict]:
    """How the line of each norm is drawn."""
    labels = dict.fromkeys(label for lines in series for label in lines)
    return {
        label: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKS[i % len(MARKS)],
            "ms": 5,
            "lw": 1.4,
            "ls": "--" if label in dashed else "-",
        }
        for i, label in enumerate(labels)
    }


def _plain(style: Mapping[str, Any]) -> dict:
    return {k: style[k] for k in ("color", "lw", "ls")}


def _handles(styles: Mapping[str, dict], marks: bool = True) -> list[Line2D]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], **(style if marks else _plain(style))) for style in styles.values()]


def _width(lines: Lines) -> float:
    """Inches of a panel in which the cells under neighbouring x have room."""
    xs = _xs(lines)
    octaves = [math.log2(b / a) for a, b in zip(xs, xs[1:])]
    return min(max(4.2, 0.8 + _CELL / min(octaves, default=1.0) * (sum(octaves) + 0.9)), 9.0)


def _draw_lines(ax: Axes, lines: Lines, styles: Mapping[str, dict], limits: tuple[float, float]) -> None:
    for i, (label, points) in enumerate(lines.items()):
        # beside one another, so that markers and bars of one x do not cover each other
        shift = 2 ** (min(0.09, 0.5 / len(lines)) * (i - (len(lines) - 1) / 2))
        # a line goes on below the axis, and is not drawn across an x that has no accuracy
        for run in _runs(points):
            ax.plot([p["x"] * shift for p in run], [p["mean"] for p in run], **_plain(styles[label]))
        shown = [p for p in points if p["mean"] is not None and p["mean"] >= limits[0]]
        x, y, bars = ([p["x"] * shift for p in shown], [p["mean"] for p in shown], [p["std"] or 0 for p in shown])
        ax.errorbar(x, y, bars, **{**styles[label], "ls": "none"}, capsize=2.5, elinewidth=1)
    _set_x(ax, lines)
    ax.set_ylim(*limits)


def _set_x(ax: Axes, lines: Lines) -> None:
    xs = _xs(lines)
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(xs, default=1) / 2**0.45, max(xs, default=1) * 2**0.45)
    ax.set_xticks(xs, [f"{x:g}" for x in xs])
    ax.minorticks_off()


def _xs(lines: Lines) -> list[float]:
    return sorted({p["x"] for points in lines.values() for p in points})


def _runs(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The stretches of points with an accuracy."""
    run: list[Point] = []
    for p in points:
        if p["mean"] is not None:
            run.append(p)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _limits(points: Sequence[Point]) -> tuple[float, float]:
    """(floor, top) of the axis: all cells if they lie close, else down to three times the way from the best cell to
    the lower quartile, so that a net at chance does not press the others into a line."""
    trained = sorted((p for p in points if p["mean"] is not None), key=lambda p: p["mean"])
    if not trained:
        return 0.0, 100.0
    best, quartile = trained[-1]["mean"], trained[len(trained) // 4]["mean"]
    floor = max(trained[0]["mean"], best - max(3 * (best - quartile), 0.5))
    span = max(best - floor, 0.5)
    shown = [p for p in trained if p["mean"] >= floor]
    low = max(min(p["mean"] - (p["std"] or 0) for p in shown), floor - span / 4)
    top = min(max(p["mean"] + (p["std"] or 0) for p in shown), best + span / 4)
    return max(low - 0.06 * span, 0.0), min(top + 0.06 * span, 100.0)


def _table(lines: Lines, floor: float) -> dict[str, list[tuple[float, list[str]]]]:
    """What the axis does not show: for each norm that has something, (x, words) of its cells."""
    cells = {label: [(p["x"], _words(p, floor)) for p in points] for label, points in lines.items()}
    return {label: found for label, row in cells.items() if (found := [cell for cell in row if cell[1]])}


def _words(p: Point, floor: float) -> list[str]:
    """Lines of text about a point."""
    below = [f"{p['mean']:.3g}"] if p["mean"] is not None and p["mean"] < floor else []
    return below + [
        word if p[how] == p["total"] else f"{p[how]}/{p['total']} {word}" for how, word in _ENDS.items() if p[how]
    ]


def _depth(row: Sequence[tuple[float, list[str]]]) -> int:
    """Lines that a row of the table needs."""
    return max(len(words) for _, words in row)


def _draw_table(ax: Axes, table: Mapping[str, Sequence[tuple[float, list[str]]]], styles: Mapping[str, dict]) -> None:
    top, places = 0, []
    for i, (label, row) in enumerate(table.items()):
        depth, color = _depth(row), dark(styles[label]["color"])
        if i % 2 == 0:
            ax.axhspan(top, top + depth, color="#f1f3f5", zorder=0)
        for x, words in row:
            text = "\n".join(words)
            ax.text(x, top + depth / 2, text, fontsize=SMALL, color=color, ha="center", va="center", linespacing=1.1)
        places.append(top + depth / 2)
        top += depth
    ax.set_ylim(top, 0)
    ax.set_yticks(places, list(table), fontsize=SMALL)
    for tick, label in zip(ax.get_yticklabels(), table):
        tick.set_color(dark(styles[label]["color"]))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_title("Off the axis: mean in %, or how the seeds ended", fontsize=SMALL, loc="left", pad=3)


def _draw_curves(ax: Axes, curves: Curves, styles: Mapping[str, dict]) -> None:
    drawn = {
        label: [(s, n) for s, n in zip(steps, norms) if math.isfinite(n) and n > 0]
        for label, (steps, norms) in curves.items()
    }
    values = [n for points in drawn.values() for _, n in points]
    end = max((steps[-1] for steps, _ in curves.values() if len(steps)), default=0)
    for label, points in drawn.items():
        if not points:
            continue
        ax.plot(*zip(*points), **_plain(styles[label]))
        if points[-1][0] < end:  # training was stopped, or the norm is NaN from here on
            ax.plot(*points[-1], marker="x", ms=8, mew=2, color=styles[label]["color"])
    if values and max(values) > 3 * min(values):
        ax.set_yscale("log")
        _plain_log_ticks(ax)


def _plain_log_ticks(ax: Axes) -> None:
    """Plain numbers on a logarithmic axis that is too short for several powers of ten."""
    low, high = ax.get_ylim()
    if high / low < 30:
        ticks = [m * 10.0**e for e in range(-6, 12) for m in (1, 1.5, 2, 3, 4, 5, 7)]
        ticks = [t for t in ticks if low <= t <= high]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
