"""`autograd_graph`: from a tensor to plain nodes and edges."""

from __future__ import annotations

import collections
import contextlib
from typing import Any

from torch import Tensor, nn

from fastrbn.util import items_of

from . import held, walk
from .modules import modules_of, record_modules
from .nodes import GraphNode
from .views import AutogradGraph


def autograd_graph(tensor: Any, model: nn.Module | None = None) -> AutogradGraph:
    """Read the autograd graph that a tensor's backward pass would run through.

    The result is names and numbers; it keeps no tensor alive.

    Parameters
    ----------
    tensor : Tensor, nested list, tuple or dict of them, or callable
        Tensors that require grad, such as a loss before or after its backward pass; or a function without arguments
        that computes them. The function is called once and works like a training step: the statistics of norms are
        updated.
    model : nn.Module, optional
        Gives parameters and buffers their names, and nodes their modules. With a function, or a tensor computed inside
        `record_modules(model)`, the module of every node is known; otherwise only of nodes that use a parameter.

    Returns
    -------
    AutogradGraph

    Raises
    ------
    TypeError
        If `tensor` has no tensor in it.
    ValueError
        If no tensor requires grad.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> graph = autograd_graph(lambda: model(torch.randn(2, 4)).sum(), model)
    >>> [node.name for node in graph.nodes if node.kind == "op"]
    ['TBackward0', 'AddmmBackward0', 'ReluBackward0', 'SumBackward0']
    >>> sorted(graph.parameters)
    ['0.bias', '0.weight']
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or None; got {type(model).__name__}")
    if callable(tensor) and not isinstance(tensor, Tensor):
        with contextlib.nullcontext() if model is None else record_modules(model):
            tensor = tensor()
    roots = _roots(tensor)
    nodes = walk.reach(roots)
    ids = {node: i for i, node in enumerate(nodes)}
    edges = sorted({(ids[c], i) for n, i in ids.items() for c, _ in n.next_functions if c is not None})
    owned = [n.variable for n in nodes if walk.is_leaf(n)] + ([] if model is None else list(model.buffers()))
    memory = {walk.memory_of(t)[0] for t in owned}
    types = {} if model is None else {name: type(m).__name__ for name, m in model.named_modules()}
    return AutogradGraph(_described(nodes, model, types), edges, [ids[r] for r in dict.fromkeys(roots)], memory, types)


def _roots(value: Any) -> list[Any]:
    tensors = list(items_of(value, Tensor))
    if not tensors:
        raise TypeError(
            f"autograd_graph needs a tensor, several in a list, or a function that returns them; got "
            f"{type(value).__name__}"
        )
    roots = [root for t in tensors if (root := walk.root_of(t)) is not None]
    if not roots:
        t = tensors[0]
        raise ValueError(
            f"autograd_graph needs a tensor that requires grad; got {t.dtype} of shape {tuple(t.shape)} without a "
            f"graph: compute it without torch.no_grad or detach, from parameters that require grad"
        )
    return roots


def _described(nodes: list[Any], model: nn.Module | None, types: dict[str, str]) -> list[GraphNode]:
    named = {} if model is None else dict(model.named_parameters(remove_duplicate=False))
    params: dict[Tensor, str] = {p: name for name, p in reversed(named.items())}  # the first name of a tied parameter
    by_memory, ends = _buffers(model)
    names = {} if model is None else held.names_by_memory(model)
    taken: collections.Counter[str] = collections.Counter()
    found = []
    for i, (node, (module, kind, call)) in enumerate(zip(nodes, modules_of(nodes, params))):
        shape, dtype = walk.output_of(node)
        place: dict[str, Any] = {"module": module, "type": kind or types.get(module or "", ""), "call": call}
        if walk.is_leaf(node):
            leaf = node.variable
            name, kind = _leaf_name(leaf, params, taken)
            found.append(GraphNode(i, kind, name, **place, shape=tuple(leaf.shape), dtype=leaf.dtype))
            continue
        saved, freed, changed = walk.saved_by(node)
        memory: dict[Any, int] = {}
        for t in saved:
            key, size = walk.memory_of(t)
            memory[key] = max(size, memory.get(key, 0))
        found.append(
            GraphNode(
                i,
                "op",
                walk.name_of(node),
                **place,
                shape=shape,
                dtype=dtype,
                saved_bytes=sum(memory.values()),
                freed=freed,
                changed=bool(changed),
                changed_tensors=tuple(dict.fromkeys(n for t in changed if (n := held.name_of(t, names)[0]))),
                buffers=tuple(by_memory[key] for key in memory if key in by_memory),
                held_by=tuple(ends.get(node, ())),
                memory=memory,
            )
        )
    return found


def _buffers(model: nn.Module | None) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    """Buffer names by memory, and by the node that made the buffer."""
    by_memory: dict[Any, str] = {}
    ends: dict[Any, list[str]] = collections.defaultdict(list)
    for name, buffer in () if model is None else model.named_buffers():
        if buffer.numel():
            by_memory[walk.memory_of(buffer)[0]] = name
        if buffer.grad_fn is not None:
            ends[buffer.grad_fn].append(name)
    return by_memory, ends


def _leaf_name(leaf: Tensor, params: dict[Tensor, str], taken: collections.Counter[str]) -> tuple[str, str]:
    """(name, kind) of a leaf; unnamed ones are numbered."""
    if leaf in params:
        return params[leaf], "parameter"
    kind = "parameter" if isinstance(leaf, nn.Parameter) else "leaf"
    name = f"{kind} {tuple(leaf.shape)}"
    taken[name] += 1
    return (name if taken[name] == 1 else f"{name} #{taken[name]}"), kind
