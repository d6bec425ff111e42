"""Facts about batches and loaders: pairs, sizes, lengths, and how a loss reduces them."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def pair(batch: Any) -> Any:
    """`batch` itself if it is a pair; otherwise a TypeError that says what came."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch
    advice = "wrap the loader, or give a DataLoader a collate_fn that returns a pair"
    if isinstance(batch, torch.Tensor):
        got = f"a tensor of shape {tuple(batch.shape)}"
    elif isinstance(batch, dict):
        names = list(batch)
        got = f"a dictionary with {', '.join(map(repr, names))}"
        if len(names) > 1:
            advice += f", such as (batch[{names[0]!r}], batch[{names[1]!r}])"
    else:
        got = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}"
    raise TypeError(f"a loader must yield pairs (xb, yb), tuples or lists of two; got {got}: {advice}")


def length(dl: Any) -> int | None:
    """The number of batches; None for loaders without a length, such as those of iterable data sets."""
    try:
        return len(dl)
    except TypeError:
        return None


def batch_size(xb: Any) -> int:
    """The number of samples; for several inputs (a tuple, list or dictionary) that of the first."""
    while isinstance(xb, (list, tuple, dict)):
        xb = next(iter(xb.values() if isinstance(xb, dict) else xb))
    return len(xb)


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
