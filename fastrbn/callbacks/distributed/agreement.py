"""Ranks in step: they meet before each part of a fit that takes all of them, and end it together.

`Agreement` compares what the ranks say when they meet; `Lockstep` decides, from the events of a fit, when they meet.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from fastrbn.learn.batch import batch_size
from fastrbn.learn.events import CancelBatchException, CancelEpochException, CancelTrainException

# What a rank is doing; the largest value decides for all. END: it has no more batches. DONE: it has no more epochs.
GO, BATCH, EPOCH, END, DONE, TRAIN, INTERRUPT, ERROR = range(8)
# Where ranks meet
EPOCH_BEGINS, BATCH_BEGINS, LOSS_THERE, VALIDATION_BEGINS, EPOCH_OVER, STEP_LEFT = range(6)
_PLACES = (
    "the begin of epoch {}",
    "the begin of batch {1} in epoch {0}",
    "the loss of batch {1} in epoch {0}",
    "the validation of epoch {}",
    "the end of epoch {}",
    "the step that is left at the end of epoch {}",
)
_TOLD = 3  # stage of a batch whose cancel the others know of; stages 1 and 2: ranks have met once, twice
_GRACE = 10.0  # seconds that a failed rank waits for the others to hear of it
_FROM_OTHERS = ("gloo", "nccl", "timed out", "connection", "broken pipe", "socket", "store")


class Agreement:
    """Compares, over a `Channel`, where the ranks are.

    A rank that goes on and learns that another does not follows it: it raises the exception that the other one had, or
    an error that names it.
    """

    def __init__(self, channel: Any):
        self.channel = channel
        self.left = False  # this rank has left the fit, and the others know
        self.asked = False  # some rank was told to end (Ctrl-C)
        self.ended_by: int | None = None  # the first rank that ended training by a cancel

    def go(self, place: tuple[int, int, int], skipped: bool = False, asked: bool = False, number: int = 0) -> list[int]:
        """All ranks go on from `place`, or none does. Returns each rank's `number`.

        `skipped`: this rank has left out a step since the last time. `asked`: it was told to end.
        """
        rows = self._exchange(GO, skipped, place, asked, number)
        places = [_PLACES[int(row[2])].format(int(row[3]), int(row[4])) for row in rows]
        self._same(places, "are not at the same place")
        self.asked = self.asked or any(row[5] for row in rows)
        return [int(row[6]) for row in rows]

    def tell(self, kind: int, skipped: bool = False, reason: str = "") -> None:
        """Say that this rank does not go on. Raises if others have more to end."""
        self._exchange(kind, skipped, reason=reason)
        self.left = kind >= DONE

    def farewell(self, kind: int, reason: str, error: BaseException | None = None) -> str | None:
        """The last exchange of a rank whose fit has ended, normally or by `error`.

        If another rank was the cause of an error in a collective operation, the error is amended to name it, and the
        new text is returned. A rank that ended normally raises if others did not.
        """
        self.left = True
        if kind == DONE:
            self._end_well()
            return None
        grace = min(_GRACE, self.channel.timeout.total_seconds())
        caused = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _FROM_OTHERS)
        self.channel.post(reason, caused)
        try:
            self._exchange(kind, False, reason=reason, wait=timedelta(seconds=grace))
        except RuntimeError as e:
            if str(e).startswith("rank "):  # all ranks came
                raise
            # the others are gone, or inside an operation that needs this rank
        # they may have come because of their own errors: what they have posted tells which was first
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
        if max(kinds) < DONE:  # compared before any rank follows another, so that all raise or none
            self._same(["left out" if row[1] else "taken" for row in rows], "have not all taken the last step")
        self._follow(kind, kinds, reasons)
        return rows

    def _follow(self, mine: int, kinds: list[int], reasons: Any) -> None:
        """Raise what `kinds` ask of this rank."""
        worst = max(kinds)
        who = kinds.index(worst)
        if worst == DONE != min(kinds):
            self.left = True
            raise RuntimeError(
                f"rank {who} has ended its fit and rank {kinds.index(min(kinds))} has not: all ranks must have the "
                f"same number of epochs and batches"
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

    def _same(self, found: Sequence[str], what: str) -> None:
        if len(set(found)) > 1:
            self.left = True
            listed = "; ".join(f"rank {r}: {value}" for r, value in enumerate(found))
            raise RuntimeError(
                f"ranks step together, and they {what} ({listed}): a callback that skips or cancels on one rank must "
                f"do so on all, so let it decide from values that are equal on all ranks, such as gradients"
            )

    def _amend(self, error: Any, grace: float) -> str | None:
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
        """Describe ranks that left no reason. One whose process runs may only be waiting for another."""
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


class Lockstep:
    """When the ranks of a fit meet. `Distributed` has one while it trains in several processes.

    Its methods that are named like events are called in these events, after all other callbacks.
    """

    def __init__(self, run: Any, channel: Any):
        self.run, self.channel, self.agreement = run, channel, Agreement(channel)
        self.waits = True  # the model's forward pass waits for other ranks
        self.share = 1.0  # of this rank in the batch's samples
        self.asked = False  # Ctrl-C has come to this rank
        self._following = False  # the cancel under way is another rank's
        self._skipped = False  # a step was left out, and the others do not know yet
        self._handles_interrupts = self._in_batch = False
        self._met: tuple[Any, int] = (None, 0)  # a batch, and its stage
        self._closed: int | None = None  # the epoch whose training batches have ended on all ranks
        self._stepped: Any = None  # the last batch with a step

    def begin_batch(self) -> None:
        self._in_batch = True
        if self.run.in_train and self.waits:
            self._go(BATCH_BEGINS)
            self._met = (self._here(), 1)

    def after_loss(self) -> None:
        run = self.run
        if run.in_train:
            size = batch_size(run.xb)
            run.samples = sum(self._go(LOSS_THERE, size))
            self.share = size / run.samples if run.samples else 1 / self.channel.world
            self._met = (self._here(), 2)

    def after_step(self) -> None:
        self._stepped = self._here()

    def after_batch(self) -> None:
        self._in_batch = False

    def begin_epoch(self, iters: int) -> list[int]:
        """Returns each rank's number of batches."""
        return self._go(EPOCH_BEGINS, iters)

    def begin_validate(self) -> None:
        self._end_batches()
        self._go(VALIDATION_BEGINS)  # also ranks that have followed another in ending their batches

    def after_epoch(self) -> None:
        self._end_batches()
        self._go(EPOCH_OVER)

    def meet_for_step(self) -> None:
        """Meet before a step that some ranks may not expect: the one with an epoch's last batches."""
        if not self._in_batch:
            self._end_batches()  # others may have more
        self._go(STEP_LEFT)

    # Cancels

    def after_cancel_batch(self) -> None:
        if not self._is_news():
            return
        here = self._here()
        stage = self._met[1] if self._met[0] == here else 0
        if self._is_open() and here[1] is not None and stage < _TOLD:
            self._met = (here, _TOLD)
            if stage < 2:
                self._tell(BATCH)
            else:  # too late for the others; whether they did the same shows when ranks meet next
                self._skipped = self._stepped != here

    def after_cancel_epoch(self) -> None:
        news = self._is_news()
        if self._is_open():
            self._closed = self.run.epoch
            if news:
                cut = self._met == (self._here(), 2) and self._stepped != self._here()
                self._skipped = self._skipped or cut  # the others may not know yet of the batch before
                self._tell(EPOCH)

    def after_cancel_train(self) -> None:
        if self._is_news():
            self._tell(TRAIN, self.run.stop_reason or "")

    def _is_news(self) -> bool:
        """True if the cancel began on this rank, not because another had it."""
        following, self._following = self._following, False
        if following:
            self._met = (self._here(), _TOLD)
        return not following and not self.agreement.left

    # Meeting

    def _here(self) -> tuple[int, int | None]:
        return self.run.epoch, self.run.iter

    def _is_open(self) -> bool:
        """True until the ranks have ended the epoch's training batches."""
        return self.run.dl is not None and self._closed != self.run.epoch

    def _go(self, what: int, number: int = 0) -> list[int]:
        run, agreement = self.run, self.agreement
        if self.asked and self.channel.rank == 0:
            self._tell(INTERRUPT)
            raise KeyboardInterrupt
        place = (what, run.epoch, run.iter or 0) if what in (BATCH_BEGINS, LOSS_THERE) else (what, run.epoch, 0)
        asked, self.asked = self.asked, False
        numbers = self._following_others(agreement.go, place, self._take_skipped(), asked, number)
        if agreement.asked and self.channel.rank == 0:
            agreement.asked = False
            self._pass_on()
        return numbers

    def _tell(self, kind: int, reason: str = "") -> None:
        self._following_others(self.agreement.tell, kind, self._take_skipped(), reason)

    def _following_others(self, ask: Callable, *args: Any) -> Any:
        try:
            return ask(*args)
        except (CancelBatchException, CancelEpochException):
            self._following = True
            raise

    def _take_skipped(self) -> bool:
        skipped, self._skipped = self._skipped, False
        return skipped

    def _end_batches(self) -> None:
        if self._is_open():
            self._closed = self.run.epoch
            self._tell(END)

    # The end of the fit

    def after_fit(self) -> None:
        try:
            if not self.agreement.left:
                self._say_why()
        finally:
            if self.agreement.ended_by is not None:
                self._take_over(self.agreement.ended_by)

    def _take_over(self, rank: int) -> None:
        """Copy model and optimiser from `rank`: others may have gone a step further before they heard of its end, and
        it may have taken back steps, as HaltOnNaN does."""
        learn, channel = self.run.learn, self.channel
        channel.spread([*learn.model.parameters(), *learn.model.buffers()], rank)
        state = channel.share(learn.opt.state_dict()["state"], rank)
        if channel.rank != rank:
            learn.opt.load_state_dict({**learn.opt.state_dict(), "state": state})

    def _say_why(self) -> None:
        run = self.run
        reason = run.stop_reason
        if reason is None:
            self.agreement.farewell(DONE, "")
        elif reason.startswith("interrupted"):
            self.agreement.farewell(INTERRUPT, reason)
        else:
            error = sys.exc_info()[1]  # the one that is ending the fit
            run.stop_reason = self.agreement.farewell(ERROR, reason, error) or reason

    # Ctrl-C

    def handle_interrupts(self) -> None:
        """Take Ctrl-C unless somebody else has: it reaches each rank at a different moment."""
        run, main = self.run, threading.main_thread()
        workers = any(getattr(dl, "num_workers", 0) for dl in (run.data.train_dl, run.data.valid_dl))
        if self._handles_interrupts or workers or threading.current_thread() is not main:
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupted)
            self._handles_interrupts = True

    def release_interrupts(self) -> None:
        if self._handles_interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._handles_interrupts = False

    def _pass_on(self) -> None:
        """Another rank was told to end: act as if this one had been."""
        if threading.current_thread() is not threading.main_thread():
            self.asked = True
        elif signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # otherwise it reaches this rank too
            signal.raise_signal(signal.SIGINT)  # Checkpoint's handler saves first

    def _interrupted(self, signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends the fit at once
        self.asked = True
