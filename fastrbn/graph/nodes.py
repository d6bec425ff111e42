"""`autograd_graph`: from a tensor to plain nodes and edges."""

from __future__ import annotations

import collections
import contextlib
import dataclasses

import torch
from torch import Tensor, nn

from . import held, walk
from .modules import modules_of, record_modules
from .views import AutogradGraph


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """One node.

    - `id`: its place in `AutogradGraph.nodes`; inputs have smaller ones.
    - `kind`: "op" (an operation), "parameter", "leaf" (any other tensor that requires grad), "module" (of `by_module`).
    - `name`: autograd's for an operation (`ConvolutionBackward0`), the qualified one of a parameter or module; `type`:
      the class of the module the node came from, where it is known.
    - `module`: the qualified name of that module, "" for the model itself, None where nothing tells; `call`: which of
      its calls (from 1; 0: not recorded).
    - `shape`, `dtype`: of the (first) output.
    - `saved_bytes`: what the node keeps for its backward; `freed`: a backward has freed it; `changed`: some of it was
      changed in place since, so that its backward will fail; `changed_tensors`: the names of these, where they are
      parameters, buffers or attributes of modules.
    - `parameters`: those inside (of a module); `buffers`: those it keeps for its backward; `held_by`: those that are
      its output, and so hold the graph up to here: usually a forgotten detach; `size`: how many of autograd's nodes.
    - `memory`: bytes by piece of memory, to add up over nodes without counting any twice.
    """

    id: int
    kind: str
    name: str
    module: str | None = None
    type: str = ""
    call: int = 0
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    saved_bytes: int = 0
    freed: bool = False
    changed: bool = False
    changed_tensors: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    held_by: tuple[str, ...] = ()
    size: int = 1
    memory: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)


def autograd_graph(tensor, model=None) -> AutogradGraph:
    """The autograd graph that a tensor's backward pass would run through.

    - `tensor`: a tensor that requires grad (a loss, before or after its backward), several in a list, tuple or
      dictionary, or a function without arguments that computes it:
      `autograd_graph(lambda: F.cross_entropy(model(x), y), model)`. The function is called once, as training would: a
      norm's statistics move by one step.
    - `model`: gives parameters and buffers their names, and nodes their modules. With a function, or a tensor computed
      in `with record_modules(model)`, every node's module is known; else that of nodes which use a parameter.

    Nothing is held: the result is names and numbers. Raises TypeError for what is no tensor, ValueError for one that
    does not require grad.
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


def _roots(value):
    tensors = walk._tensors(value)
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
            f"graph: compute it outside of torch.no_grad and detach, from parameters that require grad"
        )
    return roots


def _described(nodes, model, types) -> list[GraphNode]:
    named = {} if model is None else dict(model.named_parameters(remove_duplicate=False))
    params = {p: name for name, p in reversed(named.items())}  # of tied ones the first name
    by_memory, ends = _buffers(model)
    names = {} if model is None else held.names_by_memory(model)
    taken = collections.Counter()
    found = []
    for i, (node, (module, kind, call)) in enumerate(zip(nodes, modules_of(nodes, params))):
        shape, dtype = walk.output_of(node)
        place = {"module": module, "type": kind or types.get(module, ""), "call": call}
        if walk.is_leaf(node):
            leaf = node.variable
            name, kind = _leaf_name(leaf, params, taken)
            found.append(GraphNode(i, kind, name, **place, shape=tuple(leaf.shape), dtype=leaf.dtype))
            continue
        saved, freed, changed = walk.saved_by(node)
        memory = {}
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


def _buffers(model):
    """Names by memory, and by the node where a buffer's own graph ends."""
    by_memory, ends = {}, collections.defaultdict(list)
    for name, buffer in () if model is None else model.named_buffers():
        if buffer.numel():
            by_memory[walk.memory_of(buffer)[0]] = name
        if buffer.grad_fn is not None:
            ends[buffer.grad_fn].append(name)
    return by_memory, ends


def _leaf_name(leaf, params, taken) -> tuple[str, str]:
    if leaf in params:
        return params[leaf], "parameter"
    kind = "parameter" if isinstance(leaf, nn.Parameter) else "leaf"
    name = f"{kind} {tuple(leaf.shape)}"
    taken[name] += 1
    return (name if taken[name] == 1 else f"{name} #{taken[name]}"), kind
