"""A table that grows by a row a step: on the device while an epoch lasts, on the host after it, and never too long."""

from __future__ import annotations

import torch

_JOIN = 64  # pieces kept apart before they are joined: each is an allocation of its own


class Rows:
    """Rows of equal shape, each with its step.

    - `keep`: with this many rows, every second one is dropped and `stride` doubles: from then on only each `stride`-th
      of the rows that come is wanted, so that what is kept stays evenly spaced.

    A step is noted when it is recorded; its values may come later, in blocks (`put`), in the order of the steps.
    """

    def __init__(self, keep, shape):
        self.keep, self.stride, self.steps = keep, 1, []
        self._host, self._pieces = torch.empty(0, *shape), []

    def wants(self, step, every) -> bool:
        return step % (every * self.stride) == 0

    def is_full(self) -> bool:
        return len(self.steps) >= self.keep

    def put(self, block) -> None:
        """A tensor (rows, *shape), on any device."""
        self._pieces.append(block)
        if len(self._pieces) >= _JOIN:
            self._pieces = [torch.cat(self._pieces)]

    def thin(self) -> None:
        """Drop every second row, the first one stays. All values must be here; it waits for no device."""
        odd, self._host = len(self._host) % 2, self._host[::2].clone()
        self._pieces = [torch.cat(self._pieces)[odd::2].clone()] if self._pieces else []
        self.steps, self.stride = self.steps[::2], 2 * self.stride

    def fetch(self) -> torch.Tensor:
        """All rows on the host, float32. Waits for the device when there are new ones."""
        if self._pieces:
            new = torch.cat(self._pieces) if len(self._pieces) > 1 else self._pieces[0]
            self._host, self._pieces = torch.cat([self._host, new.cpu()]), []
        return self._host

    def replace(self, steps, values, stride=1) -> None:
        """Go on from other rows."""
        self.steps, self.stride, self._host, self._pieces = list(steps), stride, values, []


def check_counts(**counts) -> None:
    """`name=(value, least)`: whole numbers of `least` or more, or ValueError."""
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")


def notice(owner, rows, every) -> str:
    return (
        f"{owner} has {rows.keep:,} rows: every second one is dropped, and from now on each "
        f"{every * rows.stride}-th step is recorded (keep={rows.keep:,}; a larger `every` says so from the start)"
    )
