"""Tasks that differ in what matters to a norm: net, order of norm and ReLU, optimiser, what a batch is made of.

    cell = Cell("default", 8, data=ZOO, net="dense-gain")      # data=ZOO: `net` names a task
    run_cell(cell, load_task("dense-gain"))

`benchmarks/zoo.py` runs them all. Each cell takes 5 to 60 s on one CPU thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from fastrbn.callbacks import combine_scheds, cos_1cycle_anneal, sched_lin

from . import task_data as data
from . import task_nets as nets

ZOO = "zoo"
"""A cell's `data` that makes its `net` the name of a task."""

OPTIMISERS = {
    "SGD": optim.SGD,
    "SGD with momentum 0.9": partial(optim.SGD, momentum=0.9),
    "Adam": optim.Adam,
    "AdamW with decay 0.05": partial(optim.AdamW, weight_decay=0.05),
}
SCHEDULES = {
    "falling on a line to a tenth": lambda lr: sched_lin(lr, lr / 10),
    "one cycle": lambda lr: combine_scheds([0.3, 0.7], cos_1cycle_anneal(lr / 10, lr, lr / 100)),
}
LINE, CYCLE = SCHEDULES


@dataclass(frozen=True)
class Goal:
    """What a task minimises, and the score in percent it is judged by.

    `blind(y)` is the score and the loss that a net is above and below once it has learnt something.
    """

    called: str
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    blind: Callable[[Tensor], tuple[float, float]]


def _accuracy(p, y):
    return 100 * (p.argmax(1) == y).float().mean()


def _overlap(p, y):
    found, there = p > 0, y > 0.5
    return 100 * (found & there).sum() / (found | there).sum().clamp_min(1)


def _explained(p, y):
    return (100 * (1 - F.mse_loss(p, y) / y.var(correction=0))).nan_to_num(-100).clamp_min(-100)


def _blind_class(y):
    c = int(y.max()) + 1
    return 200 / c, 0.9 * math.log(c)


def _blind_mask(y):
    share = y.mean().item()
    return 100 * share, -0.9 * (share * math.log(share) + (1 - share) * math.log(1 - share))


CLASSIFY = Goal("accuracy", F.cross_entropy, _accuracy, _blind_class)
SEGMENT = Goal("overlap (IoU)", F.binary_cross_entropy_with_logits, _overlap, _blind_mask)
REGRESS = Goal("explained variance", F.mse_loss, _explained, lambda y: (10.0, 0.9 * y.var().item()))
TELL_APART = Goal(
    "accuracy",
    F.binary_cross_entropy_with_logits,
    lambda p, y: 100 * ((p > 0) == (y > 0.5)).float().mean(),
    lambda y: (60.0, 0.9 * math.log(2)),
)


def _shuffled(y, bs, steps, g) -> Iterator[Tensor]:
    """Epochs of a random order; what is left over at an epoch's end is dropped."""
    order, at = torch.randperm(len(y), generator=g), 0
    for _ in range(steps):
        if at + bs > len(y):
            order, at = torch.randperm(len(y), generator=g), 0
        yield order[at : at + bs]
        at += bs


def _runs(y, bs, steps, g, length=1) -> Iterator[Tensor]:
    """Random samples of one class for `length` steps, then of another."""
    members = [torch.nonzero(y == c)[:, 0] for c in range(int(y.max()) + 1)]
    for step in range(steps):
        if step % length == 0:
            chosen = members[torch.randint(len(members), (), generator=g)]
        yield chosen[torch.randint(len(chosen), (bs,), generator=g)]


def _twice(y, bs, steps, g) -> Iterator[Tensor]:
    """Each sample twice in its batch (in an odd batch the last one once)."""
    for half in _shuffled(y, (bs + 1) // 2, steps, g):
        yield half.repeat_interleave(2)[:bs]


BATCHES = {
    "shuffled": _shuffled,
    "one class each": _runs,
    "runs of one class": partial(_runs, length=8),
    "each sample twice": _twice,
}
"""What a batch is made of: f(y, batch size, steps, generator) → indices of each batch."""


@dataclass(frozen=True)
class Task:
    """A training that is the same for every norm.

    - `data`: root → x, y, validation x, validation y. `net`: `norm(channels, dims)` → module. `goal`: see `Goal`.
    - `steps`: by batch size; between two of them that of the smaller.
    - `rate`, `cap`: the learning rate is `rate`·bs^`power`, at most `cap`. All were fixed before norms were compared.
    - `optimiser`, `schedule`, `batches`: names in `OPTIMISERS`, `SCHEDULES`, `BATCHES`.
    - `after`: the task whose net, trained with nn.BatchNorm, this one starts from; its last layer is new.
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

    def lr(self, bs: int) -> float:
        return min(self.rate * bs**self.power, self.cap)

    def n_steps(self, bs: int) -> int:
        return self.steps[max(b for b in self.steps if b <= bs)]

    def __str__(self):
        start = f"; starts from {self.after}, trained with nn.BatchNorm" if self.after else ""
        return (
            f"Learning rate {self.rate:g}·bs^{self.power:g}, at most {self.cap:g}, times the factor, {self.schedule}; "
            f"{self.optimiser}; batches {self.batches}{start}."
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
    "recurrent": Task(
        data.small_digits, nets.Recurrent, {1: 1500, 8: 1000, 32: 500, 256: 150}, rate=0.01, cap=0.5
    ),
    "two-passes": Task(
        data.real_and_fake,
        lambda norm: nets.TwoPasses(nets.conv_net(norm, [16, 32, 48], 1)),
        {1: 2000, 8: 1200, 32: 500, 256: 100},
        rate=0.02,
        cap=1.0,
        goal=TELL_APART,
    ),
}
"""The tasks by name."""


def task_of(data: str, net: str) -> Task | None:
    """The task of a cell with this `data` and `net`; None for a net on images, be they in a folder called zoo."""
    return TASKS.get(net) if data == ZOO else None


def get_task(name: str) -> Task:
    """The task of that name; ValueError for an unknown one."""
    if name not in TASKS:
        raise ValueError(f"a task is one of {', '.join(TASKS)}; got '{name}'")
    return TASKS[name]


@dataclass(frozen=True)
class TaskData:
    """What a task is trained on: tensors, and the trained state it starts from, if any."""

    x: Tensor
    y: Tensor
    valid_x: Tensor
    valid_y: Tensor
    state: dict | None = None


class Batches:
    """The batches of a task as a loader of `steps` pairs: a function of `seed` alone, whatever the norm."""

    def __init__(self, task: Task, data: TaskData, bs: int, seed: int, device="cpu"):
        if not 1 <= bs <= len(data.x):
            raise ValueError(f"a batch has 1 to {len(data.x)} samples here, the number of the task's; got {bs}")
        self.dataset = torch.utils.data.TensorDataset(data.x.to(device), data.y.to(device))
        self._indices = BATCHES[task.batches], data.y, bs, task.n_steps(bs), seed

    def __len__(self):
        return self._indices[3]

    def __iter__(self):
        order, y, bs, steps, seed = self._indices
        for i in order(y, bs, steps, torch.Generator().manual_seed(seed)):
            yield self.dataset[i.to(self.dataset.tensors[0].device)]


def build(task: Task, data: TaskData, norm, seed: int) -> nn.Module:
    """The net with `norm(channels, dims)` and its initial weights, which `seed` alone decides."""
    model = task.net(norm)
    nets.initialise(model, seed)
    if data.state is not None:
        _adopt(model, data.state)
    return model


def _adopt(model, state):
    """Load a state that was trained with nn.BatchNorm, all but the last layer's: what this model's norms have of it."""
    own = model.state_dict()
    head = list(nets.weights(model))[-1]
    state = {name: value for name, value in state.items() if not name.startswith(f"{head}.")}
    for name in list(state):
        if name.endswith("running_var"):
            state[name.replace("_var", "_std")] = (state[name] + 1e-5).sqrt()
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


@torch.no_grad()
def score_of(task: Task, data: TaskData, model: nn.Module, device="cpu") -> float:
    """The score in percent over the validation data, in evaluation."""
    model.eval()
    outputs = [model(x.to(device)) for x in data.valid_x.split(500)]
    return task.goal.score(torch.cat(outputs), data.valid_y.to(device)).item()
