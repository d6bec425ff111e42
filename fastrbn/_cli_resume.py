"""`fastrbn train --resume RUN`: the arguments of a run as its folder keeps them, and where its checkpoints are."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path

from . import checkpoints
from ._cli_args import BAD_ARGUMENTS, CliError, given
from ._cli_results import CHECKPOINTS

_PATHS = ("data_dir",)
_MAY_CHANGE = ("resume", "epochs", "checkpoint_every", "data_dir")  # training goes on from the same place all the same


def to_keep(args, images, lr, device, threads) -> dict:
    """What `resumed` needs, resolved: defaults that depend on the machine or the moment would be others there."""
    kept = {k: v for k, v in vars(args).items() if k not in ("command", "argv", "resume", "force", "out", "config")}
    is_folder = args.data is not None and Path(args.data).is_dir()
    by_name = images.name if args.data in (None, images.name.removesuffix("-jpeg")) else args.data  # what was found
    kept.update(data=str(Path(args.data).resolve()) if is_folder else by_name)
    kept.update(lr=lr, device=str(device), threads=threads, data_dir=args.data_dir and str(args.data_dir.resolve()))
    return kept


def resumed(args) -> argparse.Namespace:
    """The arguments of the run `args.resume`, with those of `args` that may be others. CliError when it is no run that
    can be resumed, or when the two do not go together."""
    config = _config(args.resume)
    kept = config.get("arguments")
    if kept is None or not kept.get("checkpoint_every"):
        raise CliError(
            f"--resume needs a run that was trained with --checkpoint-every; {args.resume} was not, so there is "
            f"nothing to go on from",
            BAD_ARGUMENTS,
        )
    merged = {**vars(args), **kept, "out": args.resume, "force": False, "config": config}
    merged.update({name: Path(merged[name]) for name in _PATHS if merged[name] is not None})
    for name in sorted(given(args.argv)):
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
    return argparse.Namespace(**merged)


def restarted(args) -> argparse.Namespace:
    """The arguments of the run `args.out`, which has these already; as they are when it did not get so far."""
    try:
        config = _config(args.out)
    except CliError:
        return args
    kept = {k: v for k, v in config.get("arguments", {}).items() if k not in ("data", "device", "data_dir")}
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


def with_history(config: dict, args) -> dict:
    """`config` of a resumed run, with what the run's first start and later ones left in it."""
    old, now = args.config, datetime.now().astimezone().isoformat(timespec="seconds")
    again = {"command": old["command"], "started": old["started"], "resumed": [*old.get("resumed", []), now]}
    return {**old, **config, **again}


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as e:
        raise CliError(
            f"--resume needs the folder of a run, with its config.json; {path} cannot be read: {e.strerror or e}",
            BAD_ARGUMENTS,
        ) from e
    except ValueError as e:
        raise CliError(f"--resume: {path} is no configuration of a run: {e}", BAD_ARGUMENTS) from e
    if not isinstance(config, dict):
        raise CliError(f"--resume: {path} is no configuration of a run", BAD_ARGUMENTS)
    return config
