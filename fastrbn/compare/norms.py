"""Norms by text: `batchnorm`, `groupnorm:groups=4`, a recipe such as `default`, a variant `default:mom=0.05`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from fastrbn.models import make_norm
from fastrbn.norm import RECIPES, Memory, Recipe, RunningBatchNorm
from fastrbn.norm import recipes as _recipes
from fastrbn.util import suggestion

from .peers import MABN, BatchRenorm, FilterResponseNorm2d, OnlineNorm, centralize_weights, standardize_weights

Make = Callable[..., nn.Module]  # a norm for a number of channels, and of `dims` (2) axes after them


def _group(nf, groups: int = 8, *, dims: int = 2):
    return make_norm("group", nf, groups=groups if dims else 1)  # over (N, C) one group: LayerNorm


def _layer(nf, eps: float = 1e-5):
    return nn.GroupNorm(1, nf, eps=eps)


def _instance(nf, eps: float = 1e-5):
    return nn.InstanceNorm2d(nf, eps=eps, affine=True)


def _batch(nf, momentum: float = 0.1, eps: float = 1e-5, *, dims: int = 2):
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims]
    return kind(nf, eps=eps, momentum=momentum)


def _renorm(nf, mom: float | None = None, eps: float = 1e-5, r_max: float = 3.0, d_max: float = 5.0, *, steps: int):
    if mom is None:  # the paper's 0.01, unless the run is so short that a tenth of it is a shorter memory
        mom = max(0.01, min(0.1, 10 / max(steps, 1)))
    return BatchRenorm(nf, mom, eps, r_max, d_max, BatchRenorm.scaled_warmup(steps))


def _response(nf, eps: float = 1e-6, learn_eps: float | None = 1e-4, activate: bool = True):
    return FilterResponseNorm2d(nf, eps, learn_eps, activate)


def _online(nf, alpha_f: float = 0.999, alpha_b: float = 0.99, eps: float = 1e-5, layer_scaling: bool = True):
    return OnlineNorm(nf, alpha_f, alpha_b, eps, layer_scaling)


def _moving(nf, window: int = 32, mom: float = 0.02, eps: float = 1e-5, r_max: float = 5.0, *, steps: int):
    # the published warm-up, and a hundredth and a tenth of runs for which that is less
    return MABN(nf, window, mom, eps, r_max, (min(100, steps / 100), min(1000, steps / 10)))


def _none(nf):
    return None


PEERS = {
    "batchnorm": _batch,
    "groupnorm": _group,
    "layernorm": _layer,
    "instancenorm": _instance,
    "batchrenorm": _renorm,
    "frn": _response,
    "onlinenorm": _online,
    "mabn": _moving,
    "groupnorm-ws": _group,
    "none": _none,
}
"""What a norm that is no recipe is called, and what makes it: GroupNorm of 8 groups, LayerNorm as GroupNorm of one."""

PREPARE = {"mabn": centralize_weights, "groupnorm-ws": standardize_weights}
"""What the norms do to the weights of the net that they are in, see `prepare_model`."""

_GIVEN = ("nf", "steps", "dims")  # arguments that are no settings


class _OnImages(nn.Module):
    """A norm over (N, C, H, W) for another rank: all positions of a sample are its H, and W is 1."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.activates = norm, getattr(norm, "activates", False)

    def forward(self, x):
        return self.norm(x.flatten(2).unsqueeze(-1) if x.dim() > 2 else x[:, :, None, None]).view_as(x)


_LAYER = ("mom", "eps", "backend")  # settings of RunningBatchNorm beside its recipe's
_RATES = {name.removeprefix("rate_"): f for name, f in vars(_recipes).items() if name.startswith("rate_")}
_RATES["memory"] = Memory()
_MEMORY = tuple(f.name for f in dataclasses.fields(Memory))


def split_norms(text: str) -> list[str]:
    """`a,b:k=1,l=2,c` → a, b:k=1,l=2, c. ValueError for none, or one given twice."""
    found = []
    for piece in (p.strip() for p in text.split(",")):
        if "=" in piece and ":" not in piece and found and ":" in found[-1]:
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    twice = sorted({n for n in found if found.count(n) > 1})
    if not found or twice:
        raise ValueError(f"norms are names with commas between them, each once; got '{text}'")
    return found


def get_norm(text: str, steps: int = 1) -> Make:
    """What makes the norm that `text` names, from a number of channels (None for `none`) and, for other input than
    (N, C, H, W), `dims`, the number of axes after the channels (0 to 3).

    - `text`: a name of `PEERS` or `RECIPES`, and after a colon settings: arguments of the peer's layer; fields of
      `Recipe`, and mom, eps or backend, for a recipe. `rate` takes the name of a rule; `least`, `most` and `share` are
      those of its `Memory`.
    - `steps`: the length of the run, which scales batch renormalisation's warm-up.

    Raises ValueError for an unknown norm or setting, and suggests the closest.
    """
    name, settings = _parse(text)
    if name in PEERS:
        takes_steps = "steps" in inspect.signature(PEERS[name]).parameters
        return partial(_peer, PEERS[name], {**settings, **({"steps": steps} if takes_steps else {})})
    recipe, layer = _variant(text, name, settings)
    return lambda nf, dims=2: RunningBatchNorm(nf, recipe=recipe, **layer)


def _peer(make, settings, nf, dims=2):
    if "dims" in inspect.signature(make).parameters:
        return make(nf, dims=dims, **settings)
    made = make(nf, **settings)
    return made if made is None or dims == 2 or isinstance(made, nn.GroupNorm) else _OnImages(made)


def prepare_model(text: str, model: nn.Module) -> nn.Module:
    """Change the weights of a net built with the norm `text` as that norm requires, in place; for most, nothing.

    Parameters
    ----------
    text : str
        The norm, as for `get_norm`.
    model : nn.Module
        The net, with its weights initialised.

    Returns
    -------
    nn.Module
        `model` itself: with standardised weights for `groupnorm-ws`, centralised ones for `mabn`.
    """
    prepare = PREPARE.get(_parse(text)[0])
    return model if prepare is None else prepare(model)


def describe(text: str) -> str:
    """All settings of the norm that `text` names, defaults included: what a result depends on beside the code."""
    name, settings = _parse(text)
    if name in PEERS:
        known = inspect.signature(PEERS[name]).parameters.values()
        defaults = {p.name: p.default for p in known if p.name not in _GIVEN}
        return _words({**defaults, **settings})
    recipe, layer = _variant(text, name, settings)
    return _words({f: v for f, v in _fields(recipe).items() if f != "name"} | layer)


def _fields(recipe):  # dataclasses.asdict would spread skip and clamp
    return {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}


def _words(settings) -> str:
    return " ".join(f"{k}={getattr(v, '__name__', v)}".replace(", ", ",") for k, v in settings.items())


def _parse(text):
    name, _, rest = text.partition(":")
    known = [*RECIPES, *PEERS]
    if name not in known:
        raise ValueError(f"a norm is one of {', '.join(known)}; got '{name}'.{suggestion(name, known)}")
    settings = {}
    for piece in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"settings of a norm are written {name}:name=value,name=value; got '{text}'")
        settings[key] = _value(value)
    _check(text, name, settings)
    return name, settings


def _check(text, name, settings):
    if name in PEERS:
        takes = [p for p in inspect.signature(PEERS[name]).parameters if p not in _GIVEN]
    else:
        takes = [f.name for f in dataclasses.fields(Recipe) if f.name != "name"] + [*_MEMORY, *_LAYER]
    for key in settings:
        if key not in takes:
            raise ValueError(
                f"{name} takes {', '.join(takes) or 'no settings'}; got '{key}' in '{text}'.{suggestion(key, takes)}"
            )


def _value(text):
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        number = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return number if isinstance(number, (int, float)) else text


def _variant(text, name, settings):
    """The recipe and the layer's own settings."""
    layer = {k: v for k, v in settings.items() if k in _LAYER}
    changes = {k: v for k, v in settings.items() if k not in _LAYER}
    rate = changes.get("rate")
    if "rate" in changes:
        if rate not in _RATES:
            raise ValueError(
                f"rate is one of {', '.join(_RATES)}; got '{rate}' in '{text}'.{suggestion(str(rate), _RATES)}"
            )
        changes["rate"] = _RATES[rate]
    for key in ("skip", "clamp"):
        if changes.get(key) is not None:
            raise ValueError(f"as text {key} can only be switched off, {key}=none; got '{changes[key]}' in '{text}'")
    numbers = {k: changes.pop(k) for k in _MEMORY if k in changes}
    memory = changes.get("rate", RECIPES[name].rate)
    if numbers and not isinstance(memory, Memory):
        raise ValueError(f"{', '.join(numbers)} belong to rate=memory; '{text}' has rate={memory.__name__[5:]}")
    try:
        if numbers:
            changes["rate"] = dataclasses.replace(memory, **numbers)
        recipe = RECIPES[name].but(name=text, **changes) if changes else RECIPES[name]
    except (ValueError, TypeError) as e:
        raise ValueError(f"'{text}': {e}") from e
    return recipe, layer
