"""Norms to compare running batch norm with that PyTorch does not have, written from their papers.

They are for `fastrbn compare`, in plain PyTorch without custom kernels, so their speed says nothing about the methods.
"""

from .batch_renorm import BatchRenorm, BatchRenorm2d
from .filter_response import FilterResponseNorm2d
from .mabn import MABN
from .online import OnlineNorm

__all__ = [
    "MABN",
    "BatchRenorm",
    "BatchRenorm2d",
    "FilterResponseNorm2d",
    "OnlineNorm",
]
