"""A training step recorded as CUDA graphs: the forward pass with the loss, the backward pass, the optimiser's step.

A graph repeats launches with the addresses and the numbers that it was recorded with. So batches are copied into
tensors of its own, learning rates are read from tensors, and `Watched` tells when a recording has become stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastrbn.learn.optimiser import can_be_fused
from fastrbn.learn.snapshot import Snapshot
from fastrbn.util import apply_to, items_of

_WARM_UPS = 3  # passes before a recording, as in PyTorch's guide to CUDA graphs
_PLAIN = (bool, int, float, str, type(None))
_MODULES_OWN = set(vars(nn.Module()))  # what each module has
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Stale(Exception):
    """The step would not do the same as a graph; the message says why."""


class Recorder:
    """Records functions on a device as CUDA graphs that share their memory."""

    def __init__(self, device: torch.device):
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run the function on the stream of the recording. RuntimeError if it still waits for the device in the end."""
        outer, mode = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                for i in range(_WARM_UPS):
                    if i == _WARM_UPS - 1:  # the first passes choose algorithms and compile kernels
                        torch.cuda.set_sync_debug_mode("error")
                    function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            outer.wait_stream(self.stream)

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What the function returns, which gets its values from a replay, and the function that replays."""
        graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        # "thread_local": other threads, such as those that load data, may go on
        record = functools.partial(torch.cuda.graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with record(graph, pool=self.pool):
                out = function()
        except BaseException:
            # if a recording cannot even be ended, PyTorch leaves its stream, its memory and its random numbers in use
            torch.cuda.set_stream(outer)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            with contextlib.suppress(RuntimeError), record(torch.cuda.CUDAGraph()):
                torch.zeros((), device=self.device)  # with this recording generators end the one before (torch 2.11)
            raise
        return out, graph.replay


class RecordedStep:
    """A training step for batches of one kind: `forward`, `backward` and `update`.

    Parameters
    ----------
    evaluate : callable
        `evaluate(xb, yb)` returns prediction and loss.
    batch : (xb, yb)
        The first batch.
    watched : Watched
        The modules that `evaluate` calls.
    recorder : Recorder

    Raises
    ------
    Stale
        If a replay would not do the same as `evaluate`.
    """

    def __init__(self, evaluate: Callable[[Any, Any], tuple[Any, Tensor]], batch: Any, watched: Watched, recorder: Any):
        xb, yb = own = apply_to(batch, Tensor, lambda t: t.detach().clone())
        self._inputs, self._recorder = [*items_of(own, Tensor)], recorder

        @torch.enable_grad()
        def forward() -> tuple[Any, Tensor]:
            return evaluate(xb, yb)

        def both() -> None:
            watched.clear_grads()
            forward()[1].backward()

        grads = [(p, p.grad) for p in watched.params]  # a callback may have kept some from a step
        with Snapshot(watched.roots, parameters=False):  # the passes here are none of the training's
            try:
                before, versions = _host_random(), [t._version for t in self._inputs]
                recorder.warm_up(both)
                if before != _host_random():
                    raise Stale("the model draws random numbers on the host")
                if changed := watched.changed_by_forward():
                    raise Stale(f"the forward pass {changed}")
                if versions != [t._version for t in self._inputs]:
                    raise Stale("the forward pass changes its inputs")
                if any(p.grad is not None and p.grad.is_sparse for p in watched.params):
                    raise Stale("gradients are sparse")
                watched.clear_grads()  # so that the pass makes new ones
                (pred, loss), self._forward = recorder.record(forward)
                kind(pred)
                _, self._backward = recorder.record(loss.backward)
                self._grads = [(p, p.grad) for p in watched.params if p.grad is not None]
            finally:
                watched.put_back()
                for p, grad in grads:
                    p.grad = grad
        self._outputs = apply_to((pred, loss), Tensor, Tensor.detach)
        self._lent = [grad.detach() for _, grad in self._grads]  # callbacks may set their .data
        self._update: RecordedUpdate | None = None
        self._ready = False  # for the recording of the optimiser's step

    @torch.no_grad()
    def forward(self, batch: Any) -> tuple[Any, Tensor]:
        """Prediction and loss for a batch, as copies that can be kept."""
        for own, given in zip(self._inputs, items_of(batch, Tensor), strict=True):
            own.copy_(given)
        self._forward()
        return apply_to(self._outputs, Tensor, Tensor.clone)

    @torch.no_grad()
    def backward(self) -> None:
        """Add the gradients of the last forward pass to those that the parameters have."""
        kept = [None if p.grad is None else p.grad.clone() for p, _ in self._grads]  # by a callback, from the step
        self._backward()
        for i, ((p, grad), before) in enumerate(zip(self._grads, kept, strict=True)):
            if before is not None:
                grad.add_(before)
            if self._lent[i].data_ptr() != grad.data_ptr():
                self._lent[i] = grad.detach()
            p.grad = self._lent[i]

    @torch.no_grad()
    def update(self, opt: torch.optim.Optimizer) -> bool:
        """Take the optimiser's step with the gradients that the parameters have. False: it has to be called as usual.

        Raises
        ------
        Stale
            If the step cannot be recorded.
        """
        _check_recordable(opt)
        moved = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
        if not {id(p) for p, _ in self._grads}.issuperset(map(id, moved)):
            return False
        for p, grad in self._grads:
            if p.grad is not None and p.grad.data_ptr() != grad.data_ptr():  # a callback has replaced it
                grad.copy_(p.grad)
        if self._update is None and self._ready:
            self._update = RecordedUpdate(opt, moved, self._grads, self._recorder)
        self._ready = True  # the first step is an ordinary one: it may create the optimiser's state
        return self._update is not None and self._update.replay(opt, moved)


class RecordedUpdate:
    """An optimiser's step, which reads the learning rates from tensors; param groups keep their numbers.

    Parameters
    ----------
    opt : torch.optim.Optimizer
    moved : list of nn.Parameter
        Those of its parameters that have gradients.
    grads : list of (nn.Parameter, Tensor)
        The memory that a replay reads the gradients from.
    recorder : Recorder

    Raises
    ------
    Stale
        If the step cannot be recorded.
    """

    def __init__(self, opt: torch.optim.Optimizer, moved: list[Any], grads: list[tuple[Any, Tensor]], recorder: Any):
        sgd = type(opt) is torch.optim.SGD and can_be_fused(moved)
        if not (sgd or all(group.get("fused") or group.get("capturable") for group in opt.param_groups)):
            raise Stale(f"make {type(opt).__name__} with fused=True (SGD, Adam, AdamW) or capturable=True")
        self._settings, self._state = _settings(opt), _state(opt, moved)
        self._addresses = [p.data_ptr() for p in moved]
        self._rates = [torch.zeros((), device=recorder.device) for _ in opt.param_groups]
        self._values: list[Any] = [None] * len(self._rates)
        before = [dict(group) for group in opt.param_groups]
        hooks, lent = opt._optimizer_step_post_hooks.copy(), [(p, p.grad) for p, _ in grads]
        state = {p: dict(state) for p, state in opt.state.items()}
        try:
            opt._optimizer_step_post_hooks.clear()  # a replay calls them
            for p, grad in grads:
                p.grad = None if p.grad is None else grad
            for group, rate in zip(opt.param_groups, self._rates, strict=True):
                group["lr"] = rate
                if sgd:  # only its fused form reads the rate from a tensor
                    group.update(fused=True, foreach=False)
                if "capturable" in group:
                    group["capturable"] = True  # as each fused step is
            _, self._replay = recorder.record(opt.step)
        except Exception as e:
            raise Stale(in_words(e)) from e
        finally:
            opt._optimizer_step_post_hooks.update(hooks)
            for p, shown in lent:
                p.grad = shown
            for now, then in zip(opt.param_groups, before, strict=True):
                now.update(then)
            made = not _same(_state(opt, moved), self._state)
            if made:  # by the recording, which computes nothing
                opt.state.clear()
                opt.state.update(state)
        if made:
            raise Stale("its state was cleared before the recording")

    def replay(self, opt: torch.optim.Optimizer, moved: list[Any]) -> bool:
        """Take the step. False if the optimiser has other settings or another state than in the recording."""
        if not (
            _same(_settings(opt), self._settings) and _same(_state(opt, moved), self._state)
        ) or self._addresses != [p.data_ptr() for p in moved]:
            return False
        for i, (group, rate) in enumerate(zip(opt.param_groups, self._rates, strict=True)):
            value = group["lr"]
            if isinstance(value, Tensor):
                rate.copy_(value)
            elif value != self._values[i]:
                rate.fill_(value)
                self._values[i] = value
        self._replay()
        for hook in opt._optimizer_step_post_hooks.values():
            hook(opt, (), {})
        return True


class Watched:
    """What recordings depend on in a model and a loss function: tensors, attributes, hooks, what is trained."""

    def __init__(self, roots: list[Any]):
        others = [root for root in roots if not isinstance(root, nn.Module) and getattr(root, "__dict__", None)]
        self.roots: list[nn.Module] = []
        found = [*roots, *(v for root in others for t in (vars(root), *_mutable(vars(root))) for v in _items(t))]
        for value in found:  # modules in lists are none of their owner's children
            if isinstance(value, nn.Module) and not any(value is m for root in self.roots for m in root.modules()):
                self.roots.append(value)
                found += [
                    v for m in value.modules() for t in _mutable(vars(m), outside=_MODULES_OWN) for v in _items(t)
                ]
        self._modules = [*_named_modules(self.roots)]
        self._tables: list[tuple[str, Any]] = []  # dictionaries and lists that hold attributes, with their owners
        for name, m in self._modules:
            self._tables += [(name, m._parameters), (name, m._buffers), (name, m._modules), (name, vars(m))]
            self._tables += [(name, v) for v in _mutable(vars(m), outside=_MODULES_OWN)]
        for root in others:
            self._tables += [(type(root).__name__, v) for v in (vars(root), *_mutable(vars(root)))]
        self._before = [table.copy() for _, table in self._tables]
        self._views = [_items(table) for _, table in self._tables]  # they follow changes
        self._values = [*itertools.chain(*self._views)]
        self._hook_tables = [getattr(m, kind) for _, m in self._modules for kind in _HOOKS]
        self.tensors = [*{id(v): v for v in self._values if isinstance(v, Tensor)}.values()]
        self.params = [t for t in self.tensors if isinstance(t, nn.Parameter)]
        self._addresses, self._trained, self._hooks = self._read_addresses(), self._read_trained(), self._read_hooks()

    def clear_grads(self) -> None:
        """Leave the parameters without gradients."""
        for p in self.params:
            p.grad = None

    def left_out(self) -> str | None:
        """What a replay would leave out, in words: a hook, or random numbers."""
        for name, m in self._modules:
            if any(_counts(hook) for kind in _HOOKS for hook in getattr(m, kind).values()):
                return f"a hook on {name}"
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.params):
            return "a hook on a parameter"
        if _has_any_global_hook():
            return "a hook on all modules"
        for value in self._values:
            if isinstance(value, (random.Random, torch.Generator)) or hasattr(value, "bit_generator"):
                return f"random numbers of a {type(value).__name__}"
        return None

    def changed_by_forward(self) -> str | None:
        """The change that a pass has made and a replay would not make, in words."""
        computed = {(name, key) for name, m in self._modules for key in _computed(m)}
        for (owner, table), then in zip(self._tables, self._before, strict=True):
            if not isinstance(table, dict):
                if not _same([*table], [*then]):
                    return f"changes a {type(table).__name__}, an attribute of {owner}"
                continue
            for key in [key for key in {**then, **table} if (owner, key) not in computed]:
                old, new = then.get(key, self), table.get(key, self)
                if old is not new and isinstance(old, Tensor):
                    return f"replaces the tensor '{key}' instead of changing it in place"
                if not _equal(old, new):
                    return f"changes '{key}', an attribute of {owner}"
        return None

    def put_back(self) -> None:
        """Undo what passes have done to lists and dictionaries."""
        for (_, table), then in zip(self._tables, self._before, strict=True):
            if not _same([*_items(table)], [*_items(then)]):
                table.clear()
                table.extend(then) if hasattr(table, "extend") else table.update(then)

    def stale(self) -> bool:
        """True if anything has changed. Quick, for each step."""
        return (
            not _same([*itertools.chain.from_iterable(self._views)], self._values)
            or self._read_addresses() != self._addresses
            or self._read_trained() != self._trained
            or self._read_hooks() != self._hooks
            or bool(_has_any_global_hook())
        )

    def _read_addresses(self) -> list[int]:
        return [t.data_ptr() for t in self.tensors]

    def _read_trained(self) -> list[bool]:
        return [p.requires_grad for p in self.params]

    def _read_hooks(self) -> list[Any]:
        tables = [*self._hook_tables, *(p._backward_hooks for p in self.params)]
        tables += [p._post_accumulate_grad_hooks for p in self.params]
        return [v for table in tables if table for v in table.values() if not getattr(v, "optional", False)]


def in_words(e: Exception) -> str:
    """An error in one line."""
    return f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"


def kind(value: Any) -> Any:
    """A key that is equal for batches which one recording serves. Stale if they hold what it cannot serve."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return value.shape, value.dtype, value.device, value.requires_grad
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), kind({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return tuple((k, kind(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(kind, value))
    if isinstance(value, _PLAIN):
        return type(value), value
    what = "sparse tensors" if isinstance(value, Tensor) else type(value).__name__
    raise Stale(f"batches and predictions may consist of tensors, numbers and strings in containers; got {what}")


def _named_modules(roots: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for root in roots:
        for name, m in root.named_modules():
            yield (f"module '{name}'" if name else type(root).__name__), m


def _items(table: Any) -> Any:
    return table.values() if isinstance(table, dict) else table


def _mutable(value: Any, outside: Any = ()) -> Iterator[Any]:
    """The lists, dictionaries and the like that a dictionary or list holds, at any depth."""
    inner = [v for k, v in value.items() if k not in outside] if isinstance(value, dict) else value
    for v in inner:
        if isinstance(v, (list, dict, set, deque)):
            yield v
            yield from _mutable(v)


def _counts(hook: Any) -> bool:
    """True unless a replay may leave the hook out, or does what it does."""
    return not getattr(hook, "optional", False) and not _is_recorded(hook)


def _is_recorded(hook: Any) -> bool:
    """True for hooks of torch.nn.utils, which compute weights, and for those that fix a norm's statistics."""
    return getattr(hook, "__module__", None) == "fastrbn.util" or type(hook).__module__.startswith("torch.nn.")


def _computed(m: nn.Module) -> list[Any]:
    """The attributes that hooks of torch.nn.utils set in each pass."""
    hooks = [hook for hook in m._forward_pre_hooks.values() if _is_recorded(hook)]
    return [getattr(hook, key) for hook in hooks for key in ("name", "_tensor_name") if hasattr(hook, key)]


def _host_random() -> tuple[Any, ...]:
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else ()
    return random.getstate(), torch.get_rng_state().tolist(), [v.tolist() if hasattr(v, "tolist") else v for v in numpy]


def _check_recordable(opt: Any) -> None:
    """Stale if the optimiser's step may be more than PyTorch's own code."""
    patched = "step" in vars(opt) and not hasattr(opt.step, "_wrapped_by_lr_sched")
    if not type(opt).__module__.startswith("torch.optim.") or patched:
        raise Stale(f"only PyTorch's own optimisers are recorded; this {type(opt).__name__} has a step of its own")
    if opt._optimizer_step_pre_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        raise Stale("a replay would leave out a hook before the step, or on all optimisers")


def _settings(opt: torch.optim.Optimizer) -> list[Any]:
    return [v for group in opt.param_groups for k, v in group.items() if k not in ("params", "lr")]


def _state(opt: torch.optim.Optimizer, moved: list[Any]) -> list[Any]:
    return [opt, *moved, *(v for state in opt.state.values() for v in state.values())]


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and (all(map(operator.is_, some, others)) or all(map(_equal, some, others)))


def _equal(a: Any, b: Any) -> bool:
    """True for the same object, and for equal numbers and strings, also in tuples."""
    if a is b or type(a) is not type(b):
        return a is b
    return len(a) == len(b) and all(map(_equal, a, b)) if isinstance(a, tuple) else isinstance(a, _PLAIN) and a == b
