"""`fastrbn train --checkpoint-every` and `--resume`: what is continued, and what is refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch

import fastrbn
from fastrbn import _cli_results, _cli_train
from fastrbn._cli_args import given
from fastrbn.callbacks import Recorder
from fastrbn.cli import main
from fastrbn.data import glyphs

ROOT = Path(fastrbn.__file__).parents[1]
STEPS = 25  # an epoch


@cache
def small():
    return glyphs(200, 100)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Runs the command line here, in an empty folder: cli("train", …) gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTRBN_DATA", raising=False)
    monkeypatch.setattr(_cli_train, "load_dataset", lambda *a: small())
    monkeypatch.setattr(_cli_results, "_png", lambda figure: b"a picture")

    def run(*args):
        status = main([*map(str, args)])
        return status, *capsys.readouterr()

    return run


def stop_after(step, monkeypatch, by):
    """Ends the next fit by calling `by` after that many steps."""

    def after_step(self):
        if self.run.n_iter + 1 == step:
            monkeypatch.delattr(Recorder, "after_step")
            by()

    monkeypatch.setattr(Recorder, "after_step", after_step, raising=False)


def crash():
    raise ZeroDivisionError("power cut")


def rows(path):
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if k != "time"} for row in csv.DictReader(f)]


def check_same(a, b):
    x, y = (torch.load(f"{folder}/model.pt", weights_only=True) for folder in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert rows(f"{a}/history.csv") == rows(f"{b}/history.csv")


def config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


@pytest.mark.parametrize("step", [4, 31, 50])
def test_a_run_that_broke_off_ends_as_the_whole_one(step, cli, monkeypatch):
    arguments = ("train", "glyphs", "--epochs", 2, "--seed", 3, "--sched", "1cycle", "--checkpoint-every", 5, "--out")
    assert cli(*arguments, "whole")[0] == 0
    stop_after(step, monkeypatch, crash)
    assert cli(*arguments, "a")[0] == 1
    started = config("a")["started"]
    status, out, err = cli("train", "--resume", "a")
    assert (status, err) == (0, "")
    last = 5 * ((step - 1) // 5)
    wanted = f"going on from a/checkpoints/checkpoint-{last // 5:04d}-step-{last}.pt"
    assert (wanted if last else "ended before its first") in out and "done: 2 epochs" in out
    check_same("whole", "a")
    assert config("a")["started"] == started and len(config("a")["resumed"]) == 1
    assert config("a")["command"] == config("whole")["command"].replace("whole", "a")
    assert config("a")["result"]["steps"] == 50


def test_ctrl_c_says_how_to_go_on_and_loses_no_step(cli, monkeypatch):
    arguments = ("train", "glyphs", "--checkpoint-every", 1000, "--out")
    assert cli(*arguments, "whole")[0] == 0
    stop_after(17, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    status, _, err = cli(*arguments, "a")
    assert status == 130 and err.endswith("results in a; go on with: fastrbn train --resume a\n")
    assert os.listdir("a/checkpoints") == ["checkpoint-0001-step-17.pt"]
    assert cli("train", "--resume", "a")[0] == 0
    check_same("whole", "a")


def test_a_finished_run_is_left_as_it_is_and_more_epochs_train_on(cli):
    assert cli("train", "glyphs", "--checkpoint-every", 10, "--out", "a")[0] == 0
    before = rows("a/history.csv")
    assert cli("train", "--resume", "a")[0] == 0
    assert rows("a/history.csv") == before and config("a")["result"]["steps"] == STEPS
    assert cli("train", "--resume", "a", "--epochs", 3)[0] == 0
    after = rows("a/history.csv")
    assert after[0] == before[0] and len(after) == 3 and config("a")["epochs"] == 3
    assert config("a")["result"]["steps"] == 3 * STEPS
    status, _, err = cli("train", "--resume", "a", "--epochs", 1)
    assert status == 1 and "beyond the end of a fit of 1" in err and "Traceback" not in err
    assert rows("a/history.csv") == after


@pytest.mark.parametrize(
    "extra, text",
    [
        (("--bs", 16), "--bs does not go with --resume: the run has 8, got 16"),
        (("fashion",), "DATA does not go with --resume: the run has glyphs, got fashion"),
        (("--out", "b"), "--out does not go with --resume"),
        (("--force",), "--force does not go with --resume"),
        (("--cb", "SaveBest"), "--cb does not go with --resume"),
    ],
    ids=str,
)
def test_arguments_that_would_make_another_run_are_refused(extra, text, cli):
    cli("train", "glyphs", "--limit", 100, "--checkpoint-every", 100, "--out", "a")
    status, _, err = cli("train", "--resume", "a", *extra)
    assert status == 2 and text in err
    assert cli("train", "glyphs", "--resume", "a", "--bs", 8, "--checkpoint-every", 5)[0] == 0


def test_what_cannot_be_resumed_says_why(cli, tmp_path):
    assert cli("train", "glyphs", "--limit", 40, "--out", "plain")[0] == 0
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[1")
    for folder, text in {
        "plain": "trained with --checkpoint-every; plain was not",
        "nowhere": "nowhere/config.json cannot be read: No such file",
        "odd": "odd/config.json is no configuration of a run",
    }.items():
        status, _, err = cli("train", "--resume", folder)
        assert status == 2 and text in err


def test_when_no_checkpoint_is_whole_the_results_stay(cli):
    cli("train", "glyphs", "--limit", 80, "--checkpoint-every", 4, "--out", "a")
    for file in Path("a/checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    before = Path("a/model.pt").read_bytes()
    status, _, err = cli("train", "--resume", "a")
    assert status == 1 and "is not whole" in err and "Traceback" not in err
    assert Path("a/model.pt").read_bytes() == before


def test_force_drops_the_checkpoints_of_the_run_before(cli):
    cli("train", "glyphs", "--limit", 80, "--checkpoint-every", 4, "--out", "a")
    assert cli("train", "glyphs", "--limit", 80, "--checkpoint-every", 9, "--out", "a", "--force")[0] == 0
    assert sorted(os.listdir("a/checkpoints")) == ["checkpoint-0001-step-9.pt", "checkpoint-0002-step-10.pt"]


def test_options_that_were_given_are_known_also_when_they_have_their_default():
    assert given(["train", "--resume", "a", "--bs", "8", "--cb", "X", "--no-halt"]) == {"resume", "bs", "cb", "no_halt"}
    assert given(["train", "mnist"]) == {"data"}


def test_after_kill_9_the_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_cli_results, "_png", lambda figure: b"a picture")
    arguments = ["glyphs", "--limit=400", "--epochs=99", "--threads=1", "--checkpoint-every=20", "--out"]
    command = [sys.executable, "-W", "error", "-m", "fastrbn", "train", *arguments, str(tmp_path / "a")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while not list(tmp_path.glob("a/checkpoints/*-step-60.pt")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it is still at it"
    epochs = 1 + max(int(file.stem.split("-")[-1]) for file in (tmp_path / "a" / "checkpoints").iterdir()) // 50
    assert main(["train", "--resume", str(tmp_path / "a"), "--epochs", str(epochs)]) == 0
    assert "going on from " in capsys.readouterr().out
    assert [row["epoch"] for row in rows(tmp_path / "a" / "history.csv")] == [str(n) for n in range(epochs)]
