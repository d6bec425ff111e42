"""`fastrbn train`: from settings to a trained net and its results, whatever happens on the way."""

from __future__ import annotations

import contextlib
import copy
import errno
import inspect
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.backends import cudnn

from fastrbn.build import LabelSmoothingCrossEntropy, get_runner
from fastrbn.callbacks import (
    EMA,
    AvgStatsCallback,
    Checkpoint,
    CheckpointError,
    CompileCallback,
    CSVLogger,
    Distributed,
    HaltOnNaN,
    MixedPrecision,
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
from fastrbn.data import (
    DataBunch,
    DataError,
    DataNotFoundError,
    DownloadError,
    ImageData,
    load_dataset,
)
from fastrbn.learn import Callback, Learner, Runner
from fastrbn.learn.optimiser import can_be_fused
from fastrbn.norm import RunningBatchNorm
from fastrbn.trainer import nets
from fastrbn.trainer.augment import transforms
from fastrbn.trainer.build import build_data, build_model
from fastrbn.trainer.settings import COMPILE, MODELS, Settings, of_file, settle

from . import ranks as processes
from . import run_folder
from .options import BAD_ARGUMENTS, DONE, ERROR, HALTED, INTERRUPTED, CliError
from .plugins import IN_THE_FOLDER, gives, make_callback
from .run_folder import Plan

EVERY_NET = 224  # pixels a side for which every net of torchvision is made
MAGNITUDES = 500  # about as many moments as params.png has columns


def train(given: Mapping[str, Any], argv: Sequence[str]) -> int:
    """Run `fastrbn train` with the options `given` and return the exit status. CliError if nothing was trained."""
    threads, benchmark, ranks = torch.get_num_threads(), cudnn.benchmark, processes.Ranks()
    try:
        with ranks.quiet(), contextlib.ExitStack() as held:
            plan = _plan(given, shlex.join(["fastrbn", *argv]), ranks)
            torch.set_num_threads(plan.settings.threads)
            if plan.settings.device.startswith("cuda") and not torch.are_deterministic_algorithms_enabled():
                cudnn.benchmark = True  # batches have one shape; the user's modules, read later, may change it
            return _train(plan, ranks, held)
    finally:
        torch.set_num_threads(threads)
        cudnn.benchmark = benchmark
        ranks.leave()


def _plan(given: Mapping[str, Any], command: str, ranks: processes.Ranks) -> Plan:
    """A new run, the one to resume, or the one that torchrun starts again."""
    options = dict(given)
    earlier, out, force = options.pop("resume", None), options.get("out"), options.get("force", False)
    file = options.pop("config", None)
    try:
        if file is not None and earlier is not None:
            raise ValueError("--config does not go with --resume, which takes the run's own options: leave one out")
        if file is not None:
            options = of_file(file, options)
        if earlier is not None:
            return run_folder.resumed(earlier, options, command)
        again = ranks.first(lambda: processes.restarted(out))
        if again is None:  # what can be known to be wrong is said before anything is loaded
            ranks.first(lambda: run_folder.check_folder(out, force))
        settings = settle({name: value for name, value in options.items() if name not in ("out", "force")}, ranks.world)
    except ValueError as e:
        raise CliError(str(e), BAD_ARGUMENTS) from e
    if again is not None:
        return run_folder.restarted(Path(again), settings, command)
    return Plan(settings, command, out, force)


def _train(plan: Plan, ranks: processes.Ranks, held: contextlib.ExitStack) -> int:
    settings = plan.settings
    processes.check_device(settings.device, ranks)
    added = [make_callback(spec) for spec in settings.cb]
    try:  # before the data are loaded
        transforms(settings.augment, (1, 1))
    except ValueError as e:
        raise CliError(str(e), BAD_ARGUMENTS) from e
    weights = _check_model(plan)
    images = ranks.first_then_others(lambda: _images(settings))
    torch.manual_seed(settings.seed)
    data = _databunch(settings, images, ranks.world)
    try:
        learn, run = _build(settings, data, weights)
        _try_a_batch(learn.model, data, settings, ranks.world)
    except CliError:
        raise
    except Exception as e:  # noqa: BLE001 - a net of the user's or of torchvision's may raise anything
        net, told, hint = settings.model, str(e), ""
        if net in MODELS:
            net = settings.title
        elif ":" in net:
            told = nets.told(e)
        elif min(images.train.x.shape[2:]) < EVERY_NET:
            told, hint = told.rstrip(".!"), f"; every net of torchvision takes images of --size {EVERY_NET}"
        raise CliError(f"{net} cannot be trained on {images}: {told}{hint}", BAD_ARGUMENTS) from e
    folder = Path(ranks.first(lambda: str(run_folder.open_folder(plan, images.name, held))))
    run.add_cbs(_callbacks(settings, folder, len(data.train_dl) // ranks.world, added))
    if ranks.world > 1 and not any(type(cb) is Distributed for cb in added):
        run.add_cbs(Distributed())
    config = run_folder.configuration(plan, images, data, learn, run, processes=ranks.world, launch=processes.launch())
    if ranks.rank == 0:
        if plan.config is None:
            run_folder.drop_results(folder)
        run_folder.write_config(folder, config)
    _announce(settings, config, learn.model)
    print(f"results in {folder}", flush=True)
    return _fit(plan, learn, run, folder, config, ranks)


def _fit(plan: Plan, learn: Learner, run: Runner, folder: Path, config: dict[str, Any], ranks: processes.Ranks) -> int:
    """Train, write the results whatever happened, and say so in a sentence."""
    settings, began, error = plan.settings, time.perf_counter(), None
    resume = None if plan.config is None else run_folder.start(folder)
    try:
        run.fit(settings.epochs, learn, resume, settings.max_steps)
    except (Exception, SystemExit) as e:  # noqa: BLE001 - a callback's or the model's: shown, and what was learnt is kept
        if isinstance(e, CheckpointError) and resume is not None and run.resumed_from is None:
            _put_back(plan, folder, ranks)
            raise CliError(str(e)) from e
        if not (_says_all(e) or str(e).startswith("rank ")):  # else another rank has shown it
            traceback.print_exc()
        error = e
    seconds = time.perf_counter() - began
    halt = run_folder.callback_of(run, HaltOnNaN)
    report = halt.report if halt is not None else None
    status, sentence = ranks.worst(*_outcome(settings, run, error, report, seconds))
    if resume is not None and not run_folder.has_learnt(run) and status in (ERROR, INTERRUPTED):
        _put_back(plan, folder, ranks)
        if ranks.rank == 0:
            print(f"{sentence}; the results in {folder} are as they were", file=sys.stderr)
        return status
    if ranks.rank != 0:
        return status
    failures = run_folder.write_results(folder, run, learn.model, report)
    config["result"] = {
        "status": status,
        "reason": run.stop_reason,
        "seconds": round(seconds, 2),
        "steps": run.n_iter,
        **run_folder.best_of(run, folder),
    }
    try:
        run_folder.write_config(folder, config)
    except CliError as e:
        failures.append(str(e))
    if failures and status == DONE:
        status = ERROR
    for failure in failures:
        print(f"fastrbn train: error: {failure}", file=sys.stderr)
    goes_on = status == INTERRUPTED and settings.checkpoint_every
    onward = f"; go on with: fastrbn train --resume {folder}" if goes_on else ""
    print(
        f"{sentence}; {'other ' if failures else ''}results in {folder}{onward}",
        file=sys.stderr if status else sys.stdout,
    )
    return status


def _says_all(error: BaseException) -> bool:
    """Whether the sentence at the end is enough: neither a full disk nor an argument that a callback of the package
    refuses is a fault of the code that a traceback would show."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    refused = isinstance(error, ValueError) and any(code.co_name == "begin_fit" for code in codes)
    ours = bool(codes) and Path(codes[-1].co_filename).is_relative_to(Path(__file__).parents[1])
    return full or refused and ours or isinstance(error, CheckpointError)


def _put_back(plan: Plan, folder: Path, ranks: processes.Ranks) -> None:
    """Restore the configuration of a run that could not be resumed; its results have not been touched."""
    if ranks.rank == 0 and plan.config is not None:
        run_folder.write_config(folder, plan.config)


def _outcome(
    settings: Settings, run: Runner, error: BaseException | None, report: object, seconds: float
) -> tuple[int, str]:
    """Exit status, and what happened."""
    if error is not None:
        return ERROR, f"error: {run.stop_reason or f'{type(error).__name__}: {error}'}"
    if report is not None:
        return HALTED, f"halted: {run.stop_reason}"
    if run.stop_reason is not None and run.stop_reason.startswith("interrupted"):
        return INTERRUPTED, run.stop_reason
    if run.stop_reason is not None:
        return DONE, f"ended early: {run.stop_reason}"
    history = run_folder.callback_of(run, AvgStatsCallback).history
    last = history[-1] if history else {}
    reached = f", validation accuracy {last['valid_accuracy']:.2%}" if last.get("valid_accuracy") is not None else ""
    by_steps = settings.epochs is None or run.n_iter == settings.max_steps
    length = _count(run.n_iter, "step") if by_steps else _count(settings.epochs, "epoch")
    return DONE, f"done: {length} in {seconds:.1f} s{reached}"


def _check_model(plan: Plan) -> dict[str, Tensor] | None:
    """The weights to start from, if they are in a file. CliError for a model or a file that is not there."""
    settings, option = plan.settings, "--model"
    try:
        if settings.model not in MODELS:
            nets.find(settings.model)
        option = "--pretrained"
        again = plan.config is not None and plan.folder is not None and run_folder.has_checkpoint(plan.folder)
        return None if settings.pretrained is None or again else nets.read_weights(settings.pretrained)
    except ValueError as e:
        raise CliError(f"{option} {e}", BAD_ARGUMENTS) from e


def _images(settings: Settings) -> ImageData:
    """The data set; without a name MNIST, or where that cannot be had, glyphs."""
    name, root = settings.data, settings.data_dir
    size: dict[str, Any] = {} if settings.size is None else {"size": settings.size}
    if root is not None and root.exists() and not root.is_dir():
        raise CliError(f"--data-dir must be a folder; {root} is a file", BAD_ARGUMENTS)
    try:
        if name is not None:
            images = load_dataset(name, root, **size)
            if images.c < 2:
                raise CliError(
                    f"training needs images of two classes or more; {images.name} has one, {images.classes[0]}: add a "
                    f"folder of other images",
                    BAD_ARGUMENTS,
                )
            if images.name == f"{name}-jpeg":
                print(f"{name} is not here in its own format: training on the JPEG images in {images.name}")
            return images
        try:
            return load_dataset("mnist", root, **size)
        except (DownloadError, DataNotFoundError):
            print(
                "MNIST was not found and could not be downloaded (`fastrbn train mnist` says why); training on "
                "generated digits (glyphs)"
            )
            return load_dataset("glyphs", **size)
    except DownloadError as e:
        raise CliError(f"{e} `fastrbn train glyphs` needs no download.") from e
    except DataNotFoundError as e:
        raise CliError(str(e), BAD_ARGUMENTS) from e
    except DataError as e:
        raise CliError(str(e)) from e
    except MemoryError as e:
        raise CliError(f"{name} does not fit into memory; a smaller --size may") from e


def _databunch(settings: Settings, images: ImageData, world: int) -> DataBunch:
    """The data on the device."""
    side, cutout = min(images.train.x.shape[2:]), settings.cutout
    if cutout is not None and cutout >= side:
        raise CliError(
            f"--cutout must leave some of the images, whose shorter side is {side}; got {cutout}", BAD_ARGUMENTS
        )
    try:
        return build_data(settings, images, world)
    except (TypeError, ValueError, RuntimeError) as e:
        raise CliError(f"cannot train on {images.name}: {e}", BAD_ARGUMENTS) from e


def _build(settings: Settings, data: DataBunch, weights: dict[str, Tensor] | None = None) -> tuple[Learner, Runner]:
    """The learner and its runner, on the device; the model has the `weights` of another."""
    assert data.c_in is not None and data.c is not None  # as always with images
    option = "--model"
    try:
        model = build_model(settings, data.c_in, data.c)
        option = f"--pretrained {settings.pretrained}:"
        for line in nets.load_weights(model, weights) if weights is not None else ():
            print(f"{settings.pretrained}: {line}")
    except ValueError as e:
        raise CliError(f"{option} {e}", BAD_ARGUMENTS) from e
    model.to(settings.device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    learn, run = get_runner(
        model, data, lr=settings.lr, opt_func=_optimiser(settings, model), weight_decay=settings.weight_decay or None
    )
    if settings.label_smoothing:
        learn.loss_func = LabelSmoothingCrossEntropy(settings.label_smoothing)
    return learn, run


def _optimiser(settings: Settings, model: nn.Module) -> Callable[..., optim.Optimizer]:
    """The optimiser's class with its settings; `get_runner` puts the weight decay into parameter groups."""
    cls: Callable[..., optim.Optimizer] = getattr(optim, settings.opt)
    takes = inspect.signature(cls).parameters
    how: dict[str, Any] = {"weight_decay": 0.0} if "weight_decay" in takes and not settings.weight_decay else {}
    if cls in (optim.Adam, optim.AdamW) and can_be_fused(model.parameters()):
        how["fused"] = True  # one kernel for all parameters, in place of a dozen for each
    if settings.momentum:
        how["momentum"] = settings.momentum
        how |= {"nesterov": True} if "nesterov" in takes else {}
    return partial(cls, **how)


@torch.no_grad()
def _try_a_batch(model: nn.Module, data: DataBunch, settings: Settings, world: int) -> None:
    """Raise what a copy of the model raises in the forward pass of an epoch's smallest batch: for images too small for
    its layers, or a batch too small for nn.BatchNorm."""
    x, bs = data.train_dl.x, settings.bs
    dropped = world > 1 or settings.compile is not None and len(x) >= bs
    left = 0 if dropped else len(x) % bs
    n = left or min(bs, len(x))
    pred = copy.deepcopy(model).train()(torch.zeros(n, *x.shape[1:], device=x.device))
    if not isinstance(pred, Tensor) or pred.shape != (n, data.c):
        got = f"a tensor {tuple(pred.shape)}" if isinstance(pred, Tensor) else f"a {type(pred).__name__}"
        raise ValueError(
            f"the model must return a number for each image and class, ({n}, {data.c}); it returned {got}: its last "
            f"layer must have as many outputs as there are classes"
        )


def _callbacks(settings: Settings, folder: Path, steps: int, added: list[Callback]) -> list[Callback]:
    """The command's own callbacks and the added ones; an added one replaces its own of that class."""
    own = [Recorder(), AvgStatsCallback(accuracy), ProgressCallback()]
    ends = (None if settings.epochs is None else steps * settings.epochs, settings.max_steps)
    own.append(ParamMagnitudes(every=max(1, min(n for n in ends if n is not None) // MAGNITUDES)))
    if not settings.no_halt:
        own.append(HaltOnNaN(path=folder))
    for spec, cb in zip(settings.cb, added):
        if (name := IN_THE_FOLDER.get(type(cb))) is not None and not gives(spec, "path"):
            cb.path = folder.absolute() / name
        if type(cb) is EMA and not gives(spec, "keep"):
            cb.keep = True  # model.pt is all that stays of a run: it gets the weights that were validated
        if type(cb) is HaltOnNaN and cb.path is None:
            cb.path = folder
        if type(cb) is TensorBoardLogger and cb.path is None:
            cb.path = folder / "tensorboard"
    if settings.amp:
        own.append(MixedPrecision(settings.amp))
    if settings.compile:
        own.append(CompileCallback() if settings.compile == COMPILE[0] else CompileCallback(mode=settings.compile))
    classes = {type(cb) for cb in added}
    own = [cb for cb in own if type(cb) not in classes]
    own.append(CSVLogger(folder / "history.csv"))  # beside one that is added: that has its own path
    if settings.checkpoint_every is not None:
        own.append(Checkpoint(folder / run_folder.CHECKPOINTS, every=settings.checkpoint_every))
    if (sched := _schedule(settings.sched, settings.lr)) is not None:
        own.append(ParamScheduler("lr", sched))
    return own + added


def _schedule(name: str, lr: float) -> Callable[[float], float] | None:
    return {
        "none": None,
        "lin": sched_lin(lr, lr / 10),
        "cos": sched_cos(lr, lr / 10),
        "1cycle": combine_scheds([0.3, 0.7], cos_1cycle_anneal(lr / 10, lr, lr / 100)),
    }[name]


def _net(settings: Settings, model: nn.Module) -> str:
    """The net and its norms in a few words."""
    recipe = f" (recipe {settings.recipe})" if settings.recipe else ""
    if settings.model in MODELS or settings.norm == "own":
        return settings.title + recipe
    n = sum(isinstance(m, RunningBatchNorm) for m in model.modules())
    return f"{settings.model} with {_count(n, 'running batch norm') + recipe if n else 'no batch norm to replace'}"


def _announce(settings: Settings, config: dict[str, Any], model: nn.Module) -> None:
    data, world, lr = config["data"], config["processes"], settings.lr
    shape = "×".join(map(str, data["shape"]))
    print(
        f"{data['name']}: {data['train']} training and {data['valid']} validation images of {shape}, "
        f"{len(data['classes'])} classes"
    )
    path = {
        "none": f"{lr:.4g}",
        "lin": f"{lr:.4g} → {lr / 10:.4g} (linear)",
        "cos": f"{lr:.4g} → {lr / 10:.4g} (cosine)",
        "1cycle": f"{lr / 10:.4g} → {lr:.4g} → {lr / 100:.4g} (one cycle)",
    }[settings.sched]
    step, bs = world * settings.bs, f"batch size {settings.bs}"
    bs += f" on each of {world} processes ({step} a step)" if world > 1 else ""
    bs += ", more than there are images" if step > data["train"] else ""
    compiled = "compiled" if settings.compile == COMPILE[0] else f"compiled ({settings.compile})"
    fast = [settings.amp, "channels last" if settings.channels_last else None, compiled if settings.compile else None]
    print(
        f"{_net(settings, model)}, {config['parameters']} parameters, {settings.opt}, {bs}, learning rate {path}, "
        + ", ".join([_length(settings), f"on {settings.device}", *filter(None, fast)])
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _length(settings: Settings) -> str:
    """How long the training is to last."""
    ends = ((settings.epochs, "epoch"), (settings.max_steps, "step"))
    return " or ".join(_count(n, what) for n, what in ends if n is not None)
