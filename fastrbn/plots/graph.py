"""The picture of an autograd graph: boxes and the edges between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figure import COLORS, SMALL, WARNING, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float]
_TITLE = 9  # points; details are SMALL
_EDGE = "#6b7580"
_KINDS = {  # kind of a box: face, edge, words of the legend
    "op": ("#ffffff", "#8a94a0", "operation"),
    "module": ("#dbe7f3", COLORS[0], "module"),
    "parameter": ("#fdf0d5", "#b08d3c", "parameter"),
    "leaf": ("#e9ecef", "#8a94a0", "other leaf"),
    "root": ("#d9ead3", "#38761d", "start of the backward pass"),
    "warning": ("#f8ddd6", WARNING, "held, or changed in place"),
}


def box_size(title: str, detail: str) -> tuple[float, float]:
    """Return the size of a box of `plot_graph` around these texts.

    Parameters
    ----------
    title, detail : str
        One line each; `detail` may be empty.

    Returns
    -------
    tuple of two floats
        Width and height in inches.

    Examples
    --------
    >>> from fastrbn import plots
    >>> plots.box_size("0 Conv2d", "")[1]
    0.28
    """
    return 0.22 + max(0.083 * len(title), 0.076 * len(detail), 0.3), 0.42 if detail else 0.28


def plot_graph(boxes: Sequence[Mapping[str, Any]], routes: Iterable[Sequence[Point]]) -> Figure:
    """Draw boxes and the edges between them; a legend names the kinds of boxes.

    Parameters
    ----------
    boxes : sequence of dict
        `x`, `y` (the centre; y upwards), `width` and `height` in inches (see `box_size`); `title`, `detail`; `kind`:
        "op", "module", "parameter", "leaf", "root" or "warning".
    routes : iterable of sequences of (x, y)
        The points of each edge in inches, from box to box; the arrow is at the last one.

    Returns
    -------
    matplotlib.figure.Figure
        As large as the boxes need.

    Examples
    --------
    >>> from fastrbn import plots
    >>> box = {"x": 1.0, "width": 1.5, "height": 0.28, "detail": ""}
    >>> boxes = [{**box, "y": 2.0, "title": "x", "kind": "leaf"}, {**box, "y": 1.0, "title": "ReLU", "kind": "op"}]
    >>> fig = plots.plot_graph(boxes, [[(1.0, 1.86), (1.0, 1.14)]])
    """
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path

    routes = list(routes)
    points = [point for route in routes for point in _vertices(route)]
    left, right = _span([(b["x"], b["width"]) for b in boxes] + [(x, 0) for x, _ in points])
    low, high = _span([(b["y"], b["height"]) for b in boxes] + [(y, 0) for _, y in points])
    kinds = [kind for kind in _KINDS if any(b["kind"] == kind for b in boxes)]
    columns = max(min(int((right - left) / 2.1), len(kinds)), 1)
    low -= 0.22 * -(-len(kinds) // columns) + 0.1  # room for the legend
    fig = new_figure(right - left, high - low)
    fig.set_layout_engine("none")  # inches stay inches
    ax = fig.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(low, high))
    ax.set_axis_off()
    for route in routes:
        curve, style = _vertices(route), "-|>,head_length=3,head_width=1.6"
        path = Path(curve, [Path.MOVETO, *[Path.CURVE4] * (len(curve) - 1)])
        ax.add_patch(FancyArrowPatch(path=path, arrowstyle=style, color=_EDGE, lw=0.8, shrinkA=0, shrinkB=0))
    for b in boxes:
        face, edge, _ = _KINDS[b["kind"]]
        corner, style = (b["x"] - b["width"] / 2, b["y"] - b["height"] / 2), "round,pad=0,rounding_size=0.06"
        ax.add_patch(FancyBboxPatch(corner, b["width"], b["height"], boxstyle=style, fc=face, ec=edge, lw=0.9))
        ax.text(b["x"], b["y"] + (0.085 if b["detail"] else 0), b["title"], ha="center", va="center", fontsize=_TITLE)
        ax.text(b["x"], b["y"] - 0.09, b["detail"], ha="center", va="center", fontsize=SMALL, color="#4a5560")
    _add_legend(fig, kinds, columns)
    return fig


def _add_legend(fig: Figure, kinds: Sequence[str], columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(fc=_KINDS[kind][0], ec=_KINDS[kind][1], label=_KINDS[kind][2]) for kind in kinds]
    if handles:
        fig.legend(handles=handles, loc="lower left", ncols=columns, fontsize=SMALL, frameon=False, borderaxespad=0.2)


def _span(pairs: Iterable[tuple[float, float]], margin: float = 0.15) -> tuple[float, float]:
    """First and last coordinate of things at (centre, size), with a margin."""
    pairs = list(pairs)
    first, last = min((c - s / 2 for c, s in pairs), default=0), max((c + s / 2 for c, s in pairs), default=1)
    return first - margin, last + margin


def _vertices(points: Sequence[Point]) -> list[Point]:
    """Of cubic Bézier curves through the points, vertical at each."""
    vertices = [points[0]]
    for i, ((ax, ay), (bx, by)) in enumerate(zip(points, points[1:])):
        half = (ay + by) / 2 + (0 if ay != by else 0.22 if i else -0.22)  # level: round the bottom, then over the top
        vertices += [(ax, half), (bx, half), (bx, by)]
    return vertices
