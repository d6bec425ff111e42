"""The first NaN or Inf: stop there, say where it came up, and leave a model that can be looked at."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import optim

from fastrbn.learn.callback import Callback
from fastrbn.learn.events import CancelTrainException

from .late import LateLooks, late_device
from .outputs import Outputs
from .replay import Batch, first_late, first_now
from .report import BUFFER, History, NonFiniteError, NonFiniteReport
from .state import KeptState, bad_rate
from .tensors import dense, float_tensors, is_finite, not_finite, number, number_finite, sums_finite

__all__ = ["HaltOnNaN", "NonFiniteError", "NonFiniteReport"]

_FULL = 32  # every so many looks all modules' outputs are looked at: a full look costs a twelfth of a small CPU step
_WARY = 1e8  # from this norm of all parameters on, sums in well-known layers may overflow: every look is a full one
_HALF_ON_CPU = ("cpu", torch.float16)  # autocast to it
# optimisers that make a parameter NaN or Inf when its gradient is: there the parameters tell of both
_SHOWING = (optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adagrad, optim.RMSprop, optim.Adamax)

# what belongs to one fit, while there is none
_IDLE = dict.fromkeys(("_kept", "_outputs", "_late", "_batch", "_suspect", "_hook"))
_IDLE.update(_looks=0, _showing=False, _halting=False)


class HaltOnNaN(Callback):
    """Ends the fit at the first NaN or Inf in the loss, a gradient, a parameter, a buffer or a module's output.

    - `every`: look at each `every`-th training step and validation batch. With more than 1, what comes up between is
      found at the next look, and is reported there.
    - `raise_error`: raise `NonFiniteError` instead of ending the fit quietly.
    - `path`: a folder, made when needed, for `nan_report.txt`, `nan_report.json` and the batch itself, `nan_batch.pt`
      (`torch.load` gives a dictionary with `xb`, `yb`, `random`). Default None: nothing is written.

    Afterwards `.report` is a `NonFiniteReport` (None when all was well), `run.stop_reason` its sentence, the gradients
    are cleared, and parameters, buffers and the optimiser's state are those after the last look that found all finite:
    with `every=1` as the failing batch found them. What was at fault is found by going through the batch once more;
    random states are afterwards as if that had not been.

    Outputs of modules are looked at in every look where the module's code is not PyTorch's or this package's. Those
    layers can only overflow, which nearly always reaches the loss, a gradient or the statistics of a norm in the same
    step; their outputs themselves are looked at in every 32nd look, in the first batch of validation, and in each look
    while parameters are half precision or very large. The model's prediction is looked at in every look. An output is
    looked at when the loss is there: where the next module has changed it in place, it is the changed one that counts.
    Modules that are compiled are not looked into.

    On CUDA and XPU no step waits for the device: it keeps its own copy of the last finite state, and the halt comes
    some steps late, at the latest with the epoch's training batches; the report tells of the first bad step all the
    same. Batches stay in memory until then, 16 at most. On other accelerators, and for a model on several devices,
    each look waits.

    Gradients count when the optimiser's step begins: steps that a GradScaler skips are no reason to halt, nor are those
    of a fused optimiser that skips by itself. Under gradient accumulation the report names the batch that brought the
    fault. Lazy modules are watched from their first batch on, and modules or parameters that replace others within the
    fit from the next batch on. Buffers that hold NaN or Inf when the fit begins (masks of -inf) are let be.

    Costs two copies of parameters, buffers and optimiser state, on their device; one where C looks and copies (CPUs).
    """

    _needs_opt = ("param_groups", "lr", "state")

    def __init__(self, every=1, raise_error=False, path=None):
        if isinstance(every, bool) or not (isinstance(every, int) and every >= 1):
            raise ValueError(f"every must be a whole number, 1 or more; got {every!r}")
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise ValueError(f"path must be a folder for the report; {path} is a file: take another name")
        path = None if path is None else Path(path).absolute()  # also after a chdir
        self.every, self.raise_error, self.path, self.report = every, raise_error, path, None
        self._history = History()
        vars(self).update(_IDLE)

    @property
    def name(self) -> str:
        return "halt_on_nan"

    # What happens in a fit

    def begin_fit(self):
        run = self.run
        vars(self).update(_IDLE)
        self.report, self._history = None, History()
        device = late_device(run.model)
        self._late = LateLooks(device) if device is not None else None
        self._outputs = Outputs(run.model, stay=self.every == 1)
        self._kept = KeptState(run.model, run.opt, device)
        hooked = self._hooked()
        self._hook = hooked and hooked.register_step_pre_hook(self._before_step)
        self._showing = self._shows()

    def _hooked(self):
        run = self.run
        return next((o for o in (run.opt, run.learn.opt) if hasattr(o, "register_step_pre_hook")), None)

    def _shows(self):
        """Whether each bad gradient becomes a bad parameter."""
        stepped = {p for g in self.run.opt.param_groups for p in g["params"]}
        return type(self._hooked()) in _SHOWING and all(p in stepped for _, p in self._kept.params if p.requires_grad)

    def _follow(self):
        """Modules or parameters were replaced."""
        self._poll(wait=True)
        self._outputs.remove()
        self._outputs = Outputs(self.run.model, stay=self.every == 1)
        self._kept.follow()
        self._showing = self._shows()

    def begin_batch(self):
        run, kept = self.run, self._kept
        if kept is None:  # outside a fit
            return
        if (run.n_iter if run.in_train else run.iter) % self.every:
            self._batch = None
            return
        if kept.replaced():
            self._follow()
        elif kept.stale:
            kept.save()
        late, outputs, own = self._late, self._outputs, vars(self)  # setting attributes of a callback has its price
        own["_batch"] = batch = Batch.here(run, kept.host, outputs.counters(), late and late.device)
        wary = late is None and (kept.half or kept.norm > _WARY or batch.autocast == _HALF_ON_CPU)
        outputs.begin(full=wary or self._looks % _FULL == 0 or (run.iter == 0 and not run.in_train))
        own["_looks"] += run.in_train

    def after_loss(self):
        run, batch = self.run, self._batch
        if self._kept is None or not isinstance(run.loss, torch.Tensor):
            return  # outside a fit; or the loop will say what a loss must be
        loss = number(run.loss)
        if run.in_train:
            self._history.add_loss(run.n_iter, loss, [g["lr"] for g in run.opt.param_groups])
        if batch is None:
            return
        batch.xb, batch.yb = run.xb, run.yb
        found = [(name, t) for name, out in self._outputs.take() for t in float_tensors(out)]
        found += [("model", t) for t in float_tensors(run.pred)]
        if self._late is not None:
            batch.loss = run.loss.detach()
            if self._late.note_forward(batch, [t for _, t in found]):
                self._poll()
        elif number_finite(loss) and sums_finite([t for _, t in found]):
            return
        elif bad := not_finite([*found, ("loss", run.loss.detach())]):
            self._found(batch, "forward", bad)

    def after_backward(self):
        if not self._showing:
            self._look_at_grads()
        if self._suspect and self._hook is None:  # an optimiser that is not PyTorch's says nothing when it steps
            self._found(self._suspect[0], "backward", self._suspect[1])

    def _before_step(self, opt, args, kwargs):
        """The optimiser's own hook: what skips its step, skips this."""
        batch = self._batch
        if batch is None or self._halting:
            return
        batch.stepped = True
        if (where := bad_rate(self.run.opt, self._kept.params)) is not None:
            self._poll(wait=True)  # an earlier step may be to blame
            self._halt(batch, "step", where, "the learning rate is not finite")
        if getattr(opt, "found_inf", None) is not None:
            self._suspect = None  # a fused optimiser under a GradScaler looks itself, and skips
        elif self._late is not None:
            self._late.note_grads(batch, [g for _, g in self._grads()])
        else:
            if self._suspect or not (batch.graded or self._showing):
                self._look_at_grads()
            if self._suspect:
                self._found(self._suspect[0], "backward", self._suspect[1])

    def after_step(self):
        if self._suspect and self._hook is not None and not (self._batch and self._batch.stepped):
            self._suspect = None  # a GradScaler has found it too, and skipped the step
        self._end_of_batch()

    def after_batch(self):
        if self._halting or not self.run.in_train:
            return
        if self._batch is not None:
            if not self._batch.graded:
                self._look_at_grads()  # a batch that was cut short may have left some to accumulate
            self._end_of_batch()
        if self._late is not None and self.run.iters and self.run.iter + 1 == self.run.iters:
            self._poll(wait=True)  # what comes next reads or saves the model

    def begin_validate(self):
        self._poll(wait=True)

    def after_epoch(self):
        self._poll(wait=True)
        if self.every > 1 and self._kept is not None and (bad := self._kept.advance()):  # the last steps went unseen
            self._halt(Batch.here(self.run, self._kept.host), *self._state_phase(bad))

    def after_fit(self):
        for hooks in (self._outputs, self._kept, self._hook):
            if hooks is not None:
                hooks.remove()
        if self._late is not None and self._late.waiting and not self._halting:
            self._last_look()
        self._history.load_state_dict(self._history.state_dict())  # numbers from here on
        vars(self).update(_IDLE)

    def state_dict(self):
        """The last losses, rates and norms. Waits for the device, and halts rather than have a bad state saved."""
        self._poll(wait=True)
        return self._history.state_dict()

    def load_state_dict(self, state):
        self._history.load_state_dict(state)
        if self._kept is not None:
            self._kept.stale = True  # the model and the optimiser are loaded as well

    # Looking, where the host may wait

    def _grads(self):
        return [(name, dense(p.grad)) for name, p in self._kept.params if p.grad is not None]

    def _look_at_grads(self):
        if self._batch is None or self._late is not None:
            return
        self._batch.graded = True
        bad = not_finite(self._grads())
        self._suspect = (self._suspect or (self._batch, bad)) if bad else None

    def _end_of_batch(self):
        batch = self._batch
        if batch is None or self._suspect:
            return
        vars(self)["_batch"] = None
        if self._late is not None:
            self._history.add_norm(batch.step, self._late.advance(batch, self._kept))
            self._poll()
        elif bad := self._kept.advance():
            if batch.stepped and (grads := not_finite(self._grads())):
                # the step has been taken on them; of buffers it still matters which are bad
                self._kept.restore(kinds=("param", "state") if self.every == 1 else ("param", "buffer", "state"))
                self._found(batch, "backward", grads)
            self._halt(batch, *self._state_phase(bad))
        else:
            self._history.add_norm(batch.step, self._kept.norm)

    def _state_phase(self, bad):
        if self._kept.is_buffer(bad[0]):  # a buffer changes in the forward pass
            return "forward", bad[0], BUFFER
        finite = all(is_finite(p) for name, p in self._kept.params if name == bad[0])
        return "step", bad[0], "the optimiser's state for it, not yet the parameter itself" if finite else ""

    # Looking, where the device takes notes

    def _poll(self, wait=False):
        if self._late is not None and not self._halting and (batch := self._late.first_bad(wait)) is not None:
            self._halting = True
            self._halt(batch, *first_late(self.run, self._kept, batch))

    def _last_look(self):
        """After a fit that was cut: the model is put right, but there is nothing left to halt."""
        run = self.run
        try:
            self._poll(wait=True)
        except (CancelTrainException, NonFiniteError):
            pass  # the report is made
        if self.report is not None and self.report.sentence not in (run.stop_reason or ""):
            run.stop_reason = "; ".join(filter(None, [run.stop_reason, self.report.sentence]))

    # Halting

    def _found(self, batch, phase, evidence):
        """Find out where it began in the batch that is under way, and halt there. `evidence`: names that are known."""
        self._halting = True
        self._halt(batch, *first_now(self.run, self._kept, batch, phase, evidence, fresh=self.every == 1))

    def _halt(self, batch, phase, where, note=""):
        """Put the state back, report, and end the fit."""
        self._halting, run, kept = True, self.run, self._kept
        if batch.in_train or kept.not_finite():
            kept.restore(batch.host if self._late is not None else None)
        run.opt.zero_grad()
        self.report = report = NonFiniteReport(
            step=batch.step,
            epoch=batch.epoch,
            batch=batch.batch,
            phase=phase,
            where=where,
            magnitudes=kept.magnitudes(),
            in_train=batch.in_train,
            note=note,
            **self._history.upto(batch.step),
        )
        self._save(report, batch)
        if run.stop_reason is None:
            run.stop_reason = report.sentence  # the optimiser's hook is no event, for which the run would do it
        raise NonFiniteError(report) if self.raise_error else CancelTrainException(report.sentence)

    def _save(self, report, batch):
        if self.path is None:
            return
        try:
            states = [state for _, state in batch.random]
            report.save(self.path, {"xb": batch.xb, "yb": batch.yb, "random": states})
        except Exception as e:  # noqa: BLE001 - a full disk must not hide what was found
            warnings.warn(f"the report could not be written to {self.path}: {type(e).__name__}: {e}", stacklevel=2)

    def __getstate__(self):
        # what belongs to a fit stays there
        return {**super().__getstate__(), **_IDLE}

    def __repr__(self):
        path = "" if self.path is None else f", path={str(self.path)!r}"
        return f"HaltOnNaN(every={self.every}, raise_error={self.raise_error}{path})"
