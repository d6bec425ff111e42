"""Checks that an optimiser has what the loop and callbacks need, and whether it can be a fused one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def _groups(opt: Any) -> bool:
    groups = getattr(opt, "param_groups", None)
    return isinstance(groups, (list, tuple)) and all(isinstance(g, dict) and "params" in g for g in groups)


NEEDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("step()", lambda opt: callable(getattr(opt, "step", None))),
    "zero_grad": ("zero_grad()", lambda opt: callable(getattr(opt, "zero_grad", None))),
    "param_groups": ("param_groups, a list of dictionaries with 'params'", _groups),
    "lr": (
        "an 'lr' in each of its param_groups",
        lambda opt: _groups(opt) and all("lr" in g for g in opt.param_groups),
    ),
    "state": ("state, a dictionary by parameter", lambda opt: hasattr(opt, "state")),
    "state_dict": (
        "state_dict() and load_state_dict()",
        lambda opt: hasattr(opt, "state_dict") and hasattr(opt, "load_state_dict"),
    ),
}


def check(opt: Any, users: dict[str, Iterable[str]]) -> None:
    """TypeError if the optimiser lacks something. `users`: who needs what, by names of `NEEDS`."""
    lacks = {name for name in {n for names in users.values() for n in names} if not NEEDS[name][1](opt)}
    if not lacks:
        return
    who = [user for user, names in users.items() if lacks.intersection(names)]
    what = "; ".join(text for name, (text, _) in NEEDS.items() if name in lacks)
    raise TypeError(
        f"{', '.join(who)}: the optimiser must have what PyTorch's have, and {type(opt).__name__} lacks {what}: derive "
        f"it from torch.optim.Optimizer, or remove the callbacks that need it"
    )


def check_closure(opt: Any, claims: dict[str, str]) -> None:
    """TypeError if the optimiser's step needs a closure, as LBFGS's does, and no callback has claimed the step."""
    if "step" in claims:
        return
    try:
        closure = inspect.signature(opt.step).parameters.get("closure")
    except (TypeError, ValueError):  # some callables have no signature
        return
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"{type(opt).__name__}.step needs a closure, a function that evaluates the loss again: add the callback "
            f"Closure to the run, as in cbs=[Closure]"
        )


def can_be_fused(params: Iterable[nn.Parameter]) -> bool:
    """True if a fused step, one kernel for all parameters, trains them as the plain step does.

    It takes parameters to be vectors in memory, so those with gaps would be trained wrongly; in PyTorch 2.9 so would
    those in half precision on the CPU. Subclasses of nn.Parameter, such as FSDP's, may have no such operator.
    """
    return all(
        type(p) is nn.Parameter
        and p.dtype in (torch.float32, torch.float64)
        and torch.empty_like(p, device="meta").stride() == p.stride()  # a copy has no gaps
        for p in params
    )
