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

from .._version import __version__
from ..callbacks import ParamMagnitudes, ParamScheduler, Recorder, sched_lin
from ..data import BatchLoader, DataBunch, RandomCrop, RandomFlip, load_dataset
from ..learn import Callback, CancelTrainException, Learner, Runner
from ..models import conv_layer, get_cnn_model, init_cnn, resnet9
from .norms import describe, get_norm, prepare_model

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
    def lr(self) -> float:
        """The rule's learning rate for this net and batch size, times `lr_factor`."""
        rate, cap = LR_RULES[self.net]
        return self.lr_factor * min(rate * self.bs**0.9, cap)

    def __str__(self):
        factor = "" if self.lr_factor == 1 else f" lr×{self.lr_factor:g}"
        return f"{self.data} {self.net} {self.norm} bs {self.bs}{factor} seed {self.seed}"


KEY = (
    "data",
    "net",
    "norm",
    "settings",
    "bs",
    "lr_factor",
    "seed",
    "n_train",
    "epochs",
    "augment",
    "device",
    "version",
)
"""The columns that tell one cell from another."""


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
    """Eight digits that change with the code a result depends on: norms, nets, this file. Not part of a cell's key."""
    here = Path(__file__).parent
    files = [*sorted((here.parent / "norm").glob("*.[pc]*")), *(here.parent / f"{name}.py" for name in ("peers", "weights", "models"))]
    digest = hashlib.sha1(usedforsecurity=False)
    for file in [*files, Path(__file__)]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def load_images(name: str, root=None):
    """The `ImageData` of that name or folder: `load_dataset`, which also knows and caches the folder `<name>-jpeg`."""
    return load_dataset(name, root)


def run_cell(
    cell: Cell, images, device="cpu", norms_every: int | None = None, look: Callable[[nn.Module], None] | None = None
) -> tuple[dict, dict | None]:
    """Train `cell` on `images` (an `ImageData`) and measure.

    Returns a row of results (`accuracy` in percent over all validation images, None where the norm refuses the batch;
    `train_loss`, the mean over the last tenth of the steps; `status`; `note`; `seconds` of training; …) and, with
    `norms_every`, the norms of the convolutions' weights every so many steps: `{"step": […], "<name>": […]}`.

    `status` is "trained"; "diverged" when the loss became NaN or Inf, and training ended there; "chance" when the net
    knows nothing at the end, whether it never learnt or collapsed: accuracy below twice chance, and training loss above
    0.9 ln(classes), so that a norm which trains and then evaluates badly is not among them; "refused" when the norm
    raises at this batch size, as nn.BatchNorm does at one value a channel.

    `look` is called with the trained net, once all is measured.
    """
    data, steps = _loaders(cell, images, device)
    model = _model(cell, data, steps).to(device)
    convs = _conv_weights(model)
    start = _total_norm(p for _, p in convs.values())
    recorder, stop, sizes = Recorder(), _StopAtNonFinite(), ParamMagnitudes(every=norms_every or 1, stats="rms")
    cbs = [recorder, ParamScheduler("lr", sched_lin(cell.lr, cell.lr / 10)), stop, *([sizes] if norms_every else [])]
    run, learn = Runner(cbs), Learner(model, optim.SGD(model.parameters(), lr=cell.lr), F.cross_entropy, data)
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
        _measure(row, cell, model, images, losses, stop, device)
    row |= {"weight_norm_start": f"{start:.4g}", "weight_norm_end": f"{_total_norm(p for _, p in convs.values()):.4g}"}
    if look is not None:
        look(model)
    return row, _norms(sizes, convs) if norms_every else None


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


def _conv_weights(model) -> dict[str, tuple[str, nn.Parameter]]:
    """For each convolution the full name and the value of its weight's parameter, also where the norm computes the
    weight from it."""
    found = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            own = dict(conv.named_parameters())
            key = "weight" if "weight" in own else "parametrizations.weight.original"
            found[name] = f"{name}.{key}", own[key]
    return found


def _measure(row, cell, model, images, losses, stop, device):
    last = losses[-max(1, len(losses) // 10) :]
    row["train_loss"] = f"{fmean(last):.5g}" if all(map(math.isfinite, last)) else "nan"
    row["accuracy"] = round(100 * valid_accuracy(model, images, device), 3)
    if stop.reason:
        row.update(status="diverged", note=stop.reason)
    elif not all(map(math.isfinite, losses[-1:])):  # on CUDA the last steps are not waited for
        row.update(status="diverged", note=f"loss {losses[-1]} at the end")
    elif row["accuracy"] < _AT_CHANCE[0] * 100 / images.c and fmean(last) > _AT_CHANCE[1] * math.log(images.c):
        row.update(status="chance", note="at chance, training loss as of a blind guess")


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
