"""How magnitudes of parameters and statistics of activations are drawn; `plots.py` says what they show."""

from __future__ import annotations

import torch

from . import _ACCENT, _axes, _colors, new_figure

_BLANK, _GREY = "#e9ecef", "#b4bbc2"
_PIXELS = 800  # columns of an image: more than these no screen shows
_NAMED = 10  # lines that a legend can tell apart


def magnitudes(values, names, steps, title):
    values = torch.as_tensor(values).float().reshape(len(steps), len(names))
    broken = _broken(values)
    shown = torch.where((values > 0) & values.isfinite(), values, torch.nan)
    longest = max(map(len, names), default=0)
    fig = new_figure(7.0 + 0.07 * longest, max(2.4, 1.2 + 0.22 * len(names)))
    ax = _axes(fig, xlabel="step", grid=False)
    extent = _extent(steps, (len(names) - 0.5, -0.5))
    if not shown.isnan().all():
        image = ax.imshow(
            _joined(shown).T.numpy(), norm="log", aspect="auto", interpolation="nearest", extent=extent
        )
        fig.colorbar(image, ax=ax, pad=0.02, label=title)
    if broken.any():
        red = torch.tensor([int(_ACCENT[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        marks = _joined(broken.float()).T
        pixels = torch.cat([red.expand(*marks.shape, 3), marks[..., None]], -1)
        ax.imshow(pixels.numpy(), aspect="auto", interpolation="nearest", extent=extent)
        ax.set_title("red: NaN or infinite", fontsize=9, color=_ACCENT, loc="right")
    ax.set_facecolor(_BLANK)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.tick_params(axis="y", length=0)
    if len(names):
        ax.set_ylim(len(names) - 0.5, -0.5)
    return fig


def magnitude_lines(values, names, steps, title):
    values = torch.as_tensor(values).float().reshape(len(steps), len(names))
    fig = new_figure(9.0, 4.2)
    ax = _axes(fig, xlabel="step", ylabel=title)
    finite = values.isfinite()
    # a line at 0 has no place on a logarithmic axis: it ends, and begins again
    shown = torch.where(finite & (values > 0), values, torch.nan)
    named = set(range(len(names))) if len(names) <= _NAMED else set(_fastest(shown, _broken(values), _NAMED))
    colors = iter(_colors(len(named)))
    for column, name in enumerate(names):
        chosen = column in named
        color = next(colors) if chosen else _GREY
        y = shown[:, column]
        style = {"lw": 1.6, "label": name, "zorder": 3} if chosen else {"lw": 0.8, "alpha": 0.7}
        marker = "o" if len(steps) == 1 else None
        ax.plot(steps, y.numpy(), color=color, marker=marker, ms=3, **style)
        _mark_end(ax, steps, y, _broken(values[:, column, None]).any(), color)
    if not shown.isnan().all():
        ax.set_yscale("log")
    if named:
        others = f" ({len(names) - len(named)} more: grey)" if len(named) < len(names) else ""
        what = f"grew most{others}" if others else None
        fig.legend(loc="outside right upper", frameon=False, fontsize=8, title=what, title_fontsize=8)
    return fig


def activations(means, stds, near_zero, names, steps, dead):
    panels = [("mean", means), ("standard deviation", stds), ("share near zero", near_zero)]
    panels += [] if dead is None else [("share of dead channels", dead)]
    columns = 3 if len(panels) == 3 else 2
    rows = -(-len(panels) // columns)
    fig = new_figure(12.0 if columns == 3 else 10.0, 3.8 if rows == 1 else 6.4)
    colors = _colors(len(names))
    for i, (label, values) in enumerate(panels):
        ax = _axes(fig, rows, columns, i + 1, xlabel="step" if i >= len(panels) - columns else None, ylabel=label)
        values = torch.as_tensor(values).float().reshape(len(steps), len(names))
        marker = "o" if len(steps) == 1 else None
        for column, (name, color) in enumerate(zip(names, colors)):
            y = torch.where(values[:, column].isfinite(), values[:, column], torch.nan)
            ax.plot(steps, y.numpy(), color=color, lw=1.2, marker=marker, ms=3, label=name)
            _mark_end(ax, steps, y, label == "mean" and _broken(values[:, column, None]).any(), color)
        if len(steps) > 1:
            ax.set_xlim(steps[0], steps[-1])  # a line that ends early does so in all panels
        if label.startswith("share"):
            ax.set_ylim(-0.03, 1.03)
        else:
            _scale(ax, values, signed=label == "mean")
    lines, labels = fig.axes[0].get_legend_handles_labels()
    if labels:
        fig.legend(lines, labels, loc="outside right center", frameon=False, fontsize=8, title="module")
    return fig


def histograms(hists, names, steps, value_range):
    hists = torch.as_tensor(hists).float()
    columns = min(len(names), 4) or 1
    rows = -(-len(names) // columns) or 1
    fig = new_figure(3.2 * columns + 0.6, 2.3 * rows + 0.4)
    for i, name in enumerate(names):
        last_row = i + columns >= len(names)
        label = "value" if i % columns == 0 else None
        ax = _axes(fig, rows, columns, i + 1, xlabel="step" if last_row else None, ylabel=label, grid=False)
        ax.set_facecolor(_BLANK)
        ax.set_title(name, fontsize=9)
        if len(steps):
            image = _joined(hists[:, i].log1p()).T.numpy()
            ax.imshow(
                image, origin="lower", aspect="auto", cmap="magma", vmin=0, extent=_extent(steps, value_range)
            )
    return fig


def _scale(ax, values, signed):
    """Linear, or logarithmic where the values explode: their largest is above 1000 times the middle one."""
    sizes = values[values.isfinite() & (values != 0)].abs()
    if len(sizes) and sizes.max() > 1000 * sizes.median():
        if signed:
            ax.set_yscale("symlog", linthresh=float(sizes.median()))
            ax.yaxis.get_major_locator().set_params(numticks=7)
        else:
            ax.set_yscale("log")
    elif not signed:
        ax.set_ylim(bottom=0)


def _broken(values):
    """Where a column is NaN or infinite and has been finite before: later than that, a gap is no fault."""
    finite = values.isfinite()
    return ~finite & finite.cummax(0).values if len(values) else finite


def _fastest(shown, broken, n):
    """The columns that grew most, those that end broken first, in the order of the model."""
    low, high = (f(torch.where(shown.isnan(), edge, shown), 0) for f, edge in ((torch.amin, 9e37), (torch.amax, 0.0)))
    score = torch.where(broken.any(0), torch.inf, torch.where(high > 0, high / low, 0.0))
    return sorted(score.argsort(descending=True, stable=True)[:n].tolist()) if len(shown) else list(range(n))


def _mark_end(ax, steps, y, broken, color):
    if broken:
        there = (~y.isnan()).nonzero().flatten()
        if len(there):
            last = int(there[-1])
            ax.plot([steps[last]], [float(y[last])], marker="X", ms=7, color=color, mec=_ACCENT, ls="none", zorder=4)


def _extent(steps, vertical):
    if not len(steps):
        return None
    first, last = steps[0], steps[-1]
    half = (last - first) / max(len(steps) - 1, 1) / 2 or 0.5
    return (first - half, last + half, *vertical)


def _joined(table):
    """At most `_PIXELS` rows, each the largest of its neighbours, so that a single peak is seen."""
    if len(table) <= _PIXELS:
        return table
    edges = [i * len(table) // _PIXELS for i in range(_PIXELS + 1)]
    low = torch.where(table.isnan(), -torch.inf, table)
    rows = torch.stack([low[a:b].amax(0) for a, b in zip(edges, edges[1:])])
    return torch.where(rows.isinf(), torch.nan, rows)
