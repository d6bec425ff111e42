"""`fastrbn train --resume RUN`: the arguments of a run as its folder keeps them, and where its checkpoints are."""

from __future__ import annotations

import argparse
import json
import shlex
from datetime import datetime
from pathlib import Path

from fastrbn.learn import checkpoint_file as checkpoints

from .options import BAD_ARGUMENTS, DONE, CliError, given, nearest, options
from .plugins import outside
from .run_folder import CHECKPOINTS

_NOT_KEPT = ("help", "command", "argv", "resume", "force", "out", "config")
_NEVER_NULL = ("data", "lr", "device", "threads")  # `to_keep` resolves them
# what a configuration must have; options that came later change nothing where they are left out
_REQUIRED = (
    *_NEVER_NULL,
    *("layer", "recipe", "model", "bs", "epochs", "sched", "seed", "limit", "data_dir", "cb", "no_halt", "checkpoint_every"),
)
_MAY_CHANGE = ("resume", "epochs", "checkpoint_every", "data_dir")  # training goes on from the same place all the same


def to_keep(args, images, lr, device, threads) -> dict:
    """What `resumed` needs, resolved: defaults that depend on the machine or the moment would be others there."""
    kept = {k: v for k, v in vars(args).items() if k not in _NOT_KEPT}
    is_folder = args.data is not None and Path(args.data).is_dir()
    by_name = images.name if args.data in (None, images.name.removesuffix("-jpeg")) else args.data  # what was found
    kept.update(data=str(Path(args.data).resolve()) if is_folder else by_name)
    kept.update(lr=lr, device=str(device), threads=threads, data_dir=args.data_dir and str(args.data_dir.resolve()))
    return kept


def resumed(args) -> argparse.Namespace:
    """The arguments of the run `args.resume`, with those of `args` that may differ.

    The run may be somebody else's: CliError if its configuration names a file outside its folder, unless the command
    repeats it, and if it is damaged or does not go together with `args`.
    """
    config = _config(args.resume)
    path = args.resume / "config.json"
    kept = config.get("arguments", {"checkpoint_every": None})
    if isinstance(kept, dict) and kept.get("checkpoint_every", 0) is None:
        raise CliError(
            f"--resume needs a run that was trained with --checkpoint-every; {args.resume} was not, so there is "
            f"nothing to go on from",
            BAD_ARGUMENTS,
        )
    kept = _checked(kept, path)
    result, folder = config.get("result", {}), args.resume / CHECKPOINTS
    wrote = result.get("status") == DONE or result.get("steps", 0) >= kept["checkpoint_every"]
    if wrote and not checkpoints.files(folder):
        raise CliError(
            f"the checkpoints of {args.resume} are gone (there is no checkpoint-….pt in {folder}): put them back, or "
            f"train in another folder"
        )
    merged = {**vars(args), **kept, "out": args.resume, "force": False, "config": config}
    repeated = given(args.argv)
    for name in sorted(repeated):
        wanted = getattr(args, name)
        if name in _MAY_CHANGE:
            merged[name] = wanted
        elif wanted != merged[name]:
            option = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            raise CliError(
                f"{option} does not go with --resume: the run has {merged.get(name)}, got {wanted}; leave it out, or "
                f"begin another run. What may be another: --epochs, --checkpoint-every, --data-dir",
                BAD_ARGUMENTS,
            )
    if "cb" not in repeated:
        _check_callbacks(merged["cb"], args.resume)
    root = merged["data_dir"]
    if "data_dir" not in repeated and root is not None and not root.is_dir():
        raise CliError(f"the run's --data-dir {root} is not here: say where the data are with --data-dir", BAD_ARGUMENTS)
    return argparse.Namespace(**merged)


def _check_callbacks(specs, folder: Path) -> None:
    for spec in specs:
        if (what := outside(spec, folder)) is not None:
            again = shlex.join(["fastrbn", "train", "--resume", str(folder), *(a for s in specs for a in ("--cb", s))])
            raise CliError(
                f"the run's callback '{spec}' {what}; if that is what you want, repeat the run's callbacks: {again}",
                BAD_ARGUMENTS,
            )


def _checked(kept, path: Path) -> dict:
    """The arguments that a configuration keeps, each checked as the command line checks it. CliError names the first
    that is wrong."""
    if not isinstance(kept, dict):
        raise _wrong(path, "arguments", "must be an object", kept)
    known = {name: action for name, action in options().items() if name not in _NOT_KEPT}
    for name in kept:
        if name not in known:
            raise CliError(f"--resume: {path}: there is no arguments.{name}.{nearest(name, known)}", BAD_ARGUMENTS)
    if missing := [name for name in _REQUIRED if name not in kept]:
        raise CliError(f"--resume: {path} lacks arguments.{missing[0]}, with which the run was trained", BAD_ARGUMENTS)
    return {name: _value(known[name], value, path) for name, value in kept.items()}


def _value(action: argparse.Action, value, path: Path):
    """`value` as the option would give it."""
    rule, name = None, f"arguments.{action.dest}"
    if isinstance(action.default, bool):
        rule = None if isinstance(value, bool) else "must be true or false"
    elif isinstance(action.default, list):
        right = isinstance(value, list) and all(isinstance(v, str) for v in value)
        rule = None if right else "must be a list of texts"
    elif value is None:
        rule = "must not be null" if action.default is not None or action.dest in _NEVER_NULL else None
    elif action.type in (None, Path):
        rule = None if isinstance(value, str) and value and "\0" not in value else "must be text"
        value = action.type(value) if action.type and rule is None else value
    else:
        try:
            value = action.type(value if isinstance(value, str) else json.dumps(value))
        except argparse.ArgumentTypeError as e:
            raise CliError(f"--resume: {path}: {name} {e}", BAD_ARGUMENTS) from e
    if rule is not None:
        raise _wrong(path, name, rule, value)
    return value


def _wrong(path: Path, name: str, rule: str, value) -> CliError:
    got = json.dumps(value)
    return CliError(f"--resume: {path}: {name} {rule}; got {got[:60]}{'…' if len(got) > 60 else ''}", BAD_ARGUMENTS)


def restarted(args) -> argparse.Namespace:
    """The arguments of the run `args.out`, which has these already; as they are when it did not get so far."""
    try:
        config = _config(args.out)
        kept = _checked(config.get("arguments"), args.out / "config.json")
    except CliError:
        return args
    kept = {k: v for k, v in kept.items() if k not in ("data", "device", "data_dir", "cb")}
    return argparse.Namespace(**{**vars(args), **kept, "resume": args.out, "force": False, "config": config})


def start(folder: Path) -> Path | None:
    """The folder to resume from, and a line that says so; None when the run ended before its first checkpoint, and so
    is to begin once more."""
    there = checkpoints.files(folder / CHECKPOINTS)
    if not there:
        print(f"{folder} ended before its first checkpoint: training from the start", flush=True)
        return None
    print(f"going on from {there[-1][1]}", flush=True)
    return folder / CHECKPOINTS


def has_learnt(run) -> bool:
    """Whether a resumed fit has done a step beyond its checkpoint. Until then the run's results are all there is."""
    return run.resumed_from is not None and run.n_iter > checkpoints.steps_in(run.resumed_from)


def with_history(config: dict, args) -> dict:
    """`config` of a resumed run, with what the run's first start and later ones left in it."""
    old, now = args.config, datetime.now().astimezone().isoformat(timespec="seconds")
    again = {"command": old["command"], "started": old["started"], "resumed": [*old.get("resumed", []), now]}
    return {**old, **config, **again}


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        if path.exists() and not path.is_file():  # a named pipe would be waited for
            raise OSError(None, "it is no file")
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise CliError(
            f"--resume needs the folder of a run, with its config.json; {path} cannot be read: {e.strerror or e}",
            BAD_ARGUMENTS,
        ) from e
    except (ValueError, RecursionError) as e:  # a byte that is not UTF-8 is a ValueError too
        raise CliError(f"--resume: {path} is no configuration of a run: {e}", BAD_ARGUMENTS) from e
    if not isinstance(config, dict):
        raise CliError(f"--resume: {path} is no configuration of a run: it must be an object", BAD_ARGUMENTS)
    for name, kind, rule in (
        ("command", str, "must be text"),
        ("started", str, "must be text"),
        ("resumed", list, "must be a list"),
        ("result", dict, "must be an object"),
    ):
        if name not in config and kind is str:
            raise CliError(f"--resume: {path} lacks {name}: is it the configuration of a run?", BAD_ARGUMENTS)
        if name in config and not isinstance(config[name], kind):
            raise _wrong(path, name, rule, config[name])
    steps = config.get("result", {}).get("steps", 0)
    if type(steps) is not int:
        raise _wrong(path, "result.steps", "must be a whole number", steps)
    return config
