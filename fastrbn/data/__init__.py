"""Data: sets by name or folder, kept as bytes in memory; digits drawn from fonts; batches cut by index on the device.

`load_dataset` gives an `ImageData`, and `image_databunch` makes loaders from it. `get_data`, `normalize_to`, `Dataset`
and `get_dls` are the course's functions, for your own tensors.
"""

from .batches import BatchLoader, Dataset
from .bunch import DataBunch, get_dls, overfit
from .download import data_root
from .errors import BadDataError, DataError, DataNotFoundError, DownloadError
from .folder import load_folder
from .glyphs import glyphs
from .image_data import ImageData, image_databunch
from .sets import NAMES, get_data, load_dataset
from .transforms import Cutout, RandomCrop, RandomFlip, normalize_to, to_channels_last, view_tfm

__all__ = [
    "NAMES",
    "BadDataError",
    "BatchLoader",
    "Cutout",
    "DataBunch",
    "DataError",
    "DataNotFoundError",
    "Dataset",
    "DownloadError",
    "ImageData",
    "RandomCrop",
    "RandomFlip",
    "data_root",
    "get_data",
    "get_dls",
    "glyphs",
    "image_databunch",
    "load_dataset",
    "load_folder",
    "normalize_to",
    "overfit",
    "to_channels_last",
    "view_tfm",
]
