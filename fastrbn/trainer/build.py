"""The model and the loaders that a run's settings describe, for the training and for whoever loads the run later."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fastrbn.data import DataBunch, ImageData, image_databunch
from fastrbn.models import conv_bn, conv_gn, conv_rbn, get_cnn_model, init_cnn, resnet9

from .augment import transforms
from .nets import named_net
from .settings import NFS, Settings

_LAYERS = {"running": conv_rbn, "batch": conv_bn, "group": conv_gn}


def build_model(settings: Settings, c_in: int, c: int) -> nn.Module:
    """The model with initial weights, on the CPU, for images of `c_in` channels and `c` classes.

    ValueError if it cannot be made here.
    """
    recipe: dict[str, Any] = {} if settings.recipe is None else {"recipe": settings.recipe}
    if settings.model == "cnn":
        model = get_cnn_model(SimpleNamespace(c_in=c_in, c=c), NFS, _LAYERS[settings.norm], **recipe)
        init_cnn(model)
        return model
    if settings.model != "resnet9":
        return named_net(settings.model, c_in, c, settings.recipe)
    width: dict[str, Any] = {} if settings.width is None else {"width": settings.width}
    return resnet9(c_in=c_in, c_out=c, norm=settings.norm, **recipe, **width)


def build_data(settings: Settings, images: ImageData, world: int = 1) -> DataBunch:
    """The loaders of `images`, on the device, for `world` processes.

    A compiled model does not get an epoch's last, smaller batch, for which it would be compiled once more (unless there
    is no whole one).
    """
    n = min(len(images.train), settings.limit or len(images.train))
    return image_databunch(
        images,
        settings.bs,
        seed=settings.seed,
        device=torch.device(settings.device),
        limit=settings.limit,
        augment=transforms(settings.augment, images.train.x.shape[2:]),
        cutout=settings.cutout,
        channels_last=settings.channels_last,
        drop_last=settings.compile is not None and n >= settings.bs * world,
    )
