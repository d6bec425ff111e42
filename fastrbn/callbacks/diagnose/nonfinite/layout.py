"""Tensors of one dtype and device seen as flat vectors, so that few operators copy them all."""

from __future__ import annotations

import torch

from .native import StateKernels, can_serve


class Group:
    """Tensors of one dtype and device: first parameters, then what else is examined, then the rest."""

    def __init__(self, members, device):
        members.sort(key=lambda m: (m[0][0] != "param" or not m[2], not m[2]))  # stable
        self.members, self.views = [m[:3] for m in members], [m[3] for m in members]
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


class Copies(list):
    """A flat vector for each group; `params` and `others` are those parts of them that are examined."""

    def __init__(self, groups):
        super().__init__(g.views[0].new_empty(g.size) for g in groups)
        heads = [flat[: g.params] for g, flat in zip(groups, self)]
        rests = [flat[g.params : g.examined] for g, flat in zip(groups, self)]
        self.params, self.others = [t for t in heads if t.numel()], [t for t in rests if t.numel()]


class Layout:
    """Which tensors go into which flat vectors, and in which order."""

    def __init__(self, entries, device):
        groups = {}
        for key, t, examined in entries:
            if t.numel():
                t = t.detach()  # stays as it is now, when `t.data` is replaced by something of another shape
                view = _flat(t)
                groups.setdefault((t.device, view.dtype), []).append((key, t, examined, view))
        self.groups = [Group(members, device) for members in groups.values()]
        self.spare, self.half = None, any(t.dtype is torch.float16 for key, t, _ in entries if key[0] == "param")
        self.native, self._kernels = device is None and can_serve(self), None

    def same_as(self, other) -> bool:
        """Whether flat copies mean the same in both."""
        return other is self or self._signature() == other._signature()

    def _signature(self):
        return [[(key, t.shape, t.stride(), t.dtype, t.device) for key, t, _ in g.members] for g in self.groups]

    def kernels(self, saved) -> StateKernels | None:
        """C that looks at the tensors and copies them over what is `saved` (a layout and its copies), where that is the
        same in both; None where C cannot."""
        if self.native and self._kernels is None:
            self.spare = saved[1] if saved and saved[0].same_as(self) else Copies(self.groups)
            self._kernels = StateKernels(self, self.spare)
        return self._kernels

    def capture(self) -> Copies:
        if self._kernels is not None:
            self._kernels.copy()
            return self.spare
        if self.spare is None:
            self.spare = Copies(self.groups)
        for group, out in zip(self.groups, self.spare):
            group.capture(out)
        return self.spare

    def values(self, copies):
        """(key, value) of all tensors in the flat copies."""
        return (pair for group, flat in zip(self.groups, copies) for pair in group.values(flat))

    def adopted(self, other, copies, more) -> Copies:
        """The copies that belong to another layout in this one, with `more` by key. What there is not begins as 0, as
        optimisers' averages and counts do."""
        if other.same_as(self):
            return copies
        old = {**more, **dict(other.values(copies))}
        new = Copies(self.groups)
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
    if t.is_contiguous():
        flat = t.view(-1)
    else:
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
