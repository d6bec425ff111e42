"""Rows of scalars, kept on their device until somebody reads them."""

from __future__ import annotations

import torch

_CHUNK = 64  # scalars kept one by one before they are joined on their device: more are slower, they leave the cache


class Tape:
    """Rows of scalars that stay on their device until someone reads them, then come over in one go."""

    def __init__(self, width):
        self._new, self._joined, self._columns = [], [[] for _ in range(width)], [[] for _ in range(width)]

    def add(self, row) -> None:
        self._new.append(row)
        if len(self._new) >= _CHUNK:
            self._join()

    def _join(self):
        for joined, column in zip(self._joined, zip(*self._new)):
            tensors = [v if isinstance(v, torch.Tensor) else torch.tensor(float(v)) for v in column]
            joined.append(torch.stack(tensors).flatten())
        self._new = []

    def read(self) -> list[list[float]]:
        """A list for each column."""
        self._join()
        for joined, column in zip(self._joined, self._columns):
            if joined:
                column.extend(torch.cat(joined).tolist())
                joined.clear()
        return self._columns

    def state_dict(self) -> dict:
        return {"columns": [torch.tensor(column, dtype=torch.float64) for column in self.read()]}

    def load_state_dict(self, state) -> None:
        self.__init__(len(state["columns"]))
        self._columns = [column.tolist() for column in state["columns"]]

    def __getstate__(self):
        return {"_new": [], "_joined": [[] for _ in self._columns], "_columns": self.read()}
