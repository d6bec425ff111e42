"""Ranks in step: they meet before each part of a fit that takes all of them, and end it together."""

from __future__ import annotations

import signal
import sys
import threading

from fastrbn.learn.batch import batch_size
from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelBatchException, CancelEpochException

from .agreement import BATCH, BATCH_BEGINS, DONE, END, EPOCH, ERROR, INTERRUPT, LOSS_THERE, STEP_LEFT, TRAIN

_TOLD = 3  # of a batch: 1 and 2 are the times that ranks have met in it


class Lockstep(Callback):
    """The part of `Distributed` that has an `Agreement`, None where there is one process, and keeps to it."""

    def _begin(self):
        """Before a fit."""
        self._agreement, self._handler, self._share = None, None, 1.0
        self._asked = self._following = self._skipped = False
        self._met, self._closed, self._stepped = (None, 0), None, None
        self._in_batch = False
        self._waiting = True  # whether the model's forward pass waits for other ranks

    def begin_batch(self):
        self._in_batch = True
        if self._agreement is not None and self.run.in_train and self._waiting:
            self._go(BATCH_BEGINS)
            self._met = (self._here(), 1)

    def after_loss(self):
        run = self.run
        if self._agreement is not None and run.in_train:
            size = batch_size(run.xb)
            run.samples = sum(self._go(LOSS_THERE, size))
            self._share = size / run.samples if run.samples else 1 / self.world
            self._met = (self._here(), 2)

    def after_step(self):
        self._stepped = self._here()

    def after_batch(self):
        self._in_batch = False

    def _meet_for_step(self):
        """Synchronise before an optimiser step that some ranks may not expect: that of an epoch's last batches."""
        if not self._in_batch:
            self._end_batches()  # others may have more
        self._go(STEP_LEFT)

    # What is cancelled

    def after_cancel_batch(self):
        if not self._is_told_of():
            return
        here = self._here()
        stage = self._met[1] if self._met[0] == here else 0
        if self._is_open() and here[1] is not None and stage < _TOLD:
            self._met = (here, _TOLD)
            if stage < 2:
                self._tell(BATCH)
            else:  # too late for the others; whether they have done the same shows when they meet
                self._skipped = self._stepped != here

    def after_cancel_epoch(self):
        told = self._is_told_of()
        if self._agreement is not None and self._is_open():
            self._closed = self.run.epoch
            if told:
                cut = self._met == (self._here(), 2) and self._stepped != self._here()
                self._skipped = self._skipped or cut  # that of the batch before may be untold yet
                self._tell(EPOCH)

    def after_cancel_train(self):
        if self._is_told_of():
            self._tell(TRAIN, self.run.stop_reason or "")

    def _is_told_of(self):
        """Whether what is cancelled was cancelled here, and not because another rank did."""
        following, self._following = self._following, False
        if following:
            self._met = (self._here(), _TOLD)
        return not following and self._agreement is not None and not self._agreement.left

    # Where the ranks meet

    def _here(self):
        return self.run.epoch, self.run.iter

    def _is_open(self):
        """Whether the ranks have yet to end the epoch's training batches."""
        return self.run.dl is not None and self._closed != self.run.epoch

    def _go(self, what, number=0):
        run, agreement = self.run, self._agreement
        if self._asked and self.rank == 0:
            self._tell(INTERRUPT)
            raise KeyboardInterrupt
        place = (what, run.epoch, run.iter or 0) if what in (BATCH_BEGINS, LOSS_THERE) else (what, run.epoch, 0)
        asked, self._asked = self._asked, False
        numbers = self._following_others(agreement.go, place, self._take_skipped(), asked, number)
        if agreement.asked and self.rank == 0:
            agreement.asked = False
            self._pass_on()
        return numbers

    def _tell(self, kind, reason=""):
        self._following_others(self._agreement.tell, kind, self._take_skipped(), reason)

    def _following_others(self, ask, *args):
        try:
            return ask(*args)
        except (CancelBatchException, CancelEpochException):
            self._following = True
            raise

    def _take_skipped(self):
        skipped, self._skipped = self._skipped, False
        return skipped

    def _end_batches(self):
        if self._is_open():
            self._closed = self.run.epoch
            self._tell(END)

    def _end_pass(self, what):
        self._end_batches()
        self._go(what)  # also those who have heard that another's batches were at an end

    def _take_leave(self):
        agreement = self._agreement
        try:
            if not agreement.left:
                self._say_why()
        finally:
            if agreement.ended_by is not None:
                self._take_over(agreement.ended_by)

    def _take_over(self, rank):
        """Have the model and the optimiser of `rank`: others may have gone a step further before they heard of its end,
        and it may have taken back some, as HaltOnNaN does."""
        learn, channel = self.run.learn, self._agreement.channel
        channel.spread([*learn.model.parameters(), *learn.model.buffers()], rank)
        state = channel.share(learn.opt.state_dict()["state"], rank)
        if self.rank != rank:
            learn.opt.load_state_dict({**learn.opt.state_dict(), "state": state})

    def _say_why(self):
        run = self.run
        reason = run.stop_reason
        if reason is None:
            self._agreement.farewell(DONE, "")
        elif reason.startswith("interrupted"):
            self._agreement.farewell(INTERRUPT, reason)
        else:
            error = sys.exc_info()[1]  # the one that is on its way out of the fit
            run.stop_reason = self._agreement.farewell(ERROR, reason, error) or reason

    # Ctrl-C

    def _handle_interrupts(self):
        """Take Ctrl-C where nobody else has: it would come to each rank at another moment."""
        run, main = self.run, threading.main_thread()
        workers = any(getattr(dl, "num_workers", 0) for dl in (run.data.train_dl, run.data.valid_dl))
        if workers or threading.current_thread() is not main:
            return None
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return None
        signal.signal(signal.SIGINT, self._interrupted)
        return self._interrupted

    def _pass_on(self):
        """Another rank was told to end: have it here as if it had come here."""
        if threading.current_thread() is not threading.main_thread():
            self._asked = True
        elif signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # else it has come here too
            signal.raise_signal(signal.SIGINT)  # Checkpoint's handler has it save first

    def _interrupted(self, signum, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one ends it at once
        self._asked = True
