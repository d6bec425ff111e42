"""Functions on whole batches: reshape, normalise, random crop and flip, cutout, memory order.

`BatchLoader` calls a transform with the attribute `takes_generator = True` as `tfm(xb, generator)`, and seeds the
generator from (seed, epoch, batch), so its random numbers can be repeated from the middle of an epoch. Any other
callable is called as `tfm(xb)`, except torchvision's transforms, which get single images (`per_image.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Cutout", "RandomCrop", "RandomFlip", "normalize_to", "to_channels_last", "view_tfm"]


def view_tfm(*size: int) -> Callable[[Tensor], Tensor]:
    """Make a function that reshapes a batch to `(-1, *size)`.

    Parameters
    ----------
    *size : int
        Shape of one sample: positive integers, or one tuple of them.

    Returns
    -------
    callable
        Takes and returns a tensor of any dtype; the result is a view where possible. It can be pickled, and raises
        ValueError if the elements do not divide into `size`.

    Raises
    ------
    ValueError
        If `size` is not made of positive integers.

    Examples
    --------
    >>> to_images = view_tfm(1, 28, 28)   # rows of MNIST become images
    >>> to_images(torch.zeros(16, 784)).shape
    torch.Size([16, 1, 28, 28])

    References
    ----------
    fast.ai course notebook 06_cuda_cnn_hooks_init.
    """
    if len(size) == 1 and isinstance(size[0], (tuple, list)):
        size = tuple(size[0])
    if not size or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            f"view_tfm needs positive integers, the shape of one sample; got {size}. "
            "Use view_tfm(1, 28, 28) for one-channel images of 28 by 28 pixels."
        )
    return partial(_view, size=size)


def _view(x: Tensor, size: tuple[int, ...]) -> Tensor:
    wanted = math.prod(size)
    if x.numel() % wanted:
        raise ValueError(
            f"view_tfm{size} needs a multiple of {wanted} elements; got shape {tuple(x.shape)}, "
            f"{x.numel()} elements. Use a size whose product is {math.prod(x.shape[1:])}."
        )
    return x.reshape(-1, *size)


def normalize_to(train: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the training mean from both tensors and divide them by the training standard deviation.

    One mean and one (unbiased) standard deviation are taken over all elements of `train`. Validation data is shifted in
    the same way, or the model would see a different distribution.

    Parameters
    ----------
    train, valid : Tensor, floating point, any shape

    Returns
    -------
    (train, valid) : Tensor
        New tensors.

    Raises
    ------
    ValueError
        If a tensor is not floating point, or `train` is constant.

    Examples
    --------
    >>> train, valid = normalize_to(torch.tensor([0.0, 2.0, 4.0]), torch.tensor([2.0, 6.0]))
    >>> train, valid
    (tensor([-1.,  0.,  1.]), tensor([0., 2.]))

    References
    ----------
    fast.ai course notebook 05b_early_stopping.
    """
    for name, x in (("train", train), ("valid", valid)):
        if not x.is_floating_point():
            raise ValueError(
                f"normalize_to needs floating-point tensors; {name} is {x.dtype}. "
                "Convert first: x.float() / 255 for uint8 images."
            )
    mean, std = train.mean(), train.std()
    if not std > 0:
        raise ValueError(
            f"normalize_to divides by train's standard deviation, which is {std.item()} for shape "
            f"{tuple(train.shape)}. Pass data that varies and has no NaN."
        )
    return (train - mean) / std, (valid - mean) / std


class RandomCrop:
    """Pad each image and cut a window of the original size at a random position, one per image.

    Takes and returns (N, C, H, W) of any dtype, on its device.

    Parameters
    ----------
    padding : int, default 4
        Pixels added on each side; 4 is usual for CIFAR.
    fill : float, default 0.0
        Value of the padding; on normalised batches 0 is the mean colour, on bytes black.

    Raises
    ------
    ValueError
        If `padding` is not a positive integer.

    Examples
    --------
    >>> crop = RandomCrop(padding=4)
    >>> crop(torch.randn(8, 3, 32, 32), torch.Generator().manual_seed(0)).shape
    torch.Size([8, 3, 32, 32])
    """

    takes_generator = True

    def __init__(self, padding: int = 4, fill: float = 0.0) -> None:
        if not isinstance(padding, int) or padding < 1:
            raise ValueError(
                f"RandomCrop's padding must be a positive number of pixels; got {padding!r}. "
                "Leave the transform out if you want no crop."
            )
        self.padding, self.fill = padding, fill

    def __call__(self, xb: Tensor, generator: torch.Generator | None) -> Tensor:
        _check_images("RandomCrop", xb)
        n, _, h, w = xb.shape
        p = self.padding
        at = torch.randint(2 * p + 1, (2, n), generator=generator, device=xb.device)
        # all windows are views of the padded batch, so picking one per image is a single gather
        windows = F.pad(xb, (p, p, p, p), value=self.fill).unfold(2, h, 1).unfold(3, w, 1)
        return windows[torch.arange(n, device=xb.device), :, at[0], at[1]]

    def __repr__(self) -> str:
        return f"RandomCrop(padding={self.padding}, fill={self.fill})"


class RandomFlip:
    """Mirror each image left to right with probability `p`.

    Takes and returns (N, C, H, W) of any dtype, on its device.

    Parameters
    ----------
    p : float, default 0.5
        Probability, drawn separately for each image.

    Raises
    ------
    ValueError
        If `p` is not between 0 and 1.

    Examples
    --------
    >>> RandomFlip(p=1.0)(torch.tensor([[[[1.0, 2.0]]]]), None)
    tensor([[[[2., 1.]]]])
    """

    takes_generator = True

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"RandomFlip's p must be a probability between 0 and 1; got {p!r}.")
        self.p = p

    def __call__(self, xb: Tensor, generator: torch.Generator | None) -> Tensor:
        _check_images("RandomFlip", xb)
        flip = torch.rand(len(xb), generator=generator, device=xb.device) < self.p
        return torch.where(flip[:, None, None, None], xb.flip(-1), xb)

    def __repr__(self) -> str:
        return f"RandomFlip(p={self.p})"


class Cutout:
    """Blank a square of each image, centred on a random pixel, so that it may extend past the edge.

    Takes and returns (N, C, H, W) of any dtype, on its device.

    Parameters
    ----------
    size : int, default 8
        Side in pixels; 8 suits short trainings on CIFAR-10, the long ones in the paper use 16.
    fill : float, default 0.0
        Value to fill in; on normalised batches 0 is the mean colour, on bytes black.

    Raises
    ------
    ValueError
        If `size` is not a positive integer.

    Examples
    --------
    >>> xb = Cutout(size=8)(torch.ones(4, 3, 32, 32), torch.Generator().manual_seed(0))
    >>> bool((xb == 0).any())
    True

    References
    ----------
    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """

    takes_generator = True

    def __init__(self, size: int = 8, fill: float = 0.0) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"Cutout's size must be a positive number of pixels; got {size!r}. "
                "Leave the transform out to blank nothing."
            )
        self.size, self.fill = size, fill

    def __call__(self, xb: Tensor, generator: torch.Generator | None) -> Tensor:
        _check_images("Cutout", xb)
        n, _, h, w = xb.shape
        rows, columns = (self._covered(n, length, xb.device, generator) for length in (h, w))
        return xb.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], self.fill)

    def _covered(self, n: int, length: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Boolean (n, length): the rows, or columns, of each image that its square covers."""
        first = torch.randint(length, (n, 1), generator=generator, device=device) - self.size // 2
        at = torch.arange(length, device=device)
        return (at >= first) & (at < first + self.size)

    def __repr__(self) -> str:
        return f"Cutout(size={self.size}, fill={self.fill})"


def to_channels_last(xb: Tensor) -> Tensor:
    """Store images in the memory order N, H, W, C, which convolutions on tensor cores read.

    Parameters
    ----------
    xb : Tensor, shape (N, C, H, W)

    Returns
    -------
    Tensor, shape (N, C, H, W)
        The same values.

    Raises
    ------
    ValueError
        If `xb` does not have four dimensions.

    Examples
    --------
    >>> to_channels_last(torch.zeros(2, 3, 4, 5)).stride()
    (60, 1, 15, 3)
    """
    _check_images("to_channels_last", xb)
    return xb.contiguous(memory_format=torch.channels_last)


def _check_images(who: str, xb: Tensor) -> None:
    if xb.dim() != 4:
        raise ValueError(
            f"{who} needs batches of images (N, C, H, W); got shape {tuple(xb.shape)}. "
            "Load images, or leave the transform out."
        )
