"""One cell of a comparison: a net with a norm, trained once, and what came of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import nn, optim

from fastrbn._version import __version__
from fastrbn.callbacks import ParamMagnitudes, ParamScheduler, Recorder, sched_lin
from fastrbn.data import BatchLoader, DataBunch, ImageData, RandomCrop, RandomFlip, load_dataset
from fastrbn.learn import Callback, CancelTrainException, Learner, Runner
from fastrbn.models import conv_layer, get_cnn_model, init_cnn, resnet9

from .norms import describe, get_norm, prepare_model
from .table import KEY
from .task_nets import weights
from .tasks import OPTIMISERS, SCHEDULES, ZOO, Batches, Task, TaskData, build, get_task, score_of, task_of

NFS = [8, 16, 32, 64, 64]  # the course's net
NETS = {
    "cnn": lambda data, make: get_cnn_model(data, NFS, conv_layer, norm=make),
    "resnet-small": lambda data, make: resnet9(data.c_in, data.c, make, width=16),
    "resnet9": lambda data, make: resnet9(data.c_in, data.c, make),
}
"""The nets by name: the course's (ReLU before the norm), and `resnet9` of width 16 and 64 (norm before ReLU)."""

LR_RULES = {"cnn": (0.05, 2.0), "resnet-small": (0.00125, 0.1), "resnet9": (0.00125, 0.1)}
"""For each net the learning rate at batch 1 and its cap, rate·bs^0.9 between: fixed before anything was compared; that
of the ResNets, whose last layer sees large features, is where nn.BatchNorm trained best in short runs at 8 and 32."""

_REFUSALS = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")
_VALID_BS = 1000
_AT_CHANCE = (
    2,
    0.9,
)  # accuracy below so many times chance, training loss above so many times a blind guess's: not learnt


@dataclass(frozen=True)
class Cell:
    """One training: what to train, on what, and how.

    - `norm`: see `get_norm`. `bs`: batch size; what is left over at an epoch's end is dropped, so every step has it.
    - `seed`: of initial weights and of the batches' order; both are the same for every norm.
    - `lr_factor` (1): times the rule's learning rate (`lr`), which falls on a straight line to a tenth.
    - `data` ("mnist"), `net` ("cnn", see `NETS`), `n_train` (None: all) first training images, `epochs` (1).
    - `augment` (False): random crops (padding 4) and left-right flips.

    With `data="zoo"`, `net` names one of `TASKS`, which has data, net, optimiser, rate and length of its own.
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
        """The rule's learning rate for this net and batch size, times `lr_factor`."""
        if self.task:
            return self.lr_factor * self.task.lr(self.bs)
        rate, cap = LR_RULES[self.net]
        return self.lr_factor * min(rate * self.bs**0.9, cap)

    def __str__(self):
        factor = "" if self.lr_factor == 1 else f" lr×{self.lr_factor:g}"
        return f"{self.data} {self.net} {self.norm} bs {self.bs}{factor} seed {self.seed}"


def key_of(cell: Cell, device: str) -> dict[str, str]:
    """`KEY` of a cell on a kind of device, in the words of the CSV."""
    row = {name: getattr(cell, name) for name in KEY if hasattr(cell, name)}
    row |= {"settings": describe(cell.norm), "device": torch.device(device).type, "version": __version__}
    return {name: _word(row[name]) for name in KEY}


def _word(value) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else "all" if value is None else str(value)


@cache
def code_of() -> str:
    """Eight digits that change with the code of norms, nets, tasks and this file. Not part of a cell's key."""
    here = Path(__file__).parent
    files = [*sorted((here.parent / "norm").glob("*.[pc]*")), *sorted(here.glob("task*.py"))]
    files += [here / "peers.py", here / "weights.py", here.parent / "models.py"]
    digest = hashlib.sha1(usedforsecurity=False)
    for file in [*files, Path(__file__)]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def load_images(name: str, root=None):
    """The `ImageData` of that name or folder: `load_dataset`, which also knows and caches the folder `<name>-jpeg`."""
    return load_dataset(name, root)


@dataclass(frozen=True)
class _Job:
    """What `run_cell` trains, and how it is judged."""

    data: DataBunch
    model: nn.Module
    optimiser: Callable
    loss: Callable
    schedule: Callable
    weights: dict  # those whose norms are recorded: see `task_nets.weights`
    score: Callable[[], float]  # in percent, over all validation samples
    blind: tuple[float, float]  # a net below this score and above this loss has not learnt


def _image_job(cell, images, device) -> _Job:
    data, steps = _loaders(cell, images, device)
    model = _model(cell, data, steps).to(device)
    return _Job(
        data,
        model,
        optim.SGD,
        F.cross_entropy,
        sched_lin(cell.lr, cell.lr / 10),
        weights(model, nn.Conv2d),
        lambda: 100 * valid_accuracy(model, images, device),
        (_AT_CHANCE[0] * 100 / images.c, _AT_CHANCE[1] * math.log(images.c)),
    )


def _task_job(cell, data: TaskData, device) -> _Job:
    task = cell.task
    batches = Batches(task, data, cell.bs, cell.seed, device)
    model = build(task, data, get_norm(cell.norm, len(batches)), cell.seed)
    model = prepare_model(cell.norm, model).to(device)
    return _Job(
        DataBunch(batches, None, c=0, c_in=0),
        model,
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
    device="cpu",
    norms_every: int | None = None,
    look: Callable[[nn.Module], None] | None = None,
) -> tuple[dict, dict | None]:
    """Train `cell` on `images` (an `ImageData`; for a task what `load_task` returns) and measure.

    Returns a row of results (`accuracy` in percent over all validation images, or the task's score, None where the norm
    refuses the batch; `train_loss`, the mean over the last tenth of the steps; `status`; `note`; `seconds` of training;
    …) and, with `norms_every`, the norms of the convolutions' weights every so many steps (in a task, of linear layers
    too): `{"step": […], "<name>": […]}`.

    `status` is "trained"; "diverged" when the loss became NaN or Inf, and training ended there; "chance" when the net
    knows nothing at the end, whether it never learnt or collapsed: accuracy below twice chance, and training loss above
    0.9 ln(classes), so that a norm which trains and then evaluates badly is not among them (for tasks, `Goal.blind`);
    "refused" when the norm raises at this batch size, as nn.BatchNorm does at one value a channel.

    `look` is called with the trained net, once all is measured.
    """
    job = (_task_job if cell.task else _image_job)(cell, images, device)
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
        _measure(row, job, losses, stop)
    end = _total_norm(p for _, p in job.weights.values())
    row |= {"weight_norm_start": f"{start:.4g}", "weight_norm_end": f"{end:.4g}"}
    if look is not None:
        look(job.model)
    return row, _norms(sizes, job.weights) if norms_every else None


def _loaders(cell, images, device):
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


def _model(cell, data, steps):
    """The net; its initial weights are a function of the seed alone, whatever random numbers a norm or bias takes."""
    model = NETS[cell.net](data, get_norm(cell.norm, steps))
    torch.manual_seed(cell.seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    init_cnn(model)
    return prepare_model(cell.norm, model)


def _measure(row, job, losses, stop):
    last = losses[-max(1, len(losses) // 10) :]
    row["train_loss"] = f"{fmean(last):.5g}" if all(map(math.isfinite, last)) else "nan"
    row["accuracy"] = round(job.score(), 3)
    if stop.reason:
        row.update(status="diverged", note=stop.reason)
    elif not all(map(math.isfinite, losses[-1:])):  # on CUDA the last steps are not waited for
        row.update(status="diverged", note=f"loss {losses[-1]} at the end")
    elif row["accuracy"] < job.blind[0] and fmean(last) > job.blind[1]:
        row.update(status="chance", note="at chance, training loss as of a blind guess")


def load_task(name: str, root=None) -> TaskData:
    """The data of a task, drawn or read from `root` (None: $FASTRBN_DATA or a cache); raises DataError without it.

    The net that fine-tuning starts from is trained here, with nn.BatchNorm, batches of 32 and seed 0.
    """
    task = get_task(name)
    state = None
    if task.after:
        models = []
        run_cell(Cell("batchnorm", 32, data=ZOO, net=task.after), load_task(task.after, root), look=models.append)
        state = models[0].state_dict()
    return TaskData(*task.data(root), state)


@torch.no_grad()
def valid_accuracy(model, images, device="cpu") -> float:
    """The share of all validation images that `model` gets right in evaluation."""
    loader = BatchLoader(images.valid.x, images.valid.y, _VALID_BS, device=device, normalize=(images.mean, images.std))
    model.eval()
    right = [(model(xb).argmax(1) == yb).sum() for xb, yb in loader]
    return torch.stack(right).sum().item() / len(images.valid)


def _total_norm(tensors) -> float:
    return torch.stack([t.detach().double().square().sum() for t in tensors]).sum().sqrt().item()


def _norms(sizes, convs) -> dict:
    rms = sizes.values["rms"]
    columns = {name: sizes.names.index(full) for name, (full, _) in convs.items()}
    root = {name: weight.numel() ** 0.5 for name, (_, weight) in convs.items()}
    return {"step": sizes.steps} | {name: (rms[:, i] * root[name]).tolist() for name, i in columns.items()}


class _StopAtNonFinite(Callback):
    """Ends the fit once the loss is NaN or Inf: at once on the CPU; on CUDA every 50 steps a copy of the loss is sent
    to the host, and is looked at when it has come, so that no step waits. SGD does not recover from such a loss."""

    def begin_fit(self):
        self.reason, self._sent = "", None
        self._cuda = next(self.run.model.parameters()).device.type == "cuda"

    def after_loss(self):
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

    def _look(self, loss, step):
        if not math.isfinite(loss):
            self.reason = f"loss {loss} at step {step}"
            raise CancelTrainException(self.reason)
