"""`leaf_table`: what autograd knows about each parameter and buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .walk import name_of


class LeafRow(NamedTuple):
    """One row of a `LeafTable`: a parameter or buffer.

    `grad_fn` is the name of the node that made it, None for a leaf. `version` counts changes in place; it is None for
    inference tensors, which do not count them. `note` is a problem, if there is one.
    """

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
    """The table that `leaf_table` returns. It prints as text and has a length; iterating it gives its rows.

    Parameters
    ----------
    rows : iterable of LeafRow
        Fields `name kind requires_grad is_leaf grad_fn shape dtype device version note`.

    Examples
    --------
    >>> table = leaf_table(nn.BatchNorm1d(3))
    >>> len(table), table["weight"].is_leaf, table["running_mean"].kind
    (5, True, 'buffer')
    """

    def __init__(self, rows: Iterable[LeafRow]) -> None:
        self.rows = list(rows)

    def __getitem__(self, name: str | int | slice) -> Any:
        if isinstance(name, (int, slice)):
            return self.rows[name]
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no parameter or buffer is named {name!r}; there are: {', '.join(r.name for r in self.rows)}")

    def __iter__(self) -> Iterator[LeafRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        cells = [[*LeafRow._fields[:-1], ""], *([_cell(v) for v in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells)


def leaf_table(model: nn.Module) -> LeafTable:
    """Tabulate what autograd knows about each parameter and buffer.

    A buffer with a grad_fn was written without detach and holds the graph of the step that wrote it.

    Parameters
    ----------
    model : nn.Module
        Tied parameters are listed under each of their names.

    Returns
    -------
    LeafTable
        Name, kind, `requires_grad`, `is_leaf`, `grad_fn`, shape, dtype, device, version, and a note on problems.

    Raises
    ------
    TypeError
        If `model` is not an nn.Module.

    Examples
    --------
    >>> row = leaf_table(nn.PReLU())["weight"]
    >>> row.kind, row.requires_grad, row.is_leaf, row.shape
    ('parameter', True, True, (1,))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"leaf_table needs an nn.Module; got {type(model).__name__}")
    rows = [_row(name, "parameter", p) for name, p in model.named_parameters(remove_duplicate=False)]
    return LeafTable(rows + [_row(name, "buffer", b) for name, b in model.named_buffers(remove_duplicate=False)])


def _row(name: str, kind: str, t: Tensor) -> LeafRow:
    made_by = None if t.grad_fn is None else name_of(t.grad_fn)
    if nn.parameter.is_lazy(t):
        return LeafRow(name, kind, t.requires_grad, t.is_leaf, made_by, None, t.dtype, t.device, None, "not made yet")
    version = None if t.is_inference() else t._version
    note = ""
    if kind == "buffer" and made_by:
        note = "holds a graph: detach what is written to it"
    elif kind == "parameter" and not t.is_leaf:
        note = "not a leaf: gets no gradient"
    elif t.requires_grad and kind == "buffer":
        note = "a buffer that requires a gradient"
    shape = tuple(t.shape)
    return LeafRow(name, kind, t.requires_grad, t.is_leaf, made_by, shape, t.dtype, t.device, version, note)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "×".join(map(str, value)) or "scalar"
    return "-" if value is None else str(value).removeprefix("torch.")
