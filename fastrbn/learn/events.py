"""The events of training, in order, and the exceptions that cut part of it short.

The names are those of fast.ai's course (part 2, 2019, notebook 09b), so that its callbacks run here.
"""

from __future__ import annotations

from fastrbn.util import nearest

BATCH_EVENTS = ("begin_batch", "after_pred", "after_loss", "after_backward", "after_step", "after_batch")
EVENTS = (
    "begin_fit",
    "begin_epoch",
    *BATCH_EVENTS,
    "begin_validate",
    "after_epoch",
    "after_fit",
    "after_cancel_batch",
    "after_cancel_epoch",
    "after_cancel_train",
)


class CancelBatchException(Exception):
    """Raise it in any event to skip the rest of the batch.

    `after_cancel_batch` and `after_batch` follow, then the next batch. Where there is no batch, as in `begin_epoch`, it
    ends the handler that raises it, and the event goes on.
    """


class CancelEpochException(Exception):
    """Raise it in any event to end the current pass over a loader.

    `after_cancel_epoch` follows, then what comes after the pass: validation after training, `after_epoch` after
    validation. In `begin_fit` and `after_epoch` it ends the handler that raises it, and the event goes on.
    """


class CancelTrainException(Exception):
    """Raise it in any event to end the fit.

    `after_cancel_train` and `after_fit` follow. The exception's text, if it has one, becomes `run.stop_reason`.
    """


def nearest_event(name: str) -> str | None:
    """The event that `name` probably means, or None.

    A name that begins like an event (`begin_`, `after_`, also fastai v2's `before_`) always means one; any other must
    be close to one (a missing or swapped letter).
    """
    prefixed = name.startswith(("begin_", "after_", "before_"))
    wanted = name.replace("before_", "begin_", 1)
    return nearest(wanted, EVENTS, cutoff=0.0 if prefixed else 0.85)
