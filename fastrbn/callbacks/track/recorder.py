"""Loss and learning rates of each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastrbn.learn.callback import Callback

from .tape import Tape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Recorder(Callback):
    """Keep loss and learning rates of each training step.

    A batch that was cancelled before its loss has no entry. The record survives errors; a further fit starts a new one.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[Recorder])
    >>> run.fit(1, learn)
    >>> len(run.recorder.losses), run.recorder.lrs[0][-1]
    (16, 0.1)
    >>> figure = run.recorder.plot_loss()

    References
    ----------
    fast.ai course, part 2 (2019), notebooks 05 and 05b.
    """

    _needs_opt = ("param_groups", "lr")

    def __init__(self) -> None:
        self._tape, self._lrs_on_device = Tape(1), False
        self._lrs: list[list[Any]] = []

    def begin_fit(self) -> None:
        groups = self.run.opt.param_groups
        self._tape, self._lrs = Tape(1), [[] for _ in groups]
        self._lrs_on_device = any(isinstance(g["lr"], torch.Tensor) for g in groups)

    def after_loss(self) -> None:
        run = self.run
        if run.in_train:
            self._tape.add((run.loss.detach(),))
            for lrs, group in zip(self._lrs, run.opt.param_groups):
                lr = group["lr"]
                lrs.append(lr.clone() if self._lrs_on_device and isinstance(lr, torch.Tensor) else lr)

    def after_epoch(self) -> None:
        self._tape.read()

    def after_fit(self) -> None:
        self._tape.read()

    def state_dict(self) -> dict:
        """Losses and rates so far. Waits for the device."""
        return {"losses": self._tape.state_dict(), "lrs": [torch.tensor(r, dtype=torch.float64) for r in self.lrs]}

    def load_state_dict(self, state: dict) -> None:
        self._tape.load_state_dict(state["losses"])
        self._lrs = [rates.tolist() for rates in state["lrs"]]

    @property
    def losses(self) -> list[float]:
        """The loss of each step. Losses stay on the device during an epoch; reading them then waits for it."""
        return self._tape.read()[0]

    @property
    def lrs(self) -> list[list[float]]:
        """The learning rate of each step, one list for each param group."""
        if self._lrs_on_device:  # compiled and captured optimisers keep their rate in a tensor
            for lrs in self._lrs:
                lrs[:] = map(float, lrs)
        return self._lrs

    def plot_lr(self, pgid: int = -1) -> Figure:
        """Draw the learning rate of param group `pgid` over the steps."""
        from fastrbn import plots

        return plots.plot_lr(self._group(pgid))

    def plot_loss(self, skip_last: int = 0) -> Figure:
        """Draw the loss over the steps, without the last `skip_last`."""
        from fastrbn import plots

        return plots.plot_loss(self.losses[: max(len(self.losses) - skip_last, 0)])

    def plot(self, skip_last: int = 0, pgid: int = -1) -> Figure:
        """Draw loss against learning rate, as `LR_Find.plot` does."""
        from fastrbn import plots

        n = max(len(self.losses) - skip_last, 0)
        return plots.plot_lr_find(self._group(pgid)[:n], self.losses[:n])

    def _group(self, pgid: int) -> list[float]:
        if not self._lrs:
            raise ValueError("the Recorder has nothing to plot: it has not been part of a fit yet; call run.fit first")
        return self.lrs[pgid]
