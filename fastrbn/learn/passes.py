"""The epochs of a fit, and the batches of each: whole passes over the training loader, or parts of them."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from .batch import length
from .checkpoint_file import CheckpointError
from .resume import random_of, restore


class Passes:
    """Which epochs a fit has and which batches come in each; also after a checkpoint.

    Without `every` an epoch is a pass over the training loader. With it an epoch is a stretch of `every` batches, and
    passes follow one another without regard to stretches: a stretch goes on where the one before has ended.

    Parameters
    ----------
    run : Runner
    epochs : int, optional
        Passes in all. Without them `max_steps` ends the fit.
    max_steps : int, optional
        Training batches in all.
    every : int, optional
        Batches of a stretch.
    """

    def __init__(self, run: Any, epochs: int | None = None, max_steps: int | None = None, every: int | None = None):
        self.run, self.every, self._given = run, every, (epochs, max_steps)
        self.limit = math.inf if epochs is None else epochs  # of epochs; cancelled ones count
        self.state: dict[str, Any] | None = None  # of the checkpoint to go on from
        self._rest: Iterator[Any] | None = None  # of the current pass, if an epoch begins within it
        self._first = 0  # batch of the fit in the current epoch
        # of the current pass, over all fits of the learner: samplers that shuffle by it repeat no order
        self._number = getattr(run.learn, "passes", 0) - 1
        self._taken = 0  # batches taken from it
        self._before: dict[str, Any] | None = None  # random states before it, for loaders that cannot begin within it
        self._loader: dict[str, Any] | None = None  # the loader's state in it, for those that can

    def plan(self) -> None:
        """Set the run's `epochs` and `max_steps`, as far as the loader's length tells them. Called a second time after
        `begin_fit`, in which callbacks may replace the loaders."""
        run, (epochs, steps), n = self.run, self._given, length(self.run.data.train_dl)
        if self.every is not None and epochs is not None:
            if n is None:
                raise ValueError(
                    "validate_every divides all steps of a fit, whose number is not known: the training loader has no "
                    "length. Pass max_steps in place of epochs"
                )
            self.limit = math.ceil(epochs * n / self.every)
            steps = epochs * n if steps is None else min(epochs * n, steps)
        run.max_steps = steps
        if steps is not None:
            size = self.every or n  # of an epoch
            run.epochs = min(self.limit, math.ceil(steps / size)) if size else self.limit

    def epochs(self) -> Iterator[int]:
        """The epochs to run. Restores everything, now that `begin_fit` has come."""
        self.plan()
        run, first, within = self.run, 0, False
        if run.max_steps is None:
            self.limit = run.epochs  # a callback may have changed it in begin_fit
        if self.state is not None:
            restore(run, self.state)
            place = self.state["position"]
            self._number = place.get("pass", place["epoch"])
            longer = place.get("cut") and (run.max_steps is None or run.max_steps > run.n_iter)
            within = place["phase"] != "end" or longer
            first = place["epoch"] + (not within)
        for epoch in itertools.count(first):
            before = run.n_iter
            if not within and (epoch >= self.limit or (run.max_steps is not None and before >= run.max_steps)):
                return
            yield epoch
            if not within and run.n_iter == before and self.limit == math.inf:
                raise RuntimeError(
                    f"max_steps={run.max_steps} cannot be reached: epoch {epoch} had no training batch, after {before} "
                    f"batches in all. A loader must give batches each time that it is iterated over; an iterator gives "
                    f"them once"
                )
            within = False

    def iters(self, dl: Any) -> int | None:
        """The number of training batches in the epoch that begins."""
        run, n = self.run, length(dl) if self.every is None else self.every
        if run.max_steps is None or n is None:
            return n
        done = 0 if self.state is None else self.state["position"]["done"] or 0
        return min(n, run.max_steps - run.n_iter + done)

    def batches(self, dl: Any) -> Iterable[tuple[int, Any]]:
        """The batches of an epoch with their numbers; in the one that the checkpoint was made in, the rest of them."""
        run, done = self.run, 0
        if not run.in_train:
            return enumerate(dl)
        state, self.state = self.state, None
        if state is not None:
            place = state["position"]
            if place["phase"] != "end":
                restore(run, state)  # again: begin_epoch came after the first time
            if (taken := place.get("taken", place["done"])) is not None:
                self._rest = self._reopened(dl, place, taken)
            if place["phase"] == "valid":
                return ()
            done = place["done"] or 0
        self._first = run.n_iter - done
        left = None if run.max_steps is None else run.max_steps - run.n_iter
        if self.every is not None:
            return enumerate(self._stretch(dl, min(self.every - done, self.every if left is None else left)), done)
        rest, self._rest = self._begin(dl) if self._rest is None else self._rest, None
        return enumerate(rest if left is None else itertools.islice(rest, left), done)

    def place(self, phase: str) -> dict[str, Any]:
        """The place in the data, for a checkpoint."""
        run = self.run
        done, size = run.n_iter - self._first, self.every or length(run.data.train_dl) or math.inf
        ended = phase == "end" and run.max_steps is not None and run.n_iter >= run.max_steps
        cut = ended and done < size  # a longer fit goes on within this epoch
        taken = self._taken if self._rest is not None else done if phase == "train" or cut else None
        return {
            "done": done if phase == "train" or cut else None,
            "cut": cut,
            "every": self.every,
            "pass": self._number,
            "taken": taken,
            "loader": self._loader,
            "before_pass": self._before,
        }

    def close(self) -> None:
        """Let go of the loader's iterator, and of its workers with it."""
        self._rest = self.state = None

    def _begin(self, dl: Any) -> Iterator[Any]:
        """An iterator over a new pass."""
        self._number += 1
        with contextlib.suppress(AttributeError):  # a learner of the user's may be a named tuple
            self.run.learn.passes = self._number + 1
        set_epoch(dl, self._number)
        self._before = None if _skips(dl) else random_of(self.run).state_dict()
        batches = iter(dl)
        self._loader = dl.state_dict(mid_epoch=True) if _skips(dl) else None
        return batches

    def _stretch(self, dl: Any, n: int) -> Iterator[Any]:
        """`n` batches, over the ends of passes."""
        while n > 0:
            if self._rest is None:
                self._rest, self._taken = self._begin(dl), 0
            for batch in itertools.islice(self._rest, n):
                n, self._taken = n - 1, self._taken + 1
                yield batch
            if n > 0:
                self._rest = None
                if not self._taken:
                    return

    def _reopened(self, dl: Any, place: dict[str, Any], taken: int) -> Iterator[Any]:
        """The rest of the pass that the checkpoint was made in, without effect on the random states."""
        if (iters := length(dl)) != place["iters"]:
            raise CheckpointError(
                f"to go on within an epoch its batches must be the same; the checkpoint was made with {place['iters']} "
                f"batches an epoch, the training loader has {iters}: use the same data and batch size, or a checkpoint "
                f"from the end of an epoch"
            )
        now = random_of(self.run)
        self._taken, self._loader, self._before = taken, place["loader"], place["before_pass"]
        set_epoch(dl, self._number)
        if _skips(dl):
            dl.load_state_dict(self._loader)
            batches = dl.iter_from(taken)
            now.restore()
        else:
            batches = self._skipped(dl, taken)
            now.restore(loaders=False)  # the loaders are where they should be
        return batches

    def _skipped(self, dl: Any, taken: int) -> Iterator[Any]:
        """An iterator over `dl` after `taken` batches, begun under the random states of the pass: so the order is the
        same, and samplers and workers have used up the same random numbers."""
        run = self.run
        if getattr(dl, "persistent_workers", False) and run.epoch > 0:
            warnings.warn(
                "workers that outlive an epoch (persistent_workers=True) have random states that no checkpoint holds: "
                "if the data set draws random numbers, the resumed fit draws others",
                stacklevel=2,
            )
        if self._before is not None:
            random_of(run, self._before).restore()
        batches = iter(dl)
        if batches is dl:
            warnings.warn(
                f"the training loader is an iterator ({type(dl).__name__}), which cannot begin its epoch again: its "
                f"first {taken} batches are skipped, which is right only if it starts where the checkpoint's epoch did",
                stacklevel=2,
            )
        skipped = sum(1 for _ in itertools.islice(batches, taken))
        if skipped < taken:
            raise CheckpointError(
                f"the checkpoint stands after {taken} batches of its epoch, and the training loader gave {skipped}: "
                f"use the same data and batch size"
            )
        return batches


def _skips(dl: Any) -> bool:
    """True if the loader can begin in the middle of an epoch, like `BatchLoader`."""
    return hasattr(dl, "iter_from") and hasattr(dl, "load_state_dict")


def set_epoch(dl: Any, number: int) -> None:
    """Tell samplers that shuffle by the number of the pass, such as DistributedSampler, which one begins."""
    for sampler in (getattr(dl, "sampler", None), getattr(dl, "batch_sampler", None)):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(number)
