"""A folder of images, with one subfolder per class, decoded once into bytes in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import Dataset
from .decoded import decode_once
from .errors import BadDataError, DataNotFoundError
from .image_data import ImageData
from .image_file import UNREADABLE, read_bytes
from .split import check_valid, split

__all__ = ["files_in", "listing", "load_folder"]

VALID_NAMES = ("valid", "val", "test")
CHUNK = 256  # images per task of a thread; passing single ones costs as much as decoding a small image


def load_folder(
    path: str | Path,
    size: int | Sequence[int] | None = None,
    valid: str | float = "auto",
    seed: int = 0,
    workers: int | None = None,
    cache: str | Path | None = None,
) -> ImageData:
    """Load a folder of images, with one subfolder per class.

    Parameters
    ----------
    path : str or Path
        Contains `train` and one of `valid`, `val`, `test` (the first that exists), each with the same class folders; or
        the class folders themselves, which are then split. As in torchvision's ImageFolder, images are files at any
        depth with a known extension, also through links.
    size : int or (height, width), optional
        Scale each image to cover this size and crop it at the centre. By default images are kept as they are and must
        all have one size.
    valid : {"auto", "test"} or float, default "auto"
        The validation images: "test" is the folder of that name, a number the share to hold out of each class. "auto"
        is the validation folder if there is one, else a share of 0.2.
    seed : int, default 0
        Seed of the split and of the order of the training images, which are shuffled so that the first n of them are a
        fair sample.
    workers : int, optional
        Number of threads; by default one per core.
    cache : str or Path, optional
        File to keep the decoded images in (N·C·H·W bytes). Later calls read it instead of decoding, as long as the
        images do not change. By default nothing is written.

    Returns
    -------
    ImageData
        Named after the folder. Images are uint8 with 1 channel if all are grey, else with 3.

    Raises
    ------
    DataNotFoundError
        If the folder does not exist.
    BadDataError
        If there are no class folders, a class is empty, the classes of the two sets differ, an image or folder is
        unreadable, links lead to a folder twice, or sizes differ. Nothing is skipped.

    Examples
    --------
    >>> from torchvision.utils import save_image
    >>> for i in range(4):
    ...     folder = Path("pets", "cat" if i % 2 else "dog")
    ...     folder.mkdir(parents=True, exist_ok=True)
    ...     save_image(torch.rand(3, 8, 8), folder / f"{i}.png")
    >>> load_folder("pets", valid=0.5)
    ImageData('pets', 2 training and 2 validation images of (3, 8, 8), 2 classes)
    """
    path, shape = Path(path), check_size(size)
    check_valid(valid)
    if not path.is_dir():
        raise DataNotFoundError(f"there is no folder {path}. Give an existing folder of images.")
    held = _validation_folder(path, valid)
    seen: dict[str, str] = {}
    files, y, classes = listing(path if held is None else path / "train", seen)
    if held is None:
        train, rest = split(y, 0.2 if isinstance(valid, str) else valid, seed, classes)
        x = _images(files, shape, workers, cache)
        sets = Dataset(x[train], y[train]), Dataset(x[rest], y[rest])
    else:
        valid_files, valid_y, valid_classes = listing(held, seen)
        if valid_classes != classes:
            odd = sorted(set(classes) ^ set(valid_classes))
            raise BadDataError(
                f"{path / 'train'} and {held} must have the same class folders; {', '.join(odd[:5])} "
                f"{'is' if len(odd) == 1 else 'are'} in only one of them."
            )
        x = _images(files + valid_files, shape, workers, cache)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        sets = Dataset(x[order], y[order]), Dataset(x[len(y) :], valid_y)
    return ImageData(_shown(path.resolve().name), *sets, classes)


def _shown(name: str) -> str:
    """`name` as text; bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _validation_folder(path: Path, valid: str | float) -> Path | None:
    """The folder of validation images, or None if `path` itself is to be split."""
    if not (path / "train").is_dir():
        if valid == "test":
            raise DataNotFoundError(
                f"valid='test' needs the folders train and test; {path} has no train. "
                "Use valid='auto' or a share to split it."
            )
        return None
    if valid not in ("auto", "test"):
        raise ValueError(
            f"{path} has a train folder, which is not split; got valid={valid}. "
            f"Load {path / 'train'} to split that folder."
        )
    names = VALID_NAMES if valid == "auto" else (valid,)
    found = [path / n for n in names if (path / n).is_dir()]
    if not found:
        raise DataNotFoundError(
            f"next to {path / 'train'} there must be a folder of validation images: "
            f"{' or '.join(names)}. Add one, or load {path / 'train'} to split that folder."
        )
    return found[0]


def listing(folder: Path, seen: dict[str, str]) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """(files, labels, class names) under `folder`, which has a folder for each class; for `seen` see `files_in`."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not classes:
        raise BadDataError(
            f"{folder} must contain a folder of images for each class; it has no folders. "
            "Move the images into folders named after their classes."
        )
    found = [files_in(folder / c, seen) for c in classes]
    empty = [str(folder / c) for c, files in zip(classes, found) if not files]
    if empty:
        raise BadDataError(
            f"every class folder must contain images; there are none in {', '.join(empty[:5])}"
            f"{f' and {len(empty) - 5} more' if len(empty) > 5 else ''}. Remove it, or add images."
        )
    y = torch.repeat_interleave(torch.tensor([len(files) for files in found]))
    return [file for files in found for file in files], y, tuple(map(_shown, classes))


def files_in(folder: str | Path, seen: dict[str, str]) -> list[str]:
    """Image files under `folder`, at any depth, in order.

    `seen` maps the real path of each folder listed so far to its path. A link to one of them is an error: it would
    duplicate images and put them into both sets.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = []
    for inner, _, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        first = seen.setdefault(os.path.realpath(inner), inner)
        if first is not inner:
            raise BadDataError(
                f"each folder of images must be found only once; {inner} is {first} again, "
                "through a link. Remove the link."
            )
        files.append((inner, sorted(name for name in names if name.lower().endswith(IMG_EXTENSIONS))))
    return [os.path.join(inner, name) for inner, names in sorted(files) for name in names]


def _unreadable(error: OSError) -> None:
    raise BadDataError(
        f"every folder must be readable; {error.filename} is not: {error.strerror}. Change its "
        "permissions, or remove it."
    ) from error


def _images(files: list[str], size: tuple[int, int] | None, workers: int | None, cache: str | Path | None) -> Tensor:
    if cache is None:
        return _decode(files, size, workers)
    return decode_once(cache, files, size, lambda: _decode(files, size, workers))


def _decode(files: list[str], size: tuple[int, int] | None, workers: int | None) -> Tensor:
    """All files as uint8 (N, C, H, W), in order."""
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        images: list[Any] = []
        bad: list[str] = []
        for good, failed in pool.map(lambda chunk: _read_all(chunk, size), chunks):
            images += good
            bad += failed
    if bad:
        raise BadDataError(
            f"every image must be readable; {len(bad)} of {len(files)} are not: {'; '.join(bad[:3])}"
            f"{' ...' if len(bad) > 3 else ''}. Replace or delete {'them' if len(bad) > 1 else 'it'}."
        )
    first = images[0].shape[:2]
    for file, im in zip(files, images):
        if im.shape[:2] != first:
            raise BadDataError(
                f"images must have one size; {files[0]} is {first[0]} by {first[1]} and {file} is "
                f"{im.shape[0]} by {im.shape[1]} (height by width). Bring them to one: size=N, or "
                "`fastrbn train --size N`."
            )
    depth = max(im.shape[2] for im in images)
    out = np.empty((len(images), depth, *first), np.uint8)
    for i, im in enumerate(images):
        out[i] = im.transpose(2, 0, 1)  # a grey image among coloured ones is repeated over the three channels
        images[i] = None  # freed as `out` fills, so that the set is not in memory twice
    return torch.from_numpy(out)


def _read_all(files: list[str], size: tuple[int, int] | None) -> tuple[list[np.ndarray], list[str]]:
    """(images, messages about the unreadable ones)."""
    good, bad = [], []
    for file in files:
        try:
            good.append(read_bytes(file, size))
        except UNREADABLE as e:
            bad.append(f"{file} ({e})")
    return good, bad


def check_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"size must be a side in pixels or (height, width); got {size!r}.")
    return pair[0], pair[1]
