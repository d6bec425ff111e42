"""The device that a fit runs on, and transforms of batches on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from fastrbn.learn.callback import Callback
from fastrbn.util import apply_to, torchvision_parts


@runtime_checkable
class _Movable(Protocol):
    """Tensors, and other objects with a method `to` that batches may hold."""

    def to(self, *args: Any, **kwargs: Any) -> Any: ...


class CudaCallback(Callback):
    """Run the fit on a device: move the model, optimiser state, batches, and the loss function if it is a module.

    A loader with a method `to(device)` is moved once, before the first epoch. Batches that are on the device already
    are left alone. The model stays there after the fit.

    On CUDA, `torch.backends.cudnn.benchmark = True` lets cuDNN measure which of its convolutions is fastest, once for
    each shape of a batch. The command line sets it. Set it yourself if the images of your batches have one size: with
    many sizes measuring costs more than it saves, and the choice, and with it the last bits, may differ between runs.

    Parameters
    ----------
    device : str or torch.device, optional
        Such as "cuda", "cuda:1", "mps" or "cpu". Default: the current accelerator, or the CPU if there is none.

    Raises
    ------
    ValueError
        In `begin_fit`, if there is no such device; the message lists the devices of this machine.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(CudaCallback, "cpu")])
    >>> run.fit(1, learn)
    >>> next(learn.model.parameters()).device
    device(type='cpu')

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.
    """

    _needs_opt = ("param_groups", "state")
    _device: torch.device | None = None

    def __init__(self, device: str | torch.device | None = None):
        self.device = device

    def _find_device(self) -> torch.device:
        self._device = _existing(self.device)
        # copies to CUDA may overlap with work on the host; copies to the host must be complete when they are read
        self._non_blocking = self._device.type == "cuda"
        return self._device

    def begin_fit(self) -> None:
        run, device = self.run, self._find_device()
        for module in (run.model, run.loss_func):
            if isinstance(module, nn.Module):
                before = list(module.parameters())
                module.to(device)
                _replace_params(run.opt, dict(zip(before, module.parameters())))
        _move_state(run.opt)
        for loader in {id(dl): dl for dl in (run.data.train_dl, run.data.valid_dl)}.values():
            if callable(getattr(loader, "to", None)):
                loader.to(device)

    def begin_batch(self) -> None:
        run, device = self.run, self._device
        if device is None:  # before any fit, as in the course's get_batch(dl, run)
            device = self._find_device()
        if not (isinstance(run.xb, torch.Tensor) and run.xb.device == device):
            run.xb = self._moved(run.xb)
        if not (isinstance(run.yb, torch.Tensor) and run.yb.device == device):
            run.yb = self._moved(run.yb)

    def _moved(self, value: Any) -> Any:
        return apply_to(value, _Movable, lambda v: v.to(self._device, non_blocking=self._non_blocking))

    def __repr__(self):
        return f"CudaCallback({'' if self.device is None else repr(str(self.device))})"


class BatchTransformXCallback(Callback):
    """Replace each `xb` by `tfm(xb)`, in training and validation, after it was moved to its device.

    Augmentation belongs to the loader (`image_databunch(augment=…)`), which leaves validation alone and gives each
    image its own draws. A transform of torchvision that draws random numbers here gets a warning.

    Parameters
    ----------
    tfm : callable
        Takes the inputs of a batch and returns those that the model should see.

    Raises
    ------
    TypeError
        If `tfm` is not callable.

    Examples
    --------
    >>> flat = partial(BatchTransformXCallback, view_tfm(784))
    >>> learn, run = get_runner(nn.Linear(784, 10), data, lr=0.1, cbs=[flat])
    >>> run.fit(1, learn)

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.
    """

    def __init__(self, tfm: Callable[[Any], Any]):
        if not callable(tfm):
            raise TypeError(f"BatchTransformXCallback needs a function of xb; got {tfm!r}")
        self.tfm = tfm
        self._doubted = bool(torchvision_parts(tfm))

    def begin_batch(self) -> None:
        run, before = self.run, torch.get_rng_state() if self._doubted else None
        run.xb = self.tfm(run.xb)
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            name = " ".join(repr(self.tfm).split())
            warnings.warn(
                f"BatchTransformXCallback: {name} draws once for all images of a batch, after normalisation, and in "
                f"validation too; give it to the loader, which applies it to each training image: "
                f"image_databunch(…, augment=…) or get_dls(…, tfms=…)",
                stacklevel=2,
            )
        self._doubted = False


def _existing(device: str | torch.device | None) -> torch.device:
    """The device with its index ("cuda" becomes "cuda:0"); ValueError that lists the devices if it does not exist."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as e:  # an unknown name, a build without CUDA, no such index
        there = ["cpu"]
        if (accelerator := torch.accelerator.current_accelerator()) is not None and torch.accelerator.is_available():
            there += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
        raise ValueError(f"device must be one of {', '.join(there)} on this machine; got {str(device)!r}") from e


def _replace_params(opt: Any, new: dict[nn.Parameter, nn.Parameter]) -> None:
    """Give the optimiser the new parameters, on the few devices where moving a module replaces its parameters."""
    if all(old is now for old, now in new.items()):
        return
    for group in opt.param_groups:
        group["params"] = [new.get(p, p) for p in group["params"]]
    for old in [p for p in opt.state if new.get(p, p) is not p]:
        opt.state[new[old]] = opt.state.pop(old)


def _move_state(opt: Any) -> None:
    """Move optimiser state to the device of its parameter, except step counters that are kept on the host."""
    for group in opt.param_groups:
        counts_on_device = group.get("capturable") or group.get("fused")
        for p in group["params"]:
            state = opt.state.get(p, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and (name != "step" or counts_on_device):
                    state[name] = value.to(p.device)
