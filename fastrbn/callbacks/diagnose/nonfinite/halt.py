"""`HaltOnNaN`: stop at the first NaN or Inf and say where it began."""

from __future__ import annotations

import collections
import contextlib
import math
import warnings
from pathlib import Path

import torch

from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelTrainException
from fastrbn.util import whole

from .replay import Batch, Outputs, locate
from .report import BUFFER, NonFiniteError, NonFiniteReport
from .state import Flags, KeptState, float_tensors, is_finite, late_device

_FULL = 32  # every 32nd look sees all modules' outputs: hooks on all of them cost a twelfth of a small CPU step
_WARY = 1e8  # from this norm of all parameters on, PyTorch's own layers may overflow: every look is a full one

_KEPT = 50  # losses, rates and norms in a report
# what belongs to one fit, outside of it
_IDLE = dict.fromkeys(("_kept", "_outputs", "_flags", "_batch", "_suspect", "_hook"))
_IDLE.update(_looks=0, _halting=False)


class HaltOnNaN(Callback):
    """End the fit at the first NaN or Inf in the loss, a gradient, a parameter, a buffer or a module's output.

    Afterwards `.report` is a `NonFiniteReport` (None if all was well) and `run.stop_reason` its sentence. The gradients
    are cleared; parameters, buffers and optimiser state are those of the last look that found everything finite: with
    `every=1`, those the failing batch began with. Learning rates that are not finite get their last finite values. The
    cause is found by going through the batch once more; random states are then as if that had not happened.

    Parameters
    ----------
    every : int, default 1
        Look at every `every`-th training step and validation batch. A fault in between is found, and reported, at the
        next look. The default adds 7 to 8 % to the training step of the course's net on a CPU (batch 32).
    raise_error : bool, default False
        Raise `NonFiniteError` instead of ending the fit quietly.
    path : str or Path, optional
        Folder for `nan_report.txt`, `nan_report.json` and the batch, `nan_batch.pt` (`torch.load` gives a dictionary
        with `xb`, `yb`, `random`). It is created when needed. By default nothing is written.

    Raises
    ------
    ValueError
        If `every` is not a whole number of at least 1, or `path` is a file.

    Notes
    -----
    Modules whose code is not PyTorch's or this package's, and the prediction, are looked at in every look. PyTorch's
    own layers can only overflow, which nearly always shows in the loss or a gradient of the same step; theirs are
    looked at in every 32nd look, in the first batch of validation and, on a CPU, while weights are very large or
    anything is in half precision. On CUDA and XPU no step waits for the device: the halt comes some steps late, and the
    report is of the first bad step all the same. Steps that a GradScaler skips are no reason to halt. Buffers that hold
    NaN or Inf when the fit begins (masks of -inf) are ignored. More in docs/halt-on-nan.md.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[HaltOnNaN])
    >>> learn.model[1][0].weight.data[0] = float("nan")
    >>> run.fit(1, learn)
    >>> run.stop_reason
    "NaN or Inf in the forward pass of step 0 (epoch 0, batch 0), first in module '1.0'"
    >>> run.halt_on_nan.report.phase
    'forward'
    """

    _needs_opt = ("param_groups", "lr", "state")

    def __init__(self, every: int = 1, raise_error: bool = False, path: str | Path | None = None):
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise ValueError(f"path must be a folder for the report; {path} is a file: take another name")
        path = None if path is None else Path(path).absolute()  # also after a chdir
        self.every, self.raise_error, self.path = whole("every", every), raise_error, path
        self._clear()

    @property
    def name(self) -> str:
        """`halt_on_nan`, so that it is reachable as `run.halt_on_nan`."""
        return "halt_on_nan"

    def _clear(self):
        vars(self).update(_IDLE)
        self.report = None
        # (step, loss, rates), and (step, norm or tensors whose sum is its square); a late halt needs 16 more
        self._losses = collections.deque(maxlen=_KEPT + 16)
        self._norms = collections.deque(maxlen=_KEPT + 16)

    def begin_fit(self):
        run = self.run
        self._clear()
        self._flags = Flags(late_device(run.model))
        self._outputs = Outputs(run.model, stay=self.every == 1)
        self._kept = KeptState(run.model, run.opt, self._flags)
        self._kept.stale = run.resumed_from is not None  # the checkpoint's state comes after this
        hooked = next((o for o in (run.opt, run.learn.opt) if hasattr(o, "register_step_post_hook")), None)
        self._hook = hooked and hooked.register_step_post_hook(self._stepped)

    def begin_batch(self):
        run, kept, outputs, late = self.run, self._kept, self._outputs, self._late
        if kept is None:  # outside a fit
            return
        if (run.n_iter if run.in_train else run.iter) % self.every:
            self._batch = None
            return
        if kept.replaced():
            self._poll(wait=True)
            outputs.remove()
            self._outputs = outputs = Outputs(run.model, stay=self.every == 1)
            kept.follow()
        elif kept.stale:
            kept.save()
        self._batch = Batch.here(run, kept.host, outputs.counters(), late)
        full = self._looks % _FULL == 0 or (run.iter == 0 and not run.in_train)
        if late is None:
            full |= kept.half or kept.norm > _WARY or run._parts.forward(torch.is_autocast_enabled, "cpu")
        outputs.begin(full)
        self._looks += run.in_train

    def after_loss(self):
        run, batch = self.run, self._batch
        if self._kept is None:  # outside a fit
            return
        # in another loop it may stay unknown; in this package's, the loop will say what a loss must be
        loss = run.loss.detach() if isinstance(run.loss, torch.Tensor) else None
        if run.in_train:
            lrs = [lr.clone() if isinstance(lr := g["lr"], torch.Tensor) else lr for g in run.opt.param_groups]
            self._losses.append((run.n_iter, loss, lrs))
        if batch is None:
            return
        batch.xb, batch.yb, batch.loss = run.xb, run.yb, loss
        seen = [*self._outputs.take(), ("model", run.pred), ("loss", loss)]
        if bad := self._flags.see([(name, t) for name, value in seen for t in float_tensors(value)]):
            self._found(batch, "forward", bad)
        if self._late is not None and not run.in_train:
            self._flags.close(batch, self._late)
            self._poll()

    def _stepped(self, opt, args, kwargs):
        """The optimiser's own hook. A GradScaler that skips a step does not call it, or lets a fused optimiser skip."""
        if self._batch is not None:
            self._batch.stepped = getattr(opt, "found_inf", None) is None

    def after_step(self):
        if self._batch is not None:
            self._batch.stepped |= self._hook is None
            self._end_of_batch()

    def after_batch(self):
        run = self.run
        if self._halting or self._kept is None or not run.in_train:
            return
        if self._batch is not None:
            if self._late is None:  # a batch that was cut short may have left gradients to accumulate
                bad = self._kept.bad_grads()
                self._suspect = (self._suspect or (self._batch, "backward", bad)) if bad else None
            if not self._suspect:
                self._end_of_batch()
        if run.iters and run.iter + 1 == run.iters:
            self._poll(wait=True)  # what comes next reads or saves the model

    def begin_validate(self):
        self._poll(wait=True)

    def after_epoch(self):
        self._poll(wait=True)
        if self.every > 1 and self._kept is not None and not self._kept.advance():  # the last steps went unseen
            self._step_failed(Batch.here(self.run, self._kept.host, [], None))

    def after_fit(self):
        for hooks in (self._outputs, self._kept, self._hook):
            if hooks is not None:
                hooks.remove()
        if self._flags is not None and self._flags.open and not self._halting:
            run = self.run  # the fit was cut: the model is put right, but there is nothing left to halt
            with contextlib.suppress(CancelTrainException, NonFiniteError):
                self._poll(wait=True)
            if self.report is not None and self.report.sentence not in (run.stop_reason or ""):
                run.stop_reason = "; ".join(filter(None, [run.stop_reason, self.report.sentence]))
        self.load_state_dict(self._history())  # numbers from here on
        vars(self).update(_IDLE)

    def state_dict(self) -> dict:
        """The last losses, rates and norms. Waits for the device, and halts rather than let a bad state be saved."""
        self._poll(wait=True)
        return self._history()

    def load_state_dict(self, state: dict) -> None:
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(map(tuple, state["losses"]))
        self._norms.extend(map(tuple, state["norms"]))
        if self._kept is not None:
            self._kept.stale = True  # the model and the optimiser are loaded as well

    def _history(self):
        """The last losses, rates and norms as numbers. Waits for the device."""
        number = lambda x: None if x is None else float(torch.as_tensor(x).double().mean())
        losses = [(i, number(x), list(map(float, lrs))) for i, x, lrs in self._losses]
        norms = [(i, n if isinstance(n, float) else math.sqrt(sum(map(float, n)))) for i, n in self._norms]
        return {"losses": losses, "norms": norms}

    @property
    def _late(self):
        return None if self._flags is None else self._flags.late

    def _end_of_batch(self):
        batch, kept = self._batch, self._kept
        self._batch, grads = None, kept.grads() if batch.stepped else []
        if not kept.advance(batch, grads):
            if batch.stepped and (bad := kept.bad_grads()):  # the step has been taken on them
                if self.every > 1:
                    kept.restore()
                self._found(*(self._suspect or (batch, "backward", bad)))
            self._step_failed(batch)
        self._suspect = None  # if there was one, a GradScaler has found it too and skipped the step
        self._norms.append((batch.step, kept.squares))
        self._poll()

    def _step_failed(self, batch):
        name, kept = self._kept.not_finite()[0], self._kept
        if kept.is_buffer(name):  # a buffer changes in the forward pass
            self._halt(batch, "forward", name, BUFFER)
        if all(is_finite(p) for other, p in kept.params if other == name):
            self._halt(batch, "step", name, "the optimiser's state for it, not yet the parameter itself")
        self._halt(batch, "step", name)

    def _found(self, batch, phase, evidence):
        """Halt where the fault of `batch` began. `evidence`: names known to be bad."""
        self._halting = True  # for the replay
        self._halt(batch, *locate(self.run, self._kept, batch, phase, evidence, fresh=self.every == 1))

    def _poll(self, wait=False):
        """Halt if the device's flags tell of a bad batch."""
        if self._flags is not None and not self._halting and (batch := self._flags.first_bad(wait)) is not None:
            self._found(batch, None, [] if is_finite(batch.loss) else ["loss"])

    def _halt(self, batch, phase, where, note=""):
        """Put the state back, report, and end the fit."""
        self._halting, run, kept = True, self.run, self._kept
        if batch.in_train or kept.not_finite():
            kept.restore(batch.host)
        run.opt.zero_grad()
        history = self._history()
        lasts = [(loss, max(lrs)) for step, loss, lrs in history["losses"] if step <= batch.step][-_KEPT:]
        numbers = {"losses": [loss for loss, _ in lasts if loss is not None], "lrs": [lr for _, lr in lasts]}
        numbers["norms"] = [norm for step, norm in history["norms"] if step < batch.step][-_KEPT:]
        rates = [*numbers["lrs"][-1:], *(float(g["lr"]) for g in run.opt.param_groups)]  # may change after the loss
        if phase == "step" and not all(map(math.isfinite, rates)):
            note = "the learning rate is not finite"
        _make_finite(run.opt.param_groups, [lrs for _, _, lrs in history["losses"]])
        place = {"epoch": batch.epoch, "batch": batch.batch, "in_train": batch.in_train}
        found = {"phase": phase, "where": where, "note": note, "magnitudes": kept.magnitudes()}
        self.report = report = NonFiniteReport(step=batch.step, **place, **found, **numbers)
        if self.path is not None:
            try:
                states = [state for _, state in batch.random]
                report.save(self.path, {"xb": batch.xb, "yb": batch.yb, "random": states})
            except Exception as e:  # noqa: BLE001 - a full disk must not hide what was found
                warnings.warn(f"the report could not be written to {self.path}: {type(e).__name__}: {e}", stacklevel=2)
        raise NonFiniteError(report) if self.raise_error else CancelTrainException(report.sentence)

    def __getstate__(self):
        self.load_state_dict(self._history())
        return {**super().__getstate__(), **_IDLE}  # what belongs to a fit stays there

    def __repr__(self):
        path = "" if self.path is None else f", path={str(self.path)!r}"
        return f"HaltOnNaN(every={self.every}, raise_error={self.raise_error}{path})"


def _make_finite(groups, history):
    """Put the last finite rates of `history`, lists with one for each group, in the place of those that are not."""
    for i, group in enumerate(groups):
        lr, good = group["lr"], [lrs[i] for lrs in history if len(lrs) > i and math.isfinite(lrs[i])]
        if good and not math.isfinite(lr):
            group["lr"] = lr.fill_(good[-1]) if isinstance(lr, torch.Tensor) else good[-1]
