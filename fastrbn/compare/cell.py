"""One cell of a comparison: a net with a norm, trained once, and the result."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from fastrbn._version import __version__
from fastrbn.callbacks import ParamMagnitudes, ParamScheduler, Recorder, sched_lin
from fastrbn.data import BatchLoader, DataBunch, ImageData, RandomCrop, RandomFlip, load_dataset
from fastrbn.learn import Callback, CancelTrainException, Learner, Runner
from fastrbn.models import conv_layer, get_cnn_model, init_cnn, resnet9

from .norms import describe, get_norm, prepare_model, settle_statistics
from .table import KEY
from .task_nets import weights
from .tasks import OPTIMISERS, SCHEDULES, ZOO, Batches, Task, TaskData, build, get_task, in_groups, score_of, task_of

NFS = [8, 16, 32, 64, 64]  # the course's net
NETS: dict[str, Callable[..., nn.Module]] = {
    "cnn": lambda data, make: get_cnn_model(data, NFS, conv_layer, norm=make),
    "resnet-small": lambda data, make: resnet9(data.c_in, data.c, make, width=16),
    "resnet9": lambda data, make: resnet9(data.c_in, data.c, make),
}
"""Nets by name: the course's (ReLU before the norm), and `resnet9` of width 16 and 64 (norm before ReLU)."""

LR_RULES = {"cnn": (0.05, 2.0), "resnet-small": (0.00125, 0.1), "resnet9": (0.00125, 0.1)}
"""For each net the learning rate at batch size 1 and its cap; the rate is rate·bs^0.9 up to the cap.

They were fixed before norms were compared. For the ResNets, whose last layer sees large features, they are where
nn.BatchNorm trained best in short runs at batch sizes 8 and 32."""

_REFUSALS = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")
_VALID_BS = 1000
_MEASURED = 1000  # training inputs that statistics are measured from, see `settle_statistics`
# "at chance": accuracy below twice chance, and training loss above 0.9 times that of a blind guess
_AT_CHANCE = (2, 0.9)


@dataclass(frozen=True)
class Cell:
    """One training run: what to train, on which data, and how.

    Its learning rate is `lr`; it falls linearly to a tenth. With `data="zoo"`, `net` names one of `TASKS`, which has
    its own data, net, optimiser, learning rate and length.

    Parameters
    ----------
    norm : str
        The norm, see `get_norm`.
    bs : int
        Batch size. The remainder of an epoch is dropped, so every step has this size.
    seed : int, default 0
        Seed of the initial weights and of the order of batches, which are the same for every norm.
    lr_factor : float, default 1.0
        Multiplies the learning rate of the rule in `LR_RULES`.
    data : str, default "mnist"
        Data set or folder of images, see `load_images`.
    net : str, default "cnn"
        One of `NETS`.
    n_train : int, optional
        Train on the first `n_train` images; by default on all.
    epochs : int, default 1
    augment : bool, default False
        Use random crops (padding 4) and left-right flips.

    Examples
    --------
    >>> cell = Cell("default", bs=8, seed=1)
    >>> print(cell, f"{cell.lr:.3f}")
    mnist cnn default bs 8 seed 1 0.325
    """

    norm: str
    bs: int
    seed: int = 0
    lr_factor: float = 1.0
    data: str = "mnist"
    net: str = "cnn"
    n_train: int | None = None
    epochs: int = 1
    augment: bool = False

    @property
    def task(self) -> Task | None:
        """The task that `net` names; None for a net on images."""
        return task_of(self.data, self.net)

    @property
    def lr(self) -> float:
        """Learning rate: the rule's for this net and batch size, times `lr_factor`."""
        if self.task:
            return self.lr_factor * self.task.lr(self.bs)
        rate, cap = LR_RULES[self.net]
        return self.lr_factor * min(rate * self.bs**0.9, cap)

    def __str__(self) -> str:
        factor = "" if self.lr_factor == 1 else f" lr×{self.lr_factor:g}"
        return f"{self.data} {self.net} {self.norm} bs {self.bs}{factor} seed {self.seed}"


def key_of(cell: Cell, device: str) -> dict[str, str]:
    """The columns `KEY` of a cell on a kind of device, as text."""
    row = {name: getattr(cell, name) for name in KEY if hasattr(cell, name)}
    row |= {"settings": describe(cell.norm), "device": torch.device(device).type, "version": __version__}
    return {name: _word(row[name]) for name in KEY}


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else "all" if value is None else str(value)


@cache
def code_of() -> str:
    """Eight hex digits that change with the code of norms, nets, tasks and this file. Not part of a cell's key."""
    here = Path(__file__).parent
    files = [*sorted((here.parent / "norm").glob("*.[pc]*")), *sorted(here.glob("task*.py"))]
    files += [*sorted((here / "peers").glob("*.py")), here.parent / "models.py"]
    digest = hashlib.sha1(usedforsecurity=False)
    for file in [*files, Path(__file__)]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def load_images(name: str, root: str | Path | None = None) -> ImageData:
    """Load the images of a cell: `load_dataset`, which also finds and caches a folder `<name>-jpeg`.

    Parameters
    ----------
    name : str
        Data set or folder, optionally with a size to scale the images to: "cifar10@64".
    root : str or Path, optional
        Folder of the data sets; by default $FASTRBN_DATA or a cache.

    Returns
    -------
    ImageData

    Raises
    ------
    DataError
        As in `load_dataset`.

    Examples
    --------
    >>> load_images("glyphs").c
    10
    """
    name, size = split_size(name)
    return load_dataset(name, root, size=size)


def split_size(data: str) -> tuple[str, int | None]:
    """The name of a cell's data and the size after its @, None without one. A folder may have an @ in its name."""
    name, _, size = data.rpartition("@")
    return (name, int(size)) if name and size.isdecimal() and not Path(data).is_dir() else (data, None)


@dataclass(frozen=True)
class _Job:
    """What `run_cell` trains and how the result is judged."""

    data: DataBunch
    model: nn.Module
    inputs: Callable[[], Tensor]  # some training inputs
    optimiser: Callable[..., optim.Optimizer]
    loss: Callable[..., Tensor]
    schedule: Callable[[float], float]
    weights: dict[str, tuple[str, nn.Parameter]]  # whose norms are recorded; see `task_nets.weights`
    score: Callable[[], float]  # in percent, over all validation samples
    blind: tuple[float, float]  # a net below this score and above this loss has not learnt


def _image_job(cell: Cell, images: ImageData, device: str) -> _Job:
    data, steps = _loaders(cell, images, device)
    model = _model(cell, data, steps).to(device)
    return _Job(
        data,
        model,
        lambda: _inputs(cell, images, device),
        optim.SGD,
        F.cross_entropy,
        sched_lin(cell.lr, cell.lr / 10),
        weights(model, nn.Conv2d),
        lambda: 100 * valid_accuracy(model, images, device),
        (_AT_CHANCE[0] * 100 / images.c, _AT_CHANCE[1] * math.log(images.c)),
    )


def _task_job(cell: Cell, data: TaskData, device: str) -> _Job:
    task = get_task(cell.net)
    batches = Batches(task, data, cell.bs, cell.seed, device)
    if task.at_once is None:
        norm = get_norm(cell.norm, len(batches))
    else:
        norm = in_groups(get_norm(cell.norm, len(batches) * task.at_once // cell.bs), cell.bs)
    model = build(task, data, norm, cell.seed)
    model = prepare_model(cell.norm, model).to(device)
    return _Job(
        DataBunch(batches, None, c=0, c_in=0),
        model,
        lambda: batches.inputs(_MEASURED),
        OPTIMISERS[task.optimiser],
        task.goal.loss,
        SCHEDULES[task.schedule](cell.lr),
        weights(model),
        lambda: score_of(task, data, model, device),
        task.goal.blind(data.y),
    )


def run_cell(
    cell: Cell,
    images: ImageData | TaskData,
    device: str = "cpu",
    norms_every: int | None = None,
    look: Callable[[nn.Module], object] | None = None,
) -> tuple[dict[str, Any], dict[str, list] | None]:
    """Train one cell and measure the result.

    Parameters
    ----------
    cell : Cell
    images : ImageData or TaskData
        The cell's data, from `load_images` or `load_task`.
    device : str, default "cpu"
    norms_every : int, optional
        Record the norms of the weights of convolutions (in a task, of linear layers too) every so many steps.
    look : callable, optional
        Called with the trained net at the end.

    Returns
    -------
    row : dict
        `accuracy` in percent over all validation images, or the task's score (None if the norm refuses the batch);
        `train_loss`, the mean over the last tenth of the steps; `status`; `note`; `seconds` of training; and more.
    norms : dict or None
        `{"step": […], "<layer>": […]}` with `norms_every`, else None.

    Notes
    -----
    `status` is one of

    - "trained";
    - "diverged": the loss became NaN or Inf, which ended the training;
    - "chance": the net knows nothing at the end, because it never learnt or because it collapsed. Accuracy is below
      twice chance and training loss above 0.9 ln(classes), so that a norm which trains well and evaluates badly does
      not count. Tasks have their own bounds, `Goal.blind`;
    - "refused": the norm raises at this batch size, as nn.BatchNorm does with one value per channel.

    Examples
    --------
    >>> row, _ = run_cell(Cell("default", 8), load_images("mnist"))   # doctest: +SKIP
    >>> row["status"], row["accuracy"]                                # doctest: +SKIP
    ('trained', 98.41)
    """
    job = _task_job(cell, images, device) if isinstance(images, TaskData) else _image_job(cell, images, device)
    settle_statistics(cell.norm, job.model, "before", job.inputs)
    start = _total_norm(p for _, p in job.weights.values())
    recorder, stop, sizes = Recorder(), _StopAtNonFinite(), ParamMagnitudes(every=norms_every or 1, stats="rms")
    cbs = [recorder, ParamScheduler("lr", job.schedule), stop, *([sizes] if norms_every else [])]
    learn = Learner(job.model, job.optimiser(job.model.parameters(), lr=cell.lr), job.loss, job.data)
    run = Runner(cbs)
    row = {"lr": round(cell.lr, 6), "accuracy": None, "train_loss": None, "status": "trained", "note": ""}
    began = time.perf_counter()
    try:
        run.fit(cell.epochs, learn)
    except ValueError as e:
        if not str(e).startswith(_REFUSALS):
            raise
        row.update(status="refused", note=str(e))
    losses = recorder.losses  # waits for the device
    row["seconds"] = round(time.perf_counter() - began, 2)
    if (run.stop_reason or "").startswith("interrupted"):
        raise KeyboardInterrupt
    row["steps"] = len(losses)
    if row["status"] != "refused":
        settle_statistics(cell.norm, job.model, "after", job.inputs)
        _measure(row, job, losses, stop)
    end = _total_norm(p for _, p in job.weights.values())
    row |= {"weight_norm_start": f"{start:.4g}", "weight_norm_end": f"{end:.4g}"}
    if look is not None:
        look(job.model)
    return row, _norms(sizes, job.weights) if norms_every else None


def _loaders(cell: Cell, images: ImageData, device: str) -> tuple[DataBunch, int]:
    """The training loader and the number of steps."""
    n = len(images.train) if cell.n_train is None else cell.n_train
    if not cell.bs <= n <= len(images.train):
        raise ValueError(
            f"n_train must be from the batch size, {cell.bs}, to the {len(images.train)} training images of "
            f"{images.name}; got {n}"
        )
    stats, tfms = (images.mean, images.std), (RandomCrop(4), RandomFlip()) if cell.augment else ()
    x, y = images.train.x[:n], images.train.y[:n]
    train = BatchLoader(x, y, cell.bs, True, cell.seed, drop_last=True, device=device, normalize=stats, tfms=tfms)
    return DataBunch(train, None, c=images.c, c_in=images.c_in), len(train) * cell.epochs


def _inputs(cell: Cell, images: ImageData, device: str) -> Tensor:
    x, y = images.train.x[: cell.n_train], images.train.y[: cell.n_train]
    loader = BatchLoader(x, y, _MEASURED, True, cell.seed, device=device, normalize=(images.mean, images.std))
    return next(iter(loader))[0]


def _model(cell: Cell, data: DataBunch, steps: int) -> nn.Module:
    """The net. Its initial weights depend on the seed only, not on random numbers that a norm or bias draws."""
    model = NETS[cell.net](data, get_norm(cell.norm, steps))
    torch.manual_seed(cell.seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    init_cnn(model)
    return prepare_model(cell.norm, model)


def _measure(row: dict[str, Any], job: _Job, losses: list[float], stop: _StopAtNonFinite) -> None:
    """Add loss, score and status to the row."""
    last = losses[-max(1, len(losses) // 10) :]
    row["train_loss"] = f"{fmean(last):.5g}" if all(map(math.isfinite, last)) else "nan"
    row["accuracy"] = round(job.score(), 3)
    if stop.reason:
        row.update(status="diverged", note=stop.reason)
    elif not all(map(math.isfinite, losses[-1:])):  # on CUDA the fit ends without waiting for the last steps
        row.update(status="diverged", note=f"loss {losses[-1]} at the end")
    elif row["accuracy"] < job.blind[0] and fmean(last) > job.blind[1]:
        row.update(status="chance", note="at chance, training loss as of a blind guess")


def load_task(name: str, root: str | Path | None = None, device: str = "cpu") -> TaskData:
    """Load the data of a task, drawn or read from files.

    For a task that starts from a trained net, that net is trained here, with nn.BatchNorm, batch size 32 and seed 0.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    root : str or Path, optional
        Folder of the data sets; by default $FASTRBN_DATA or a cache.
    device : str, default "cpu"
        Where that net is trained.

    Returns
    -------
    TaskData

    Raises
    ------
    ValueError
        If there is no such task.
    DataError
        If its data cannot be loaded.

    Examples
    --------
    >>> load_task("regression").x.shape
    torch.Size([6000, 16])
    """
    task = get_task(name)
    state = None
    if task.after:
        models: list[nn.Module] = []
        start = Cell("batchnorm", 32, data=ZOO, net=task.after)
        run_cell(start, load_task(task.after, root), device, look=models.append)
        state = models[0].state_dict()
    return TaskData(*task.data(root), state)


@torch.no_grad()
def valid_accuracy(model: nn.Module, images: ImageData, device: str = "cpu") -> float:
    """Share of all validation images that `model` classifies correctly in evaluation mode."""
    loader = BatchLoader(images.valid.x, images.valid.y, _VALID_BS, device=device, normalize=(images.mean, images.std))
    model.eval()
    right = [(model(xb).argmax(1) == yb).sum() for xb, yb in loader]
    return torch.stack(right).sum().item() / len(images.valid)


def _total_norm(tensors: Iterable[Tensor]) -> float:
    return torch.stack([t.detach().double().square().sum() for t in tensors]).sum().sqrt().item()


def _norms(sizes: ParamMagnitudes, convs: dict[str, tuple[str, nn.Parameter]]) -> dict[str, list]:
    """The recorded RMS values as norms, by layer."""
    rms = sizes.values["rms"]
    columns = {name: sizes.names.index(full) for name, (full, _) in convs.items()}
    root = {name: weight.numel() ** 0.5 for name, (_, weight) in convs.items()}
    return {"step": sizes.steps} | {name: (rms[:, i] * root[name]).tolist() for name, i in columns.items()}


class _StopAtNonFinite(Callback):
    """Ends the fit once the loss is NaN or Inf; SGD does not recover from that.

    On the CPU it stops at once. On CUDA a copy of the loss is sent to the host every 50 steps and read once it has
    arrived, so that no step waits for it.
    """

    def begin_fit(self) -> None:
        self.reason = ""
        self._sent: tuple[Tensor, torch.cuda.Event, int] | None = None  # copy of a loss, when it arrives, its step
        self._cuda = next(self.run.model.parameters()).device.type == "cuda"

    def after_loss(self) -> None:
        if not self._cuda:
            self._look(self.run.loss.item(), self.run.n_iter)
        elif self._sent is None:
            if self.run.n_iter % 50 == 0:
                host = torch.empty((), dtype=self.run.loss.dtype, pin_memory=True)
                host.copy_(self.run.loss.detach(), non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
                self._sent = host, arrived, self.run.n_iter
        elif self._sent[1].query():
            (host, _, step), self._sent = self._sent, None
            self._look(host.item(), step)

    def _look(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            self.reason = f"loss {loss} at step {step}"
            raise CancelTrainException(self.reason)
