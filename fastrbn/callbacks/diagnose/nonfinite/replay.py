"""Hooks that see what modules return, and a second pass through a batch that finds where its first NaN or Inf began."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from fastrbn.learn.snapshot import RandomState

from .report import BUFFER, SPOILT, UNSEEN
from .state import KeptState, ModelHook, dense, is_finite

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # their output is that of a module inside
_LOST = "going through the batch again did not show it"


class Outputs:
    """Forward hooks that keep the outputs of modules until the loss is known.

    In every look those of modules whose code is not known. PyTorch's own layers and this package's can only overflow,
    and hooks on all of them cost more than all the rest: theirs are kept in a full look. `stay`: leave the hooks in
    place between looks.
    """

    def __init__(self, model: nn.Module, stay: bool = True):
        hooks = [(m, ModelHook(functools.partial(self._keep, name or "model"))) for name, m in modules_of(model)]
        # the model's own output is run.pred
        self._always = [(m, h) for m, h in hooks if m is not model and not _well_known(m)]
        self._all, self._between = hooks, self._always if stay else []
        self._counting = [m for m in model.modules() if not _well_known(m)]
        self._key = RemovableHandle(OrderedDict()).id  # a number that no other hook has
        self._hooked: list = []
        self._seen: list[tuple[str, Any]] | None = None

    def counters(self) -> list:
        """Numbers and switches in modules whose code is not known: a replay puts them back."""
        return [(m, {k: v for k, v in vars(m).items() if type(v) in (bool, int, float)}) for m in self._counting]

    def begin(self, full: bool = False) -> None:
        """Keep the outputs of the coming forward pass, of all modules if `full`."""
        self._seen = []
        self._hook(self._all if full else self._always)

    def take(self) -> list[tuple[str, Any]]:
        """The names and outputs in the order of the calls; they are kept no longer."""
        seen, self._seen = self._seen or [], None
        self._hook(self._between)
        return seen

    def remove(self) -> None:
        """Remove all hooks."""
        self._seen = None
        self._hook([])

    def _hook(self, hooks):
        """Have these hooks and no others. A handle for each would cost more than what it does."""
        if hooks is not self._hooked:
            for module, _ in self._hooked:
                module._forward_hooks.pop(self._key, None)
            for module, hook in hooks:
                module._forward_hooks[self._key] = hook
            self._hooked = hooks

    def _keep(self, name, module, args, output):
        if self._seen is not None and not torch.compiler.is_compiling():
            self._seen.append((name, output))


def _well_known(module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    homes = [type(module).__module__]
    if callable(func := vars(module).get("func")):  # a module around somebody's function
        homes.append(getattr(func, "__module__", None) or "")
    return all(home.startswith(("torch.nn.", "fastrbn.")) for home in homes)


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`named_modules` without containers and without what is compiled."""
    named, compiled = list(model.named_modules()), []
    for name, m in named:
        if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None:
            compiled.append(f"{name}.".lstrip("."))
    found = [(name, m) for name, m in named if not isinstance(m, _CONTAINERS)]
    return [(name, m) for name, m in found if not f"{name}.".startswith(tuple(compiled))]


@dataclasses.dataclass(slots=True)
class Batch:
    """What it takes to go through a batch a second time: its place, its tensors, and the state it began with."""

    step: int
    epoch: int | None
    batch: int
    in_train: bool
    xb: Any
    yb: Any
    host: Any  # `KeptState.host` before it
    counters: list  # (module, its plain attributes)
    random: list  # (function, state) pairs
    form: str  # how the model takes `xb`
    loss: Any = None
    stepped: bool = False  # whether the optimiser has taken its step

    @classmethod
    def here(cls, run: Any, host: Any, counters: list, device: torch.device | None) -> Batch:
        """The batch that `run` is at; `device`: the accelerator whose generator counts too."""
        random = [(torch.set_rng_state, torch.default_generator.get_state())]
        if device is not None and device.type != "cpu":
            module = getattr(torch, device.type)
            random.append((functools.partial(module.set_rng_state, device=device), module.get_rng_state(device)))
        return cls(
            run.n_iter, run.epoch, run.iter, run.in_train, run.xb, run.yb, host, counters, random, run._unpack.form
        )


class Trace:
    """What a replay saw: `seen` has (kind, name) in the order of the values, `bad` those that were not finite."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.bad: set[tuple[str, str]] = set()
        self.note = ""

    def see(self, kind: str, name: str, value: Any) -> None:
        self.seen.append((kind, name))
        if not is_finite(value):
            self.bad.add((kind, name))

    def first(self, kind: str, evidence: list[str]) -> str | None:
        """The first name of `kind` whose value was bad here or, by `evidence`, in the batch itself."""
        return next((n for k, n in self.seen if k == kind and ((k, n) in self.bad or n in evidence)), None)


def replay(run: Any, batch: Batch, backward: bool = False) -> Trace:
    """Go through `batch` again from its random state: forward, and `backward` if wanted.

    Hooks of other callbacks are off meanwhile. Random states and the run are afterwards as they were; buffers and
    gradients are not.
    """
    trace, random = Trace(), RandomState()
    before = {k: getattr(run, k) for k in ("n_iter", "epoch", "iter", "in_train", "xb", "yb", "pred", "loss")}
    plain = [(m, {k: vars(m)[k] for k in old if k in vars(m)}) for m, old in batch.counters]
    plain += [(m, {"training": m.training}) for m in run.model.modules()]
    # other ranks of a distributed run do not come here
    alone = run.model.alone() if hasattr(type(run.model), "alone") else contextlib.nullcontext(run.model)
    try:
        if run.in_train != batch.in_train:
            run.model.train(batch.in_train)
        with _traced(run.model, trace), torch.set_grad_enabled(backward), alone as model:
            for m, old in batch.counters:
                vars(m).update(old)
            for restore, state in batch.random:
                restore(state)
            run.n_iter, run.epoch, run.iter, run.in_train = batch.step, batch.epoch, batch.batch, batch.in_train
            run.xb, run.yb = batch.xb, batch.yb
            forward, unpack = run._parts.forward, run._unpack
            unpack.form = batch.form
            run.pred = unpack.call_model(model, batch.xb, forward)
            run.loss = unpack.call_loss(run.loss_func, run.pred, batch.yb, forward)
            trace.see("loss", "loss", run.loss)
            if backward:
                run.loss.backward()
    except Exception as e:  # noqa: BLE001 - the report is made from what is known without the replay, and says so
        trace.note = f"going through the batch again failed: {type(e).__name__}: {e}"
    finally:
        vars(run).update(before)
        for m, old in plain:
            vars(m).update(old)
        random.restore()
    return trace


@contextlib.contextmanager
def _traced(model, trace):
    """Hooks that write into `trace`; those of other callbacks are off."""
    hooks = [(m, m._forward_hooks.copy()) for m in model.modules()]
    handles = []
    try:
        for m, own in hooks:
            for key in (key for key, hook in own.items() if _of_callbacks(hook)):
                del m._forward_hooks[key]
        for name, m in modules_of(model):
            m.register_forward_hook(lambda m, args, out, name=name or "model": trace.see("module", name, out))
        for name, p in model.named_parameters():
            if p.requires_grad and not is_lazy(p):
                see = lambda p, name=name: trace.see("param", name, dense(p.grad))
                handles.append(p.register_post_accumulate_grad_hook(see))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for m, own in hooks:
            m._forward_hooks.clear()
            m._forward_hooks.update(own)


def _of_callbacks(hook) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or type(hook).__module__).startswith("fastrbn.callbacks")


def locate(
    run: Any, kept: KeptState, batch: Batch, phase: str | None, evidence: list[str], fresh: bool
) -> tuple[str, str, str]:
    """The phase, the name and a note for the first value of `batch` that is not finite.

    `phase` and `evidence`: when the fault was found in the batch itself, in which phase and by which names. `phase` is
    None if it was found some steps later. `fresh`: what is kept is what the batch began with; it is put back.
    """
    before, late = kept.not_finite(), phase is None
    if late:
        kept.restore(batch.host)
    elif fresh and batch.in_train:  # in the forward pass parameters have not changed, unless they are the fault
        kept.restore(kinds=("buffer",) if phase == "forward" else ("param", "buffer", "state"))
    run.opt.zero_grad()
    if not is_finite(batch.xb):
        return "forward", "input", ""
    trace = replay(run, batch, backward=batch.in_train and phase != "forward")
    if phase is not None and fresh and batch.in_train and not trace.bad:
        spoilt = _first_spoilt(trace, phase, evidence, [name for name in before if kept.is_buffer(name)])
        if spoilt is not None:
            return phase, spoilt, SPOILT
    if (name := trace.first("module", evidence)) is not None:
        return "forward", name, trace.note
    if batch.loss is None and ("loss", "loss") in trace.bad:
        return "backward", "loss", UNSEEN
    if late and (name := trace.first("loss", evidence)) is not None:
        lost = f"{_LOST}: a loss function or a weight that was other just then"
        return "forward", name, trace.note or ("" if ("loss", name) in trace.bad else lost)
    if phase == "forward":
        return phase, evidence[0], trace.note
    if late and (name := next(filter(kept.is_buffer, kept.not_finite()), None)) is not None:
        return "forward", name, BUFFER
    if (name := trace.first("param", evidence)) is not None:
        # a module's gradients come together: its first parameter as declared
        return "backward", next(n for n in (*evidence, name) if _owner(n) == _owner(name)), trace.note
    if late:
        params = [name for name, _ in kept.params]
        where = next((name for name in params if name in before), params[0])
        return "step", where, trace.note or f"{_LOST}; named is the first parameter found to be not finite later"
    return "backward", evidence[0], trace.note


def _first_spoilt(trace, phase, evidence, spoilt) -> str | None:
    """The first of the `spoilt` buffers, unless the fault came before its layer, which then only passed it on."""
    order = [name for kind, name in trace.seen if kind == "module"]
    # backward, the last layer comes first
    order, absent = (order, -1) if phase == "forward" else (order[::-1], len(order))
    place = {name: i for i, name in enumerate(order)}
    at, name = min(((place.get(_owner(name), absent), name) for name in spoilt), default=(-1, None))
    owners = evidence if phase == "forward" else map(_owner, evidence)
    return name if all(place.get(owner, at) >= at for owner in owners) else None


def _owner(name) -> str:
    return name.rpartition(".")[0] or "model"
