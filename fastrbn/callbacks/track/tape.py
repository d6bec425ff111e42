"""Rows of scalars that stay on their device until somebody reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_CHUNK = 64  # scalars kept singly before they are joined on their device; more are slower, since they leave the cache


class Tape:
    """A table of `width` columns. Adding rows of tensors and numbers never waits; reading copies all at once."""

    def __init__(self, width: int):
        self._clear(width)

    def _clear(self, width: int) -> None:
        self._new: list[Sequence[torch.Tensor | float]] = []
        self._joined: list[list[torch.Tensor]] = [[] for _ in range(width)]
        self._columns: list[list[float]] = [[] for _ in range(width)]

    def add(self, row: Sequence[torch.Tensor | float]) -> None:
        self._new.append(row)
        if len(self._new) >= _CHUNK:
            self._join()

    def _join(self) -> None:
        for joined, column in zip(self._joined, zip(*self._new)):
            tensors = [v if isinstance(v, torch.Tensor) else torch.tensor(float(v)) for v in column]
            tensors = [v.mean() if v.numel() > 1 else v for v in tensors]  # losses (N,), which a callback weighs
            joined.append(torch.stack(tensors).flatten())
        self._new = []

    def read(self) -> list[list[float]]:
        """The columns as lists of floats. Waits for the device."""
        self._join()
        for joined, column in zip(self._joined, self._columns):
            if joined:
                column.extend(torch.cat(joined).tolist())
                joined.clear()
        return self._columns

    def state_dict(self) -> dict:
        return {"columns": [torch.tensor(column, dtype=torch.float64) for column in self.read()]}

    def load_state_dict(self, state: dict) -> None:
        self._clear(len(state["columns"]))
        self._columns = [column.tolist() for column in state["columns"]]

    def __getstate__(self):
        return {"_new": [], "_joined": [[] for _ in self._columns], "_columns": self.read()}
