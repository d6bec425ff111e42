"""Data sets by name: `load_dataset` returns bytes in memory, `get_data` the course's rows of MNIST."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrbn.util import suggestion

from .batches import Dataset
from .download import data_root, torchvision_set
from .errors import BadDataError, DataNotFoundError
from .folder import check_size, load_folder
from .glyphs import glyphs
from .image_data import ImageData, resized
from .split import check_valid, split

__all__ = ["NAMES", "get_data", "load_dataset"]

_CLASSES = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
JPEG = "-jpeg"
NAMES = (*_CLASSES, "glyphs")
"""Names that `load_dataset` knows; anything else is a folder of images."""


def get_data(root: str | Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load MNIST as flat rows, split as in the course.

    Training data is the first 50,000 and validation data the last 10,000 of MNIST's 60,000 training images; the test
    images are not used. The course divided bytes by 256; here it is 255.

    Parameters
    ----------
    root : str or Path, optional
        Folder in torchvision's layout; by default $FASTRBN_DATA or ~/.cache/fastrbn/data. MNIST is downloaded there if
        missing.

    Returns
    -------
    x_train, y_train, x_valid, y_valid : Tensor
        Inputs float32 (N, 784) in 0-1, labels int64 (N,).

    Raises
    ------
    DataError
        As in `load_dataset`.

    Examples
    --------
    >>> x_train, y_train, x_valid, y_valid = get_data()   # doctest: +SKIP
    >>> x_train.shape, x_valid.shape                      # doctest: +SKIP
    (torch.Size([50000, 784]), torch.Size([10000, 784]))

    References
    ----------
    fast.ai course notebook 02_fully_connected.
    """
    data = load_dataset("mnist", root)
    x_train, x_valid = (ds.x.flatten(1).float().div_(255) for ds in (data.train, data.valid))
    return x_train, data.train.y, x_valid, data.valid.y


def load_dataset(
    name_or_path: str | Path,
    root: str | Path | None = None,
    download: bool = True,
    valid: str | float = "auto",
    size: int | Sequence[int] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> ImageData:
    """Load a data set by name, or a folder of images, into memory.

    Parameters
    ----------
    name_or_path : str or Path
        "mnist", "fashion", "cifar10", "cifar100", "glyphs", or a folder of images as in `load_folder`. Names take
        precedence: use "./mnist" for a folder called mnist.
    root : str or Path, optional
        Folder of the named sets, in torchvision's layout; by default $FASTRBN_DATA or ~/.cache/fastrbn/data.
    download : bool, default True
        Download a missing set. Once downloaded, it is found without a network.
    valid : {"auto", "test"} or float, default "auto"
        The validation images. "test": the test images. A number between 0 and 1: this share of the training images,
        chosen by `seed`, class by class. "auto": for mnist and fashion the last 10,000 training images (the course's
        split, which keeps the test images for the end), for cifar10 and cifar100 the test images, for a folder see
        `load_folder`.
    size : int or (height, width), optional
        Scale each image to cover this size and crop it at the centre. By default images keep their size.
    seed : int, default 0
        Seed of the split, of a folder's order, and of glyphs.
    workers : int, optional
        Threads that decode images; by default one per core.

    Returns
    -------
    ImageData

    Raises
    ------
    DataNotFoundError
        If the set or folder is missing and `download` is False. Also a FileNotFoundError.
    BadDataError
        If a file is damaged or a folder is invalid. Also a ValueError.
    DownloadError
        If the download fails, within seconds if there is no network. Also an OSError.
    ValueError
        If `valid` does not fit the data set, or `size` is not a size.

    Notes
    -----
    If a set is missing in torchvision's format but `root` has a folder of images called `<name>-jpeg`, that is loaded
    instead. The result is named after the folder, because a JPEG image is not identical to the original. "cifar10-jpeg"
    asks for it by name. The decoded images are cached in `<name>-jpeg.decoded.pt` until the files change.

    Examples
    --------
    >>> load_dataset("glyphs")
    ImageData('glyphs', 20000 training and 4000 validation images of (1, 28, 28), 10 classes)
    >>> load_dataset("cifar10", size=64)              # doctest: +SKIP
    ImageData('cifar10', 50000 training and 10000 validation images of (3, 64, 64), 10 classes)
    >>> images = load_dataset("cifar10", valid=0.1)   # doctest: +SKIP
    """
    name, shape = str(name_or_path), check_size(size)
    check_valid(valid)
    jpeg = name.endswith(JPEG) and name.removesuffix(JPEG) in _CLASSES
    if name not in NAMES and not (jpeg and (data_root(root) / name).is_dir()):
        _check_path(name)
        return load_folder(name, size=size, valid=valid, seed=seed, workers=workers)
    if name == "glyphs":
        if not isinstance(valid, str):
            raise ValueError(
                "glyphs draws its own validation set; pass n_train and n_valid to fastrbn.glyphs "
                f"instead of valid={valid}."
            )
        images = glyphs(seed=seed)
    elif jpeg:
        images = _jpeg(data_root(root) / name, valid, seed, workers)
    else:
        images = _named(name, data_root(root), download, valid, seed, workers)
    return images if shape is None else resized(images, shape)


def _jpeg(folder: Path, valid: str | float, seed: int, workers: int | None) -> ImageData:
    """A folder of images that is named after a data set; decoded once."""
    if isinstance(valid, float) and (folder / "train").is_dir():
        return dataclasses.replace(load_folder(folder / "train", None, valid, seed, workers), name=folder.name)
    cache = folder.with_name(f"{folder.name}.decoded.pt")
    return load_folder(folder, valid=valid, seed=seed, workers=workers, cache=cache)


def _named(name: str, root: Path, download: bool, valid: str | float, seed: int, workers: int | None) -> ImageData:
    import torchvision

    cls = getattr(torchvision.datasets, _CLASSES[name])
    images = root / f"{name}{JPEG}"
    try:
        whole = torchvision_set(cls, root, True, download and not images.is_dir())
    except DataNotFoundError:
        if images.is_dir():
            return _jpeg(images, valid, seed, workers)
        raise
    x, y = _bytes(whole, root)
    if valid == "test" or (valid == "auto" and name.startswith("cifar")):
        train, held = (x, y), _bytes(torchvision_set(cls, root, False, download), root)
    elif valid == "auto":
        train, held = (x[:50000], y[:50000]), (x[50000:], y[50000:])
    else:
        rows, held_rows = split(y, float(valid), seed)
        train, held = (x[rows], y[rows]), (x[held_rows], y[held_rows])
    return ImageData(name, Dataset(*train), Dataset(*held), tuple(whole.classes))


def _bytes(tv: Any, root: Path) -> tuple[Tensor, Tensor]:
    """A torchvision set's images as uint8 (N, C, H, W) and labels as int64."""
    x = torch.as_tensor(tv.data)
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    y = torch.as_tensor(tv.targets, dtype=torch.int64)
    if not 0 <= int(y.min()) <= int(y.max()) < len(tv.classes):
        raise BadDataError(
            f"the labels of {type(tv).__name__} in {root} must be 0 to {len(tv.classes) - 1}; found "
            f"{int(y.min())} to {int(y.max())}. Delete its label files and run again."
        )
    return x, y


def _check_path(name: str) -> None:
    if Path(name).is_dir():
        return
    hint = suggestion(name, NAMES) or " Pass a name or an existing folder of images."
    what = "a file, not a folder" if Path(name).exists() else "neither the name of a data set nor a folder"
    raise DataNotFoundError(f"{name!r} is {what}; known data sets are {', '.join(NAMES)}.{hint}")
