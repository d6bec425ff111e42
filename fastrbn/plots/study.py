"""The picture of a study: norms against batch size, ours in front, names at the lines' ends."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from .compare import _ROW, Lines, _depth, _draw_lines, _draw_table, _limits, _set_x, _table, _wrapped, _xs
from .figure import COLORS, MAIN, MARKS, axes, label_ends, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 8.0, 2.9  # inches: of the picture, of a panel without its table


def plot_study(
    question: str,
    panels: Iterable[tuple[str, str, Lines]],
    xlabel: str = "batch size",
    ours: Collection[str] = (),
    level: Collection[str] = (),
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Draw the scores of norms against batch size, with a panel for each task and each norm's name beside its line.

    Parameters
    ----------
    question : str
        What the study asks: the title.
    panels : iterable of (str, str, dict)
        Title of the task, what `mean` is, and the points of each norm; for points see `plot_comparison`.
    xlabel : str, default "batch size"
        What `x` is; its axis is logarithmic.
    ours : collection of str, default ()
        Norms drawn in front, with thick blue lines; the second and later ones are dashed.
    level : collection of str, default ()
        Norms that do not depend on `x`: the mean of the last point is drawn as a dashed level line.
    colors : dict of str to str, optional
        Colours `#rrggbb` of the other norms; by default in the order in which they come.

    Returns
    -------
    matplotlib.figure.Figure
        A table under each panel has what is below its axis, and the seeds that were lost.

    Examples
    --------
    >>> from fastrbn import plots
    >>> point = {"x": 8, "mean": 98.2, "std": 0.1, "total": 3, "at chance": 0, "diverged": 0, "refused": 0}
    >>> lines = {"ours": [point], "theirs": [{**point, "mean": 97.5}]}
    >>> fig = plots.plot_study("Which is better?", [("digits", "accuracy, %", lines)], ours=["ours"])
    """
    given = list(panels)
    styles = _styles([label for *_, lines in given for label in lines], ours, colors or {})
    limits = [_limits([p for points in lines.values() for p in points]) for *_, lines in given]
    tables = [_table(lines, low) for (*_, lines), (low, _) in zip(given, limits)]
    deep = [_ROW * sum(map(_depth, table.values())) for table in tables]
    columns = min(len(given), 2 if all(map(_fits_half, (lines for *_, lines in given), tables)) else 1) or 1
    heights = [h for i in range(0, len(given), columns) for h in (_HEIGHT, max(*deep[i : i + columns], 0.02))]
    rows = -(-len(question) // 85) or 1
    words = "\n".join(textwrap.wrap(question, min(len(question) // rows + 8, 85)))
    fig = new_figure(_WIDTH, sum(heights) + 0.6 + 0.2 * words.count("\n"))
    fig.suptitle(words, x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = fig.add_gridspec(len(heights) or 1, columns, height_ratios=heights or [1])
    for i, ((title, ylabel, lines), (low, high), table) in enumerate(zip(given, limits, tables)):
        row, column = divmod(i, columns)
        ax = axes(fig, grid[2 * row, column], _wrapped(title, _WIDTH / columns), "" if table else xlabel, ylabel)
        in_front = {label: lines[label] for label in sorted(lines, key=list(styles).index, reverse=True)}
        _draw_lines(ax, in_front, styles, (low, high))
        ends = []
        for label, points in lines.items():
            trained = [p for p in points if p["mean"] is not None]
            if trained:
                x, y, color = trained[-1]["x"], trained[-1]["mean"], styles[label]["color"]
                if label in level:
                    x = ax.get_xlim()[1]
                    ax.axhline(y, color=color, lw=styles[label]["lw"], ls=(0, (5, 3)), zorder=1.5)
                ends.append((x, y, label, color))
        label_ends(ax, ends, ours, ":")  # a solid line would seem to go on where a norm is lost at the last x
        if table:
            ax.tick_params(labelbottom=False)
            lower = axes(fig, grid[2 * row + 1, column], "", xlabel, grid=False)
            _draw_table(lower, table, styles)
            _set_x(lower, lines)
    return fig


def _fits_half(lines: Lines, table: Mapping) -> bool:
    """Whether lines and the cells of the table have room in half the picture, beside the names."""
    if max(map(len, lines), default=0) > 20:
        return False
    xs = _xs(lines)
    octaves = [math.log2(b / a) for a, b in zip(xs, xs[1:])]
    return not table or 1.85 * min(octaves, default=9) / (sum(octaves) + 0.9) > 0.55


def _styles(labels: Iterable[str], ours: Collection[str], colors: Mapping[str, str]) -> dict[str, dict]:
    """How each norm is drawn, ours first."""
    order = sorted(dict.fromkeys(labels), key=lambda label: label not in ours)
    mine = [label for label in order if label in ours]
    styles = {}
    for i, label in enumerate(order):
        if label in ours:
            look = {"color": MAIN, "marker": MARKS[0], "ms": 6, "lw": 2.8, "ls": "--" if mine.index(label) else "-"}
        else:
            color = _muted(colors.get(label) or COLORS[1 + (i - len(mine)) % (len(COLORS) - 1)])
            look = {"color": color, "marker": MARKS[1 + i % (len(MARKS) - 1)], "ms": 4, "lw": 1.2, "ls": "-"}
        styles[label] = look
    return styles


def _muted(color: str) -> str:
    """A colour `#rrggbb`, a third of the way to a light grey."""
    return "#" + "".join(f"{int(0.67 * int(color[i : i + 2], 16) + 0.33 * 215):02x}" for i in (1, 3, 5))
