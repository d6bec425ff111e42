"""`Rows`: a table with a row for each step, on the device during an epoch and on the host after it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_JOIN = 64  # pieces before they are joined: each is an allocation


class Rows:
    """Rows of equal shape, each with its step.

    With `keep` rows every second one is dropped and `stride` doubles: from then on only every `stride`-th of the rows
    that come is wanted, so that what is kept stays evenly spaced. A step is noted when it is recorded; its values may
    come later, in blocks (`put`), in the order of the steps.
    """

    def __init__(self, keep: int, shape: tuple[int, ...]):
        self.keep, self.stride = keep, 1
        self.steps: list[int] = []
        self._host = torch.empty(0, *shape)
        self._pieces: list[torch.Tensor] = []

    def wants(self, step: int, every: int) -> bool:
        return step % (every * self.stride) == 0

    def is_full(self) -> bool:
        return len(self.steps) >= self.keep

    def put(self, block: torch.Tensor) -> None:
        """Append a tensor of shape (rows, *shape) on any device."""
        self._pieces.append(block)
        if len(self._pieces) >= _JOIN:
            self._pieces = [torch.cat(self._pieces)]

    def thin(self) -> None:
        """Drop every second row, keeping the first. All values must have been put. Waits for no device."""
        odd, self._host = len(self._host) % 2, self._host[::2].clone()
        self._pieces = [torch.cat(self._pieces)[odd::2].clone()] if self._pieces else []
        self.steps, self.stride = self.steps[::2], 2 * self.stride

    def fetch(self) -> torch.Tensor:
        """All rows on the host, float32. Waits for the device if there are new ones."""
        if self._pieces:
            new = torch.cat(self._pieces) if len(self._pieces) > 1 else self._pieces[0]
            self._host, self._pieces = torch.cat([self._host, new.cpu()]), []
        return self._host

    def replace(self, steps: Iterable[int], values: torch.Tensor, stride: int = 1) -> None:
        """Continue from other rows."""
        self.steps, self.stride, self._host, self._pieces = list(steps), stride, values, []


def notice(owner: str, rows: Rows, every: int) -> str:
    """The line for the log after `thin`."""
    return (
        f"{owner} has {rows.keep:,} rows: every second one is dropped, and from now on each "
        f"{every * rows.stride}-th step is recorded (keep={rows.keep:,}; a larger `every` says so from the start)"
    )
