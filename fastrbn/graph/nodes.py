"""`GraphNode`: one node of the graph, as names and numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """One node of an `AutogradGraph`.

    Parameters
    ----------
    id : int
        Position in `AutogradGraph.nodes`. Inputs have smaller ids than their users.
    kind : {"op", "parameter", "leaf", "module"}
        An operation, a parameter, another tensor that requires grad, or a module (in the view of `by_module`).
    name : str
        Autograd's name of an operation (`ConvolutionBackward0`), or the qualified name of a parameter or module.
    module : str or None
        Qualified name of the module the node came from, "" for the model itself, None if unknown.
    type : str
        Class of that module, if known.
    call : int
        Which call of the module it was, from 1; 0 if not recorded.
    shape : tuple of int or None
        Shape of the (first) output.
    dtype : torch.dtype or None
        Its dtype.
    saved_bytes : int
        Memory that the node saved for its backward pass.
    freed : bool
        Whether a backward pass has freed it.
    changed : bool
        Whether some of it was changed in place since, so that the backward pass will fail.
    changed_tensors : tuple of str
        Names of the changed tensors that are parameters, buffers or attributes of modules.
    parameters : tuple of str
        Parameters inside a module.
    buffers : tuple of str
        Buffers that the node saved for its backward pass.
    held_by : tuple of str
        Buffers that are the node's output and so keep the graph up to here alive; usually a forgotten detach.
    size : int
        How many autograd nodes it stands for.
    memory : dict
        Bytes by piece of memory, for sums over nodes that count nothing twice.
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
    memory: dict[Any, int] = dataclasses.field(default_factory=dict, repr=False, compare=False)
