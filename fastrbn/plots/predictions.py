"""Pictures of predictions: a confusion matrix, and the samples with the highest loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .figure import BLANK, MAIN, SMALL, TEXT, WARNING, axes, dark, new_figure, outside_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = Sequence[float] | torch.Tensor
_COUNTED = 20  # classes; the cells of more have no room for their counts, and the most confused pairs are listed
_LISTED = 25  # pairs
_LINE = 0.15  # inches that a name needs
_LARGEST = 15.0  # inches; of more names than fit, every k-th stands at the axes
_LETTERS = 22  # of a name above an image
_LINE_LETTERS = 32  # of a line above an image


def plot_confusion(matrix: Any, classes: Sequence[str] | None = None) -> Figure:
    """Draw a confusion matrix: a row for each target, a column for each prediction.

    Parameters
    ----------
    matrix : Tensor (C, C), list of lists, or a metric
        Counts. A metric is an object whose `compute()` returns them, such as `ConfusionMatrix`.
    classes : sequence of str, optional
        Names of the classes. Default: their numbers.

    Returns
    -------
    matplotlib.figure.Figure
        The colour is the share of the row, with small shares emphasised. Up to 20 classes have their counts in the
        cells; with more, the pairs that are confused most are listed at the right. Rows without samples are grey.

    Raises
    ------
    ValueError
        If the matrix is not square, or there is not one name for each class.

    Examples
    --------
    >>> from fastrbn import plots
    >>> fig = plots.plot_confusion([[8, 2], [0, 10]], classes=["cat", "dog"])
    >>> fig.axes[0].get_title("left")
    'Confusion matrix\\n90.0 % of 20 samples right'
    """
    counts = torch.as_tensor(matrix.compute() if hasattr(matrix, "compute") else matrix).detach().cpu().double()
    if counts.dim() != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
        raise ValueError(
            f"a confusion matrix has a row and a column for each class, (C, C); got shape {tuple(counts.shape)}"
        )
    names = _names(classes, len(counts))
    n, total = len(names), float(counts.sum())
    rows = counts.sum(1, keepdim=True)
    shares = torch.where(rows > 0, counts / rows.clamp(min=1), torch.nan)
    fig, ax, image = _draw_matrix(shares, names, _cell_size(counts))
    right = (
        f"{100 * float(counts.diagonal().sum()) / total:.1f} % of {total:.0f} samples right" if total else "no samples"
    )
    ax.set_title(f"Confusion matrix\n{right}", fontsize=TEXT, loc="left")
    colors = image.get_cmap()(image.norm(shares.numpy()))
    if n <= _COUNTED:
        for i, j in counts.nonzero().tolist():
            light = sum(colors[i, j, :3]) > 1.6
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL}
            ax.text(j, i, f"{counts[i, j]:.0f}", color="black" if light else "white", **style)
    else:
        from matplotlib.patches import Patch

        pairs = _confused(counts)[:_LISTED]
        texts = [f"{_short(names[i])} → {_short(names[j])}: {counts[i, j]:.0f}" for i, j in pairs]
        outside_legend(fig, [Patch(color=colors[i, j]) for i, j in pairs], texts, "Most confused")
    return fig


def _draw_matrix(shares: torch.Tensor, names: list[str], cell: float) -> tuple[Figure, Any, Any]:
    n, longest = len(names), max(map(len, names))
    side = min(max(cell * n, 2.2), _LARGEST)
    margin = 0.5 + 0.075 * longest
    rotated = 0.075 * longest + 0.05 > side / n
    listed = 0.075 * (2 * min(longest, _LETTERS) + 14) if n > _COUNTED else 0.0
    fig = new_figure(side + margin + 0.9 + listed, side + (margin if rotated else 0.5) + 0.5)
    ax = axes(fig, xlabel="predicted", ylabel="target", grid=False)
    ax.set_facecolor(BLANK)
    style: dict[str, Any] = {"cmap": "Blues", "interpolation": "nearest" if n <= 200 else "antialiased"}
    image = ax.imshow(shares.numpy(), norm=_power_norm(), **style)
    every = math.ceil(n * _LINE / side)
    ticks = range(0, n, every)
    ax.set_xticks(ticks, names[::every], fontsize=SMALL, rotation=90 if rotated else 0)
    ax.set_yticks(ticks, names[::every], fontsize=SMALL)
    ax.tick_params(length=0 if every == 1 else 2)
    height = min(2.4 / side, 1.0)
    bar = fig.colorbar(image, cax=ax.inset_axes((1 + 0.12 / side, 1 - height, 0.15 / side, height)))
    bar.set_ticks([0, 0.05, 0.25, 0.5, 1.0], labels=["0", "5 %", "25 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=SMALL, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]  # a Spine
    return fig, ax, image


def _power_norm() -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, 1)  # errors are small shares


def _cell_size(counts: torch.Tensor) -> float:
    """Inches of a cell."""
    if len(counts) > _COUNTED:
        return _LINE
    return max(0.3, 0.12 + 0.075 * len(f"{counts.max():.0f}"))


def _confused(counts: torch.Tensor) -> list[tuple[int, int]]:
    """(target, prediction) of the errors, the most frequent first."""
    errors = counts.clone().fill_diagonal_(0)
    order = errors.flatten().argsort(descending=True, stable=True)[: int((errors > 0).sum())]
    return [divmod(int(k), len(counts)) for k in order[:_LISTED]]


def plot_worst(
    images: Sequence[Any] | torch.Tensor,
    targets: Sequence[Any] | torch.Tensor,
    preds: Sequence[Any] | torch.Tensor,
    losses: Numbers,
    probs: Numbers | None = None,
    classes: Sequence[str] | None = None,
    n: int = 9,
    mean: Numbers | float | None = None,
    std: Numbers | float | None = None,
) -> Figure:
    """Draw the samples with the highest loss, the worst first, each with target, prediction, loss and probability.

    Parameters
    ----------
    images : Tensor (N, C, H, W) or (N, H, W), or sequence of such images
        1 or 3 channels: bytes, or floats from 0 to 1. An image with values outside this range is drawn from its
        smallest to its largest value.
    targets, preds : sequence of N
        Class indices, or values of a regression.
    losses : sequence of N floats
        The loss of each sample. NaN counts as the highest.
    probs : sequence of N floats, or Tensor (N, classes), optional
        Probability of the predicted class, or of all classes.
    classes : sequence of str, optional
        Names of the classes. Default: their numbers.
    n : int, default 9
        Largest number of images.
    mean, std : float or sequence of C floats, optional
        What the images were normalised with; `images * std + mean` is drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Rows of images. The text of a wrong prediction is orange, of a right one blue.

    Raises
    ------
    ValueError
        If the arguments have different lengths, or an image has other channels.

    Examples
    --------
    >>> from fastrbn import plots
    >>> images, losses = torch.rand(3, 1, 8, 8), [0.1, 2.5, 0.7]
    >>> fig = plots.plot_worst(images, [0, 1, 1], [0, 0, 1], losses, probs=[0.9, 0.8, 0.5], classes=["cat", "dog"])
    >>> print(fig.axes[0].get_title("left"))
    target dog
    predicted cat
    loss 2.5, probability 0.80
    """
    values = torch.as_tensor(losses).detach().cpu().double().flatten()
    for name, given in {"images": images, "targets": targets, "preds": preds, "probs": probs}.items():
        if given is not None and len(given) != len(values):
            raise ValueError(
                f"plot_worst needs one loss for each sample; got {len(values)} losses, {len(given)} {name}"
            )
    order = values.nan_to_num(math.inf).argsort(descending=True, stable=True)[: max(n, 0)].tolist()
    texts, right = [], []
    for i in order:
        target, pred = _number(targets[i]), _number(preds[i])
        text = f"target {_called(target, classes)}\npredicted {_called(pred, classes)}\nloss {float(values[i]):.3g}"
        if probs is not None:
            p = torch.as_tensor(probs[i]).flatten()
            text += f", probability {float(p[int(pred)] if len(p) > 1 else p):.2f}"
        texts.append(text)
        right.append(target == pred)
    return plot_images([images[i] for i in order], texts, right, mean, std)


def plot_images(
    images: Sequence[Any] | torch.Tensor,
    texts: Sequence[str] | None = None,
    right: Sequence[bool | None] | None = None,
    mean: Numbers | float | None = None,
    std: Numbers | float | None = None,
) -> Figure:
    """Draw images in rows, each with a text above it.

    Parameters
    ----------
    images, mean, std
        As for `plot_worst`.
    texts : sequence of N str, optional
        Lines are cut after 32 characters.
    right : sequence of N bool or None, optional
        False makes the text orange, True blue, None black.

    Returns
    -------
    matplotlib.figure.Figure
        As many rows as columns, or one fewer.

    Examples
    --------
    >>> from fastrbn import plots
    >>> [ax.get_title("left") for ax in plots.plot_images(torch.rand(2, 1, 8, 8), ["cat", "dog"]).axes]
    ['cat', 'dog']
    """
    n = len(images)
    columns = max(math.ceil(math.sqrt(n)), 1)
    rows = max(math.ceil(n / columns), 1)
    lines = max((text.count("\n") + 1 for text in texts or ()), default=0)
    fig = new_figure(max(2.3 * columns, 2.3), (2.2 + 0.15 * lines) * rows)
    grid = fig.add_gridspec(rows, columns)
    for i in range(n):
        ax = axes(fig, grid[i // columns, i % columns], grid=False)
        if texts is not None:
            colors = {None: "black", True: dark(MAIN), False: dark(WARNING)}
            color = colors[None if right is None else right[i]]
            text = "\n".join(_short(line, _LINE_LETTERS) for line in texts[i].split("\n"))
            ax.set_title(text, fontsize=SMALL, loc="left", color=color)
        draw_image(ax, images[i], mean, std)
    return fig


def draw_image(ax: Any, image: Any, mean: Numbers | float | None = None, std: Numbers | float | None = None) -> None:
    """Draw one image, (C, H, W) or (H, W), on `ax`, without ticks; see `plot_worst`."""
    pixels = torch.as_tensor(image).detach().cpu()
    pixels = pixels[None] if pixels.dim() == 2 else pixels
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(
            f"an image has the shape (C, H, W) with 1 or 3 channels, or (H, W); got {tuple(pixels.shape)}: pass "
            f"channels first, and three of them"
        )
    pixels = pixels.float() if pixels.is_floating_point() or pixels.dtype == torch.bool else pixels.float() / 255
    if std is not None:
        pixels = pixels * torch.as_tensor(std).float().reshape(-1, 1, 1)
    if mean is not None:
        pixels = pixels + torch.as_tensor(mean).float().reshape(-1, 1, 1)
    pixels = pixels.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    low, high = (float(v) for v in pixels.aminmax())
    if mean is None and std is None and (low < 0 or high > 1):
        pixels = (pixels - low) / max(high - low, 1e-12)
    pixels = pixels.clamp(0, 1)
    smooth = "nearest" if max(pixels.shape[1:]) <= 64 else "antialiased"
    shown = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    ax.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation=smooth)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _names(classes: Sequence[str] | None, n: int) -> list[str]:
    names = list(map(str, range(n) if classes is None else classes))
    if len(names) != n:
        raise ValueError(f"classes must have one name for each of the {n} classes; got {len(names)}")
    return names


def _number(value: Any) -> float | int:
    return value.item() if hasattr(value, "item") else value


def _called(value: float | int, classes: Sequence[str] | None) -> str:
    if classes is not None:
        return _short(str(classes[int(value)]))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(name: str, most: int = _LETTERS) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
