"""AutogradGraph: what `autograd_graph` returns; as text, as DOT, as a picture, and at the level of modules."""

from __future__ import annotations

import collections
import dataclasses

from . import layout
from .modules import groups

_FILL = {"parameter": "#fdf0d5", "leaf": "#e8e8e8", "op": "#ffffff", "module": "#dbe7f3"}


class AutogradGraph:
    """Nodes and edges of a graph, in the direction of the forward pass. Plain data: it keeps no tensor alive.

    - `nodes`: list of `GraphNode`, inputs before what uses them; `edges`: list of (id, id), from an input to its
      user; `roots`: ids of the nodes that the backward pass starts from.
    - `parameters`: name → ids of the nodes it is or is inside of; `buffers`: name → ids of those that save it or that
      it holds; `holders`: name of a buffer → id of the node up to which it holds the graph (empty when all is well).
    - `saved_bytes`: memory that the nodes keep for the backward pass, each piece once; `held_bytes`: of these what is
      neither parameter nor buffer, and so is there for the backward pass only.
    - `len(graph)` is the number of autograd's nodes, also `by_module`.
    """

    def __init__(self, nodes, edges, roots, owned_memory=frozenset(), types=None):
        self.nodes, self.edges, self.roots = nodes, edges, roots
        self._owned, self._types = owned_memory, types or {}  # memory of parameters and buffers; classes of modules
        self.parameters, self.buffers, self.holders = {}, {}, {}
        for n in nodes:
            for name in [n.name] if n.kind == "parameter" else n.parameters:
                self.parameters.setdefault(name, []).append(n.id)
            for name in dict.fromkeys((*n.buffers, *n.held_by)):
                self.buffers.setdefault(name, []).append(n.id)
            self.holders.update(dict.fromkeys(n.held_by, n.id))
        memory = _merged(nodes)
        self.saved_bytes = sum(memory.values())
        self.held_bytes = sum(size for key, size in memory.items() if key not in self._owned)

    def __len__(self):
        return sum(n.size for n in self.nodes)

    def __repr__(self):
        return f"AutogradGraph({len(self)} nodes, {len(self.edges)} edges, {_size(self.saved_bytes)} saved)"

    def __str__(self):
        return self.summary()

    def by_module(self, depth: int | None = None) -> AutogradGraph:
        """The same at the level of layers: a node for each call of a module, parameters inside; what belongs to none
        stays as it is.

        `depth`: the deepest level of names to tell apart (1: the model's children); None: all. A module whose
        operations surround those of another is cut in two, so that the view has no circles either.
        """
        if depth is not None and not (isinstance(depth, int) and depth >= 1):
            raise ValueError(f"depth must be a whole number from 1, or None; got {depth!r}")
        boxes = groups(self.nodes, self.edges, depth)
        place = {i: k for k, box in enumerate(boxes) for i in box}
        members = [[self.nodes[i] for i in box] for box in boxes]
        nodes = [_joined(i, inside, depth, self._types) for i, inside in enumerate(members)]
        edges = sorted({(place[a], place[b]) for a, b in self.edges if place[a] != place[b]})
        return AutogradGraph(nodes, edges, list(dict.fromkeys(place[r] for r in self.roots)), self._owned, self._types)

    def summary(self) -> str:
        """What there is, and a row for each module or operation, as text."""
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

    def _remarks(self):
        freed, changed = sum(n.freed for n in self.nodes), [_changed(n) for n in self.nodes if n.changed]
        for name, i in self.holders.items():
            n = self.nodes[i]
            place = f" of module {n.module}" if n.module and n.module != n.name else ""
            yield f"buffer {name} holds the graph up to {n.name}{place}: detach it"
        if freed:
            yield f"a backward pass has freed what {freed} {'node' if freed == 1 else 'nodes'} had saved"
        if changed:
            yield f"changed in place since it was saved, the backward pass will fail: {', '.join(changed)}"

    def to_dot(self) -> str:
        """DOT text for Graphviz: `dot -Tsvg`."""
        lines = ["digraph autograd {", "  rankdir=TB;", '  node [shape=box, style="rounded,filled", fontname="sans"];']
        for n in self.nodes:
            title, detail = labels(n)
            label = _quoted(f"{title}\n{detail}" if detail else title)
            edge = ', color="#c8553d", penwidth=2' if n.held_by or n.changed else ""
            lines.append(f'  n{n.id} [label={label}, fillcolor="{_FILL[n.kind]}"{edge}];')
        return "\n".join([*lines, *(f"  n{a} -> n{b};" for a, b in self.edges), "}", ""])

    def plot(self, columns: int = 1, engine: str = "fastrbn"):
        """A picture, inputs above, as large as the graph needs. Returns the Figure.

        - `columns`: cut a tall picture into so many, to be read from left to right.
        - `engine`: "fastrbn" (needs nothing), or "dot": placed by Graphviz's program `dot`, where that is installed.
        """
        from fastrbn import plots

        if not (isinstance(columns, int) and columns >= 1):
            raise ValueError(f"columns must be a whole number from 1; got {columns!r}")

        boxes = []
        for n in self.nodes:
            title, detail = labels(n)
            kind = "warning" if n.held_by or n.changed else "root" if n.id in self.roots else n.kind
            width, height = plots.box_size(title, detail)
            boxes.append({"title": title, "detail": detail, "kind": kind, "width": width, "height": height})
        sizes = [(b["width"], b["height"]) for b in boxes]
        minor = [n.kind in ("parameter", "leaf") for n in self.nodes]
        if engine == "fastrbn":
            places, routes = layout.layered(sizes, self.edges, minor)
        elif engine == "dot":
            places, routes = layout.by_graphviz(sizes, self.edges)
        else:
            raise ValueError(f'engine must be "fastrbn" or "dot"; got {engine!r}')
        places, routes = layout.in_columns(places, routes, sizes, self.edges, columns)
        return plots.plot_graph([{**b, "x": x, "y": y} for b, (x, y) in zip(boxes, places)], routes)


def labels(n) -> tuple[str, str]:
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


def _joined(box, members, depth, types):
    """One node for several."""
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


def _changed(n) -> str:
    return f"{n.name} ({', '.join(n.changed_tensors)})" if n.changed_tensors else n.name


def _merged(nodes) -> dict:
    memory = {}
    for n in nodes:
        for key, size in n.memory.items():
            memory[key] = max(size, memory.get(key, 0))
    return memory


def _row(n):
    shape = "" if n.shape is None else "×".join(map(str, n.shape)) or "scalar"
    what = n.type if n.kind == "module" else {"op": "operation"}.get(n.kind, n.kind)
    call = f" (call {n.call})" if n.call > 1 else ""
    params = ", ".join(p.removeprefix(f"{n.name}.") for p in n.parameters)
    saved = _size(n.saved_bytes) if n.saved_bytes else ""
    return [(n.name or "(model)") + call, what, str(n.size), shape, saved, params]


def _table(head, rows):
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows)]


def _size(size: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _plural(kind, n):
    words = {"op": "operations", "module": "modules", "parameter": "parameters", "leaf": "other leaves"}
    return words[kind] if n != 1 else {"op": "operation", "leaf": "other leaf"}.get(kind, kind)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
