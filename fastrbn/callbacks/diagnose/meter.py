"""`Meter`: measures the magnitudes of many tensors in few calls.

In a small model's step the number of calls costs more than the number of values. So one call copies the parameters into
one vector on their device, each from a multiple of `BLOCK` on, and one call reduces all blocks. The block values that
remain of a parameter are reduced for many steps together. What is too large for a copy is measured on the spot by
PyTorch's grouped operators.
"""

from __future__ import annotations

import math

import torch
from torch.nn.parameter import is_lazy

from .flat import room_for

BLOCK, ROWS = 128, 64
BYTES_CPU, BYTES = 2**22, 2**26  # limits for copies; on the CPU they fit into the cache
OF_GRADS = "grad_"


class Meter:
    """Measures `stats` ("max", "rms", "update", "grad_max", "grad_rms") of the `named` parameters, step by step.

    Call `before()` before the optimiser's step (needed for "update") and `after()` after it. `flush()` returns the rows
    since the last flush, float32 of shape (rows, stats, names) on a device; call it when `is_full()`. No call waits for
    a device. Parameters without values (no gradient, lazy, meta) have NaN, empty ones 0.
    """

    def __init__(self, named, stats):
        self.names, self.stats, self.count = [name for name, _ in named], stats, 0
        self._made_for = [_identity(name, p) for name, p in named]
        with_values = [(i, p) for i, (_, p) in enumerate(named) if not (is_lazy(p) or p.is_meta)]
        self.absent = [name for name, p in named if is_lazy(p) or p.is_meta]
        self._empty = [i for i, p in with_values if not p.numel()]
        groups = {}
        for i, p in with_values:
            if p.numel():
                wide = torch.promote_types(p.dtype, torch.float32)  # squares of half precision would overflow
                groups.setdefault((p.device, wide), []).append((i, p))
        self._groups = [_group(key, members, stats) for key, members in groups.items()]
        devices = [g.device for g in self._groups]
        self._home = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        self._columns = [torch.tensor(g.columns, device=self._home) for g in self._groups]

    def is_of(self, named) -> bool:
        """Whether it was made for these parameters, and their device, dtype, shape and strides are the same."""
        return self._made_for == [_identity(name, p) for name, p in named]

    @torch.no_grad()
    def before(self) -> None:
        for group in self._groups:
            group.before()

    @torch.no_grad()
    def after(self) -> None:
        for group in self._groups:
            group.after(self.count)
        self.count += 1

    def is_full(self) -> bool:
        return self.count >= ROWS

    @torch.no_grad()
    def flush(self) -> torch.Tensor:
        n, self.count = self.count, 0
        parts = [group.flush(n).float().to(self._home) for group in self._groups]
        if len(parts) == 1 and parts[0].shape[-1] == len(self.names):
            return parts[0]
        table = torch.full((n, len(self.stats), len(self.names)), math.nan, device=self._home)
        for columns, part in zip(self._columns, parts):
            table.index_copy_(2, columns, part)
        for i in self._empty:
            table[..., i] = 0
        return table


def _identity(name, p):
    lazy = is_lazy(p)
    return name, id(p), lazy or (p.device, p.dtype, p.shape, p.stride())


def _group(key, members, stats):
    device, wide = key
    kinds = 1 + ("update" in stats) + any(s.startswith(OF_GRADS) for s in stats)
    size = sum(p.numel() for _, p in members) * wide.itemsize * kinds
    small = size <= (BYTES_CPU if device.type == "cpu" else BYTES)
    return (_Blocks if small else _Direct)(key, members, stats)


class _Group:
    """Parameters of one device and width."""

    def __init__(self, key, members, stats):
        self.device, self.dtype = key
        self.columns, self.params = [i for i, _ in members], [p for _, p in members]
        self.stats = stats
        self.of_params = [s for s in stats if not s.startswith(OF_GRADS)]
        self.of_grads = [s.removeprefix(OF_GRADS) for s in stats if s.startswith(OF_GRADS)]
        self.real = torch.empty(0, dtype=self.dtype).abs().dtype
        self.roots = torch.tensor([p.numel() for p in self.params], dtype=self.real).sqrt().to(self.device)


class _Blocks(_Group):
    """Copied side by side and reduced by blocks."""

    def __init__(self, key, members, stats):
        super().__init__(key, members, stats)
        self._counts = [-(-p.numel() // BLOCK) for p in self.params]
        self._now = self._copy()
        self._before = self._copy() if "update" in stats else None
        self._grads = self._copy() if self.of_grads else None
        wanted = {s for s in stats if s != "update"} | ({"start", "change"} if "update" in stats else set())
        shape = (ROWS, sum(self._counts))
        self._tables = {s: torch.zeros(shape, dtype=self.real, device=self.device) for s in wanted}
        self._rows = {s: table.unbind() for s, table in self._tables.items()}  # indexing in each step would cost more

    def _copy(self):
        """The blocks of one vector, and where each parameter goes. Zeros in between change nothing."""
        flat, slots = room_for(self.params, self.dtype, BLOCK)
        return flat.view(-1, BLOCK), slots

    def before(self):
        torch._foreach_copy_(self._before[1], self.params)

    def after(self, row):
        blocks, slots = self._now
        torch._foreach_copy_(slots, self.params)
        if self._before is not None:
            start = self._before[0]
            self._norms(start, "start", row)
            self._norms(start.sub_(blocks), "change", row)
        self._reduce(blocks, self.of_params, "", row)
        if self._grads is not None:
            self._take_grads(self._grads[1])
            self._reduce(self._grads[0], self.of_grads, OF_GRADS, row)

    def _take_grads(self, slots):
        grads = [p.grad for p in self.params]
        if all(g is not None and g.layout is torch.strided for g in grads):
            torch._foreach_copy_(slots, grads)
            return
        for slot, g in zip(slots, grads):
            if g is None:
                slot.fill_(math.nan)
            else:
                slot.copy_(g.to_dense())

    def _reduce(self, blocks, stats, prefix, row):
        if "rms" in stats:
            self._norms(blocks, f"{prefix}rms", row)
        if "max" in stats:
            sizes = blocks.abs() if blocks.is_complex() else blocks.abs_()
            torch.amax(sizes, 1, out=self._rows[f"{prefix}max"][row])

    def _norms(self, blocks, name, row):
        torch.linalg.vector_norm(blocks, dim=1, out=self._rows[name][row])

    def flush(self, n):
        # always all rows, even unused ones: the order of a sum, and so its last bit, depends on the shape
        found = {}
        for name, table in self._tables.items():
            parts = table.split(self._counts, 1)
            largest = name.endswith("max")
            found[name] = torch.stack([c.amax(1) if largest else torch.linalg.vector_norm(c, dim=1) for c in parts], 1)
        if self._before is not None:
            found["update"] = _share(found["change"], found["start"])
        columns = [found[s] / self.roots if s.endswith("rms") else found[s] for s in self.stats]
        return torch.stack(columns, dim=1)[:n]


class _Direct(_Group):
    """Measured at once, without a copy."""

    def __init__(self, key, members, stats):
        super().__init__(key, members, stats)
        self._start, self._found = None, []

    def before(self):
        if self._start is None:
            self._start = [torch.empty_like(p.detach(), memory_format=torch.contiguous_format) for p in self.params]
        torch._foreach_copy_(self._start, self.params)

    def after(self, row):
        found = {}
        if "update" in self.stats:
            start = torch.stack(norms(self._start, "rms"))
            change = torch.stack(norms(torch._foreach_sub(self.params, self._start), "rms"))
            found["update"] = _share(change, start)
        for prefix, stats, tensors in (
            ("", self.of_params, self.params),
            (OF_GRADS, self.of_grads, [p.grad for p in self.params] if self.of_grads else []),
        ):
            for stat in stats:
                if stat != "update":
                    value = torch.stack(norms(tensors, stat))
                    found[prefix + stat] = value / self.roots if stat == "rms" else value
        self._found.append(torch.stack([found[s].float() for s in self.stats]))

    def flush(self, n):
        found, self._found = self._found, []
        return torch.stack(found) if found else torch.empty(0, len(self.stats), len(self.params), device=self.device)


def norms(tensors, stat) -> list[torch.Tensor]:
    """A scalar for each of `tensors`, at least float32, on its device; NaN for None.

    "max" is the largest absolute value, "rms" the root of the sum of squares, still to be divided.
    """
    dense = [t if t is None or t.layout is torch.strided else t.coalesce().values() for t in tensors]
    some = [t for t in dense if t is not None and t.numel()]
    found = iter(_foreach(some, stat) if some else ())
    if len(some) == len(tensors):
        return list(found)
    device = some[0].device if some else None
    absent, none = (torch.full((), value, device=device) for value in (math.nan, 0.0))
    return [absent if t is None else none if not t.numel() else next(found) for t in dense]


def _foreach(tensors, stat):
    widest = torch.promote_types(tensors[0].dtype, torch.float32)
    if stat == "rms":
        return torch._foreach_norm(tensors, 2, dtype=widest)
    if tensors[0].device.type == "cpu":  # the norm of order inf takes four times as long there
        return [t.to(widest.to_real()) for t in torch._foreach_max(torch._foreach_abs(tensors))]
    return torch._foreach_norm(tensors, math.inf, dtype=widest)


def _share(change, start):
    """`change` over `start`; 0 for what was 0 and stayed 0."""
    return torch.where((change == 0) & (start == 0), 0.0, change / start)
