"""The folder of a run of `fastrbn train`: what is written there, how it is locked, and how it is resumed.

Each file is written whole or not at all, and one that cannot be written does not cost the others.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import platform
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrbn import plots
from fastrbn._version import __version__
from fastrbn.callbacks import AvgStatsCallback, HaltOnNaN, ParamMagnitudes, Recorder, SaveBest
from fastrbn.data import DataBunch, ImageData
from fastrbn.learn import Learner, Runner, checkpoint_file
from fastrbn.norm import get_recipe
from fastrbn.trainer.settings import NFS, Settings, of_config, read_config, split_norm
from fastrbn.util import locked, write_whole

from .options import BAD_ARGUMENTS, DATA_SETS, DONE, CliError
from .plugins import IN_THE_FOLDER, outside

CHECKPOINTS = "checkpoints"  # a folder
REPORT = "nan_report.txt"
RESULTS = (
    "config.json",
    "model.pt",
    *IN_THE_FOLDER.values(),
    "model.onnx",
    "model.pt2",
    "history.csv",
    "curves.png",
    "params.png",
    REPORT,
    "nan_report.json",
    "nan_batch.pt",
)

_MAY_CHANGE = (
    "epochs",
    "max_steps",
    "checkpoint_every",
    "data_dir",
)  # training goes on from the same place
_DATA = ("data", "size", "limit", "data_dir")  # described apart in config.json


@dataclass(frozen=True)
class Plan:
    """A run to be trained: its settings, its folder (None: a new one in runs/), and the config.json that it resumes."""

    settings: Settings
    command: str
    folder: Path | None
    force: bool = False
    config: dict | None = None


# the folder


def check_folder(folder: Path | None, force: bool) -> None:
    """CliError if results may not go to `folder`, before time is spent on making them."""
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise CliError(f"--out must be a folder; {folder} is a file: take another name", BAD_ARGUMENTS)
    if any(folder.iterdir()) and not force:
        raise CliError(
            f"--out {folder} is not empty: take another name, or --force to write over its results", BAD_ARGUMENTS
        )
    for name in RESULTS:
        if (folder / name).is_dir():
            raise CliError(f"{folder / name} must be a file; it is a folder: move it away", BAD_ARGUMENTS)
    if (folder / CHECKPOINTS).is_file():
        raise CliError(f"{folder / CHECKPOINTS} must be a folder; it is a file: move it away", BAD_ARGUMENTS)


def open_folder(plan: Plan, name: str, held: ExitStack) -> Path:
    """The run's folder, made if need be and locked while `held` is; in runs/ it is named after `name`."""
    folder = plan.folder or Path("runs") / f"{name}-{plan.settings.layer}-{datetime.now():%Y%m%d-%H%M%S}"
    if plan.config is None:
        folder = make_folder(folder, numbered=plan.folder is None)
    try:
        held.enter_context(locked(folder))
    except BlockingIOError as e:
        raise CliError(str(e)) from e
    # once more: another process may have been here meanwhile
    check_folder(plan.folder, plan.force or plan.config is not None)
    return folder


def make_folder(folder: Path, numbered: bool = False) -> Path:
    """Make `folder`; if `numbered`, as a new one, with -2, -3, … where it exists: two runs may start in one second."""
    base, n = folder, 1
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=not numbered)
            return folder
        except OSError as e:
            if not (numbered and isinstance(e, FileExistsError)):
                raise _not_there(folder, e) from e
            n += 1
            folder = base.with_name(f"{base.name}-{n}")


def drop_results(folder: Path) -> None:
    """Delete the results of an earlier run in `folder`, which would pass for this one's."""
    try:
        for file in (
            *(folder / name for name in RESULTS),
            *(f for _, f in checkpoint_file.files(folder / CHECKPOINTS)),
        ):
            file.unlink(missing_ok=True)
    except OSError as e:
        raise _not_there(folder, e) from e


def _not_there(folder: Path, error: OSError) -> CliError:
    return CliError(f"the results cannot go to {folder}: {error.strerror or error}; choose another folder with --out")


# config.json


def configuration(
    plan: Plan, images: ImageData, data: DataBunch, learn: Learner, run: Runner, **processes: Any
) -> dict[str, Any]:
    """What config.json holds: the settings (`arguments`, to resume from), and what they come to with these data."""
    import torchvision

    settings = plan.settings
    kept = {**settings.dump(), "data": _found(settings.data, images)}
    recipe, root, device = settings.recipe, settings.data_dir, torch.device(settings.device)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    config = {
        "command": plan.command,
        "started": now,
        "data": {
            "name": images.name,
            "train": len(data.train_ds),
            "valid": len(data.valid_ds),
            "shape": list(images.train.x.shape[1:]),
            "classes": list(images.classes),
            "mean": list(images.mean),
            "std": list(images.std),
            "limit": settings.limit,
            "data_dir": root and str(root),
        },
        "layer": settings.layer,
        **{name: value for name, value in kept.items() if name not in (*_DATA, "cb", "no_halt", "checkpoint_every")},
        "nfs": NFS if settings.model == "cnn" else None,
        "recipe_settings": recipe and dataclasses.asdict(get_recipe(recipe)),
        "parameters": sum(p.numel() for p in learn.model.parameters()),
        "optimiser": type(learn.opt).__name__,
        "halt_on_nan": callback_of(run, HaltOnNaN) is not None,
        "callbacks": [repr(cb) for cb in run.cbs],
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {
            "fastrbn": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "platform": platform.platform(),
        },
        **processes,
        "arguments": kept,
    }
    if (past := plan.config) is None:
        return config
    then = past.get("data")
    classes = then.get("classes", [*images.classes]) if isinstance(then, dict) else [*images.classes]
    if classes != [*images.classes]:
        raise CliError(
            f"{kept['data']} has other classes ({', '.join(images.classes[:5])}) than the run was trained with "
            f"({', '.join(map(str, classes[:5]))}): put its images back, or train in another folder"
        )
    again = {"command": past["command"], "started": past["started"], "resumed": [*past.get("resumed", []), now]}
    return {name: value for name, value in past.items() if name != "result"} | config | again


def _found(data: str | None, images: ImageData) -> str:
    """The data by the name under which they will be found again, from any folder."""
    return images.name if data is None or data in DATA_SETS else _anywhere(data)


def _anywhere(data: str) -> str:
    """A folder by its whole path; the name of a data set, which takes precedence, as it is."""
    return str(Path(data).resolve()) if data not in DATA_SETS and Path(data).is_dir() else data


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """`config` as JSON, a line for each setting. CliError if it cannot be written."""
    file = folder / "config.json"
    try:
        # a name that is not UTF-8 has surrogates, for which these escapes are also JSON's
        write_whole(file, f"{_json(config)}\n".encode("utf-8", "backslashreplace"))
    except OSError as e:
        raise CliError(_unwritten(file, e)) from e


def _json(value: Any, indent: str = "") -> str:
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value, ensure_ascii=False, default=lambda v: getattr(v, "__name__", None) or repr(v))
    inner = indent + "  "
    lines = (f"{inner}{json.dumps(str(k), ensure_ascii=False)}: {_json(v, inner)}" for k, v in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _unwritten(file: Path, error: Exception) -> str:
    if not isinstance(error, OSError):
        return f"{file} could not be written: {type(error).__name__}: {error}"
    folder = isinstance(error, IsADirectoryError)
    repair = "move that folder away" if folder else "make room, or choose another folder with --out"
    return f"{file} could not be written: {error.strerror or error}; {repair}"


# the other results


def write_results(folder: Path, run: Runner, model: nn.Module, report: object = None) -> list[str]:
    """Write all results but the configuration. Returns a sentence for each file that could not be written."""
    stats, recorder, magnitudes = (callback_of(run, cls) for cls in (AvgStatsCallback, Recorder, ParamMagnitudes))
    writers: dict[str, Callable[[], str | bytes]] = {
        "model.pt": lambda: _state_dict(model),
        "history.csv": lambda: _history(stats),
        "curves.png": lambda: plots.png(
            plots.plot_run(recorder.losses, recorder.lrs[-1] if recorder.lrs else [], rows(stats))
        ),
        "params.png": lambda: plots.png(magnitudes.plot()),
    }
    if report is not None:
        writers[REPORT] = lambda: f"{report}\n"
    failures = []
    for name, make in writers.items():
        try:
            write_whole(folder / name, make())
        except Exception as e:  # noqa: BLE001 - a full disk, a picture of odd numbers: the other files are still wanted
            failures.append(_unwritten(folder / name, e))
    return failures


def best_of(run: Runner, folder: Path) -> dict[str, Any]:
    """What config.json says of the weights that SaveBest wrote; empty if it wrote none."""
    best = callback_of(run, SaveBest)
    if best is None or best.best is None:
        return {}
    file = best.path.relative_to(folder.absolute()) if best.path.is_relative_to(folder.absolute()) else best.path
    return {"best": {"file": str(file), "epoch": best.best_epoch, best.monitor.name: best.best}}


def callback_of(run: Runner, cls: type) -> Any:
    """The run's callback that is a `cls` and no subclass, or None."""
    return next((cb for cb in run.cbs if type(cb) is cls), None)


def rows(stats: AvgStatsCallback) -> list[dict[str, Any]]:
    """The history; if the fit ended within an epoch, its last row has that epoch's averages so far."""
    history, run = list(stats.history), stats.run
    begun = run.iter is not None or run.dl is not run.data.train_dl  # else the averages are still the last epoch's
    if run.epoch == len(history) and begun and stats.train_stats.count:
        row = dict.fromkeys(stats.columns)
        row["epoch"] = run.epoch
        for part, which in ((stats.train_stats, "train"), (stats.valid_stats, "valid")):
            row.update({f"{which}_{name}": value for name, value in zip(part.names, part.avg_stats)})
        row["lr"] = float(run.opt.param_groups[-1]["lr"])
        history.append(row)
    return history


def _history(stats: AvgStatsCallback) -> str:
    text = io.StringIO(newline="")
    out = csv.DictWriter(text, stats.columns, lineterminator="\n")
    out.writeheader()
    out.writerows(rows(stats))
    return text.getvalue()


def _state_dict(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, file)
    return file.getvalue()


# resuming


def resumed(folder: Path, given: Mapping[str, Any], command: str) -> Plan:
    """The run in `folder` to go on with, `given` the options beside --resume, of which some may differ from the run's.

    The run may be somebody else's. CliError if its configuration names a file outside its folder, unless the command
    repeats it; if it is damaged; and if it does not go together with `given`.
    """
    config, settings = _load(folder)
    result, saved = config.get("result", {}), folder / CHECKPOINTS
    wrote = result.get("status") == DONE or result.get("steps", 0) >= (settings.checkpoint_every or 0)
    if wrote and not checkpoint_file.files(saved):
        raise CliError(
            f"the checkpoints of {folder} are gone (there is no checkpoint-….pt in {saved}): put them back, or train "
            f"in another folder"
        )
    asked = dict(given)
    if "norm" in asked:
        asked["norm"], recipe = split_norm(asked["norm"])
        asked.update({} if recipe is None else {"recipe": recipe})
    if "pretrained" in asked:
        asked["pretrained"] = str(asked["pretrained"].resolve())
    kept = {**settings.dump(), "out": folder, "force": False}
    may_change = {*_MAY_CHANGE}
    if "data" in asked:
        asked["data"] = kept["data"] if kept["data"] == f"{asked['data']}-jpeg" else _anywhere(asked["data"])
        then, now = Path(kept["data"]), Path(asked["data"])
        if then.is_absolute() and not then.exists() and now.is_absolute():  # they, or the run, have been moved
            may_change.add("data")
    for name, wanted in sorted(asked.items()):
        if name not in may_change and wanted != kept[name]:
            option = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            raise CliError(
                f"{option} does not go with --resume: the run has {kept[name]}, got {wanted}; leave it out, or begin "
                f"another run. What may be another: --epochs, --max-steps, --checkpoint-every, --data-dir",
                BAD_ARGUMENTS,
            )
    if "cb" not in asked:
        _check_callbacks(settings.cb, folder)
    settings = dataclasses.replace(settings, **{name: asked[name] for name in may_change if name in asked})
    root = settings.data_dir
    if "data_dir" not in asked and root is not None and not root.is_dir():
        raise CliError(
            f"the run's --data-dir {root} is not here: say where the data are with --data-dir", BAD_ARGUMENTS
        )
    check_folder(folder, force=True)
    return Plan(settings, command, folder, config=config)


def restarted(folder: Path, settings: Settings, command: str) -> Plan:
    """The run in `folder` that torchrun has started again with its own `settings`; from the start if it did not get so
    far as to keep them."""
    if settings.checkpoint_every is not None:
        with contextlib.suppress(CliError):
            config, kept = _load(folder)
            own = {name: getattr(settings, name) for name in ("data", "device", "data_dir", "cb")}
            return Plan(dataclasses.replace(kept, **own), command, folder, config=config)
    return Plan(settings, command, folder, force=True)


def start(folder: Path) -> Path | None:
    """The folder of checkpoints to resume from; None if the run ended before its first. Prints which it is."""
    there = checkpoint_file.files(folder / CHECKPOINTS)
    if not there:
        print(f"{folder} ended before its first checkpoint: training from the start", flush=True)
        return None
    print(f"going on from {there[-1][1]}", flush=True)
    return folder / CHECKPOINTS


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in `folder` has a checkpoint to resume from."""
    return bool(checkpoint_file.files(folder / CHECKPOINTS))


def has_learnt(run: Runner) -> bool:
    """Whether a resumed fit has done a step beyond its checkpoint. Until then the run's results are all there is."""
    return run.resumed_from is not None and run.n_iter > checkpoint_file.steps_in(run.resumed_from)


def _check_callbacks(specs: tuple[str, ...], folder: Path) -> None:
    for spec in specs:
        if (what := outside(spec, folder)) is not None:
            again = shlex.join(["fastrbn", "train", "--resume", str(folder), *(a for s in specs for a in ("--cb", s))])
            raise CliError(
                f"the run's callback '{spec}' {what}; if that is what you want, repeat the run's callbacks: {again}",
                BAD_ARGUMENTS,
            )


def _load(folder: Path) -> tuple[dict[str, Any], Settings]:
    """The config.json of a run that can be resumed, and its settings. CliError if it is missing, damaged or odd."""
    path, where = folder / "config.json", ""
    try:
        config = read_config(path)
        arguments = config.get("arguments", {"checkpoint_every": None})
        if isinstance(arguments, dict) and arguments.get("checkpoint_every", 0) is None:
            raise CliError(
                f"--resume needs a run that was trained with --checkpoint-every; {folder} was not, so there is nothing "
                f"to go on from",
                BAD_ARGUMENTS,
            )
        where = f"{path}: "
        return config, of_config(arguments)
    except OSError as e:
        raise CliError(
            f"--resume needs the folder of a run, with its config.json; {path} cannot be read: {e.strerror or e}",
            BAD_ARGUMENTS,
        ) from e
    except ValueError as e:
        raise CliError(
            f"--resume: {where}{e}; edit the file or restore it from a copy, or train in another folder", BAD_ARGUMENTS
        ) from e
