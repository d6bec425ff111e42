"""Loaders in pairs: `get_dls` makes them, `DataBunch` holds them for the Learner."""

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from .batches import BatchLoader, Dataset, _check_bs

__all__ = ["DataBunch", "get_dls"]


class DataBunch:
    """A training and a validation loader, and what a model must know of the data. (course: 04_callbacks)

    train_dl, valid_dl: iterables of `(xb, yb)` with a `dataset`: BatchLoaders or torch DataLoaders, also of streams
        (IterableDataset), of which nothing is read here.
    c: the number of classes; None takes it from the targets when they are integers in memory (the largest plus one,
        over both sets), else it stays None.
    c_in: the number of input channels; None takes it from the data: C of images (C, H, W), 1 of flat samples, else None.
    """

    def __init__(self, train_dl, valid_dl, c=None, c_in=None):
        self.train_dl, self.valid_dl = train_dl, valid_dl
        self.c = _classes(train_dl, valid_dl) if c is None else c
        self.c_in = _channels(train_dl) if c_in is None else c_in

    @property
    def train_ds(self):
        """The data set behind `train_dl`."""
        return self.train_dl.dataset

    @property
    def valid_ds(self):
        """The data set behind `valid_dl`."""
        return self.valid_dl.dataset

    def __repr__(self):
        return f"DataBunch(\n  train_dl={self.train_dl},\n  valid_dl={self.valid_dl},\n  c={self.c}, c_in={self.c_in})"


def get_dls(train_ds, valid_ds, bs, seed=None, device=None, drop_last=False, normalize=None, tfms=None, **kwargs):
    """`(train_dl, valid_dl)`: training shuffled in batches of `bs`, validation in order and in batches of `2 * bs`,
    since it needs no memory for gradients. (course: 03_minibatch_training)

    Data sets that hold tensors, as `.x` and `.y` or in a TensorDataset of two, give `BatchLoader`s; others (and any
    whose items are not simply `x[i], y[i]`) give torch DataLoaders. Asking for a DataLoader's option gives DataLoaders.

    A stream (IterableDataset) is not shuffled: it has its own order.

    seed: of the shuffling, None to draw one from torch's global generator.
    device: where tensors are kept; DataLoaders cannot move data, so only the CPU is allowed with them.
    drop_last: drop the last training batch when smaller; validation is always whole.
    normalize, tfms: as in BatchLoader, the first for both loaders, tfms for training only.
    kwargs: passed on to torch's DataLoader (num_workers, pin_memory, collate_fn, ...).
    ValueError for a bad batch size or options that do not go together.
    """
    bs = _check_bs(bs)
    train, valid = _tensors(train_ds), _tensors(valid_ds)
    if train and valid and not kwargs:
        return (BatchLoader(*train, bs, True, seed, drop_last, device, normalize, tfms),
                BatchLoader(*valid, 2 * bs, device=device, normalize=normalize))
    if normalize is not None or tfms is not None:
        raise ValueError("normalize and tfms work on tensors in memory, and this call makes torch DataLoaders "
                         f"({_why(train, valid, kwargs)}). Normalise in the data set or with a batch transform callback.")
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(f"torch DataLoaders ({_why(train, valid, kwargs)}) cannot keep data on {device}. "
                         "Leave device out and move batches with CudaCallback.")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shuffle = None if isinstance(train_ds, IterableDataset) else True
    return (DataLoader(train_ds, bs, shuffle=shuffle, drop_last=drop_last, generator=generator, **kwargs),
            DataLoader(valid_ds, 2 * bs, **kwargs))


def _why(train, valid, kwargs):
    if kwargs:
        return f"asked for by {', '.join(kwargs)}"
    which = " and ".join(n for n, t in (("train_ds", train), ("valid_ds", valid)) if not t)
    return f"{which} does not hold plain tensors x and y"


def _tensors(ds):
    """(x, y) when batches cut from the two tensors are what `ds[i]` would give, else None."""
    if isinstance(ds, TensorDataset):
        return ds.tensors if type(ds) is TensorDataset and len(ds.tensors) == 2 else None
    x, y = getattr(ds, "x", None), getattr(ds, "y", None)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return None
    if type(ds) is not Dataset and len(ds) and not _is_plain(ds, x, y):
        return None
    return x, y


def _is_plain(ds, x, y):
    # a subclass may change its items on the way out (augment, subset); cutting x by index would lose that
    item = ds[0]
    return (isinstance(item, tuple) and len(item) == 2 and len(ds) == len(x)
            and all(isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
                    for a, b in zip(item, (x[0], y[0]))))


def _classes(*dls):
    ys = [getattr(getattr(dl, "dataset", None), "y", None) for dl in dls]
    if not all(isinstance(y, torch.Tensor) and y.dtype == torch.int64 and y.dim() == 1 and len(y) for y in ys):
        return None
    return max(int(y.max()) for y in ys) + 1


def _channels(dl):
    ds = getattr(dl, "dataset", None)
    if isinstance(ds, IterableDataset) or not hasattr(ds, "__getitem__") or not hasattr(ds, "__len__") or not len(ds):
        return None
    try:
        item = ds[0]
    except (KeyError, TypeError, NotImplementedError):  # items have other keys than numbers
        return None
    shape = getattr(item[0], "shape", None) if isinstance(item, (tuple, list)) and item else None
    return None if shape is None else {1: 1, 3: shape[0]}.get(len(shape))
