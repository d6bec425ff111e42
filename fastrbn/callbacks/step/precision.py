"""Mixed precision: the forward pass in half precision, weights and their updates in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastrbn.learn.batch import gradients
from fastrbn.learn.callback import Callback
from fastrbn.util import apply_to, suggestion, whole

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
}


class MixedPrecision(Callback):
    """Run model and loss function under `torch.autocast`, and scale the loss if float16 needs it.

    Weights, gradients, optimiser state and running statistics stay in float32. Outputs of the model in half precision
    are converted to float32 for loss functions and metrics. Callbacks run outside autocast.

    With "fp16" the loss is scaled for the backward pass only: `run.loss` is unscaled, and so are the gradients from
    `after_backward` on. A step whose gradients overflow is skipped, and the scale is reduced; this often happens in the
    first steps of a fit. `after_step` fires all the same. `.skipped` counts such steps and `.scale` is the scale;
    reading them waits for the device. `HaltOnNaN` does not report skipped steps.

    With "fp16" PyTorch reads in each step whether gradients overflowed, unless the optimiser was made with
    `fused=True`. Do not make SGD with momentum so: if its first step is skipped, PyTorch leaves the momentum unset.

    The callback claims the forward pass, and with "fp16" the backward pass and the step: a second callback that claims
    one of them is an error.

    Parameters
    ----------
    dtype : {"bf16", "fp16"} or torch.dtype, default "bf16"
        The dtype of autocast. bfloat16 has float32's range, so no scaling is needed.
    init_scale : float, default 65536
        First scale of the GradScaler that "fp16" uses; PyTorch's default.
    growth_interval : int, default 2000
        Steps without overflow after which the scale doubles; PyTorch's default.

    Raises
    ------
    ValueError
        If an argument is out of range; in `begin_fit`, if "fp16" is used with weights in float16.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(MixedPrecision, "bf16")])
    >>> run.fit(1, learn)
    >>> next(learn.model.parameters()).dtype
    torch.float32
    >>> run.mixed_precision.scale
    1.0

    References
    ----------
    Micikevicius et al., "Mixed Precision Training", ICLR 2018.
    """

    _needs_opt = ("param_groups",)

    def __init__(self, dtype: str | torch.dtype = "bf16", init_scale: float = 2.0**16, growth_interval: int = 2000):
        self.dtype = _dtype(dtype)
        if not init_scale > 0:
            raise ValueError(f"MixedPrecision: init_scale must be a number above 0; got {init_scale!r}")
        self.init_scale = float(init_scale)
        self.growth_interval = whole("MixedPrecision: growth_interval", growth_interval)
        self._clear()

    def _clear(self) -> None:
        self._scaler: Any = None  # a torch.amp.GradScaler
        self._hook: Any = None
        self._overflows: torch.Tensor | None = None
        self._unscaled, self._steps, self._taken = False, 0, 0

    def begin_fit(self) -> None:
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

    def _check_weights(self) -> None:
        half = next((n for n, p in self.run.model.named_parameters() if p.dtype is torch.float16), None)
        if half is not None:
            raise ValueError(
                f"MixedPrecision('fp16') needs weights in float32, since autocast converts them; '{half}' is float16: "
                f"remove model.half()"
            )

    def _forward(self, function: Callable, *args: Any) -> Any:
        with torch.autocast(self._device, dtype=self.dtype):
            out = function(*args)
        return _single(out, self.dtype)

    def _backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(loss).backward()

    def after_backward(self) -> None:
        if self._scaler is not None:
            self._scaler.unscale_(self.run.opt)
            self._unscaled = True

    def _step(self, opt: Any) -> None:
        self._steps += 1
        self._scaler.step(opt)
        self._scaler.update()
        self._unscaled = False

    def _count(self, opt: Any, args: Any, kwargs: Any) -> None:
        self._taken += 1
        found = getattr(opt, "found_inf", None)  # a fused optimiser is always called and skips the step itself
        if found is not None:
            self._overflows = found.clone() if self._overflows is None else self._overflows + found

    def after_cancel_batch(self) -> None:
        self._scale_back()

    def after_cancel_epoch(self) -> None:
        self._scale_back()

    def _scale_back(self) -> None:
        """Scale gradients of a cancelled step again: scaled ones may be added, and both are unscaled together."""
        if self._unscaled:
            scale = self._scaler.scale(torch.ones((), device=self._device))
            if grads := gradients(self.run.opt):
                torch._foreach_mul_(grads, scale)
            self._scaler.update(new_scale=scale)  # the same scale; this makes the scaler forget that it has unscaled
            self._unscaled = False

    def after_fit(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def scale(self) -> float:
        """The factor on the loss; 1 without a scaler. Reading it waits for the device."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    @property
    def skipped(self) -> int:
        """Steps of this fit that were skipped because gradients overflowed. Reading it waits for the device."""
        if self._scaler is None:
            return 0
        return self._steps - self._taken + (0 if self._overflows is None else int(self._overflows.item()))

    def state_dict(self) -> dict:
        """The state of the scaler and the number of skipped steps. Waits for the device."""
        return {} if self._scaler is None else {"scaler": self._scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        if bool(state) != (self._scaler is not None):
            raise ValueError(
                f"a resumed fit needs MixedPrecision with the dtype of the first one: the saved state has "
                f"{'a' if state else 'no'} scale, which only fp16 uses, and dtype is {self.dtype}"
            )
        if state:
            self._scaler.load_state_dict(state["scaler"])
            self._steps, self._taken, self._overflows = state["skipped"], 0, None

    def __getstate__(self):
        state = {**super().__getstate__(), "_scaler": None, "_hook": None, "_overflows": None}
        return {**state, "_unscaled": False, "_steps": 0, "_taken": 0}

    def __repr__(self):
        return f"MixedPrecision({'fp16' if self.dtype is torch.float16 else 'bf16'!r})"


def _dtype(dtype: Any) -> torch.dtype:
    if dtype in (torch.bfloat16, torch.float16):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"MixedPrecision: dtype must be 'bf16' or 'fp16'; got {dtype!r}.{suggestion(dtype, _DTYPES)}")


def _single(out: Any, dtype: torch.dtype) -> Any:
    """Convert tensors of `dtype` to float32, also in tuples, lists and dictionaries."""
    return apply_to(out, torch.Tensor, lambda t: t.float() if t.dtype is dtype else t)
