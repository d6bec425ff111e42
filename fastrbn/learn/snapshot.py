"""Snapshots of all that training changes: model, optimiser, random states. To try something and take it back."""

from __future__ import annotations

import collections
import copy
import importlib
import random
import sys

import torch
from torch.nn.parameter import is_lazy

_PLAIN = (bool, int, float, str, type(None))  # attributes of a module that count or switch, such as `training`


class RandomState:
    """The states of PyTorch's generators (CPU and every accelerator in use), Python's and NumPy's.

    `loaders`: their own generators, those of their samplers too, and what their `state_dict` holds belong to it.
    """

    def __init__(self, loaders=()):
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._devices = [(m, m.get_rng_state_all()) for m in (torch.cuda, torch.xpu) if _in_use(m)]
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        self._generators = [(g, g.get_state()) for g in _generators(loaders)]
        self._loaders = [(dl, dl.state_dict()) for dl in loaders if hasattr(dl, "load_state_dict")]

    def restore(self, loaders=True) -> None:
        """Put all of it back; without `loaders` (what their `state_dict` held stays, their generators do not)."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for module, states in self._devices:
            for device, state in zip(range(module.device_count()), states):
                module.set_rng_state(state, device)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)
        for generator, state in self._generators:
            generator.set_state(state)
        for loader, state in self._loaders if loaders else ():
            loader.load_state_dict(state)

    def state_dict(self) -> dict:
        """The same in tensors, numbers, strings, lists and dictionaries, for a file."""
        numpy = self._numpy and [self._numpy[0], torch.tensor(self._numpy[1].tolist()), *self._numpy[2:]]
        return {
            "torch": self._torch,
            "python": [self._python[0], list(self._python[1]), self._python[2]],
            "numpy": numpy,
            "devices": {module.__name__.removeprefix("torch."): states for module, states in self._devices},
            "mps": self._mps,
            "generators": [state for _, state in self._generators],
            "loaders": [state for _, state in self._loaders],
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave, perhaps in another process, so that `restore` puts that back. An
        accelerator that is not here is left out. ValueError for loaders with other generators."""
        for kind, here in (("generators", self._generators), ("loaders", self._loaders)):
            if len(state[kind]) != len(here):
                raise ValueError(
                    f"random states are put back into the loaders they came from: those had {len(state[kind])} {kind} "
                    f"with a state, these have {len(here)}; make the loaders as they were made then"
                )
        self._torch, self._mps = state["torch"], state["mps"] if torch.backends.mps.is_available() else None
        self._python = (state["python"][0], tuple(state["python"][1]), state["python"][2])
        self._numpy = None
        if state["numpy"] is not None:
            name, keys, *rest = state["numpy"]
            self._numpy = (name, importlib.import_module("numpy").array(keys.tolist(), dtype="uint32"), *rest)
        modules = ((name, getattr(torch, name, None)) for name in state["devices"])
        self._devices = [(m, state["devices"][name]) for name, m in modules if m is not None and m.is_available()]
        self._generators = [(g, s) for (g, _), s in zip(self._generators, state["generators"])]
        self._loaders = [(dl, s) for (dl, _), s in zip(self._loaders, state["loaders"])]


def plain_name(name: str) -> str:
    """A parameter's or module's name as it is without `torch.compile`, which puts `_orig_mod.` before it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain_state_dict(module) -> dict:
    """`module.state_dict()` under plain names: it loads into the model that was not compiled."""
    state = module.state_dict()
    plain = collections.OrderedDict((plain_name(name), value) for name, value in state.items())
    plain._metadata = {plain_name(name): value for name, value in getattr(state, "_metadata", {}).items()}
    return plain


def load_plain_state_dict(module, state) -> None:
    """Load what `plain_state_dict` gave into a module that may be compiled."""
    here = {plain_name(name): name for name in module.state_dict()}
    renamed = collections.OrderedDict((here.get(plain_name(name), name), v) for name, v in state.items())
    if hasattr(state, "_metadata"):
        modules = [name for name, _ in module.named_modules()]
        renamed._metadata = {n: state._metadata[plain_name(n)] for n in modules if plain_name(n) in state._metadata}
    module.load_state_dict(renamed)


class Snapshot:
    """Parameters, buffers and plain attributes of `modules` (such as the model and a loss function with parameters),
    state and groups of `opt`, and the random states.

    `restore` puts all of it back, bit for bit, into the same objects where they still are what they were: what else
    refers to a parameter or to a group keeps referring to it. A model that was moved to another device stays there.
    ValueError for lazy modules that have not been initialised: there is nothing to put back yet.
    """

    def __init__(self, modules, opt, loaders=()):
        lazy = [n for m in modules for n, t in (*m.named_parameters(), *m.named_buffers()) if is_lazy(t)]
        if lazy:
            raise ValueError(
                f"the model must be initialised before its state can be kept; it has lazy modules ({', '.join(lazy[:3])}): "
                f"give it a batch first, as in learn.model(xb)"
            )
        self._random = RandomState(loaders)
        self._modules = [(m, *_module_state(m)) for module in modules for m in module.modules()]
        self._opt = opt
        self._state = {p: copy.deepcopy(s) for p, s in opt.state.items()}
        self._groups = [
            {k: list(v) if k == "params" else copy.deepcopy(v) for k, v in g.items()} for g in opt.param_groups
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for module, tensors, plain in self._modules:
            _restore_module(module, tensors, plain)
        self._opt.state.clear()
        self._opt.state.update({p: copy.deepcopy(s) for p, s in self._state.items()})
        del self._opt.param_groups[len(self._groups) :]
        for group, saved in zip(self._opt.param_groups, self._groups):
            group.clear()
            group.update({k: list(v) if k == "params" else copy.deepcopy(v) for k, v in saved.items()})
        self._random.restore()


def _in_use(module) -> bool:
    return module.is_available() and module.is_initialized()


def _generators(loaders):
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            yield from (v for v in getattr(holder, "__dict__", {}).values() if isinstance(v, torch.Generator))


def _tables(module):
    return {"_parameters": module._parameters, "_buffers": module._buffers, "": vars(module)}


def _module_state(module):
    tensors = {
        (table, name): (value, value.detach().clone())
        for table, values in _tables(module).items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    plain = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    missing = {(t, n): None for t, values in _tables(module).items() for n in values if t and values[n] is None}
    return {**tensors, **missing}, plain


def _restore_module(module, tensors, plain):
    for table, values in _tables(module).items():
        known = {n for t, n in tensors if t == table} | (set() if table else set(plain))
        for name, value in list(values.items()):
            if isinstance(value, (torch.Tensor, *_PLAIN)) and name not in known:
                del values[name]  # it was made since
        for (t, name), kept in tensors.items():
            if t == table:
                values[name] = None if kept is None else _filled(*kept, values.get(name))
    vars(module).update(plain)


def _filled(original, saved, current):
    """The tensor to put back: the original object, unless the model was moved since."""
    moved = isinstance(current, torch.Tensor) and current.device != original.device
    target = current if moved and current.shape == saved.shape else original
    if target.shape != saved.shape:
        target.data = saved.to(target.device)
    else:
        target.copy_(saved)
    return target
