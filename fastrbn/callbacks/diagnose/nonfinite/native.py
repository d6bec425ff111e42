"""`_finite.c` called from Python: whether tensors on the CPU are finite, and copies of them, in a call each.

At a call in some milliseconds everything runs cold, and it is the number of PyTorch's operators that costs. Whoever asks
here has another way: no compiler, other dtypes and layouts are no error.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor
from torch.nn import Parameter

from fastrbn import native as native_build

_SOURCE = Path(__file__).with_name("_finite.c")
_PART = Struct("2P2q")  # as the struct of _finite.c
_KINDS = {torch.float32: 1, torch.float64: 2, torch.float16: 3, torch.bfloat16: 4}
_SUMMED = (torch.float32, torch.float64)
_PARAMETER = 8
_PIECE = 2**22  # bytes that make it worth to have another thread
_MOST_THREADS = 64


@lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL | None:
    """The compiled library, where there is one."""
    library, _ = native_build.load(_SOURCE)
    if library is not None:
        parts = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
        library.finite_squares.argtypes, library.finite_squares.restype = (*parts, ctypes.c_int64), ctypes.c_double
        library.finite_copy.argtypes, library.finite_copy.restype = parts, None
    return library


def known_finite(tensors) -> bool:
    """Whether all of `tensors` are known to be finite. False is a doubt: another look must tell. Subclasses of Tensor,
    which may answer for themselves, are not known."""
    library, parts = kernels(), []
    if library is None:
        return False
    for t in tensors:
        kind = _KINDS.get(t.dtype)
        if (
            kind is None
            or not (type(t) is Tensor or type(t) is Parameter)
            or not t.is_cpu
            or t.layout is not torch.strided
        ):
            return False
        if not (t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))):
            return False
        if (pointer := t.data_ptr()) == 0:  # no values in memory, or no values
            return False
        parts.append(_PART.pack(pointer, 0, t.nbytes, kind))
    squares = library.finite_squares(parts[0] if len(parts) == 1 else b"".join(parts), len(parts), 1, False)
    return squares - squares == 0


class StateKernels:
    """The tensors of a `_Layout`, examined and copied into its `copies`."""

    def __init__(self, layout, copies):
        self.copies, parts = copies, []
        for group, flat in zip(layout.groups, copies):
            to = flat.data_ptr()
            for view, (key, _, examined) in zip(group.views, group.members):
                kind = (_KINDS[view.dtype] if examined else 0) + _PARAMETER * (key[0] == "param")
                start, size = view.data_ptr(), view.numel() * view.element_size()
                for at in range(0, size, _PIECE):
                    parts.append(_PART.pack(start + at, to + at, min(_PIECE, size - at), kind))
                to += size
        size = sum(flat.numel() * flat.element_size() for flat in copies)
        threads = min(max(1, size // _PIECE), torch.get_num_threads(), _MOST_THREADS)
        self._library, self._arguments = kernels(), (b"".join(parts), len(parts), threads)

    def advance(self) -> float:
        """Copy all when it is known to be finite. Returns the sum of squares of the parameters as they are now; it is
        not finite when something may not be."""
        return self._library.finite_squares(*self._arguments, True)

    def copy(self) -> None:
        self._library.finite_copy(*self._arguments)


def can_serve(layout) -> bool:
    """Whether C reads all of the layout's tensors where they are: their flat views must be plain memory."""
    return (
        kernels() is not None
        and all(
            type(v) is Tensor and v.is_cpu and not v.is_neg() and v.data_ptr() != 0
            for group in layout.groups
            for v in group.views
        )
        and not any(g.loose or (g.examined and g.views[0].dtype not in _SUMMED) for g in layout.groups)
    )
