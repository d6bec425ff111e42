"""Labelled images in memory, as bytes, and the loaders made from them."""

from dataclasses import dataclass
from functools import cached_property

import torch

from .batches import BatchLoader, Dataset
from .bunch import DataBunch
from .transforms import Cutout, RandomCrop, RandomFlip, to_channels_last

__all__ = ["ImageData", "image_databunch"]

AUGMENTED = ("cifar10", "cifar100", "cifar10-jpeg", "cifar100-jpeg")
LEAST_VALID = 500  # fewer images would make the accuracy of a quick run a matter of luck


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """A data set of images, whole and in memory.

    name: its name or folder. train, valid: `Dataset`s of x uint8 (N, C, H, W) and y int64 (N,).
    classes: the class names, in the order of the labels.
    mean, std: of the training images per channel, on the scale of 0-1, computed once when first read.
    """

    name: str
    train: Dataset
    valid: Dataset
    classes: tuple

    @property
    def c(self):
        """The number of classes."""
        return len(self.classes)

    @property
    def c_in(self):
        """The number of channels."""
        return self.train.x.shape[1]

    @cached_property
    def _mean_std(self):
        # counting the 256 values is exact and five times cheaper than converting millions of bytes to float
        value = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self.train.x.unbind(1):
            share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
            mean = share @ value
            means.append(float(mean))
            stds.append(float(share @ (value - mean).square()) ** 0.5)
        return tuple(means), tuple(stds)

    @property
    def mean(self):
        """Mean of the training images, a number per channel."""
        return self._mean_std[0]

    @property
    def std(self):
        """Standard deviation of the training images, a number per channel."""
        return self._mean_std[1]

    def __repr__(self):
        return (f"ImageData({self.name!r}, {len(self.train)} training and {len(self.valid)} validation images of "
                f"{tuple(self.train.x.shape[1:])}, {self.c} classes)")


def image_databunch(data, bs, valid_bs=None, seed=0, device=None, limit=None, augment=None, drop_last=False,
                    cutout=None, channels_last=False):
    """A `DataBunch` of BatchLoaders over `data`: bytes on the device, normalised there batch by batch with the training
    set's own mean and deviation per channel; batches are float32 (N, C, H, W) and int64 (N,).

    data: an `ImageData`, as from `load_dataset`. bs: training batch size; valid_bs: None for `2 * bs`.
    seed: of shuffling and augmentation. device: where the images are kept, None for the CPU.
    limit: keep the first `limit` training images, and in proportion, but at least 500, of the validation images, taken
        at equal distances, for quick runs (statistics stay those of the whole set; a limit beyond the set changes
        nothing).
    augment: True for random crop with padding 4 and left-right flip, False for none, None for what suits the set: True
        for cifar10 and cifar100, False for others (digits must not be mirrored); or a list of transforms.
    drop_last: drop the last training batch when smaller.
    cutout: the side in pixels of a square to blank in each training image after that (see `Cutout`), None for none.
    channels_last: give batches in that memory order, training and validation; for a model that is in it too.
    ValueError for a bad batch size or limit.
    """
    train, valid = data.train, data.valid
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit is the number of training images to keep, at least 1; got {limit}. "
                             "Leave it out to keep all.")
        keep = max(LEAST_VALID, round(len(valid) * limit / len(train)))
        if keep < len(valid):  # spread over all, since those of a folder come class by class
            rows = torch.arange(keep) * len(valid) // keep
            valid = Dataset(valid.x[rows], valid.y[rows])
        train = Dataset(train.x[:limit], train.y[:limit])
    if augment is None:
        augment = data.name in AUGMENTED
    tfms = (RandomCrop(4), RandomFlip()) if augment is True else (augment,) if callable(augment) else tuple(augment or ())
    tfms += () if cutout is None else (Cutout(cutout),)
    last = (to_channels_last,) if channels_last else ()
    stats, valid_bs = (data.mean, data.std), 2 * bs if valid_bs is None else valid_bs
    train_dl = BatchLoader(train.x, train.y, bs, True, seed, drop_last, device, stats, tfms + last)
    valid_dl = BatchLoader(valid.x, valid.y, valid_bs, device=device, normalize=stats, tfms=last)
    return DataBunch(train_dl, valid_dl, c=data.c, c_in=data.c_in)
