"""`Diagnose`: the callbacks that look on, in a Lightning Trainer. Needs the extra `lightning`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from fastrbn.callbacks import HaltOnNaN
from fastrbn.learn import CancelTrainException
from fastrbn.watching import Outside

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as e:
        raise ImportError(
            "fastrbn.lightning needs the package lightning, which is not installed: pip install 'fastrbn[lightning]'"
        ) from e

__all__ = ["Diagnose"]


class Diagnose(Callback):
    """Run callbacks that observe the training of a `Trainer` (lightning or pytorch_lightning).

    `HaltOnNaN` raises `NonFiniteError` here, whatever its `raise_error`, because only an error leaves a Lightning fit
    within a step. The module then holds the last finite parameters, buffers and optimiser state. A batch goes through
    `training_step` a second time to find the cause, with `self.log` off.

    Parameters
    ----------
    *cbs : callbacks
        Some of `HaltOnNaN`, `ParamMagnitudes`, `GraphMonitor`, `ActivationStats`, `Recorder`, and your own. By default
        `HaltOnNaN()`. Keep them to read them afterwards.

    Raises
    ------
    TypeError
        For a callback that changes the training.
    RuntimeError
        At the start of the fit, if the module has several optimisers.

    Notes
    -----
    For checkpoints use Lightning's `ModelCheckpoint`. Validation is not checked. With manual optimisation, the loss is
    seen if it goes through `self.manual_backward`.

    Examples
    --------
    >>> magnitudes = ParamMagnitudes()
    >>> trainer = Trainer(max_epochs=1, callbacks=[Diagnose(HaltOnNaN(), magnitudes)])
    >>> trainer.fit(module, loader)
    >>> magnitudes.growth()
    """

    def __init__(self, *cbs: Any):
        super().__init__()
        self._outside = _Stopping(cbs, _TrainingStep(), "call self.manual_backward(loss)", "ModelCheckpoint")
        self._hooks: list[Any] = []
        for cb in self._outside.cbs:
            if isinstance(cb, HaltOnNaN):
                cb.raise_error = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise RuntimeError(
                f"Diagnose looks after one optimiser; {type(pl_module).__name__} has {len(trainer.optimizers)}"
            )
        run, opt = self._outside, trainer.optimizers[0]
        self._end(failed=True)
        run._trainer = trainer
        run.begin(pl_module, opt)
        run._context = trainer.precision_plugin.train_step_context
        self._hooks = [opt.register_step_pre_hook(run.before_step), opt.register_step_post_hook(run.after_step)]

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._outside.epoch = trainer.current_epoch
        self._outside.tell("begin_epoch")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._outside.open((batch, batch_idx), None, epoch=trainer.current_epoch, iter=batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._outside.settle(loss if scaler is None else loss / scaler.scale(torch.ones_like(loss)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._outside.close()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._outside.tell("after_epoch")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._outside.stop_reason = f"{type(exception).__name__} {self._outside._where(exception)}: {exception}"
        self._end(failed=True)

    def _end(self, failed: bool = False) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._outside.end(failed)


class _Stopping(Outside):
    """A cancelled fit ends after the batch."""

    _trainer: Any = None
    _context: Any = None

    def tell(self, event: str) -> None:
        if self._ended or self.stop_reason is not None:
            return
        try:
            super().tell(event)
        except CancelTrainException:
            self._trainer.should_stop = True

    def ready(self) -> None:
        if self._settled or not self.model.automatic_optimization:  # otherwise training_step has returned None
            super().ready()

    def _forward(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._context():
            return function(*args)


class _TrainingStep:
    """How a batch goes through the module again: `xb` is (batch, batch_idx)."""

    form = ""

    def call_model(self, model: Any, xb: Any, forward: Callable[..., Any]) -> Any:
        """What `training_step` returns."""
        if not model.automatic_optimization:
            raise RuntimeError("with manual optimisation, training_step takes steps of its own")
        takes_index = len(inspect.signature(model.training_step).parameters) > 1
        silenced = {"log": _silent, "log_dict": _silent}
        vars(model).update(silenced)
        try:
            return forward(model.training_step, *(xb if takes_index else xb[:1]))
        finally:
            for name in silenced:
                del vars(model)[name]

    def call_loss(self, loss_func: Any, pred: Any, yb: Any, forward: Callable[..., Any]) -> Any:
        """The loss in it."""
        return pred if isinstance(pred, torch.Tensor) else pred["loss"]


def _silent(*args: Any, **kwargs: Any) -> None:
    pass
