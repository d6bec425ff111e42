"""The settings of a training run, their rules and defaults.

`settle` makes them from the command line, `of_config` from the config.json of an earlier run. Nothing changes them
afterwards; config.json holds their `dump`. Errors are ValueErrors. Imports torch only when settings are made, so that
`fastrbn --help` is quick.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastrbn.util import suggestion

Rule = Callable[[str], Any]  # reads the value out of text; ValueError with the rule and what came

NORMS = {
    "running": "conv_rbn",
    "batch": "conv_bn",
    "group": "conv_gn",
    "own": "own",
}  # and their layers, which are other names for them
MODELS = ("cnn", "resnet9")  # of this package: beside them torchvision's, and package.module:function
OPTIMISERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW"),
    *("Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
)  # of torch.optim, without those for some parameters alone (Muon, SparseAdam) and those that call the loss (LBFGS)
NFS = [8, 16, 32, 64, 64]  # channels of the cnn, the course's net
SCHEDULES = ("none", "lin", "cos", "1cycle")
AUGMENTATIONS = ("none", "crop", "flip", "color", "trivial", "randaugment", "resized-crop")
COMPILE = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
MANY = 128  # batch size from which several CPU threads make the cnn faster


def whole(least: int, most: int = 2**31 - 1) -> Rule:
    """A whole number from `least` to `most`."""

    def check(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise ValueError(f"must be a whole number, {least} or more; got '{text}'")
        if number > most:
            raise ValueError(f"must be a whole number, {most} at most; got '{text}'")
        return number

    return check


def _number(rule: str, fits: Callable[[float], bool]) -> Rule:
    def check(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not fits(number):
            raise ValueError(f"must be {rule}; got '{text}'")
        return number

    return check


rate = _number("a finite number above 0", lambda x: 0 < x < math.inf)
share = _number("a number from 0, below 1", lambda x: 0 <= x < 1)


def one_of(*names: str, hint: str = "") -> Rule:
    """One of `names`; the error suggests the closest and ends with `hint`."""

    def check(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}; got '{text}'.{suggestion(text, names)}{hint}")
        return text

    return check


def augmentation(text: str) -> str:
    """Names of `AUGMENTATIONS`, or of functions as package.module:function, with commas between them."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        module, colon, function = name.partition(":")
        if not colon:
            one_of(*AUGMENTATIONS, hint=" Your own: package.module:function")(name)
        elif not all(part.isidentifier() for part in (*module.split("."), function)):
            raise ValueError(f"must name a function as package.module:function; got '{name}'")
    if "none" in names and len(names) > 1:
        raise ValueError(f"must be none, or names without it; got '{text}'")
    return ",".join(names)


def optimiser(text: str) -> str:
    """A name of `OPTIMISERS`, in whatever case."""
    return one_of(*OPTIMISERS)({name.lower(): name for name in OPTIMISERS}.get(text.lower(), text))


def net(text: str) -> str:
    """One of `MODELS`, a classification net of torchvision, or package.module:function."""
    module, colon, function = text.partition(":")
    if colon:
        if not all(part.isidentifier() for part in (*module.split("."), function)):
            hint = f"; write {module[:-3].replace('/', '.')}:{function}" if module.endswith(".py") else ""
            raise ValueError(f"of your own must be written package.module:function; got '{text}'{hint}")
    elif text not in MODELS:
        from torchvision import models

        known = models.list_models(module=models)
        if text not in known:
            hint = suggestion(text, [*MODELS, *known])
            if "." in text:
                hint = " Put a colon before the function"
            raise ValueError(
                f"must be {', '.join(MODELS)}, a classification net of torchvision such as resnet18, or your own as "
                f"package.module:function; got '{text}'.{hint}"
            )
    return text


def _setting(default: Any, rule: Rule | None = None) -> Any:
    """A field with the default of the command line; without a rule it takes any text."""
    return field(metadata={"default": default, "rule": rule})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a training depends on, apart from the data. The command line's options have the same names."""

    data: str | None = _setting(None)  # None: MNIST, or glyphs where it cannot be had
    size: int | None = _setting(None, whole(1))
    model: str = _setting("cnn", net)
    pretrained: Path | None = _setting(None)
    norm: str = _setting("running")  # of NORMS
    recipe: str | None = _setting(None)  # of running batch norm
    bs: int = _setting(8, whole(1))
    opt: str = _setting("SGD", optimiser)
    lr: float = _setting(None, rate)
    sched: str = _setting("lin", one_of(*SCHEDULES))
    epochs: int | None = _setting(None, whole(0))  # None: as many as max_steps needs
    max_steps: int | None = _setting(None, whole(1))
    width: int | None = _setting(None, whole(1, 4096))
    momentum: float = _setting(0.0, share)
    weight_decay: float = _setting(None, share)
    label_smoothing: float = _setting(0.0, share)
    augment: str | None = _setting(None, augmentation)  # None: as the data set has it
    cutout: int | None = _setting(None, whole(1))
    amp: str | None = _setting(None, one_of("bf16", "fp16"))
    channels_last: bool = _setting(False)
    compile: str | None = _setting(None, one_of(*COMPILE, hint=" DATA goes before --compile"))
    seed: int = _setting(0, whole(0, 2**63 - 1))
    device: str = _setting("auto")
    threads: int = _setting(None, whole(1, 1024))
    limit: int | None = _setting(None, whole(1))
    data_dir: Path | None = _setting(None)
    cb: tuple[str, ...] = _setting(())
    no_halt: bool = _setting(False)
    checkpoint_every: int | None = _setting(None, whole(1))

    @property
    def layer(self) -> str:
        """The norm by the name of its layer: `conv_rbn`, `conv_bn` or `conv_gn`."""
        return NORMS[self.norm]

    @property
    def title(self) -> str:
        """The model and its norms in a few words."""
        other = "its own norms" if self.norm == "own" else f"recipe {self.recipe}"
        return f"{self.model} of {self.layer}" if self.model in MODELS else f"{self.model} with {other}"

    def dump(self) -> dict[str, Any]:
        """The settings as JSON can hold them; `of_config` makes the same of them in any folder."""
        paths = {name: None if (path := getattr(self, name)) is None else str(path.resolve()) for name in _PATHS}
        return {**asdict(self), **paths, "cb": list(self.cb)}


_FIELDS = {f.name: f for f in fields(Settings)}
_PATHS = ("data_dir", "pretrained")
_NEVER_NULL = ("data", "lr", "weight_decay", "device", "threads")  # resolved before they are dumped
# an older config.json may lack these, which then have their defaults
_ADDED_LATER = (
    *"size width momentum weight_decay label_smoothing augment cutout amp channels_last compile max_steps".split(),
    *("opt", "pretrained"),
)


def rule(name: str) -> Rule | None:
    """The rule of a setting that is not plain text."""
    return _FIELDS[name].metadata["rule"]


def settle(given: Mapping[str, Any], world: int = 1) -> Settings:
    """The settings with the values `given`, and defaults that suit them, this machine and `world` processes.

    ValueError for values that do not go together, or that this machine or package lacks.
    """
    import torch

    values = {name: f.metadata["default"] for name, f in _FIELDS.items()} | dict(given)
    values["norm"], values["recipe"] = _norm_and_recipe(values["norm"], values["recipe"])
    values["cb"] = tuple(values["cb"])
    if values["epochs"] is None and values["max_steps"] is None:
        values["epochs"] = 1
    model, cnn = values["model"], values["model"] == "cnn"
    if model != "resnet9" and values["width"] is not None:
        raise ValueError(f"--width is for resnet9, and --model is {model}: leave it out")
    if values["norm"] in (("own",) if model in MODELS else ("batch", "group")):
        raise ValueError(
            f"--norm must be running, batch, group or a recipe for the model {model}; got own"
            if model in MODELS
            else f"--norm must be own, which keeps the norms of {model}, or running or a recipe, which replaces its "
            f"batch norms; got {values['norm']}"
        )
    defaults = _optimiser_defaults(values["opt"], values["momentum"], values["weight_decay"])
    if values["weight_decay"] is None:
        values["weight_decay"] = float(defaults.get("weight_decay", 0))
    known = "auto, cpu, or an accelerator of this machine such as cuda, cuda:1 or mps"
    values["device"] = _auto() if values["device"] == "auto" else find_device(values["device"], known)
    if values["lr"] is None:
        rule_of_sgd = default_lr(values["bs"] * world, model, values["momentum"])
        values["lr"] = rule_of_sgd if values["opt"] == "SGD" else float(defaults["lr"])
    if values["threads"] is None:
        values["threads"] = 1 if cnn and values["bs"] < MANY else torch.get_num_threads()
    return Settings(**values)


def read_config(path: Path) -> dict[str, Any]:
    """What the config.json `path` of a run holds. OSError if it cannot be read; ValueError if it is not one."""
    if path.exists() and not path.is_file():  # a named pipe would be waited for
        raise OSError(None, "it is not a file")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        _check(config)
    except (ValueError, RecursionError) as e:  # a byte that is not UTF-8 is a ValueError too
        raise ValueError(f"{path} is no configuration of a run: {e}") from e
    return config


def _check(config: Any) -> None:
    """ValueError if what is read beside the settings is not of its kind."""
    if not isinstance(config, dict):
        raise wrong("it", "must be an object", config)
    parts: dict[str, tuple[type, str]] = {"command": (str, "text"), "started": (str, "text")}
    parts |= {"resumed": (list, "a list"), "result": (dict, "an object")}
    for name, (kind, rule) in parts.items():
        if name not in config and kind is str:
            raise ValueError(f"{name} is missing")
        if not isinstance(config.get(name, kind()), kind):
            raise wrong(name, f"must be {rule}", config[name])
    steps = config.get("result", {}).get("steps", 0)
    if type(steps) is not int:
        raise wrong("result.steps", "must be a whole number", steps)


def of_config(kept: Any) -> Settings:
    """The settings that a config.json holds under `arguments`, each checked as the command line checks it.

    ValueError names the first that is wrong.
    """
    given = _values(kept, "arguments")
    for name in _FIELDS:
        if name not in given and name not in _ADDED_LATER:
            raise ValueError(f"arguments.{name} is missing")
    return settle(given)


def of_file(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options `given`, and those of a JSON file for the others.

    The file is an object of options by name (`bs`, `weight_decay`, …), or the config.json of a run (or the
    run's folder), whose `arguments` are taken; the rest describes that run. ValueError names the first that is wrong.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        arguments = config.get("arguments") if isinstance(config, dict) else None
        for name, value in arguments.items() if isinstance(arguments, dict) else ():
            if name in config and not isinstance(config[name], dict) and config[name] != value:
                raise wrong(name, f"must be what arguments.{name} is, {json.dumps(value)}: edit it there", config[name])
        values = _values(config) if arguments is None else _values(arguments, "arguments")
    except OSError as e:
        raise ValueError(f"--config must be a JSON file of options; {path} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:  # a byte that is not UTF-8 is a ValueError too
        raise ValueError(f"--config {path}: {e}") from e
    if "norm" in given and "recipe" not in given:
        values.pop("recipe", None)  # it belongs to the file's norm
    return {**values, **given}


def _values(kept: Any, where: str = "") -> dict[str, Any]:
    """What the object `kept`, read from JSON, has of options, each checked; `where` is its name in the file."""
    if not isinstance(kept, dict):
        raise wrong(where or "it", "must be an object", kept)
    kept = dict(kept)
    if "layer" in kept:  # of an earlier version, which had either of two options, --layer and --norm
        layer = kept.pop("layer")
        kept["norm"] = layer if kept.get("norm") is None else kept["norm"]
    dot = f"{where}." if where else ""
    for name in kept:
        if name not in _FIELDS:
            raise ValueError(f"there is no {dot}{name}.{suggestion(name, _FIELDS)}")
    return {name: _checked(name, value, dot) for name, value in kept.items()}


def _checked(name: str, value: Any, dot: str) -> Any:
    """`value`, read from JSON, as the option `name` would give it."""
    default, check, problem = _FIELDS[name].metadata["default"], rule(name), ""
    if isinstance(default, bool):
        problem = "" if isinstance(value, bool) else "must be true or false"
    elif isinstance(default, tuple):
        texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
        problem = "" if texts else "must be a list of texts"
    elif value is None:
        problem = "must not be null" if default is not None or name in _NEVER_NULL else ""
    elif check is None:
        problem = "" if isinstance(value, str) and value and "\0" not in value else "must be text"
        value = Path(value) if name in _PATHS and not problem else value
    else:
        value = _named(f"{dot}{name}", check, value if isinstance(value, str) else json.dumps(value))
    if problem:
        raise wrong(f"{dot}{name}", problem, value)
    return value


def wrong(name: str, problem: str, value: Any) -> ValueError:
    """An error about `value`, read from JSON, which is shortened."""
    got = json.dumps(value)
    return ValueError(f"{name} {problem}; got {got[:60]}{'…' if len(got) > 60 else ''}")


def split_norm(name: str) -> tuple[str, str | None]:
    """A value of --norm as one of `NORMS` and a recipe, which is None unless `name` is one. Layers' names serve too."""
    from fastrbn.norm import RECIPES

    norms = {layer: norm for norm, layer in NORMS.items()} | {norm: norm for norm in NORMS}
    _named("--norm", one_of(*dict.fromkeys((*NORMS, *RECIPES, *NORMS.values()))), name)
    return (norms[name], None) if name in norms else ("running", name)


def _norm_and_recipe(norm: str, recipe: str | None) -> tuple[str, str | None]:
    """What --norm and --recipe say together."""
    from fastrbn.norm import RECIPES

    kind, own = split_norm(norm)
    if own is not None and recipe not in (None, own):
        raise ValueError(f"--norm {norm} is a recipe already, and --recipe is {recipe}: leave one of them out")
    if kind == "running":
        return kind, _named("--recipe", one_of(*RECIPES), recipe or own or "default")
    if recipe is not None:
        raise ValueError(f"--recipe is for --norm running, and --norm is {norm}: leave one of them out")
    return kind, None


def _named(name: str, check: Rule, text: str) -> Any:
    try:
        return check(text)
    except ValueError as e:
        raise ValueError(f"{name} {e}") from e


def _optimiser_defaults(opt: str, momentum: float, weight_decay: float | None) -> dict[str, Any]:
    """The arguments of the optimiser with their defaults. ValueError for a setting that it does not have."""
    import torch

    takes = {p.name: p.default for p in inspect.signature(getattr(torch.optim, opt)).parameters.values()}
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        if value and name not in takes:
            raise ValueError(f"--{name.replace('_', '-')} is no setting of --opt {opt}: leave it out")
    return takes


def default_lr(bs: int, model: str = "cnn", momentum: float = 0.0) -> float:
    """2·bs/(bs + 32): 0.05 a sample while batches are small, never above 2.

    It passes through the rates measured to train the course's net well with a linear schedule (0.4 at batch 8, 1.0 at
    32) and near the others (0.1 at 2, 1.5 at 128). A step of SGD with momentum m moves on for 1/(1 − m) steps' worth.
    resnet9 trained best at a quarter of the rate or near it, at batches of 8 to 256, in short trainings: its largest
    features reach its last layer undamped (Page divides them by 8). Other nets get a sixteenth: resnet18 on the first
    images of MNIST reached 84 % with that (0.025), 52 % with a quarter at batch 8, and 90 % and 37 % at batch 32.
    """
    return 2 * bs / (bs + 32) * (1 - momentum) * {"cnn": 1, "resnet9": 0.25}.get(model, 0.0625)


def find_device(name: str, known: str) -> str:
    """The device called `name` in full. ValueError if it is not there; `known` says what is."""
    import torch

    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # a device that can be named need not be there
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device must be {known}; got '{name}': {str(e).strip().splitlines()[0]}") from e
    return str(device)


def _auto() -> str:
    """This machine's accelerator, or else cpu."""
    import torch

    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
