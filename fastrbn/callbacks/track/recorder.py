"""Loss and learning rate of each step."""

from __future__ import annotations

import torch

from fastrbn.learn.callback import Callback

from .tape import Tape


class Recorder(Callback):
    """Keeps loss and learning rates of each training step; a batch that was cancelled before its loss leaves none.

    - `.losses`: a float for each step. They stay on the device during an epoch; reading them waits for it.
    - `.lrs`: for each param group a list with a rate for each step.

    Both begin anew with each fit and survive its errors.

    Source: fast.ai course, part 2 (2019), notebooks 05 and 05b.
    """

    _needs_opt = ("param_groups", "lr")

    def __init__(self):
        self._tape, self._lrs, self._lrs_on_device = Tape(1), [], False

    def begin_fit(self):
        groups = self.run.opt.param_groups
        self._tape, self._lrs = Tape(1), [[] for _ in groups]
        self._lrs_on_device = any(isinstance(g["lr"], torch.Tensor) for g in groups)

    def after_loss(self):
        run = self.run
        if run.in_train:
            self._tape.add((run.loss.detach(),))
            for lrs, group in zip(self._lrs, run.opt.param_groups):
                lr = group["lr"]
                lrs.append(lr.clone() if self._lrs_on_device and isinstance(lr, torch.Tensor) else lr)

    def after_epoch(self):
        self._tape.read()

    def after_fit(self):
        self._tape.read()

    def state_dict(self):
        """Losses and rates so far. Waits for the device."""
        return {"losses": self._tape.state_dict(), "lrs": [torch.tensor(r, dtype=torch.float64) for r in self.lrs]}

    def load_state_dict(self, state):
        self._tape.load_state_dict(state["losses"])
        self._lrs = [rates.tolist() for rates in state["lrs"]]

    @property
    def losses(self) -> list[float]:
        return self._tape.read()[0]

    @property
    def lrs(self) -> list[list[float]]:
        if self._lrs_on_device:  # a compiled or captured optimiser keeps its rate in a tensor
            for lrs in self._lrs:
                lrs[:] = map(float, lrs)
        return self._lrs

    def plot_lr(self, pgid=-1):
        """Learning rate of param group `pgid` over the steps. Returns the matplotlib Figure."""
        from fastrbn import plots

        return plots.plot_lr(self._group(pgid))

    def plot_loss(self, skip_last=0):
        """Loss over the steps, without the last `skip_last`. Returns the matplotlib Figure."""
        from fastrbn import plots

        return plots.plot_loss(self.losses[: max(len(self.losses) - skip_last, 0)])

    def plot(self, skip_last=0, pgid=-1):
        """Loss against learning rate, as after `LR_Find`. Returns the matplotlib Figure."""
        from fastrbn import plots

        n = max(len(self.losses) - skip_last, 0)
        return plots.plot_lr_find(self._group(pgid)[:n], self.losses[:n])

    def _group(self, pgid):
        if not self._lrs:
            raise ValueError("the Recorder has nothing to plot: it has not been part of a fit yet")
        return self.lrs[pgid]
