"""Optimisers that evaluate the loss several times in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastrbn.learn.callback import Callback
from fastrbn.learn.snapshot import Snapshot


class Closure(Callback):
    """Give the optimiser a function that evaluates the batch again, as `torch.optim.LBFGS` and SAM need.

    `opt.step(closure)` takes the place of `opt.step()`. Each evaluation is a forward pass, the loss and a backward pass
    for the same batch, under the random states and with the buffers of the first one: dropout draws the same units, and
    running statistics move once per step. LBFGS takes the loss and gradients of the loop itself as its first
    evaluation.

    The events fire once per step, for the first evaluation: callbacks that change `pred`, `loss` or gradients do not
    see the other evaluations. Gradients cannot be accumulated, scaled (`MixedPrecision("fp16")`) or summed over
    processes; such a run is refused.

    Raises
    ------
    RuntimeError
        In `begin_fit`, if another callback has claimed the backward pass or the step.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    >>> learn = Learner(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), F.cross_entropy, data)
    >>> Runner([Closure]).fit(1, learn)

    References
    ----------
    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021.
    """

    def begin_fit(self) -> None:
        run = self.run
        taken = {part: owner for part, owner in run._parts.claims.items() if part != "forward"}
        if taken:
            part, owner = next(iter(taken.items()))
            raise RuntimeError(
                f"Closure evaluates the loss several times in a step, which {owner} (it claims '{part}') cannot take "
                f"part in: remove one of the two"
            )
        run.claim(self, step=self._step)

    def begin_batch(self) -> None:
        run = self.run
        if run.in_train:
            modules = [m for m in (run.learn.model, run.loss_func) if isinstance(m, nn.Module)]
            self._before = Snapshot(modules, parameters=False)

    def _step(self, opt: Any) -> None:
        self._first = isinstance(opt, torch.optim.LBFGS)
        opt.step(self._evaluate)

    @torch.enable_grad()
    def _evaluate(self) -> torch.Tensor:
        run = self.run
        forward, unpack = run._parts.forward, run._unpack
        if self._first:  # at the parameters of the loop's own evaluation
            self._first = False
            return run.loss
        self._before.restore()
        run.opt.zero_grad()
        pred = unpack.call_model(run.model, run.xb, forward)
        loss = unpack.call_loss(run.loss_func, pred, run.yb, forward)
        loss.backward()
        return loss

    def after_batch(self) -> None:
        vars(self).pop("_before", None)

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k not in ("_before", "_first")}
