"""`watch`: the callbacks that look on, in a training loop that is not ours.

`Outside` fires a run's events when told how far a foreign loop is; the callbacks for Lightning and fastai tell it.
`Watch` finds out by itself, from hooks on the model and the optimiser.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrbn.callbacks import ActivationStats, Checkpoint, GraphMonitor, HaltOnNaN, ParamMagnitudes, Recorder
from fastrbn.callbacks.diagnose.nonfinite.state import ModelHook, is_finite
from fastrbn.learn import Callback, CancelTrainException, Learner, Runner, TrainEvalCallback, checkpoint_file
from fastrbn.learn.resume import restore
from fastrbn.learn.snapshot import RandomState
from fastrbn.util import items_of

__all__ = ["Watch", "watch"]

_LOOK_ON = (ActivationStats, Checkpoint, GraphMonitor, HaltOnNaN, ParamMagnitudes, Recorder)
_NEED_LOSS = (GraphMonitor, Recorder)
_CALLS = 8  # of the model in a batch, most that are kept
_NO_DATA = types.SimpleNamespace(train_dl=None, valid_dl=None)


class Outside(Runner):
    """A run whose loop belongs to somebody else.

    Parameters
    ----------
    cbs : callbacks
        By default `HaltOnNaN()`.
    again : object
        How a batch goes through model and loss function a second time; see `Calls`.
    show : str
        How the loop shows its loss.
    checkpoints : str, optional
        What the loop has in place of `Checkpoint`.
    """

    epoch: Any  # None: the loop does not tell it

    def __init__(self, cbs: Any, again: Any, show: str, checkpoints: str | None = None):
        super().__init__([_Counter(), *(cbs or [HaltOnNaN()])])
        looking = [cls for cls in _LOOK_ON if checkpoints is None or cls is not Checkpoint]
        for cb in self.cbs:
            if type(cb).__module__.startswith("fastrbn.") and not isinstance(cb, (*looking, _Counter, _States)):
                instead = f"{checkpoints}, which saves that loop too" if isinstance(cb, Checkpoint) else "Runner"
                raise TypeError(
                    f"in another loop callbacks can only look on: {', '.join(cls.__name__ for cls in looking)}, and "
                    f"your own; {type(cb).__name__} needs this package's loop: use {instead}"
                )
        self._show, self._blind = show, [type(cb).__name__ for cb in self.cbs if isinstance(cb, _NEED_LOSS)]
        self._again, self._autocast = again, contextlib.nullcontext()
        self._begun = self._ended = self._open = self._settled = self._busy = False

    def claim(self, owner: Callback, **functions: Callable[..., Any]) -> None:
        """A RuntimeError: the loop is not ours."""
        raise RuntimeError(
            f"a callback takes over a part of the step only in this package's loop; {type(owner).__name__} claims "
            f"{', '.join(functions)}: use it with Runner"
        )

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """A RuntimeError: the loop is not ours."""
        raise RuntimeError("this run only looks on in another loop; to train with this package's, use Runner")

    def begin(self, model: nn.Module, opt: Any, loss_func: Any = None, resume: str | Path | None = None) -> None:
        """Begin the fit."""
        self.end(failed=True)  # a loop that has failed may not have said so
        self._prepare(1, Learner(model, opt, loss_func, _NO_DATA), resume)
        self._unpack, self._parts.forward = self._again, self._forward
        self._begun, self._ended, self._open = True, False, False
        try:
            self.tell("begin_fit")
        except BaseException:
            self.end(failed=True)
            raise

    def open(self, xb: Any, yb: Any, **place: Any) -> None:
        """A batch begins. `place`: `epoch` and `iter`."""
        self._settled, self._open = False, True
        self.__dict__.update(xb=xb, yb=yb, pred=None, loss=None, **place)
        self._autocast = _autocast(self.model)
        self.tell("begin_batch")

    def settle(self, loss: Any = None) -> None:
        """The loss is known, or will not be shown. One that is shown twice counts once."""
        if self._settled and (loss is None or loss is self.loss):
            return
        self.loss, self._settled = loss, True
        self.tell("after_pred")
        self.tell("after_loss")

    def ready(self) -> None:
        """Gradients are there, and the step comes next."""
        if self._blind and not self._settled:
            raise RuntimeError(
                f"{', '.join(self._blind)} must be shown the loss before its backward pass, and has not seen it: "
                f"{self._show}"
            )
        self.settle()
        self.tell("after_backward")

    def close(self) -> None:
        """The batch is over."""
        if self._open:
            if not self._blind:  # a batch that was skipped has no loss to show
                self.settle()
            self._open = False
            self.tell("after_batch")

    def tell(self, event: str) -> None:
        """Fire an event. The model may be called meanwhile."""
        self._busy = True
        try:
            self(event)
        finally:
            self._busy = False

    def end(self, failed: bool = False) -> None:
        """End the fit: `after_fit`."""
        if self._begun and not self._ended:
            self._ended = True
            self._finish(failed)
            if self.stop_reason is not None and not failed:
                reports = [cb.report for cb in self.cbs if isinstance(cb, HaltOnNaN) and cb.report is not None]
                self.logger(str(reports[0]) if reports else self.stop_reason)

    def before_step(self, opt: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A hook for the optimiser."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.ready()
            return None

        def and_look() -> Any:
            loss = closure()
            if isinstance(loss, Tensor) and not self._settled and "GraphMonitor" not in self._blind:
                self.settle(loss.detach())
            self.ready()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": and_look}
        return (args[0], and_look, *args[2:]), kwargs

    def after_step(self, opt: Any, args: tuple, kwargs: dict) -> None:
        """A hook for the optimiser, to be registered after `begin`: those of callbacks come first."""
        self.tell("after_step")

    def _forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the model or the loss function as the loop does."""
        with self._autocast:
            return function(*args)

    def _where(self, error: BaseException | None = None) -> str:
        return super()._where(error) if self.epoch is not None else f"in step {self.n_iter}"


class Watch(Outside):
    """A run whose callbacks observe the loop inside the `with` block of `watch`.

    Every callback is reachable by its name, as in `w.halt_on_nan.report`. `w.stop_reason` is None if the block ran to
    its end, otherwise a sentence. `w.n_iter` counts the training batches.

    Parameters
    ----------
    model, opt, cbs, states : see `watch`
        `watch` makes it from these.

    Examples
    --------
    >>> model = nn.Linear(8, 2)
    >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with watch(model, opt, GraphMonitor()) as w:
    ...     for _ in range(3):
    ...         loss = model(torch.randn(4, 8)).square().mean()
    ...         w.look(loss).backward()  # or, with the two lines below: w.step(loss)
    ...         opt.step()
    ...         opt.zero_grad()
    >>> w.n_iter, w.graph_monitor.report
    (3, None)
    """

    def __init__(self, model: nn.Module, opt: torch.optim.Optimizer, cbs: Any, states: dict[str, Any]):
        if not isinstance(model, nn.Module) or not isinstance(opt, torch.optim.Optimizer):
            raise TypeError(
                f"watch needs the model and its optimiser, watch(model, opt, …), an nn.Module and a "
                f"torch.optim.Optimizer; got {type(model).__name__} and {type(opt).__name__}"
            )
        if not {*model.parameters()} & {p for group in opt.param_groups for p in group["params"]}:
            raise ValueError(
                f"the optimiser of watch must be the model's; {type(opt).__name__} has none of the parameters of "
                f"{type(model).__name__}: give watch the model and the optimiser that the loop uses"
            )
        cbs = cbs or (HaltOnNaN(),)
        super().__init__(
            [*cbs, *([_States(states)] if states else [])],
            Calls(),
            "write w.step(loss), which includes backward, step and zero_grad, or w.look(loss).backward()",
        )
        self.model, self.opt = model, opt
        self._trained = model, opt
        self._hooks: list[Any] = []
        self._stop: BaseException | None = None
        self._random: RandomState | None = None
        self._inside = self._used = self._stepped = False

    def step(self, loss: Tensor) -> None:
        """Take a training step: `loss.backward()`, `opt.step()`, `opt.zero_grad()`.

        Parameters
        ----------
        loss : Tensor
            A scalar.
        """
        self.look(loss).backward()
        self._trained[1].step()
        self._trained[1].zero_grad()

    def look(self, loss: Tensor) -> Tensor:
        """Show the loss to the callbacks, where the loop itself calls backward and step: `w.look(loss).backward()`.

        Parameters
        ----------
        loss : Tensor
            A scalar, not yet scaled by a GradScaler.

        Returns
        -------
        Tensor
            `loss` itself.
        """
        if not self._hooks:
            raise RuntimeError("the loss can be shown inside the block only: with watch(model, opt, …) as w: …")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"the loss must be a tensor with one number, as loss.backward() needs it; got {got}")
        self._in_batch()
        self._used = True
        self.settle(loss)
        return loss

    def resume(self, path: str | Path | None = None) -> int:
        """Continue from a checkpoint: restore model, optimiser, further states and callbacks.

        The random states are set when the next training batch reaches the model, after the loader has been made and
        the seen batches skipped. Order and random transforms of the data are your loop's.

        Parameters
        ----------
        path : str or Path, optional
            A checkpoint, or a folder of them. By default the folder of the `Checkpoint` given to `watch`, and then 0 is
            returned if it has none yet.

        Returns
        -------
        int
            The number of training batches done, which is the index of the next one.

        Raises
        ------
        CheckpointError
            If the checkpoint cannot be read, or belongs to another model or optimiser.
        """
        if not self._hooks or self._begun:
            raise RuntimeError("resume at the start of the block, before the first batch: with watch(…) as w: …")
        own = next((cb for cb in self.cbs if isinstance(cb, Checkpoint)), None)
        if path is None and own is None:
            raise ValueError(
                "resume() goes on from the folder of a Checkpoint, and there is no Checkpoint: give it to watch, or "
                "name the file, resume(path)"
            )
        if path is None and own is not None and not checkpoint_file.files(own.path):
            return 0
        state = self._begin(own.path if path is None and own is not None else path)
        self._random = RandomState()
        self._random.load_state_dict(state["random"])
        return self.n_iter

    def state_dict(self, phase: str) -> dict[str, Any]:
        """All that the loop depends on, but for its data."""
        epoch, self.epoch = self.epoch, 0
        try:
            return super().state_dict(phase)
        finally:
            self.epoch = epoch

    def __enter__(self) -> Watch:
        if self._hooks:
            raise RuntimeError("watch is in use already: make another one for another loop")
        model, opt = self._trained
        self._begun, self._moved, self._stop = False, False, None
        self._hooks = [
            model.register_forward_pre_hook(ModelHook(self._called), with_kwargs=True),
            model.register_forward_hook(ModelHook(self._returned)),
            opt.register_step_pre_hook(self.before_step),
        ]
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        ours = error is self._stop and isinstance(error, CancelTrainException)  # and not another watch's
        failed = error is not None and not ours
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._begun:
            try:
                if isinstance(error, KeyboardInterrupt):
                    self.stop_reason = f"interrupted (Ctrl-C) {self._where()}"
                elif failed:
                    self.stop_reason = f"{type(error).__name__} {self._where(error)}: {error}"
                else:
                    self._scope("train", self._last, error)
            except BaseException:
                failed = True
                raise
            finally:
                self.end(failed)
        if error is None and not self._moved and self.resumed_from is None:
            warnings.warn(
                "watch saw no step of the optimiser: take it in the block, with opt.step() or w.step(loss), and give "
                "watch the optimiser that the loop uses",
                stacklevel=2,
            )
        return ours

    def _last(self, error: BaseException | None) -> None:
        if error is not None:
            raise error
        if self._used:  # not a forward pass alone
            self.close()
        self.epoch = 0  # of one: Checkpoint saves the last
        self.tell("after_epoch")

    def _begin(self, resume: str | Path | None = None) -> dict[str, Any]:
        model, opt = self._trained
        self.begin(model, opt, resume=resume)
        self._hooks.append(opt.register_step_post_hook(self.after_step))
        state = self._passes.state
        if state is not None:
            with RandomState():
                restore(self, state)
        self.tell("begin_epoch")
        self.epoch = None  # the loop's own
        return state or {}

    def _in_batch(self) -> None:
        """Begin a batch, unless one is under way."""
        if self._stop is not None:
            raise self._stop  # the loop has caught it and went on
        if not self._begun:
            self._begin()
        if self._stepped:  # the model was not seen since
            self.close()
        if not self._open:
            if self._random is not None:
                self._random.restore()
                self._random = None
            self._used = self._stepped = False
            self.open([], {"loss": None, "grads": []}, iter=self.n_iter)

    def _called(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        trains = not torch.compiler.is_compiling() and model.training and torch.is_grad_enabled() and not self._busy
        if trains:
            if self._used and self._stop is None:  # the last batch has had its loss, its backward pass or its step
                self.close()
            self._in_batch()
            self.xb.append((args, kwargs))
            del self.xb[_CALLS + 1 :]
        self._inside = trains

    def _returned(self, model: nn.Module, args: tuple, output: Any) -> None:
        if not self._inside:
            return
        self._inside, self.pred = False, output
        grads = self.yb["grads"]
        for t in _differentiable(output) if len(self.xb) <= _CALLS else ():
            t.register_hook(functools.partial(self._note, grads, len(grads)))
            grads.append(None)

    def _note(self, grads: list, i: int, grad: Tensor) -> None:
        """The gradient of an output."""
        grads[i] = grad.detach()
        self._used |= not torch.is_grad_enabled()  # with create_graph, the loss is yet to come

    def settle(self, loss: Any = None) -> None:
        if loss is not None:
            self.yb["loss"] = loss.detach()
        super().settle(loss)

    def ready(self) -> None:
        self._in_batch()
        self._used = True
        super().ready()

    def after_step(self, opt: Any, args: tuple, kwargs: dict) -> None:
        self._stepped = self._moved = True
        super().after_step(opt, args, kwargs)

    def __call__(self, event: str) -> None:
        try:
            super().__call__(event)
        except BaseException as e:
            self._stop = e
            raise


def watch(model: nn.Module, opt: torch.optim.Optimizer, *cbs: Any, **states: Any) -> Watch:
    """Diagnose a training loop of your own: `with watch(model, opt, HaltOnNaN()): …`.

    The loop stays as it is. Hooks on `model` and `opt`, removed at the end of the block, show each training batch to
    the callbacks: a forward pass in training mode with gradients begins it, a step of the optimiser, if there is one,
    ends it. GradScaler, gradient accumulation, clipping and closures are understood. `GraphMonitor` and `Recorder` must
    see the loss: take the steps with `w.step(loss)`, or write `w.look(loss).backward()`. The other callbacks gain from
    it: a report then has the losses.

    When `HaltOnNaN` finds a NaN or Inf, the block ends there with the report printed, the program continues after the
    block, and `w.stop_reason` says why. With `HaltOnNaN(raise_error=True)`, `NonFiniteError` is raised instead.

    Parameters
    ----------
    model : nn.Module
        The module that the loop calls, wrapped or compiled as it is there.
    opt : torch.optim.Optimizer
    *cbs : callbacks
        Some of `HaltOnNaN`, `ParamMagnitudes`, `GraphMonitor`, `ActivationStats`, `Recorder`, `Checkpoint`, and your
        own. By default `HaltOnNaN()`.
    **states : objects
        What `Checkpoint` saves and `w.resume` restores besides model and optimiser: anything with `state_dict` and
        `load_state_dict`, such as `sched=scheduler, scaler=scaler`.

    Returns
    -------
    Watch

    Raises
    ------
    TypeError
        For a callback that changes the training, or an object without `state_dict`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with watch(model, opt, HaltOnNaN(), ParamMagnitudes()) as w:
    ...     for xb, yb in data.train_dl:
    ...         w.step(F.cross_entropy(model(xb), yb))
    >>> w.stop_reason is None, w.n_iter
    (True, 16)
    >>> growth = w.param_magnitudes.growth()

    A loop that takes its steps itself:

    >>> with watch(model, opt):
    ...     for xb, yb in data.train_dl:
    ...         loss = F.cross_entropy(model(xb), yb) / 0  # a mistake
    ...         loss.backward()
    ...         opt.step()
    ...         opt.zero_grad()
    NaN or Inf in the backward pass of step 0, first in the loss
    ...
    """
    return Watch(model, opt, cbs, states)


class Calls:
    """How a batch of `Watch` goes through the model again.

    `xb` is the model's calls, a list of (args, kwargs). `yb` is a dictionary: the "loss", None if it was not shown, and
    "grads", the gradients that came back to the model's outputs. Lightning and fastai have classes of the same form.
    """

    form = ""

    def call_model(self, model: Any, xb: Any, forward: Callable[..., Any]) -> Any:
        """The outputs of all calls, without other processes."""
        if not xb:
            raise RuntimeError(
                "the model was not seen in training mode outside of compiled code, so that the batch is not known; "
                "give watch what torch.compile has returned"
            )
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        return forward(lambda: [model(*args, **kwargs) for args, kwargs in xb[:_CALLS]])

    def call_loss(self, loss_func: Any, pred: Any, yb: Any, forward: Callable[..., Any]) -> Any:
        """The loss as it was, whose backward pass brings the same gradients to the outputs.

        If it was not shown: NaN if those gradients are not finite, else 0.
        """
        loss, grads = yb["loss"], yb["grads"]
        if loss is None:
            bad = not is_finite(grads)
            loss = torch.tensor(math.nan if bad else 0.0)
        return _Recorded.apply(loss, grads, *_differentiable(pred))


class _Recorded(torch.autograd.Function):
    """A loss with known gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list, *outputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        return None, None, *ctx.grads


class _Counter(TrainEvalCallback):
    """Counts batches, and leaves the model's mode to the loop."""

    def begin_fit(self) -> None:
        self.run.n_iter = 0

    def begin_epoch(self) -> None:
        self.run.in_train = True

    def begin_validate(self) -> None:
        self.run.in_train = False


class _States(Callback):
    """Saves and restores what else a loop consists of, such as schedulers."""

    def __init__(self, states: dict[str, Any]):
        for name, obj in states.items():
            if not hasattr(obj, "state_dict") or not hasattr(obj, "load_state_dict"):
                raise TypeError(
                    f"what a checkpoint saves needs state_dict and load_state_dict; {name} is a {type(obj).__name__}"
                )
        self._names = list(states)
        vars(self).update((f"_state_{name}", obj) for name, obj in states.items())

    @property
    def name(self) -> str:
        return "states"

    def state_dict(self) -> dict[str, Any]:
        return {name: vars(self)[f"_state_{name}"].state_dict() for name in self._names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != set(self._names):
            raise ValueError(
                f"the checkpoint has the states of {', '.join(state)}, and watch was given {', '.join(self._names)}: "
                f"give it the same ones"
            )
        for name, saved in state.items():
            vars(self)[f"_state_{name}"].load_state_dict(saved)


def _differentiable(output: Any) -> list[Tensor]:
    """The tensors of an output that gradients come to."""
    return [t for t in items_of(output, Tensor) if t.requires_grad]


def _autocast(model: nn.Module) -> Any:
    """The context of autocast as it is now, to enter again later."""
    kind = next((p.device.type for p in model.parameters()), "cpu")
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind))
