"""Keep and restore what training changes: in memory (`Snapshot`), or as plain data for a file.

In memory the same objects get their values back. Plain data goes by name, so that another process can load it; names
are those without `torch.compile`.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastrbn.random_state import RandomState

__all__ = [
    "RandomState",
    "Snapshot",
    "load_module_state",
    "load_opt_state",
    "load_plain_state_dict",
    "module_state",
    "plain_name",
    "plain_state_dict",
]

_HOW = ("fused", "foreach", "capturable")
_PLAIN = (bool, int, float, str, type(None))  # attributes of a module that count or switch, such as `training`


class Snapshot:
    """Keeps modules, an optimiser and the random states; `restore`, or the end of a `with` block, puts them back.

    Tensors get their values back in place, bit for bit, so whatever refers to a parameter or a param group keeps
    referring to it. Of other attributes, plain ones (numbers, strings, None) are restored and new ones removed. A model
    that was moved to another device stays there.

    Parameters
    ----------
    modules : iterable of nn.Module
        Such as the model, and a loss function with parameters.
    opt : torch.optim.Optimizer, optional
        Its state and param groups.
    loaders : iterable, default ()
        Their random states; see `RandomState`.
    parameters : bool, default True
        False keeps no copy of the parameters' values, for code that does not train.

    Raises
    ------
    ValueError
        If a module is lazy and not initialised yet.
    """

    def __init__(
        self, modules: Iterable[nn.Module], opt: Any = None, loaders: Iterable[Any] = (), parameters: bool = True
    ):
        modules = list(modules)
        lazy = [n for m in modules for n, t in (*m.named_parameters(), *m.named_buffers()) if is_lazy(t)]
        if lazy:
            raise ValueError(
                f"the model must be initialised before its state can be kept; it has lazy modules "
                f"({', '.join(lazy[:3])}): give it a batch first, as in learn.model(xb)"
            )
        self._random = RandomState(loaders)
        self._modules = [_Kept(m, parameters) for module in modules for m in module.modules()]
        self._opt = opt
        if opt is not None:
            self._state = {p: copy.deepcopy(s) for p, s in opt.state.items()}
            self._groups = list(map(_copied_group, opt.param_groups))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for kept in self._modules:
            kept.restore()
        if self._opt is not None:
            self._opt.state.clear()
            self._opt.state.update({p: copy.deepcopy(s) for p, s in self._state.items()})
            del self._opt.param_groups[len(self._groups) :]
            for group, saved in zip(self._opt.param_groups, self._groups):
                group.clear()
                group.update(_copied_group(saved))
        self._random.restore()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


class _Kept:
    """One module, without its children: parameters, buffers, and what else its attributes hold."""

    def __init__(self, module: nn.Module, parameters: bool):
        self.tables: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]
        self.names = [set(table) for table in self.tables]
        self.tensors = [
            (table, name, value, value.detach().clone() if parameters or table is not module._parameters else None)
            for table in self.tables
            for name, value in table.items()
            if isinstance(value, Tensor)
        ]
        self.plain = [(t, n, value) for t in self.tables for n, value in t.items() if isinstance(value, _PLAIN)]

    def restore(self) -> None:
        for table, names in zip(self.tables, self.names):
            for name in table.keys() - names:
                del table[name]
        for table, name, original, saved in self.tensors:
            table[name] = original if saved is None else _filled(original, saved, table.get(name))
        for table, name, value in self.plain:
            table[name] = value


def _filled(original: Tensor, saved: Tensor, current: Any) -> Tensor:
    """The tensor to put back, with the saved value: the original object, unless the model was moved since."""
    moved = isinstance(current, Tensor) and current.device != original.device
    target = current if moved and current.shape == saved.shape else original
    if target.shape != saved.shape:
        target.data = saved.to(target.device)
    elif target.is_meta or target.layout != torch.strided or not torch.equal(target, saved.to(target.device)):
        target.copy_(saved)  # only if it has changed: a graph may have saved this tensor for its backward pass
    return target


def _copied_group(group: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if k == "params" else copy.deepcopy(v) for k, v in group.items()}


def plain_name(name: str) -> str:
    """A parameter's or module's name without the `_orig_mod.` that `torch.compile` puts before it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain_state_dict(module: nn.Module) -> dict[str, Any]:
    """`module.state_dict()` under plain names: it loads into the model that was not compiled."""
    state = module.state_dict()
    plain: Any = collections.OrderedDict((plain_name(name), value) for name, value in state.items())
    plain._metadata = {plain_name(name): value for name, value in getattr(state, "_metadata", {}).items()}
    return plain


def load_plain_state_dict(module: nn.Module, state: dict[str, Any]) -> None:
    """Load what `plain_state_dict` returned into a module that may be compiled."""
    here = {plain_name(name): name for name in module.state_dict()}
    renamed: Any = collections.OrderedDict((here.get(plain_name(name), name), v) for name, v in state.items())
    if hasattr(state, "_metadata"):
        modules = [name for name, _ in module.named_modules()]
        renamed._metadata = {n: state._metadata[plain_name(n)] for n in modules if plain_name(n) in state._metadata}
    module.load_state_dict(renamed)


def module_state(module: nn.Module) -> dict[str, Any]:
    """All that training changes in a module, by name. Tensors are the module's own, not copies."""
    weights = plain_state_dict(module)
    named = [(plain_name(name), p) for name, p in module.named_parameters()]
    return {
        "model": weights,
        "buffers": {name: b for n, b in module.named_buffers() if (name := plain_name(n)) not in weights},
        "switches": {f"{plain_name(n)}.{k}": v for n, m in module.named_modules() for k, v in _switches(m)},
        "frozen": [name for name, p in named if not p.requires_grad],
        "grads": {name: p.grad for name, p in named if p.grad is not None},  # accumulated so far
    }


@torch.no_grad()
def load_module_state(root: nn.Module, state: dict[str, Any]) -> None:
    """Load what `module_state` returned."""
    load_plain_state_dict(root, state["model"])
    modules = {plain_name(name): m for name, m in root.named_modules()}
    for name, saved in state["buffers"].items():
        module, _, own = plain_name(name).rpartition(".")
        buffers = modules[module]._buffers
        now = buffers.get(own)
        buffers[own] = saved.clone() if now is None else saved.to(now.device, copy=True)
    switches = {plain_name(name): value for name, value in state["switches"].items()}
    for name, m in root.named_modules():
        for attr, _ in list(_switches(m)):
            if (key := f"{plain_name(name)}.{attr}") in switches:
                setattr(m, attr, switches[key])
    frozen = set(map(plain_name, state["frozen"]))
    grads = {plain_name(name): grad for name, grad in state["grads"].items()}
    for name, p in root.named_parameters():
        p.requires_grad_(plain_name(name) not in frozen)
        grad = grads.get(plain_name(name))
        p.grad = None if grad is None else grad.to(p.device, copy=True)


def load_opt_state(opt: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load `opt.state_dict()` of another process, in the saved dtypes and into the tensors that hold rates here.

    How a step is computed (`fused`, `foreach`, `capturable`) stays as it is here: it is part of no result, and for
    `fused` the optimiser has told a GradScaler what to expect.
    """
    tensors = [{k: v for k, v in g.items() if isinstance(v, Tensor)} for g in opt.param_groups]
    both = zip(opt.param_groups, saved["param_groups"])
    groups = [{**now, **then, **{k: now[k] for k in _HOW if k in now}} for now, then in both]
    saved = {**saved, "param_groups": groups}  # settings that only this one has stay
    opt.load_state_dict(saved)
    for group, kept in zip(opt.param_groups, tensors):
        for name, value in kept.items():  # a compiled or captured optimiser reads its rate from this very tensor
            group[name] = value.copy_(torch.as_tensor(group[name]))
    indices = (i for g in saved["param_groups"] for i in g["params"])
    for i, p in zip(indices, (p for g in opt.param_groups for p in g["params"])):
        for name, value in saved["state"].get(i, {}).items():
            now = opt.state[p].get(name)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                opt.state[p][name] = value.to(now.device, copy=True)  # torch cast it to the parameter's dtype


def _switches(module: nn.Module) -> Iterator[tuple[str, bool]]:
    return ((k, v) for k, v in vars(module).items() if isinstance(v, bool) and not k.startswith("_"))
