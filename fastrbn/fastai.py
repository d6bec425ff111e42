"""`Diagnose`: the callbacks that look on, in a fastai Learner. Needs the extra `fastai`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrbn.learn import CancelTrainException
from fastrbn.watching import Outside

try:
    from fastai.callback.core import Callback, CancelFitException
    from fastai.optimizer import OptimWrapper
except ImportError as e:
    raise ImportError(
        "fastrbn.fastai needs the package fastai, which is not installed: pip install 'fastrbn[fastai]'"
    ) from e

__all__ = ["Diagnose"]


class Diagnose(Callback):
    """Run callbacks that observe a fastai `Learner`, in training and validation.

    When `HaltOnNaN` finds a NaN or Inf, the fit ends there with the report printed. The learner then holds the last
    finite parameters, buffers and optimiser state.

    Parameters
    ----------
    *cbs : callbacks
        Some of `HaltOnNaN`, `ParamMagnitudes`, `GraphMonitor`, `ActivationStats`, `Recorder`, and your own (of this
        package). By default `HaltOnNaN()`. Keep them to read them afterwards.

    Raises
    ------
    TypeError
        For a callback that changes the training.

    Notes
    -----
    For checkpoints use fastai's `SaveModelCallback`.

    Examples
    --------
    >>> halt = HaltOnNaN()
    >>> learn = Learner(dls, model, loss_func=F.cross_entropy, cbs=Diagnose(halt, ParamMagnitudes()))
    >>> learn.fit(1)
    >>> halt.report is None
    True
    """

    order = 90  # batch, loss and gradients as other callbacks leave them

    def __init__(self, *cbs: Any):
        super().__init__()
        self._outside = _Cancelling(cbs, _Batch(), "the data have no targets", "SaveModelCallback")

    def before_fit(self) -> None:
        learn = self.learn
        opt = learn.opt.opt if isinstance(learn.opt, OptimWrapper) else learn.opt
        self._outside.begin(learn.model, opt, learn.loss_func)

    def before_train(self) -> None:
        self._outside.epoch = self.learn.epoch
        self._outside.tell("begin_epoch")

    def before_validate(self) -> None:
        self._outside.tell("begin_validate")

    def before_batch(self) -> None:
        self._outside.open(self.learn.xb, self.learn.yb, epoch=self.learn.epoch, iter=self.learn.iter)

    def after_pred(self) -> None:
        self._outside.pred = self.learn.pred

    def after_loss(self) -> None:
        if self.learn.yb:
            self._outside.settle(self.learn.loss_grad)

    def before_step(self) -> None:
        self._outside.ready()

    def after_step(self) -> None:
        self._outside.tell("after_step")

    def after_batch(self) -> None:
        self._outside.close()

    def after_epoch(self) -> None:
        self._outside.tell("after_epoch")

    def after_fit(self) -> None:
        self._outside.end()


class _Cancelling(Outside):
    """A cancelled fit is fastai's."""

    def tell(self, event: str) -> None:
        if not self._fitting:  # learn.validate and learn.get_preds come without a fit
            return
        try:
            super().tell(event)
        except CancelTrainException as e:
            raise CancelFitException from e
        except BaseException:
            self.end(failed=True)  # fastai has no event for errors
            raise


class _Batch:
    """How a batch goes through the model again: `xb` and `yb` are tuples."""

    form = ""

    def call_model(self, model: Any, xb: Any, forward: Callable[..., Any]) -> Any:
        """The prediction."""
        return forward(model, *xb)

    def call_loss(self, loss_func: Any, pred: Any, yb: Any, forward: Callable[..., Any]) -> Any:
        """The loss."""
        return forward(loss_func, pred, *yb)
