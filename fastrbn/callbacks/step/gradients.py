"""Between backward pass and step: clip gradients, and accumulate those of several batches."""

from __future__ import annotations

import math

import torch

from fastrbn.learn.batch import gradients, reduction, step_size
from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelBatchException
from fastrbn.util import is_number, whole


class GradientClip(Callback):
    """Limit the gradients before each step: their total norm, or each element.

    `.norm` is the total norm before clipping in the last step, a scalar tensor on the gradients' device; None before
    the first step, and with `value`. No step waits for the device.

    The results are those of `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` over the optimiser's parameters. A
    total norm that is NaN or Inf scales nothing: PyTorch would spread it over all gradients, and `HaltOnNaN` could no
    longer name the one that caused it. Under `MixedPrecision` the gradients are unscaled first. Under
    `GradientAccumulation` the accumulated gradients are clipped.

    Parameters
    ----------
    max_norm : float, optional
        Scale all gradients together down to this norm when theirs is larger. Give either this or `value`.
    norm_type : float, default 2
        The p of the norm; `math.inf` for the largest element.
    value : float, optional
        Clamp each element to −value … value.

    Raises
    ------
    ValueError
        If not exactly one limit is given, or a number is out of range.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(GradientClip, max_norm=1.0)])
    >>> run.fit(1, learn)
    >>> run.gradient_clip.norm.shape
    torch.Size([])
    """

    _needs_opt = ("param_groups",)

    def __init__(self, max_norm: float | None = None, norm_type: float = 2.0, value: float | None = None):
        if (max_norm is None) == (value is None):
            raise ValueError(
                f"GradientClip needs one limit, max_norm for all gradients together or value for each element; got "
                f"max_norm={max_norm!r} and value={value!r}: give one, such as GradientClip(max_norm=1.0)"
            )
        for name, limit in (("max_norm", max_norm), ("value", value)):
            if limit is not None and not (is_number(limit) and 0 < limit < math.inf):
                raise ValueError(f"GradientClip: {name} must be a finite number above 0; got {limit!r}")
        if not (is_number(norm_type) and norm_type > 0):
            raise ValueError(f"GradientClip: norm_type must be a number above 0, such as 2; got {norm_type!r}")
        self.max_norm, self.norm_type, self.value = max_norm, norm_type, value
        self.norm: torch.Tensor | None = None

    def begin_fit(self) -> None:
        self.norm = None

    @torch.no_grad()
    def after_backward(self) -> None:
        params = [p for group in self.run.opt.param_groups for p in group["params"] if p.grad is not None]
        for i, p in enumerate(params):
            if p.grad.is_sparse:
                p.grad = p.grad.coalesce()  # an element is the sum of its entries
                params[i] = p.grad.values().detach()
                params[i].grad = p.grad.values()  # the same memory
        if self.value is not None and params:  # PyTorch's function takes no empty list
            torch.nn.utils.clip_grad_value_(params, self.value)
        elif self.max_norm is not None:
            self.norm = torch.nn.utils.get_total_norm([p.grad for p in params], self.norm_type)
            norm = torch.nan_to_num(self.norm, nan=0.0, posinf=0.0)  # a norm of 0 clips nothing
            torch.nn.utils.clip_grads_with_norm_(params, self.max_norm, norm)

    def __repr__(self):
        what = f"value={self.value}" if self.max_norm is None else f"max_norm={self.max_norm}"
        return f"GradientClip({what}{'' if self.norm_type == 2 else f', norm_type={self.norm_type}'})"


class GradientAccumulation(Callback):
    """Take a step after every `n` training batches, with the gradients of all of them.

    The step is the one that a single batch of all their samples would give. For a loss that is a mean, batches are
    weighted by their size, so a smaller last batch counts less; for a loss that is a sum (`reduction="sum"`), gradients
    are added. `run.loss` stays each batch's own loss. The batches left at the end of an epoch make a step of their own.

    `after_backward` and `after_step` fire once per step. The other batches are cancelled after their backward pass, and
    fire `after_cancel_batch` and `after_batch`; `n_iter` counts them all. If the training loader has no length, the
    step of the batches left at the end of an epoch is taken before validation, with both events.

    Under `Distributed`, gradients are exchanged once per step instead of once per batch. `run.accumulating` is True,
    from `begin_batch` on, for a batch that does not complete a group of `n`.

    Norms see each batch by itself: running batch norm updates its statistics `n` times per step, and normalises with
    those that it has by then. The step equals that of the large batch exactly only if no layer mixes samples.

    Parameters
    ----------
    n : int
        Batches per step, 1 or more.

    Raises
    ------
    ValueError
        If `n` is not a whole number of at least 1.

    Examples
    --------
    >>> class Steps(Callback):
    ...     def begin_fit(self): self.seen = []
    ...     def after_step(self): self.seen.append(self.run.n_iter)
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(GradientAccumulation, n=4), Steps])
    >>> run.fit(1, learn)   # 16 batches
    >>> run.steps.seen
    [3, 7, 11, 15]
    """

    _needs_opt = ("param_groups",)

    def __init__(self, n: int):
        self.n = whole("GradientAccumulation: n, the batches per step,", n)
        self._clear()

    def _clear(self) -> None:
        self._count, self._first, self._samples, self._closing = 0, 0, 0, False

    def begin_fit(self) -> None:
        self._clear()
        self._summed = reduction(self.run.learn.loss_func) == "sum"
        self.run.claim(self, weigh=self._weigh)

    def begin_batch(self) -> None:
        run = self.run
        run.accumulating = run.in_train and self._count + 1 < self.n  # Distributed reads it

    def _weigh(self, loss: torch.Tensor) -> torch.Tensor:
        size = step_size(self.run)
        if not self._count:
            self._first = size
        self._count += 1
        self._samples += size
        if self._summed:
            return loss
        return loss / self.n if size == self._first else loss * (size / (self.n * self._first))

    def after_backward(self) -> None:
        if self._count < self.n and not self._closing and not self._is_last():
            raise CancelBatchException
        expected = self.n * self._first  # the number of samples that _weigh assumed
        if not self._summed and self._samples != expected and (grads := gradients(self.run.opt)):
            torch._foreach_mul_(grads, expected / self._samples)
        self._clear()

    def _is_last(self) -> bool:
        run = self.run
        return run.iters is not None and run.iter + 1 == run.iters

    def begin_validate(self) -> None:
        self._close()

    def after_epoch(self) -> None:
        self._close()  # in case there was no validation

    def _close(self) -> None:
        if self._count:
            self._closing = True
            try:
                self.run.update()
            except CancelBatchException:  # ends this step, not the event in which it is taken
                self.run("after_cancel_batch")
            finally:
                self._closing = False

    def state_dict(self) -> dict:
        return {"count": self._count, "first": self._first, "samples": self._samples}

    def load_state_dict(self, state: dict) -> None:
        self._count, self._first, self._samples = state["count"], state["first"], state["samples"]

    def __repr__(self):
        return f"GradientAccumulation({self.n})"
