"""`leaf_table`: what autograd thinks of each parameter and buffer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .walk import name_of


class LeafRow(NamedTuple):
    """One parameter or buffer; `grad_fn` is the name of the node it came from, None for a leaf; `version` counts its
    changes in place (None: an inference tensor, which counts none); `note` says what is wrong, if anything is."""

    name: str
    kind: str
    requires_grad: bool
    is_leaf: bool
    grad_fn: str | None
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    version: int | None
    note: str


class LeafTable:
    """Rows of `leaf_table`: `.rows`, `table["2.sums"]`, iteration, length; prints as a table."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __getitem__(self, name):
        if isinstance(name, (int, slice)):
            return self.rows[name]
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no parameter or buffer is named {name!r}; there are: {', '.join(r.name for r in self.rows)}")

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)

    def __repr__(self):
        cells = [[*LeafRow._fields[:-1], ""], *([_cell(v) for v in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells)


def leaf_table(model) -> LeafTable:
    """Per parameter and buffer of `model`: `requires_grad`, `is_leaf`, `grad_fn`, shape, dtype, device, version.

    A buffer with a grad_fn holds the graph of the step that wrote it: it was written without detach. Tied parameters
    stand under each of their names. Raises TypeError for what is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"leaf_table needs an nn.Module; got {type(model).__name__}")
    rows = [_row(name, "parameter", p) for name, p in model.named_parameters(remove_duplicate=False)]
    return LeafTable(rows + [_row(name, "buffer", b) for name, b in model.named_buffers(remove_duplicate=False)])


def _row(name, kind, t) -> LeafRow:
    made_by = None if t.grad_fn is None else name_of(t.grad_fn)
    if isinstance(t, nn.parameter.UninitializedTensorMixin):
        return LeafRow(name, kind, t.requires_grad, t.is_leaf, made_by, None, t.dtype, t.device, None, "not made yet")
    version = None if t.is_inference() else t._version
    note = ""
    if kind == "buffer" and made_by:
        note = "holds a graph: detach what is written to it"
    elif kind == "parameter" and not t.is_leaf:
        note = "no leaf: gets no gradient"
    elif t.requires_grad and kind == "buffer":
        note = "a buffer that wants a gradient"
    shape = tuple(t.shape)
    return LeafRow(name, kind, t.requires_grad, t.is_leaf, made_by, shape, t.dtype, t.device, version, note)


def _cell(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "×".join(map(str, value)) or "scalar"
    return "-" if value is None else str(value).removeprefix("torch.")
