"""Training steps replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrbn.learn.callback import Callback
from fastrbn.util import apply_to, items_of

from .recording import RecordedStep, Recorder, Stale, Watched, in_words, kind

_KINDS = 8  # of batches; each recording takes memory for a whole step
_DEVICE = "cuda"


class CUDAGraph(Callback):
    """Record training steps as CUDA graphs and replay them, for small batches, whose steps wait for Python.

    With a small batch the device idles while Python launches one small kernel after another; a CUDA graph launches all
    of its kernels at once. Forward pass with loss, backward pass and the optimiser's step are a graph each. Events fire
    as usual, and the numbers are those of the plain step within rounding.

    The first batch of each kind runs as usual, the second is recorded, later ones are replayed. Batches are of one kind
    if they have the same shapes and dtypes, and the same numbers and strings beside tensors. At most 8 kinds are
    recorded. Validation runs as usual. If a replay would not do what the plain step does, the fit goes on without
    graphs: a printed line says why, and so does `.why_not`, which is None otherwise. `.graphs` is the number of
    recordings, `.replays` that of replayed steps.

    The step of PyTorch's optimisers is recorded if they were made with `fused=True` (Adam, AdamW) or `capturable=True`.
    SGD needs neither: it is recorded in its fused form. Learning rates may change; while other settings differ from the
    recorded ones, as a scheduled momentum does, the step runs as usual.

    Raises
    ------
    RuntimeError
        In `begin_fit`, if the run has two of them; if a callback begins to replace prediction, target or loss after
        steps have been replayed.

    Notes
    -----
    The fit goes on without graphs

    - if model or batches are not on CUDA;
    - with callbacks that weigh the loss, scale it or evaluate it again (`GradientAccumulation`, `Distributed` in
      several processes, `MixedPrecision("fp16")`, `Closure`), that replace model, loss function, prediction, loss or,
      after `begin_batch`, the target (`MixUp`, `CutMix`), that hook into modules or read the autograd graph
      (`ActivationStats`, `GraphMonitor`);
    - with models whose forward pass waits for the device, draws random numbers on the host, changes its inputs, or sets
      attributes or buffers instead of changing tensors in place;
    - with batches or predictions of other things than tensors, numbers and strings in containers.

    Schedules, `GradientClip`, `EMA`, `MixedPrecision("bf16")`, `ParamMagnitudes`, `Checkpoint`, the loggers, and
    `CompileCallback` without a `mode` that makes CUDA graphs work as usual. `HaltOnNaN` sees loss, gradients,
    parameters and buffers, but not what modules return; it locates a fault as usual.

    Python code of model and loss function runs only when a step is recorded: numbers that it reads elsewhere than in a
    module's attributes stay as they were. Steps are recorded anew after a change of a module's attributes (modes such
    as `train()` among them), of `requires_grad`, or of a parameter's or buffer's memory; a model that changes in each
    step is never replayed. `run.pred` and `run.loss` are copies without an autograd graph. A gradient's memory is
    overwritten by the next backward pass.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[CUDAGraph])
    >>> run.fit(1, learn)
    CUDAGraph: this fit goes on without CUDA graphs: model and batches must be on one CUDA device; they are on cpu
    >>> run.cuda_graph.graphs, run.cuda_graph.replays
    (0, 0)

    References
    ----------
    PyTorch's notes "CUDA semantics", section "CUDA Graphs".
    """

    def __init__(self) -> None:
        self.why_not: str | None = None
        self.graphs = self.replays = 0
        self._clear()

    def _clear(self) -> None:
        self._inner: dict[str, Callable[..., Any]] = {}  # the parts of the step as they are without graphs
        self._recorder: Recorder | None = None
        self._watched: Watched | None = None
        self._seen: set[Any] = set()  # kinds of batches
        self._steps: dict[Any, RecordedStep] = {}
        self._outside = False  # whether the optimiser's step cannot be recorded
        self._end_batch()

    def _end_batch(self) -> None:
        self._now: RecordedStep | None = None  # the one that computes the current batch
        self._next: str | None = None  # the loop's next call in it: "model" or "loss"
        self._given: list[tuple[Tensor, int | None]] = []  # what these calls took and gave, with its version
        self._loss: Tensor | None = None  # what it will get from the second

    def begin_fit(self) -> None:
        self._clear()
        self.why_not, self.graphs, self.replays = None, 0, 0
        if why := self._refusal():
            self._give_up(why)
            return
        self._inner = self.run._parts.wrap({"forward": self._forward, "backward": self._backward, "step": self._step})

    def _refusal(self) -> str | None:
        """The reason why another callback rules out graphs for the whole fit."""
        if sum(isinstance(cb, CUDAGraph) for cb in self.run.cbs) > 1:
            raise RuntimeError("one CUDAGraph records the steps of a run; got more: remove the others")
        for part, owner in self.run._parts.claims.items():
            if part != "forward":
                return f"{owner} takes part in the step (it claims '{part}')"
        for cb in self.run.cbs:
            if cb._eager:
                return f"{type(cb).__name__} {cb._eager}"
            if getattr(cb, "compile_args", {}).get("mode") in ("reduce-overhead", "max-autotune"):
                return f"{cb!r} makes CUDA graphs itself"
        return None

    def begin_batch(self) -> None:
        self._end_batch()
        if self.run.in_train and self.why_not is None:
            self._next = "model"

    def _forward(self, function: Callable[..., Any], *args: Any) -> Any:
        run, forward = self.run, self._inner["forward"]
        if self._next == "model":
            self._next, self._now = "loss", self._recorded()
            if self._now is None:
                pred = forward(function, *args)
            else:
                pred, self._loss = self._now.forward((run.xb, run.yb))
                self.replays += 1
            self._given = [(t, _version(t)) for t in items_of((run.yb, pred), Tensor)]
            return pred
        if self._next != "loss" or function is not run._lent["loss_func"]:  # a callback's own use
            return forward(function, *args)
        self._next = None
        for what, value in zip(("prediction", "target"), args, strict=True):
            for t in items_of(value, Tensor):
                self._check(t, what)
        loss: Any = forward(function, *args) if self._now is None else self._loss
        self._given += [(t, _version(t)) for t in items_of(loss, Tensor)]
        return loss

    def _backward(self, loss: Tensor) -> None:
        self._check(loss, "loss")
        if self._now is None:
            if self.why_not is None and any(t._backward_hooks or t.retains_grad for t, _ in self._given):
                self._give_up("a callback reads gradients of the prediction or the loss")
            self._inner["backward"](loss)
        else:
            self._now.backward()

    def _step(self, opt: Any) -> None:
        try:
            if self._now is not None and not self._outside and self._now.update(opt):
                return
        except Stale as e:
            self._outside = True
            self.run.logger(f"CUDAGraph: the optimiser's step stays outside the graphs: {e}")
        self._inner["step"](opt)

    def _check(self, t: Any, what: str) -> None:
        """Check that the loop goes on with the `what` that it got here."""
        if self.why_not is not None or any(t is given and _version(t) == version for given, version in self._given):
            return
        if self._now is None:
            self._give_up(f"a callback replaces the {what}")
            return
        raise RuntimeError(
            f"a replayed step computes its gradients from the prediction and the loss that CUDAGraph recorded; in step "
            f"{self.run.n_iter} a callback replaced the {what}, though not in earlier steps: remove one of the two"
        )

    def _recorded(self) -> RecordedStep | None:
        """The recorded step for the current batch, or None if it runs as usual."""
        run = self.run
        if self._watched is not None and self._watched.stale():
            self._forget()
        try:
            for name in ("model", "loss_func"):
                if getattr(run, name) is not run._lent[name]:
                    raise Stale(f"a callback has replaced run.{name}")
            key = kind((run._unpack.form, run.xb, run.yb))
            if key not in self._steps and key in self._seen and len(self._steps) < _KINDS:
                self._steps[key] = self._record()
                self.graphs += 1
            self._seen.add(key)
            return self._steps.get(key)
        except Stale as e:
            self._give_up(str(e))
        except Exception as e:  # noqa: BLE001 - the plain step, which comes next, need not fail
            self._give_up(f"the step cannot be recorded: {in_words(e)}")
        return None

    def _record(self) -> RecordedStep:
        run, unpack, forward = self.run, self.run._unpack, self._inner["forward"]
        if why := self._refusal():  # by a callback that claims its part later than this one
            raise Stale(why)
        watched = Watched([run.model, run.loss_func])
        inputs = [*items_of((run.xb, run.yb), Tensor)]
        devices = sorted({str(t.device) for t in (*watched.tensors, *inputs)})
        if len(devices) != 1 or not devices[0].startswith(_DEVICE):
            raise Stale(f"model and batches must be on one CUDA device; they are on {', '.join(devices)}")
        known = set(watched.params)
        if any(p not in known for group in getattr(run.opt, "param_groups", ()) for p in group["params"]):
            raise Stale("the optimiser has parameters that are neither the model's nor the loss function's")
        if any(t.requires_grad for t in inputs):
            raise Stale("inputs need gradients")
        if left_out := watched.left_out():
            raise Stale(f"it would leave out {left_out}")
        self._recorder = self._recorder or Recorder(torch.device(devices[0]))
        # the graph of the step before would tie this one's gradients to its own stream
        run.pred, run.loss = (apply_to(value, Tensor, Tensor.detach) for value in (run.pred, run.loss))

        def evaluate(xb: Any, yb: Any) -> tuple[Any, Tensor]:
            pred = unpack.call_model(run.model, xb, forward)
            return pred, unpack.call_loss(run.loss_func, pred, yb, forward)

        step = RecordedStep(evaluate, (run.xb, run.yb), watched, self._recorder)
        self._watched = watched
        return step

    def _forget(self) -> None:
        self._steps.clear()
        self._seen.clear()
        self._watched = None

    def _give_up(self, why: str) -> None:
        self._forget()
        self.why_not = why
        self.run.logger(f"CUDAGraph: this fit goes on without CUDA graphs: {why}")

    def after_batch(self) -> None:
        self._end_batch()

    def after_fit(self) -> None:
        self._clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{k: v for k, v in vars(CUDAGraph()).items() if k.startswith("_")}}

    def __repr__(self) -> str:
        return "CUDAGraph()"


def _version(t: Tensor) -> int | None:
    """A number that each change in place raises."""
    return None if t.is_inference() else t._version
