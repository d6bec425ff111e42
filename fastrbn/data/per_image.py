"""torchvision's transforms on batches: image by image, since they make one draw a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrbn.random_state import RandomState, seed_all
from fastrbn.util import torchvision_parts

__all__ = ["PerImage", "check_storage"]


class PerImage:
    """Apply a torchvision transform to each image of a batch, with draws of its own.

    Takes and returns (N, C, H, W) of one dtype. The result may have another height and width, the same for all images.
    The transform draws from the global generators, which are seeded for the call from the loader's generator and then
    restored.

    Parameters
    ----------
    tfm : callable
        A transform of `torchvision.transforms.v2`, or a module that contains some.
    place : int
        From 1; transforms of one loader that have different places draw different numbers.

    Raises
    ------
    ValueError
        If the transform mixes samples and labels.
    """

    takes_generator = True

    def __init__(self, tfm: Callable[[Tensor], Any], place: int) -> None:
        for name in sorted({type(part).__name__ for part in torchvision_parts(tfm)} & {"CutMix", "MixUp"}):
            raise ValueError(
                f"tfms work on single images without labels; {name} mixes the images and the labels of a batch. "
                f"Use the callback fastrbn.{name} instead."
            )
        self.tfm, self.place = tfm, place

    def __call__(self, xb: Tensor, generator: torch.Generator) -> Tensor:
        with RandomState():
            # the seed and not a draw, which on an accelerator would wait for the step before
            seed_all((generator.initial_seed() + self.place) % 2**64)
            # a transform may work in place, and `xb` may be a view of the stored images
            images = [self._one(x) for x in xb.clone()]
        sizes = {tuple(im.shape[1:]) for im in images}
        if len(sizes) > 1:
            a, b, *_ = sorted(sizes)
            raise ValueError(
                f"tfms must give every image the same size; {self} made images of {a} and of {b}. End it with a "
                f"transform that sets the size, such as v2.Resize(({xb.shape[2]}, {xb.shape[3]}))."
            )
        return torch.stack(images)

    def _one(self, x: Tensor) -> Tensor:
        out = self.tfm(x)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"tfms must return one image as a tensor; {self} returned {type(out).__name__}. Leave out "
                "transforms that make PIL images or several crops."
            )
        if out.dtype != x.dtype:
            raise TypeError(
                f"tfms take and return {x.dtype} here; {self} returned {out.dtype}. Leave out v2.ToDtype and "
                "v2.Normalize: the loader converts and normalises after the torchvision transforms, see `normalize`."
            )
        if out.dim() != 3 or len(out) != len(x):
            raise ValueError(
                f"tfms must keep the channels; {self} made {tuple(out.shape)} of {tuple(x.shape)}. Use transforms "
                "that keep their number, such as v2.Grayscale(num_output_channels=3)."
            )
        return out

    def __repr__(self) -> str:
        return " ".join(repr(self.tfm).split())


def check_storage(x: Tensor) -> None:
    """Raise ValueError unless `x` are images as torchvision's transforms read them: bytes, or floats in 0-1."""
    if x.dim() != 4:
        raise ValueError(
            f"torchvision's transforms need images (N, C, H, W); x has shape {tuple(x.shape)}. Reshape x, for example "
            "with x.view(-1, 1, 28, 28)."
        )
    if x.dtype == torch.uint8:
        return
    if not x.is_floating_point():
        raise ValueError(
            f"torchvision's transforms need images as uint8, or floats in 0-1; x is {x.dtype}. Convert it with "
            "x.to(torch.uint8) if its values are 0 to 255."
        )
    least, most = map(float, x.aminmax())
    if not (least >= 0 and most <= 1):
        raise ValueError(
            f"torchvision's transforms need floating-point images in 0-1, and clip others; x ranges from {least:.3g} "
            f"to {most:.3g}. Pass the images as uint8 or in 0-1, and let the loader normalise: normalize=(mean, std)."
        )
