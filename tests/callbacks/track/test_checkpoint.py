"""A fit resumed from any checkpoint ends like an uninterrupted one, bit for bit."""

import csv
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from fastrbn.callbacks import (
    AvgStatsCallback,
    Checkpoint,
    CheckpointError,
    CSVLogger,
    CudaCallback,
    MixedPrecision,
    ParamMagnitudes,
    ParamScheduler,
    Recorder,
    accuracy,
    sched_cos,
)
from fastrbn.data import BatchLoader, DataBunch, Dataset
from fastrbn.learn import Callback, CancelBatchException, Learner, Runner, checkpoint_file
from fastrbn.norm import RunningBatchNorm

SAMPLES, BS, STEPS = 26, 6, 5  # the last batch is smaller


class Noisy(Dataset):
    """Items that depend on all three generators, as augmented ones do."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.rand(()) + random.random() + np.random.rand(), y


class Jitter:
    takes_generator = True

    def __call__(self, xb, generator):
        return xb + torch.rand(xb.shape, generator=generator)


class Sequence:
    """A loader that is a plain iterable, with an order drawn by Python's generator."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        order = list(range(len(self.data)))
        random.shuffle(order)
        return iter([(xb[None], yb[None]) for xb, yb in (self.data[i] for i in order[:STEPS])])


def batch_loader(data):
    return BatchLoader(data.x, data.y, BS, shuffle=True, tfms=Jitter())


def data_loader(data):
    return DataLoader(Noisy(data.x, data.y), BS, shuffle=True)


def seeded_loader(data):
    return DataLoader(Noisy(data.x, data.y), BS, shuffle=True, generator=torch.Generator().manual_seed(7))


def cuda_loader(data):
    return BatchLoader(data.x, data.y, BS, shuffle=True)


LOADERS = [batch_loader, data_loader, seeded_loader, Sequence]


def make_model():
    return nn.Sequential(nn.Linear(4, 8), RunningBatchNorm(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def make_learn(loader=batch_loader, opt=torch.optim.Adam, model=make_model):
    seed_all(1)
    train, valid = (Dataset(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (SAMPLES, 12))
    model = model()
    data = DataBunch(loader(train), BatchLoader(valid.x, valid.y, 12), c=3, c_in=1)
    return Learner(model, opt(model.parameters(), lr=0.01), F.cross_entropy, data)


def make_run(folder, *cbs, **kwargs):
    kwargs = {"every": 1, "keep": None, **kwargs}
    own = [Recorder(), AvgStatsCallback(accuracy), CSVLogger(folder / "h.csv"), ParamMagnitudes(every=2, grads=True)]
    run = Runner([*own, ParamScheduler("lr", sched_cos(0.02, 0.001)), Checkpoint(folder / "c", **kwargs), *cbs])
    run.logger = lambda line: None
    return run


def rows(path):
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if k != "time"} for row in csv.DictReader(f)]


def everything(learn, run, folder):
    """Everything that a fit leaves behind, except times."""
    return {
        "model": learn.model.state_dict(),
        "grads": [p.grad for p in learn.model.parameters()],
        "opt": learn.opt.state_dict(),
        "losses": run.recorder.losses,
        "lrs": run.recorder.lrs,
        "history": [{k: v for k, v in row.items() if k != "time"} for row in run.avg_stats.history],
        "magnitudes": (run.param_magnitudes.steps, run.param_magnitudes.values),
        "random": (torch.get_rng_state(), random.getstate(), list(np.random.get_state()[1])),
        "file": rows(folder / "h.csv"),
        "steps": (run.n_iter, run.epoch, run.n_epochs),
    }


def check_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            check_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            check_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def files(folder):
    return sorted(p.name for p in Path(folder).iterdir())


@pytest.fixture
def whole(tmp_path):
    """A fit of two epochs with a checkpoint after each step and each epoch."""
    run, learn = make_run(tmp_path), make_learn()
    run.fit(2, learn)
    return tmp_path / "c"


# --- resuming


@pytest.mark.filterwarnings("ignore:the training loader has no length:UserWarning")
@pytest.mark.parametrize("loader", LOADERS)
def test_a_fit_resumed_from_any_checkpoint_ends_like_an_uninterrupted_one(loader, tmp_path):
    run, learn = make_run(tmp_path, monitor="valid_loss"), make_learn(loader)
    run.fit(2, learn)
    expected = everything(learn, run, tmp_path)
    assert len(files(tmp_path / "c")) == 2 * (STEPS + 1)
    for name in files(tmp_path / "c"):
        folder = tmp_path / name
        again, fresh = make_run(folder, monitor="valid_loss"), make_learn(loader)
        seed_all(99)
        again.fit(2, fresh, resume=tmp_path / "c" / name)
        assert again.resumed_from.name == name
        if name == files(tmp_path / "c")[-1]:  # no epoch ended in this fit, so the file is unchanged
            shutil.copy(tmp_path / "h.csv", folder / "h.csv")
        check_same(expected, everything(fresh, again, folder), name)
        assert again.checkpoint.best == run.checkpoint.best


def test_resuming_twice_and_over_newer_files_changes_nothing(whole, tmp_path):
    learn = make_learn()
    run = make_run(tmp_path)
    for name in ("checkpoint-0003-step-3.pt", "checkpoint-0008-step-8.pt", "checkpoint-0003-step-3.pt"):
        run.fit(2, learn, resume=whole / name)
    reference, alone = make_run(tmp_path / "alone"), make_learn()
    reference.fit(2, alone)
    check_same(learn.model.state_dict(), alone.model.state_dict())
    assert run.n_iter == 2 * STEPS


def test_workers_that_draw_random_numbers_draw_the_same_after_a_resume(tmp_path):
    def loader(data):
        return DataLoader(Noisy(data.x, data.y), BS, shuffle=True, num_workers=1)

    ends = []
    for resume in (None, tmp_path / "c" / "checkpoint-0007-step-7.pt"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork, from Python 3.12 on
            learn = make_learn(loader)
            folder = tmp_path / "again" if resume else tmp_path
            run = make_run(folder)
            run.fit(2, learn, resume=resume)
        ends.append(everything(learn, run, folder))
    check_same(*ends)


def test_accumulated_gradients_are_saved(tmp_path):
    class EverySecond(Callback):
        def after_backward(self):
            if self.run.n_iter % 2 == 0:
                raise CancelBatchException

    ends = []
    for resume in (None, tmp_path / "c" / "checkpoint-0003-step-3.pt"):
        folder = tmp_path / "again" if resume else tmp_path
        run, learn = make_run(folder, EverySecond()), make_learn()
        run.fit(1, learn, resume=resume)
        ends.append(everything(learn, run, folder))
    assert any(g is not None for g in ends[0]["grads"]), "5 steps: the gradients of the last one are accumulated"
    check_same(*ends)


def test_model_state_outside_the_state_dict_is_saved(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.counted = make_model(), False
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x):
            if self.training:
                self.seen += len(x)
            return self.inner(x)

    run, learn = make_run(tmp_path), make_learn(model=Odd)
    learn.model.inner[0].weight.requires_grad_(False)
    learn.model.inner[1].freeze()
    learn.model.counted = True
    run.fit(1, learn)
    again, fresh = make_run(tmp_path), make_learn(model=Odd)
    again.fit(1, fresh, resume=tmp_path / "c")
    assert again.recorder.losses == run.recorder.losses
    assert fresh.model.seen == SAMPLES and fresh.model.counted and fresh.model.inner[1].frozen
    assert [p.requires_grad for p in fresh.model.parameters()] == [p.requires_grad for p in learn.model.parameters()]


def test_a_rate_that_the_optimiser_keeps_in_a_tensor_stays_in_that_tensor(tmp_path):
    def opt(params, lr):
        return torch.optim.SGD(params, lr=torch.tensor(lr), momentum=0.9)

    make_run(tmp_path).fit(1, make_learn(opt=opt))
    learn = make_learn(opt=opt)
    lr = learn.opt.param_groups[0]["lr"]
    make_run(tmp_path).fit(1, learn, resume=tmp_path / "c")
    assert learn.opt.param_groups[0]["lr"] is lr and lr.item() == pytest.approx(sched_cos(0.02, 0.001)(0.8))


@pytest.mark.parametrize("then", [None, True], ids=["plain to fused", "fused to plain"])
def test_a_resumed_fit_computes_its_steps_as_its_own_optimiser_does(then, tmp_path):
    def fit(fused, folder, resume=None):
        learn = make_learn(opt=partial(torch.optim.Adam, fused=fused))
        run = make_run(folder, MixedPrecision("fp16", init_scale=2.0**10))
        run.fit(2, learn, resume=resume)
        return learn

    whole = fit(then, tmp_path)
    now = fit(not then, tmp_path / "again", tmp_path / "c" / "checkpoint-0003-step-3.pt")
    assert now.opt.param_groups[0]["fused"] is (not then)
    for p, q in zip(whole.model.parameters(), now.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert {s["step"].item() for s in now.opt.state.values()} == {s["step"].item() for s in whole.opt.state.values()}


def test_resuming_with_more_epochs_stretches_the_schedule(whole, tmp_path):
    run, learn = make_run(tmp_path), make_learn()
    run.fit(4, learn, resume=whole)
    assert run.n_iter == 4 * STEPS and [row["epoch"] for row in run.avg_stats.history] == [0, 1, 2, 3]
    assert run.recorder.lrs[0][2 * STEPS] == pytest.approx(sched_cos(0.02, 0.001)(0.5))


@pytest.mark.cuda
def test_on_cuda_a_resumed_fit_ends_as_the_whole_one(tmp_path):
    ends = []
    for resume in (None, tmp_path / "c" / "checkpoint-0003-step-3.pt"):
        folder = tmp_path / "again" if resume else tmp_path
        torch.cuda.manual_seed(5)  # dropout draws on the device
        run, learn = make_run(folder, CudaCallback("cuda")), make_learn(cuda_loader)
        run.fit(2, learn, resume=resume)
        ends.append({**everything(learn, run, folder), "cuda": torch.cuda.get_rng_state()})
    check_same(*ends)


def test_resuming_does_not_duplicate_appended_csv_rows(tmp_path):
    def fit(resume=None):
        run = Runner([AvgStatsCallback(), CSVLogger(tmp_path / "h.csv", append=True), Checkpoint(tmp_path / "c")])
        run.logger = lambda line: None
        run.fit(2, make_learn(), resume=resume)

    (tmp_path / "h.csv").write_text("epoch,train_loss,valid_loss,lr,time\n7,1,1,1,1\n")
    fit()
    fit(tmp_path / "c" / "checkpoint-0001-step-5.pt")
    assert [row["epoch"] for row in rows(tmp_path / "h.csv")] == ["7", "0", "1"]


KILLED = """
    import os, random, signal, sys
    from itertools import count
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch, torch._dynamo  # the optimisers import it
    torch.set_num_threads(1)
    import test_checkpoint as t  # no training in this process: its children are forks

    folder = Path(sys.argv[2])

    def fit(where, last=None):
        'In a child, which kills itself at the event `last` of the interpreter: whether it came to the end.'
        pid = os.fork()
        if pid == 0:
            events = count()
            sys.setprofile(lambda *_: next(events) == last and os.kill(os.getpid(), signal.SIGKILL))
            run, learn = t.make_run(where, every=2, keep=3), t.make_learn(t.data_loader)
            run.fit(5, learn, resume=where / "c" if t.newest(where / "c") else None)
            sys.setprofile(None)
            torch.save({"events": next(events), **t.everything(learn, run, where)}, where / "end.pt")
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL)
        return status == 0

    assert fit(folder / "whole")
    expected = torch.load(folder / "whole" / "end.pt", weights_only=False)
    events = expected.pop("events")
    random.seed(0)
    where, kills = folder / "killed", []
    while len(kills) < 6 and not fit(where, random.randrange(events // 8, events // 2)):
        kills.append(t.newest(where / "c"))
    assert fit(where)
    got = torch.load(where / "end.pt", weights_only=False)
    got.pop("events")
    t.check_same(expected, got)
    print("same after kills at", kills)
"""


def newest(folder):
    return max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*.pt")), default=0)


def test_after_kill_9_at_random_times_the_fit_ends_like_an_uninterrupted_one(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"same after kills at \[\d+(, \d+){2,}\]\n", done.stdout), done.stdout
    assert not list((tmp_path / "killed" / "c").glob("*.tmp")), "leftovers of a killed process were not removed"


# --- Ctrl-C


class Interrupts(Callback):
    def __init__(self, event, epoch, times=1, order=0):
        vars(self)[event] = self._fire
        self._epoch, self._times, self._order, self._done = epoch, times, order, False

    def _fire(self):
        if self.run.epoch == self._epoch and not self._done:
            self._done = True
            for _ in range(self._times):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("loader", [batch_loader, data_loader])
@pytest.mark.parametrize("event", ["begin_epoch", "after_backward", "after_batch", "begin_validate", "after_epoch"])
def test_after_ctrl_c_nothing_is_lost(event, loader, tmp_path, capfd):
    whole, learn = make_run(tmp_path / "whole"), make_learn(loader)
    whole.fit(2, learn)
    run = make_run(tmp_path, Interrupts(event, 1), every=1000)
    run.fit(2, make_learn(loader))
    assert run.stop_reason.startswith("interrupted (Ctrl-C)")
    assert "saving a checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (name,) = files(tmp_path / "c")
    again, fresh = make_run(tmp_path), make_learn(loader)
    again.fit(2, fresh, resume=tmp_path / "c")
    assert f"step-{ {'begin_epoch': 6, 'after_backward': 6, 'after_batch': 6}.get(event, 10) }." in name
    check_same(everything(learn, whole, tmp_path / "whole"), everything(fresh, again, tmp_path))


def test_a_second_ctrl_c_ends_at_once_without_a_checkpoint(tmp_path):
    run = make_run(tmp_path, Interrupts("after_backward", 1, times=2), every=1000)
    run.fit(2, make_learn())
    assert run.stop_reason.startswith("interrupted") and files(tmp_path / "c") == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_unchanged_on_request_and_with_workers_and_other_handlers(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.active_children", lambda: ["a worker, which Ctrl-C ends too"])
        run = make_run(tmp_path, Interrupts("after_backward", 1), every=1000)
        run.fit(2, make_learn())
    assert run.stop_reason.startswith("interrupted") and files(tmp_path / "c") == []
    run = make_run(tmp_path, Interrupts("after_backward", 1), every=1000, on_interrupt=False)
    run.fit(2, make_learn())
    assert run.stop_reason.startswith("interrupted") and files(tmp_path / "c") == []
    calls = []
    before = signal.signal(signal.SIGINT, lambda *a: calls.append(a))
    try:
        make_run(tmp_path / "b", Interrupts("after_backward", 1)).fit(2, make_learn())
        assert len(calls) == 1
    finally:
        signal.signal(signal.SIGINT, before)


# --- broken, foreign and dangerous files


def break_it(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:  # one bit of a weight, which torch.load does not notice
        state = torch.load(path, weights_only=True)
        at = content.find(state["model"]["0.weight"].numpy().tobytes())
        content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
def test_a_broken_file_falls_back_to_the_previous_one_with_a_warning(how, whole, tmp_path):
    *_, before, newest = files(whole)
    break_it(whole / newest, how)
    run, learn = make_run(tmp_path), make_learn()
    with pytest.raises(CheckpointError, match=f"{newest} is (not whole|damaged).*take an earlier one"):
        run.fit(2, learn, resume=whole / newest)
    with pytest.warns(UserWarning, match=f"{newest} is .*resuming from .*{before} instead"):
        run.fit(2, learn, resume=whole)
    assert run.resumed_from == whole / before
    for name in files(whole):
        break_it(whole / name, "cut")
    with pytest.raises(CheckpointError, match="is not whole"):
        run.fit(2, learn, resume=whole)


def test_opening_a_checkpoint_runs_no_code(tmp_path, whole):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was run",))

    state = torch.load(whole / files(whole)[0], weights_only=True)
    torch.save({**state, "opt": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="holds more than plain data, so it is not opened"):
        make_run(tmp_path).fit(2, make_learn(), resume=tmp_path / "evil.pt")
    assert not (tmp_path / "was run").exists()


def test_a_file_of_another_format_or_kind_is_an_error(tmp_path, whole):
    run, learn = make_run(tmp_path), make_learn()
    state = torch.load(whole / files(whole)[0], weights_only=True)
    torch.save({**state, "format": 99, "fastrbn": "7.0"}, tmp_path / "new.pt")
    torch.save(learn.model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "empty").mkdir()
    for name, text in {
        "new.pt": "format 99, of fastrbn 7.0; this version reads format 1",
        "weights.pt": "not a checkpoint of a run",
        "nothing": "nothing does not exist",
        "empty": "empty holds none",
    }.items():
        with pytest.raises(CheckpointError, match=text):
            run.fit(2, learn, resume=tmp_path / name)


def test_another_model_is_an_error_that_names_the_first_difference(whole, tmp_path):
    def wider():
        return nn.Sequential(nn.Linear(4, 9), RunningBatchNorm(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3))

    learn = make_learn(model=wider)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    text = r"another model: 0.weight \(float32 \[8, 4\] there, float32 \[9, 4\] here\), 0.bias .* and \d+ more"
    with pytest.raises(CheckpointError, match=text):
        make_run(tmp_path).fit(2, learn, resume=whole)
    check_same(before, dict(learn.model.state_dict()))
    with pytest.raises(CheckpointError, match=r"5.weight \(nothing there, float32 \[3, 3\] here\)"):
        make_run(tmp_path).fit(2, make_learn(model=lambda: make_model().append(nn.Linear(3, 3))), resume=whole)


def test_another_optimiser_batch_size_or_end_is_an_error(whole, tmp_path):
    with pytest.raises(CheckpointError, match="another optimiser than SGD: Adam; make"):
        make_run(tmp_path).fit(2, make_learn(opt=torch.optim.SGD), resume=whole)
    with pytest.raises(CheckpointError, match="was made in epoch 1 .*beyond the end of a fit of 1.*that fit had 2"):
        make_run(tmp_path).fit(1, make_learn(), resume=whole)
    learn = make_learn(lambda data: BatchLoader(data.x, data.y, 13))
    with pytest.raises(CheckpointError, match="5 batches an epoch, the training loader has 2"):
        make_run(tmp_path).fit(2, learn, resume=whole / "checkpoint-0003-step-3.pt")
    make_run(tmp_path).fit(3, learn, resume=whole)  # between epochs it may change


def test_other_metrics_are_an_error_and_other_callbacks_a_warning(whole, tmp_path):
    def fit(*cbs):
        run = Runner(cbs)
        run.logger = lambda line: None
        run.fit(3, make_learn(), resume=whole)

    with pytest.warns(UserWarning) as caught, pytest.raises(ValueError, match="the saved ones are loss, accuracy"):
        fit(AvgStatsCallback(), CSVLogger(tmp_path / "h.csv"))
    assert "does not have: recorder, param_magnitudes" in str(caught[0].message)
    with pytest.warns(UserWarning, match="which start fresh: recorder_2"):
        make_run(tmp_path, Recorder()).fit(3, make_learn(), resume=whole)


# --- users' callbacks


def test_a_callback_with_state_dict_is_restored_and_one_without_is_named_once(tmp_path):
    class Counts(Callback):
        def begin_fit(self):
            self.count, self._hidden = 0, 0

        def after_step(self):
            self.count += 1
            self._hidden += 1

    class Saves(Counts):
        def state_dict(self):
            return {"count": np.int64(self.count)}

        def load_state_dict(self, state):
            self.count = state["count"]

    with pytest.warns(UserWarning) as caught:
        make_run(tmp_path, Counts(), Saves()).fit(2, make_learn())
    assert len(caught) == 1 and "change during the fit: Counts (count)" in str(caught[0].message)
    run = make_run(tmp_path / "b", Counts(), Saves())
    with pytest.warns(UserWarning):
        run.fit(2, make_learn(), resume=tmp_path / "c" / "checkpoint-0004-step-4.pt")
    assert (run.counts.count, run.saves.count) == (6, 10)


def test_state_that_is_not_plain_data_is_an_error_that_names_its_place(tmp_path):
    class Odd(Callback):
        def state_dict(self):
            return {"seen": [1, {2, 3}]}

    with pytest.raises(TypeError, match=r"callbacks.odd.state.seen\[1\] is a builtins.set"):
        make_run(tmp_path, Odd()).fit(1, make_learn())
    assert files(tmp_path / "c") == []


# --- schedulers and loss functions of PyTorch


class Scheduled(Callback):
    """A torch scheduler as users attach it, with one step per epoch."""

    def __init__(self, make):
        self.make = make

    def begin_fit(self):
        self.sched, self.rates = self.make(self.run.opt), []

    def begin_epoch(self):
        self.rates.append(self.run.opt.param_groups[0]["lr"])

    def after_epoch(self):
        self.sched.step()


def multi_step_after_warmup(opt):
    sched = torch.optim.lr_scheduler
    parts = [sched.ConstantLR(opt, 0.5, 1), sched.MultiStepLR(opt, [1, 2], gamma=0.1)]
    return sched.SequentialLR(opt, parts, milestones=[1])


SCHEDULERS = {
    "cosine": (lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4), [0.01, 0.008536, 0.005, 0.001464]),
    "milestones": (multi_step_after_warmup, [0.005, 0.01, 0.001, 0.0001]),
}


@pytest.mark.filterwarnings("ignore:the checkpoint does not contain these attributes:UserWarning")
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_in_a_callback_is_restored(name, every, tmp_path):
    make, rates = SCHEDULERS[name]
    whole = Runner(Scheduled(make))
    whole.fit(4, make_learn(opt=torch.optim.SGD))
    assert whole.scheduled.rates == pytest.approx(rates, rel=1e-3)
    Runner([Scheduled(make), Checkpoint(tmp_path, every=every)]).fit(2, make_learn(opt=torch.optim.SGD))
    rest = Runner([Scheduled(make), Checkpoint(tmp_path, every=every)])
    rest.fit(4, make_learn(opt=torch.optim.SGD), resume=tmp_path)
    assert rest.scheduled.rates == whole.scheduled.rates[2:]


def test_a_scheduler_in_no_callback_is_a_warning(tmp_path):
    learn = make_learn()
    kept = [torch.optim.lr_scheduler.ConstantLR(learn.opt)]
    with pytest.warns(UserWarning, match="a torch scheduler sets the rates .* make it an attribute of a callback"):
        Runner(Checkpoint(tmp_path)).fit(2, learn)
    assert kept


def test_a_scheduler_made_too_late_to_be_restored_is_an_error(tmp_path):
    class Late(Callback):
        def begin_batch(self):
            if self.run.in_train and "sched" not in vars(self):
                self.sched = torch.optim.lr_scheduler.ConstantLR(self.run.opt)

    Runner([Late(), Checkpoint(tmp_path)]).fit(1, make_learn())
    with pytest.raises(
        ValueError, match="the scheduler Late.sched, which does not exist here: .* in __init__ or begin_fit"
    ):
        Runner([Late()]).fit(2, make_learn(), resume=tmp_path)


def test_param_groups_may_have_labels_and_settings_that_the_checkpoint_lacks(tmp_path):
    def labelled(params, lr):
        return torch.optim.Adam([{"params": list(params), "label": "body"}], lr=lr)

    Runner(Checkpoint(tmp_path / "c")).fit(1, make_learn(opt=labelled))
    (file,) = (tmp_path / "c").iterdir()
    state = torch.load(file, weights_only=True)
    group = state["opt"]["param_groups"][0]
    assert group.pop("label") == "body" and group.pop("decoupled_weight_decay") is False
    group["lr"] = 0.125
    for known in (True, False):  # a file from before the name of the optimiser was saved
        learn = make_learn(opt=labelled)
        checkpoint_file.write(tmp_path / "old.pt", state)
        Runner().fit(1, learn, resume=tmp_path / "old.pt")
        now = learn.opt.param_groups[0]
        assert (now["label"], now["decoupled_weight_decay"], now["lr"]) == ("body", False, 0.125)
        if known:
            del state["opt_class"]
    with pytest.raises(
        CheckpointError, match="another optimiser than SGD: these settings exist on one side only: amsgrad, betas"
    ):
        Runner().fit(1, make_learn(opt=torch.optim.SGD), resume=tmp_path / "old.pt")


class Tempered(nn.Module):
    """A loss with a learned temperature, class weights and a buffer that is not in the state_dict."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("weights", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("calls", torch.tensor(0.0), persistent=False)

    def forward(self, pred, yb):
        self.calls += self.training
        return F.cross_entropy(pred * self.temperature, yb, self.weights)


def tempered_learn():
    learn = make_learn()
    learn.loss_func = Tempered()
    learn.opt.add_param_group({"params": list(learn.loss_func.parameters())})
    return learn


def test_parameters_of_the_loss_function_are_restored(tmp_path):
    whole, learn = tempered_learn(), tempered_learn()
    Runner().fit(3, whole)
    assert whole.loss_func.temperature.item() != 1.0
    Runner(Checkpoint(tmp_path, every=4)).fit(2, tempered_learn())
    Runner().fit(3, learn, resume=tmp_path)
    check_same(dict(learn.loss_func.named_parameters()), dict(whole.loss_func.named_parameters()))
    check_same(learn.loss_func.calls, whole.loss_func.calls)
    with pytest.raises(
        CheckpointError, match=r"another loss function: temperature \(float32 \[\] there, nothing here\)"
    ):
        learn = tempered_learn()
        learn.loss_func = F.cross_entropy
        Runner().fit(3, learn, resume=tmp_path)


def test_a_compiled_model_has_plain_names_in_the_file(tmp_path):
    def compiled(learn):
        learn.model = torch.compile(learn.model, backend="eager")
        return learn

    Runner(Checkpoint(tmp_path)).fit(1, compiled(make_learn()))
    (file,) = tmp_path.iterdir()
    saved = torch.load(file, weights_only=True)["model"]
    assert list(saved) == list(make_learn().model.state_dict())
    for learn in (compiled(make_learn()), make_learn()):
        Runner().fit(1, learn, resume=tmp_path)
        check_same(
            [p.detach() for p in learn.model.parameters()], [saved[n] for n, _ in make_model().named_parameters()]
        )
