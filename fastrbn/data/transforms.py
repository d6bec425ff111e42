"""Functions on whole batches: reshape, normalise, random crop and flip, cutout, memory order.

A transform with the attribute `takes_generator = True` is called as `tfm(xb, generator)` by `BatchLoader`, which seeds
the generator from (seed, epoch, batch): its randomness can then be repeated from the middle of an epoch. Any other
callable is called as `tfm(xb)`.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

__all__ = ["Cutout", "RandomCrop", "RandomFlip", "normalize_to", "to_channels_last", "view_tfm"]


def view_tfm(*size):
    """A function that reshapes a batch to `(-1,) + size`: `view_tfm(1, 28, 28)` makes images of MNIST's rows.

    size: positive integers, or one tuple of them. The function can be pickled and takes a tensor of any dtype whose
    elements divide into `size`; it returns a view where it can. (course: 06_cuda_cnn_hooks_init)

    ValueError when `size` is not made of positive integers, and, from the function, when the elements do not divide.
    """
    if len(size) == 1 and isinstance(size[0], (tuple, list)):
        size = tuple(size[0])
    if not size or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"view_tfm takes positive integers, the shape of one sample; got {size}. "
                         "Write view_tfm(1, 28, 28) for one-channel images of 28 by 28.")
    return partial(_view, size=size)


def _view(x, size):
    wanted = math.prod(size)
    if x.numel() % wanted:
        raise ValueError(f"view_tfm{size} needs a multiple of {wanted} elements; got shape {tuple(x.shape)}, "
                         f"{x.numel()} elements. Choose a size whose product is {math.prod(x.shape[1:])}.")
    return x.reshape(-1, *size)


def normalize_to(train, valid):
    """`(train, valid)`, both with the mean of `train` subtracted and divided by its standard deviation.

    train, valid: floating tensors of any shape. One mean and one (unbiased) deviation over all elements: validation
    data must be shifted as the training data were, or the model sees another distribution. (course: 05b_early_stopping)

    ValueError for integer tensors and for a constant `train`.
    """
    for name, x in (("train", train), ("valid", valid)):
        if not x.is_floating_point():
            raise ValueError(f"normalize_to takes floating tensors; {name} is {x.dtype}. "
                             "Divide first: x.float() / 255 for images in bytes.")
    mean, std = train.mean(), train.std()
    if not std > 0:
        raise ValueError(f"normalize_to divides by train's standard deviation, which is {std.item()} for shape "
                         f"{tuple(train.shape)}. Pass data that vary and hold no NaN.")
    return (train - mean) / std, (valid - mean) / std


class RandomCrop:
    """Pad each image by `padding` and cut a window of the old size at a random place, one place per image.

    padding: pixels on each side, 4 by default (CIFAR's usual). fill: the value of the padding, 0 by default: on
    normalised batches that is the mean colour. Takes and returns (N, C, H, W) of any floating dtype, on its device.
    """

    takes_generator = True

    def __init__(self, padding=4, fill=0.0):
        if not isinstance(padding, int) or padding < 1:
            raise ValueError(f"RandomCrop's padding is a positive number of pixels; got {padding!r}. "
                             "Leave the transform out for no crop.")
        self.padding, self.fill = padding, fill

    def __call__(self, xb, generator):
        _check_images("RandomCrop", xb)
        n, _, h, w = xb.shape
        p = self.padding
        at = torch.randint(2 * p + 1, (2, n), generator=generator, device=xb.device)
        # every window is a view of the padded batch, so choosing one per image is a single gather
        windows = F.pad(xb, (p, p, p, p), value=self.fill).unfold(2, h, 1).unfold(3, w, 1)
        return windows[torch.arange(n, device=xb.device), :, at[0], at[1]]

    def __repr__(self):
        return f"RandomCrop(padding={self.padding}, fill={self.fill})"


class RandomFlip:
    """Mirror each image left to right with probability `p` (0.5 by default), decided per image.

    Takes and returns (N, C, H, W) of any dtype, on its device.
    """

    takes_generator = True

    def __init__(self, p=0.5):
        if not 0 <= p <= 1:
            raise ValueError(f"RandomFlip's p is a probability between 0 and 1; got {p!r}.")
        self.p = p

    def __call__(self, xb, generator):
        _check_images("RandomFlip", xb)
        flip = torch.rand(len(xb), generator=generator, device=xb.device) < self.p
        return torch.where(flip[:, None, None, None], xb.flip(-1), xb)

    def __repr__(self):
        return f"RandomFlip(p={self.p})"


class Cutout:
    """Blank a square of each image, centred on any of its pixels, so that it may hang over the edge.

    size: pixels a side, 8 by default, as in short trainings on CIFAR-10; the paper's long ones there have 16. fill: the
    value put in, 0 by default: on normalised batches that is the mean colour. Takes and returns (N, C, H, W) of any
    dtype, on its device.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """

    takes_generator = True

    def __init__(self, size=8, fill=0.0):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"Cutout's size is a positive number of pixels; got {size!r}. "
                             "Leave the transform out to blank nothing.")
        self.size, self.fill = size, fill

    def __call__(self, xb, generator):
        _check_images("Cutout", xb)
        n, _, h, w = xb.shape
        rows, columns = (self._covered(n, length, xb.device, generator) for length in (h, w))
        return xb.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], self.fill)

    def _covered(self, n, length, device, generator):
        """(n, length): for each image the rows, or columns, that its square covers."""
        first = torch.randint(length, (n, 1), generator=generator, device=device) - self.size // 2
        at = torch.arange(length, device=device)
        return (at >= first) & (at < first + self.size)

    def __repr__(self):
        return f"Cutout(size={self.size}, fill={self.fill})"


def to_channels_last(xb):
    """(N, C, H, W) with the same values and shape, in memory as N, H, W, C: what convolutions on tensor cores read."""
    _check_images("to_channels_last", xb)
    return xb.contiguous(memory_format=torch.channels_last)


def _check_images(who, xb):
    if xb.dim() != 4:
        raise ValueError(f"{who} takes batches of images (N, C, H, W); got shape {tuple(xb.shape)}. "
                         "Give the loader images, or leave the transform out.")
