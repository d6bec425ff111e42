"""All public names, and those that the course's notebooks use without importing: `from fastrbn.basics import *`."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim, tensor
from torch.nn import init
from torch.utils.data import DataLoader

import fastrbn

__all__ = [  # noqa: PLE0604 - __all__ of fastrbn holds strings too
    *fastrbn.__all__,
    "DataLoader",
    "F",
    "Path",
    "init",
    "math",
    "nn",
    "np",
    "optim",
    "partial",
    "plt",
    "tensor",
    "torch",
]


def __getattr__(name: str) -> Any:
    return getattr(fastrbn, name)


def __dir__() -> list[str]:
    return sorted(__all__)
