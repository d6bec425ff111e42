"""All that a training step changes, copied after every step for a few operators' worth of time.

Parameters, buffers and the optimiser's tensors of one dtype and device are seen as flat vectors, so that one `torch.cat`
copies them all, and one reduction over the copy tells whether they are finite.
"""

from __future__ import annotations

import math

import torch

from ._nonfinite_tensors import is_finite


class KeptState:
    """The state of `model` and `opt` after the last step that was found finite.

    - `advance()`: copy the state as it is now; when it is finite, keep the copy. Returns the names that are not.
    - `advance_unless(flags)`: the same on a device, where `flags` (`DeviceFlags`) decide without the host knowing.
    - `restore(host)`: put back what is kept.

    `device`: where `flags` are; tensors elsewhere (an optimiser's counters) are copied for each step, in `host`.

    Buffers that hold NaN or Inf when this is made (masks of -inf) are kept, and let be. Of the optimiser's state those
    tensors are examined that have their parameter's shape: what else there is may mean anything.
    """

    def __init__(self, model, opt, device=None):
        self.params, self._opt, self._device = list(model.named_parameters()), opt, device
        self._names = {p: name for name, p in self.params}
        self._modules = list(model.named_modules())
        self._params = [p for _, p in self.params]
        self._find_buffers()
        self._exempt, self._pointers, self._layout, self._saved = set(), None, None, None
        self.stale = False
        self.norm, self.host = 0.0, ({}, [])
        self._look_up()
        self._exempt = {key for key, t, floats in self._entries if floats and not is_finite(t)}
        self._pointers = None

    # What there is

    def _live(self):
        """Tensors in a fixed order, and of the optimiser's state what is no tensor."""
        now, plain = self._params.copy(), []
        for buffers in self._buffers:
            now += buffers.values()
        if type(None) in map(type, now):  # a buffer that is not there
            now = [t for t in now if t is not None]
        for p, state in getattr(self._opt, "state", {}).items():
            for k, v in state.items():
                if isinstance(v, torch.Tensor):
                    now.append(v)
                else:
                    plain.append((p, k, v))
        return now, plain

    def _find_buffers(self):
        self._buffers = [m._buffers for _, m in self._modules if m._buffers]

    def _look_up(self):
        """Views are made anew only when a tensor was moved or replaced."""
        now, self._plain = self._live()
        pointers = list(map(torch.Tensor.data_ptr, now))
        if pointers != self._pointers:
            self._find_buffers()
            now, self._plain = self._live()
            self._pointers, self._entries = list(map(torch.Tensor.data_ptr, now)), list(self._named(now))
            self._layout = _Layout(self._entries, self._device)
        return self._layout

    def _named(self, now):
        """(key, tensor, examined?) of each live tensor."""
        keys = [("param", name) for name, _ in self.params]
        for prefix, module in self._modules:
            keys += [("buffer", f"{prefix}.{n}".lstrip(".")) for n, b in module._buffers.items() if b is not None]
        shapes = {}
        for p, state in getattr(self._opt, "state", {}).items():
            own = [("state", p, k) for k, v in state.items() if isinstance(v, torch.Tensor)]
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
        copies = layout.capture()
        squares, others = _squares(copies.params), _squares(copies.others)
        if not math.isfinite(squares + others) and (bad := self._not_finite()):
            return bad
        self.norm = math.sqrt(squares)
        self._keep(layout, copies)
        return []

    def save(self) -> None:
        """Keep the state as it is, whatever it holds."""
        layout = self._look_up()
        self._keep(layout, layout.capture())
        self.stale = False

    def _keep(self, layout, copies):
        before, self._saved = self._saved, (layout, copies)
        layout.spare = before[1] if before and before[0].same_as(layout) else None
        self.host = (self._plain, [])

    @torch.no_grad()
    def advance_unless(self, flags) -> list[torch.Tensor]:
        """The square of the parameters' norm, a tensor on the device for each group of them."""
        layout = self._look_up()
        if self._saved[0] is not layout:
            self._saved = (layout, layout.adopted(*self._saved))
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

    def is_buffer(self, name) -> bool:
        return any(key == ("buffer", name) for key, _, _ in self._entries)

    # Putting it back

    @torch.no_grad()
    def restore(self, host=None, kinds=("param", "buffer", "state")) -> None:
        """`host`: what `self.host` was at the time; without it, it is the last one's."""
        layout, copies = self._saved
        plain, on_host = self.host if host is None else host
        saved = dict(layout.values(copies))
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


class _Group:
    """Tensors of one dtype and device: first parameters, then what else is examined, then the rest."""

    def __init__(self, members, device):
        members.sort(key=lambda m: (m[0][0] != "param" or not m[2], not m[2]))  # stable
        self.members, self.views = members, [_flat(t) for _, t, _ in members]
        sizes = [v.numel() for v in self.views]
        self.size = sum(sizes)
        self.examined = sum(n for n, m in zip(sizes, members) if m[2])
        self.params = sum(n for n, m in zip(sizes, members) if m[2] and m[0][0] == "param")
        self.loose = [i for i, (v, m) in enumerate(zip(self.views, members)) if v.data_ptr() != m[1].data_ptr()]
        self.on_device = self.views[0].device == device

    def capture(self, out):
        for i in self.loose:  # memory with gaps has no flat view
            self.views[i] = _flat(self.members[i][1])
        return torch.cat(self.views, out=out)

    def values(self, flat):
        """(key, value in its own shape and dtype) of each tensor in a flat copy."""
        parts = flat.split([v.numel() for v in self.views])
        return [(key, _shaped(part, t)) for (key, t, _), part in zip(self.members, parts)]


class _Copies(list):
    """A flat vector for each group; `params` and `others` are those parts of them that are examined."""

    def __init__(self, groups):
        super().__init__(g.views[0].new_empty(g.size) for g in groups)
        heads = [flat[: g.params] for g, flat in zip(groups, self)]
        rests = [flat[g.params : g.examined] for g, flat in zip(groups, self)]
        self.params, self.others = [t for t in heads if t.numel()], [t for t in rests if t.numel()]


class _Layout:
    """Which tensors go into which flat vectors, and in which order."""

    def __init__(self, entries, device):
        groups = {}
        for key, t, examined in entries:
            if t.numel():
                groups.setdefault((t.device, _flat(t).dtype), []).append((key, t, examined))
        self.groups = [_Group(members, device) for members in groups.values()]
        self.spare, self.half = None, any(t.dtype is torch.float16 for key, t, _ in entries if key[0] == "param")

    def same_as(self, other) -> bool:
        """Whether flat copies mean the same in both."""
        return other is self or self._signature() == other._signature()

    def _signature(self):
        return [[(key, t.shape, t.stride(), t.dtype, t.device) for key, t, _ in g.members] for g in self.groups]

    def capture(self) -> _Copies:
        if self.spare is None:
            self.spare = _Copies(self.groups)
        for group, out in zip(self.groups, self.spare):
            group.capture(out)
        return self.spare

    def values(self, copies):
        """(key, value) of all tensors in the flat copies."""
        return (pair for group, flat in zip(self.groups, copies) for pair in group.values(flat))

    def adopted(self, other, copies) -> _Copies:
        """The copies that belong to another layout in this one. What that did not have begins as 0, as optimisers'
        averages and counts do."""
        if other.same_as(self):
            return copies
        old = {key: value for key, value in other.values(copies)}
        new = _Copies(self.groups)
        for group, out in zip(self.groups, new):
            torch.cat([_flat(_like(t, old.get(key))) for key, t, _ in group.members], out=out)
        return new


def _like(t, value):
    """`value` laid out as `t`; without one, zeros."""
    new = torch.zeros_like(t.detach())
    return new if value is None or value.shape != t.shape else new.copy_(value)


def _dense_order(t):
    """The dimensions of `t` from the outermost in memory to the innermost; None where memory has gaps or overlaps."""
    order = sorted((d for d in range(t.dim()) if t.shape[d] > 1), key=t.stride, reverse=True)
    size = 1
    for d in reversed(order):
        if t.stride(d) != size:
            return None
        size *= t.shape[d]
    return order


def _flat(t):
    """`t` as a vector in the order of its memory, real, and float32 words for integers of 4 and 8 bytes."""
    t = t.detach()
    if t.is_complex():
        t = torch.view_as_real(t)
    flat = t.reshape(-1) if _dense_order(t) is None else t.as_strided((t.numel(),), (1,))
    words = flat.element_size() % 4 == 0 and not flat.is_floating_point()
    return flat.view(torch.float32) if words else flat


def _shaped(part, t):
    """A piece of a flat copy, a view in the shape, strides and dtype of `t`."""
    real = torch.view_as_real(t.detach()) if t.is_complex() else t
    if real.dtype != part.dtype:
        part = (part.clone() if part.storage_offset() % 2 else part).view(real.dtype)  # 8-byte integers lie even
    order = _dense_order(real)
    part = part.view(real.shape) if order is None else part.as_strided(real.shape, real.stride(), part.storage_offset())
    return torch.view_as_complex(part) if t.is_complex() else part


def _squares(flats) -> float:
    """The sum of squares: not finite as soon as one element is not, and where it overflows."""
    total = 0.0
    for flat in flats:
        flat = flat.float() if flat.element_size() < 4 else flat
        total += torch.dot(flat, flat).item()
    return total
