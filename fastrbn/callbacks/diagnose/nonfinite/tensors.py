"""Which tensors hold NaN or Inf: asked on the host, or noted on the device and read when the answer is there."""

from __future__ import annotations

import math

import torch

from .native import known_finite

_NARROW = (torch.float16, torch.bfloat16)


def float_tensors(value) -> list[torch.Tensor]:
    """The floating-point tensors in an output: a tensor, or tuples, lists and dictionaries of them."""
    if isinstance(value, torch.Tensor):
        return [value] if (value.is_floating_point() or value.is_complex()) and value.numel() else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for v in value for t in float_tensors(v)]


def is_finite(t) -> bool:
    return bool(torch.isfinite(t.detach()).all())


def dense(grad):
    """The values of a gradient that may be sparse."""
    return grad if grad.layout is torch.strided else grad.coalesce().values()


def sums_finite(tensors) -> bool:
    """Whether all sums are finite: then all elements are. For few tensors; a sum may overflow, so False is a doubt."""
    if known_finite(tensors):
        return True
    for t in tensors:
        total = t.detach().sum(dtype=torch.float32 if t.dtype in _NARROW else None).item()
        if not math.isfinite(abs(total)):
            return False
    return True


def number(loss):
    """The loss as a float where that waits for no device. Of a loss for each sample it is the mean."""
    if loss.numel() != 1:
        loss = loss.detach().double().mean()
    return loss.item() if loss.is_cpu and loss.numel() == 1 and loss.is_floating_point() else loss.detach()


def number_finite(loss) -> bool:
    """The same question of what `number` gave."""
    return math.isfinite(loss) if isinstance(loss, float) else sums_finite([loss])


@torch.no_grad()
def not_finite(named) -> list[str]:
    """The names of those tensors that hold NaN or Inf. When none does, one wait for the device tells."""
    if not named:
        return []
    tensors = [t for _, t in named]
    if known_finite(tensors):
        return []
    if any(t.dtype in _NARROW for t in tensors):  # their squares would overflow
        tensors = [t.float() if t.dtype in _NARROW else t for t in tensors]
    norms = torch._foreach_norm(tensors, 2)  # not finite as soon as one element is not, in one pass
    if not all(n.is_cpu for n in norms):
        norms = [torch.stack([n.to(norms[0].device) for n in norms]).sum()]
    if all(math.isfinite(n.item()) for n in norms):
        return []
    # the sums of squares may have overflowed: now each element counts
    return [name for name, t in named if not is_finite(t)]


class DeviceFlags:
    """Notes on the device, look by look, whether something has not been finite; the host reads it late.

    - `add(tensors)`: take them into account. `largest(tensors)`: the same for tensors that are not ours to write to.
    - `mark()`: the end of a look; gives a bool tensor (), True from the first look on that found something.
    - `first_bad()`: the number of the first look that found something, as far as it has come over, or None. `known`
      looks are known to be good. Waits for the device only when told to, or when more than `pending` looks are open;
      then for what it was given half as many looks ago, and not for what it was given since.
    """

    SLOTS = 64
    LAG = 0  # on the CPU an answer takes this many looks: tests see what a device's delay does

    def __init__(self, device, pending=16):
        self.pending = min(pending, self.SLOTS // 2)
        self._found, self._one = torch.zeros((), device=device), torch.ones((), device=device)
        self._ring = torch.zeros(self.SLOTS, dtype=torch.bool, device=device)
        self._slots = self._ring.unbind()
        self._host = torch.zeros(self.SLOTS, dtype=torch.bool, pin_memory=device.type != "cpu")
        self._event = getattr(torch, device.type).Event() if device.type != "cpu" else None
        self.looks, self.known, self._asked = 0, 0, None  # _asked: how many looks the copy under way tells of

    def add(self, tensors) -> None:
        by_dtype = {}
        for t in tensors:
            by_dtype.setdefault(t.dtype, []).append(t)
        for same in by_dtype.values():  # GradScaler's own check: one pass, no temporaries, the flag only ever goes up
            torch._amp_foreach_non_finite_check_and_unscale_(same, self._found, self._one)

    def largest(self, tensors) -> None:
        if tensors:
            self.add(torch._foreach_norm(tensors, math.inf))  # no sum that could overflow

    def mark(self) -> torch.Tensor:
        slot = self._slots[self.looks % self.SLOTS]
        torch.gt(self._found, 0, out=slot)
        self.looks += 1
        return slot

    def first_bad(self, wait=False) -> int | None:
        due = self._asked is not None and (wait or self.looks - self.known >= self.pending or self._arrived())
        if due and (bad := self._read()) is not None:
            return bad
        if self._asked is None and self.looks - self.known >= (1 if wait else self.pending // 2):
            self._ask()
        return self.first_bad(wait=True) if wait and self._asked is not None else None

    def _ask(self):
        self._host.copy_(self._ring, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._asked = self.looks

    def _arrived(self) -> bool:
        return self._event.query() if self._event is not None else self.looks >= self._asked + self.LAG

    def _read(self):
        if self._event is not None:
            self._event.synchronize()
        flags, first, last = self._host.tolist(), self.known, self._asked
        self._asked = None
        for look in range(first, last):
            if flags[look % self.SLOTS]:
                return look
        self.known = last
        return None
