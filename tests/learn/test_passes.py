"""max_steps and validate_every: where a fit ends and validates, on which batches it trains, and resumed fits."""

import random
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastrbn.callbacks import (
    AvgStatsCallback,
    Checkpoint,
    CheckpointError,
    GradientAccumulation,
    LR_Find,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    sched_lin,
)
from fastrbn.data import BatchLoader
from fastrbn.learn import Callback, CancelEpochException, Learner, Runner

X, Y = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2
BATCHES = list(zip(X.split(2), Y.split(2)))  # five


class Stream(IterableDataset):
    """Without a length, and without an end if asked."""

    def __init__(self, endless):
        self.endless, self.running = endless, 0

    def __iter__(self):
        self.running += 1
        try:
            yield from BATCHES
            while self.endless:
                yield from BATCHES
        finally:
            self.running -= 1


class Sequence:
    """A plain iterable, with an order drawn by Python's generator."""

    def __iter__(self):
        return iter(random.sample(BATCHES, len(BATCHES)))


def batch_loader():
    return BatchLoader(X, Y, 2, shuffle=True)


def data_loader(**kwargs):
    return DataLoader(TensorDataset(X, Y), 2, shuffle=True, **kwargs)


def seeded_loader():
    return data_loader(generator=torch.Generator().manual_seed(7))


def make_learn(train_dl=BATCHES, valid=True):
    torch.manual_seed(1)
    random.seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 2))
    data = SimpleNamespace(train_dl=train_dl() if callable(train_dl) else train_dl, valid_dl=BATCHES if valid else None)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), F.cross_entropy, data)


class Trace(Callback):
    _order = 99

    def begin_fit(self):
        self.seen = []

    def begin_epoch(self):
        self.seen.append((self.run.epoch, self.run.iters))

    def after_batch(self):
        if self.run.in_train:
            self.seen.append(self.run.iter)

    def begin_validate(self):
        self.seen.append("valid")

    def state_dict(self):
        return {}


def fit(*args, cbs=(), **kwargs):
    run = Runner([Trace(), Recorder(), AvgStatsCallback(), ParamScheduler("lr", sched_lin(1.0, 0.0)), *cbs])
    run.logger = lambda line: None
    run.fit(*args, **kwargs)
    return run


LOADERS = {"known": BATCHES, "stream": Stream(endless=False), "endless": Stream(endless=True)}


@pytest.mark.parametrize("name", LOADERS)
def test_max_steps_ends_the_fit_within_a_pass_and_schedules_know(name):
    loader = LOADERS[name] if name == "known" else DataLoader(LOADERS[name], None)
    run = fit(None, make_learn(loader), max_steps=7)
    n = {"known": (5, 2), "stream": (None, None), "endless": (None, None)}[name]
    passes = [[(0, n[0]), 0, 1, 2, 3, 4, "valid"], [(1, n[1]), 0, 1, "valid"]]
    assert run.trace.seen == ([(0, None), *range(7), "valid"] if name == "endless" else passes[0] + passes[1])
    assert (run.n_iter, run.max_steps, run.stop_reason) == (7, 7, None)
    assert run.epochs == (2 if name == "known" else float("inf"))
    assert run.recorder.lrs[0] == pytest.approx([1 - i / 7 for i in range(7)])
    assert len(run.avg_stats.history) == (1 if name == "endless" else 2)


@pytest.mark.parametrize(("epochs", "max_steps", "steps"), [(1, 7, 5), (2, 7, 7), (2, 50, 10)])
def test_epochs_and_max_steps_end_the_fit_whichever_comes_first(epochs, max_steps, steps):
    run = fit(epochs, make_learn(), max_steps=max_steps)
    assert run.n_iter == steps and run.stop_reason is None
    assert run.recorder.lrs[0] == pytest.approx([1 - i / steps for i in range(steps)])


def test_epochs_that_were_cut_short_are_made_up_for():
    class Cuts(Callback):
        def after_batch(self):
            if self.run.in_train and self.run.iter == 2:
                raise CancelEpochException

    run = fit(None, make_learn(), max_steps=7, cbs=[Cuts()])
    assert run.n_iter == 7 and run.epoch == 2


@pytest.mark.parametrize(
    ("args", "sizes"),
    [
        ({"epochs": 2, "validate_every": 3}, [3, 3, 3, 1]),
        ({"epochs": 2, "validate_every": 5}, [5, 5]),
        ({"epochs": 3, "validate_every": 12}, [12, 3]),
        ({"epochs": None, "max_steps": 8, "validate_every": 3}, [3, 3, 2]),
        ({"epochs": 2, "max_steps": 8, "validate_every": 4}, [4, 4]),
    ],
)
def test_validate_every_makes_epochs_of_so_many_batches_over_the_ends_of_passes(args, sizes):
    run = fit(learn=make_learn(batch_loader), **args)
    seen = [[(i, size), *range(size), "valid"] for i, size in enumerate(sizes)]
    assert run.trace.seen == sum(seen, []) and run.epochs == len(sizes) and run.stop_reason is None
    assert [row["epoch"] for row in run.avg_stats.history] == list(range(len(sizes)))
    same = fit(None, make_learn(batch_loader), max_steps=sum(sizes))  # its schedule has the same roundings, too
    assert run.recorder.lrs == same.recorder.lrs and run.recorder.losses == same.recorder.losses


def test_validate_every_works_on_streams_and_without_validation():
    stream = Stream(endless=True)
    run = fit(None, make_learn(DataLoader(stream, None), valid=False), max_steps=7, validate_every=3)
    assert run.trace.seen == [(0, 3), 0, 1, 2, (1, 3), 0, 1, 2, (2, 1), 0]
    assert stream.running == 0, "the fit has kept the loader's iterator"


class Numbered(torch.utils.data.SequentialSampler):
    """Like DistributedSampler, it shuffles by the number of the pass."""

    def set_epoch(self, number):
        self.told, self.number = [*getattr(self, "told", ()), number], number

    def __iter__(self):
        return iter(torch.randperm(len(X), generator=torch.Generator().manual_seed(self.number)).tolist())


def numbered_loader():
    return DataLoader(TensorDataset(X, Y), 2, sampler=Numbered(X))


@pytest.mark.parametrize("kwargs", [{}, {"validate_every": 7}], ids=str)
def test_a_sampler_is_told_of_each_pass_over_all_fits(kwargs):
    learn = make_learn(numbered_loader)
    fit(3, learn, **kwargs)
    fit(1, learn, cbs=[LR_Find()], **kwargs)  # leaves everything as it was
    fit(2, learn, **kwargs)
    assert learn.data.train_dl.sampler.told == [0, 1, 2, 3, 3, 4]


def test_a_learner_that_takes_no_attribute_is_trained():
    learn = make_learn(numbered_loader)
    fixed = namedtuple("Fixed", "model opt loss_func data")(learn.model, learn.opt, learn.loss_func, learn.data)
    fit(2, fixed)
    fit(1, fixed, cbs=[LR_Find()])
    assert learn.data.train_dl.sampler.told == [0, 1, 0]


def everything(learn, run):
    history = [{k: v for k, v in row.items() if k != "time"} for row in run.avg_stats.history]
    parameters = [p.tolist() for p in learn.model.parameters()]
    state = torch.get_rng_state().tolist(), random.getstate()
    return parameters, run.recorder.losses, run.recorder.lrs, history, state, (run.n_iter, run.epoch)


RESUMED = [data_loader, seeded_loader, batch_loader, numbered_loader, Sequence]
ARGS = {"max_steps": 13, "validate_every": 4}


@pytest.mark.parametrize("loader", RESUMED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kwargs", [ARGS, {"max_steps": 8}], ids=["validate_every", "max_steps"])
def test_a_fit_resumed_anywhere_is_the_uninterrupted_one(loader, kwargs, tmp_path):
    def make(folder):
        return [Checkpoint(tmp_path / folder, 1, keep=None, monitor="train_loss"), GradientAccumulation(2)]

    learn = make_learn(loader)
    want = everything(learn, fit(learn=learn, cbs=make("a"), **kwargs))
    files = sorted((tmp_path / "a").iterdir())
    # with epochs of 4 steps: the end of the first, within the second and the next pass, its end, before the validation
    for i in (4, 7, 9, 15) if kwargs is ARGS else (5, 6):
        learn, file = make_learn(loader), files[i]
        run = fit(learn=learn, cbs=make(f"b{i}"), resume=file, **kwargs)
        assert everything(learn, run) == want, file.name


def test_a_second_fit_resumed_is_the_uninterrupted_one(tmp_path):
    class Orders(Callback):
        def begin_fit(self):
            self.seen = []

        def begin_batch(self):
            if self.run.in_train:
                self.seen.append(self.run.xb.tolist())

        def state_dict(self):
            return {"seen": list(self.seen)}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    for loader in (batch_loader, numbered_loader):
        learn, folder = make_learn(loader), tmp_path / loader.__name__
        first = fit(2, learn, cbs=[Orders()]).orders.seen
        want = fit(2, learn, cbs=[Orders(), Checkpoint(folder, every=3, keep=None)]).orders.seen
        assert len({str(pass_) for seen in (first, want) for pass_ in (seen[:5], seen[5:])}) == 4
        for file in sorted(folder.iterdir()):  # within the first pass, the second, at the end
            assert fit(2, make_learn(loader), cbs=[Orders()], resume=file).orders.seen == want


def test_a_fit_interrupted_in_a_validation_between_passes_resumes_there(tmp_path):
    class Interrupts(Callback):
        def after_batch(self):
            if not self.run.in_train and self.run.n_iter == 8 and not self.run.resumed_from:
                import signal

                signal.raise_signal(signal.SIGINT)

    learn = make_learn(data_loader)
    want = everything(learn, fit(learn=learn, **ARGS))
    for _ in range(2):
        learn = make_learn(data_loader)
        kwargs = {"cbs": [Checkpoint(tmp_path, every=100), Interrupts()], **ARGS}
        run = fit(learn=learn, resume=tmp_path if _ else None, **kwargs)
    assert everything(learn, run) == want


@pytest.mark.parametrize(("every", "loader"), [(None, Sequence), (4, batch_loader)])
def test_the_last_epoch_is_saved_and_a_longer_fit_goes_on_within_it(every, loader, tmp_path):
    def train(steps, resume=None):
        torch.manual_seed(1)
        run = Runner([Recorder(), AvgStatsCallback(), Checkpoint(tmp_path, every=100, overwrite=resume is None)])
        run.logger = lambda line: None
        learn = make_learn(loader)
        run.fit(None, learn, resume, steps, every)
        return run, learn

    run, whole = train(12)
    losses = run.recorder.losses
    train(7)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-0001-step-7.pt"]
    run, learn = train(12, tmp_path)
    assert run.recorder.losses == losses
    assert all(map(torch.equal, learn.model.parameters(), whole.model.parameters()))
    assert [row["epoch"] for row in run.avg_stats.history] == [0, 1, 1, 2]  # the epoch that was cut has two rows
    with pytest.raises(CheckpointError, match="after 12 training batches, beyond the end of a fit of max_steps=8"):
        train(8, tmp_path)
    every = 3
    with pytest.raises(CheckpointError, match=r"with validate_every=\w+, which decides what an epoch is; now it is 3"):
        train(20, tmp_path)


def test_a_fit_of_no_epochs_has_a_share_done():
    learn, run = make_learn(), Runner()
    run.fit(0, learn, validate_every=2)
    assert run.pct_train == 0


def test_a_number_of_steps_that_cannot_be_reached_is_an_error():
    with pytest.raises(RuntimeError, match="max_steps=7 cannot be reached: epoch 1 had no training batch, after 5"):
        fit(None, make_learn(iter(BATCHES)), max_steps=7)


def test_steps_are_whole_numbers_and_validate_every_needs_their_number():
    with pytest.raises(ValueError, match="max_steps must be a whole number, 1 or more; got 0"):
        fit(None, make_learn(), max_steps=0)
    with pytest.raises(ValueError, match="validate_every must be a whole number, 1 or more; got 0.5"):
        fit(1, make_learn(), validate_every=0.5)
    with pytest.raises(ValueError, match="the training loader has no length. Pass max_steps in place of epochs"):
        fit(2, make_learn(DataLoader(Stream(endless=False), None)), validate_every=3)


@pytest.mark.parametrize(("name", "line"), [("known", "epoch 1 (2 of 2) train"), ("stream", "epoch 1 train")])
def test_progress_knows_the_number_of_epochs_or_shows_none(name, line, capsys, monkeypatch):
    monkeypatch.setattr("fastrbn.callbacks.track.progress._SPEAK", 0.0)
    loader = LOADERS[name] if name == "known" else DataLoader(LOADERS[name], None)
    fit(None, make_learn(loader), cbs=[ProgressCallback()], max_steps=7)
    assert line in capsys.readouterr().out
