"""Where the work is done, and what happens to a batch on its way to the model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from fastrbn.learn.callback import Callback
from fastrbn.util import apply_to


@runtime_checkable
class _Movable(Protocol):
    """Tensors, and what others' batches hold that has a `to` of its own."""

    def to(self, *args, **kwargs): ...


class CudaCallback(Callback):
    """Moves model, optimiser state, batches, and a loss function's parameters and buffers (class weights) to a device.

    - `device`: a name such as "cuda", "cuda:1", "mps", "cpu", or a `torch.device`; None: the best there is.

    A loader with a method `to(device)` is moved once, before the first epoch; batches that are there already are left
    alone. The model stays on the device after the fit.

    Source: fast.ai course, part 2 (2019), notebook 06.
    """

    _needs_opt = ("param_groups", "state")
    _device = None

    def __init__(self, device=None):
        self.device = device

    def _find_device(self):
        self._device = _existing(self.device)
        # batches may come over while the host goes on, but what goes to the host must be there when it is read
        self._non_blocking = self._device.type == "cuda"

    def begin_fit(self):
        run = self.run
        self._find_device()
        for module in (run.model, run.loss_func):
            if isinstance(module, nn.Module):
                before = list(module.parameters())
                module.to(self._device)
                _replace_params(run.opt, dict(zip(before, module.parameters())))
        _move_state(run.opt)
        for loader in {id(dl): dl for dl in (run.data.train_dl, run.data.valid_dl)}.values():
            if callable(getattr(loader, "to", None)):
                loader.to(self._device)

    def begin_batch(self):
        if self._device is None:  # before any fit, as in the course's get_batch(dl, run)
            self._find_device()
        run, device = self.run, self._device
        if not (isinstance(run.xb, torch.Tensor) and run.xb.device == device):
            run.xb = self._moved(run.xb)
        if not (isinstance(run.yb, torch.Tensor) and run.yb.device == device):
            run.yb = self._moved(run.yb)

    def _moved(self, value):
        return apply_to(value, _Movable, lambda v: v.to(self._device, non_blocking=self._non_blocking))

    def __repr__(self):
        return f"CudaCallback({'' if self.device is None else repr(str(self.device))})"


class BatchTransformXCallback(Callback):
    """Replaces each `xb` by `tfm(xb)`, in training and in validation, after it was moved to its device.

    Source: fast.ai course, part 2 (2019), notebook 06.
    """

    def __init__(self, tfm):
        if not callable(tfm):
            raise TypeError(f"BatchTransformXCallback needs a function of xb; got {tfm!r}")
        self.tfm = tfm

    def begin_batch(self):
        self.run.xb = self.tfm(self.run.xb)


def _existing(device) -> torch.device:
    """The device with its number ("cuda" is "cuda:0" to tensors), or an error that says which there are."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as e:  # an unknown name, a build without CUDA, no such number
        there = ["cpu"]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator().type
            there += [f"{kind}:{i}" for i in range(torch.accelerator.device_count())]
        raise ValueError(f"there is no device {str(device)!r} here: there is {', '.join(there)}") from e


def _replace_params(opt, new) -> None:
    """On most devices a parameter that moves stays the same object; where it does not, the optimiser takes the new."""
    if all(old is now for old, now in new.items()):
        return
    for group in opt.param_groups:
        group["params"] = [new.get(p, p) for p in group["params"]]
    for old in [p for p in opt.state if new.get(p, p) is not p]:
        opt.state[new[old]] = opt.state.pop(old)


def _move_state(opt) -> None:
    """Optimiser state goes where its parameter is, except counters that the optimiser keeps on the host."""
    for group in opt.param_groups:
        counts_on_device = group.get("capturable") or group.get("fused")
        for p in group["params"]:
            state = opt.state.get(p, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and (name != "step" or counts_on_device):
                    state[name] = value.to(p.device)
