"""Data sets by name: `load_dataset` for bytes in memory, `get_data` for the course's MNIST rows."""

import dataclasses
from pathlib import Path

import torch

from fastrbn.util import suggestion

from .batches import Dataset
from .download import data_root, torchvision_set
from .errors import BadDataError, DataNotFoundError
from .folder import load_folder
from .glyphs import glyphs
from .image_data import ImageData
from .split import check_valid, split

__all__ = ["NAMES", "get_data", "load_dataset"]

_CLASSES = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
JPEG = "-jpeg"
NAMES = (*_CLASSES, "glyphs")
"""The names `load_dataset` knows; anything else is taken for a folder of images."""


def get_data(root=None):
    """MNIST as the course has it: `x_train (50000, 784), y_train (50000,), x_valid (10000, 784), y_valid (10000,)`.

    float32 in 0-1 (bytes / 255), int64. The first 50,000 and last 10,000 of MNIST's 60,000 training images; its test
    images are not touched. (course: 02_fully_connected, whose pickle had bytes / 256)

    root: a folder in torchvision's layout, None for $FASTRBN_DATA or ~/.cache/fastrbn/data; MNIST is downloaded there
    if missing. Raises as `load_dataset`.
    """
    data = load_dataset("mnist", root)
    x_train, x_valid = (ds.x.flatten(1).float().div_(255) for ds in (data.train, data.valid))
    return x_train, data.train.y, x_valid, data.valid.y


def load_dataset(name_or_path, root=None, download=True, valid="auto", size=None, seed=0, workers=None):
    """A data set as an `ImageData`: bytes in memory, split into training and validation.

    name_or_path: "mnist", "fashion", "cifar10", "cifar100", "glyphs", or a folder of images: of `train` and one of
        `valid`, `val`, `test`, with a folder per class in each, or of the class folders themselves. Names win over
        folders of the same name: write "./mnist" for such a folder.
    root: where the named sets are kept; None for $FASTRBN_DATA or ~/.cache/fastrbn/data.
        A set that is not there in torchvision's format, but as a folder of images `<name>-jpeg`, is read from that, and
        has the folder's name: a JPEG image is not the original bit for bit. "cifar10-jpeg" asks for it. The decoded
        images are kept beside it in `<name>-jpeg.decoded.pt`, and used as long as the files are the same.
    download: fetch a missing set; False raises DataNotFoundError instead. What was fetched is found without network.
    valid: "auto" is the last 10,000 training images for mnist and fashion (the course's split, which keeps the test
        images for the end), the test images for the cifars, the validation folder of a folder, else a fifth of it;
        "test" is the test images; a share between 0 and 1 splits the training images by `seed`, class by class.
    size: for folders, a side or (height, width) to bring images to; see `load_folder`. workers: threads that decode.

    DataNotFoundError (a FileNotFoundError), BadDataError (a ValueError) or DownloadError (an OSError), each naming the
    file or folder and what to do; DownloadError within seconds when there is no network.
    """
    name = str(name_or_path)
    check_valid(valid)
    jpeg = name.endswith(JPEG) and name.removesuffix(JPEG) in _CLASSES
    if name not in NAMES and not (jpeg and (data_root(root) / name).is_dir()):
        _check_path(name)
        return load_folder(name, size=size, valid=valid, seed=seed, workers=workers)
    if size is not None:
        raise ValueError(f"size is for folders of images; {name} has its own. Leave it out.")
    if jpeg:
        return _jpeg(data_root(root) / name, valid, seed, workers)
    if name == "glyphs":
        if not isinstance(valid, str):
            raise ValueError("glyphs draws its own validation set; pass n_train and n_valid to fastrbn.data.glyphs "
                             f"instead of valid={valid}.")
        return glyphs(seed=seed)
    return _named(name, data_root(root), download, valid, seed, workers)


def _jpeg(folder, valid, seed, workers):
    """The images in `folder`, which is named after a data set, decoded once."""
    if isinstance(valid, float) and (folder / "train").is_dir():
        return dataclasses.replace(load_folder(folder / "train", None, valid, seed, workers), name=folder.name)
    cache = folder.with_name(f"{folder.name}.decoded.pt")
    return load_folder(folder, valid=valid, seed=seed, workers=workers, cache=cache)


def _named(name, root, download, valid, seed, workers):
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
        rows, held_rows = split(y, valid, seed)
        train, held = (x[rows], y[rows]), (x[held_rows], y[held_rows])
    return ImageData(name, Dataset(*train), Dataset(*held), tuple(whole.classes))


def _bytes(tv, root):
    """A torchvision set's images as uint8 (N, C, H, W), its labels as int64."""
    x = torch.as_tensor(tv.data)
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    y = torch.as_tensor(tv.targets, dtype=torch.int64)
    if not 0 <= int(y.min()) <= int(y.max()) < len(tv.classes):
        raise BadDataError(f"the labels of {type(tv).__name__} in {root} must be 0 to {len(tv.classes) - 1}; found "
                           f"{int(y.min())} to {int(y.max())}. Delete its label files and run again.")
    return x, y


def _check_path(name):
    if Path(name).is_dir():
        return
    hint = suggestion(name, NAMES) or " Pass a name or an existing folder of images."
    what = "a file, not a folder" if Path(name).exists() else "neither the name of a data set nor a folder"
    raise DataNotFoundError(f"{name!r} is {what}; the names are {', '.join(NAMES)}.{hint}")
