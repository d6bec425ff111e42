"""One image: read from a file as bytes, and made the tensor that a model takes."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .batches import BatchLoader

__all__ = ["UNREADABLE", "ImageTransform", "image_bytes", "read_bytes"]

BYTE_MODES = {
    "1": "L",
    "L": "L",
    "LA": "RGB",
    "P": "RGB",
    "PA": "RGB",
    "RGB": "RGB",
    "RGBA": "RGB",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "HSV": "RGB",
    "LAB": "RGB",
}
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what Pillow raises


def image_bytes(im: Image.Image, size: tuple[int, int] | None, mode: str | None = None) -> np.ndarray:
    """The image as uint8 (H, W, C), scaled to cover `size` and cropped at the centre.

    `mode` is "L" or "RGB"; by default grey images are "L" and others "RGB".
    """
    if im.mode not in BYTE_MODES:
        raise ValueError(f"mode {im.mode}, not 8 bits per channel")
    im = im.convert(mode or BYTE_MODES[im.mode])
    if size is not None:
        im = ImageOps.fit(im, size[::-1], Image.Resampling.BILINEAR)
    a = np.asarray(im)
    return a if a.ndim == 3 else a[:, :, None]


def read_bytes(file: str | Path, size: tuple[int, int] | None, mode: str | None = None) -> np.ndarray:
    """`image_bytes` of a file. One of `UNREADABLE` if it is no image."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("neither a file nor a link to one")  # opening a named pipe would wait for a writer
    with Image.open(file) as opened:
        return image_bytes(opened, size, mode)


@dataclass(frozen=True)
class ImageTransform:
    """Makes the tensor that a model takes from an image, in the same way as the images it was trained on.

    The image is scaled to cover `size` and cropped at the centre; an image of that size stays as it is.

    Parameters
    ----------
    size : (height, width)
        In pixels.
    mean, std : tuple of float
        One number per channel, on the 0-1 scale. With one channel images become grey, with three RGB.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: str | Path | Image.Image) -> Tensor:
        """The image, a file or a Pillow image, as a normalised float32 tensor (C, H, W)."""
        return self.normalize(self.bytes(image)[None])[0]

    def bytes(self, image: str | Path | Image.Image) -> Tensor:
        """The image as uint8 (C, H, W), not normalised."""
        mode = "L" if len(self.mean) == 1 else "RGB"
        if isinstance(image, Image.Image):
            a = image_bytes(image, self.size, mode)
        elif isinstance(image, (str, Path)):
            a = read_bytes(image, self.size, mode)
        else:
            raise TypeError(
                f"an image is a path or a Pillow image; got {type(image).__name__}: Image.fromarray makes one of an "
                f"array of bytes"
            )
        return torch.from_numpy(a.transpose(2, 0, 1).copy())

    def normalize(self, x: Tensor) -> Tensor:
        """Images as bytes (N, C, H, W), normalised."""
        (batch,) = BatchLoader(x, torch.zeros(len(x)), bs=len(x), normalize=(self.mean, self.std))
        return batch[0]
