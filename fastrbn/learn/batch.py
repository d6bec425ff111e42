"""Facts about batches and loaders: sizes, lengths, and how a loss reduces them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fastrbn.util import items_of


def length(dl: Any) -> int | None:
    """The number of batches; None for loaders without a length, such as those of iterable data sets."""
    try:
        return len(dl)
    except TypeError:
        return None


def batch_size(xb: Any) -> int:
    """The number of samples; for several inputs (tuples, lists, dictionaries) that of the first tensor with samples."""
    for t in items_of(xb, torch.Tensor):
        if t.dim():
            return len(t)
    while isinstance(xb, (list, tuple, dict)) and xb:
        xb = next(iter(xb.values() if isinstance(xb, dict) else xb))
    try:
        return len(xb)
    except TypeError:
        raise TypeError(
            f"the number of samples in a batch is the length of its first tensor; got {type(xb).__name__} without "
            f"tensors or a length: give that class __len__, or let the learner's unpack return tensors"
        ) from None


def reduction(loss_func: Any) -> str | None:
    """How a loss function reduces ("mean", "sum" or "none"), from its attribute or parameter `reduction`; None if it
    has neither."""
    said = getattr(loss_func, "reduction", None)
    if not isinstance(said, str) and callable(loss_func):
        try:
            parameter = inspect.signature(loss_func).parameters.get("reduction")
        except (TypeError, ValueError):  # some callables have no signature
            return None
        said = parameter.default if parameter is not None else None
    return said if isinstance(said, str) else None


def step_size(run: Any) -> int:
    """The number of samples in the run's batch, over all processes."""
    return run.samples or batch_size(run.xb)


def gradients_are_whole(run: Any) -> bool:
    """True if the gradients are those of all processes; False while they add up in each process alone."""
    return not run.apart


def gradients(opt: Any) -> list[torch.Tensor]:
    """The gradients that the next step of `opt` will use."""
    return [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None]
