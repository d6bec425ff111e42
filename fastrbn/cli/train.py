"""`fastrbn train`: from the arguments to a trained net and its results, whatever happens on the way."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import platform
import shlex
import sys
import time
import traceback
from datetime import datetime
from pathlib import Path

import torch

from fastrbn._version import __version__
from fastrbn.build import get_learn_run, get_runner
from fastrbn.callbacks import (
    AvgStatsCallback,
    Checkpoint,
    CheckpointError,
    CSVLogger,
    Distributed,
    HaltOnNaN,
    ParamMagnitudes,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    TensorBoardLogger,
    accuracy,
    combine_scheds,
    cos_1cycle_anneal,
    sched_cos,
    sched_lin,
)
from fastrbn.data import DataError, DataNotFoundError, DownloadError, image_databunch, load_dataset
from fastrbn.models import conv_bn, conv_gn, conv_rbn, resnet9
from fastrbn.norm import RECIPES, get_recipe
from fastrbn.util import locked

from . import ranks as processes
from . import recipe as recipes
from . import resume as resuming
from . import run_folder as results
from .options import BAD_ARGUMENTS, DONE, ERROR, HALTED, INTERRUPTED, LAYERS, MANY, CliError, default_lr, nearest
from .plugins import make_callback

NFS = [8, 16, 32, 64, 64]  # the course's net
BUILDERS = {"conv_rbn": conv_rbn, "conv_bn": conv_bn, "conv_gn": conv_gn}
MAGNITUDES = 500  # about as many moments as params.png has columns


def train(args) -> int:
    """Run `fastrbn train` and return the exit status. CliError where nothing was trained."""
    before, ranks = torch.get_num_threads(), processes.Ranks()
    try:
        with ranks.quiet(), contextlib.ExitStack() as held:
            args = _resumed(args, ranks)
            torch.set_num_threads(args.threads or (1 if args.model == "cnn" and args.bs < MANY else before))
            return _train(args, ranks, held)
    finally:
        torch.set_num_threads(before)
        ranks.leave()


def _resumed(args, ranks):
    """The arguments to train with: those given, those of the run to resume, or of one that torchrun starts again."""
    if args.resume is not None:
        return resuming.resumed(args)
    if (folder := ranks.first(lambda: processes.restarted(args))) is None:
        return args
    args.out, args.force = Path(folder), True
    return resuming.restarted(args) if args.checkpoint_every else args


def _train(args, ranks, held) -> int:
    processes.check_device(args.device, ranks)
    if args.resume is None:  # what can be known to be wrong is said before anything is loaded
        ranks.first(lambda: results.check_folder(args.out, args.force))
    recipes.settle_norm(args)
    model_kwargs = {**_norm_kwargs(args), **recipes.model_kwargs(args)}
    device = _device(args.device)
    added = [make_callback(spec) for spec in args.cb]
    images = ranks.first_then_others(lambda: _images(args))
    data_kwargs = recipes.data_kwargs(args, images, ranks.world)
    torch.manual_seed(args.seed)
    try:
        data = image_databunch(images, args.bs, seed=args.seed, device=device, limit=args.limit, **data_kwargs)
    except ValueError as e:
        raise CliError(f"cannot train on {images.name}: {e}") from e
    lr = default_lr(args.bs * ranks.world) * recipes.default_factor(args) if args.lr is None else args.lr
    try:
        learn, run = _build(args, data, lr, model_kwargs)
        recipes.finish(args, learn, device)
        _try_a_batch(learn.model, data, args.bs, data_kwargs["drop_last"] or ranks.world > 1)
    except (ValueError, RuntimeError) as e:
        raise CliError(f"{args.model} of {args.layer} cannot be trained on {images}: {e}") from e
    folder = Path(ranks.first(lambda: str(_folder(args, images.name, held))))
    run.add_cbs(_callbacks(args, lr, folder, len(data.train_dl) // ranks.world, added))
    if ranks.world > 1 and not any(type(cb) is Distributed for cb in added):
        run.add_cbs(Distributed())
    config = _config(args, images, data, lr, device, learn, run)
    config.update(processes=ranks.world, launch=processes.launch())
    config["arguments"] = resuming.to_keep(args, images, lr, device, torch.get_num_threads())
    config = config if args.resume is None else resuming.with_history(config, args)
    if ranks.rank == 0:
        if args.resume is None:
            results.drop_results(folder)
        results.write_config(folder, config)
    _announce(images, data, config, folder)
    return _fit(args, learn, run, folder, config, ranks)


def _fit(args, learn, run, folder, config, ranks) -> int:
    """Train, write the results whatever happened, and say so in a sentence."""
    began, error = time.perf_counter(), None
    resume = None if args.resume is None else resuming.start(folder)
    try:
        run.fit(args.epochs, learn, resume=resume)
    except (Exception, SystemExit) as e:  # noqa: BLE001 - a callback's or the model's: shown, and what was learnt is kept
        if isinstance(e, CheckpointError) and resume is not None and run.resumed_from is None:
            _put_back(folder, args, ranks)
            raise CliError(str(e)) from e
        if not str(e).startswith("rank "):  # else another rank has shown it
            traceback.print_exc()
        error = e
    seconds = time.perf_counter() - began
    stats, recorder, magnitudes = (_of(run, cls) for cls in (AvgStatsCallback, Recorder, ParamMagnitudes))
    halt = _of(run, HaltOnNaN)
    report = halt.report if halt is not None else None
    status, sentence = ranks.worst(*_outcome(args, run, error, report, stats, seconds))
    if resume is not None and not resuming.has_learnt(run) and status in (ERROR, INTERRUPTED):
        _put_back(folder, args, ranks)
        if ranks.rank == 0:
            print(f"{sentence}; the results in {folder} are as they were", file=sys.stderr)
        return status
    if ranks.rank != 0:
        return status
    failures = results.write_results(folder, learn.model, stats, recorder, magnitudes, report)
    config["result"] = {"status": status, "reason": run.stop_reason, "seconds": round(seconds, 2), "steps": run.n_iter}
    try:
        results.write_config(folder, config)
    except CliError as e:
        failures.append(str(e))
    if failures and status == DONE:
        status = ERROR
    onward = f"; go on with: fastrbn train --resume {folder}" if status == INTERRUPTED and args.checkpoint_every else ""
    print(f"{sentence}; results in {folder}{onward}", file=sys.stdout if status == DONE else sys.stderr)
    for failure in failures:
        print(f"fastrbn train: error: {failure}", file=sys.stderr)
    return status


def _put_back(folder, args, ranks) -> None:
    """Leave a run that could not be resumed as it was: no result has been written, and its configuration is again."""
    if ranks.rank == 0:
        results.write_config(folder, args.config)


def _outcome(args, run, error, report, stats, seconds) -> tuple[int, str]:
    """Exit status, and what happened."""
    if error is not None:
        return ERROR, f"error: {run.stop_reason or f'{type(error).__name__}: {error}'}"
    if report is not None:
        return HALTED, f"halted: {run.stop_reason}"
    if run.stop_reason is not None and run.stop_reason.startswith("interrupted"):
        return INTERRUPTED, run.stop_reason
    if run.stop_reason is not None:
        return DONE, f"ended early: {run.stop_reason}"
    last = stats.history[-1] if stats.history else {}
    reached = f", validation accuracy {last['valid_accuracy']:.2%}" if last.get("valid_accuracy") is not None else ""
    return DONE, f"done: {_count(args.epochs, 'epoch')} in {seconds:.1f} s{reached}"


def _images(args):
    """The data set; without a name MNIST, or where that cannot be had, glyphs."""
    root, size = args.data_dir, {} if args.size is None else {"size": args.size}
    if root is not None and root.exists() and not root.is_dir():
        raise CliError(f"--data-dir must be a folder; {root} is a file", BAD_ARGUMENTS)
    try:
        if args.data is not None:
            images = load_dataset(args.data, root, **size)
            if images.c < 2:
                raise CliError(
                    f"training needs images of two classes or more; {images.name} has one, {images.classes[0]}: add a "
                    f"folder of other images"
                )
            if images.name == f"{args.data}-jpeg":
                print(f"{args.data} is not here in its own format: training on the JPEG images in {images.name}")
            return images
        try:
            return load_dataset("mnist", root, **size)
        except (DownloadError, DataNotFoundError):
            print(
                "MNIST was not found and could not be downloaded (`fastrbn train mnist` says why); training on "
                "generated digits (glyphs)"
            )
            return load_dataset("glyphs")
    except DownloadError as e:
        raise CliError(f"{e} `fastrbn train glyphs` needs no download.") from e
    except DataNotFoundError as e:
        raise CliError(str(e), BAD_ARGUMENTS) from e
    except DataError as e:
        raise CliError(str(e)) from e
    except ValueError as e:  # a size for images that have their own
        raise CliError(f"--size: {e}", BAD_ARGUMENTS) from e
    except MemoryError as e:
        raise CliError(f"{args.data} does not fit into memory; a smaller --size may") from e


def _norm_kwargs(args) -> dict:
    if args.recipe is None:
        return {}
    if args.layer != "conv_rbn":
        raise CliError(f"--recipe is for conv_rbn, and --layer is {args.layer}: leave one of them out", BAD_ARGUMENTS)
    if args.recipe not in RECIPES:
        known = ", ".join(RECIPES)
        raise CliError(
            f"--recipe must be one of {known}; got '{args.recipe}'.{nearest(args.recipe, RECIPES)}", BAD_ARGUMENTS
        )
    return {"recipe": args.recipe}


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # a device that can be named need not be there
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        why = str(e).strip().splitlines()[0]
        raise CliError(
            f"--device must be auto, cpu, or an accelerator of this machine such as cuda, cuda:1 or mps; got '{name}': "
            f"{why}",
            BAD_ARGUMENTS,
        ) from e
    return device


def _folder(args, name, held) -> Path:
    """The run's folder, which is this process's alone while `held` is."""
    folder = args.resume or args.out
    if folder is None:
        folder = Path("runs") / f"{name}-{args.layer}-{datetime.now():%Y%m%d-%H%M%S}"
    if args.resume is None:
        folder = results.make_folder(folder, numbered=args.out is None)
    try:
        held.enter_context(locked(folder))
    except BlockingIOError as e:
        raise CliError(str(e)) from e
    if args.resume is None:  # once more: another process may have been here meanwhile
        results.check_folder(args.out, args.force)
    return folder


def _schedule(args, lr):
    return {
        "none": None,
        "lin": sched_lin(lr, lr / 10),
        "cos": sched_cos(lr, lr / 10),
        "1cycle": combine_scheds([0.3, 0.7], cos_1cycle_anneal(lr / 10, lr, lr / 100)),
    }[args.sched]


def _callbacks(args, lr, folder, steps, added) -> list:
    """The command's own callbacks and the added ones; one that is added takes the place of its own of that class."""
    own = [Recorder(), AvgStatsCallback(accuracy), ProgressCallback()]
    own.append(ParamMagnitudes(every=max(1, steps * args.epochs // MAGNITUDES)))
    if not args.no_halt:
        own.append(HaltOnNaN(path=folder))
    for cb in added:
        if type(cb) is HaltOnNaN and cb.path is None:
            cb.path = folder
        if type(cb) is TensorBoardLogger and cb.path is None:
            cb.path = folder / "tensorboard"
    own += recipes.callbacks(args)
    classes = {type(cb) for cb in added}
    own = [cb for cb in own if type(cb) not in classes]
    own.append(CSVLogger(folder / "history.csv"))  # beside one that is added: that has its own path
    if args.checkpoint_every is not None:
        own.append(Checkpoint(folder / results.CHECKPOINTS, every=args.checkpoint_every))
    if (sched := _schedule(args, lr)) is not None:
        own.append(ParamScheduler("lr", sched))
    return own + added


def _build(args, data, lr, model_kwargs):
    how = recipes.learner_kwargs(args)
    if args.model == "cnn":
        return get_learn_run(NFS, data, lr, BUILDERS[args.layer], **how, **model_kwargs)
    model = resnet9(c_in=data.c_in, c_out=data.c, norm=LAYERS[args.layer], **model_kwargs)
    return get_runner(model, data, lr=lr, **how)


@torch.no_grad()
def _try_a_batch(model, data, bs, drop_last) -> None:
    """Raise what a copy of the model raises in the forward pass of an epoch's smallest batch: for images too small for
    its layers, or a batch too small for nn.BatchNorm."""
    x = data.train_dl.x
    left = 0 if drop_last else len(x) % bs
    copy.deepcopy(model).train()(torch.zeros(left or min(bs, len(x)), *x.shape[1:], device=x.device))


def _of(run, cls):
    return next((cb for cb in run.cbs if type(cb) is cls), None)


def _config(args, images, data, lr, device, learn, run) -> dict:
    """All that the run depends on, resolved, as JSON can hold it."""
    import torchvision

    recipe = args.recipe or "default" if args.layer == "conv_rbn" else None
    return {
        "command": shlex.join(["fastrbn", *(args.argv or [])]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "data": {
            "name": images.name,
            "train": len(data.train_ds),
            "valid": len(data.valid_ds),
            "shape": list(images.train.x.shape[1:]),
            "classes": list(images.classes),
            "mean": list(images.mean),
            "std": list(images.std),
            "limit": args.limit,
            "data_dir": args.data_dir and str(args.data_dir),
        },
        "model": args.model,
        "nfs": NFS if args.model == "cnn" else None,
        "layer": args.layer,
        "recipe": recipe,
        "recipe_settings": recipe and _plain(dataclasses.asdict(get_recipe(recipe))),
        "parameters": sum(p.numel() for p in learn.model.parameters()),
        "bs": args.bs,
        "lr": lr,
        "sched": args.sched,
        "epochs": args.epochs,
        "optimiser": type(learn.opt).__name__,
        **recipes.config(args),
        "seed": args.seed,
        "halt_on_nan": _of(run, HaltOnNaN) is not None,
        "callbacks": [repr(cb) for cb in run.cbs],
        "device": str(device),
        "threads": torch.get_num_threads(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {
            "fastrbn": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "platform": platform.platform(),
        },
    }


def _plain(value):
    """What JSON can hold; a function is its name."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", None) or repr(value)


def _announce(images, data, config, folder) -> None:
    shape = "×".join(map(str, config["data"]["shape"]))
    print(
        f"{images.name}: {config['data']['train']} training and {config['data']['valid']} validation images of "
        f"{shape}, {data.c} classes"
    )
    lr = config["lr"]
    path = {
        "none": f"{lr:.4g}",
        "lin": f"{lr:.4g} → {lr / 10:.4g} (linear)",
        "cos": f"{lr:.4g} → {lr / 10:.4g} (cosine)",
        "1cycle": f"{lr / 10:.4g} → {lr:.4g} → {lr / 100:.4g} (one cycle)",
    }[config["sched"]]
    recipe = f" (recipe {config['recipe']})" if config["recipe"] else ""
    n, bs = config["processes"], f"batch size {config['bs']}"
    bs += f" on each of {n} processes ({n * config['bs']} a step)" if n > 1 else ""
    bs += ", more than there are images" if n * config["bs"] > config["data"]["train"] else ""
    print(
        f"{config['model']} of {config['layer']}{recipe}, {config['parameters']} parameters, {bs}, "
        f"learning rate {path}, {_count(config['epochs'], 'epoch')}, on {config['device']}{recipes.words(config)}"
    )
    print(f"results in {folder}", flush=True)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
