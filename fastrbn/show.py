"""Pictures of a learner's data and predictions: collects what the painters in `plots` draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from . import plots
from .learn import predict
from .learn.unpack import Unpack
from .random_state import RandomState
from .util import items_of, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["show_batch", "show_results", "show_worst"]


def show_batch(data: Any, n: int = 9) -> Figure:
    """Draw the first images of the training data as the loader yields them, with their targets.

    Random crops and flips are visible. Normalisation is undone if the loader knows it, as a `BatchLoader` does. Images
    with values outside 0 to 1 are scaled from their smallest to their largest value. Random states stay as
    they are, so that the next fit starts with the same batch.

    Parameters
    ----------
    data : DataBunch or Learner
        Its `classes` name the targets.
    n : int, default 9
        Largest number of images; nine make a grid of three by three.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If batches do not hold images with 1 or 3 channels, (N, C, H, W) or (N, H, W), or flat and square; if there is
        no batch.

    Examples
    --------
    >>> fig = show_batch(data, n=4)
    >>> len(fig.axes)
    4

    References
    ----------
    fastai's `DataLoaders.show_batch`.
    """
    n, learn = whole("n", n), data if hasattr(data, "model") else None
    data = data if learn is None else learn.data
    loader = data.train_dl
    with RandomState([loader]):
        batches = iter(loader)
        if batches is loader:
            raise ValueError(
                f"the training loader is an iterator ({type(loader).__name__}): a batch taken from it would be missing "
                f"in the fit; give the learner a loader that can be iterated more than once"
            )
        batch = next(batches, None)
        del batches  # its workers end before the random states come back
    if batch is None:
        raise ValueError("show_batch needs a batch; the training loader gives none")
    if learn is not None:
        xb, yb = Unpack.of(learn)(batch)
    else:
        xb, yb = (
            (batch[0], batch[-1] if len(batch) > 1 else None) if isinstance(batch, (tuple, list)) else (batch, None)
        )
    images = _images(xb)[:n]
    texts = [_text(target, data) for target in yb[: len(images)]] if isinstance(yb, (Tensor, list)) else None
    return plots.plot_images(images, texts, None, *_statistics(loader))


def show_results(run: Any, n: int = 9, data: Any = None, learn: Any = None) -> Figure:
    """Draw validation images, evenly spaced over the data set, with targets and predictions.

    Parameters
    ----------
    run : Runner
        Its callbacks prepare the batches, as in `Runner.predict`.
    n : int, default 9
        Largest number of images; nine make a grid of three by three.
    data, learn : optional
        As for `Runner.predict`. Of a loader or tensor that is given, the first images are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        The text of a wrong prediction is orange, of a right one blue.

    Raises
    ------
    ValueError
        If the model's inputs are not images; see `show_batch`.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn)
    >>> run.fit(1, learn)
    >>> len(show_results(run, n=6).axes)
    6

    References
    ----------
    fastai's `Learner.show_results`.
    """
    n, learn = whole("n", n), _learner(run, learn)
    bunch = data if hasattr(data, "valid_dl") else getattr(learn, "data", None) if data is None else None
    loader: Any = getattr(bunch, "valid_dl", None)
    ds: Any = loader.dataset if isinstance(loader, DataLoader) or hasattr(loader, "convert") else None
    if hasattr(ds, "__len__") and hasattr(ds, "__getitem__") and not isinstance(ds, IterableDataset):
        count = min(n, len(ds))
        data = Subset(ds, [i * len(ds) // count for i in range(count)])
    xb, found = predict.examples(run, data, learn, n, worst=False)
    texts, right, _ = _captions(found, learn.data)
    return plots.plot_images(_images(xb), texts, right, *_statistics(learn.data.valid_dl))


def show_worst(run: Any, n: int = 9, data: Any = None, learn: Any = None) -> Figure:
    """Draw the images with the highest loss, the worst first, with target, prediction, loss and probability.

    Parameters
    ----------
    run : Runner
        Its callbacks prepare the batches, as in `Runner.predict`.
    n : int, default 9
        Largest number of images; nine make a grid of three by three.
    data, learn : optional
        As for `Runner.predict`; the validation data by default.

    Returns
    -------
    matplotlib.figure.Figure
        The text of a wrong prediction is orange, of a right one blue.

    Raises
    ------
    ValueError
        If the model's inputs are not images, see `show_batch`; if there are no targets.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn)
    >>> run.fit(1, learn)
    >>> "loss" in show_worst(run).axes[0].get_title("left")
    True

    References
    ----------
    fastai's `Interpretation.plot_top_losses`.
    """
    n, learn = whole("n", n), _learner(run, learn)
    xb, found = predict.examples(run, data, learn, n, worst=True)
    texts, right, probs = _captions(found, learn.data)
    assert found.losses is not None  # `worst` asks for them
    for i, loss in enumerate(found.losses.tolist()):
        probability = "" if probs is None else f", probability {float(probs[i]):.2f}"
        texts[i] = f"{texts[i]}\nloss {loss:.3g}{probability}".lstrip()
    return plots.plot_images(_images(xb), texts, right, *_statistics(learn.data.valid_dl))


def _learner(run: Any, learn: Any) -> Any:
    if not hasattr(run, "cbs"):
        raise TypeError(
            f"pictures of predictions need the run that has trained; got {type(run).__name__}: write "
            f"show_results(run), or before any fit show_results(Runner(), learn=learn)"
        )
    return run.learn if learn is None else learn


def _images(xb: Any) -> Tensor:
    """The images of a batch; ValueError if it has none."""
    x = next(items_of(xb, Tensor), None)
    shape = () if x is None else tuple(x.shape)
    side = round(shape[1] ** 0.5) if len(shape) == 2 else 0
    if x is not None and side > 1 and side * side == shape[1]:  # rows of MNIST
        return x.reshape(-1, 1, side, side)
    if x is None or len(shape) not in (3, 4) or (len(shape) == 4 and shape[1] not in (1, 3)):
        raise ValueError(
            f"pictures need batches of images with 1 or 3 channels, (N, C, H, W) or (N, H, W); got shape {shape}: let "
            f"a BatchTransformXCallback reshape them, or draw them with plots.plot_images"
        )
    return x


def _statistics(loader: Any) -> tuple[Any, Any]:
    """Mean and standard deviation that the loader normalises with, or None for both."""
    return getattr(loader, "normalize", None) or (None, None)


def _captions(found: predict.Predictions, data: Any) -> tuple[list[str], list[bool | None] | None, Tensor | None]:
    """The text above each image, True for right predictions of classes, and the probability of each prediction.

    Of masks, the text has the share of pixels that are right.
    """
    targets, guesses, probs = _decoded(found.preds, found.targets)
    if not targets:
        return [f"predicted {text}" if (text := _text(guess, data)) else "" for guess in guesses], None, probs
    texts: list[str] = []
    right: list[bool | None] = []
    for target, guess in zip(targets, guesses):
        named = [_text(value, data) for value in (target, guess)]
        classes = not target.is_floating_point() and target.shape == guess.shape
        if target.dim() > 1:
            texts.append(f"{100 * float((target == guess).float().mean()):.0f} % of pixels right" if classes else "")
        else:
            texts.append(f"target {named[0]}\npredicted {named[1]}")
        right.append(named[0] == named[1] if classes and target.dim() < 2 else None)
    return texts, right, probs


def _decoded(preds: Any, targets: Any) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
    """Targets, predictions, and the probability of each prediction if there is one.

    Classes are integers, several labels of a sample a bool vector, anything else stays floating point.
    """
    out = next(t for t in items_of(preds, Tensor) if t.dim())
    y = next(items_of(targets, Tensor), None)
    if y is not None and y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if out.dim() == 2 and out.shape[1] == 1:
        out = out[:, 0]
    given: Sequence[Tensor] = [] if y is None else list(y)
    if out.dim() == 2 and (y is None or y.dim() == 1):  # one of several classes
        rows = out.float()
        sums_to_one = bool((rows >= 0).all()) and bool(torch.isclose(rows.sum(1), torch.ones(())).all())
        probs, classes = (rows if sums_to_one else rows.softmax(1)).max(1)
        return given, list(classes), probs
    if y is not None and y.dim() > 2 and out.dim() == y.dim() + 1 and not y.is_floating_point():  # a class a pixel
        return given, list(out.argmax(1)), None
    binary = y is not None and y.shape == out.shape and bool(((y == 0) | (y == 1)).all())
    if y is None or not binary:
        return given, list(out), None
    share = out if bool(((out >= 0) & (out <= 1)).all()) else out.float().sigmoid()
    if out.dim() == 1:  # one of two classes
        return list(y.long()), list((share > 0.5).long()), torch.maximum(share, 1 - share)
    return list(y.bool()), list(share > 0.5), None


def _text(value: Any, data: Any) -> str:
    """A target or a prediction in words."""
    classes = getattr(data, "classes", None)
    if not isinstance(value, Tensor):
        return str(value)
    if value.dim() == 0:
        number = value.item()
        if value.is_floating_point():
            return f"{number:.4g}"
        return str(number if classes is None or not 0 <= number < len(classes) else classes[int(number)])
    if value.dim() == 1 and value.dtype is torch.bool:
        names = range(len(value)) if classes is None else classes
        return ", ".join(str(name) for name, there in zip(names, value.tolist()) if there) or "none"
    return ", ".join(f"{v:.3g}" for v in value.tolist()) if value.dim() == 1 and len(value) <= 4 else ""
