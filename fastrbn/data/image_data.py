"""Labelled images in memory, as bytes, and the loaders made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import BatchLoader, Dataset, Transforms
from .bunch import DataBunch
from .transforms import Cutout, RandomCrop, RandomFlip, to_channels_last

__all__ = ["ImageData", "image_databunch"]

AUGMENTED = ("cifar10", "cifar100", "cifar10-jpeg", "cifar100-jpeg")
CHUNK = 1000  # images scaled at once
LEAST_VALID = 500  # with fewer images the accuracy of a quick run would be mostly chance


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """A data set of images in memory, split into training and validation.

    Parameters
    ----------
    name : str
        Name of the data set or of its folder.
    train, valid : Dataset
        `x` uint8 (N, C, H, W) and `y` int64 (N,).
    classes : tuple of str
        Class names, in the order of the labels.

    Attributes
    ----------
    c, c_in : int
        Number of classes and of channels.
    mean, std : tuple of float
        Mean and standard deviation per channel of the training images, on the 0-1 scale.

    Examples
    --------
    >>> images = glyphs(100, 20)
    >>> images.c, images.c_in, len(images.train)
    (10, 1, 100)
    """

    name: str
    train: Dataset
    valid: Dataset
    classes: tuple[str, ...]

    @property
    def c(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def c_in(self) -> int:
        """Number of channels."""
        return self.train.x.shape[1]

    @cached_property
    def _mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        # counting the 256 values is exact, and five times cheaper than converting millions of bytes to float
        value = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self.train.x.unbind(1):
            share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
            mean = share @ value
            means.append(float(mean))
            stds.append(float(share @ (value - mean).square()) ** 0.5)
        return tuple(means), tuple(stds)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of the training images, one number per channel; computed once."""
        return self._mean_std[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of the training images, one number per channel; computed once."""
        return self._mean_std[1]

    def __repr__(self) -> str:
        return (
            f"ImageData({self.name!r}, {len(self.train)} training and {len(self.valid)} validation images of "
            f"{tuple(self.train.x.shape[1:])}, {self.c} classes)"
        )


def resized(images: ImageData, size: tuple[int, int]) -> ImageData:
    """`images` scaled to cover `size` (height, width) and cropped at the centre, as those of a folder are."""
    train, valid = (Dataset(_resized(part.x, size), part.y) for part in (images.train, images.valid))
    return ImageData(images.name, train, valid, images.classes)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = x.shape[2:]
    h, w = min(height, round(width * size[0] / size[1])), min(width, round(height * size[1] / size[0]))
    top, left = (height - h) // 2, (width - w) // 2
    x = x[:, :, top : top + max(h, 1), left : left + max(w, 1)]
    out = torch.from_numpy(np.empty((*x.shape[:2], *size), np.uint8))  # a MemoryError if there is not enough
    for part, into in zip(x.split(CHUNK), out.split(CHUNK)):
        into.copy_(F.interpolate(part, size, mode="bilinear", antialias=True))
    return out


def image_databunch(
    data: ImageData,
    bs: int,
    valid_bs: int | None = None,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    limit: int | None = None,
    augment: bool | Transforms = None,
    drop_last: bool = False,
    cutout: int | None = None,
    channels_last: bool = False,
) -> DataBunch:
    """Make loaders that keep images as bytes on the device and normalise them there, batch by batch.

    Batches are float32 (N, C, H, W) and int64 (N,), normalised with the mean and standard deviation of the training set
    per channel.

    Parameters
    ----------
    data : ImageData
        As from `load_dataset`.
    bs : int
        Training batch size.
    valid_bs : int, optional
        Validation batch size; by default `2 * bs`.
    seed : int or None, default 0
        Seed of shuffling and augmentation; None draws one.
    device : torch.device or str, optional
        Device to keep the images on; by default the CPU.
    limit : int, optional
        For quick runs: keep the first `limit` training images and the same share, but at least 500, of the validation
        images, evenly spaced. The statistics remain those of the whole set. A limit above its size changes nothing.
    augment : bool, callable or sequence of callables, optional
        True for random crops with padding 4 and left-right flips, False for none, or your own transforms in their
        order: any of `torchvision.transforms.v2`, which get each image as bytes, and functions of a batch; see `tfms`
        of `BatchLoader`. By default True for cifar10 and cifar100 and False for other sets, since digits must not be
        mirrored.
    drop_last : bool, default False
        Drop the last training batch if it is smaller.
    cutout : int, optional
        Side in pixels of a square to blank in each training image after that; see `Cutout`.
    channels_last : bool, default False
        Store training and validation batches in that memory order, for a model that uses it too.

    Returns
    -------
    DataBunch

    Raises
    ------
    ValueError
        If the batch size, the limit or a transform is invalid.

    Examples
    --------
    >>> data = image_databunch(glyphs(100, 20), bs=16)
    >>> xb, yb = next(iter(data.train_dl))
    >>> xb.shape, xb.dtype
    (torch.Size([16, 1, 28, 28]), torch.float32)
    >>> from torchvision.transforms import v2
    >>> data = image_databunch(glyphs(100, 20), bs=16, augment=[v2.TrivialAugmentWide(), RandomCrop(2)])
    """
    train, valid = data.train, data.valid
    if limit is not None:
        if limit < 1:
            raise ValueError(
                f"limit must be at least 1, the number of training images to keep; got {limit}. "
                "Leave it out to keep all."
            )
        keep = max(LEAST_VALID, round(len(valid) * limit / len(train)))
        if keep < len(valid):  # spread over the whole set, since a folder's images are ordered by class
            rows = torch.arange(keep) * len(valid) // keep
            valid = Dataset(valid.x[rows], valid.y[rows])
        train = Dataset(train.x[:limit], train.y[:limit])
    if augment is None:
        augment = data.name in AUGMENTED
    tfms: tuple[Callable[..., Tensor], ...] = (RandomCrop(4), RandomFlip())
    if augment is not True:
        tfms = (augment,) if callable(augment) else tuple(augment or ())
    tfms += () if cutout is None else (Cutout(cutout),)
    last = (to_channels_last,) if channels_last else ()
    stats, valid_bs = (data.mean, data.std), 2 * bs if valid_bs is None else valid_bs
    train_dl = BatchLoader(train.x, train.y, bs, True, seed, drop_last, device, stats, tfms + last)
    valid_dl = BatchLoader(valid.x, valid.y, valid_bs, device=device, normalize=stats, tfms=last)
    return DataBunch(train_dl, valid_dl, c=data.c, c_in=data.c_in, classes=data.classes)
