"""For notebooks: `from fastrbn.basics import *` gives every public name and what cells of the course use unimported."""

import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim, tensor
from torch.nn import init
from torch.utils.data import DataLoader

import fastrbn

__all__ = [  # noqa: PLE0604 - the names of another module are strings too
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


def __getattr__(name):
    return getattr(fastrbn, name)


def __dir__():
    return sorted(__all__)
