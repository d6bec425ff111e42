"""What all pictures share: the palette, figures and axes, labels that keep clear of the data, smoothing, saving."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow, and wine: distinguishable for colour-blind readers and, mostly, in grey print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
STYLES = ("-", "--", ":")  # one for each pass through the colours
MARKS = "osD^vP*Xph<>"
MAIN, WARNING = COLORS[0], COLORS[1]
GREY, BLANK = "#b9c0c7", "#e9ecef"  # lines in the background; cells of an image without a value
TEXT, SMALL = 9, 8  # sizes in points
DPI = 130
SMOOTH_FROM = 60  # values; fewer are readable as they are


def in_notebook() -> bool:
    """Return True if the running cell (Jupyter, Colab) can show pictures and bars."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" or (shell is not None and "google.colab" in sys.modules)


def new_figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """Make an empty figure that a notebook shows once, at the end of its cell.

    Parameters
    ----------
    width, height : float, default 7.0 and 4.0
        Size in inches.

    Returns
    -------
    matplotlib.figure.Figure
        Outside notebooks pyplot does not know it: no window opens and no backend is chosen.

    Examples
    --------
    >>> from fastrbn import plots
    >>> plots.new_figure(3, 2).get_size_inches().tolist()
    [3.0, 2.0]
    """
    if not in_notebook():
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained")
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=(width, height), layout="constrained")
    # A cell that ends in the figure would show it twice: as its value and as pyplot's open figure.
    fig._ipython_display_ = lambda: _show_and_close(fig)  # type: ignore[attr-defined]  # IPython calls it
    return fig


def _show_and_close(fig: Figure) -> None:
    import matplotlib.pyplot as plt
    from IPython.display import Image, display

    file = io.BytesIO()
    fig.savefig(file, format="png", bbox_inches="tight")
    plt.close(fig)
    display(Image(file.getvalue()))


def png(fig: Figure) -> bytes:
    """Return the picture as the content of a PNG file.

    Parameters
    ----------
    fig : matplotlib.figure.Figure
        Any figure; 130 dots per inch.

    Returns
    -------
    bytes
        The file's content.

    Examples
    --------
    >>> from fastrbn import plots
    >>> plots.png(plots.plot_loss([2.0, 1.0]))[1:4]
    b'PNG'
    """
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def axes(fig: Figure, where: Any = 111, title: str = "", xlabel: str = "", ylabel: str = "", grid: bool = True) -> Axes:
    """Add axes at `where` (what `add_subplot` takes), with the sizes of all pictures here."""
    from matplotlib.ticker import MaxNLocator

    ax = fig.add_subplot(where)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=TEXT, loc="left")
    ax.set_xlabel(xlabel, fontsize=TEXT)
    ax.set_ylabel(ylabel, fontsize=TEXT)
    ax.tick_params(labelsize=SMALL)
    if grid:
        ax.grid(alpha=0.25, lw=0.6)
    if xlabel in ("step", "epoch"):
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    return ax


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of the `i`-th of many lines."""
    return {"color": COLORS[i % len(COLORS)], "ls": STYLES[i // len(COLORS) % len(STYLES)]}


def dark(color: str) -> str:
    """A darker shade of a colour `#rrggbb`, for text."""
    return "#" + "".join(f"{int(0.7 * int(color[i : i + 2], 16)):02x}" for i in (1, 3, 5))


def outside_legend(fig: Figure, handles: Sequence, labels: Sequence[str], title: str) -> None:
    """Put a legend at the right of all axes, in as many columns as the figure's height needs."""
    if not len(labels):
        return
    rows = max(int((fig.get_figheight() - 0.4) * 72 / (1.5 * SMALL)), 1)
    sizes: dict[str, Any] = {"fontsize": SMALL, "title_fontsize": SMALL, "ncols": -(-len(labels) // rows)}
    fig.legend(handles, labels, loc="outside right upper", title=title, alignment="left", frameon=False, **sizes)


def label_ends(
    ax: Axes, ends: Iterable[tuple[float, float, str, str]], bold: Collection[str] = (), ls: str = "-"
) -> None:
    """Write names at the right of the axes: of (x, y, text, colour), each level with its point where there is room.

    Call it last: the limits of the axes must be final. `ls` is the style of the thin lines from names to points.
    """
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    to_axes = ax.transData + ax.transAxes.inverted()
    placed = sorted((min(max(to_axes.transform((x, y))[1], 0.0), 1.0), x, y, text, color) for x, y, text, color in ends)
    height = ax.get_window_extent().height  # before the layout, which makes axes larger, not smaller
    lines = 1 + max((text.count("\n") for _, _, _, text, _ in placed), default=0)
    gap = lines * 1.35 * SMALL * ax.figure.dpi / 72 / height
    for at, (_, x, y, text, color) in zip(spread([p[0] for p in placed], gap), placed):
        point = min(max(x, left), right), min(max(y, low), high)
        line = {"arrowstyle": "-", "color": color, "lw": 0.6, "ls": ls, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        style: dict[str, Any] = {"fontsize": SMALL, "color": dark(color), "va": "center", "arrowprops": line}
        style["fontweight"] = "bold" if text in bold else "normal"
        ax.annotate(text, point, (1.03, at), "data", "axes fraction", annotation_clip=False, **style)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in 0 to 1 where there is room, as near to the ascending `wanted` as can be."""
    blocks: list[list[float]] = []  # [sum, count] of what lies together, of wanted - i * gap
    for i, w in enumerate(wanted):
        blocks.append([w - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    free = [total / count for total, count in blocks for _ in range(int(count))]
    top = 1 - (len(wanted) - 1) * gap
    low, high = (0.0, top) if top >= 0 else (top / 2, top / 2)
    return [min(max(at, low), high) + i * gap for i, at in enumerate(free)]


def floats(values: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """A flat float64 tensor of them."""
    return torch.as_tensor(values, dtype=torch.float64).flatten() if len(values) else torch.empty(0).double()


def smoothed(values: torch.Tensor, share: int = 30) -> tuple[torch.Tensor | None, int]:
    """(running mean over the first dimension, width of its window), or (None, 1) for fewer than 60 values.

    The window is centred, a `share`-th of the values wide and narrower at the ends. What is NaN or infinite stays out.
    """
    n, finite = len(values), values.isfinite()
    counted = int(finite.reshape(n, -1).any(1).sum()) if n else 0
    if counted < SMOOTH_FROM:
        return None, 1
    half = max(counted // (2 * share), 1)
    start = torch.zeros(1, *values.shape[1:], dtype=torch.float64)
    summed = torch.where(finite, values, 0.0), finite
    sums, counts = (torch.cat([start, t.double().cumsum(0)]) for t in summed)
    low = (torch.arange(n) - half).clamp(min=0)
    high = (torch.arange(n) + half + 1).clamp(max=n)
    means = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return torch.where(finite, means, torch.nan), 2 * half + 1


def last_finite(values: torch.Tensor) -> int | None:
    """Index of the last finite value; None where there is none."""
    there = values.isfinite().nonzero().flatten()
    return int(there[-1]) if len(there) else None
