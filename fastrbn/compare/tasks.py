"""Tasks that differ in what matters to a norm: net, order of norm and ReLU, optimiser, composition of batches.

    cell = Cell("default", 8, data=ZOO, net="dense-gain")      # data=ZOO: `net` names a task
    run_cell(cell, load_task("dense-gain"))

`benchmarks/zoo.py` runs all of them. Each cell takes 5 to 60 s on one CPU thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from fastrbn.callbacks import IoU, combine_scheds, cos_1cycle_anneal, sched_lin
from fastrbn.data import RandomCrop, RandomFlip
from fastrbn.models import resnet9
from fastrbn.util import one_of

from . import task_data as data
from . import task_nets as nets

ZOO = "zoo"
"""With this as a cell's `data`, its `net` is the name of a task."""

OPTIMISERS: dict[str, Callable[..., optim.Optimizer]] = {
    "SGD": optim.SGD,
    "SGD with momentum 0.9": partial(optim.SGD, momentum=0.9),
    "Adam": optim.Adam,
    "AdamW with decay 0.05": partial(optim.AdamW, weight_decay=0.05),
}
SCHEDULES: dict[str, Callable[[float], Callable[[float], float]]] = {
    "falling on a line to a tenth": lambda lr: sched_lin(lr, lr / 10),
    "one cycle": lambda lr: combine_scheds([0.3, 0.7], cos_1cycle_anneal(lr / 10, lr, lr / 100)),
}
LINE, CYCLE = SCHEDULES


@dataclass(frozen=True)
class Goal:
    """What a task minimises, and the score in percent that judges it.

    `blind(y)` gives the score above which, and the loss below which, a net has learnt something.
    """

    called: str
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    blind: Callable[[Tensor], tuple[float, float]]


def _accuracy(p: Tensor, y: Tensor) -> Tensor:
    return 100 * (p.argmax(1) == y).float().mean()


def _overlap(p: Tensor, y: Tensor) -> Tensor:
    found, there = p > 0, y > 0.5
    return 100 * (found & there).sum() / (found | there).sum().clamp_min(1)


_BACKGROUND = 0.2  # weight of class 0 in the loss, which most pixels have


def _label_loss(p: Tensor, y: Tensor) -> Tensor:
    weight = p.new_ones(p.shape[1])
    weight[0] = _BACKGROUND
    return F.cross_entropy(p, y, weight)


def _mean_overlap(p: Tensor, y: Tensor) -> Tensor:
    overlap = IoU()
    overlap.update(p, y)
    return 100 * overlap.compute()


def _explained(p: Tensor, y: Tensor) -> Tensor:
    return (100 * (1 - F.mse_loss(p, y) / y.var(correction=0))).nan_to_num(-100).clamp_min(-100)


def _blind_class(y: Tensor) -> tuple[float, float]:
    c = int(y.max()) + 1
    return 200 / c, 0.9 * math.log(c)


def _blind_mask(y: Tensor) -> tuple[float, float]:
    share = y.mean().item()
    return 100 * share, -0.9 * (share * math.log(share) + (1 - share) * math.log(1 - share))


def _blind_pixels(y: Tensor) -> tuple[float, float]:
    count = y.flatten().bincount().float()
    score = 200 * count[0].item() / y.numel() / len(count)
    count[0] *= _BACKGROUND
    return score, 0.9 * torch.special.entr(count / count.sum()).sum().item()


CLASSIFY = Goal("accuracy", F.cross_entropy, _accuracy, _blind_class)
SEGMENT = Goal("overlap (IoU)", F.binary_cross_entropy_with_logits, _overlap, _blind_mask)
LABEL_PIXELS = Goal("overlap (mean IoU)", _label_loss, _mean_overlap, _blind_pixels)
REGRESS = Goal("explained variance", F.mse_loss, _explained, lambda y: (10.0, 0.9 * y.var().item()))
TELL_APART = Goal(
    "accuracy",
    F.binary_cross_entropy_with_logits,
    lambda p, y: 100 * ((p > 0) == (y > 0.5)).float().mean(),
    lambda y: (60.0, 0.9 * math.log(2)),
)


def _shuffled(y: Tensor, bs: int, steps: int, g: torch.Generator) -> Iterator[Tensor]:
    """Epochs in random order; the remainder of an epoch is dropped."""
    order, at = torch.randperm(len(y), generator=g), 0
    for _ in range(steps):
        if at + bs > len(y):
            order, at = torch.randperm(len(y), generator=g), 0
        yield order[at : at + bs]
        at += bs


def _runs(y: Tensor, bs: int, steps: int, g: torch.Generator, length: int = 1) -> Iterator[Tensor]:
    """Random samples of one class for `length` steps, then of another."""
    members = [torch.nonzero(y == c)[:, 0] for c in range(int(y.max()) + 1)]
    for step in range(steps):
        if step % length == 0:
            chosen = members[torch.randint(len(members), (), generator=g)]
        yield chosen[torch.randint(len(chosen), (bs,), generator=g)]


def _cut(pieces: Iterator[Tensor], bs: int, steps: int) -> Iterator[Tensor]:
    """Batches from an endless stream of samples that comes in pieces."""
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(left) < bs:
            left = torch.cat([left, next(pieces)])
        yield left[:bs]
        left = left[bs:]


def _short_runs(y: Tensor, bs: int, steps: int, g: torch.Generator, length: int = 16) -> Iterator[Tensor]:
    """A stream of random samples that keeps a class for `length` samples, whatever the batch size."""

    def pieces() -> Iterator[Tensor]:
        while True:
            yield from _runs(y, length, 1, g)

    return _cut(pieces(), bs, steps)


def _clips(y: Tensor, bs: int, steps: int, g: torch.Generator) -> Iterator[Tensor]:
    """Clips in random order, each with its frames in their order; for the data of `task_data.filmed`."""

    def pieces() -> Iterator[Tensor]:
        while True:
            yield from torch.arange(len(y)).view(-1, data.FRAMES)[torch.randperm(len(y) // data.FRAMES, generator=g)]

    return _cut(pieces(), bs, steps)


def _twice(y: Tensor, bs: int, steps: int, g: torch.Generator) -> Iterator[Tensor]:
    """Each sample twice in its batch (the last one once if the batch is odd)."""
    for half in _shuffled(y, (bs + 1) // 2, steps, g):
        yield half.repeat_interleave(2)[:bs]


BATCHES: dict[str, Callable[..., Iterator[Tensor]]] = {
    "shuffled": _shuffled,
    "one class each": _runs,
    "runs of one class": partial(_runs, length=8),
    "runs of 16 samples of one class": _short_runs,
    "clips frame by frame": _clips,
    "each sample twice": _twice,
}
"""How batches are made: f(y, batch size, steps, generator) yields the indices of each batch."""


@dataclass(frozen=True)
class Task:
    """A training that is the same for every norm.

    - `data`: function of the data root that returns x, y, validation x, validation y.
    - `net`: function of `norm(channels, dims)` that returns the model. `goal`: see `Goal`.
    - `steps`: number of steps by batch size; a batch size in between uses the next smaller one.
    - `rate`, `cap`: the learning rate is `rate`·bs^`power`, at most `cap`. All were fixed before norms were compared.
    - `optimiser`, `schedule`, `batches`: names in `OPTIMISERS`, `SCHEDULES`, `BATCHES`.
    - `after`: the task whose net, trained with nn.BatchNorm, this one starts from, with a new last layer.
    - `at_once`: the optimiser's batch size. The cell's batch size is then that of the norm alone: in training it sees
      the batch in groups of that size, one after the other. By default both are the cell's.
    - `augment`: crop (padding 4) and flip training images at random.
    """

    data: Callable[..., data.Tensors]
    net: Callable[..., nn.Module]
    steps: dict[int, int] = field(hash=False)
    rate: float
    cap: float
    goal: Goal = CLASSIFY
    power: float = 0.9
    optimiser: str = "SGD"
    schedule: str = LINE
    batches: str = "shuffled"
    after: str | None = None
    at_once: int | None = None
    augment: bool = False

    def lr(self, bs: int) -> float:
        """Learning rate at a batch size."""
        return min(self.rate * bs**self.power, self.cap)

    def n_steps(self, bs: int) -> int:
        """Number of steps at a batch size."""
        return self.steps[max(b for b in self.steps if b <= bs)]

    def __str__(self) -> str:
        start = f"; starts from {self.after}, trained with nn.BatchNorm" if self.after else ""
        rate = f"{self.rate:g}·bs^{self.power:g}, at most {self.cap:g}" if self.power else f"{self.rate:g}"
        size = f" of {self.at_once}" if self.at_once else ""
        return (
            f"Learning rate {rate}, times the factor, {self.schedule}; {self.optimiser}; "
            f"batches{size} {self.batches}{', augmented' if self.augment else ''}{start}."
        )


_DENSE = Task(
    data.shapes, nets.EncoderDecoder, {1: 1500, 2: 1200, 8: 500, 32: 200, 256: 60}, rate=0.05, cap=1.0, goal=SEGMENT
)
_MLP = Task(
    partial(data.small_digits, flat=True),
    partial(nets.mlp, ni=196, classes=10),
    {1: 3000, 8: 2000, 32: 1000, 256: 200},
    rate=0.02,
    cap=2.0,
)
_COURSE = Task(data.digits, nets.course, {1: 3000, 8: 1500, 32: 375, 256: 100}, rate=0.05, cap=2.0)
_NORM_FIRST = replace(_COURSE, net=partial(nets.course, relu_first=False))
_RESNET = Task(
    data.cifar,
    nets.resnet,
    {1: 2000, 8: 800, 32: 250, 256: 60},
    rate=0.005,
    cap=0.3,
    optimiser="SGD with momentum 0.9",
    schedule=CYCLE,
)

TASKS = {
    "dense": _DENSE,
    "dense-gain": replace(_DENSE, data=partial(data.shapes, gain=True)),
    "signals": Task(
        data.signals,
        partial(nets.conv_net, widths=[16, 32, 32, 48], classes=6, dims=1),
        {1: 3000, 8: 1500, 32: 700, 256: 150},
        rate=0.02,
        cap=1.0,
    ),
    "volumes": Task(
        data.volumes,
        partial(nets.conv_net, widths=[8, 16, 32], classes=5, dims=3, strides=[1, 2, 2]),
        {1: 2000, 8: 800, 32: 300, 256: 80},
        rate=0.05,
        cap=1.0,
    ),
    "mlp-sgd": _MLP,
    "mlp-adam": replace(_MLP, optimiser="Adam", rate=1e-3, power=0.5, cap=1e-2),
    "course": _COURSE,
    "course-norm-first": _NORM_FIRST,
    "course-one-class": replace(_COURSE, batches="one class each"),
    "course-runs": replace(_COURSE, batches="runs of one class"),
    "course-twice": replace(_COURSE, batches="each sample twice"),
    "resnet": _RESNET,
    "vgg": replace(
        _RESNET, net=nets.vgg, optimiser="AdamW with decay 0.05", rate=4e-4, power=0.5, cap=3e-3, schedule=CYCLE
    ),
    "regression": Task(
        data.table, nets.table_net, {1: 3000, 8: 2000, 32: 800, 256: 200}, rate=0.005, cap=0.2, goal=REGRESS
    ),
    "fine-tuning": replace(
        _NORM_FIRST,
        data=data.other_digits,
        steps={1: 1500, 8: 500, 32: 150, 256: 40},
        rate=0.01,
        cap=0.4,
        after="course-norm-first",
    ),
    "recurrent": Task(data.small_digits, nets.Recurrent, {1: 1500, 8: 1000, 32: 500, 256: 150}, rate=0.01, cap=0.5),
    "two-passes": Task(
        data.real_and_fake,
        lambda norm: nets.TwoPasses(nets.conv_net(norm, [16, 32, 48], 1)),
        {1: 2000, 8: 1200, 32: 500, 256: 100},
        rate=0.02,
        cap=1.0,
        goal=TELL_APART,
    ),
}
"""Tasks of `benchmarks/zoo.py` by name."""

_NORM_BATCH = replace(
    _RESNET,
    data=partial(data.cifar, n=20_000),
    net=nets.quick_resnet,
    steps={1: 160},
    rate=0.1,
    cap=math.inf,
    power=0,
    at_once=128,
)

_ORDER = replace(_COURSE, steps={1: 1200, 8: 500, 32: 200})
_ORDER_FULL = replace(
    _COURSE, data=partial(data.digits, n=50_000, n_valid=10_000), steps={1: 12_000, 8: 6000, 32: 3000}
)
_MLP_ORDER = replace(_MLP, batches="one class each")
_ORDERS = {"shuffled": "shuffled", "one-class": "one class each", "runs": "runs of 16 samples of one class"}
_FILMED = {"order-video": (_ORDER, 2000), "order-video-full": (_ORDER_FULL, 12_000)}

_LARGE_BATCH = replace(
    _RESNET,
    data=partial(data.cifar, n=50_000, n_valid=10_000),
    net=nets.quick_resnet,
    steps={1: 110, 1024: 55},
    optimiser="AdamW with decay 0.05",
    rate=0.02,
    cap=math.inf,
    power=0,
)

_ANIMALS = replace(
    _RESNET,
    data=partial(data.cifar, n=12_000, classes=data.ANIMALS),
    net=nets.quick_resnet,
    steps={1: 750},
    rate=0.0013,  # as in norm-batch, 0.1 at a batch size of 128
)
_VEHICLES = replace(
    _ANIMALS,
    data=partial(data.cifar, n=500, classes=data.VEHICLES),
    steps={1: 800, 2: 600, 4: 400, 32: 80},
    rate=0.003,
    after="animals",
)
_WIDE = partial(nets.resnet, width=48)
_LONG = {1: 10_000, 4: 5000, 32: 1500}
_CANVASES = Task(
    data.canvases,
    partial(nets.EncoderDecoder, width=16, outputs=11),
    {1: 1500, 2: 1100, 8: 350},
    rate=1e-2,
    cap=3e-2,
    goal=LABEL_PIXELS,
    power=0.5,
    optimiser="Adam",
    schedule=CYCLE,
)
_INPAINTING = replace(
    _CANVASES,
    data=data.inpainting,
    net=nets.inpainter,
    steps={1: 500, 2: 400, 8: 120},
    rate=3e-3,
    cap=1e-2,
    goal=REGRESS,
)

_DIGITS_FULL = replace(_NORM_FIRST, data=partial(data.digits, n=50_000, n_valid=10_000), steps={1: 5000})
_DRIFTING = replace(TASKS["vgg"], data=partial(data.cifar, n_valid=4000), steps={1: 500})

STUDY_TASKS = {
    "norm-batch": _NORM_BATCH,
    "animals": _ANIMALS,
    "animals-full": replace(
        _ANIMALS,
        data=partial(data.cifar, n=30_000, n_valid=6000, classes=data.ANIMALS),
        net=_WIDE,
        steps={1: 20_000},
        rate=_RESNET.rate,
        augment=True,
    ),
    "fine-tuning-cifar": _VEHICLES,
    "fine-tuning-cifar-full": replace(
        _VEHICLES,
        data=partial(data.cifar, n=5000, n_valid=4000, classes=data.VEHICLES),
        net=_WIDE,
        steps=_LONG,
        rate=_RESNET.rate / 3,
        after="animals-full",
    ),
    "digits-full": _DIGITS_FULL,
    "fine-tuning-digits": replace(TASKS["fine-tuning"], rate=0.03),
    "fine-tuning-digits-full": replace(
        TASKS["fine-tuning"],
        data=partial(data.other_digits, n=10_000, n_valid=10_000),
        steps=_LONG,
        after="digits-full",
    ),
    "norm-batch-full": replace(
        _NORM_BATCH,
        data=partial(data.cifar, n=50_000, n_valid=10_000),
        net=partial(nets.resnet, width=48),
        steps={1: 5860},
        augment=True,
    ),
    **{f"order-{name}": replace(_ORDER, batches=batches) for name, batches in _ORDERS.items()},
    **{f"order-{name}-full": replace(_ORDER_FULL, batches=batches) for name, batches in _ORDERS.items()},
    **{
        name: replace(task, data=partial(data.filmed, n=clips), batches="clips frame by frame")
        for name, (task, clips) in _FILMED.items()
    },
    "order-one-class-mlp": replace(_MLP_ORDER, steps={1: 1000, 8: 500, 32: 250}),
    "order-one-class-mlp-full": replace(_MLP_ORDER, steps={1: 12_000, 8: 8000, 32: 4000}),
    "large-batch": _LARGE_BATCH,
    "large-batch-full": replace(
        _LARGE_BATCH,
        net=lambda norm: resnet9(norm=norm),
        steps={1: 2910, 1024: 1440},
        optimiser="SGD with momentum 0.9",
        rate=0.3,
        augment=True,
    ),
    "canvases": _CANVASES,
    "canvases-full": replace(
        _CANVASES,
        data=partial(data.canvases, n=8000, n_valid=1000, cells=3, cell=24),
        net=partial(nets.EncoderDecoder, width=32, levels=4, outputs=11),
        steps={1: 20_000, 2: 20_000, 8: 10_000},
    ),
    "inpainting": _INPAINTING,
    "inpainting-full": replace(
        _INPAINTING,
        data=partial(data.inpainting, n=50_000, n_valid=10_000),
        net=partial(nets.inpainter, width=32, levels=4),
        steps={1: 20_000, 2: 20_000, 8: 10_000},
    ),
    "drift-digits": _NORM_FIRST,
    "drift-digits-full": _DIGITS_FULL,
    "drift-objects": _DRIFTING,
    "drift-objects-full": replace(_DRIFTING, data=partial(data.cifar, n=50_000, n_valid=10_000), steps={1: 20_000}),
}
"""Tasks of `STUDIES` and of `benchmarks/drift.py` by name. Those that end in -full are for a GPU."""


def task_of(data: str, net: str) -> Task | None:
    """The task of a cell with this `data` and `net`; None for a net on images, even from a folder called zoo."""
    return (TASKS.get(net) or STUDY_TASKS.get(net)) if data == ZOO else None


def get_task(name: str) -> Task:
    """Get a task by name.

    Parameters
    ----------
    name : str
        One of `TASKS` or `STUDY_TASKS`.

    Returns
    -------
    Task

    Raises
    ------
    ValueError
        If there is no such task.

    Examples
    --------
    >>> get_task("mlp-adam").lr(bs=4)
    0.002
    """
    known = {**TASKS, **STUDY_TASKS}
    return known[one_of("a task", name, known)]


@dataclass(frozen=True)
class TaskData:
    """Tensors that a task is trained on, and the trained state it starts from, if any."""

    x: Tensor
    y: Tensor
    valid_x: Tensor
    valid_y: Tensor
    state: dict[str, Tensor] | None = None


class Batches:
    """A loader with the batches of a task: `steps` pairs that depend on `seed` only, not on the norm."""

    def __init__(self, task: Task, data: TaskData, bs: int, seed: int, device: str = "cpu") -> None:
        if not 1 <= bs <= len(data.x):
            raise ValueError(f"the batch size must be 1 to {len(data.x)}, the number of the task's samples; got {bs}")
        self.dataset = torch.utils.data.TensorDataset(data.x.to(device), data.y.to(device))
        self._tfms = (RandomCrop(4), RandomFlip()) if task.augment else ()
        self._indices = BATCHES[task.batches], data.y, task.at_once or bs, task.n_steps(bs), seed

    def inputs(self, n: int) -> Tensor:
        """At most `n` random training inputs."""
        x, y = self.dataset.tensors
        i = torch.randperm(len(y), generator=torch.Generator().manual_seed(self._indices[4]))[:n]
        return x[i.to(x.device)]

    def __len__(self) -> int:
        return self._indices[3]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order, y, bs, steps, seed = self._indices
        g = torch.Generator(self.dataset.tensors[0].device).manual_seed(seed)  # for the transforms
        for i in order(y, bs, steps, torch.Generator().manual_seed(seed)):
            xb, yb = self.dataset[i.to(g.device)]
            for tfm in self._tfms:
                xb = tfm(xb, g)
            yield xb, yb


class InGroups(nn.Module):
    """Apply `norm` in training to groups of `size` samples, one after the other, as gradient accumulation does.

    The forward pass equals that over micro-batches of `size`. In the backward pass autograd visits the groups of a
    layer in reverse order, which only matters to norms whose gradient has a memory.
    """

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.norm, self.size, self.activates = norm, size, getattr(norm, "activates", False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.size:
            return self.norm(x)
        return torch.cat([self.norm(part) for part in x.split(self.size)])


def in_groups(make: Callable[..., nn.Module | None], size: int) -> Callable[..., nn.Module | None]:
    """`make` with each norm it returns in `InGroups`."""

    def grouped(nf: int, dims: int = 2) -> nn.Module | None:
        made = make(nf, dims)
        return None if made is None else InGroups(made, size)

    return grouped


def build(task: Task, data: TaskData, norm: Callable[..., nn.Module | None], seed: int) -> nn.Module:
    """The net with `norm(channels, dims)`; its initial weights depend on `seed` only."""
    model = task.net(norm)
    nets.initialise(model, seed)
    if data.state is not None:
        _adopt(model, data.state)
    return model


def _adopt(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what fits of a state trained with nn.BatchNorm, except the last layer."""
    own = model.state_dict()
    head = list(nets.weights(model))[-1]
    state = {name: value for name, value in state.items() if not name.startswith(f"{head}.")}
    for name in list(state):
        if name.endswith("running_var"):
            state[name.replace("_var", "_std")] = (state[name] + 1e-5).sqrt()
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


@torch.no_grad()
def score_of(task: Task, data: TaskData, model: nn.Module, device: str = "cpu") -> float:
    """Score in percent over the validation data, in evaluation mode."""
    model.eval()
    outputs = [model(x.to(device)) for x in data.valid_x.split(500)]
    return task.goal.score(torch.cat(outputs), data.valid_y.to(device)).item()
