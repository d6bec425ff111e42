"""Norms from text: `batchnorm`, `groupnorm:groups=4`, a recipe (`default`) or a variant of one (`default:mom=0.05`)."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastrbn.models import make_norm
from fastrbn.norm import RECIPES, Memory, Recipe, RunningBatchNorm, recompute_statistics
from fastrbn.norm import recipes as _recipes
from fastrbn.norm.weights import centralize_weights, standardize_weights
from fastrbn.util import fix_statistics, one_of, suggestion

from .peers import MABN, BatchRenorm, FilterResponseNorm2d, OnlineNorm

Make = Callable[..., nn.Module | None]  # takes the number of channels, and `dims` (2) axes after them


def _group(nf: int, groups: int = 8, *, dims: int = 2) -> nn.Module | None:
    return make_norm("group", nf, groups=groups if dims else 1)  # over (N, C) with one group, which is LayerNorm


def _layer(nf: int, eps: float = 1e-5) -> nn.Module:
    return nn.GroupNorm(1, nf, eps=eps)


def _instance(nf: int, eps: float = 1e-5) -> nn.Module:
    return nn.InstanceNorm2d(nf, eps=eps, affine=True)


def _batch(nf: int, momentum: float = 0.1, eps: float = 1e-5, *, dims: int = 2) -> nn.Module:
    kinds: list[type[nn.Module]] = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
    return kinds[dims](nf, eps=eps, momentum=momentum)


def _measured(nf: int, eps: float = 1e-5, *, dims: int = 2) -> nn.Module:
    return _batch(nf, eps=eps, dims=dims)


def _renorm(
    nf: int, mom: float | None = None, eps: float = 1e-5, r_max: float = 3.0, d_max: float = 5.0, *, steps: int
) -> nn.Module:
    if mom is None:  # the paper's 0.01, or more if a tenth of the run is a shorter memory than that
        mom = max(0.01, min(0.1, 10 / max(steps, 1)))
    return BatchRenorm(nf, mom, eps, r_max, d_max, BatchRenorm.scaled_warmup(steps))


def _response(nf: int, eps: float = 1e-6, learn_eps: float | None = 1e-4, activate: bool = True) -> nn.Module:
    return FilterResponseNorm2d(nf, eps, learn_eps, activate)


def _online(
    nf: int, alpha_f: float = 0.999, alpha_b: float = 0.99, eps: float = 1e-5, layer_scaling: bool = True
) -> nn.Module:
    return OnlineNorm(nf, alpha_f, alpha_b, eps, layer_scaling)


def _moving(
    nf: int, window: int = 32, mom: float = 0.02, eps: float = 1e-5, r_max: float = 5.0, *, steps: int
) -> nn.Module:
    # the published warm-up, or a hundredth and a tenth of the run if that is less
    return MABN(nf, window, mom, eps, r_max, (min(100, steps / 100), min(1000, steps / 10)))


def _running(nf: int) -> nn.Module:
    return RunningBatchNorm(nf)


def _none(nf: int) -> None:
    return None


PEERS: dict[str, Make] = {
    "batchnorm": _batch,
    "frozen": _measured,
    "precise": _measured,
    "groupnorm": _group,
    "layernorm": _layer,
    "instancenorm": _instance,
    "batchrenorm": _renorm,
    "frn": _response,
    "onlinenorm": _online,
    "mabn": _moving,
    "groupnorm-ws": _group,
    "running-ws": _running,
    "none": _none,
}
"""Norms other than recipes by name, with the function that makes each.

GroupNorm has 8 groups; LayerNorm is GroupNorm with one. `frozen` and `precise` are nn.BatchNorm whose statistics are
measured by `settle_statistics`.
"""

PREPARE = {"mabn": centralize_weights, "groupnorm-ws": standardize_weights, "running-ws": standardize_weights}
"""How norms change the weights of their net; see `prepare_model`."""


def _measure(model: nn.Module, inputs: Tensor) -> None:
    # in one batch, so that a layer is measured with the final statistics of those before it
    with suppress(ValueError):  # a diverged net, with activations that are not finite, keeps its statistics
        recompute_statistics(model, [inputs])


def _freeze(model: nn.Module, inputs: Tensor) -> None:
    layers: list[Any] = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not all(layer.num_batches_tracked for layer in layers):
        _measure(model, inputs)
    for layer in layers:
        fix_statistics(layer)


SETTLE: dict[tuple[str, str], Callable[[nn.Module, Tensor], None]] = {
    ("frozen", "before"): _freeze,
    ("precise", "after"): _measure,
}
"""How norms measure their statistics before or after training; see `settle_statistics`."""

_GIVEN = ("nf", "steps", "dims")  # arguments that are not settings


class _OnImages(nn.Module):
    """Applies a norm for (N, C, H, W) to another rank: all positions of a sample become its H, and W is 1."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.activates = norm, getattr(norm, "activates", False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2).unsqueeze(-1) if x.dim() > 2 else x[:, :, None, None]).view_as(x)


_LAYER = ("mom", "eps", "backend")  # settings of RunningBatchNorm in addition to its recipe's
_RATES = {name.removeprefix("rate_"): f for name, f in vars(_recipes).items() if name.startswith("rate_")}
_RATES["memory"] = Memory()
_MEMORY = tuple(f.name for f in dataclasses.fields(Memory))


def split_norms(text: str) -> list[str]:
    """Split a comma-separated list of norms, which may have settings with commas.

    Parameters
    ----------
    text : str

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If there is no norm, or one is given twice.

    Examples
    --------
    >>> split_norms("batchnorm,default:mom=0.05,elements=none,frn")
    ['batchnorm', 'default:mom=0.05,elements=none', 'frn']
    """
    found: list[str] = []
    for piece in (p.strip() for p in text.split(",")):
        if "=" in piece and ":" not in piece and found and ":" in found[-1]:
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    twice = sorted({n for n in found if found.count(n) > 1})
    if not found or twice:
        raise ValueError(f"norms must be names separated by commas, each once; got '{text}'")
    return found


def get_norm(text: str, steps: int = 1) -> Make:
    """Return a function that makes the norm named by a text.

    Parameters
    ----------
    text : str
        A name of `PEERS` or `RECIPES`, optionally with settings after a colon: `groupnorm:groups=4`. A peer takes the
        arguments of its layer. A recipe takes the fields of `Recipe`, and mom, eps or backend; its `rate` is the name
        of a rule, and `least`, `most` and `share` belong to its `Memory`.
    steps : int, default 1
        Length of the run, which scales the warm-ups of batch renormalisation and MABN.

    Returns
    -------
    callable
        Takes the number of channels and optionally `dims`, the number of axes after the channels (0 to 3, default 2).
        Returns a module, or None for `none`.

    Raises
    ------
    ValueError
        For an unknown norm or setting; the message suggests the closest.

    Examples
    --------
    >>> get_norm("groupnorm:groups=4")(16).num_groups
    4
    >>> type(get_norm("batchnorm")(16, dims=1)).__name__
    'BatchNorm1d'
    """
    name, settings = _parse(text)
    if name in PEERS:
        takes_steps = "steps" in inspect.signature(PEERS[name]).parameters
        return partial(_peer, PEERS[name], {**settings, **({"steps": steps} if takes_steps else {})})
    recipe, layer = _variant(text, name, settings)
    return lambda nf, dims=2: RunningBatchNorm(nf, recipe=recipe, **layer)


def _peer(make: Make, settings: dict[str, Any], nf: int, dims: int = 2) -> nn.Module | None:
    if "dims" in inspect.signature(make).parameters:
        return make(nf, dims=dims, **settings)
    made = make(nf, **settings)
    return made if made is None or dims == 2 or isinstance(made, nn.GroupNorm) else _OnImages(made)


def prepare_model(text: str, model: nn.Module) -> nn.Module:
    """Change the weights of a net as its norm requires, in place; most norms require nothing.

    Parameters
    ----------
    text : str
        The norm, as for `get_norm`.
    model : nn.Module
        The net, with initialised weights.

    Returns
    -------
    nn.Module
        `model` itself: with standardised weights for `groupnorm-ws` and `running-ws`, with centralised ones for `mabn`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8))
    >>> bool(prepare_model("groupnorm-ws", net)[0].weight[0].mean().abs() < 1e-6)
    True
    """
    prepare = PREPARE.get(_parse(text)[0])
    return model if prepare is None else prepare(model)


def settle_statistics(text: str, model: nn.Module, when: str, inputs: Callable[[], Tensor]) -> None:
    """Measure and fix the statistics of a net as its norm requires before or after training; most require nothing.

    Before training, `frozen` fixes the statistics of every nn.BatchNorm, which normalises with them in training too. A
    net that starts from a trained one keeps its statistics; in any other they are measured over `inputs()` first. After
    training, `precise` measures the statistics for the final weights. The inputs pass as one batch, so each layer is
    measured with the final statistics of those before it.

    Parameters
    ----------
    text : str
        The norm, as for `get_norm`.
    model : nn.Module
        The net, changed in place.
    when : {"before", "after"}
    inputs : callable
        Returns training inputs in one tensor; called only if they are needed.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), get_norm("precise")(8))
    >>> settle_statistics("precise", net, "after", lambda: torch.randn(100, 3, 8, 8))
    """
    settle = SETTLE.get((_parse(text)[0], when))
    if settle is not None:
        settle(model, inputs())


def describe(text: str) -> str:
    """List all settings of a norm, including defaults: what a result depends on apart from the code.

    Parameters
    ----------
    text : str
        The norm, as for `get_norm`.

    Returns
    -------
    str

    Examples
    --------
    >>> describe("groupnorm")
    'groups=8'
    """
    name, settings = _parse(text)
    if name == "running-ws":
        return describe("default")  # its results depend on the recipe
    if name in PEERS:
        known = inspect.signature(PEERS[name]).parameters.values()
        defaults = {p.name: p.default for p in known if p.name not in _GIVEN}
        return _words({**defaults, **settings})
    recipe, layer = _variant(text, name, settings)
    return _words({f: v for f, v in _fields(recipe).items() if f != "name"} | layer)


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}


def _words(settings: dict[str, Any]) -> str:
    return " ".join(f"{k}={getattr(v, '__name__', v)}".replace(", ", ",") for k, v in settings.items())


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split a norm's text into its name and checked settings."""
    name, _, rest = text.partition(":")
    one_of("a norm", name, [*RECIPES, *PEERS])
    settings: dict[str, Any] = {}
    for piece in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"settings of a norm must be written {name}:name=value,name=value; got '{text}'")
        settings[key] = _value(value)
    _check(text, name, settings)
    return name, settings


def _check(text: str, name: str, settings: dict[str, Any]) -> None:
    if name in PEERS:
        takes = [p for p in inspect.signature(PEERS[name]).parameters if p not in _GIVEN]
    else:
        takes = [f.name for f in dataclasses.fields(Recipe) if f.name != "name"] + [*_MEMORY, *_LAYER]
    for key in settings:
        if key not in takes:
            raise ValueError(
                f"{name} takes {', '.join(takes) or 'no settings'}; got '{key}' in '{text}'.{suggestion(key, takes)}"
            )


def _value(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        number = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return number if isinstance(number, (int, float)) else text


def _variant(text: str, name: str, settings: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the settings of the layer itself."""
    layer = {k: v for k, v in settings.items() if k in _LAYER}
    changes = {k: v for k, v in settings.items() if k not in _LAYER}
    rate = changes.get("rate")
    if "rate" in changes:
        if rate not in _RATES:
            raise ValueError(
                f"rate must be one of {', '.join(_RATES)}; got '{rate}' in '{text}'.{suggestion(rate, _RATES)}"
            )
        changes["rate"] = _RATES[rate]
    for key in ("skip", "clamp"):
        if changes.get(key) is not None:
            raise ValueError(f"{key} can only be switched off, {key}=none; got '{changes[key]}' in '{text}'")
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
