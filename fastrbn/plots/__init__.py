"""Pictures. The only place that draws: everything here takes lists, tensors or arrays and returns a matplotlib Figure.

matplotlib is imported when the first picture is made. Outside notebooks no window opens and no backend is chosen: save
the figure with `fig.savefig("loss.png")`. In a notebook it shows itself, once.
"""

from __future__ import annotations

import math
import sys

import torch

_INK, _ACCENT = "#1f4e79", "#c8553d"
_BOXES = {  # kind of a graph's box: face, edge
    "op": ("#ffffff", "#8a94a0"),
    "module": ("#dbe7f3", _INK),
    "parameter": ("#fdf0d5", "#b08d3c"),
    "leaf": ("#e9ecef", "#8a94a0"),
    "root": ("#d9ead3", "#38761d"),
    "warning": ("#f8ddd6", _ACCENT),
}


def in_notebook() -> bool:
    """Whether pictures and bars can be shown in the cell that is running (Jupyter, Colab)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" or (shell is not None and "google.colab" in sys.modules)


def new_figure(width=7.0, height=4.0):
    """An empty Figure, in inches. In a notebook pyplot knows it, and so it is shown at the end of the cell."""
    if not in_notebook():
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained")
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=(width, height), layout="constrained")
    # A cell that ends in the figure would show it twice: as its value and as pyplot's open figure.
    fig._ipython_display_ = lambda: _show_and_close(fig)
    return fig


def _show_and_close(fig):
    import io

    import matplotlib.pyplot as plt
    from IPython.display import Image, display

    png = io.BytesIO()
    fig.savefig(png, format="png", bbox_inches="tight")
    plt.close(fig)
    display(Image(png.getvalue()))


def plot_loss(losses):
    """Loss over training steps; from 60 steps on with its running mean over a thirtieth of them."""
    fig = new_figure()
    _draw_loss(_axes(fig, xlabel="step", ylabel="loss"), _floats(losses))
    return fig


def plot_lr(lrs):
    """Learning rate over training steps."""
    fig = new_figure()
    _draw_lr(_axes(fig, xlabel="step", ylabel="learning rate"), _floats(lrs))
    return fig


def plot_run(losses, lrs, history):
    """A fit at a glance: loss and learning rate over steps, then averages over epochs (`AvgStatsCallback.history`)."""
    names = _measured(history)
    columns = 2 if not names else max(2, min(len(names), 4))
    rows = 1 + -(-len(names) // columns)
    fig = new_figure(4.6 * columns, 3.4 * rows)
    _draw_loss(_axes(fig, rows, columns, 1, xlabel="step", ylabel="loss"), _floats(losses))
    _draw_lr(_axes(fig, rows, columns, 2, xlabel="step", ylabel="learning rate"), _floats(lrs))
    for i, name in enumerate(names):
        _draw_history(_axes(fig, rows, columns, columns + i + 1, xlabel="epoch", ylabel=name), history, name)
    return fig


def plot_history(history):
    """The rows of `AvgStatsCallback.history`: a panel for the loss and one for each metric, over epochs."""
    names = _measured(history)
    fig = new_figure(4.6 * max(len(names), 1), 3.4)
    for i, name in enumerate(names):
        _draw_history(_axes(fig, 1, len(names), i + 1, xlabel="epoch", ylabel=name), history, name)
    return fig


def plot_lr_find(lrs, losses, suggestion=None):
    """Loss against learning rate (logarithmic), a mark at `suggestion`. The axis ends where the loss explodes."""
    lrs, losses = _floats(lrs), _floats(losses)
    fig = new_figure()
    ax = _axes(fig, xlabel="learning rate", ylabel="loss")
    ax.plot(lrs, losses, color=_INK, lw=1.6)
    if lrs and min(lrs) > 0:
        ax.set_xscale("log")
    finite = sorted(v for v in losses if math.isfinite(v))
    if finite:
        low, start = finite[0], losses[0] if math.isfinite(losses[0]) else finite[0]
        early = [v for v in losses[: len(losses) // 2] if math.isfinite(v)]  # there the rates are small still
        top = max([start + 0.6 * (start - low), *early])
        if top > low:
            ax.set_ylim(low - 0.08 * (top - low), top + 0.08 * (top - low))
    if suggestion is not None:
        ax.axvline(suggestion, color=_ACCENT, lw=1.2, ls="--", label=f"suggestion: {suggestion:.2g}")
        ax.legend(frameon=False)
    return fig


def plot_magnitudes(values, names, steps, title="magnitude"):
    """Magnitudes of parameters over steps: `values` (steps, names), a row for each name, colour the logarithm.

    What is 0 or missing stays blank, what is NaN or infinite after it was finite is red. Names in the order of the
    model, from top to bottom. Of many steps, neighbours share a pixel, which shows their largest value.
    """
    from .diagnose import magnitudes

    return magnitudes(values, names, steps, title)


def plot_magnitude_lines(values, names, steps, title="magnitude"):
    """Magnitudes of parameters over steps, `values` (steps, names), a line for each name, logarithmic.

    With more than 10 names those that grew most have a colour and their name in the legend, the others are grey. A line
    that ends in NaN or Inf has a cross at its last finite value.
    """
    from .diagnose import magnitude_lines

    return magnitude_lines(values, names, steps, title)


def plot_activations(means, stds, near_zero, names, steps, dead=None):
    """Statistics of module outputs over steps, each (steps, names): a panel for mean, deviation, share near zero, and
    for the share of dead channels when it is given. Where the mean was finite and is no more, there is a cross."""
    from .diagnose import activations

    return activations(means, stds, near_zero, names, steps, dead)


def plot_histograms(hists, names, steps, value_range):
    """Histograms of module outputs over steps, `hists` (steps, names, bins): an image for each module, colour
    log(1 + count) from 0 to the module's largest, values upwards. NaN (the module was not called) stays blank."""
    from .diagnose import histograms

    return histograms(hists, names, steps, value_range)


def box_size(title: str, detail: str) -> tuple[float, float]:
    """Width and height in inches of a box of `plot_graph` with these texts, on one line each."""
    return 0.2 + max(0.074 * len(title), 0.062 * len(detail), 0.3), 0.38 if detail else 0.25


def plot_graph(boxes, routes):
    """Boxes and the edges between them, everything in inches, y upwards.

    `boxes`: dictionaries with `x`, `y` (the centre), `width`, `height`, `title`, `detail` and `kind` (op, module,
    parameter, leaf, root, warning). `routes`: for each edge its points, from box to box; the last end has the arrow.
    """
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    points = [vertex for route in routes for vertex in _curve(route).vertices]
    left, right = _span([(b["x"], b["width"]) for b in boxes] + [(x, 0) for x, _ in points])
    low, high = _span([(b["y"], b["height"]) for b in boxes] + [(y, 0) for _, y in points])
    fig = new_figure(right - left, high - low)
    fig.set_layout_engine("none")  # inches stay inches
    ax = fig.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(low, high))
    ax.set_axis_off()
    for route in routes:
        style = "-|>,head_length=3,head_width=1.6"
        ax.add_patch(
            FancyArrowPatch(path=_curve(route), arrowstyle=style, color="#6b7580", lw=0.8, shrinkA=0, shrinkB=0)
        )
    for b in boxes:
        face, edge = _BOXES[b["kind"]]
        corner, style = (b["x"] - b["width"] / 2, b["y"] - b["height"] / 2), "round,pad=0,rounding_size=0.06"
        ax.add_patch(FancyBboxPatch(corner, b["width"], b["height"], boxstyle=style, fc=face, ec=edge, lw=0.9))
        ax.text(b["x"], b["y"] + (0.075 if b["detail"] else 0), b["title"], ha="center", va="center", fontsize=8)
        ax.text(b["x"], b["y"] - 0.085, b["detail"], ha="center", va="center", fontsize=6.5, color="#4a5560")
    return fig


def _span(pairs, margin=0.15):
    """From the first to the last of things at (centre, size)."""
    first, last = min((c - s / 2 for c, s in pairs), default=0), max((c + s / 2 for c, s in pairs), default=1)
    return first - margin, last + margin


def _curve(points):
    """Through the points, upright at each."""
    from matplotlib.path import Path

    vertices, codes = [points[0]], [Path.MOVETO]
    for i, ((ax, ay), (bx, by)) in enumerate(zip(points, points[1:])):
        half = (ay + by) / 2 + (0 if ay != by else 0.22 if i else -0.22)  # level: round the bottom, then over the top
        vertices += [(ax, half), (bx, half), (bx, by)]
        codes += [Path.CURVE4] * 3
    return Path(vertices, codes)


def plot_comparison(panels, xlabel="batch size", dashed=(), ylabel="validation accuracy, %"):
    """Accuracy of norms against batch size (or another number above 0, logarithmic), a line a norm with its spread.

    - `panels`: (title, {norm: points}); a point is a dict of `x`, `mean` (percent, None where there is none), `std`
      (None: no bar), `at chance`, `diverged` and `refused` (how many of `total` cells).
    - `dashed`: the norms whose lines are dashed. `ylabel`: what `mean` is.

    The axis begins where the better three quarters of the cells can be told apart. What is below, at chance, diverged
    or refused has its mark in the strip under it.
    """
    from .compare import comparison

    return comparison(panels, xlabel, dashed, ylabel)


def plot_weight_norms(panels, dashed=()):
    """Norms of weights over steps, a line a norm: `panels` of (title, {norm: (steps, values)}); logarithmic where they
    differ by more than three times.

    A line that ends before the others (training was stopped), or in NaN or Inf, has a cross at its last finite value.
    """
    from .compare import weight_norms

    return weight_norms(panels, dashed)


def _draw_loss(ax, losses):
    smoothed = _running_mean(losses) if len(losses) >= 60 and all(map(math.isfinite, losses)) else None
    ax.plot(losses, color=_INK, lw=0.8 if smoothed else 1.4, alpha=0.35 if smoothed else 1, label="each step")
    if smoothed:
        ax.plot(smoothed, color=_INK, lw=1.8, label="running mean")
        ax.legend(frameon=False)
    finite = [v for v in losses if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 50:
        ax.set_yscale("log")


def _draw_lr(ax, lrs):
    ax.plot(lrs, color=_INK, lw=1.8)
    ax.set_ylim(bottom=0)


def _draw_history(ax, history, name):
    for which, color in (("train", _INK), ("valid", _ACCENT)):
        points = [(row["epoch"], row[f"{which}_{name}"]) for row in history]
        points = [p for p in points if p[1] is not None]
        if points:
            ax.plot(*zip(*points), color=color, lw=1.8, marker="o", ms=3, label=which)
    ax.set_xlim(-0.5, max((row["epoch"] for row in history), default=0) + 0.5)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False)


def _measured(history):
    return [key.removeprefix("train_") for key in (history[0] if history else ()) if key.startswith("train_")]


def _axes(fig, rows=1, columns=1, index=1, xlabel=None, ylabel=None, grid=True):
    ax = fig.add_subplot(rows, columns, index)
    ax.spines[["top", "right"]].set_visible(False)
    if xlabel:
        ax.set_xlabel(xlabel)
    if ylabel:
        ax.set_ylabel(ylabel)
    if grid:
        ax.grid(alpha=0.25, lw=0.6)
    return ax


def _colors(n):
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    return [shades(0.92 * i / max(n - 1, 1)) for i in range(n)]


def _floats(values) -> list[float]:
    return torch.as_tensor(values, dtype=torch.float64).flatten().tolist() if len(values) else []


def _running_mean(values):
    half = len(values) // 60
    total, sums = 0.0, [0.0]
    for v in values:
        total += v
        sums.append(total)
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]
