"""Pairs of loaders: `get_dls` makes them, `DataBunch` holds them for the Learner, `overfit` keeps a few batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastrbn.util import whole

from .batches import BatchLoader, Dataset, Transforms

__all__ = ["DataBunch", "get_dls", "overfit"]


class DataBunch:
    """A training and a validation loader, and what a model must know about the data.

    Parameters
    ----------
    train_dl, valid_dl : BatchLoader or DataLoader
        Iterables of `(xb, yb)` with a `dataset`. Streams (IterableDataset) are allowed; nothing is read from them here.
    c : int, optional
        Number of classes. By default that of `classes`; without them, the largest target plus one over both sets if the
        targets are integers in memory, else None.
    c_in : int, optional
        Number of input channels. By default taken from the first sample: C for images (C, H, W), 1 for flat samples,
        else None.
    classes : sequence of str, optional
        Names of the classes, in the order of the labels, for pictures.

    Examples
    --------
    >>> x, y = torch.zeros(8, 1, 4, 4), torch.arange(8) % 2
    >>> data = DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), bs=4))
    >>> data.c, data.c_in, len(data.train_ds)
    (2, 1, 8)

    References
    ----------
    fast.ai course notebook 04_callbacks.
    """

    def __init__(
        self,
        train_dl: Any,
        valid_dl: Any,
        c: int | None = None,
        c_in: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.train_dl, self.valid_dl = train_dl, valid_dl
        self.classes = None if classes is None else tuple(map(str, classes))
        if c is None:
            c = _classes(train_dl, valid_dl) if self.classes is None else len(self.classes)
        self.c = c
        self.c_in = _channels(train_dl) if c_in is None else c_in

    @property
    def train_ds(self) -> Any:
        """The data set behind `train_dl`."""
        return self.train_dl.dataset

    @property
    def valid_ds(self) -> Any:
        """The data set behind `valid_dl`."""
        return self.valid_dl.dataset

    def __repr__(self) -> str:
        return f"DataBunch(\n  train_dl={self.train_dl},\n  valid_dl={self.valid_dl},\n  c={self.c}, c_in={self.c_in})"


def get_dls(
    train_ds: Any,
    valid_ds: Any,
    bs: int,
    seed: int | None = None,
    device: torch.device | str | None = None,
    drop_last: bool = False,
    normalize: Any = None,
    tfms: Transforms = None,
    **kwargs: Any,
) -> tuple[BatchLoader | DataLoader, BatchLoader | DataLoader]:
    """Make a training loader (shuffled) and a validation loader (in order, batches of `2 * bs`).

    Validation batches are larger because no memory is needed for gradients. Data sets that hold tensors, as `.x` and
    `.y` or in a TensorDataset of two, get a `BatchLoader`. Other data sets, and those whose items are not simply `x[i],
    y[i]`, get torch DataLoaders, as does any call with a DataLoader option. A stream (IterableDataset) is not shuffled.

    Parameters
    ----------
    train_ds, valid_ds : Dataset
        Any torch data sets.
    bs : int
        Training batch size.
    seed : int, optional
        Seed of the shuffling; by default drawn from torch's global generator.
    device : torch.device or str, optional
        Device to keep tensors on. DataLoaders cannot move data, so they allow only the CPU.
    drop_last : bool, default False
        Drop the last training batch if it is smaller. Validation is always complete.
    normalize, tfms : optional
        As in `BatchLoader`; `normalize` for both loaders, `tfms` for training only.
    **kwargs
        Passed to torch's DataLoader (num_workers, pin_memory, collate_fn, …).

    Returns
    -------
    (train_dl, valid_dl) : BatchLoader or DataLoader

    Raises
    ------
    ValueError
        If the batch size is invalid or the options do not go together.

    Examples
    --------
    >>> ds = Dataset(torch.randn(100, 784), torch.zeros(100))
    >>> train_dl, valid_dl = get_dls(ds, ds, bs=32)
    >>> len(train_dl), len(valid_dl)
    (4, 2)

    References
    ----------
    fast.ai course notebook 03_minibatch_training.
    """
    bs = whole("the batch size", bs)
    train, valid = _tensors(train_ds), _tensors(valid_ds)
    if train and valid and not kwargs:
        return (
            BatchLoader(*train, bs, True, seed, drop_last, device, normalize, tfms),
            BatchLoader(*valid, 2 * bs, device=device, normalize=normalize),
        )
    if normalize is not None or tfms is not None:
        raise ValueError(
            "normalize and tfms need tensors in memory, but this call makes torch DataLoaders "
            f"({_why(train, valid, kwargs)}). Normalise in the data set or in a callback."
        )
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(
            f"torch DataLoaders ({_why(train, valid, kwargs)}) cannot keep data on {device}. "
            "Leave device out and move batches with CudaCallback."
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shuffle = None if isinstance(train_ds, IterableDataset) else True
    return (
        DataLoader(train_ds, bs, shuffle=shuffle, drop_last=drop_last, generator=generator, **kwargs),
        DataLoader(valid_ds, 2 * bs, **kwargs),
    )


def overfit(data: Any, n: int = 1) -> DataBunch:
    """Keep `n` training batches for both training and validation: a model that cannot learn them by heart has a bug.

    The batches are taken from one pass over the training loader, shuffled and transformed as it does. They stay in
    memory and come in the same order in each epoch. In several processes each has its own, all of which make a step.

    Parameters
    ----------
    data : DataBunch or any object with a `train_dl`
        The loader may be any iterable of batches.
    n : int, default 1
        The number of batches. One is the quickest test.

    Returns
    -------
    DataBunch
        With `c` and `c_in` of `data`.

    Raises
    ------
    ValueError
        If `n` is not a whole number of at least 1, or the loader has fewer batches.

    Examples
    --------
    >>> few = overfit(data, 2)
    >>> learn, run = get_learn_run([8, 16], few, 0.2, conv_rbn, cbs=[partial(AvgStatsCallback, accuracy)])
    >>> run.logger = lambda line: None
    >>> run.fit(20, learn)
    >>> run.avg_stats.history[-1]["valid_loss"] < run.avg_stats.history[0]["valid_loss"]
    True

    References
    ----------
    Karpathy, "A Recipe for Training Neural Networks" (2019): overfit one batch. Lightning's `overfit_batches`.
    """
    n, loader = whole("overfit: n", n), data.train_dl
    kept = _Kept(loader, list(itertools.islice(loader, n)))
    if len(kept) < n:
        raise ValueError(f"overfit cannot keep {n} batches: the training loader has {len(kept)}. Use a smaller n.")
    return DataBunch(kept, kept, *(getattr(data, name, None) for name in ("c", "c_in", "classes")))


class _Kept:
    """A loader of batches in memory."""

    def __init__(self, loader: Any, batches: list[Any]) -> None:
        self.loader, self.batches = loader, batches
        self.normalize = getattr(loader, "normalize", None)  # pictures undo it

    @property
    def dataset(self) -> Any:
        """The data set that the batches were taken from, all of it."""
        return self.loader.dataset

    def shard(self, rank: int = 0, world: int = 1, even: bool = True) -> _Kept:
        """The loader as it is: each process has kept its own batches."""
        return self

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __repr__(self) -> str:
        return f"{len(self)} of the batches of {self.loader}"


def _why(train: Any, valid: Any, kwargs: dict[str, Any]) -> str:
    """The reason for using DataLoaders, for messages."""
    if kwargs:
        return f"asked for by {', '.join(kwargs)}"
    which = " and ".join(n for n, t in (("train_ds", train), ("valid_ds", valid)) if not t)
    return f"{which} does not hold plain tensors x and y"


def _tensors(ds: Any) -> tuple[Tensor, Tensor] | None:
    """(x, y) if slicing these two tensors gives the same items as `ds[i]`, else None."""
    if isinstance(ds, TensorDataset):
        return ds.tensors if type(ds) is TensorDataset and len(ds.tensors) == 2 else None
    x, y = getattr(ds, "x", None), getattr(ds, "y", None)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return None
    if type(ds) is not Dataset and len(ds) and not _is_plain(ds, x, y):
        return None
    return x, y


def _is_plain(ds: Any, x: Tensor, y: Tensor) -> bool:
    # a subclass may change its items when they are read (augmentation, subset); slicing x would skip that
    item = ds[0]
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and len(ds) == len(x)
        and all(
            isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(item, (x[0], y[0]))
        )
    )


def _classes(*dls: Any) -> int | None:
    ys: list[Any] = [getattr(getattr(dl, "dataset", None), "y", None) for dl in dls]
    if not all(isinstance(y, torch.Tensor) and y.dtype == torch.int64 and y.dim() == 1 and len(y) for y in ys):
        return None
    return max(int(y.max()) for y in ys) + 1


def _channels(dl: Any) -> int | None:
    ds: Any = getattr(dl, "dataset", None)
    if isinstance(ds, IterableDataset) or not hasattr(ds, "__getitem__") or not hasattr(ds, "__len__") or not len(ds):
        return None
    try:
        item = ds[0]
    except (KeyError, TypeError, NotImplementedError):  # items have keys other than numbers
        return None
    shape = getattr(item[0], "shape", None) if isinstance(item, (tuple, list)) and item else None
    return None if shape is None else {1: 1, 3: shape[0]}.get(len(shape))
