"""What ranks agree on before they do something together: that all of them do it."""

from __future__ import annotations

from datetime import timedelta

from fastrbn.learn.events import CancelBatchException, CancelEpochException, CancelTrainException

# What a rank is up to; the largest of them decides for all. END: its batches are at an end. DONE: its epochs are.
GO, BATCH, EPOCH, END, DONE, TRAIN, INTERRUPT, ERROR = range(8)
# Where ranks meet, by numbers that go to the others
EPOCH_BEGINS, BATCH_BEGINS, LOSS_THERE, VALIDATION_BEGINS, EPOCH_OVER, STEP_LEFT = range(6)
_PLACES = (
    "the begin of epoch {}",
    "the begin of batch {1} in epoch {0}",
    "the loss of batch {1} in epoch {0}",
    "the validation of epoch {}",
    "the end of epoch {}",
    "the step that is left at the end of epoch {}",
)
_GRACE = 10.0  # seconds that a rank which failed waits for the others to come where they hear of it
_FROM_OTHERS = ("gloo", "nccl", "timed out", "connection", "broken pipe", "socket", "store")


class Agreement:
    """Compares, over a `Channel`, where the ranks are. A rank that goes and learns that another does not follows it: by
    the exception that the other has had itself, or by an error that names it."""

    def __init__(self, channel):
        self.channel = channel
        self.left = False  # this rank has left the fit, and the others know
        self.asked = False  # a rank was told to end (Ctrl-C)
        self.ended_by = None  # the rank that has ended training, by a cancel: the first of them

    def go(self, place: tuple[int, int, int], skipped=False, asked=False, number=0) -> list[int]:
        """All go on from `place`, or none does. The `number` of each rank.

        `skipped`: this rank has left out a step since the last time. `asked`: it was told to end.
        """
        rows = self._exchange(GO, skipped, place, asked, number)
        places = [_PLACES[int(row[2])].format(int(row[3]), int(row[4])) for row in rows]
        self._same(places, "are not at the same place")
        self.asked = self.asked or any(row[5] for row in rows)
        return [int(row[6]) for row in rows]

    def tell(self, kind: int, skipped=False, reason="") -> None:
        """This rank does not go on. Raises where others have more to end."""
        self._exchange(kind, skipped, reason=reason)
        self.left = kind >= DONE

    def farewell(self, kind: int, reason: str, error=None) -> str | None:
        """The last word of a rank whose fit has ended, of itself or by `error`. Where another rank was the cause, an
        error of the collective operations is amended to say so, and that is returned; a rank that ended well raises."""
        self.left = True
        if kind == DONE:
            return self._end_well()
        grace = min(_GRACE, self.channel.timeout.total_seconds())
        caused = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _FROM_OTHERS)
        self.channel.post(reason, caused)
        try:
            self._exchange(kind, False, reason=reason, wait=timedelta(seconds=grace))
        except RuntimeError as e:
            if str(e).startswith("rank "):  # they were all there
                raise
            # the others are gone, or in the middle of something that needs this rank
        # they may as well have come here for their own errors: who was the first is in what they have posted
        return self._amend(error, grace) if caused else None

    def _end_well(self) -> None:
        try:
            self._exchange(DONE, False)
        except RuntimeError as e:
            if not str(e).startswith("rank "):
                self._amend(e, min(_GRACE, self.channel.timeout.total_seconds()))
            raise

    def _exchange(self, kind, skipped, place=(0, 0, 0), asked=False, number=0, reason="", wait=None):
        rows = self.channel.gather([kind, skipped, *place, asked, number], wait)
        kinds = [int(row[0]) for row in rows]
        reasons = self.channel.texts(reason) if max(kinds) >= TRAIN else None
        if max(kinds) == TRAIN:
            self.ended_by = kinds.index(TRAIN)
        if max(kinds) < DONE:  # before any follows another: all raise this, or none
            self._same(["left out" if row[1] else "taken" for row in rows], "have not all taken the last step")
        self._follow(kind, kinds, reasons)
        return rows

    def _follow(self, mine, kinds, reasons) -> None:
        """Raise what `kinds` ask of this rank."""
        worst = max(kinds)
        who = kinds.index(worst)
        if worst == DONE != min(kinds):
            self.left = True
            raise RuntimeError(
                f"rank {who} has ended its fit and rank {kinds.index(min(kinds))} has not: all ranks' epochs and "
                f"batches must be equally many"
            )
        if worst <= mine or EPOCH <= mine <= worst <= END:
            return
        self.left = self.left or worst > DONE
        if worst == ERROR:
            raise RuntimeError(f"rank {who} ended the fit: {reasons[who]}")
        if worst == INTERRUPT:
            raise KeyboardInterrupt
        if worst == TRAIN:
            raise CancelTrainException(f"rank {who} ended the fit: {reasons[who]}")
        raise CancelBatchException if worst == BATCH else CancelEpochException

    def _same(self, found, what) -> None:
        if len(set(found)) > 1:
            self.left = True
            listed = "; ".join(f"rank {r}: {value}" for r, value in enumerate(found))
            raise RuntimeError(
                f"ranks step together, and they {what} ({listed}): what callbacks skip or cancel on one rank they must "
                f"on all, so let them decide from values that are equal there, such as gradients"
            )

    def _amend(self, error, grace) -> str | None:
        posts = self.channel.posts(grace)
        causes = {r: text for r, (text, caused) in posts.items() if not caused}
        silent = [r for r in range(self.channel.world) if r not in posts and r != self.channel.rank]
        if causes:
            why = next(f"rank {r} ended the fit: {text}" for r, text in causes.items())
        elif silent:
            why = self._of_silent({r: self.channel.is_alive(r) for r in silent})
        else:
            why = None
        self.channel.leave_posts(grace)
        if why is None:
            return None
        why = f"{why}; what that led to here: {error}"
        error.args = (why, *error.args[1:])
        return why

    @staticmethod
    def _of_silent(alive: dict[int, bool | None]) -> str:
        """What is known of ranks that left no reason. One whose process is there may only be waiting for another."""
        ended = [f"rank {r}" for r, is_alive in alive.items() if is_alive is False]
        unknown = [f"rank {r}" for r, is_alive in alive.items() if is_alive is None]
        look = "see what it printed, and whether it was killed"
        if len(ended) == 1:
            return f"{ended[0]} is gone without a word: its process has ended; {look}"
        if ended:
            return f"{' and '.join(ended)} are gone without a word: their processes have ended; {look}"
        if unknown:
            return f"{' or '.join(unknown)} is gone or stuck without a word: {look}"
        return f"{' or '.join(f'rank {r}' for r in alive)} is stuck: it does not answer, and its process is there"
