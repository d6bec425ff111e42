"""What two gloo processes check together; `test_distributed.py` starts them and reports each check as a test.

Each rank runs every function of CHECKS in the same order; the fits of one process, which they compare with, are made in
each by itself. Run as `python -m callbacks.distributed.ranks FOLDER WORLD CHECKS` with MASTER_ADDR and MASTER_PORT in
the environment and tests/ on the path; writes FOLDER/RANK.json.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # the optimisers import it
import torch.distributed as dist
from processes import fork_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastrbn.callbacks import (
    F1,
    AvgStatsCallback,
    Checkpoint,
    ConfusionMatrix,
    CSVLogger,
    Distributed,
    EarlyStopping,
    EpochMetric,
    GradientAccumulation,
    GradientClip,
    HaltOnNaN,
    LR_Find,
    MixedPrecision,
    ParamMagnitudes,
    ProgressCallback,
    Recorder,
    TopK,
    Warmup,
    accuracy,
)
from fastrbn.data import BatchLoader, RandomFlip, overfit
from fastrbn.learn import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    Learner,
    Runner,
    checkpoint_file,
)
from fastrbn.norm import RunningBatchNorm

RANK, WORLD, FOLDER = 0, 1, Path()
CHECKS, BROKEN = [], []
TIMEOUT = 120  # seconds; a rank that waits as long as that has been left alone


def check(f):
    CHECKS.append(f)
    return f


def tensors(n, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 4, 4, generator=g, dtype=torch.float64)
    return x.to(dtype), (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 1).long()


def net(norm=RunningBatchNorm, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), norm(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)).to(dtype)


def loaders(bs, n=45, valid=21, dtype=torch.float64, **kwargs):
    x, y = tensors(n + valid, dtype)
    train = BatchLoader(x[:n], y[:n], bs, shuffle=True, seed=3, **kwargs)
    return SimpleNamespace(train_dl=train, valid_dl=BatchLoader(x[n:], y[n:], 2 * bs) if valid else None)


def learner(data, model=None, lr=0.1):
    model = net() if model is None else model
    opt = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    return Learner(model, opt, nn.functional.cross_entropy, data)


def runner(*cbs, together=True):
    run = Runner([Recorder(), AvgStatsCallback(accuracy), *cbs, *([Distributed(timeout=TIMEOUT)] if together else [])])
    run.logger = lambda line: None
    return run


def fit(learn, *cbs, epochs=3, **kwargs):
    run = runner(*cbs, **kwargs)
    run.fit(epochs, learn)
    return run


def assert_close(a, b, tol=1e-12, skip=()):
    assert a.keys() == b.keys()
    for name in a:
        if not any(name.endswith(s) for s in skip):
            off = (a[name].double() - b[name].double()).abs().max().item()
            assert off <= tol, f"{name} is off by {off}"


def assert_same_on_ranks(model):
    """Compared outside of the fit, over files: there is no group any more."""
    mine = [t.detach().clone() for t in model.state_dict().values()]
    for theirs in everyone(mine):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), "the ranks' models differ"


def everyone(value):
    """The value of each rank."""
    everyone.calls += 1
    store = everyone.store
    torch.save(value, FOLDER / f"value-{everyone.calls}-{RANK}.pt")
    store.set(f"{everyone.calls}-{RANK}", "there")
    store.wait([f"{everyone.calls}-{r}" for r in range(WORLD)])
    return [torch.load(FOLDER / f"value-{everyone.calls}-{r}.pt", weights_only=False) for r in range(WORLD)]


everyone.calls = 0


def assert_history(a, b, tol=1e-7):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for name in x:
            if name not in ("time", "lr"):
                assert abs(x[name] - y[name]) <= tol, (name, x, y)


def assert_raises(kind, text, call):
    try:
        call()
    except kind as e:
        assert text in str(e), f"{text!r} is not in {str(e)!r}"
        return e
    raise AssertionError(f"no {kind.__name__}")


class Does(Callback):
    """Calls `what()` at `event` on rank `rank` (None: all) in epoch 1, batch 2."""

    def __init__(self, event, what, rank=1, batch=2, order=0):
        self.what, self.rank, self.batch, self._order = what, rank, batch, order
        vars(self)[event] = self._do

    def _do(self):
        run = self.run
        here = run.in_train and run.epoch == 1 and run.iter == self.batch or self.batch is None and run.epoch == 1
        if here and self.rank in (None, RANK):
            self.what()


def raises(error):
    def raise_it(*args):
        raise error

    return raise_it


class Events(Callback):
    """Notes the losses' number of each epoch, and the cancels."""

    def begin_fit(self):
        self.seen = []

    def after_cancel_batch(self):
        self.seen.append(("batch", self.run.epoch, self.run.iter))

    def after_cancel_epoch(self):
        self.seen.append(("epoch", self.run.epoch, self.run.iter))

    def after_cancel_train(self):
        self.seen.append(("train", self.run.epoch, self.run.iter))


# The same as one process


@check
def two_ranks_are_one_process_with_twice_the_batch_statistics_and_averages_included():
    alone = learner(loaders(8))
    want = fit(alone, together=False)
    ours = learner(loaders(4), net(seed=RANK))  # rank 0's weights count
    if RANK == 0:
        ours.model.load_state_dict(net().state_dict())
    begun = []

    class Begins(Callback):
        def begin_fit(self):
            begun.append(self.run.model[0].weight.detach().clone())

    got = fit(ours, Begins())
    assert torch.equal(*everyone(begun[0])), "callbacks must see rank 0's weights from the beginning"
    assert_close(ours.model.state_dict(), alone.model.state_dict())
    assert_history(got.avg_stats.history, want.avg_stats.history)
    assert_same_on_ranks(ours.model)
    assert (got.distributed.rank, got.distributed.world) == (RANK, WORLD)


@check
def metrics_that_accumulate_are_those_of_all_samples():
    def metrics():
        return [F1(), TopK(2), ConfusionMatrix(), EpochMetric(lambda pred, yb: pred.std())]

    def stats(bs, together, valid):
        run = Runner([AvgStatsCallback(metrics()), *([Distributed(timeout=TIMEOUT)] if together else [])])
        run.logger = lambda line: None
        run.fit(1, learner(loaders(bs, valid=valid)))
        return run.avg_stats

    for valid in (21, 3):  # of 3 samples, rank 1 validates none
        alone, ours = stats(8, False, valid), stats(4, True, valid)
        assert_history(ours.history, alone.history, 1e-12)
        for a, b in ((ours.train_stats, alone.train_stats), (ours.valid_stats, alone.valid_stats)):
            assert torch.equal(a.values["confusion_matrix"], b.values["confusion_matrix"])
            assert a.objects["confusion_matrix"].compute().sum() == a.count == b.count


@check
def clipping_and_accumulating_over_a_short_last_batch_stay_the_same_too():
    cbs = (partial(GradientAccumulation, 2), partial(GradientClip, 0.5))
    alone, ours = learner(loaders(8)), learner(loaders(4))
    fit(alone, *(cb() for cb in cbs), together=False)
    fit(ours, *(cb() for cb in cbs))
    assert_close(ours.model.state_dict(), alone.model.state_dict())


@check
def half_precision_magnitudes_and_the_nan_watch_go_with_it():
    ours = learner(loaders(4, dtype=torch.float32), net(dtype=torch.float32))
    run = fit(ours, MixedPrecision("bf16"), ParamMagnitudes(), HaltOnNaN())
    assert run.stop_reason is None
    assert run.param_magnitudes.names == [name for name, _ in ours.model.named_parameters()]
    assert_same_on_ranks(ours.model)


# Gradients of several batches


class Unsized:
    """A loader whose length nobody knows."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def batches(bs, unsized=False, n=48):
    """The same samples in each epoch; `bs` is that of one process."""
    x, y = tensors(n)
    made = list(zip(x.split(bs), y.split(bs)))
    return SimpleNamespace(train_dl=Unsized(made) if unsized else made, valid_dl=made[:2])


def gradient_sums(call, size):
    """How many tensors of `size` elements the ranks sum during the call."""
    sizes, real = [], dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        call()
    finally:
        dist.all_reduce = real
    return sizes.count(size)


@check
def batches_that_only_add_to_the_gradients_exchange_none():
    model = net()
    size = sum(p.numel() for p in model.parameters())
    for unsized, cbs, expected in (
        (False, [], 2 * 6),
        (False, [GradientAccumulation(3)], 2 * 2),
        (True, [GradientAccumulation(4)], 2 * 2),  # 4 and 2 batches
        (False, [GradientAccumulation(99)], 2 * 1),
    ):
        learn = learner(batches(4, unsized), net())
        found = gradient_sums(lambda learn=learn, cbs=cbs: fit(learn, *cbs, epochs=2), size)
        assert found == expected, (cbs, found)
        assert_same_on_ranks(learn.model)


@check
def an_epoch_may_end_within_a_group():
    for unsized, n in ((False, 4), (True, 4), (True, 5), (False, 99)):
        alone, ours = learner(batches(8, unsized)), learner(batches(4, unsized))
        fit(alone, GradientAccumulation(n), together=False, epochs=2)
        fit(ours, GradientAccumulation(n), epochs=2)
        assert_close(ours.model.state_dict(), alone.model.state_dict())
        assert_same_on_ranks(ours.model)


@check
def an_epoch_that_is_cut_within_a_group_steps_with_what_all_ranks_have():
    alone, ours = learner(batches(8)), learner(batches(4))
    fit(alone, GradientAccumulation(4), Does("begin_batch", raises(CancelEpochException()), rank=None), together=False)
    run = fit(ours, GradientAccumulation(4), Does("begin_batch", raises(CancelEpochException()), rank=1))
    assert_close(ours.model.state_dict(), alone.model.state_dict())
    assert_same_on_ranks(ours.model)
    assert run.samples is None and run.accumulating is False and run.apart is False


@check
def a_group_may_end_with_the_shortest_loader():
    for unsized in (False, True):
        for length in (5, 8):
            data = batches(4, n=40)  # 10 batches: the ranks have 5 and 6 of them, 8 and 9
            made = data.train_dl[: length + RANK]
            data = SimpleNamespace(train_dl=Unsized(made) if unsized else made, valid_dl=None)
            learn, run = learner(data), runner(GradientAccumulation(4), together=False)
            run.add_cbs([Distributed(timeout=TIMEOUT, shard=False)])
            run.fit(2, learn)
            assert len(run.recorder.losses) == 2 * length
            assert_same_on_ranks(learn.model)


@check
def gradients_that_wait_over_a_cancelled_step_are_counted_once():
    class Skips(Callback):
        _order = 20

        def after_backward(self):
            if self.run.epoch == 0:
                raise CancelBatchException

    for n in (3, 99):  # the next exchange is in a backward pass, and after the last
        alone, ours = learner(batches(8)), learner(batches(4))
        fit(alone, GradientAccumulation(n), Skips(), together=False)
        fit(ours, GradientAccumulation(n), Skips())
        assert_close(ours.model.state_dict(), alone.model.state_dict())


class Switches(nn.Module):
    """Uses `a` or `b`, as it is told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(3))
        self.use = "a"

    def forward(self, x):
        return self.c(getattr(self, self.use)(x.mean((2, 3))))


@check
def parameters_that_only_some_batches_or_ranks_use_are_exchanged_too():
    class Chooses(Callback):
        def __init__(self, use):
            self.use = use

        def begin_batch(self):
            run = self.run
            run.learn.model.use = "a" if self.use is None else self.use[run.iter if run.in_train else 0]

    for uses in (("abababab", "aaaaaaaa"), ("aaaaaaba", "aaaaaaaa"), ("baaabaaa", "baaabaaa")):
        model = Switches()
        learn = learner(batches(4), model)
        run = runner(Chooses(uses[RANK]), GradientAccumulation(4), together=False)
        run.add_cbs([Distributed(timeout=TIMEOUT, find_unused_parameters=True)])
        run.fit(1, learn)
        assert_same_on_ranks(model)
        other = Switches()
        opt = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
        for i, (xb, yb) in enumerate(batches(4).train_dl):
            other.use = uses[i % 2][i // 2]
            nn.functional.cross_entropy(other(xb), yb).div(8 if i < 8 else 4).backward()
            if i in (7, 11):
                opt.step()
                opt.zero_grad()
        assert_close(model.state_dict(), other.state_dict())


@check
def checkpoints_within_a_group_wait_for_its_end():
    data = partial(batches, 4)
    folder, whole = FOLDER / "group", learner(data())
    run = fit(whole, GradientAccumulation(4), Checkpoint(folder, every=3, keep=None), epochs=2)
    if RANK == 0:
        found = [p.stem.rpartition("-")[2] for p in sorted(folder.iterdir())]
        assert found == ["4", "6", "10", "12", "12"], found
    everyone(None)
    for number in (1, 2, 3):
        again, copy = learner(data(), net(seed=5)), FOLDER / f"group-{number}"
        (file,) = folder.glob(f"checkpoint-000{number}-*")
        again_run = runner(GradientAccumulation(4), Checkpoint(copy, every=3))
        again_run.fit(2, again, resume=file)
        assert_close(again.model.state_dict(), whole.model.state_dict(), 0.0)
        assert again_run.recorder.losses[-2:] == run.recorder.losses[-2:]


@check
def ctrl_c_within_a_group_saves_after_its_end():
    for unsized, rank in ((False, 0), (True, 1)):
        folder = FOLDER / f"interrupted-group-{rank}"
        whole, learn = (learner(batches(4, unsized)) for _ in range(2))
        fit(whole, GradientAccumulation(5))
        stops = Does("after_pred", partial(signal.raise_signal, signal.SIGINT), rank=rank, batch=3)
        run = fit(learn, GradientAccumulation(5), Checkpoint(folder), stops)
        assert run.stop_reason.startswith("interrupted (Ctrl-C)"), run.stop_reason
        again = learner(batches(4, unsized))
        run = runner(GradientAccumulation(5), Checkpoint(folder))
        run.fit(3, again, resume=folder)
        assert run.resumed_from.name == "checkpoint-0002-step-11.pt", run.resumed_from
        assert_close(again.model.state_dict(), whole.model.state_dict(), 0.0)


def torch_loaders(bs, n, generator):
    x, y = tensors(n + 21)
    g = torch.Generator().manual_seed(5) if generator else None
    train = DataLoader(TensorDataset(x[:n], y[:n]), bs, shuffle=True, generator=g)
    return SimpleNamespace(train_dl=train, valid_dl=DataLoader(TensorDataset(x[n:], y[n:]), bs))


@check
def torchs_dataloaders_are_cut_like_batchloaders():
    for n in (45, 48, 40):
        alone, ours = (learner(torch_loaders(bs, n, generator=True)) for bs in (8, 4))
        want, got = fit(alone, together=False, epochs=2), fit(ours, epochs=2)
        assert_close(ours.model.state_dict(), alone.model.state_dict())
        assert_history(got.avg_stats.history, want.avg_stats.history)


@check
def an_order_from_the_global_generator_is_the_same_on_all_ranks_and_each_sample_comes_once():
    seen = []

    class Sees(Callback):
        def begin_batch(self):
            if self.run.in_train:
                seen.append((self.run.epoch, self.run.xb[:, 0, 0, 0].clone()))

    torch.manual_seed(RANK)
    fit(learner(torch_loaders(4, 44, generator=False)), Sees(), epochs=2)
    x = tensors(44 + 21)[0][:44, 0, 0, 0]
    orders = []
    for epoch in range(2):
        parts = everyone(torch.cat([rows for e, rows in seen if e == epoch]))
        orders.append(torch.cat(parts))
        assert torch.equal(orders[-1].sort().values, x.sort().values)
    assert not torch.equal(*orders)


@check
def batches_in_a_list_are_dealt_out():
    x, y = tensors(32)
    batches = list(zip(x.split(4), y.split(4)))
    joined = list(zip(x.split(8), y.split(8)))
    alone, ours = (learner(SimpleNamespace(train_dl=b, valid_dl=b[:3])) for b in (joined, batches))
    fit(alone, together=False)
    fit(ours)
    assert_close(ours.model.state_dict(), alone.model.state_dict())


@check
def overfitting_one_batch_trains_on_that_of_each_rank():
    x, y = tensors(9)
    mine = slice(4) if RANK == 0 else slice(4, 9)
    alone, ours = (learner(overfit(SimpleNamespace(train_dl=[(x[rows], y[rows])] * 3))) for rows in (slice(None), mine))
    want, got = fit(alone, together=False), fit(ours)
    assert_close(ours.model.state_dict(), alone.model.state_dict())
    assert_history(got.avg_stats.history, want.avg_stats.history)


@check
def samples_that_are_fewer_than_the_ranks_are_left_out_with_a_word():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = fit(learner(loaders(4, n=41)), epochs=1)
    assert len(run.recorder.losses) == 5
    assert any("last 1 samples of each epoch are not trained on" in str(w.message) for w in told) == (RANK == 0)


@check
def transforms_and_dropout_draw_other_numbers_on_each_rank():
    drawn = []

    class Draws(Callback):
        def after_step(self):
            drawn.append([torch.rand(1).item(), random.random()])

    torch.manual_seed(0)
    random.seed(0)
    fit(learner(loaders(4, tfms=[RandomFlip()])), Draws(), epochs=1)
    a, b = everyone(drawn)
    assert all(p != q and p[0] != q[0] and p[1] != q[1] for p, q in zip(a, b))


@check
def without_synced_norms_each_rank_has_its_own_and_validation_is_rank_0s():
    ours = learner(loaders(4))
    run = runner(together=False)
    run.add_cbs([Distributed(timeout=TIMEOUT, sync_norm=False)])
    run.fit(1, ours)
    means = everyone(ours.model[1].running_mean)
    assert torch.equal(*means), "rank 0's are taken over before validation"
    assert run.avg_stats.history[0]["valid_loss"] > 0


@check
def a_plain_batch_norm_is_warned_of_on_rank_0():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(learner(loaders(4), net(nn.BatchNorm2d)), epochs=1)
    found = [str(w.message) for w in told if "nn.BatchNorm normalises by each process's own samples" in str(w.message)]
    assert len(found) == (RANK == 0) and all("('1' and 1 more)" in text for text in found)


# What is left when it is over


@check
def the_model_the_data_and_the_layers_are_as_before():
    data, model = loaders(4), net()
    learn = learner(data, model)
    names = list(model.state_dict())
    seen = []

    class Looks(Callback):
        def after_loss(self):
            if self.run.in_train:
                seen.append((type(self.run.model).__name__, [n for n, _ in self.run.model.named_parameters()]))
                assert self.run.model[0] is model[0] if hasattr(type(self.run.model), "__getitem__") else True
                assert model[1].process_group is not None

    run = fit(learn, Looks(), epochs=1)
    assert {s[0] for s in seen} == {"Replica"} and seen[0][1] == [n for n, _ in model.named_parameters()]
    assert run.model is model and run.data is data and list(model.state_dict()) == names
    assert model[1].process_group is None and len(data.train_dl) == 12 and data.train_dl.world == 1
    assert not dist.is_initialized() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fit(learn, together=False, epochs=1)  # alone again


@check
def a_search_for_a_rate_leaves_model_and_layers_as_they_were():
    learn = learner(loaders(4))
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    run = fit(learn, LR_Find(max_iter=5))
    assert len(run.lr_find.lrs) == 5
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())
    assert [m.process_group for m in learn.model.modules() if isinstance(m, RunningBatchNorm)] == [None, None]


@check
def schedules_end_with_the_fit_also_when_epochs_are_numbers_of_steps():
    learn = learner(loaders(4), lr=1.0)
    run = Runner([Distributed(timeout=TIMEOUT), Warmup(share=0.5), Recorder()])
    run.fit(2, learn, validate_every=4)  # 12 steps
    assert run.recorder.lrs[0] == [*(k / 6 for k in range(1, 6)), *[1.0] * 7]


@check
def a_group_that_is_there_is_used_and_left():
    dist.init_process_group("gloo", store=dist.PrefixStore("own", everyone.store), rank=RANK, world_size=WORLD)
    try:
        fit(learner(loaders(4)), epochs=1)
        fit(learner(loaders(4)), epochs=1)
        assert dist.is_initialized()
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == WORLD
    finally:
        dist.destroy_process_group()


@check
def rank_0_writes_and_prints():
    folder = FOLDER / "written" / str(RANK)
    said = []
    run = runner(CSVLogger(folder / "h.csv"), Checkpoint(folder / "c"), ProgressCallback())
    run.logger = said.append
    out, sys.stdout = sys.stdout, open(FOLDER / f"said-{RANK}", "w")
    try:
        run.fit(1, learner(loaders(4)))
    finally:
        sys.stdout.close()
        sys.stdout = out
    assert (folder / "h.csv").exists() == (folder / "c").exists() == (RANK == 0)
    assert bool((FOLDER / f"said-{RANK}").read_text()) == (RANK == 0) and said == []


@check
def a_file_that_was_saved_is_there_for_all_ranks():
    class Saves(Callback):
        def after_epoch(self):
            learn, path = self.run.learn, FOLDER / "weights.pt"
            learn.save(path)
            learn.model[0].bias.data.zero_()
            learn.load(path)  # rank 1 would find none, or that of the epoch before
            assert learn.model[0].bias.any()
            if RANK == 0 and self.run.epoch == 2:
                learn.save(FOLDER / "alone.pt")  # waits for nobody

    real, learn = checkpoint_file.write, learner(loaders(4))
    try:
        checkpoint_file.write = lambda *args: (time.sleep(0.1), real(*args))
        fit(learn, Saves())
        assert_same_on_ranks(learn.model)

        checkpoint_file.write = raises(OSError("the disk is full"))
        run, kind = runner(Saves()), OSError if RANK == 0 else RuntimeError
        assert_raises(kind, "the disk is full", lambda: run.fit(1, learn))
    finally:
        checkpoint_file.write = real


# Going on from a checkpoint


@check
def a_fit_that_is_resumed_ends_as_the_whole_one():
    for every, data in ((None, loaders), (4, loaders), (4, lambda bs: torch_loaders(bs, 45, True))):
        folder = FOLDER / f"resume-{every}-{getattr(data, '__name__', 'torch')}"
        whole = learner(data(4))
        want = fit(whole, Checkpoint(FOLDER / f"whole-{folder.name}", every=every))
        cut = learner(data(4))
        error = ZeroDivisionError("power cut")
        batch = None if every is None else 3
        event = "begin_epoch" if every is None else "after_loss"
        broken = runner(Checkpoint(folder, every=every), Does(event, raises(error), rank=None, batch=batch))
        assert_raises((ZeroDivisionError, RuntimeError), "", lambda: broken.fit(3, cut))
        again = learner(data(4), net(seed=7))
        run = runner(Checkpoint(folder, every=every))
        run.fit(3, again, resume=folder)
        assert run.resumed_from is not None
        assert_close(again.model.state_dict(), whole.model.state_dict(), 0.0)
        assert_history(run.avg_stats.history[2:], want.avg_stats.history[2:], 1e-12)
        assert_same_on_ranks(again.model)


# What one rank cancels, all cancel


@check
def what_one_rank_cancels_all_cancel():
    kinds = {CancelBatchException: "batch", CancelEpochException: "epoch", CancelTrainException: "train"}
    for kind, name in kinds.items():
        for event in ("begin_batch", "after_pred", "after_loss"):
            learn, events = learner(loaders(4)), Events()
            fit(learn, Does(event, raises(kind("enough"))), events, epochs=2)
            assert events.seen == [(name, 1, 2)], (event, events.seen)
            assert_same_on_ranks(learn.model)
            assert kind is not CancelTrainException or "enough" in events.run.stop_reason


@check
def a_step_that_only_one_rank_leaves_out_is_an_error_on_all():
    learn = learner(loaders(4))
    skips = Does("after_backward", raises(CancelBatchException()))
    text = "have not all taken the last step (rank 0: taken; rank 1: left out)"
    assert_raises(RuntimeError, text, lambda: fit(learn, skips))
    all_skip = Does("after_backward", raises(CancelBatchException()), rank=None)
    fit(learner(loaders(4)), all_skip)


@check
def training_that_one_rank_ends_after_its_step_ends_for_all():
    for event in ("after_step", "after_batch"):
        learn, events = learner(loaders(4)), Events()
        run = fit(learn, Does(event, raises(CancelTrainException("that will do"))), events, epochs=2)
        assert "that will do" in run.stop_reason and ("rank 1" in run.stop_reason) == (RANK == 0)
        assert events.seen == [("train", 1, 2 + (RANK == 0))]
        assert_same_on_ranks(learn.model)


@check
def stopping_early_is_decided_alike_everywhere():
    learn = learner(loaders(4), lr=0.0)
    run = fit(learn, EarlyStopping("valid_loss", patience=2), epochs=9)
    assert run.epoch < 8 and run.stop_reason is not None and "rank" not in run.stop_reason


@check
def epochs_end_with_the_shortest_loader():
    x, y = tensors(40)
    batches = list(zip(x.split(4), y.split(4)))[: 6 + 2 * RANK]
    run = runner(together=False)
    run.add_cbs([Distributed(timeout=TIMEOUT, shard=False)])
    learn = learner(SimpleNamespace(train_dl=batches, valid_dl=batches))
    run.fit(2, learn)
    assert len(run.recorder.losses) == 12
    assert_same_on_ranks(learn.model)


@check
def a_nan_that_one_rank_meets_ends_all_with_its_report_there():
    data = loaders(4)
    data.train_dl.x = data.train_dl.x.clone()
    learn, watch = learner(data), HaltOnNaN()

    class Poisons(Callback):
        def begin_batch(self):
            if RANK == 1 and self.run.in_train and self.run.n_iter == 8:
                self.run.xb = self.run.xb * float("nan")

    run = fit(learn, Poisons(), watch)
    assert run.n_iter == 9 and "step 8" in run.stop_reason and "input" in run.stop_reason
    assert (watch.report is not None) == (RANK == 1)
    assert all(p.isfinite().all() for p in learn.model.parameters())


@check
def a_nan_within_the_model_is_looked_for_without_the_other_rank():
    class Bad(nn.Module):
        bad = False

        def forward(self, x):
            return x * float("nan") if self.bad and self.training else x

    model = net()
    model.insert(2, Bad())
    learn, watch = learner(loaders(4), model), HaltOnNaN()

    class Poisons(Callback):
        def begin_batch(self):
            model[2].bad = RANK == 1 and self.run.n_iter == 8

    run = fit(learn, Poisons(), watch)
    assert run.n_iter == 9
    assert RANK == 0 or watch.report.where == "2", watch.report


class Spoils(Callback):
    """NaN at `event` of step 8 or the first after it, on rank 1 alone."""

    _order = -50

    def __init__(self, what, event):
        self.what, self.done = what, False
        vars(self)[event] = self._spoil

    def _spoil(self):
        run = self.run
        if RANK != 1 or not run.in_train or run.n_iter < 8 or self.done:
            return
        self.done = True
        weight = run.learn.model[0].weight
        if self.what == "input":
            run.xb = run.xb * torch.nan
        elif self.what == "loss":
            run.loss = run.loss * torch.nan
        else:
            with torch.no_grad():
                (weight if self.what == "parameter" else weight.grad)[0, 0] = torch.nan


FAULTS = [("input", "begin_batch"), ("loss", "after_loss"), ("gradient", "after_backward"), ("parameter", "after_step")]


@check
def the_ranks_models_are_equal_and_finite_after_one_of_them_alone_has_met_a_nan():
    for what, event in FAULTS:
        for cbs in [[], [GradientAccumulation(2)]][: 1 + (what == "gradient")]:
            learn, watch = learner(loaders(4)), HaltOnNaN()
            run = fit(learn, Spoils(what, event), *cbs, watch)
            assert any(everyone(watch.report is not None)), (what, cbs)
            assert run.stop_reason is not None and run.n_iter <= 11, (what, cbs, run.stop_reason)
            assert all(t.isfinite().all() for t in learn.model.state_dict().values()), (what, cbs)
            assert_same_on_ranks(learn.model)
            a, b = everyone([s["momentum_buffer"] for s in learn.opt.state_dict()["state"].values()])
            assert len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b)), (what, cbs)
    fit(learn, epochs=1)  # and go on together
    assert_same_on_ranks(learn.model)


# Errors and interrupts


@check
def an_error_on_one_rank_ends_the_other_with_one_that_names_it():
    for event in ("begin_epoch", "begin_batch", "after_loss", "after_step", "after_batch"):
        n = None if event == "begin_epoch" else 2
        learn, events = learner(loaders(4)), Events()
        run = runner(Does(event, raises(ValueError("broken")), batch=n), events)
        if RANK == 1:
            assert_raises(ValueError, "broken", lambda: run.fit(3, learn))
        else:
            assert_raises(RuntimeError, "rank 1 ended the fit: ValueError", lambda: run.fit(3, learn))
            assert "broken" in run.stop_reason
        assert not dist.is_initialized() and run.model is learn.model


@check
def an_error_before_the_first_batch_and_one_in_validation_do_too():
    for event in ("begin_fit", "begin_validate", "after_pred", "after_epoch", "after_fit"):

        class Fails(Callback):
            pass

        def fail(self, event=event):
            if RANK == 0 and not (event == "after_pred" and self.run.in_train):
                raise ValueError("broken")

        setattr(Fails, event, fail)
        run = runner(Fails())
        if RANK == 0:
            assert_raises(ValueError, "broken", lambda: run.fit(2, learner(loaders(4))))
        elif event != "after_fit":
            assert_raises(RuntimeError, "rank 0 ended the fit: ValueError", lambda: run.fit(2, learner(loaders(4))))
        else:
            run.fit(2, learner(loaders(4)))


@check
def ctrl_c_on_any_rank_ends_all_after_the_same_batch():
    for rank in (0, 1, None):
        learn = learner(loaders(4))
        run = fit(learn, Does("after_pred", partial(signal.raise_signal, signal.SIGINT), rank=rank))
        assert run.stop_reason.startswith("interrupted (Ctrl-C)")
        assert len(set(everyone(run.n_iter))) == 1
        assert_same_on_ranks(learn.model)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@check
def ctrl_c_on_any_rank_saves_a_checkpoint_first():
    whole = learner(loaders(4))
    fit(whole)
    for rank in (0, 1, None):
        folder, learn = FOLDER / f"interrupted-{rank}", learner(loaders(4))
        stops = Does("after_pred", partial(signal.raise_signal, signal.SIGINT), rank=rank)
        run = fit(learn, Checkpoint(folder), stops)
        assert run.stop_reason.startswith("interrupted (Ctrl-C)")
        assert any("-step-1" in p.name or "-step-9" in p.name for p in folder.iterdir()), list(folder.iterdir())
        again = learner(loaders(4))
        run = runner(Checkpoint(folder))
        run.fit(3, again, resume=folder)
        assert_close(again.model.state_dict(), whole.model.state_dict(), 0.0)


@check
def fits_that_are_not_the_same_are_refused_by_name():
    run = runner()
    error = "they differ in epochs (rank 0: 2; rank 1: 3)"
    assert_raises(RuntimeError, error, lambda: run.fit(2 + RANK, learner(loaders(4))))
    run = runner(*([HaltOnNaN()] if RANK else []))
    assert_raises(RuntimeError, "they differ in callbacks", lambda: run.fit(2, learner(loaders(4))))


# What nobody can hear of in time: ranks wait for `timeout`, or for the other's process to end


def broken(f):
    BROKEN.append(f)
    return f


class Fails(nn.Module):
    """Raises when it is `armed`."""

    armed = None

    def forward(self, x):
        if self.armed is not None:
            self.armed()
        return x


def fit_with_a_layer_that(does):
    model = net()
    model.insert(3, Fails())  # between two norms, which wait for the other rank
    learn = learner(loaders(4), model)

    class Arms(Callback):
        def begin_batch(self):
            model[3].armed = does if RANK == 1 and self.run.n_iter == 8 else None

    run = Runner([Arms(), Distributed(timeout=5)])
    return run, lambda: run.fit(3, learn)


@broken
def an_error_within_the_model_ends_the_other_rank_after_the_timeout():
    run, call = fit_with_a_layer_that(raises(ValueError("broken")))
    if RANK == 1:
        assert_raises(ValueError, "broken", call)
    else:
        error = assert_raises(RuntimeError, "rank 1 ended the fit: ValueError", call)
        assert "what that led to here" in str(error) and run.stop_reason == str(error)
    assert not dist.is_initialized()


@broken
def a_rank_that_is_killed_ends_the_others_and_they_name_no_other():
    run, call = fit_with_a_layer_that(lambda: os.kill(os.getpid(), signal.SIGKILL))
    if RANK == 1:
        call()
    else:
        error = assert_raises(RuntimeError, "", call)
        assert str(error).startswith("rank 1 is gone without a word: its process has ended"), str(error)


def main(rank, world, folder, checks):
    global RANK, WORLD, FOLDER
    RANK, WORLD, FOLDER = rank, world, folder
    everyone.store = dist.FileStore(str(FOLDER / "store"), WORLD)
    results = {}
    for f in globals()[checks]:
        try:
            f()
            results[f.__name__] = ""
        except BaseException:
            results[f.__name__] = traceback.format_exc()
        (FOLDER / f"{RANK}.json").write_text(json.dumps(results))
        if f is BROKEN[-1]:
            break  # the other one is gone
        if any(everyone(results[f.__name__] != "")):  # they may no longer be in step
            break


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, world, checks = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    fork_ranks(folder, world, lambda rank: main(rank, world, folder, checks))
