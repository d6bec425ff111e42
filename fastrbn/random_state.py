"""The states of every random generator, kept and restored.

Needs no other room, so that `norm` and `learn` can both use it.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch


class RandomState:
    """The states of PyTorch's generators (CPU and every accelerator in use), Python's and NumPy's.

    With `loaders`, also those of their own generators and their samplers', and what their `state_dict` returns.
    `restore` puts everything back; so does the end of a `with` block.
    """

    def __init__(self, loaders: Iterable[Any] = ()):
        loaders = list({id(dl): dl for dl in loaders if dl is not None}.values())
        self._torch = torch.get_rng_state()
        self._python: Any = random.getstate()
        self._numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._devices = [(m, m.get_rng_state_all()) for m in (torch.cuda, torch.xpu) if _in_use(m)]
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        self._generators = [(g, g.get_state()) for dl in loaders for g in generators(dl)]
        self._loaders = [(dl, dl.state_dict()) for dl in loaders if hasattr(dl, "load_state_dict")]

    def restore(self, loaders: bool = True) -> None:
        """Put everything back; `loaders=False` leaves out what the loaders' `state_dict` returned."""
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

    def __enter__(self) -> RandomState:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def state_dict(self) -> dict[str, Any]:
        """The states as tensors, numbers, strings, lists and dictionaries, for a file."""
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, also in another process; `restore` then puts that back.

        States of accelerators that are not available are left out. ValueError if the loaders have other generators.
        """
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


def seed_all(seed: int) -> None:
    """Seed every generator that a RandomState keeps; `seed` is below 2**64."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    for module in (torch.cuda, torch.xpu):
        if _in_use(module):  # otherwise the seed would wait until it is, and then replace the state
            module.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def generators(loader: Any) -> Iterator[torch.Generator]:
    """The generators that draw the order of `loader`: its own and those of its samplers; a shared one repeatedly."""
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    for holder in holders:
        yield from (v for v in getattr(holder, "__dict__", {}).values() if isinstance(v, torch.Generator))


def _in_use(module: ModuleType) -> bool:
    return module.is_available() and module.is_initialized()
