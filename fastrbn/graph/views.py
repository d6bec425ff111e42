"""`AutogradGraph`, which `autograd_graph` returns: as text, as DOT, as a picture, and at the level of modules."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Container, Iterable, Iterator
from typing import Any

from fastrbn.util import one_of, whole

from . import layout
from .modules import groups
from .nodes import GraphNode

_FILL = {"parameter": "#fdf0d5", "leaf": "#e8e8e8", "op": "#ffffff", "module": "#dbe7f3"}


class AutogradGraph:
    """Nodes and edges of an autograd graph, in the direction of the forward pass.

    It is plain data and keeps no tensor alive. `len(graph)` is the number of autograd nodes, also after `by_module`;
    `print(graph)` prints the summary. Usually made by `autograd_graph`.

    Parameters
    ----------
    nodes : list of GraphNode
        Inputs before their users.
    edges : list of (int, int)
        Pairs of ids, from an input to its user.
    roots : list of int
        Ids of the nodes that the backward pass starts from.
    owned_memory : collection, optional
        Keys of the memory of parameters and buffers.
    types : dict of str to str, optional
        Class names of modules.

    Attributes
    ----------
    parameters : dict of str to list of int
        For each parameter the ids of the nodes that are it or contain it.
    buffers : dict of str to list of int
        For each buffer the ids of the nodes that save it or are held by it.
    holders : dict of str to int
        For each buffer that holds the graph the id of the node up to which it does; empty if all is well.
    saved_bytes : int
        Memory saved for the backward pass, each piece counted once.
    held_bytes : int
        The part of it that is neither parameter nor buffer, and so exists for the backward pass only.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> graph = autograd_graph(lambda: model(torch.randn(2, 4)).sum(), model)
    >>> [node.name for node in graph.by_module().nodes]
    ['0', '1', 'SumBackward0']
    >>> print(graph.by_module().summary().splitlines()[0])
    6 nodes, 2 edges: 1 operation, 2 modules
    """

    def __init__(
        self,
        nodes: list[GraphNode],
        edges: list[tuple[int, int]],
        roots: list[int],
        owned_memory: Container[Any] = frozenset(),
        types: dict[str, str] | None = None,
    ) -> None:
        self.nodes, self.edges, self.roots = nodes, edges, roots
        self._owned, self._types = owned_memory, types or {}  # memory of parameters and buffers; classes of modules
        self.parameters: dict[str, list[int]] = {}
        self.buffers: dict[str, list[int]] = {}
        self.holders: dict[str, int] = {}
        for n in nodes:
            for name in [n.name] if n.kind == "parameter" else n.parameters:
                self.parameters.setdefault(name, []).append(n.id)
            for name in dict.fromkeys((*n.buffers, *n.held_by)):
                self.buffers.setdefault(name, []).append(n.id)
            self.holders.update(dict.fromkeys(n.held_by, n.id))
        memory = _merged(nodes)
        self.saved_bytes = sum(memory.values())
        self.held_bytes = sum(size for key, size in memory.items() if key not in self._owned)

    def __len__(self) -> int:
        return sum(n.size for n in self.nodes)

    def __repr__(self) -> str:
        return f"AutogradGraph({len(self)} nodes, {len(self.edges)} edges, {_size(self.saved_bytes)} saved)"

    def __str__(self) -> str:
        return self.summary()

    def by_module(self, depth: int | None = None) -> AutogradGraph:
        """The same graph at the level of layers: one node per call of a module, with its parameters inside.

        Operations that belong to no module stay as they are. A module whose operations surround those of another is cut
        in two, so that the view has no cycles either.

        Parameters
        ----------
        depth : int, optional
            Deepest level of names to distinguish (1: the model's children); by default all.

        Returns
        -------
        AutogradGraph

        Raises
        ------
        ValueError
            If `depth` is not a positive integer.
        """
        if depth is not None:
            whole("depth", depth)
        boxes = groups(self.nodes, self.edges, depth)
        place = {i: k for k, box in enumerate(boxes) for i in box}
        members = [[self.nodes[i] for i in box] for box in boxes]
        nodes = [_joined(i, inside, depth, self._types) for i, inside in enumerate(members)]
        edges = sorted({(place[a], place[b]) for a, b in self.edges if place[a] != place[b]})
        return AutogradGraph(nodes, edges, list(dict.fromkeys(place[r] for r in self.roots)), self._owned, self._types)

    def summary(self) -> str:
        """Counts, memory, a row for each module or operation, and problems, as text."""
        kinds = collections.Counter(n.kind for n in self.nodes)
        parts = [f"{kinds[k]} {_plural(k, kinds[k])}" for k in ("op", "module", "parameter", "leaf") if kinds[k]]
        view = self if kinds["module"] else self.by_module()
        held = _size(self.held_bytes)
        lines = [
            f"{len(self)} nodes, {len(self.edges)} edges: {', '.join(parts)}",
            f"saved for backward: {_size(self.saved_bytes)}, {held} of it neither parameter nor buffer",
            "",
            *_table(["node", "what", "nodes", "output", "saved", "parameters"], [_row(n) for n in view.nodes]),
        ]
        return "\n".join([*lines, *self._remarks()])

    def _remarks(self) -> Iterator[str]:
        freed, changed = sum(n.freed for n in self.nodes), [_changed(n) for n in self.nodes if n.changed]
        for name, i in self.holders.items():
            n = self.nodes[i]
            place = f" of module {n.module}" if n.module and n.module != n.name else ""
            yield f"buffer {name} holds the graph up to {n.name}{place}: detach it"
        if freed:
            yield f"a backward pass has freed the saved tensors of {freed} {'node' if freed == 1 else 'nodes'}"
        if changed:
            yield f"the backward pass will fail, saved tensors were changed in place: {', '.join(changed)}"

    def to_dot(self) -> str:
        """DOT text for Graphviz; draw it with `dot -Tsvg`."""
        lines = ["digraph autograd {", "  rankdir=TB;", '  node [shape=box, style="rounded,filled", fontname="sans"];']
        for n in self.nodes:
            title, detail = labels(n)
            label = _quoted(f"{title}\n{detail}" if detail else title)
            edge = ', color="#c8553d", penwidth=2' if n.held_by or n.changed else ""
            lines.append(f'  n{n.id} [label={label}, fillcolor="{_FILL[n.kind]}"{edge}];')
        return "\n".join([*lines, *(f"  n{a} -> n{b};" for a, b in self.edges), "}", ""])

    def plot(self, columns: int = 1, engine: str = "fastrbn") -> Any:
        """Draw the graph, inputs at the top, as large as it needs.

        Parameters
        ----------
        columns : int, default 1
            Number of columns to cut a tall picture into, to be read from left to right.
        engine : {"fastrbn", "dot"}, default "fastrbn"
            "dot" places the boxes with Graphviz's program `dot`, which must be installed.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ValueError
            If an argument is invalid.
        RuntimeError
            If `dot` is not installed or fails.
        """
        from fastrbn import plots

        whole("columns", columns)
        one_of("engine", engine, ("fastrbn", "dot"))
        boxes: list[dict[str, Any]] = []
        for n in self.nodes:
            title, detail = labels(n)
            kind = "warning" if n.held_by or n.changed else "root" if n.id in self.roots else n.kind
            width, height = plots.box_size(title, detail)
            boxes.append({"title": title, "detail": detail, "kind": kind, "width": width, "height": height})
        sizes: list[layout.Point] = [(b["width"], b["height"]) for b in boxes]
        minor = [n.kind in ("parameter", "leaf") for n in self.nodes]
        if engine == "fastrbn":
            places, routes = layout.layered(sizes, self.edges, minor)
        else:
            places, routes = layout.by_graphviz(sizes, self.edges)
        places, routes = layout.in_columns(places, routes, sizes, self.edges, columns)
        return plots.plot_graph([{**b, "x": x, "y": y} for b, (x, y) in zip(boxes, places)], routes)


def labels(n: GraphNode) -> tuple[str, str]:
    """Title and detail of a box."""
    shape = "" if n.shape is None else "×".join(map(str, n.shape)) or "scalar"
    details = [shape, f"{_size(n.saved_bytes)} saved" if n.saved_bytes else "", "freed" if n.freed else ""]
    details += [f"held by {name}" for name in n.held_by]
    if n.kind == "module":
        call = f" (call {n.call})" if n.call > 1 else ""
        return f"{n.name} {n.type}{call}".strip(), ", ".join(filter(None, details))
    if n.kind != "op":
        return n.name, shape
    return n.name, ", ".join(filter(None, [n.module, *details]))


def _joined(box: int, members: list[GraphNode], depth: int | None, types: dict[str, str]) -> GraphNode:
    """Merge the nodes of a box into one."""
    ops = [n for n in members if n.kind == "op"]
    if not ops or (len(members) == 1 and (ops[0].module is None or ops[0].module == "")):
        return dataclasses.replace(members[0], id=box)
    last, memory = ops[-1], _merged(ops)
    if last.module is None or (last.module == "" and not last.type):
        name, kind, type_, call = last.name, "op", "", 0
    else:
        parts = last.module.split(".")
        cut = depth is not None and len(parts) > depth
        name, kind = ".".join(parts[:depth] if cut else parts), "module"
        type_, call = (types.get(name, ""), 0) if cut else (last.type, last.call)
    return dataclasses.replace(
        last,
        id=box,
        kind=kind,
        name=name,
        type=type_,
        call=call,
        module=None if kind == "op" else name,
        saved_bytes=sum(memory.values()),
        freed=any(n.freed for n in ops),
        changed=any(n.changed for n in ops),
        changed_tensors=tuple(dict.fromkeys(t for n in ops for t in n.changed_tensors)),
        parameters=tuple(n.name for n in members if n.kind == "parameter"),
        buffers=tuple(dict.fromkeys(b for n in ops for b in n.buffers)),
        held_by=tuple(b for n in ops for b in n.held_by),
        size=sum(n.size for n in members),
        memory=memory,
    )


def _changed(n: GraphNode) -> str:
    return f"{n.name} ({', '.join(n.changed_tensors)})" if n.changed_tensors else n.name


def _merged(nodes: Iterable[GraphNode]) -> dict[Any, int]:
    """Saved bytes by piece of memory."""
    memory: dict[Any, int] = {}
    for n in nodes:
        for key, size in n.memory.items():
            memory[key] = max(size, memory.get(key, 0))
    return memory


def _row(n: GraphNode) -> list[str]:
    shape = "" if n.shape is None else "×".join(map(str, n.shape)) or "scalar"
    what = n.type if n.kind == "module" else {"op": "operation"}.get(n.kind, n.kind)
    call = f" (call {n.call})" if n.call > 1 else ""
    params = ", ".join(p.removeprefix(f"{n.name}.") for p in n.parameters)
    saved = _size(n.saved_bytes) if n.saved_bytes else ""
    return [(n.name or "(model)") + call, what, str(n.size), shape, saved, params]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows)]


def _size(size: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _plural(kind: str, n: int) -> str:
    words = {"op": "operations", "module": "modules", "parameter": "parameters", "leaf": "other leaves"}
    return words[kind] if n != 1 else {"op": "operation", "leaf": "other leaf"}.get(kind, kind)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
