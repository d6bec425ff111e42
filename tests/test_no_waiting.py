"""No step of a fit waits for the device: the whole loop on the pretended device of `pretend.py`, without a GPU."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pretend import CUDA, OnDevice, Pretend, Waits, move, on_device, pretended
from torch import optim

from fastrbn.callbacks import (
    EMA,
    AvgStatsCallback,
    CudaCallback,
    CutMix,
    GradientAccumulation,
    GradientClip,
    HaltOnNaN,
    MixedPrecision,
    MixUp,
    ParamMagnitudes,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    accuracy,
    sched_lin,
)
from fastrbn.callbacks.diagnose import meter
from fastrbn.callbacks.diagnose.nonfinite import halt
from fastrbn.callbacks.track import tape
from fastrbn.data import BatchLoader, Cutout, DataBunch, RandomCrop, RandomFlip
from fastrbn.learn import Callback, Learner, Runner
from fastrbn.models import conv_rbn, get_cnn_model
from fastrbn.norm import RECIPES, RunningBatchNorm

N = 20  # batches


@pytest.fixture(autouse=True)
def device(monkeypatch):
    for module, name in ((tape, "_CHUNK"), (meter, "ROWS"), (halt, "_FULL")):
        monkeypatch.setattr(module, name, 5)  # what they do once in many steps comes within N
    with pretended(monkeypatch):
        yield


class Watch(Callback):
    """Forbids waiting between the fourth and the last batch of each pass, loader included.

    The first three set things up, which takes a few copies from the host; at the last some callbacks read.
    """

    _order = 999

    def __init__(self, stop=math.inf):
        self.stop = stop

    def begin_fit(self):
        self.watched = 0

    def after_batch(self):
        Pretend.watching = 2 <= self.run.iter < min(self.run.iters - 2, self.stop)
        self.watched += Pretend.watching

    def after_cancel_epoch(self):
        Pretend.watching = False

    after_fit = after_cancel_epoch


class RateOnDevice(Callback):
    """As a captured step has it."""

    _order = -99

    def begin_fit(self):
        for group in self.run.opt.param_groups:
            group["lr"] = torch.tensor(group["lr"], device="cuda")


def make_learn(opt=optim.SGD, n=N, **settings):
    torch.manual_seed(0)
    x, y = torch.randint(0, 256, (4 * n, 3, 8, 8), dtype=torch.uint8), torch.randint(0, 3, (4 * n,))
    tfms = [RandomCrop(2), RandomFlip(), Cutout(3)]
    train = BatchLoader(x, y, 4, shuffle=True, seed=1, normalize=([0.5] * 3, [0.2] * 3), tfms=tfms)
    valid = BatchLoader(x[:40], y[:40], 4, normalize=(0.5, 0.2))
    data = DataBunch(train, valid, c=3, c_in=3)
    model = move(get_cnn_model(data, [4], conv_rbn))
    train.to("cuda"), valid.to("cuda")
    return Learner(model, opt(model.parameters(), lr=0.01, fused=True, **settings), F.cross_entropy, data)


def default_callbacks():
    """Those of the command line."""
    own = [Recorder(), AvgStatsCallback(accuracy), ProgressCallback(), ParamMagnitudes(), HaltOnNaN()]
    return [*own, ParamScheduler("lr", sched_lin(0.1, 0.01))]


@pytest.mark.parametrize(
    "opt, cbs",
    [
        (optim.SGD, lambda: [CudaCallback("cuda")]),
        (optim.AdamW, lambda: [MixedPrecision(), GradientClip(1.0), EMA(), MixUp(), CutMix()]),
        (optim.AdamW, lambda: [MixedPrecision("fp16", init_scale=2.0**10), GradientClip(1.0)]),
        (optim.Adam, lambda: [ParamMagnitudes(stats=("max", "rms", "update"), grads=True), GradientAccumulation(3)]),
        (partial(optim.SGD, momentum=0.9), lambda: [RateOnDevice()]),
    ],
    ids=["by default", "augmented in bf16", "fp16", "accumulated", "with its rate on the device"],
)
def test_no_step_with_the_callbacks_of_the_command_line_waits(opt, cbs):
    learn, watch = make_learn(opt), Watch()
    before = [p.detach().clone() for p in learn.model.parameters()]
    run = Runner([*default_callbacks(), *cbs(), watch])
    run.fit(1, learn)
    assert watch.watched == N - 4 + 6 and len(run.recorder.losses) == N and run.halt_on_nan.report is None
    assert all(isinstance(p, OnDevice) and p.device == CUDA for p in learn.model.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(learn.model.parameters(), before))


def test_a_bad_batch_is_found_late_without_waiting_for_it():
    learn, halt = make_learn(), HaltOnNaN()
    bad = on_device(torch.full((4, 3, 8, 8), math.nan))

    class Bad(Callback):
        def begin_batch(self):
            if self.run.n_iter == 9:
                self.run.xb = bad

        def after_cancel_train(self):
            self.run.last = self.run.n_iter

    run = Runner([halt, Bad, Watch(stop=11)])
    run.fit(1, learn)
    assert (halt.report.step, halt.report.where, halt.report.phase) == (9, "input", "forward")
    assert run.last > 9
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_images_transformed_one_by_one_do_not_wait():
    from torchvision.transforms import v2

    x, y = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8), torch.zeros(32)
    tfms = [v2.RandomHorizontalFlip(), v2.RandomCrop(8, padding=2), v2.ColorJitter(0.4), Cutout(2)]
    loader = BatchLoader(x, y, 8, shuffle=True, seed=1, normalize=(0.5, 0.2), tfms=tfms).to("cuda")
    batches = iter(loader)  # the order is copied to the device once
    next(batches)
    Pretend.watching = True
    assert [xb.device for xb, _ in batches] == [CUDA] * 3


ON_CUDA = [
    (name, b) for name, r in RECIPES.items() for b in ("reference", "fused") if b == "reference" or not r.plain_only
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("recipe", "backend"), ON_CUDA)
def test_no_training_step_of_the_layer_waits(recipe, backend, dtype):
    layer = move(RunningBatchNorm(3, recipe=recipe, backend=backend))
    x = on_device(torch.randn(4, 3, 5, 6, dtype=dtype)).requires_grad_()
    Pretend.watching = True
    for _ in range(3):
        layer(x).sum().backward()
        layer.eval()(x)
        layer.train()
    assert x.grad is not None


@pytest.mark.parametrize(
    "wait",
    [
        lambda run: run.loss.item(),
        lambda run: float(run.loss) if run.loss > 0 else 0,
        lambda run: run.pred.tolist(),
        lambda run: run.loss.cpu(),
        lambda run: run.loss.to("cpu"),
        lambda run: run.pred.detach().numpy(),
        lambda run: run.pred[run.pred > 0],
        lambda run: run.pred.nonzero(),
        lambda run: torch.tensor([1.0], device=run.xb.device),
        lambda run: torch.ones(3).to(run.xb.device),
        lambda run: run.pred.detach().copy_(torch.zeros(4, 3)),
    ],
)
def test_whatever_waits_is_caught(wait):
    class Waiting(Callback):
        def after_loss(self):
            if self.run.n_iter == 4:
                wait(self.run)

    with pytest.raises(Waits):
        Runner([Waiting, Watch()]).fit(1, make_learn(n=8))
