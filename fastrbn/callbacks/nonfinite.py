"""The first NaN or Inf: stop there, say where it came up, and leave a model that can be looked at."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import operator

import torch
from torch import nn

from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelTrainException

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # their output is that of a module inside
_PHASES = {"forward": "the forward pass", "backward": "the backward pass", "step": "the optimiser's step"}


@dataclasses.dataclass
class NonFiniteReport:
    """Where the first value came up that is not finite.

    - `step`: `run.n_iter` of the batch, from 0; `epoch`, `batch`: the batch's place; `in_train`: in which pass.
    - `phase`: "forward", "backward" or "step"; `where`: "input", "loss", or the qualified name of the first module
      (forward) or parameter (backward, step) to go; "model" is the whole model's own output.
    - `losses`, `lrs`: of the last training steps, this one's at the end; of several param groups the largest rate.
    - `magnitudes`: the largest absolute value of each parameter in the state that was kept.
    """

    step: int
    epoch: int
    batch: int
    phase: str
    where: str
    losses: list[float]
    lrs: list[float]
    magnitudes: dict[str, float]
    in_train: bool = True

    @property
    def sentence(self) -> str:
        place = "" if self.in_train else " of validation"
        return (
            f"NaN or Inf in {_PHASES[self.phase]} of step {self.step} (epoch {self.epoch}, batch {self.batch}{place}), "
            f"first in {_described(self.phase, self.where)}"
        )

    def __str__(self):
        largest = sorted(self.magnitudes.items(), key=lambda kv: -kv[1])[:3]
        lines = [
            self.sentence,
            f"  last losses: {_numbers(self.losses)}",
            f"  last rates:  {_numbers(self.lrs)}",
            f"  largest parameters in the model as it was kept: {', '.join(f'{n} {v:.3g}' for n, v in largest)}",
        ]
        return "\n".join(lines)


class NonFiniteError(ArithmeticError):
    """Raised by `HaltOnNaN(raise_error=True)`; `.report` is the `NonFiniteReport`."""

    def __init__(self, report):
        super().__init__(report)
        self.report = report

    def __str__(self):
        return self.report.sentence


class HaltOnNaN(Callback):
    """Ends the fit at the first NaN or Inf in a module's output, the loss, a gradient or a parameter.

    - `every`: look at each `every`-th training step and validation batch. With more than 1, what comes up between is
      found at the next look, and is reported there.
    - `raise_error`: raise `NonFiniteError` instead of ending the fit quietly.

    Afterwards `.report` is a `NonFiniteReport` (None when all was well), `run.stop_reason` its sentence, the gradients
    are cleared, and parameters and buffers are those from after the last step that was looked at and found finite: with
    `every=1` the state in which the failing batch found them. The optimiser took no step on gradients that are not
    finite; when its step itself went wrong, its own state stays as that step left it.

    Buffers that hold NaN or Inf when the fit begins (masks of -inf) are let be. Modules that are compiled are not
    looked into: there only what comes out of the whole is seen. A module's output is looked at when the loss is there:
    where the next module has changed it in place, it is the changed one that counts.
    """

    _order = 90  # after whatever else changes loss and gradients

    def __init__(self, every=1, raise_error=False):
        if not (isinstance(every, int) and every >= 1):
            raise ValueError(f"every must be a whole number, 1 or more; got {every!r}")
        self.every, self.raise_error, self.report = every, raise_error, None
        self._idle()

    @property
    def name(self) -> str:
        return "halt_on_nan"

    def _idle(self):
        self._looking, self._watching, self._kept = False, False, None
        self._hooks, self._outputs, self._recent = [], [], collections.deque(maxlen=10)

    def begin_fit(self):
        model = self.run.model
        self._idle()
        self.report, self._kept = None, _Kept(model)
        for name, module in model.named_modules():
            if not isinstance(module, _CONTAINERS):
                self._hooks.append(module.register_forward_hook(functools.partial(self._watch, name or "model")))

    def begin_batch(self):
        run = self.run
        self._looking = self._watching = (run.n_iter if run.in_train else run.iter) % self.every == 0
        self._outputs.clear()

    def _watch(self, name, module, args, output):
        if self._watching and not torch.compiler.is_compiling():
            self._outputs.append((name, output))

    def after_loss(self):
        run = self.run
        if run.in_train:
            self._recent.append((run.loss.detach(), [g["lr"] for g in run.opt.param_groups]))
        if not self._looking:
            return
        self._watching = False
        found = [(name, t) for name, out in self._outputs for t in _float_tensors(out)]
        found += [("model", t) for t in _float_tensors(run.pred)]
        self._outputs = [(name, None) for name, _ in self._outputs]  # the order in which modules ran is still wanted
        if bad := _not_finite([*found, ("loss", run.loss)]):
            where = bad[0]
            if where != "loss" and not all(map(_is_finite, _float_tensors(run.xb))):
                where = "input"
            self._halt("forward", where)

    def after_backward(self):
        if self._looking:
            grads = [(name, p.grad) for name, p in self._kept.params if p.grad is not None]
            if bad := _not_finite([(name, g.coalesce().values() if g.is_sparse else g) for name, g in grads]):
                self._halt("backward", self._nearest_to_loss(bad))

    def after_step(self):
        if self._looking:
            self._check_state()

    def after_epoch(self):
        if self.every > 1:  # the last steps may have gone unseen
            self._check_state()

    def after_fit(self):
        for hook in self._hooks:
            hook.remove()
        self._idle()

    def _check_state(self):
        if bad := self._kept.not_finite():
            # a buffer changes in the forward pass
            self._halt("step" if bad[0] in dict(self._kept.params) else "forward", bad[0])
        self._kept.save()

    def _nearest_to_loss(self, names):
        """Which of these parameters' gradients came first: backward goes through the modules in the reverse order of
        forward; those of one module come together."""
        turn = {name: i for i, (name, _) in enumerate(self._outputs)}

        def when(name):
            return turn.get(name.rpartition(".")[0] or "model", -1)

        last = max(map(when, names))
        return next(n for n in (names if last >= 0 else reversed(names)) if when(n) == last)

    def _halt(self, phase, where):
        run = self.run
        self._kept.restore()
        run.opt.zero_grad()
        self.report = report = NonFiniteReport(
            step=run.n_iter,
            epoch=run.epoch,
            batch=run.iter,
            phase=phase,
            where=where,
            losses=[loss.item() for loss, _ in self._recent],
            lrs=[max(map(float, lrs)) for _, lrs in self._recent],
            magnitudes={n: p.detach().abs().max().item() for n, p in self._kept.params if p.numel()},
            in_train=run.in_train,
        )
        raise NonFiniteError(report) if self.raise_error else CancelTrainException(report.sentence)

    def __getstate__(self):
        # a copy of the model takes copies of its hooks, and with them of this callback: they do nothing
        return {**super().__getstate__(), **{k: vars(HaltOnNaN())[k] for k in _LIVE}}

    def __repr__(self):
        return f"HaltOnNaN(every={self.every}, raise_error={self.raise_error})"


_LIVE = ("_looking", "_watching", "_kept", "_hooks", "_outputs", "_recent")  # what belongs to one fit


class _Kept:
    """Parameters and buffers of a model, with a copy from when they were last found finite."""

    def __init__(self, model):
        self.params, self._modules = list(model.named_parameters()), list(model.named_modules())
        self._tensors, self._copies, self._exempt = [], [], set()
        self._copied = None  # the list of tensors that the copies are of
        self._look_up()
        self._exempt = {name for name, t in self._watched if not _is_finite(t)}
        self._tensors = []
        self.save()

    def _look_up(self):
        """Modules may replace their buffers by others: only then is there anything to do."""
        now = [p for _, p in self.params]
        for _, module in self._modules:
            if module._buffers:
                now += [b for b in module._buffers.values() if b is not None]
        if len(now) == len(self._tensors) and all(map(operator.is_, now, self._tensors)):
            return
        self._tensors = now
        names = [name for name, _ in self.params] + [
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in self._modules
            for name, b in module._buffers.items()
            if b is not None
        ]
        floats = (torch.is_floating_point(t) or torch.is_complex(t) for t in now)
        self._watched = [(n, t) for n, t, f in zip(names, now, floats) if f and t.numel() and n not in self._exempt]

    def not_finite(self) -> list[str]:
        self._look_up()
        return _not_finite(self._watched)

    @torch.no_grad()
    def save(self) -> None:
        self._look_up()
        if self._copied is not self._tensors and [t.shape for t in self._tensors] != [t.shape for t in self._copies]:
            self._copies = [t.detach().clone() for t in self._tensors]
        else:
            torch._foreach_copy_(self._copies, self._tensors)
        self._copied = self._tensors

    @torch.no_grad()
    def restore(self) -> None:
        self._look_up()
        for t, saved in zip(self._tensors, self._copies):
            if t.shape == saved.shape:
                t.copy_(saved)
            else:
                t.data = saved.clone()


def _float_tensors(value):
    """The floating-point tensors in an output: a tensor, or tuples, lists and dictionaries of them."""
    if isinstance(value, torch.Tensor):
        return [value] if (value.is_floating_point() or value.is_complex()) and value.numel() else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for v in value for t in _float_tensors(v)]


def _is_finite(t) -> bool:
    return bool(torch.isfinite(t.detach()).all())


@torch.no_grad()
def _not_finite(named) -> list[str]:
    """The names of those tensors that hold NaN or Inf. When none does, one wait for the device tells."""
    if not named:
        return []
    tensors = [t for _, t in named]
    if any(t.dtype in _NARROW for t in tensors):  # their squares would overflow
        tensors = [t.float() if t.dtype in _NARROW else t for t in tensors]
    norms = torch._foreach_norm(tensors, 2)  # not finite as soon as one element is not, in one pass
    if not all(n.is_cpu for n in norms):
        norms = [torch.stack([n.to(norms[0].device) for n in norms]).sum()]
    if all(math.isfinite(n.item()) for n in norms):
        return []
    # the sums of squares may have overflowed: now each element counts
    return [name for name, t in named if not _is_finite(t)]


_NARROW = (torch.float16, torch.bfloat16)


def _described(phase, where):
    if where in ("input", "loss"):
        return f"the {where}"
    return f"module '{where}'" if phase == "forward" else f"parameter '{where}'"


def _numbers(values):
    return " ".join(f"{v:.4g}" for v in values)
