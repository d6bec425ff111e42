"""The running average of the weights, and of the statistics that go with them."""

from __future__ import annotations

import warnings

import torch

from fastrbn.learn.callback import Callback
from fastrbn.learn.snapshot import load_plain_state_dict, plain_name

_STATISTICS = frozenset({"running_mean", "running_var"})


class EMA(Callback):
    """Averages the weights over the steps and validates with the averages.

    - `decay`: the share of the old average that stays in each step, 0 to 1: 0.999 averages over some 1000 steps.
    - `warmup`: begin with less: min(decay, (1 + t)/(10 + t)) in update t, so that the first weights are soon forgotten
      and short fits have an average too. False: `decay` from the start, as `torch.optim.swa_utils` has it.
    - `keep`: leave the averages in the model when the fit has come to its end or was ended by a callback. After an
      error or Ctrl-C the model has the trained weights, to go on from.

    `SaveBest` saves the averages, `Checkpoint` the trained weights and the averages. From the first validation batch
    until `after_epoch` the model's parameters hold the averages; the trained ones are put back then, also when the fit is
    cut. The `running_mean` and `running_var` of norms are averaged in the same way, since averaged weights with the
    statistics of the trained ones evaluate worse: in an MLP on MNIST by 0.3 to 1 % of accuracy. Averaged ones were as
    good as those of a pass over the data (`recompute_statistics`). Other buffers are the model's own throughout.

    `.weights` is a state_dict with the averages, a copy; `.put()` leaves them in the model after the fit; `.updates`
    counts. A fit begins anew. Averages of half-precision weights are kept in float32. Costs one copy of what is
    averaged, a second one during validation. On CUDA `HaltOnNaN` halts some steps late: weights that had gone NaN by then are in
    the averages too; then they are not kept, with a warning.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the warm-up is
    TensorFlow's `ExponentialMovingAverage(num_updates=…)`.
    """

    def __init__(self, decay=0.999, warmup=True, keep=False):
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise ValueError(f"EMA: decay is the share of the old average, 0 or more and below 1; got {decay!r}")
        for name, value in (("warmup", warmup), ("keep", keep)):
            if not isinstance(value, bool):
                raise ValueError(f"EMA: {name} is True or False; got {value!r}")
        self.decay, self.warmup, self.keep = float(decay), warmup, keep
        self._clear()

    def _clear(self):
        self._params, self._norms, self._averages, self._trained = [], [], {}, None
        self._due = self._ended = False
        self.updates = 0

    def begin_fit(self):
        self._clear()
        model = self.run.learn.model
        named = [(plain_name(n), p) for n, p in model.named_parameters()]
        self._params = [(n, p) for n, p in named if p.is_floating_point() or p.is_complex()]
        norms = [(plain_name(n), m) for n, m in model.named_modules()]
        self._norms = [(n, m) for n, m in norms if not _STATISTICS.isdisjoint(m._buffers)]
        self.run.averaged = self._so_far  # SaveBest saves it

    def _live(self) -> dict:
        """The parameters and statistics that are averaged, by name; buffers may be other objects in each step."""
        statistics = ((n, m._buffers, s) for n, m in self._norms for s in m._buffers if s in _STATISTICS)
        found = {f"{n}.{s}".lstrip("."): buffers[s] for n, buffers, s in statistics if buffers[s] is not None}
        return {**dict(self._params), **found}

    def after_step(self):
        self._due = True

    def begin_batch(self):
        if not self.run.in_train and self._trained is None:  # not in begin_validate: others look at the weights there
            self._lend()

    def after_batch(self):
        if self._due:  # only now: HaltOnNaN has taken back a step that went wrong
            self._update()

    def after_epoch(self):
        self._put_back()

    def begin_epoch(self):
        self._put_back()  # after_epoch was cancelled by another

    def after_cancel_train(self):
        self._ended = True

    def after_fit(self):
        self._put_back()
        if self.keep and self._averages and (self._ended or self.run.stop_reason is None):
            if all(bool(a.isfinite().all()) for a in self._averages.values()):
                self._copy_in()
            else:
                warnings.warn("EMA: the averages hold NaN or Inf; the model keeps the trained weights", stacklevel=2)
        self._params, self._norms = [], []

    @torch.no_grad()
    def _update(self):
        self._due = False
        now = {name: _wide(t.detach()) for name, t in self._live().items()}
        known = [name for name in now if name in self._averages]
        if known:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
            torch._foreach_lerp_([self._averages[n] for n in known], [now[n] for n in known], 1 - decay)
        self._averages.update({name: now[name].clone() for name in now if name not in self._averages})
        self.updates += 1

    @torch.no_grad()
    def _lend(self):
        if self._due:
            self._update()
        if self._averages:
            self._trained = [(t, t.detach().clone()) for t in self._live().values()]
            self._copy_in()

    @torch.no_grad()
    def _copy_in(self):
        for name, t in self._live().items():
            t.copy_(self._averages[name])

    @torch.no_grad()
    def _put_back(self):
        if self._trained is not None:
            trained, self._trained = self._trained, None
            for p, value in trained:
                p.copy_(value)

    @property
    def weights(self) -> dict:
        """The model's state_dict, copied, with the averages as parameters, under the names that they have without
        torch.compile. ValueError before the first step."""
        self._need_averages()
        return self._so_far()

    def _so_far(self) -> dict:
        model = self.run.learn.model
        named = [(plain_name(name), t) for name, t in (*model.named_parameters(), *model.named_buffers())]
        averages = {id(t): self._averages[name] for name, t in named if name in self._averages}
        state = {}
        for name, value in model.state_dict(keep_vars=True).items():  # shared weights come more than once
            average = averages.get(id(value))
            state[plain_name(name)] = _copied(value) if average is None else average.to(value.dtype, copy=True)
        return state

    def put(self) -> None:
        """Put the averages into the model, for good. After the fit: within it that would change the training."""
        self._need_averages()
        if self.run._fitting:
            raise RuntimeError("EMA.put is for after the fit; within it, EMA(keep=True) has them stay at its end")
        load_plain_state_dict(self.run.learn.model, self.weights)

    def _need_averages(self):
        if not self._averages:
            raise ValueError("EMA has no averages before the first step of a fit: call run.fit first")

    def state_dict(self):
        return {"averages": dict(self._averages), "updates": self.updates}

    def load_state_dict(self, state):
        where = {name: t.device for name, t in self._live().items()}
        averages = {plain_name(name): a for name, a in state["averages"].items()}
        self._averages = {name: a.to(where[name], copy=True) for name, a in averages.items()}
        self.updates, self._due = state["updates"], False

    def __getstate__(self):
        return {**super().__getstate__(), "_params": [], "_norms": [], "_trained": None, "_due": False, "_ended": False}

    def __repr__(self):
        return f"EMA(decay={self.decay}, warmup={self.warmup}, keep={self.keep})"


def _wide(p):
    return p.float() if p.dtype in (torch.float16, torch.bfloat16) else p


def _copied(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
