"""Looks whose answer a device keeps: it takes notes while the host goes on, and the host reads them some steps later."""

from __future__ import annotations

from .tensors import DeviceFlags, float_tensors

_OPEN_BYTES = 2**28  # what batches may take that wait for the device's answer, two of them apart


class LateLooks:
    """The batches whose looks are open, in `waiting`, and the device's flags for them.

    A look is what is noted of one batch: of a training batch until its state is advanced, of a validation batch its
    forward pass.
    """

    def __init__(self, device):
        self.device, self.waiting, self._flags = device, {}, None

    def _flagged(self, batch) -> DeviceFlags:
        if self._flags is None:
            size = sum(t.nbytes for t in float_tensors([batch.xb, batch.yb]))
            self._flags = DeviceFlags(self.device, pending=max(2, min(16, _OPEN_BYTES // max(size, 1))))
        return self._flags

    def note_forward(self, batch, tensors) -> bool:
        """Take `tensors` and the loss into account. Whether that was all of the look."""
        flags = self._flagged(batch)
        flags.largest([t.detach() for t in tensors])
        flags.add([batch.loss.clone()])
        if not batch.in_train:
            flags.mark()
            self.waiting[flags.looks - 1] = batch
        return not batch.in_train

    def note_grads(self, batch, grads) -> None:
        self._flagged(batch).largest([g.detach() for g in grads])

    def advance(self, batch, kept) -> list:
        """The end of a training batch's look: the device keeps the state when it is finite. Gives the norm's squares."""
        flags = self._flagged(batch)
        norm = kept.advance_unless(flags)
        self.waiting[flags.looks - 1] = batch
        return norm

    def first_bad(self, wait=False):
        """The first batch that is known to be bad, or None; those known to be good wait no longer."""
        if not self.waiting:
            return None
        if (look := self._flags.first_bad(wait)) is not None:
            return self.waiting[look]
        self.waiting = {look: batch for look, batch in self.waiting.items() if look >= self._flags.known}
        return None


def late_device(model):
    """The device of the whole model, where it takes notes and the host reads them late; else None."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    return next(iter(devices)) if len(devices) == 1 and next(iter(devices)).type in ("cuda", "xpu") else None
