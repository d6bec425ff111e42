"""How the pictures of a comparison are drawn; `plots.py` says what they show."""

from __future__ import annotations

import math

from . import _axes, new_figure

_MARKS = "osD^vP*Xph<>"
_ROWS = ("below", "at chance", "diverged", "refused")  # of the strip under the axes
_CHOICE = (
    "tab:blue",
    "tab:red",
    "tab:green",
    "tab:orange",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
    "tab:cyan",
    "black",
    "tab:gray",
)


def _laid_out(panels, dashed):
    """Panels (title, lines by label) as a list, all labels, the style of each, and the rows and columns of a grid."""
    panels = list(panels)
    labels = list(dict.fromkeys(label for _, lines in panels for label in lines))
    styles = {label: _style(i, label in dashed) for i, label in enumerate(labels)}
    columns = min(len(panels), 3) or 1
    return panels, labels, styles, -(-len(panels) // columns) or 1, columns


def comparison(panels, xlabel, dashed, ylabel):
    panels, labels, styles, rows, columns = _laid_out(panels, dashed)
    fig = new_figure(max(7.6, 4.4 * columns + 1.8), 4.6 * rows)
    heights = [part for _ in range(rows) for part in (4.0, 1.0)]
    grid = fig.add_gridspec(2 * rows, columns, height_ratios=heights)
    for i, (title, series) in enumerate(panels):
        row, column = divmod(i, columns)
        upper, lower = (fig.add_subplot(grid[2 * row + part, column]) for part in (0, 1))
        _panel(upper, lower, series, styles, labels)
        upper.set_title(title, fontsize=9)
        lower.set_xlabel(xlabel)
        if column == 0:
            upper.set_ylabel(ylabel)
    handles = [fig.axes[0].errorbar([], [], label=label, **styles[label]) for label in labels] if panels else []
    if handles:
        fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, title="norm")
    return fig


def _style(i, dashed):
    return {
        "color": _CHOICE[i % len(_CHOICE)],
        "marker": _MARKS[i % len(_MARKS)],
        "ms": 5,
        "lw": 1.4,
        "ls": "--" if dashed else "-",
        "capsize": 2.5,
        "elinewidth": 1,
    }


def _panel(upper, lower, series, styles, labels):
    floor, top = _limits([p["mean"] for points in series.values() for p in points if p["mean"] is not None])
    xs = sorted({p["x"] for points in series.values() for p in points})
    used = set()
    for label, points in series.items():
        shift = 2 ** (min(0.07, 0.5 / len(labels)) * (labels.index(label) - (len(labels) - 1) / 2))
        drawn = [p for p in points if p["mean"] is not None]
        # a line goes on below the axis, and is not drawn across a batch size that has no accuracy
        for run in _runs(points):
            upper.plot(
                [p["x"] * shift for p in run],
                [p["mean"] for p in run],
                **{k: styles[label][k] for k in ("color", "lw", "ls")},
            )
        shown = [p for p in drawn if p["mean"] >= floor]
        upper.errorbar(
            [p["x"] * shift for p in shown],
            [p["mean"] for p in shown],
            [p["std"] or 0 for p in shown],
            **{**styles[label], "ls": "none"},
        )
        for p in points:
            used |= _strip(lower, p, p["x"] * shift, floor, styles[label])
    for ax in (upper, lower):
        ax.set_xscale("log", base=2)
        ax.set_xlim(min(xs, default=1) / 2**0.45, max(xs, default=1) * 2**0.45)
        ax.set_xticks(xs, [f"{x:g}" for x in xs])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    upper.set_ylim(floor, top)
    upper.grid(alpha=0.25, lw=0.6)
    upper.tick_params(labelbottom=False)
    _finish_strip(lower, floor, used)


def _runs(points):
    """The stretches of points with an accuracy."""
    run = []
    for p in points:
        if p["mean"] is None:
            if run:
                yield run
            run = []
        else:
            run.append(p)
    if run:
        yield run


def _limits(means):
    """(floor, top) of the axis: all cells when they lie close; else down to four times the way from the best to its
    lower quartile, so that a net at chance does not press the others into a line."""
    if not means:
        return 0.0, 100.0
    ordered = sorted(means)
    best, quartile = ordered[-1], ordered[len(ordered) // 4]
    floor = max(ordered[0], best - max(4 * (best - quartile), 0.5))
    margin = max(0.06 * (best - floor), 0.05)
    return max(floor - margin, 0.0), min(best + 2 * margin, 100.0)


def _strip(ax, p, x, floor, style):
    """Mark what the axis above does not show; the rows used."""
    found = {name: "" if p[name] == p["total"] else f"{p[name]}/{p['total']}" for name in _ROWS[1:] if p[name]}
    if p["mean"] is not None and p["mean"] < floor:
        found["below"] = f"{p['mean']:.0f}"
    for name, words in found.items():
        y = _ROWS.index(name)
        ax.plot([x], [y], color=style["color"], marker=style["marker"], ms=4.5, ls="none", clip_on=False)
        ax.annotate(words, (x, y), (0, 3.5), textcoords="offset points", fontsize=6, ha="center", color=style["color"])
    return set(found)


def _finish_strip(ax, floor, used):
    ax.set_yticks(range(len(_ROWS)), [f"below {floor:.3g}", *_ROWS[1:]], fontsize=7)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(_ROWS) - 0.4, -0.9)
    for tick, row in zip(ax.get_yticklabels(), _ROWS):
        tick.set_alpha(1.0 if row in used else 0.35)
    ax.set_facecolor("#f4f5f7")


def weight_norms(panels, dashed):
    panels, labels, styles, rows, columns = _laid_out(panels, dashed)
    fig = new_figure(max(7.6, 4.4 * columns + 1.8), 3.6 * rows)
    for i, (title, curves) in enumerate(panels):
        ax = _axes(fig, rows, columns, i + 1, xlabel="step", ylabel="norm of the convolutions' weights")
        ax.set_title(title, fontsize=9)
        _curves(ax, curves, styles)
    handles = (
        [
            fig.axes[0].plot([], [], label=label, **{k: styles[label][k] for k in ("color", "lw", "ls")})[0]
            for label in labels
        ]
        if panels
        else []
    )
    if handles:
        fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, title="norm")
    return fig


def _curves(ax, curves, styles):
    drawn = {
        label: [(s, n) for s, n in zip(steps, norms) if math.isfinite(n) and n > 0]
        for label, (steps, norms) in curves.items()
    }
    values = [n for points in drawn.values() for _, n in points]
    end = max((steps[-1] for steps, _ in curves.values() if steps), default=0)
    for label, points in drawn.items():
        if not points:
            continue
        style = {k: styles[label][k] for k in ("color", "lw", "ls")}
        ax.plot(*zip(*points), **style)
        if points[-1][0] < end:  # it was stopped, or is NaN from here on
            ax.plot(*points[-1], marker="x", ms=8, mew=2, color=style["color"])
    if values and max(values) > 3 * min(values):
        ax.set_yscale("log")
        _plain_log_ticks(ax)


def _plain_log_ticks(ax):
    low, high = ax.get_ylim()
    if high / low < 30:  # less than a few ticks at powers of ten
        ticks = [m * 10.0**e for e in range(-6, 12) for m in (1, 1.5, 2, 3, 4, 5, 7)]
        ticks = [t for t in ticks if low <= t <= high]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
