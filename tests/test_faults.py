"""Faults of long fits, with all that a user has in one: nothing that is done is lost, the message names the cause.

Each fault strikes the same fit. Afterwards histories hold the finished steps, the newest checkpoint opens, a fit that
goes on from it ends bit for bit as the one that nothing struck, and nothing of the struck one is left lying about. The
command line goes through the same ones. Elsewhere: kill -9
(callbacks/track/test_checkpoint.py, cli/test_cli_resume.py), ranks that die or fail
(callbacks/distributed/test_distributed.py).
"""

import csv
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from fastrbn import util
from fastrbn.callbacks import (
    EMA,
    AvgStatsCallback,
    Checkpoint,
    CheckpointError,
    CSVLogger,
    HaltOnNaN,
    ParamMagnitudes,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    accuracy,
    sched_cos,
)
from fastrbn.cli import main, run_folder
from fastrbn.cli import train as cli_train
from fastrbn.data import BatchLoader, DataBunch, Dataset, glyphs
from fastrbn.learn import Callback, Learner, Runner, checkpoint_file
from fastrbn.norm import RunningBatchNorm

STEPS, EPOCHS = 5, 3  # an epoch's, the last batch is smaller; a fit's
FULL = "No space left on device"


# --- the fit


def make_learn(workers=False):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), RunningBatchNorm(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    x, y = torch.randn(26 + 12, 4), torch.randint(0, 3, (26 + 12,))
    train = BatchLoader(x[:26], y[:26], 6, shuffle=True)
    if workers:
        train = DataLoader(Mortal(x[:26], y[:26]), 6, shuffle=True, num_workers=1, multiprocessing_context="fork")
    data = DataBunch(train, BatchLoader(x[26:], y[26:], 6), c=3, c_in=1)
    return Learner(model, torch.optim.Adam(model.parameters(), lr=0.01), F.cross_entropy, data)


class Mortal(Dataset):
    """Samples of which one ends the worker that asks for it, while they are `deadly`."""

    deadly = False

    def __getitem__(self, i):
        if Mortal.deadly and torch.utils.data.get_worker_info() is not None and i == 11:
            os._exit(3)
        return super().__getitem__(i)


def make_run(folder, *cbs, keep=2, **kwargs):
    own = [Recorder(), AvgStatsCallback(accuracy), ProgressCallback(), CSVLogger(folder / "h.csv"), HaltOnNaN()]
    own += [ParamMagnitudes(), EMA(0.9), ParamScheduler("lr", sched_cos(0.02, 0.001))]
    return Runner([*own, Checkpoint(folder / "c", every=2, keep=keep, **kwargs), *cbs])


def everything(learn, run, folder):
    """All that a fit leaves, but for seconds."""
    opt = {f"opt {i} {k}": v for i, s in learn.opt.state_dict()["state"].items() for k, v in s.items()}
    values = {f"magnitudes {k}": v for k, v in run.param_magnitudes.values.items()}
    averages = {f"average {k}": v for k, v in run.ema.weights.items()}
    rows = {"history": rows_of(run), "file": rows_in(folder)}
    steps = {"losses": run.recorder.losses, "lrs": run.recorder.lrs, "steps": run.param_magnitudes.steps}
    random = {"random": torch.get_rng_state(), "n_iter": run.n_iter}
    return {**learn.model.state_dict(), **opt, **values, **averages, **rows, **steps, **random}


def rows_of(run):
    return [{k: v for k, v in row.items() if k != "time"} for row in run.avg_stats.history]


def rows_in(folder):
    with open(folder / "h.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k != "time"} for row in csv.DictReader(f)]


def check_same(a, b):
    assert list(a) == list(b)
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the fit leaves that nothing strikes."""

    @cache
    def fitted(workers=False):
        folder = tmp_path_factory.mktemp("whole")
        run, learn = make_run(folder), make_learn(workers)
        run.fit(EPOCHS, learn)
        left = everything(learn, run, folder)
        assert len(left["losses"]) == len(left["lrs"][0]) == EPOCHS * STEPS and len(left["file"]) == EPOCHS
        return left

    return fitted


# --- after a fault


def check_kept(run, learn, folder, whole, losses, epochs, newest):
    """Histories hold `losses` steps and `epochs` epochs, and the checkpoint after `newest` steps opens."""
    assert run.recorder.losses == whole["losses"][:losses]
    assert [lrs[:losses] for lrs in whole["lrs"]] == run.recorder.lrs
    assert rows_of(run) == whole["history"][:epochs]
    if epochs:
        assert rows_in(folder) == whole["file"][:epochs]
    steps = run.param_magnitudes.steps
    assert steps == whole["steps"][: len(steps)] and len(steps) in (losses - 1, losses)
    file = checkpoint_file.files(folder / "c")[-1][1]
    state = checkpoint_file.read(file)
    assert state["position"]["n_iter"] in (newest if isinstance(newest, set) else {newest})
    if state["position"]["n_iter"] == run.n_iter == losses:
        now = learn.model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in state["model"].items()), "the weights as trained"
    left = [p.name for p in folder.rglob("*") if p.name.startswith(".") or p.name.endswith(".tmp")]
    assert left == [], "temporary files"


def check_clean(run, learn):
    """Nothing of the fit stays on model, optimiser, run or process."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(m, name) for m in learn.model.modules() for name in hooks)
    assert not learn.opt._optimizer_step_pre_hooks and not learn.opt._optimizer_step_post_hooks
    assert not any(p._backward_hooks for p in learn.model.parameters())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run.logger is print and run._parts.claims == {} and not run.loss.requires_grad
    assert run.model is learn.model and run.opt is learn.opt


def check_resumes(folder, whole, workers=False):
    """From its newest checkpoint, in the same folder, as a new process would."""
    run, learn = make_run(folder), make_learn(workers)
    torch.manual_seed(99)
    run.fit(EPOCHS, learn, resume=folder / "c")
    assert run.stop_reason is None
    check_same(everything(learn, run, folder), whole)


def check_nothing_is_lost(run, learn, folder, whole, losses, epochs, newest):
    check_kept(run, learn, folder, whole, losses, epochs, newest)
    check_clean(run, learn)
    check_resumes(folder, whole)


# --- the faults


class Fails(Callback):
    """Calls `what()` in `event`, once there are `step` steps, in training or validation; of all callbacks the last."""

    _order = 10**6

    def __init__(self, event, what, step=0, in_train=True):
        self.event, self.what, self.step, self.only_in_train, self.done = event, what, step, in_train, False

    def _at(self, event):
        run = self.run
        here = event == self.event and run.n_iter >= self.step and run.in_train == self.only_in_train
        if here and not self.done:
            self.done = True
            self.what()

    def begin_epoch(self):
        self._at("begin_epoch")

    def begin_batch(self):
        self._at("begin_batch")

    def after_pred(self):
        self._at("after_pred")

    def after_loss(self):
        self._at("after_loss")

    def after_backward(self):
        self._at("after_backward")

    def after_step(self):
        self._at("after_step")

    def after_batch(self):
        self._at("after_batch")

    def begin_validate(self):
        self._at("begin_validate")

    def after_epoch(self):
        self._at("after_epoch")

    def after_fit(self):
        self._at("after_fit")

    def state_dict(self):
        return {}


def breaks(text="broken", kind=ValueError):
    def raise_it():
        raise kind(text)

    return raise_it


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


EVENTS = {  # of the last callback: losses that are known, and steps that the newest checkpoint has
    "begin_epoch": (5, 5, 4, {"step": 5, "in_train": True}),
    "begin_batch": (8, 8, 8, {"step": 8}),
    "after_loss": (9, 8, 8, {"step": 8}),
    "after_backward": (9, 8, 8, {"step": 8}),
    "after_step": (9, 9, 8, {"step": 8}),
    "after_batch": (9, 9, 8, {"step": 9}),
    "begin_validate": (10, 10, 10, {"step": 10, "in_train": False}),
    "after_epoch": (10, 10, 10, {"step": 10, "in_train": False}),
}


@pytest.mark.parametrize("event", EVENTS)
def test_an_exception_in_the_last_callback(event, whole, tmp_path):
    losses, _, newest, where = EVENTS[event]
    run, learn = make_run(tmp_path, Fails(event, breaks(), **where)), make_learn()
    with pytest.raises(ValueError, match="broken"):
        run.fit(EPOCHS, learn)
    assert run.stop_reason.startswith(f"ValueError in Fails.{event}, ") and run.stop_reason.endswith(": broken")
    check_nothing_is_lost(run, learn, tmp_path, whole(), losses, 2 if event == "after_epoch" else 1, newest)


@pytest.mark.parametrize("n_iter", [5, 10])
def test_ctrl_c_in_validation(n_iter, whole, tmp_path, capfd):
    run, learn = make_run(tmp_path, Fails("after_pred", ctrl_c, n_iter, in_train=False)), make_learn()
    run.fit(EPOCHS, learn)
    epoch = n_iter // STEPS - 1
    assert run.stop_reason == f"interrupted (Ctrl-C) in validation, epoch {epoch}, batch 0"
    assert "saving a checkpoint" in capfd.readouterr().err
    check_nothing_is_lost(run, learn, tmp_path, whole(), n_iter, epoch, n_iter)


def test_a_second_ctrl_c_in_validation_at_once(whole, tmp_path):
    def twice():
        ctrl_c()
        ctrl_c()

    run, learn = make_run(tmp_path, Fails("after_pred", twice, 10, in_train=False)), make_learn()
    run.fit(EPOCHS, learn)
    assert run.stop_reason.startswith("interrupted (Ctrl-C) in validation, epoch 1")
    check_nothing_is_lost(run, learn, tmp_path, whole(), 10, 1, 10)


class Breaks:
    """A loader that raises after `n` batches of its pass number `at`."""

    def __init__(self, loader, n, at):
        self.loader, self.n, self.at, self.passes = loader, n, at, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return self._from(iter(self.loader), 0)

    def _from(self, batches, first):
        self.passes += 1
        for i, batch in enumerate(batches, first):
            if self.passes == self.at and i == self.n:
                raise OSError(errno.EIO, "Input/output error", "images-07.bin")
            yield batch

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def iter_from(self, done):
        return self._from(self.loader.iter_from(done), done)


@pytest.mark.parametrize("which, losses, newest", [("train_dl", 8, 8), ("valid_dl", 10, 10)])
def test_a_loader_that_raises_midway(which, losses, newest, whole, tmp_path):
    run, learn = make_run(tmp_path), make_learn()
    setattr(learn.data, which, Breaks(getattr(learn.data, which), 3 if which == "train_dl" else 1, 2))
    with pytest.raises(OSError, match="Input/output error: 'images-07.bin'"):
        run.fit(EPOCHS, learn)
    assert "OSError in" in run.stop_reason and "epoch 1, batch" in run.stop_reason and "images-07" in run.stop_reason
    check_nothing_is_lost(run, learn, tmp_path, whole(), losses, 1, newest)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the worker is to be a fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # beside threads, from Python 3.12 on
def test_a_worker_process_that_dies(whole, tmp_path, monkeypatch):
    class Kills(Callback):
        def begin_epoch(self):  # workers are started after it
            monkeypatch.setattr(Mortal, "deadly", self.run.epoch == 1)

        def state_dict(self):
            return {}

    expected = whole(True)
    run, learn = make_run(tmp_path, Kills()), make_learn(workers=True)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid\(s\) \d+\) exited unexpectedly"):
        run.fit(EPOCHS, learn)
    assert "exited unexpectedly" in run.stop_reason and "in training" in run.stop_reason
    n = len(run.recorder.losses)
    assert 5 <= n < 10
    check_kept(run, learn, tmp_path, expected, n, 1, {4, 6, 8})  # PyTorch raises it whatever the step is at
    check_clean(run, learn)
    monkeypatch.setattr(Mortal, "deadly", False)
    check_resumes(tmp_path, expected, workers=True)


# --- the disk


class Disk:
    """Writes of files whose name has `part` in it: those of the numbers `full`, from 1, end in the middle."""

    def __init__(self, monkeypatch, part, full, what=None):
        self.part, self.full, self.count = part, full, 0
        self.what = what or breaks_full
        monkeypatch.setattr(util, "open", self.open, raising=False)

    @contextmanager
    def open(self, path, mode):
        with open(path, mode) as f:
            self.count += self.part in str(path)
            if self.part in str(path) and self.count in self.full:
                f = Half(f, self.what)
            yield f


class Half:
    def __init__(self, file, what):
        self.file, self.what = file, what

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.what()

    def __getattr__(self, name):
        return getattr(self.file, name)


def breaks_full():
    raise OSError(errno.ENOSPC, FULL)


def test_a_disk_that_is_full_for_one_checkpoint(whole, tmp_path, monkeypatch):
    disk = Disk(monkeypatch, "checkpoint-", {3})
    run, learn = make_run(tmp_path), make_learn()
    with pytest.warns(RuntimeWarning, match=rf"step-6.pt could not be written \({FULL}.* Training goes on"):
        run.fit(EPOCHS, learn)
    assert disk.count == 8, "7 of steps, of which one failed, and that of the end"
    check_same(everything(learn, run, tmp_path), whole())
    check_kept(run, learn, tmp_path, whole(), EPOCHS * STEPS, EPOCHS, EPOCHS * STEPS)


def test_a_disk_that_stays_full(whole, tmp_path, monkeypatch):
    Disk(monkeypatch, "checkpoint-", {3, 4})
    run, learn = make_run(tmp_path), make_learn()
    with pytest.warns(RuntimeWarning, match="Training goes on"), pytest.raises(CheckpointError, match=FULL):
        run.fit(EPOCHS, learn)
    assert run.stop_reason.startswith("CheckpointError in Checkpoint.after_batch, in training, epoch 1, batch 2: ")
    assert "checkpoint-0002-step-4.pt, is intact. Free disk space and resume from it" in run.stop_reason
    check_nothing_is_lost(run, learn, tmp_path, whole(), 8, 1, 4)


def test_a_disk_that_is_full_for_the_history(whole, tmp_path, monkeypatch):
    Disk(monkeypatch, "h.csv", {2})
    run, learn = make_run(tmp_path), make_learn()
    with pytest.raises(OSError, match=rf"{FULL}: '.*h.csv'"):
        run.fit(EPOCHS, learn)
    assert run.stop_reason.startswith("OSError in CSVLogger.after_epoch") and "h.csv" in run.stop_reason
    assert rows_in(tmp_path) == whole()["file"][:1], "the old file is whole"
    assert rows_of(run) == whole()["history"][:2], "and the new row is in memory"
    check_clean(run, learn)
    check_resumes(tmp_path, whole())


def test_ctrl_c_in_the_middle_of_a_write(whole, tmp_path, monkeypatch):
    Disk(monkeypatch, "checkpoint-", {4}, ctrl_c)
    run, learn = make_run(tmp_path, on_interrupt=False), make_learn()
    run.fit(EPOCHS, learn)
    assert run.stop_reason == "interrupted (Ctrl-C) in training, epoch 1, batch 2"
    check_nothing_is_lost(run, learn, tmp_path, whole(), 8, 1, 6)


LIMITED = """
    import resource, sys, warnings
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    import test_faults as t

    class Fills(t.Callback):
        def begin_batch(self):
            if self.run.n_iter == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

        def state_dict(self):
            return {}

    folder = Path(sys.argv[2])
    run = t.make_run(folder, Fills())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(t.EPOCHS, t.make_learn())
    except t.CheckpointError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        (folder / "reason").write_text(run.stop_reason)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files there")
def test_files_that_may_not_grow_for_real(whole, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    reason = (tmp_path / "reason").read_text()
    assert "in training, epoch 1, batch 2" in reason and "could not be written (File too large)" in reason
    assert max(p.name for p in (tmp_path / "c").iterdir()) == "checkpoint-0002-step-4.pt"
    assert len(list((tmp_path / "c").iterdir())) == 2 and rows_in(tmp_path) == whole()["file"][:1]
    check_resumes(tmp_path, whole())


# --- two at once


def test_an_exception_in_after_fit_while_another_is_on_its_way(whole, tmp_path, capsys):
    ends = Fails("after_fit", breaks("as well", KeyError))
    run, learn = make_run(tmp_path, ends, Fails("after_backward", breaks(), 8)), make_learn()
    with pytest.raises(ValueError, match="broken"):
        run.fit(EPOCHS, learn)
    assert run.stop_reason.startswith("ValueError in Fails.after_backward, in training, epoch 1, batch 3: broken")
    told = capsys.readouterr().err
    assert "one more error, in after_fit" in told and "KeyError: 'as well'" in told
    check_nothing_is_lost(run, learn, tmp_path, whole(), 9, 1, 8)


def test_an_exception_in_after_fit_after_ctrl_c_in_validation(whole, tmp_path):
    ends = Fails("after_fit", breaks(), in_train=False)
    run, learn = make_run(tmp_path, ends, Fails("after_pred", ctrl_c, 10, in_train=False)), make_learn()
    with pytest.raises(ValueError, match="broken"):
        run.fit(EPOCHS, learn)
    assert "ValueError in Fails.after_fit" in run.stop_reason
    check_nothing_is_lost(run, learn, tmp_path, whole(), 10, 1, 10)


def test_a_full_disk_after_ctrl_c_in_validation(whole, tmp_path, monkeypatch):
    Disk(monkeypatch, "checkpoint-", {6})
    run, learn = make_run(tmp_path, Fails("after_pred", ctrl_c, 10, in_train=False)), make_learn()
    with pytest.raises(CheckpointError, match=FULL):
        run.fit(EPOCHS, learn)
    assert f"could not be written ({FULL}" in run.stop_reason
    check_nothing_is_lost(run, learn, tmp_path, whole(), 10, 1, 10)


def test_a_nan_and_a_full_disk(whole, tmp_path, monkeypatch):
    """The one that ends the fit is named; that of before is a warning."""
    Disk(monkeypatch, "checkpoint-", {4})

    class Spoils(Callback):
        def after_pred(self):
            if self.run.in_train and self.run.n_iter == 8:
                self.run.pred = self.run.pred * torch.nan

        def state_dict(self):
            return {}

    run, learn = make_run(tmp_path, Spoils()), make_learn()
    with pytest.warns(RuntimeWarning, match=FULL):
        run.fit(EPOCHS, learn)
    assert run.halt_on_nan.report.step == 8 and "step 8" in run.stop_reason
    assert run.recorder.losses[:8] == whole()["losses"][:8] and len(run.recorder.losses) == 9
    check_clean(run, learn)
    check_resumes(tmp_path, whole())


# --- the command line


@cache
def small():
    return glyphs(72, 24)


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """Runs the command line here, in an empty folder: cli("train", …) gives status and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_train, "load_dataset", lambda *a: small())
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")

    def run(*args):
        status = main([*map(str, args)])
        return status, "".join(capfd.readouterr())

    return run


TRAIN = ("train", "glyphs", "--epochs", 2, "--checkpoint-every", 4, "--cb", "EMA", "--out")  # 9 steps an epoch


def strike(monkeypatch, event, what, step, in_train=True):
    """Once, in the fit that comes next."""
    fails = Fails(event, what, step, in_train)

    def fail(self):
        vars(fails)["run"] = self.run
        fails._at(event)

    monkeypatch.setattr(ParamMagnitudes, event, fail, raising=False)
    return nullcontext()


COMMAND_FAULTS = {
    "an exception": (partial(strike, event="begin_batch", what=breaks(), step=12), 1, "ValueError in ", 12),
    "Ctrl-C in validation": (
        partial(strike, event="after_pred", what=ctrl_c, step=9, in_train=False),
        130,
        "interrupted (Ctrl-C) in validation, epoch 0, batch 0; results in a; go on with: fastrbn train --resume a",
        9,
    ),
    "a full disk": (lambda m: Disk(m, "checkpoint-", {3, 4, 5}), 1, f"could not be written ({FULL}", 8),
    "a loader": (None, 1, "OSError in training, epoch 1, batch 2", 12),
}


@pytest.mark.parametrize("fault", COMMAND_FAULTS)
def test_the_command_goes_on_after(fault, cli, monkeypatch):
    how, status, text, newest = COMMAND_FAULTS[fault]
    assert cli(*TRAIN, "whole")[0] == 0
    with monkeypatch.context() as m, pytest.warns(RuntimeWarning) if "disk" in fault else nullcontext():
        if how is None:
            made = cli_train.build_data

            def databunch(*args, **kwargs):
                data = made(*args, **kwargs)
                data.train_dl = Breaks(data.train_dl, 3, 2)
                return data

            m.setattr(cli_train, "build_data", databunch)
        else:
            how(m)
        got, told = cli(*TRAIN, "a")
    assert got == status and text in told, told
    assert ("Traceback" in told) == (fault in ("an exception", "a loader")), "a full disk is no fault of the code"
    found = checkpoint_file.files("a/checkpoints")[-1][1]
    assert checkpoint_file.read(found)["position"]["n_iter"] == newest
    assert not [p for p in Path("a").rglob("*") if p.name.startswith(".")]
    got, told = cli("train", "--resume", "a")
    assert got == 0 and f"going on from {found}" in told
    a, b = (torch.load(f"{folder}/model.pt", weights_only=True) for folder in ("whole", "a"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    x, y = ([r.rpartition(",")[0] for r in Path(f, "history.csv").read_text().splitlines()] for f in ("whole", "a"))
    assert x == y and len(x) == 3


@pytest.mark.parametrize("before", [0, 5], ids=["from the start", "within the fit"])
def test_the_command_says_what_a_full_disk_has_kept_it_from_writing(before, cli, monkeypatch):
    with monkeypatch.context() as m, pytest.warns(RuntimeWarning) if before else nullcontext():
        Disk(m, "a/", range(before, 99))  # after 5: config.json, checkpoints of 4 and 8, history.csv
        status, told = cli(*TRAIN, "a")
    assert status == 1
    if not before:
        assert told.endswith(
            f"error: a/config.json could not be written: {FULL}; make room, or choose another folder with --out\n"
        )
        assert "Traceback" not in told
        return
    assert "Traceback" not in told
    assert "error: CheckpointError in Checkpoint.after_batch, in training, epoch 1, batch 6: the checkpoint" in told
    for name in ("model.pt", "history.csv", "curves.png", "config.json"):
        assert f"error: a/{name} could not be written: " in told
    assert cli("train", "--resume", "a")[0] == 0
