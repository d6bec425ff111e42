"""Forward pass in half precision, weights and their updates in single."""

from __future__ import annotations

import torch

from fastrbn.learn.batch import gradients
from fastrbn.learn.callback import Callback
from fastrbn.util import apply_to, suggestion

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
}


class MixedPrecision(Callback):
    """Runs model and loss function under `torch.autocast`, and scales the loss where float16 needs it.

    - `dtype`: "bf16" (default: float32's range, so nothing is scaled) or "fp16", or the torch dtype.
    - `init_scale`, `growth_interval`: of the GradScaler that "fp16" uses; PyTorch's defaults, 65536 and 2000 steps.

    Weights, gradients and the optimiser stay in float32, and running statistics too. What the model returns in half
    precision becomes float32, so that loss functions and metrics see that. Events run outside autocast.

    With "fp16" the loss is scaled for the backward pass only: `run.loss` is as it was, and in `after_backward` the
    gradients are unscaled. A step whose gradients overflow is not taken, and the next scale is smaller: the first steps
    of a fit often go so; `after_step` comes all the same. `.skipped` counts them and `.scale` is the scale, floats that
    wait for the device. `HaltOnNaN` knows such steps.

    Claims forward, and with "fp16" backward and step: a second callback that takes these over is an error.

    Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018.
    """

    _needs_opt = ("param_groups",)

    def __init__(self, dtype="bf16", init_scale=2.0**16, growth_interval=2000):
        self.dtype = _dtype(dtype)
        if not init_scale > 0:
            raise ValueError(f"MixedPrecision: init_scale is a number above 0; got {init_scale!r}")
        if isinstance(growth_interval, bool) or not isinstance(growth_interval, int) or growth_interval < 1:
            raise ValueError(
                f"MixedPrecision: growth_interval is a whole number of steps, 1 or more; got {growth_interval!r}"
            )
        self.init_scale, self.growth_interval = float(init_scale), growth_interval
        self._clear()

    def _clear(self):
        self._scaler = self._hook = self._overflows = None
        self._unscaled, self._steps, self._taken = False, 0, 0

    def begin_fit(self):
        self._clear()
        run = self.run
        self._device = next((p.device.type for p in run.model.parameters()), "cpu")
        run.claim(self, forward=self._forward)
        if self.dtype is torch.float16:
            self._check_weights()
            self._scaler = torch.amp.GradScaler(
                self._device, init_scale=self.init_scale, growth_interval=self.growth_interval
            )
            run.claim(self, backward=self._backward, step=self._step)
            if hasattr(run.opt, "register_step_pre_hook"):
                self._hook = run.opt.register_step_pre_hook(self._count)

    def _check_weights(self):
        half = next((n for n, p in self.run.model.named_parameters() if p.dtype is torch.float16), None)
        if half is not None:
            raise ValueError(
                f"MixedPrecision('fp16') keeps weights in float32 and lets autocast choose; '{half}' is float16: leave "
                f"out model.half()"
            )

    def _forward(self, function, *args):
        with torch.autocast(self._device, dtype=self.dtype):
            out = function(*args)
        return _single(out, self.dtype)

    def _backward(self, loss):
        self._scaler.scale(loss).backward()

    def after_backward(self):
        if self._scaler is not None:
            self._scaler.unscale_(self.run.opt)
            self._unscaled = True

    def _step(self, opt):
        self._steps += 1
        self._scaler.step(opt)
        self._scaler.update()
        self._unscaled = False

    def _count(self, opt, args, kwargs):
        self._taken += 1
        found = getattr(opt, "found_inf", None)  # a fused optimiser is always called, and skips by itself
        if found is not None:
            self._overflows = found.clone() if self._overflows is None else self._overflows + found

    def after_cancel_batch(self):
        self._scale_back()

    def after_cancel_epoch(self):
        self._scale_back()

    def _scale_back(self):
        """Gradients that wait for the next batch's are added to scaled ones, and unscaled together with them."""
        if self._unscaled:
            scale = self._scaler.scale(torch.ones((), device=self._device))
            if grads := gradients(self.run.opt):
                torch._foreach_mul_(grads, scale)
            self._scaler.update(new_scale=scale)  # the same scale; it forgets that it has unscaled
            self._unscaled = False

    def after_fit(self):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def scale(self) -> float:
        """What the loss is multiplied by; 1 without a scaler."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    @property
    def skipped(self) -> int:
        """Steps of this fit that were not taken, because gradients overflowed."""
        if self._scaler is None:
            return 0
        return self._steps - self._taken + (0 if self._overflows is None else int(self._overflows.item()))

    def state_dict(self):
        """Scale and counts. Waits for the device."""
        return {} if self._scaler is None else {"scaler": self._scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state):
        if bool(state) != (self._scaler is not None):
            raise ValueError(
                f"MixedPrecision goes on with the dtype that it was begun with, and only fp16 has a scale; the saved "
                f"state has {'one' if state else 'none'}, here dtype is {self.dtype}"
            )
        if state:
            self._scaler.load_state_dict(state["scaler"])
            self._steps, self._taken, self._overflows = state["skipped"], 0, None

    def __getstate__(self):
        state = {**super().__getstate__(), "_scaler": None, "_hook": None, "_overflows": None}
        return {**state, "_unscaled": False, "_steps": 0, "_taken": 0}

    def __repr__(self):
        return f"MixedPrecision({'fp16' if self.dtype is torch.float16 else 'bf16'!r})"


def _dtype(dtype) -> torch.dtype:
    if dtype in (torch.bfloat16, torch.float16):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"MixedPrecision: dtype is 'bf16' or 'fp16'; got {dtype!r}.{suggestion(dtype, _DTYPES)}")


def _single(out, dtype):
    """Tensors of `dtype` as float32, also in tuples, lists and dictionaries."""
    return apply_to(out, torch.Tensor, lambda t: t.float() if t.dtype is dtype else t)
