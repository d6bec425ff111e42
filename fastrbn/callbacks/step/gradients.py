"""Between backward and step: clip gradients, and gather those of several batches into one step."""

from __future__ import annotations

import math
import numbers

import torch

from fastrbn.learn.batch import gradients, reduction, step_size
from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelBatchException


class GradientClip(Callback):
    """Limits the gradients before each step: their total norm, or each element.

    - `max_norm`: all gradients together are scaled down to this norm when theirs is larger.
    - `norm_type`: which norm: 2 (default), another p, or `math.inf`, the largest element.
    - `value`: in place of `max_norm`: each element is brought into −value … value.

    `.norm` is the total norm before clipping in the last step, a tensor () on the gradients' device; None before the
    first step, and with `value`. No step waits for the device.

    The numbers are those of `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` over the optimiser's parameters.
    A total norm that is NaN or Inf scales nothing: PyTorch would spread it over all gradients, and `HaltOnNaN` could no
    longer name the one that it came from. Under `MixedPrecision` the gradients are unscaled first, under
    `GradientAccumulation` it is the whole group's that are clipped.
    """

    _needs_opt = ("param_groups",)

    def __init__(self, max_norm=None, norm_type=2.0, value=None):
        if (max_norm is None) == (value is None):
            raise ValueError(
                f"GradientClip needs a limit, either max_norm of all gradients together or value of each element; got "
                f"max_norm={max_norm!r} and value={value!r}: give one, such as GradientClip(max_norm=1.0)"
            )
        for name, limit in (("max_norm", max_norm), ("value", value)):
            if limit is not None and not (_is_number(limit) and 0 < limit < math.inf):
                raise ValueError(f"GradientClip: {name} is a finite number above 0; got {limit!r}")
        if not (_is_number(norm_type) and norm_type > 0):
            raise ValueError(f"GradientClip: norm_type is a number above 0, such as 2 or math.inf; got {norm_type!r}")
        self.max_norm, self.norm_type, self.value, self.norm = max_norm, norm_type, value, None

    def begin_fit(self):
        self.norm = None

    @torch.no_grad()
    def after_backward(self):
        params = [p for group in self.run.opt.param_groups for p in group["params"]]
        if self.value is not None:
            for p in (p for p in params if p.grad is not None and p.grad.is_sparse):
                p.grad = p.grad.coalesce()  # an element is the sum of its entries
                p.grad.values().clamp_(-self.value, self.value)
            dense = [p for p in params if p.grad is not None and not p.grad.is_sparse]
            torch.nn.utils.clip_grad_value_(dense, self.value)
            return
        self.norm = torch.nn.utils.get_total_norm(gradients(self.run.opt), self.norm_type)
        norm = torch.nan_to_num(self.norm, nan=0.0, posinf=0.0)  # a norm of 0 clips nothing
        torch.nn.utils.clip_grads_with_norm_(params, self.max_norm, norm)

    def __repr__(self):
        what = f"value={self.value}" if self.max_norm is None else f"max_norm={self.max_norm}"
        return f"GradientClip({what}{'' if self.norm_type == 2 else f', norm_type={self.norm_type}'})"


class GradientAccumulation(Callback):
    """Takes a step after every `n` training batches, with the gradients of all of them.

    - `n`: batches a step, 1 or more.

    The step is that of one batch of all their samples: of a loss that is a mean over samples each batch weighs as its
    size, also where the last one is smaller; batches of one that is a sum (`reduction="sum"`) are added. The batches
    that are left at the end of an epoch make a step of their own. `run.loss` is each batch's own loss, as ever.

    `after_backward` and `after_step` come for whole groups only: the other batches are cancelled after their backward
    pass (`after_cancel_batch`, `after_batch`), and `n_iter` counts all of them. Where the training loader has no
    length, what is left at the end of an epoch is stepped with before validation, the two events with it.

    Under `Distributed` the processes exchange gradients once a step, not once a batch. `run.accumulating` tells, from
    `begin_batch` on, of a batch whose gradients are to be added to.

    Norms see each batch by itself: running batch norm moves its statistics `n` times a step, and normalises by what it
    has by then. The step equals that of the large batch exactly where no layer looks across samples.
    """

    _needs_opt = ("param_groups",)

    def __init__(self, n):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"GradientAccumulation needs a whole number of batches a step, 1 or more; got {n!r}")
        self.n = n
        self._clear()

    def _clear(self):
        self._count, self._first, self._samples, self._closing = 0, 0, 0, False

    def begin_fit(self):
        self._clear()
        self._summed = reduction(self.run.learn.loss_func) == "sum"
        self.run.claim(self, weigh=self._weigh)

    def begin_batch(self):
        run = self.run
        run.accumulating = run.in_train and self._count + 1 < self.n  # Distributed reads it

    def _weigh(self, loss):
        size = step_size(self.run)
        if not self._count:
            self._first = size
        self._count += 1
        self._samples += size
        if self._summed:
            return loss
        return loss / self.n if size == self._first else loss * (size / (self.n * self._first))

    def after_backward(self):
        if self._count < self.n and not self._closing and not self._is_last():
            raise CancelBatchException
        expected = self.n * self._first  # samples, as the weights so far have it
        if not self._summed and self._samples != expected and (grads := gradients(self.run.opt)):
            torch._foreach_mul_(grads, expected / self._samples)
        self._clear()

    def _is_last(self):
        run = self.run
        return run.iters is not None and run.iter + 1 == run.iters

    def begin_validate(self):
        self._close()

    def after_epoch(self):
        self._close()  # there was no validation

    def _close(self):
        if self._count:
            self._closing = True
            try:
                self.run.update()
            except CancelBatchException:  # it ends this step, and not the event around it
                self.run("after_cancel_batch")
            finally:
                self._closing = False

    def state_dict(self):
        return {"count": self._count, "first": self._first, "samples": self._samples}

    def load_state_dict(self, state):
        self._count, self._first, self._samples = state["count"], state["first"], state["samples"]

    def __repr__(self):
        return f"GradientAccumulation({self.n})"


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
