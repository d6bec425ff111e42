"""One batch over again, with hooks everywhere, and what that tells of where its first NaN or Inf came up."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing

import torch
from torch.nn.parameter import is_lazy

from fastrbn.learn.snapshot import RandomState

from .outputs import CONTAINERS, reachable
from .report import BUFFER, SPOILT
from .tensors import dense, float_tensors, is_finite


@dataclasses.dataclass(slots=True)
class Batch:
    """What it takes to go through a batch once more: its place, its tensors, and what its forward pass began with."""

    step: int
    epoch: int
    batch: int
    in_train: bool
    random: list  # (function, state) pairs
    counters: list  # (module, its plain attributes)
    autocast: tuple | None  # (device type, dtype)
    host: tuple  # `KeptState.host` before it
    xb: typing.Any = None
    yb: typing.Any = None
    loss: typing.Any = None
    graded: bool = False  # whether the gradients have been looked at
    stepped: bool = False  # whether the optimiser has begun its step

    @classmethod
    def here(cls, run, host, counters=(), device=None):
        """The batch that `run` is at; `device`: the accelerator whose generator counts too."""
        random, kind = [(torch.set_rng_state, torch.default_generator.get_state())], "cpu"
        if device is not None and (kind := device.type) != "cpu":
            module = getattr(torch, kind)
            random.append((functools.partial(module.set_rng_state, device=device), module.get_rng_state(device)))
        autocast, forward = None, run._parts.forward  # as the model is called, see Runner.claim
        if forward(torch.is_autocast_enabled, kind):
            autocast = (kind, forward(torch.get_autocast_dtype, kind))
        return cls(run.n_iter, run.epoch, run.iter, run.in_train, random, counters, autocast, host, run.xb, run.yb)


@dataclasses.dataclass
class Trace:
    """What a replay saw: names in the order in which their values came, and those that were not finite."""

    modules: list[str] = dataclasses.field(default_factory=list)
    params: list[str] = dataclasses.field(default_factory=list)
    bad: set[tuple[str, str]] = dataclasses.field(default_factory=set)  # (kind, name)
    note: str = ""

    def first(self, kind, evidence=()) -> str | None:
        """The first of `kind` that went, here or, by `evidence`, in the batch itself."""
        names = self.modules if kind == "module" else self.params
        return next((n for n in names if (kind, n) in self.bad or n in evidence), None)


def replay(run, batch, backward=False) -> Trace:
    """Go through `batch` again from its random state: forward, and `backward` when told to. Hooks of other callbacks
    are silent meanwhile. The random states and the run are afterwards as they were; the model's buffers and gradients
    are the caller's to put back."""
    trace, random = Trace(), RandomState()
    before = {k: getattr(run, k) for k in ("n_iter", "epoch", "iter", "in_train", "xb", "yb", "pred", "loss")}
    counters = [(m, {k: vars(m)[k] for k in old if k in vars(m)}) for m, old in batch.counters]
    modes = [(m, m.training) for m in run.model.modules()]
    try:
        if run.in_train != batch.in_train:
            run.model.train(batch.in_train)
        with _traced(run.model, trace), torch.set_grad_enabled(batch.in_train and backward):
            for m, old in batch.counters:
                vars(m).update(old)
            for restore, state in batch.random:
                restore(state)
            run.n_iter, run.epoch, run.iter, run.in_train = batch.step, batch.epoch, batch.batch, batch.in_train
            run.xb, run.yb = batch.xb, batch.yb
            _again(run, batch, backward, trace)
    except Exception as e:  # noqa: BLE001 - the report is made from what is known without the replay, and says so
        trace.note = f"going through the batch again failed: {type(e).__name__}: {e}"
    finally:
        vars(run).update(before)
        for m, training in modes:
            m.training = training
        for m, now in counters:
            vars(m).update(now)
        random.restore()
    return trace


def _again(run, batch, backward, trace):
    context = contextlib.nullcontext()
    if batch.autocast is not None:
        context = torch.autocast(batch.autocast[0], dtype=batch.autocast[1])
    # other ranks of a distributed run have not come here
    alone = run.model.alone() if hasattr(type(run.model), "alone") else contextlib.nullcontext(run.model)
    with alone as model:
        with context:
            run.pred = model(batch.xb)
            run.loss = run.loss_func(run.pred, batch.yb)
        if not all(map(is_finite, float_tensors(run.loss))):
            trace.bad.add(("loss", "loss"))
        if backward:
            run.loss.backward()


@contextlib.contextmanager
def _traced(model, trace):
    """Hooks that write into `trace`; those of other callbacks are off."""
    silenced = [(m, m._forward_hooks.copy()) for m in model.modules() if m._forward_hooks]
    handles = []
    try:
        for m, hooks in silenced:
            for number, hook in hooks.items():
                if _of_callbacks(hook):
                    del m._forward_hooks[number]
        for name, m in reachable(model):
            if not isinstance(m, CONTAINERS):
                handles.append(m.register_forward_hook(functools.partial(_note_output, trace, name or "model")))
        for name, p in model.named_parameters():
            if p.requires_grad and not is_lazy(p):
                handles.append(p.register_post_accumulate_grad_hook(functools.partial(_note_grad, trace, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for m, hooks in silenced:
            m._forward_hooks.clear()
            m._forward_hooks.update(hooks)


def _of_callbacks(hook) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.startswith("fastrbn.callbacks")


def _note_output(trace, name, module, args, output):
    trace.modules.append(name)
    if not all(map(is_finite, float_tensors(output))):
        trace.bad.add(("module", name))


def _note_grad(trace, name, p):
    trace.params.append(name)
    if not is_finite(dense(p.grad)):
        trace.bad.add(("param", name))


def first_now(run, kept, batch, phase, evidence, fresh) -> tuple[str, str, str]:
    """(phase, where, note) of the first value to go in the batch that is under way, whose `evidence` is the names that
    are known. `fresh`: what is kept is what the batch began with. Buffers and gradients are the caller's to put back."""
    if not all(map(is_finite, float_tensors(batch.xb))):
        return "forward", "input", ""
    spoilt = [name for name in kept.not_finite() if kept.is_buffer(name)] if batch.in_train and fresh else []
    if batch.in_train and fresh:
        kept.restore(kinds=("buffer",))
    run.opt.zero_grad()
    trace = replay(run, batch, backward=phase == "backward")
    if spoilt and not trace.bad and (name := _spoilt_first(trace, phase, evidence, spoilt)) is not None:
        return phase, name, SPOILT
    if (name := trace.first("module", evidence)) is not None:
        return "forward", name, trace.note
    if phase == "forward":
        return phase, evidence[0], trace.note
    name = trace.first("param", evidence) or evidence[0]
    owner = name.rpartition(".")[0]  # those of one module come together: the first as they are declared
    return phase, next(n for n in [*evidence, name] if n.rpartition(".")[0] == owner), trace.note


def _spoilt_first(trace, phase, evidence, spoilt) -> str | None:
    """The first of the `spoilt` buffers, unless the fault came before its layer, which then has only passed it on."""
    place = {name: i for i, name in enumerate(trace.modules)}
    buffers = [(place.get(_owner(name), -1), name) for name in spoilt]
    if phase == "forward":
        at, name = min(buffers)
        return name if all(place.get(n, at) >= at for n in evidence) else None
    at, name = max(buffers)  # the backward pass comes to the last layer first
    return name if all(place.get(_owner(n), at) <= at for n in evidence) else None


def _owner(name) -> str:
    return name.rpartition(".")[0] or "model"


def first_late(run, kept, batch) -> tuple[str, str, str]:
    """The same some steps later, of a batch that a device's flag has told of; `kept` is put back for it."""
    bad = kept.not_finite()
    kept.restore(batch.host)
    run.opt.zero_grad()
    if not all(map(is_finite, float_tensors(batch.xb))):
        return "forward", "input", ""
    trace = replay(run, batch, backward=batch.in_train)
    if (name := trace.first("module")) is not None:
        return "forward", name, trace.note
    if ("loss", "loss") in trace.bad:
        return "forward", "loss", trace.note
    if not is_finite(batch.loss):
        note = "going through the batch again did not show it: a loss function or a weight that was other just then"
        return "forward", "loss", trace.note or note
    if (name := next(filter(kept.is_buffer, kept.not_finite()), None)) is not None:
        return "forward", name, BUFFER
    if (name := trace.first("param")) is not None:
        return "backward", name, trace.note
    params = [name for name, _ in kept.params]
    where = next((name for name in params if name in bad), params[0])
    note = "going through the batch again did not show it; named is the first parameter found to be not finite later"
    return "step", where, trace.note or note
