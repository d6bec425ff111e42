"""A folder of images, one folder a class, decoded once into bytes in memory."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .batches import Dataset
from .decoded import decode_once
from .errors import BadDataError, DataNotFoundError
from .image_data import ImageData
from .split import check_valid, split

__all__ = ["load_folder"]

VALID_NAMES = ("valid", "val", "test")
BYTE_MODES = {"1": "L", "L": "L", "LA": "RGB", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "RGBX": "RGB",
              "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "LAB": "RGB"}
CHUNK = 256  # images a thread takes at a time: passing them singly costs as much as decoding a small one


def load_folder(path, size=None, valid="auto", seed=0, workers=None, cache=None):
    """The images under `path` as an `ImageData`, named after the folder, with x uint8 of 1 channel when every image is
    grey, else of 3.

    path: holds `train` and one of `valid`, `val`, `test` (the first of these that is there), each with the same class
        folders; or the class folders themselves, which are then split. Images are what torchvision's ImageFolder finds:
        files at any depth, by their names' ending, also through links.
    size: a side or (height, width): each image is scaled to cover it and cut at its centre. None keeps the images as
        they are, which must then have one size.
    valid: "auto"; "test", the folder of that name; or the share held out of each class (0.2 under "auto").
    seed: of the split and of the order of the training images, mixed so that any first part of them is a fair sample.
    workers: threads, None for one a core.
    cache: a file to keep the decoded images in, which later calls read instead of decoding, as long as the images are
        the same; None (default) keeps nothing: it would be N·C·H·W bytes somewhere that nobody has named.

    DataNotFoundError for an absent folder; BadDataError for no class folders, an empty class, classes that differ, an
    unreadable image or folder, links by which a folder is found twice, or sizes that differ. Nothing is skipped.
    """
    path, size = Path(path), _check_size(size)
    check_valid(valid)
    if not path.is_dir():
        raise DataNotFoundError(f"an image folder must be a folder; there is none at {path}.")
    held = _validation_folder(path, valid)
    seen = {}
    files, y, classes = _listing(path if held is None else path / "train", seen)
    if held is None:
        train, rest = split(y, 0.2 if isinstance(valid, str) else valid, seed, classes)
        x = _images(files, size, workers, cache)
        sets = Dataset(x[train], y[train]), Dataset(x[rest], y[rest])
    else:
        valid_files, valid_y, valid_classes = _listing(held, seen)
        if valid_classes != classes:
            odd = sorted(set(classes) ^ set(valid_classes))
            raise BadDataError(f"{path / 'train'} and {held} must have the same class folders; {', '.join(odd[:5])} "
                               f"{'is' if len(odd) == 1 else 'are'} in one of them only.")
        x = _images(files + valid_files, size, workers, cache)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        sets = Dataset(x[order], y[order]), Dataset(x[len(y):], valid_y)
    return ImageData(_shown(path.resolve().name), *sets, tuple(map(_shown, classes)))


def _shown(name):
    """`name` as text: bytes in it that are not UTF-8 are written \\x…."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _validation_folder(path, valid):
    """The folder of validation images, or None when `path` itself is to be split."""
    if not (path / "train").is_dir():
        if valid == "test":
            raise DataNotFoundError(f"valid='test' takes the folders train and test; {path} has no train. "
                                    "Use valid='auto' or a share to split it.")
        return None
    if valid not in ("auto", "test"):
        raise ValueError(f"{path} has a train folder, which is used whole; valid={valid} would split it. "
                         f"Load {path / 'train'} to split that folder.")
    names = VALID_NAMES if valid == "auto" else (valid,)
    found = [path / n for n in names if (path / n).is_dir()]
    if not found:
        raise DataNotFoundError(f"beside {path / 'train'} there must be a folder of validation images: "
                                f"{' or '.join(names)}. Add one, or load {path / 'train'} to split that folder.")
    return found[0]


def _listing(folder, seen):
    """(files, labels, class names) under `folder`; `seen`: see `_found`."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not classes:
        raise BadDataError(f"{folder} must hold a folder of images for each class; it has no folders. "
                           "Move the images into folders named after their classes.")
    found = [_found(folder / c, seen) for c in classes]
    empty = [str(folder / c) for c, files in zip(classes, found) if not files]
    if empty:
        raise BadDataError(f"every class folder must hold images; there are none in {', '.join(empty[:5])}"
                           f"{f' and {len(empty) - 5} more' if len(empty) > 5 else ''}. Remove it, or add images.")
    y = torch.repeat_interleave(torch.tensor([len(files) for files in found]))
    return [file for files in found for file in files], y, tuple(classes)


def _found(folder, seen):
    """Image files under `folder`, in order. `seen`: real path → path of the folders listed so far. A link may lead to
    one of them again, which would multiply its images and put them into both sets."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = []
    for inner, _, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        first = seen.setdefault(os.path.realpath(inner), inner)
        if first is not inner:
            raise BadDataError(f"each folder of images must be found once; through a link {inner} is {first} again. "
                               "Remove the link.")
        files.append((inner, sorted(name for name in names if name.lower().endswith(IMG_EXTENSIONS))))
    return [os.path.join(inner, name) for inner, names in sorted(files) for name in names]


def _unreadable(error):
    raise BadDataError(f"every folder must be readable; {error.filename} is not: {error.strerror}. Change its "
                       "permissions, or remove it.") from error


def _images(files, size, workers, cache):
    if cache is None:
        return _decode(files, size, workers)
    return decode_once(cache, files, size, lambda: _decode(files, size, workers))


def _decode(files, size, workers):
    """uint8 (N, C, H, W) of all files, in order."""
    chunks = [files[i:i + CHUNK] for i in range(0, len(files), CHUNK)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        images, bad = [], []
        for good, failed in pool.map(lambda chunk: _read_all(chunk, size), chunks):
            images += good
            bad += failed
    if bad:
        raise BadDataError(f"every image must be readable; {len(bad)} of {len(files)} are not: {'; '.join(bad[:3])}"
                           f"{' ...' if len(bad) > 3 else ''}. Replace or delete {'them' if len(bad) > 1 else 'it'}.")
    first = images[0].shape[:2]
    for file, im in zip(files, images):
        if im.shape[:2] != first:
            raise BadDataError(f"images must have one size; {files[0]} is {first[0]} by {first[1]} and {file} is "
                               f"{im.shape[0]} by {im.shape[1]} (height by width). Bring them to one: size=N, or "
                               "`fastrbn train --size N`.")
    depth = max(im.shape[2] for im in images)
    out = np.empty((len(images), depth, *first), np.uint8)
    for i, im in enumerate(images):
        out[i] = im.transpose(2, 0, 1)  # a grey one among coloured ones is spread over the three channels
        images[i] = None  # freed as `out` fills, so that the set is not held twice
    return torch.from_numpy(out)


def _read_all(files, size):
    good, bad = [], []
    for file in files:
        try:
            good.append(_read(file, size))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:  # all that Pillow raises
            bad.append(f"{file} ({e})")
    return good, bad


def _read(file, size):
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("neither a file nor a link to one")  # opening a named pipe would wait for a writer
    with Image.open(file) as im:
        if im.mode not in BYTE_MODES:
            raise ValueError(f"mode {im.mode}, not 8 bits a channel")
        im = im.convert(BYTE_MODES[im.mode])
        if size is not None:
            im = ImageOps.fit(im, size[::-1], Image.Resampling.BILINEAR)
        a = np.asarray(im)
    return a if a.ndim == 3 else a[:, :, None]


def _check_size(size):
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"size is a side in pixels or (height, width); got {size!r}.")
    return pair
