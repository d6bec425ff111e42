"""Nets that `--model` names beyond this package's own: torchvision's, and functions of the user. Weights for any net.

Errors are ValueErrors.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrbn.norm import convert_batchnorm
from fastrbn.norm.layers import ADDITIONS
from fastrbn.util import suggestion

Make = Callable[[int, int], nn.Module]  # takes the number of channels and of classes

_CHANNELS, _CLASSES = ("c_in", "in_channels", "in_chans"), ("classes", "num_classes")  # names in a user's function
_WITHOUT_AUXILIARY = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
_NOT_THE_USERS = (Path(torch.__file__).parent, Path(importlib.__file__).parent, Path(__file__).parents[1])
_SHOWN = 6  # keys of a file that does not fit


def named_net(name: str, c_in: int, c: int, recipe: str | None) -> nn.Module:
    """The net `name`; with a recipe its batch norms become running batch norms."""
    model = find(name)(c_in, c)
    batch_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return convert_batchnorm(model, recipe) if recipe and batch_norms else model


def find(name: str) -> Make:
    """The maker of the net that `name` is in torchvision, or as `package.module:function`."""
    return _torchvision(name) if ":" not in name else _users(name)


# torchvision


def _torchvision(name: str) -> Make:
    from torchvision import models

    def make(c_in: int, c: int) -> nn.Module:
        net = models.get_model(name, weights=None, num_classes=c, **_WITHOUT_AUXILIARY.get(name, {}))
        if c_in != 3:
            stem: Any = _weighted(net)[0][1]
            stem.in_channels, stem.weight = c_in, nn.Parameter(_for_channels(stem.weight.detach(), c_in))
        return net

    return make


def _weighted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linear layers and convolutions by name: the first is the stem, the last the head."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _for_channels(weight: Tensor, c_in: int) -> Tensor:
    """A stem's weights for `c_in` equal channels that say what all of its own said: for grey images their sum."""
    return (weight.sum(1, keepdim=True) / c_in).expand(-1, c_in, *weight.shape[2:]).clone()


# the user's functions


def _users(spec: str) -> Make:
    function, attribute = users_function(spec), spec.partition(":")[2]
    _arguments(function, spec, 1, 2)

    def make(c_in: int, c: int) -> nn.Module:
        given = _arguments(function, spec, c_in, c)
        call = f"{attribute}({', '.join(f'{k}={v}' for k, v in given.items())})"
        try:
            made = function(**given)
        except (Exception, SystemExit) as e:
            raise ValueError(f"{spec}: {call} failed: {told(e)}") from e
        if not isinstance(made, nn.Module):
            hint = "; does it lack a return?" if made is None else ""
            raise ValueError(f"{spec}: must return an nn.Module; {call} returned {_kind(made)}{hint}")
        return made

    return make


def users_function(spec: str) -> Callable[..., Any]:
    """The function or class `package.module:function`."""
    name, _, attribute = spec.partition(":")
    function = getattr(_module(name, spec), attribute, None)
    if isinstance(function, nn.Module) or not callable(function):
        known = [n for n, value in vars(sys.modules[name]).items() if callable(value) and not n.startswith("_")]
        what, hint = f"{_kind(function)} of that name", ""
        if function is None:
            what, hint = "none of that name", suggestion(attribute, known)
        raise ValueError(f"{spec}: needs a function or class; {name} has {what}.{hint}")
    return function


def _module(name: str, spec: str) -> Any:
    """The module `name`, from the current directory first, as with `python -m`."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as e:
        if isinstance(e, ModuleNotFoundError) and e.name is not None and f"{name}.".startswith(f"{e.name}."):
            here = [path.stem for path in Path().glob("*.py")]
            raise ValueError(
                f"{spec}: there is no module '{e.name}' in {os.getcwd()} nor among the installed packages."
                f"{suggestion(e.name, here)} Start in the folder that has it"
            ) from None
        raise ValueError(f"{spec}: {name} cannot be imported: {told(e)}") from e


def _arguments(function: Callable[..., Any], spec: str, c_in: int, c: int) -> dict[str, int]:
    """What `function` takes of the number of channels and classes, by name."""
    known = dict.fromkeys(_CHANNELS, c_in) | dict.fromkeys(_CLASSES, c)
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError) as e:
        raise ValueError(f"{spec}: {e}; name a function with the parameters c_in and classes") from e
    for p in parameters:
        given = p.name in known and p.kind is not p.POSITIONAL_ONLY
        if not given and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ValueError(
                f"{spec}: is called with what it takes of {_CHANNELS[0]} (or {', '.join(_CHANNELS[1:])}) and "
                f"{_CLASSES[0]} (or {_CLASSES[1]}), by name; it needs '{p.name}' too: give that a default, or rename "
                f"it.{suggestion(p.name, known)}"
            )
    return {p.name: known[p.name] for p in parameters if p.name in known}


def told(error: BaseException) -> str:
    """`error` with its traceback from the user's own lines on; the message alone if it passed none of them."""
    tb, others = error.__traceback__, ("<frozen importlib", *map(str, _NOT_THE_USERS))
    while tb is not None and tb.tb_frame.f_code.co_filename.startswith(others):
        tb = tb.tb_next
    if tb is None:
        return str(error)
    return "\n" + "".join(traceback.format_exception(type(error), error, tb)).rstrip()


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# weights from a file


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file of torch.save, also under `state_dict` or `model`, or with a DataParallel's prefix."""
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.exists() else 'not there'}: give a file of weights")
    repair = "save it with torch.save(model.state_dict(), file)"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001 - on other files the zip and pickle readers raise all kinds of exceptions
        pickled = "Weights only" in str(e) and "Unsupported" in str(e)
        why = "it holds more than tensors, perhaps a whole model" if pickled else type(e).__name__
        raise ValueError(f"{path} cannot be read as a state_dict ({why}): {repair}") from e
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not (
        isinstance(state, dict)
        and state
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    ):
        names = ", ".join(map(str, [*state][:_SHOWN])) if isinstance(state, dict) else ""
        raise ValueError(
            f"{path} must hold a state_dict, tensors by name; it holds {_kind(state)}"
            f"{f' of {names}' if names else ''}: {repair}"
        )
    wrapped = all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in state.items()}


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Put the weights of `state` into `model`, except a head of another number of classes. Returns what was adapted."""
    own, adapted = model.state_dict(), []
    # torchvision's older files of densenets have norm.1 for norm1
    renamed = {key if key in own else re.sub(r"\.(norm|relu|conv)\.([12])\.", r".\1\2.", key): key for key in state}
    state = {new: state[key] for new, key in renamed.items()}
    state = {key: v for key, v in state.items() if key in own or key.rpartition(".")[2] not in ADDITIONS}
    if auxiliary := [key for key in state if key not in own and key.lower().startswith("aux")]:
        state = {key: v for key, v in state.items() if key not in auxiliary}
        adapted.append("its auxiliary heads are left out")
    layers = [key for name, _ in _weighted(model) if (key := f"{name}.weight".lstrip(".")) in own]
    if layers:
        stem, head = layers[0], layers[-1]
        old, c_in = state.get(stem), own[stem].shape[1]
        if stem != head and old is not None and old.dim() > 2 and old.shape[1] != c_in:
            state[stem] = _for_channels(old, c_in)
            adapted.append(f"the weights of its {old.shape[1]} input channels are summed for {c_in}")
        old, c = state.get(head), len(own[head])
        if old is None or len(old) != c and old.shape[1:] == own[head].shape[1:]:
            state.update({key: own[key] for key in own if key.rpartition(".")[0] == head.rpartition(".")[0]})
            had = "it has no head" if old is None else f"its head of {len(old)} classes is left out"
            adapted.append(f"{had}: that of {c} starts from random weights")
    other = [key for key, v in state.items() if key in own and v.shape != own[key].shape]
    missing, unknown = model.load_state_dict({k: v for k, v in state.items() if k not in other}, strict=False)
    groups = [
        ("of another shape", [f"{k} {[*state[k].shape]} for {[*own[k].shape]}" for k in other]),
        ("missing", [key for key in missing if key not in other]),
        ("unknown to the net", unknown),
    ]
    if any(keys for _, keys in groups):
        said = "; ".join(
            f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{', …' if len(keys) > _SHOWN else ''}"
            for what, keys in groups
            if keys
        )
        raise ValueError(f"the weights are not those of this net ({said}): give a file of the same net")
    return adapted
