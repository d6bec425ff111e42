"""Common parts of the norms with a memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PeerNorm(nn.Module):
    """Common parts of the norms with a memory: γ, β, the number of training steps, and the check of the shape."""

    num_batches_tracked: Tensor

    def __init__(self, nf: int) -> None:
        super().__init__()
        self.num_features = nf
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        self._steps: int | None = None  # the same number on the host, so that reading it does not wait for the device

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} needs (N, C) or (N, C, *) with C = {self.num_features}; got {tuple(x.shape)}"
            )

    def _next_step(self) -> int:
        """Return the number of training steps before this one, and count this one."""
        if self._steps is None:
            self._steps = int(self.num_batches_tracked)
        self.num_batches_tracked += 1
        self._steps += 1
        return self._steps - 1

    def _affine(self, z: Tensor) -> Tensor:
        return torch.addcmul(channels(self.bias, z), z, channels(self.weight, z))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._steps = None


def channels(v: Tensor, x: Tensor) -> Tensor:
    """(*, C) to (*, C, 1, …), which broadcasts against x of shape (N, C, *)."""
    return v.reshape(v.shape + (1,) * (x.dim() - 2))


def others(x: Tensor) -> list[int]:
    """All dimensions except that of the channels."""
    return [d for d in range(x.dim()) if d != 1]
