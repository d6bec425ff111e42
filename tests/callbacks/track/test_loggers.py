"""Loggers: which numbers come, at which step, and what the files hold after fits, kills and resumed fits."""

import csv
import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrbn.callbacks import (
    AvgStatsCallback,
    Checkpoint,
    CSVLogger,
    JSONLLogger,
    Log,
    Recorder,
    TensorBoardLogger,
    accuracy,
)
from fastrbn.callbacks.track import loggers
from fastrbn.learn import Callback, Runner
from fastrbn.util import write_whole


def make_run(path, *cbs, metric=accuracy, **kwargs):
    run = Runner([CSVLogger(path, **kwargs), AvgStatsCallback(metric), *cbs])
    run.logger = lambda line: None
    return run


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def check(rows, history):
    assert [list(r) for r in rows] == [list(h) for h in history]
    for row, entry in zip(rows, history):
        assert {k: None if v == "" else float(v) for k, v in row.items()} == entry


def test_there_is_a_row_for_each_epoch(make_learn, tmp_path):
    run = make_run(tmp_path / "runs" / "a" / "history.csv")
    run.fit(3, make_learn())
    check(read(tmp_path / "runs" / "a" / "history.csv"), run.avg_stats.history)


def test_a_value_that_was_not_measured_is_an_empty_cell(make_learn, tmp_path):
    run = make_run(tmp_path / "h.csv")
    run.fit(1, make_learn(n_valid=0))
    assert read(tmp_path / "h.csv")[0]["valid_loss"] == ""


def test_the_file_is_complete_after_each_epoch(make_learn, tmp_path):
    class Reads(Callback):
        _order = 99

        def after_epoch(self):
            check(read(tmp_path / "h.csv"), self.run.avg_stats.history)
            assert os.listdir(tmp_path) == ["h.csv"], "a temporary file is left"

    run = make_run(tmp_path / "h.csv", Reads())
    run.fit(3, make_learn())
    assert len(run.avg_stats.history) == 3


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_rows_survive_whatever_ends_the_fit(make_learn, tmp_path, error):
    class Ends(Callback):
        def begin_epoch(self):
            if self.run.epoch == 2:
                raise error

    run = make_run(tmp_path / "h.csv", Ends())
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(5, make_learn())
    else:
        run.fit(5, make_learn())
    assert [r["epoch"] for r in read(tmp_path / "h.csv")] == ["0", "1"]


@pytest.mark.parametrize(("append", "epochs"), [(False, ["0"]), (True, ["0", "1", "0"])])
def test_a_second_fit_overwrites_or_appends(make_learn, tmp_path, append, epochs):
    run, learn = make_run(tmp_path / "h.csv", append=append), make_learn()
    run.fit(2, learn)
    run.fit(1, learn)
    assert [r["epoch"] for r in read(tmp_path / "h.csv")] == epochs


def test_appending_to_other_columns_is_an_error_and_leaves_the_file(make_learn, tmp_path):
    path = tmp_path / "h.csv"
    make_run(path).fit(1, make_learn())
    before = path.read_text()
    with pytest.raises(ValueError, match="needs a file with the columns epoch, train_loss, valid_loss.*has epoch"):
        make_run(path, metric=None, append=True).fit(1, make_learn())
    assert path.read_text() == before


def test_appending_to_a_file_that_is_not_text_is_an_error_and_leaves_the_file(make_learn, tmp_path):
    path = tmp_path / "h.csv"
    path.write_bytes(b"epoch,train_loss\xff\n")
    with pytest.raises(ValueError, match=r"append=True\) needs a CSV file in UTF-8; .*h.csv is not: 'utf-8' codec"):
        make_run(path, append=True).fit(1, make_learn())
    assert path.read_bytes() == b"epoch,train_loss\xff\n"


def test_without_averages_the_error_says_what_to_add(make_learn, tmp_path):
    with pytest.raises(ValueError, match="CSVLogger needs an AvgStatsCallback in the run, whose history it writes"):
        Runner([CSVLogger(tmp_path / "h.csv")]).fit(1, make_learn())


def test_a_subclass_of_avg_stats_works(make_learn, tmp_path):
    class MyAverages(AvgStatsCallback):
        pass

    run = Runner([MyAverages(accuracy), CSVLogger(tmp_path / "h.csv")])
    run.logger = lambda line: None
    run.fit(1, make_learn())
    assert len(read(tmp_path / "h.csv")) == 1


def test_a_folder_in_place_of_a_file_is_an_error_before_training(make_learn, tmp_path):
    with pytest.raises(IsADirectoryError, match=r"add a name, history\.csv"):
        make_run(tmp_path).fit(1, make_learn())


# --- whole files


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a" / "b.txt", "old")

    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff"])
def test_text_and_bytes_are_written_unchanged(tmp_path, content):
    path = write_whole(str(tmp_path / "f"), content)
    assert isinstance(path, Path)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)


# --- TensorBoard


@pytest.fixture
def writers(monkeypatch):
    """Replaces the package tensorboard; returns the list of calls."""
    made = []

    class SummaryWriter:
        def __init__(self, path, purge_step=None):
            self.path, self.purge_step, self.scalars, self.calls = path, purge_step, [], []
            made.append(self)

        def add_scalar(self, tag, value, step):
            self.scalars.append((tag, step, value))

        def flush(self):
            self.calls.append("flush")

        def close(self):
            self.calls.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    return made


def test_tensorboard_gets_every_nth_step_and_the_averages_over_the_steps(make_learn, tmp_path, writers):
    run = Runner([Recorder(), AvgStatsCallback(accuracy), TensorBoardLogger(tmp_path / "tb", every=3)])
    run.logger = lambda line: None
    run.fit(2, make_learn())
    (writer,) = writers
    assert writer.path == str(tmp_path / "tb") and writer.purge_step is None
    assert writer.calls == ["flush", "flush", "close"]
    steps = [(step, value) for tag, step, value in writer.scalars if tag == "loss/step"]
    assert steps == [(n, run.recorder.losses[n]) for n in (0, 3, 6)]
    assert [step for tag, step, value in writer.scalars if tag == "lr" and value == 0.1] == [0, 3, 6]
    for which in ("train", "valid"):
        for what in ("loss", "accuracy"):
            found = [(step, value) for tag, step, value in writer.scalars if tag == f"{what}/{which}"]
            assert found == [(4 * (i + 1), row[f"{which}_{what}"]) for i, row in enumerate(run.avg_stats.history)]


def test_tensorboards_steps_go_on_over_fits(make_learn, tmp_path, writers):
    run, learn = Runner([TensorBoardLogger(tmp_path, every=2)]), make_learn()
    for _ in range(2):
        run.fit(1, learn)
    assert [[step for tag, step, _ in w.scalars if tag == "loss/step"] for w in writers] == [[0, 2], [4, 6]]


def test_a_resumed_tensorboard_discards_what_came_after_the_checkpoint(make_learn, tmp_path, writers):
    def make():
        return make_logged(TensorBoardLogger(tmp_path / "tb", every=1), Checkpoint(tmp_path / "c", keep=None))

    run, learn = make(), make_learn()
    run.fit(1, learn)  # one that is not resumed
    run.fit(2, learn)
    run = make()
    run.fit(2, make_learn(), resume=sorted((tmp_path / "c").iterdir())[1])
    assert writers[-1].purge_step == 4 + 4
    assert [step for tag, step, _ in writers[-1].scalars if tag == "loss/step"] == [8, 9, 10, 11]
    averages = [[s for s in w.scalars if s[0] == "loss/valid"] for w in writers[1:]]
    assert averages[1][0] == averages[0][0] and [step for _, step, _ in averages[1]] == [8, 12]


def test_tensorboard_keeps_the_steps_before_an_error_and_is_closed(make_learn, tmp_path, writers):
    class Ends(Callback):
        def begin_batch(self):
            if self.run.n_iter == 2:
                raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Runner([TensorBoardLogger(tmp_path / "tb", every=1), Ends()]).fit(1, make_learn())
    assert [step for tag, step, _ in writers[0].scalars if tag == "loss/step"] == [0, 1]
    assert writers[0].calls == ["close"]


def test_without_tensorboard_the_error_comes_before_training_and_says_what_to_install(
    make_learn, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    learn = make_learn()
    before = learn.model[0].weight.clone()
    with pytest.raises(ImportError, match=r'pip install "fastrbn\[tensorboard\]", or use CSVLogger'):
        Runner([TensorBoardLogger(tmp_path)]).fit(1, learn)
    assert torch.equal(before, learn.model[0].weight) and os.listdir(tmp_path) == []


def test_tensorboards_arguments_are_checked(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(ValueError, match="needs a folder; got the file"):
        TensorBoardLogger(tmp_path / "f")
    with pytest.raises(ValueError, match="every must be a whole number, 1 or more; got 0"):
        TensorBoardLogger(every=0)


def test_the_real_tensorboard_can_read_it(make_learn, tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of its dependencies
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = Runner([Recorder(), TensorBoardLogger(tmp_path, every=1)])
        run.fit(1, make_learn())
        read = EventAccumulator(str(tmp_path))
        read.Reload()
    assert [e.value for e in read.Scalars("loss/step")] == pytest.approx(run.recorder.losses)


# --- Log: any function


class Calls:
    """Functions with the signatures of wandb.log and mlflow.log_metrics, which write their calls down."""

    def __init__(self):
        self.rows = []

    def log(self, data, step=None, commit=None, sync=None):
        self.rows.append((step, data))

    def log_metrics(self, metrics, step=None, synchronous=None, run_id=None):
        assert all(isinstance(v, (int, float)) for v in metrics.values())
        self.rows.append((step, metrics))


def make_logged(*loggers):
    run = Runner([AvgStatsCallback(accuracy), Recorder(), *loggers])
    run.logger = lambda line: None
    return run


def test_a_function_gets_plain_numbers_and_steps_that_go_on_over_fits(make_learn):
    wandb, mlflow = Calls(), Calls()
    run, learn = make_logged(Log(wandb.log, every=3), Log(mlflow.log_metrics)), make_learn()
    run.fit(2, learn)
    losses, history = run.recorder.losses, run.avg_stats.history
    run.fit(1, learn)
    steps = [(n, {"step_loss": losses[n], "lr": 0.1}) for n in (0, 3, 6)]
    assert wandb.rows[:5] == [*steps[:2], (4, history[0]), steps[2], (8, history[1])]
    assert [step for step, _ in wandb.rows[5:]] == [8, 11, 12]
    assert mlflow.rows == [(4, history[0]), (8, history[1]), (12, run.avg_stats.history[0])]


def test_what_was_not_measured_is_left_out_and_other_ranks_log_nothing(make_learn, monkeypatch):
    calls = Calls()
    run = make_logged(Log(calls.log_metrics, every=1))
    run.fit(1, make_learn(n_valid=0))
    assert list(calls.rows[-1][1]) == ["epoch", "train_loss", "train_accuracy", "lr", "time"]
    monkeypatch.setattr(loggers, "rank", lambda: 1)
    seen = len(calls.rows)
    run.fit(1, make_learn())
    assert len(calls.rows) == seen


def test_steps_of_a_long_epoch_do_not_wait_for_its_end(make_learn, monkeypatch):
    monkeypatch.setattr(loggers, "_WAIT", 0.0)
    calls = Calls()

    class Looks(Callback):
        def after_batch(self):
            assert not self.run.in_train or len(calls.rows) == self.run.n_iter

    Runner([Log(calls.log, every=1), Looks()]).fit(1, make_learn())


def test_a_log_without_numbers_or_function_is_an_error(make_learn):
    with pytest.raises(ValueError, match="Log has nothing to log: add an AvgStatsCallback to the run.*every=n"):
        Runner([Log(print)]).fit(1, make_learn())
    with pytest.raises(TypeError, match=r"a function of \(numbers, step\), such as wandb.log; got 'history'"):
        Log("history")


# --- JSONLLogger


def lines(path):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def test_json_lines_hold_the_numbers_and_null_for_what_json_has_not(make_learn, tmp_path):
    def nan(pred, yb):
        return torch.tensor(float("nan"))

    path = tmp_path / "runs" / "h.jsonl"
    run = Runner([AvgStatsCallback([accuracy, nan]), Recorder(), JSONLLogger(path, every=2)])
    run.logger = lambda line: None
    run.fit(1, make_learn())
    *steps, epoch = lines(path)
    assert steps == [{"step": n, "step_loss": run.recorder.losses[n], "lr": 0.1} for n in (0, 2)]
    (row,) = run.avg_stats.history
    assert epoch == {"step": 4, **{k: None if "nan" in k else v for k, v in row.items() if k != "time"}}


def test_further_fits_add_lines_and_a_new_logger_overwrites_unless_it_appends(make_learn, tmp_path):
    path, learn = tmp_path / "h.jsonl", make_learn()
    run = make_logged(JSONLLogger(path))
    for _ in range(2):
        run.fit(1, learn)
    assert [row["step"] for row in lines(path)] == [4, 8]
    path.write_text(path.read_text() + '{"step": 9')  # as a kill may leave it
    make_logged(JSONLLogger(path, append=True)).fit(1, learn)
    assert [row["step"] for row in lines(path)] == [4, 8, 4]
    make_logged(JSONLLogger(path)).fit(1, learn)
    assert [row["step"] for row in lines(path)] == [4]


@pytest.mark.parametrize("kept", [3, 4, 7])  # steps at the checkpoint: within an epoch, before its end, in the next one
def test_a_resumed_fit_leaves_the_lines_of_an_uninterrupted_one(make_learn, tmp_path, kept):
    def make(folder):
        return make_logged(
            JSONLLogger(tmp_path / folder / "h.jsonl", every=2), Checkpoint(tmp_path / folder / "c", 1, None)
        )

    for folder in ("a", "b"):
        make(folder).fit(3, make_learn())
    with open(tmp_path / "b" / "h.jsonl", "a") as f:
        f.write('{"step": 1')
    (file,) = (tmp_path / "b" / "c").glob(f"checkpoint-{kept:04}-*.pt")
    make("b").fit(3, make_learn(), resume=file)
    whole = lines(tmp_path / "a" / "h.jsonl")
    assert lines(tmp_path / "b" / "h.jsonl") == whole
    assert [row["step"] for row in whole] == [0, 2, 4, 4, 6, 8, 8, 10, 12]
    (tmp_path / "b" / "h.jsonl").write_text("")
    with pytest.warns(UserWarning, match="lines of earlier steps are missing"):
        make("b").fit(3, make_learn(), resume=file)
