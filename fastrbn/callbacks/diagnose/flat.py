"""Vectors with room for many tensors: one call copies them all there, and one more reduces them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def room_for(tensors: Sequence[Tensor], dtype: torch.dtype, block: int = 1) -> tuple[Tensor, list[Tensor]]:
    """A vector of zeros on the device of `tensors`, and a view of it in the shape of each tensor.

    Every view begins at a multiple of `block`; the zeros in between stay.
    """
    sizes = [-(-t.numel() // block) * block for t in tensors]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=tensors[0].device)
    return flat, [_like(part[: t.numel()], t) for part, t in zip(flat.split(sizes), tensors)]


def in_memory(t: Tensor) -> Tensor | None:
    """The values of `t` as a vector, in the order of its memory and sharing it; None if its memory has gaps."""
    return t.detach().as_strided((t.numel(),), (1,)) if _is_dense(t) else None


def _is_dense(t: Tensor) -> bool:
    return torch.empty_like(t, device="meta").stride() == t.stride()  # keeps the strides of dense tensors only


def _like(part: Tensor, t: Tensor) -> Tensor:
    """`part` with the shape of `t`, and with its strides if its memory is dense."""
    return part.as_strided(t.shape, t.stride(), part.storage_offset()) if _is_dense(t) else part.view(t.shape)
