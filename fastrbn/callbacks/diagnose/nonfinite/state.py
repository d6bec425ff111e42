"""All that a training step changes, copied after every step for a few operators' worth of time.

On the CPU one call of C tells whether it is finite, and one more copies it. Else parameters, buffers and the optimiser's
tensors of one dtype and device are seen as flat vectors, so that one `torch.cat` copies them all, and one reduction over
the copy tells.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch.nn.parameter import is_lazy

from .layout import Layout
from .native import known_finite
from .tensors import is_finite


class KeptState:
    """The state of `model` and `opt` after the last step that was found finite.

    - `advance()`: copy the state as it is now; when it is finite, keep the copy. Returns the names that are not.
    - `advance_unless(flags)`: the same on a device, where `flags` (`DeviceFlags`) decide without the host knowing.
    - `restore(host)`: put back what is kept.
    - `follow()`: take the model's modules and parameters as they are now, when some were `replaced()`.
    - `remove()`: take the hooks off lazy modules that were never called.

    `device`: where `flags` are; tensors elsewhere (an optimiser's counters) are copied for each step, in `host`.

    Buffers that hold NaN or Inf when this is made (masks of -inf) are kept, and let be. Of the optimiser's state those
    tensors are examined that have their parameter's shape: what else there is may mean anything.

    A lazy module's parameters and buffers are kept as soon as the module has made them, before it uses them.
    """

    def __init__(self, model, opt, device=None):
        self._model, self._opt, self._device = model, opt, device
        self._exempt, self._entries, self._layout, self._saved = set(), [], None, None
        self._fresh, self._hooks = {}, []  # of lazy modules: what they have made, and hooks on those that will
        self.norm, self.host = 0.0, ({}, [])
        self.follow()

    # What there is

    def follow(self) -> None:
        self.params = list(self._model.named_parameters())
        self._names = {p: name for name, p in self.params}
        self._modules = list(self._model.named_modules())
        self._params = [p for _, p in self.params]
        self._tables = [table for _, m in self._modules for table in (m._parameters, m._modules)]
        self._parts, self._pointers = self._in_tables(), None
        known = {key for key, _, _ in self._entries}
        self._find_buffers()
        self._look_up()
        floats = [(key, t) for key, t, examined in self._entries if examined and key not in known]
        if not known_finite([t for _, t in floats]):
            self._exempt |= {key for key, t in floats if not is_finite(t)}
            self._pointers = None
        self.remove()
        for name, m in self._modules:
            if any(map(is_lazy, (*m._parameters.values(), *m._buffers.values()))):
                self._hooks.append(m.register_forward_pre_hook(_MadeHook(self, name)))  # comes after the module's own
        self.save()

    def replaced(self) -> bool:
        """Whether a module or parameter is not the one it was."""
        return self._in_tables() != self._parts

    def _in_tables(self):
        return list(map(id, itertools.chain.from_iterable(map(dict.values, self._tables))))

    def _made(self, prefix, module):
        for kind, table in (("param", module._parameters), ("buffer", module._buffers)):
            for name, t in table.items():
                if _in_memory(t):
                    self._fresh[kind, f"{prefix}.{name}".lstrip(".")] = t.detach().clone()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _live(self):
        """Tensors in a fixed order, their addresses, and of the optimiser's state what is no tensor."""
        now, states = self._params.copy(), getattr(self._opt, "state", {})
        for buffers in self._buffers:
            now += buffers.values()
        for state in states.values():
            now += state.values()
        try:
            return now, list(map(_address, now)), []
        except (TypeError, ValueError, RuntimeError):  # no buffer, an optimiser's counter; lazy ones; sparse ones
            now = list(filter(_in_memory, now))
        plain = [(p, k, _copy(v)) for p, s in states.items() for k, v in s.items() if not _in_memory(v)]
        return now, list(map(_address, now)), plain

    def _find_buffers(self):
        self._buffers = [m._buffers for _, m in self._modules if m._buffers]

    def _look_up(self):
        """Views are made anew only when a tensor was moved or replaced."""
        _, pointers, self._plain = self._live()
        if pointers != self._pointers:  # the layout's views keep the memory, so no other tensor can have its address
            self._find_buffers()
            now, self._pointers, self._plain = self._live()
            self._entries = list(self._named(now))
            self._layout = Layout(self._entries, self._device)
        return self._layout

    def _named(self, now):
        """(key, tensor, examined?) of each live tensor."""
        keys = [("param", name) for name, p in self.params if _in_memory(p)]
        for prefix, module in self._modules:
            keys += [("buffer", f"{prefix}.{n}".lstrip(".")) for n, b in module._buffers.items() if _in_memory(b)]
        shapes = {}
        for p, state in getattr(self._opt, "state", {}).items():
            own = [("state", p, k) for k, v in state.items() if _in_memory(v)]
            shapes.update({key: getattr(p, "shape", None) for key in own})
            keys += own
        for key, t in zip(keys, now):
            floats = (t.is_floating_point() or t.is_complex()) and t.numel() > 0 and key not in self._exempt
            yield key, t, floats and shapes.get(key, t.shape) == t.shape

    @property
    def half(self) -> bool:
        return self._layout.half

    # Keeping it

    def advance(self) -> list[str]:
        layout = self._look_up()
        if (kernels := layout.kernels(self._saved)) is not None:  # looks first, and copies over what is kept
            total = squares = kernels.advance()
            copies = kernels.copies
        else:
            copies = layout.capture()
            squares = _squares(copies.params)
            total = squares + _squares(copies.others)
        if not math.isfinite(total):
            if bad := self._not_finite():
                return bad
            if kernels is not None:  # large, no more
                kernels.copy()
        self.norm = math.sqrt(squares)
        self._keep(layout, copies)
        return []

    def save(self) -> None:
        """Keep the state as it is, whatever it holds."""
        layout = self._look_up()
        layout.kernels(self._saved)
        self._keep(layout, layout.capture())
        self.stale = False

    def _keep(self, layout, copies):
        self._fresh = {}
        before, self._saved = self._saved, (layout, copies)
        if not layout.native:
            layout.spare = before[1] if before and before[0].same_as(layout) else None
        self.host = (self._plain, [])

    @torch.no_grad()
    def advance_unless(self, flags) -> list[torch.Tensor]:
        """The square of the parameters' norm, a tensor on the device for each group of them."""
        layout = self._look_up()
        if self._saved[0] is not layout:
            self._saved, self._fresh = (layout, layout.adopted(*self._saved, self._fresh)), {}
        copies, saved = layout.capture(), self._saved[1]
        for group, flat in zip(layout.groups, copies):
            if group.on_device and group.examined:
                flags.add([flat[: group.examined]])
        bad, host = flags.mark(), []
        for i, (group, flat) in enumerate(zip(layout.groups, copies)):
            if group.on_device:
                torch.where(bad, saved[i], flat, out=saved[i])
            else:
                host.append((layout, i, flat.clone()))
        self.host = (self._plain, host)
        heads = (f[: g.params] for g, f in zip(layout.groups, copies) if g.on_device and g.params)
        return [torch.dot(head, head) for head in heads if head.element_size() >= 4]

    def _not_finite(self) -> list[str]:
        bad = {key for key, t, examined in self._entries if examined and not is_finite(t)}
        # the optimiser's state is told by its parameter's name, after what is amiss itself
        own = [key[1] for key, _, _ in self._entries if key in bad and key[0] != "state"]
        return own + [self._names.get(key[1], "?") for key, _, _ in self._entries if key in bad and key[0] == "state"]

    def not_finite(self) -> list[str]:
        """The names of live tensors that hold NaN or Inf."""
        self._look_up()
        return self._not_finite()

    def magnitudes(self) -> dict[str, float]:
        """The largest absolute value of each parameter."""
        return {name: p.detach().abs().max().item() for name, p in self.params if _in_memory(p) and p.numel()}

    def is_buffer(self, name) -> bool:
        return any(key == ("buffer", name) for key, _, _ in self._entries)

    # Putting it back

    @torch.no_grad()
    def restore(self, host=None, kinds=("param", "buffer", "state")) -> None:
        """`host`: what `self.host` was at the time; without it, it is the last one's."""
        layout, copies = self._saved
        plain, on_host = self.host if host is None else host
        saved = {**self._fresh, **dict(layout.values(copies))}
        for other, i, flat in on_host:
            saved.update(other.groups[i].values(flat))
        saved = {key: value for key, value in saved.items() if key[0] in kinds}
        self._look_up()
        live = {key: t for key, t, _ in self._entries}
        for key, value in saved.items():
            self._put(key, live.get(key), value)
        if "state" in kinds and hasattr(self._opt, "state"):
            self._put_state({key[1:]: None for key in saved if key[0] == "state"}, plain)

    def _put(self, key, t, value):
        if t is not None and t.shape == value.shape:
            t.copy_(value)
        elif key[0] == "param":
            next(p for name, p in self.params if name == key[1]).data = value.clone()
        elif key[0] == "buffer":
            prefix, _, name = key[1].rpartition(".")
            dict(self._modules)[prefix]._buffers[name] = value.clone()
        else:
            self._opt.state[key[1]][key[2]] = value.clone()

    def _put_state(self, kept, plain):
        """Take away what the optimiser has made since, and put back its counters."""
        kept.update({(p, k): v for p, k, v in plain})
        for p, state in list(self._opt.state.items()):
            for k in [k for k in state if (p, k) not in kept]:
                del state[k]
            if not state:
                del self._opt.state[p]
        for p, k, v in plain:
            self._opt.state[p][k] = v


class _MadeHook:
    """On a lazy module that is about to run for the first time. A copy of the model takes a copy that does nothing."""

    def __init__(self, kept=None, prefix=""):
        self.kept, self.prefix = kept, prefix

    def __call__(self, module, args):
        if self.kept is not None:
            self.kept._made(self.prefix, module)
            self.kept = None

    def __reduce__(self):
        return _MadeHook, ()


_address = torch.Tensor.data_ptr


def _in_memory(value) -> bool:
    """Whether it is a tensor whose values can be copied by address: not one of a lazy module, nor a sparse one."""
    return isinstance(value, torch.Tensor) and not is_lazy(value) and value.layout is torch.strided


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def _squares(flats) -> float:
    """The sum of squares: not finite as soon as one element is not, and where it overflows."""
    total = 0.0
    for flat in flats:
        flat = flat.float() if flat.element_size() < 4 else flat
        total += torch.dot(flat, flat).item()
    return total


def bad_rate(opt, params) -> str | None:
    """The name of the first of `params` (name, parameter) in a group of `opt` whose learning rate is not finite. Rates
    in tensors are not looked at: they may be on a device."""
    bad = []
    for group in opt.param_groups:
        rate = group["lr"]
        if not isinstance(rate, torch.Tensor) and not math.isfinite(rate):
            bad.append(group)
    if not bad:
        return None
    ids = {id(p) for g in bad for p in g["params"] if p.grad is not None}
    return next((name for name, p in params if id(p) in ids), None)
