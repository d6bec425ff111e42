"""`fastrbn train --checkpoint-every` and `--resume`: what is continued, and what is refused."""

import csv
import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from functools import cache
from pathlib import Path

import pytest
import torch

import fastrbn
from fastrbn import load_run, util
from fastrbn.callbacks import ParamMagnitudes, Recorder
from fastrbn.cli import main, plugins, run_folder
from fastrbn.cli import train as cli_train
from fastrbn.cli.options import CliError, parser
from fastrbn.data import glyphs, load_dataset
from fastrbn.learn import checkpoint_file
from fastrbn.trainer.settings import default_lr, of_config, settle

ROOT = Path(fastrbn.__file__).parents[1]
STEPS = 25  # an epoch


@cache
def small():
    return glyphs(200, 100)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run the command line here, in an empty folder: cli("train", …) returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTRBN_DATA", raising=False)
    monkeypatch.setattr(cli_train, "load_dataset", lambda *a: small())
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")

    def run(*args):
        status = main([*map(str, args)])
        return status, *capsys.readouterr()

    return run


def stop_after(step, monkeypatch, by):
    """End the next fit by calling `by` after that many steps."""

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


def test_a_resumed_run_ends_as_an_uninterrupted_one(cli, monkeypatch):
    arguments = ("train", "glyphs", "--epochs", 2, "--seed", 3, "--sched", "1cycle", "--checkpoint-every", 5, "--out")
    assert cli(*arguments, "whole")[0] == 0
    for step in (4, 31, 50):
        folder = f"a{step}"
        stop_after(step, monkeypatch, crash)
        assert cli(*arguments, folder)[0] == 1
        started = config(folder)["started"]
        status, out, err = cli("train", "--resume", folder)
        assert (status, err) == (0, ""), step
        last = 5 * ((step - 1) // 5)
        wanted = f"going on from {folder}/checkpoints/checkpoint-{last // 5:04d}-step-{last}.pt"
        assert (wanted if last else "ended before its first") in out and "done: 2 epochs" in out
        check_same("whole", folder)
        assert config(folder)["started"] == started and len(config(folder)["resumed"]) == 1
        assert config(folder)["command"] == config("whole")["command"].replace("whole", folder)
        assert config(folder)["result"]["steps"] == 50


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


# --- whatever fails before training goes on leaves the run as it was


def trained(cli, *extra):
    assert cli("train", "glyphs", "--limit", 80, "--checkpoint-every", 4, "--out", "a", *extra)[0] == 0


def test_a_relative_folder_of_images_and_one_that_was_moved_are_found(cli, tmp_path, monkeypatch):
    def load(name, *args):
        return dataclasses.replace(small(), name="pets", classes=tuple("abcdefghij") if "other" in name else classes)

    def again(data):
        return run_folder.resumed(Path("a"), {"data": data}, "").settings.data

    classes = small().classes
    monkeypatch.setattr(cli_train, "load_dataset", load)
    for folder in ("pets", "moved/pets", "other"):
        (tmp_path / folder).mkdir(parents=True)
    assert cli("train", "pets", "--limit", 8, "--checkpoint-every", 1, "--out", "a")[0] == 0
    assert again("pets") == again("./pets/") == config("a")["arguments"]["data"] == str(tmp_path / "pets")
    with pytest.raises(CliError, match="DATA does not go with --resume"):
        again("moved/pets")
    (tmp_path / "pets").rmdir()
    assert again("moved/pets") == str(tmp_path / "moved" / "pets")
    before = contents("a")
    status, _, err = cli("train", "other", "--resume", "a")
    assert status == 1 and "other has other classes (a, b, c, d, e) than the run" in err and contents("a") == before


def test_a_data_set_is_no_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mnist").mkdir()
    assert run_folder._found("mnist", dataclasses.replace(small(), name="mnist")) == "mnist"


def test_a_resumed_run_that_is_killed_does_not_show_how_it_had_ended(cli, monkeypatch):
    trained(cli)
    told = []
    stop_after(12, monkeypatch, lambda: told.append(config("a")))
    assert cli("train", "--resume", "a", "--epochs", 2)[0] == 0
    assert "result" not in told[0] and config("a")["result"]["steps"] == 20


def test_max_steps_ends_a_run_within_an_epoch_and_more_of_them_go_on(cli):
    trained(cli, "--bs", 16, "--epochs", 2, "--max-steps", 7)
    status, out, _ = cli("train", "--resume", "a", "--max-steps", 9)
    assert status == 0 and "done: 9 steps in" in out and ", 2 epochs or 9 steps, on" in out
    assert json.loads(Path("a/config.json").read_text())["result"]["steps"] == 9


def test_max_steps_without_epochs_takes_as_many_as_it_needs(cli):
    status, out, _ = cli("train", "glyphs", "--limit", 16, "--max-steps", 5, "--checkpoint-every", 9, "--out", "a")
    assert status == 0 and "(linear), 5 steps, on" in out and "done: 5 steps in" in out
    assert [int(row["epoch"]) for row in rows("a/history.csv")] == [0, 1, 2] and config("a")["epochs"] is None
    assert cli("train", "--resume", "a", "--max-steps", 6)[0] == 0 and config("a")["result"]["steps"] == 6


def test_the_row_of_the_best_weights_is_found_among_two_of_an_epoch(cli):
    trained(cli, "--bs", 16, "--epochs", 2, "--max-steps", 7, "--cb", "SaveBest:monitor=train_accuracy")
    assert cli("train", "--resume", "a", "--max-steps", 10)[0] == 0
    run = load_run("a")
    assert [row["epoch"] for row in run.history] == [0, 1, 1]
    assert run.trained["train_accuracy"] == run.results["best"]["train_accuracy"]
    assert run.results["best"]["epoch"] == 1 and run.trained is not run.history[1], "the second row is the better one"


def test_moments_of_the_parameters_are_those_of_a_run_that_max_steps_ends():
    settings = settle({"epochs": 10**6, "max_steps": 20})
    (every,) = [cb.every for cb in cli_train._callbacks(settings, Path(), 100, []) if isinstance(cb, ParamMagnitudes)]
    assert every == 1


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def cut_short(monkeypatch):
    for file in Path("a/checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:1000])


def lose_a_name(monkeypatch):
    """Flip a bit in the archive's directory, in files without a checksum, as older ones were."""
    for file in Path("a/checkpoints").iterdir():
        state = torch.load(file, weights_only=True)
        state.pop("checksum", None)
        torch.save(state, file)
        data = bytearray(file.read_bytes())
        data[data.rindex(b"/data.pkl") - 1] ^= 128
        file.write_bytes(data)


def fail(event, error):
    def failing(monkeypatch):
        def now(self, *args):
            raise error

        monkeypatch.setattr(Recorder, event, now)

    return failing


@pytest.mark.parametrize(
    "fault, status, text",
    [
        (cut_short, 1, "is not whole"),
        (lose_a_name, 1, "is not whole"),
        (lambda m: m.setattr(checkpoint_file, "find", lambda *a: 1 / 0), 1, "ZeroDivisionError"),
        (fail("begin_fit", ValueError("no room")), 1, "no room; the results in a are as they were"),
        (fail("load_state_dict", KeyError("losses")), 1, "the results in a are as they were"),
        (fail("begin_batch", OSError("gone")), 1, "gone; the results in a are as they were"),
        (fail("begin_fit", KeyboardInterrupt()), 130, "interrupted (Ctrl-C)"),
        (lambda m: shutil.rmtree("a/checkpoints"), 1, "the checkpoints of a are gone"),
    ],
)
def test_a_resume_that_fails_before_training_touches_no_result(fault, status, text, cli, monkeypatch):
    trained(cli)
    with monkeypatch.context() as m:
        fault(m)
        before = contents("a")
        got, _, err = cli("train", "--resume", "a", "--epochs", 2)
    assert got == status and text in err
    after = contents("a")
    assert {p: b for p, b in after.items() if p.parent.name != "checkpoints" or p in before} == before


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(cli):
    trained(cli)
    model, newest = Path("a/model.pt").read_bytes(), max(Path("a/checkpoints").iterdir())
    data = bytearray(newest.read_bytes())
    data[data.rindex(b"/data.pkl") - 1] ^= 128
    newest.write_bytes(data)
    with pytest.warns(
        UserWarning, match="damaged .its checksum does not match.*resuming from .*0002-step-8.pt instead"
    ):
        assert cli("train", "--resume", "a")[0] == 0
    assert Path("a/model.pt").read_bytes() == model and config("a")["result"]["steps"] == 10


def test_force_keeps_the_old_results_until_the_new_run_is_made(cli, monkeypatch):
    trained(cli)
    before = contents("a")
    monkeypatch.setattr(cli_train, "get_runner", lambda *a, **kw: int("no net"))
    status, _, err = cli("train", "glyphs", "--out", "a", "--force")
    assert status == 2 and "cannot be trained" in err
    assert contents("a") == before


# --- a run from somebody else


def rewrite(change):
    made = config("a")
    change(made)
    run_folder.write_config(Path("a"), made)


@pytest.mark.parametrize(
    "spec, text",
    [
        ("CSVLogger:path=mine.csv", "writes to mine.csv, which is outside a"),
        ("csv_logger:path='a/../mine.csv'", "writes to a/../mine.csv, which is outside a"),
        ("CSVLogger", "writes to history.csv, which is outside a"),
        ("SaveBest:path=best.pt", "writes to best.pt, which is outside a"),
        ("Checkpoint:path=mine,overwrite=True", "writes to mine, which is outside a"),
        ("HaltOnNaN:path=mine", "writes to mine, which is outside a"),
        ("somebodys:where=['mine.csv']", "gives text to a plug-in"),
        ("somebodys:mode=b'x'", "gives text to a plug-in"),
    ],
)
def test_a_callback_that_reaches_out_of_the_runs_folder_is_resumed_only_when_repeated(spec, text, cli, monkeypatch):
    trained(cli)
    Path("mine.csv").write_text("mine")
    rewrite(lambda made: made["arguments"].update(cb=["EMA", spec]))
    before = contents(".")
    status, _, err = cli("train", "--resume", "a", "--epochs", 2)
    again = shlex.join(["--resume", "a", "--cb", "EMA", "--cb", spec])
    assert status == 2 and text in err and err.endswith(f"repeat the run's callbacks: fastrbn train {again}\n")
    assert contents(".") == before


@pytest.mark.parametrize("spec", ["CSVLogger:path=mine.csv", "SaveBest", "JSONLLogger", "EMA:decay=0.5"])
def test_repeated_or_harmless_callbacks_are_resumed(spec, cli):
    given = ("--cb", spec)
    trained(cli, *given)
    repeated = () if "mine" not in spec else given
    assert cli("train", "--resume", "a", "--epochs", 2, *repeated)[0] == 0
    lines = Path("a/history.jsonl")
    assert (len(lines.read_text().splitlines()) == 2) if spec == "JSONLLogger" else not lines.exists()
    assert len(rows("a/history.csv")) == 2 and ("mine" not in spec or rows("mine.csv") == rows("a/history.csv"))


def test_a_plug_in_is_resumed_without_text_only():
    assert plugins.outside("somebodys:every=5,scale=(0.5, 2)", Path("a")) is None


def test_a_missing_data_folder_of_the_run_is_an_error_and_is_not_made(cli):
    trained(cli)
    rewrite(lambda made: made["arguments"].update(data_dir="/nowhere/data"))
    status, _, err = cli("train", "--resume", "a")
    assert status == 2 and "--data-dir /nowhere/data is not here: say where the data are with --data-dir" in err


ODD = (None, True, -1, 0.5, 10**30, math.inf, "", "x", "a\0b", [], [1], {}, {"x": 1}, ["EMA", None])


def test_a_mistyped_configuration_gets_one_line_that_names_file_and_key(cli):
    """Every key that is read is set to every odd value, or removed; only values of its kind are accepted."""
    trained(cli)
    made = config("a")
    places = [(made, k) for k in ("arguments", "command", "started", "resumed", "result")]
    places += [(made["arguments"], k) for k in [*made["arguments"], "another"]]
    accepted = []
    for owner, key in places:
        before = dict(owner)
        for value in (*ODD, "missing"):
            owner.clear()
            owner.update({k: v for k, v in before.items() if k != key})
            if value != "missing":
                owner[key] = value
            Path("a/config.json").write_text(json.dumps(made), encoding="utf-8")
            try:
                got = run_folder.resumed(Path("a"), {}, "")
            except CliError as e:
                assert e.status == 2 and "\n" not in str(e), (key, value)
                named = "a/config.json" in str(e) and key in str(e) or "--data-dir x is not here" in str(e)
                plain = (key, value) in (("arguments", "missing"), ("checkpoint_every", None))
                assert named or plain and "was trained with --checkpoint-every" in str(e), (key, e)
            else:
                kept = got.config if owner is made else got.settings.dump()
                if (key, value) in (("recipe", None), ("epochs", None)):  # which are `default` and 1
                    continue
                accepted.append((key, value))
                if key == "pretrained" and value == "x":
                    kept[key] = Path(kept[key]).name
                assert value == "missing" or kept[key] == value or kept[key] == float(value), (key, value)
        owner.clear()
        owner.update(before)
    typed = {
        "bs": int,
        "epochs": int,
        "checkpoint_every": int,
        "threads": int,
        "seed": int,
        "no_halt": bool,
        "cb": list,
    }
    for key, value in accepted:
        assert key not in typed or value == "missing" or type(value) is typed[key], (key, value)
    assert ("bs", "missing") not in accepted


@pytest.mark.parametrize(
    "data, text",
    [
        (b'{"command": "\xff"}', "is no configuration of a run: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "is no configuration of a run: "),
        (b"[]", "it must be an object"),
        (b"", "is no configuration of a run"),
        (b"9" * 5000, "is no configuration of a run"),
    ],
    ids=lambda x: str(x)[:12],
)
def test_a_damaged_configuration_gets_one_line_with_a_way_out(data, text, cli):
    Path("a").mkdir()
    Path("a/config.json").write_bytes(data)
    status, out, err = cli("train", "--resume", "a")
    assert status == 2 and text in err and err.count("\n") == 1 and out == ""
    assert err.endswith("; edit the file or restore it from a copy, or train in another folder\n")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"device": "cuda:99"}, "--device must be"),
        ({"device": "x"}, "--device must be"),
        ({"data": "x"}, "'x' is neither the name"),
        ({"recipe": "x"}, "--recipe must be one of"),
        ({"cb": ["Nope"]}, "there is no callback 'Nope'"),
        ({"bs": "8"}, None),
        ({"model": "resnet9"}, "the checkpoint is of another model"),
        ({"limit": 10**9}, None),
    ],
    ids=str,
)
def test_settings_that_fail_later_get_one_line_too(change, text, cli, monkeypatch):
    trained(cli)
    rewrite(lambda made: made["arguments"].update(change))
    monkeypatch.setattr(cli_train, "load_dataset", lambda name, *a: small() if name == "glyphs" else load_dataset(name))
    before = contents("a")
    status, _, err = cli("train", "--resume", "a")
    if text is None:
        assert (status, err) == (0, "")
    else:
        assert status in (1, 2) and text in err and err.count("\n") == 1
        assert contents("a") == before


# --- settings


OLD = {  # as they were kept when layer and norm were two settings
    **{"data": "glyphs", "layer": "conv_rbn", "recipe": None, "model": "cnn", "bs": 8, "lr": 0.4, "epochs": 1},
    **{"sched": "lin", "device": "cpu", "threads": 1, "seed": 0, "limit": 80, "data_dir": None, "cb": []},
    **{"no_halt": False, "checkpoint_every": 4},
}


@pytest.mark.parametrize(
    "old, options",
    [
        ({}, []),
        ({"layer": "conv_gn", "norm": None}, ["--norm", "group"]),
        ({"layer": "conv_gn", "norm": "group"}, ["--layer", "conv_gn"]),
        (
            {"norm": "course", "recipe": "course", "width": None, "momentum": 0.5},
            ["--norm", "course", "--momentum", 0.5],
        ),
        ({"recipe": "detached", "size": None, "cutout": 7}, ["--recipe", "detached", "--cutout", 7]),
    ],
    ids=str,
)
def test_a_run_of_an_earlier_version_goes_on_as_a_new_one(old, options, cli):
    trained(cli, *options, "--lr", 0.4)
    shutil.copytree("a", "b")
    rewrite(lambda made: made.update(arguments={**OLD, **old}))
    for folder in "ab":
        assert cli("train", "--resume", folder, "--epochs", 2)[0] == 0
    check_same("a", "b")
    assert config("a")["arguments"] == config("b")["arguments"]


def test_settings_are_those_of_their_dump_and_do_not_change(tmp_path):
    made = settle({"norm": "course", "cb": ["EMA"], "data": "glyphs", "data_dir": tmp_path, "momentum": 0.5}, world=2)
    assert (made.norm, made.layer, made.recipe) == ("running", "conv_rbn", "course")
    assert made.lr == default_lr(16, momentum=0.5) == default_lr(16) / 2
    assert of_config(json.loads(json.dumps(made.dump()))) == made
    with pytest.raises(FrozenInstanceError):
        made.bs = 3


@pytest.mark.parametrize(
    "option, name, same",
    [("--norm", "group", "conv_gn"), ("--layer", "batch", "conv_bn"), ("--layer", "running", "conv_rbn")],
)
def test_norm_and_layer_are_one_option_also_when_a_run_is_resumed(option, name, same, cli):
    trained(cli, option, name)
    assert config("a")["layer"] == same and config("a")["arguments"]["norm"] == name
    for other in ("--norm", "--layer"):
        assert cli("train", "--resume", "a", other, same)[0] == 0
        status, _, err = cli("train", "--resume", "a", other, "group" if name == "batch" else "batch")
        assert status == 2 and f"--norm does not go with --resume: the run has {name}, got " in err


def test_a_recipe_that_the_run_does_not_have_is_refused_by_either_option(cli):
    trained(cli, "--norm", "course")
    assert cli("train", "--resume", "a", "--norm", "course", "--recipe", "course")[0] == 0
    for option in ("--norm", "--recipe"):
        status, _, err = cli("train", "--resume", "a", option, "detached")
        assert status == 2 and "--recipe does not go with --resume: the run has course, got detached" in err


# --- two processes and one folder


def test_a_second_start_into_a_folder_ends_with_a_clear_line(cli):
    trained(cli)
    before = contents("a")
    with util.locked(Path("a")):
        for arguments in (["glyphs", "--out", "a", "--force"], ["--resume", "a", "--epochs", 2]):
            status, _, err = cli("train", *arguments)
            assert (status, contents("a")) == (1, before)
            assert "another process is at work in a: wait for its end, or take another folder with --out" in err
    assert cli("train", "--resume", "a")[0] == 0, "the folder is free again"


def test_the_lock_ends_with_a_process_that_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from fastrbn.util import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(BlockingIOError, match="another process is at work"), util.locked(tmp_path):
            pass
        process.kill()
    with util.locked(tmp_path):
        assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_starts_in_the_same_second_get_folders_of_their_own(tmp_path):
    names = [run_folder.make_folder(tmp_path / "runs" / "x", numbered=True).name for _ in range(3)]
    assert names == ["x", "x-2", "x-3"]


def test_force_drops_the_checkpoints_of_the_run_before(cli):
    cli("train", "glyphs", "--limit", 80, "--checkpoint-every", 4, "--out", "a")
    assert cli("train", "glyphs", "--limit", 80, "--checkpoint-every", 9, "--out", "a", "--force")[0] == 0
    assert sorted(os.listdir("a/checkpoints")) == ["checkpoint-0001-step-9.pt", "checkpoint-0002-step-10.pt"]


def test_the_parser_returns_the_options_given_and_no_defaults():
    def given(*argv):
        return vars(parser().parse_args(["train", *argv])).keys() - {"command"}

    assert given("--resume", "a", "--bs", "8", "--cb", "X", "--no-halt") == {"resume", "bs", "cb", "no_halt"}
    assert given("mnist") == {"data"} and given() == set()


def test_after_kill_9_the_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
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
