"""`KeptState`: the last finite state of a model and its optimiser. `Flags`: whether something was not finite."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastrbn.util import apply_to, items_of

from ..flat import in_memory, room_for

Key = tuple[str, ...]  # ("param", name), ("buffer", name), ("state", parameter's name, key)
_OPEN, _OPEN_BYTES = 16, 2**28  # most batches, and memory for them, that wait for the device's answer; two in any case


def float_tensors(value: Any) -> list[Tensor]:
    """The non-empty floating-point and complex tensors in nested lists, tuples and dictionaries."""
    return [t for t in items_of(value, Tensor) if (t.is_floating_point() or t.is_complex()) and t.numel()]


def is_finite(value: Any) -> bool:
    """Whether all tensors in `value` are finite. Waits for the device."""
    return all(bool(torch.isfinite(t.detach()).all()) for t in float_tensors(value))


def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [name for name, t in named if not is_finite(t)]


def dense(grad: Tensor) -> Tensor:
    """The values of a gradient that may be sparse."""
    return grad if grad.layout is torch.strided else grad.coalesce().values()


def late_device(model: nn.Module) -> torch.device | None:
    """The device of the whole model if its flags are read late (CUDA, XPU), else None."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    return next((d for d in devices if len(devices) == 1 and d.type in ("cuda", "xpu")), None)


class Flags:
    """Flags raised by NaN or Inf, read at once (`raised`) or, on the device `late`, some steps later (`first_bad`)."""

    LAG = 0  # on the CPU an answer arrives after this many batches; tests use it to act as a GPU

    def __init__(self, late: torch.device | None):
        self.late, self._most = late, _OPEN
        self.open: list[tuple[Any, Tensor]] = []  # batches and their flags, oldest first
        self._asked: tuple[int, Tensor, Any] | None = None  # number of batches, their flags on the host, event
        self._flags: dict[torch.device, tuple[Tensor, Tensor]] = {}  # a flag and a one on each device

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._flags:
            self._flags[device] = torch.zeros((), device=device), torch.ones((), device=device)
        return self._flags[device]

    @torch.no_grad()
    def add(self, tensors: list[Tensor]) -> None:
        """Raise the flag if a value is not finite. Values are multiplied by 1 in place, as GradScaler does it."""
        kinds = set(zip(map(_device, tensors), map(_dtype, tensors)))
        for device, dtype in kinds:
            same = tensors if len(kinds) == 1 else [t for t in tensors if (t.device, t.dtype) == (device, dtype)]
            same = [torch.view_as_real(t) for t in same] if dtype.is_complex else same
            try:
                torch._amp_foreach_non_finite_check_and_unscale_(same, *self._on(device))  # one pass over all of them
            except RuntimeError:  # a gradient that cannot be written to, such as an expanded one
                torch._amp_foreach_non_finite_check_and_unscale_([t.clone() for t in same], *self._on(device))

    def see(self, named: list[tuple[str, Tensor]]) -> list[str]:
        """Read tensors that must not be written to. Returns those not finite, unless flags are read late."""
        tensors = [t.detach() for _, t in named]
        if self.late is not None and tensors:
            self.add([norm.to(self.late) for norm in torch._foreach_norm(tensors, math.inf)])
        elif not all(math.isfinite(abs((t if t.dim() == 0 else t.sum(dtype=_wide(t))).item())) for t in tensors):
            return not_finite(named)  # nothing if only a sum has overflowed
        return []

    def raised(self) -> bool:
        """Whether something was not finite since the last call. Waits for the device."""
        found = any([flag.item() for flag, _ in self._flags.values()])
        for flag, _ in self._flags.values() if found else ():
            flag.zero_()
        return found

    def close(self, batch: Any, device: torch.device) -> Tensor:
        """Note the flag of `batch`. Returns it, a bool tensor on the device: True from the first bad batch on."""
        if not self.open:
            size = sum(t.nbytes for t in float_tensors([batch.xb, batch.yb]))
            self._most = max(2, min(_OPEN, _OPEN_BYTES // max(size, 1)))
        self.open.append((batch, self._on(device)[0] > 0))
        return self.open[-1][1]

    def first_bad(self, wait: bool = False) -> Any:
        """The first batch known to be bad, or None. Waits only if `wait` or if too many batches are open."""
        while self.open:
            n = len(self.open)
            if self._asked is None and (wait or n >= self._most // 2):
                self._asked = self._ask(torch.stack([flag for _, flag in self.open]))
            if self._asked is None:
                return None
            asked, flags, event = self._asked
            if not (wait or n >= self._most or (n >= asked + self.LAG if event is None else event.query())):
                return None
            if event is not None:
                event.synchronize()
            self._asked = None
            if True in (found := flags.tolist()):
                return self.open[found.index(True)][0]
            del self.open[:asked]
        return None

    def _ask(self, flags: Tensor) -> tuple[int, Tensor, Any]:
        kind = flags.device.type
        host = torch.empty(len(flags), dtype=torch.bool, pin_memory=kind != "cpu").copy_(flags, non_blocking=True)
        event = None if kind == "cpu" else getattr(torch, kind).Event()
        if event is not None:
            event.record()
        return len(flags), host, event


class Copy:
    """Room for a copy of tensors: a vector for each dtype, device and kind, and a view for each tensor."""

    def __init__(self, tensors: Sequence[Tensor], kinds: Sequence[str]):
        groups: dict[Any, list[int]] = {}
        for i, (t, kind) in enumerate(zip(tensors, kinds)):
            groups.setdefault((t.device, t.dtype, kind), []).append(i)
        self.views: list[Tensor] = list(tensors)
        self.flats: dict[tuple, Tensor] = {}
        self.members = groups
        for key, members in groups.items():
            self.flats[key], views = room_for([tensors[i].detach() for i in members], key[1])
            for i, view in zip(members, views):
                self.views[i] = view
        self.others = [flat for (_, _, kind), flat in self.flats.items() if kind == "other"]
        self.params = [flat for (_, _, kind), flat in self.flats.items() if kind == "param"]


class KeptState:
    """The parameters, buffers and optimiser state of the last step that was found finite.

    Kept without a look are buffers that hold NaN or Inf at the start (masks of -inf), and tensors of the optimiser
    whose shape is not their parameter's. A lazy module's tensors are kept as soon as it has made them. `host` is the
    part of the kept state that is not on the device of late flags, and what of the optimiser's state is no tensor.
    """

    def __init__(self, model: nn.Module, opt: Any, flags: Flags):
        self._model, self._opt, self._flags = model, opt, flags
        self._keys: list[Key] = []
        self._tensors: list[Tensor] = []
        self._sources: dict | None = None  # their memory as vectors where it has no gaps, for each part of a copy
        self._now: list = []  # all live values
        self._others: list = []  # those that are no dense tensors
        self._memory: Any = None
        self._spare: Copy | None = None
        self.squares: list[Tensor] = []  # their sum is the square of the parameters' norm
        self._exempt: set[Key] = set()
        self._layout: Any = None
        self._saved: Any = None  # a layout and a copy
        self._made: dict[Key, Tensor] = {}  # what lazy modules have made
        self._hooks: dict[nn.Module, Any] = {}  # on those that will
        self.follow()

    def follow(self) -> None:
        """Take the model's modules and parameters as they are now."""
        known = set(self._keys)
        self._memory = None
        self.params = list(self._model.named_parameters())
        self._params = [p for _, p in self.params]
        self.half = any(p.dtype is torch.float16 for _, p in self.params)
        self._modules = dict(self._model.named_modules())
        self._buffers = [m._buffers for m in self._modules.values()]
        self._tables = [t for m in self._modules.values() for t in (m._parameters, m._modules)]
        self.parts = self._in_tables()
        self._look_up()
        self._exempt |= {key for key in self._bad() if key not in known}
        self._memory, self._layout = None, None  # what is exempt is of another kind
        self.remove()
        for m in self._modules.values():
            if any(map(is_lazy, (*m._parameters.values(), *m._buffers.values()))):
                self._hooks[m] = m.register_forward_pre_hook(ModelHook(self._take_made))  # after the module's own
        self.save()

    def replaced(self) -> bool:
        """Whether a module or parameter is no longer the one it was."""
        return self._in_tables() != self.parts

    def _in_tables(self):
        return list(map(id, itertools.chain.from_iterable(map(dict.values, self._tables))))

    def _take_made(self, module, args):
        self._hooks.pop(module).remove()
        self._look_up()
        known = {*self._saved[0][0], *self._made}
        self._made.update((k, t.detach().clone()) for k, t in zip(self._keys, self._tensors) if k not in known)

    def remove(self) -> None:
        """Remove the hooks of lazy modules that were never called."""
        while self._hooks:
            self._hooks.popitem()[1].remove()

    def _look_up(self) -> None:
        """Bring the list of live tensors up to date. `_layout` stays the same object until the list changes."""
        now, states = self._params.copy(), getattr(self._opt, "state", {})
        for buffers in self._buffers:
            now += buffers.values()
        for state in states.values():
            now += state.values()
        same = len(now) == len(self._now) and all(map(operator.is_, now, self._now))
        if same and self._memory == self._in_memory() and not any(map(_dense, self._others)):
            return
        self._keys, self._kinds = self._names(now, states)
        self._tensors, self._others = [t for t in now if _dense(t)], [t for t in now if not _dense(t)]
        self._now, self._memory = now, self._in_memory()
        self._sources = None
        layout = self._keys, [(t.shape, t.stride(), t.dtype) for t in self._tensors]
        if layout != self._layout:
            self._layout, self._spare = layout, None

    def _in_memory(self):
        return list(map(Tensor.data_ptr, self._tensors)), list(map(Tensor.numel, self._tensors))

    def _names(self, now: list, states: dict) -> tuple[list[Key], list[str]]:
        """Keys of the dense tensors, and their kinds: a parameter, "other" that is examined too, or "" that is not."""
        names = {p: name for name, p in self.params}
        keys: list[Key] = [("param", name) for name, _ in self.params]
        keys += [("buffer", f"{n}.{name}".lstrip(".")) for n, m in self._modules.items() for name in m._buffers]
        self._owners = {names.get(p, f"? {i}"): p for i, p in enumerate(states)}
        keys += [("state", name, k) for name, p in self._owners.items() for k in states[p]]
        kinds = {}
        for key, t in zip(keys, now):
            if _dense(t):
                fits = key[0] != "state" or getattr(self._owners[key[1]], "shape", None) == t.shape
                kinds[key] = "" if key in self._exempt or not fits or not float_tensors(t) else key[0]
        return list(kinds), ["other" if kind in ("buffer", "state") else kind for kind in kinds.values()]

    def _bad(self):
        return [k for k, t, kind in zip(self._keys, self._tensors, self._kinds) if kind and not is_finite(t)]

    def not_finite(self) -> list[str]:
        """The names of live tensors that hold NaN or Inf; last, for the optimiser's state, those of its parameters."""
        self._look_up()
        return [key[1] for key in sorted(self._bad(), key=lambda key: key[0] == "state")]

    @property
    def norm(self) -> float:
        """The L2 norm of all parameters after the last look. Waits for the device."""
        return math.sqrt(sum(square.item() for square in self.squares))

    def is_buffer(self, name: str) -> bool:
        return ("buffer", name) in self._keys

    def grads(self) -> list[Tensor]:
        """The values of all gradients there are."""
        return [g if g.layout is torch.strided else dense(g) for g in map(_grad, self._params) if g is not None]

    def bad_grads(self) -> list[str]:
        """The parameters whose gradients hold NaN or Inf."""
        return not_finite([(name, dense(p.grad)) for name, p in self.params if p.grad is not None])

    def magnitudes(self) -> dict[str, float]:
        """The largest absolute value of each parameter."""
        return {name: p.detach().abs().max().item() for name, p in self.params if _dense(p) and p.numel()}

    def _copied(self) -> Copy:
        self._look_up()
        copy = self._spare = self._spare or Copy(self._tensors, self._kinds)
        if self._sources is None:
            vectors = [(in_memory(t), t) for t in self._tensors]
            self._sources = {key: [vectors[i] for i in members] for key, members in copy.members.items()}
        for key, sources in self._sources.items():
            torch.cat([t.reshape(-1) if vector is None else vector for vector, t in sources], out=copy.flats[key])
        return copy

    @torch.no_grad()
    def save(self) -> None:
        """Keep the live state, whatever it holds."""
        self._keep(self._copied())
        self.squares, self.stale = [], False

    @torch.no_grad()
    def advance(self, batch: Any = None, grads: Sequence[Tensor] = ()) -> bool:
        """Keep the live state if it and `grads` are finite, and return whether they are.

        Where flags are read late, the device decides whether to keep it after `batch`, and True means nothing yet.
        """
        copy, late = self._copied(), self._flags.late
        self.squares = [_square(flat) for flat in copy.params]
        if late is None or batch is None:
            self._flags.add([*grads, *copy.others, *self.squares])
            # a square that has overflowed is no fault
            if self._flags.raised() and (self._bad() or not is_finite(list(grads))):
                return False
            self._keep(copy)
            return True
        self._flags.add([*grads, *(flat for flat in (*copy.params, *copy.others) if flat.device == late)])
        bad = self._flags.close(batch, late)
        if self._saved[0] is self._layout:
            for key, old in self._saved[1].flats.items():
                if old.device == late:
                    torch.where(bad, old, copy.flats[key], out=old)
                else:
                    old.copy_(copy.flats[key])
            self.host = self._on_host()
        elif self._flags.first_bad(wait=True) is None:
            self._keep(copy)
        return True

    def _keep(self, copy):
        before, self._saved, self._made = self._saved, (self._layout, copy), {}
        self._spare = before[1] if before is not None and before[0] is self._layout else None
        self.host = self._on_host()

    def _on_host(self):
        flats = [flat for flat in self._saved[1].flats.values() if self._flags.late not in (None, flat.device)]
        states = self._opt.state.items() if self._others and hasattr(self._opt, "state") else ()
        plain = [(p, k, v) for p, s in states for k, v in s.items() if not _dense(v)]
        plain = [(p, k, apply_to(v, Tensor, Tensor.clone)) for p, k, v in plain]
        return plain, [(flat, flat.clone()) for flat in flats]

    @torch.no_grad()
    def restore(self, host: Any = None, kinds: Sequence[str] = ("param", "buffer", "state")) -> None:
        """Put back what is kept. `host`: `self.host` as it was at the time, if that is not the last one."""
        plain, flats = self.host if host is None else host
        for flat, value in flats:
            flat.copy_(value)
        (keys, *_), copy = self._saved
        saved = {**self._made, **dict(zip(keys, copy.views))}
        self._look_up()
        live = dict(zip(self._keys, self._tensors))
        for key, value in saved.items():
            if key[0] not in kinds:
                continue
            t = live.get(key)
            if t is not None and t.shape == value.shape and 0 not in t.stride():  # expanded memory cannot be written to
                t.copy_(value)
            elif t is not None:
                t.data = value.clone()
            elif key[0] == "buffer":
                prefix, _, name = key[1].rpartition(".")
                self._modules[prefix]._buffers[name] = value.clone()
        if "state" in kinds and hasattr(self._opt, "state"):
            for name, p in self._owners.items():  # what the optimiser has made since goes
                state = {k: v for k, v in self._opt.state[p].items() if ("state", name, k) in saved}
                state.update((k, v) for q, k, v in plain if q is p)
                self._opt.state[p] = state
                if not state:
                    del self._opt.state[p]


class ModelHook:
    """A hook on a module of the model. A copy of the model takes a copy of it that does nothing."""

    optional = True  # a CUDA graph may leave it out

    def __init__(self, function=None):
        self.function = function

    def __call__(self, *args):
        if self.function is not None:
            self.function(*args)

    def __reduce__(self):
        return ModelHook, ()


_dtype, _device, _grad = map(operator.attrgetter, ("dtype", "device", "grad"))


def _dense(value) -> bool:
    """Whether it is a tensor that can be copied value by value: initialised and not sparse."""
    return isinstance(value, Tensor) and not is_lazy(value) and value.layout is torch.strided


def _wide(t) -> torch.dtype | None:
    return torch.float32 if t.element_size() < 4 else None


def _square(flat) -> Tensor:
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    return torch.dot(flat, flat) if _wide(flat) is None else flat.float().square().sum()
