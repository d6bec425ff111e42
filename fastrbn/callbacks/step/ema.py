"""Exponential moving averages of the weights, and of the norms' statistics that belong to them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fastrbn.learn.callback import Callback
from fastrbn.learn.snapshot import load_plain_state_dict, plain_name

_STATISTICS = frozenset({"running_mean", "running_var"})


class EMA(Callback):
    """Average the weights over the steps, and validate with the averages.

    From the first validation batch until `after_epoch` the model holds the averages; then the trained weights are put
    back, also when the fit is cut short. `SaveBest` saves the averages, `Checkpoint` saves both. After the fit
    `run.validate` and `run.predict` use the trained weights, until `put` or `keep` has replaced them.

    The `running_mean` and `running_var` of norms are averaged in the same way, because averaged weights evaluate worse
    with the statistics of the trained ones: by 0.3 to 1 % of accuracy for an MLP on MNIST. Averaged statistics were as
    good as those of a pass over the data (`recompute_statistics`). Other buffers are not averaged.

    Averages of half-precision weights are kept in float32. The memory cost is one copy of what is averaged, and a
    second one during validation. Each fit starts new averages. `.updates` counts the steps in them.

    On CUDA, `HaltOnNaN` halts some steps late, so NaN weights may have entered the averages; then `keep` leaves the
    trained weights in the model, with a warning.

    Parameters
    ----------
    decay : float, default 0.999
        Share of the old average that stays in each step, 0 or more and below 1. 0.999 averages over about 1000 steps.
    warmup : bool, default True
        Use min(decay, (1 + t)/(10 + t)) in update t, so that the first weights are soon forgotten and short fits have a
        useful average. False uses `decay` from the start, as `torch.optim.swa_utils` does.
    keep : bool, default False
        Leave the averages in the model when the fit ends or a callback ends it. After an error or Ctrl-C the model
        keeps the trained weights, so that training can go on from them.

    Raises
    ------
    ValueError
        If `decay` is out of range, or `warmup` or `keep` is not a bool.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[EMA])
    >>> run.fit(1, learn)
    >>> run.ema.updates == len(data.train_dl)
    True
    >>> run.ema.weights.keys() == learn.model.state_dict().keys()
    True
    >>> run.ema.put()   # leaves the averages in the model

    References
    ----------
    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the warm-up is that of
    TensorFlow's `ExponentialMovingAverage(num_updates=…)`.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True, keep: bool = False):
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be a share of the old average, 0 or more and below 1; got {decay!r}")
        for name, value in (("warmup", warmup), ("keep", keep)):
            if not isinstance(value, bool):
                raise ValueError(f"EMA: {name} must be True or False; got {value!r}")
        self.decay, self.warmup, self.keep = float(decay), warmup, keep
        self._clear()

    def _clear(self) -> None:
        self._params: list[tuple[str, nn.Parameter]] = []
        self._norms: list[tuple[str, nn.Module]] = []
        self._averages: dict[str, torch.Tensor] = {}
        self._trained: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._due = self._ended = False
        self.updates = 0

    def begin_fit(self) -> None:
        self._clear()
        model = self.run.learn.model
        named = [(plain_name(n), p) for n, p in model.named_parameters()]
        self._params = [(n, p) for n, p in named if p.is_floating_point() or p.is_complex()]
        norms = [(plain_name(n), m) for n, m in model.named_modules()]
        self._norms = [(n, m) for n, m in norms if not _STATISTICS.isdisjoint(m._buffers)]
        self.run.averaged = self._so_far  # SaveBest saves this

    def _live(self) -> dict[str, torch.Tensor]:
        """The tensors that are averaged, by name. Looked up at each use, since modules may replace buffers."""
        statistics = ((n, m._buffers, s) for n, m in self._norms for s in m._buffers if s in _STATISTICS)
        found = {f"{n}.{s}".lstrip("."): b for n, buffers, s in statistics if (b := buffers[s]) is not None}
        return {**dict(self._params), **found}

    def after_step(self) -> None:
        self._due = True

    def begin_batch(self) -> None:
        # not in begin_validate, where other callbacks look at the weights
        if not self.run.in_train and self._trained is None:
            self._lend()

    def after_batch(self) -> None:
        if self._due:  # not in after_step: HaltOnNaN may undo the step first
            self._update()

    def after_epoch(self) -> None:
        self._put_back()

    def begin_epoch(self) -> None:
        self._put_back()  # in case another callback cancelled after_epoch

    def after_cancel_train(self) -> None:
        self._ended = True

    def after_fit(self) -> None:
        self._put_back()
        if self.keep and self._averages and (self._ended or self.run.stop_reason is None):
            if all(bool(a.isfinite().all()) for a in self._averages.values()):
                self._copy_in()
            else:
                warnings.warn("EMA: the averages contain NaN or Inf; the model keeps the trained weights", stacklevel=2)
        self._params, self._norms = [], []

    @torch.no_grad()
    def _update(self) -> None:
        self._due = False
        now = {name: _wide(t.detach()) for name, t in self._live().items()}
        known = [name for name in now if name in self._averages]
        if known:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
            torch._foreach_lerp_([self._averages[n] for n in known], [now[n] for n in known], 1 - decay)
        self._averages.update({name: now[name].clone() for name in now if name not in self._averages})
        self.updates += 1

    @torch.no_grad()
    def _lend(self) -> None:
        if self._due:
            self._update()
        if self._averages:
            self._trained = [(t, t.detach().clone()) for t in self._live().values()]
            self._copy_in()

    @torch.no_grad()
    def _copy_in(self) -> None:
        for name, t in self._live().items():
            t.copy_(self._averages[name])

    @torch.no_grad()
    def _put_back(self) -> None:
        if self._trained is not None:
            trained, self._trained = self._trained, None
            for p, value in trained:
                p.copy_(value)

    @property
    def weights(self) -> dict[str, Any]:
        """A copy of the model's state_dict with the averages in it, under the names without torch.compile.

        ValueError before the first step.
        """
        self._need_averages()
        return self._so_far()

    def _so_far(self) -> dict[str, Any]:
        model = self.run.learn.model
        named = [(plain_name(name), t) for name, t in (*model.named_parameters(), *model.named_buffers())]
        averages = {id(t): self._averages[name] for name, t in named if name in self._averages}
        state = {}
        for name, value in model.state_dict(keep_vars=True).items():  # shared weights occur more than once
            average = averages.get(id(value))
            if average is not None:
                value = average.to(value.dtype, copy=True)
            elif isinstance(value, torch.Tensor):
                value = value.detach().clone()
            state[plain_name(name)] = value
        return state

    def put(self) -> None:
        """Put the averages into the model for good. RuntimeError during a fit, ValueError before the first step."""
        self._need_averages()
        if self.run._fitting:
            raise RuntimeError("EMA.put is for use after the fit; to keep the averages at its end, use EMA(keep=True)")
        load_plain_state_dict(self.run.learn.model, self.weights)

    def _need_averages(self) -> None:
        if not self._averages:
            raise ValueError("EMA has no averages before the first step of a fit; call run.fit first")

    def state_dict(self) -> dict:
        return {"averages": dict(self._averages), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        where = {name: t.device for name, t in self._live().items()}
        averages = {plain_name(name): a for name, a in state["averages"].items()}
        self._averages = {name: a.to(where[name], copy=True) for name, a in averages.items()}
        self.updates, self._due = state["updates"], False

    def __getstate__(self):
        return {**super().__getstate__(), "_params": [], "_norms": [], "_trained": None, "_due": False, "_ended": False}

    def __repr__(self):
        return f"EMA(decay={self.decay}, warmup={self.warmup}, keep={self.keep})"


def _wide(p: torch.Tensor) -> torch.Tensor:
    return p.float() if p.dtype in (torch.float16, torch.bfloat16) else p
