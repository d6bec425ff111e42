"""Which attributes of a callback change during a fit: those that are lost when nobody saves them."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LRScheduler


def looks(cb) -> dict:
    """Something for each public attribute that is another when the attribute has changed, without copies of data."""
    looks = {}
    for name, value in vars(cb).items():
        if name.startswith("_") or name == "run" or isinstance(value, LRScheduler):  # those Callback.state_dict keeps
            continue
        if isinstance(value, (bool, int, float, str, type(None))):
            looks[name] = value
        elif isinstance(value, torch.Tensor):
            looks[name] = (id(value), value._version)
        elif isinstance(value, (list, dict, set)):
            looks[name] = (id(value), len(value))
        else:
            looks[name] = id(value)
    return looks


def changed(before, now) -> list[str]:
    """The attributes of which `looks` differ."""
    nothing = object()
    return [name for name in {**before, **now} if before.get(name, nothing) != now.get(name, nothing)]
