"""The command line as its users meet it: the files of a run, what is printed, and the exit status of each ending."""

import csv
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from datetime import datetime
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import fastrbn
from fastrbn.cli import main, plugins, run_folder
from fastrbn.cli import ranks as cli_ranks
from fastrbn.cli import train as cli_train
from fastrbn.data import DownloadError, glyphs, image_databunch
from fastrbn.learn import Callback
from fastrbn.models import conv_rbn, get_cnn_model, resnet9
from fastrbn.trainer import build as cli_build
from fastrbn.trainer.settings import default_lr

COMMAND = "fastrbn train glyphs --limit 400 --bs 16 --epochs 2 --seed 3 --out here/run"
RESULTS = {"config.json", "history.csv", "curves.png", "params.png", "model.pt"}
ROOT = Path(fastrbn.__file__).parents[1]


@cache
def small(n_train=200, n_valid=100):
    return glyphs(n_train, n_valid)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run the command line here, in an empty folder: cli("train", …) returns status, stdout and stderr. `glyphs` is a
    small set; pictures are drawn in the tests that look at them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTRBN_DATA", raising=False)
    real = cli_train.load_dataset
    monkeypatch.setattr(
        cli_train, "load_dataset", lambda name, *a, **kw: real(name, *a, **kw) if kw or name != "glyphs" else small()
    )
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")

    def run(*args):
        status = main([*map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def plug_in(monkeypatch, **named):
    """Install entry points of the group, as far as importlib.metadata can tell."""
    points = [SimpleNamespace(name=name, value=f"tests:{name}", dist=None, load=load) for name, load in named.items()]
    real = importlib.metadata.entry_points  # of which others, such as triton, ask as well

    def entry_points(**asked):
        return points if asked == {"group": "fastrbn.callbacks"} else real(**asked)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# a run and what it leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run of two epochs, in its own process, printing into a pipe."""
    folder = tmp_path_factory.mktemp("finished")
    command = ["-W", "error", "-m", *COMMAND.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder / "here" / "run", out=done.stdout, err=done.stderr)


def test_a_run_leaves_its_results_and_nothing_else(finished):
    assert set(os.listdir(finished.folder)) == RESULTS


def test_a_run_into_a_pipe_prints_a_plain_table_and_a_last_sentence(finished):
    assert finished.err == ""
    assert "\r" not in finished.out and "\x1b" not in finished.out
    lines = finished.out.splitlines()
    header = next(i for i, line in enumerate(lines) if "valid_accuracy" in line)
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["0", "1"]
    assert "learning rate 0.6667 → 0.06667 (linear)" in finished.out, "2·16/(16 + 32)"
    assert re.fullmatch(r"done: 2 epochs in [\d.]+ s, validation accuracy [\d.]+%; results in here/run", lines[-1]), (
        lines[-1]
    )


def test_the_model_can_be_loaded_as_weights_and_has_the_accuracy_in_the_history(finished):
    state = torch.load(finished.folder / "model.pt", weights_only=True)
    data = image_databunch(glyphs(), 16, limit=400)
    model = get_cnn_model(data, [8, 16, 32, 64, 64], conv_rbn)
    model.load_state_dict(state)
    model.eval()
    right = sum((model(xb).argmax(1) == yb).sum().item() for xb, yb in data.valid_dl)
    history = rows(finished.folder / "history.csv")
    assert right / len(data.valid_ds) == pytest.approx(float(history[-1]["valid_accuracy"]), abs=1e-6)


def test_the_history_has_a_row_an_epoch_with_losses_metrics_rate_and_time(finished):
    history = rows(finished.folder / "history.csv")
    assert [row["epoch"] for row in history] == ["0", "1"]
    assert float(history[1]["train_loss"]) < float(history[0]["train_loss"])
    assert float(history[0]["lr"]) > float(history[1]["lr"]) >= 2 * 16 / 48 / 10
    assert all(float(row["time"]) > 0 for row in history)


def test_the_pictures_are_pictures_of_something(finished):
    for name in ("curves.png", "params.png"):
        with Image.open(finished.folder / name) as image:
            assert min(image.size) >= 200
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 20, "an empty sheet has fewer colours"


def test_the_configuration_has_every_setting_resolved(finished):
    config = json.loads((finished.folder / "config.json").read_text())
    assert config["command"] == COMMAND
    assert config["data"]["name"] == "glyphs" and config["data"]["train"] == 400 and config["data"]["valid"] == 500
    wanted = {
        "model": "cnn",
        "layer": "conv_rbn",
        "recipe": "default",
        "bs": 16,
        "sched": "lin",
        "epochs": 2,
        "seed": 3,
    }
    assert {k: config[k] for k in wanted} == wanted
    assert config["lr"] == default_lr(16) and config["device"] in ("cpu", "cuda", "mps")
    assert config["versions"]["torch"] == torch.__version__ and config["versions"]["fastrbn"] == fastrbn.__version__
    assert config["recipe_settings"]["name"] == "default" and "0x" not in str(config), "an address says nothing"
    assert config["result"]["status"] == 0 and config["result"]["steps"] == 50 and config["result"]["reason"] is None


def test_the_same_seed_gives_the_same_model_and_another_seed_another(cli):
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        assert cli("train", "glyphs", "--seed", seed, "--out", out)[0] == 0
    a, b, c = (torch.load(f"{n}/model.pt", weights_only=True) for n in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["0.0.weight"], c["0.0.weight"])


def test_the_seed_orders_the_batches_too(cli, monkeypatch):
    built = []
    monkeypatch.setattr(cli_train, "_build", keep(built, cli_train._build))
    for seed in (5, 6):
        assert cli("train", "glyphs", "--limit", 64, "--seed", seed, "--epochs", 0, "--out", f"r{seed}")[0] == 0
    first, second = (torch.cat([yb for _, yb in learn.data.train_dl]) for learn, _ in built)
    assert not torch.equal(first, second)


def test_the_default_folder_is_named_after_data_layer_and_time_and_never_shared(cli, monkeypatch):
    monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(now=lambda: datetime(2020, 1, 2)))
    for _ in range(2):
        assert cli("train", "glyphs", "--layer", "conv_gn", "--limit", 16)[0] == 0
    assert sorted(os.listdir("runs")) == ["glyphs-conv_gn-20200102-000000", "glyphs-conv_gn-20200102-000000-2"]
    assert all(set(os.listdir(Path("runs") / d)) == RESULTS for d in os.listdir("runs"))


@pytest.mark.parametrize(
    "layer, kind", [("conv_rbn", "RunningBatchNorm"), ("conv_bn", "BatchNorm2d"), ("conv_gn", "GroupNorm")]
)
@pytest.mark.parametrize("model", ["cnn", "resnet9"])
def test_each_model_trains_with_each_layer(cli, monkeypatch, layer, kind, model):
    built = []
    monkeypatch.setattr(cli_train, "load_dataset", lambda *_: small(16, 10))
    monkeypatch.setattr(cli_build, "resnet9", lambda **kw: resnet9(width=8, **kw))  # an eighth of the field's width
    monkeypatch.setattr(cli_train, "_build", keep(built, cli_train._build))
    status, out, _ = cli("train", "glyphs", "--layer", layer, "--model", model, "--out", "r")
    assert status == 0 and f"{model} of {layer}" in out
    learn = built[0][0]
    norms = {type(m).__name__ for m in learn.model.modules() if "Norm" in type(m).__name__}
    assert norms == {kind}


def keep(results, function):
    def wrapped(*args):
        results.append(function(*args))
        return results[-1]

    return wrapped


def test_the_recipe_reaches_the_layers(cli, monkeypatch):
    built = []
    monkeypatch.setattr(cli_train, "_build", keep(built, cli_train._build))
    assert cli("train", "glyphs", "--limit", 16, "--recipe", "course", "--out", "r")[0] == 0
    assert built[0][0].model[0][2].recipe == fastrbn.RECIPES["course"]
    assert json.loads(Path("r/config.json").read_text())["recipe"] == "course"


@pytest.mark.parametrize(
    "sched, at",
    [
        ("none", None),
        ("lin", {0: 1.0, 0.5: 0.55, 1: 0.1}),
        ("cos", {0: 1.0, 0.5: 0.55, 0.25: 0.868198, 1: 0.1}),
        ("1cycle", {0: 0.1, 0.3: 1.0, 0.65: 0.505, 1: 0.01}),
    ],
)
def test_schedules_go_where_the_help_says(sched, at):
    made = cli_train._schedule(sched, 1.0)
    assert made is None if at is None else {p: pytest.approx(made(p), abs=1e-5) for p in at} == at


@pytest.mark.parametrize("sched", ["none", "lin", "cos", "1cycle"])
def test_the_schedule_moves_the_rate_that_trains(cli, monkeypatch, sched):
    built = []
    monkeypatch.setattr(cli_train, "_build", keep(built, cli_train._build))
    assert cli("train", "glyphs", "--limit", 80, "--lr", "0.1", "--sched", sched, "--out", "r")[0] == 0
    rates = built[0][1].recorder.lrs[0]
    expected = cli_train._schedule(sched, 0.1) or (lambda pos: 0.1)
    assert rates == pytest.approx([expected(i / 10) for i in range(10)])


def test_the_default_rate_is_the_measured_one_at_batch_8_and_grows_below_2():
    assert default_lr(8) == 0.4 and default_lr(32) == 1.0
    assert default_lr(8, "resnet9") == 0.1 and default_lr(8, "resnet18") == default_lr(8, "mine:net") == 0.025
    rates = [default_lr(bs) for bs in (1, 2, 8, 64, 512, 100_000)]
    assert rates == sorted(rates) and rates[-1] < 2


def test_limit_bs_and_epochs_decide_the_number_of_steps(cli):
    assert cli("train", "glyphs", "--limit", 50, "--bs", 20, "--epochs", 3, "--out", "r")[0] == 0
    config = json.loads(Path("r/config.json").read_text())
    assert config["result"]["steps"] == 9 and config["data"]["train"] == 50


@pytest.mark.parametrize(("given", "want"), [((), 1), (("--threads", 2), 2), (("--bs", 128), 3)])
def test_small_batches_train_on_one_thread_unless_asked_and_the_setting_is_put_back(cli, given, want):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cli("train", "glyphs", "--limit", 16, "--out", "r", *given)[0] == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert json.loads(Path("r/config.json").read_text())["threads"] == want


def test_zero_epochs_write_an_untrained_model(cli):
    status, out, _ = cli("train", "glyphs", "--epochs", 0, "--out", "r")
    assert status == 0 and "done: 0 epochs" in out
    assert set(os.listdir("r")) == RESULTS and rows("r/history.csv") == []


def test_empty_pictures_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_train, "load_dataset", lambda *_: small())
    assert main(["train", "glyphs", "--epochs", "0", "--out", "r"]) == 0
    for name in ("r/curves.png", "r/params.png"):
        with Image.open(name) as image:
            image.verify()


# data


def test_a_folder_of_images_can_be_trained_on(cli, tmp_path):
    data = small()
    for i, (x, y) in enumerate(zip(data.train.x[:60], data.train.y[:60])):
        folder = tmp_path / "my digits" / f"class {int(y) % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0].numpy()).save(folder / f"{i}.png")
    status, out, _ = cli("train", tmp_path / "my digits")
    assert status == 0 and "images of 1×28×28, 2 classes" in out
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("my digits-conv_rbn-")


def photos(folder, classes="ab", n=4, sides=(9, 14)):
    """Coloured noise of differing sizes."""
    draw = torch.Generator().manual_seed(1)
    for c in classes:
        (folder / c).mkdir(parents=True)
        for i in range(n):
            height, width = torch.randint(*sides, (2,), generator=draw).tolist()
            x = torch.randint(256, (height, width, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(x.numpy()).save(folder / c / f"{i}.png")


def test_photos_of_differing_sizes_are_refused_with_a_hint_at_size(cli, tmp_path):
    photos(tmp_path / "photos")
    status, out, err = cli("train", "photos", "--out", "r")
    assert (status, out) == (1, "") and err.endswith("Bring them to one: size=N, or `fastrbn train --size N`.\n")
    status, out, err = cli("train", "photos", "--out", "r", "--size", 12, "--checkpoint-every", 1)
    assert status == 0 and "images of 3×12×12, 2 classes" in out, err
    status, out, _ = cli("train", "--resume", "r", "--epochs", 2)
    assert status == 0 and "images of 3×12×12" in out, "the size is the run's"


def test_a_folder_of_names_that_are_not_utf8_can_be_trained_on(cli, tmp_path):
    photos(tmp_path / "ph\udcf6tos" / "data\udcff", classes=["k\udce4fer", "ähre"], sides=(9, 10))
    status, out, err = cli("train", "ph\udcf6tos/data\udcff")
    assert status == 0 and out.startswith("data\\xff: 6 training and 2 validation images"), err
    (run,) = Path("runs").iterdir()
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert config["data"]["classes"] == ["k\\xe4fer", "ähre"]
    assert config["arguments"]["data"] == str(tmp_path / "ph\udcf6tos" / "data\udcff")


@pytest.mark.parametrize(
    "classes, sides, args, words",
    [
        ("a", (9, 10), "", "training needs images of two classes or more; set has one, a: add a folder of other"),
        ("ab", (9, 10), "--cutout 9", "--cutout must leave some of the images, whose shorter side is 9; got 9"),
        ("ab", (3, 4), "--model resnet9 --width 8", "resnet9 of conv_rbn cannot be trained on ImageData('set', "),
        ("ab", (9, 10), "--layer conv_bn --bs 5", "cnn of conv_bn cannot be trained on … Expected more than 1 value"),
        ("ab", (9, 10), "--limit 5 --layer conv_bn --bs 1", "Expected more than 1 value per channel"),
    ],
)
def test_settings_that_do_not_suit_the_data_are_refused_before_training(cli, tmp_path, classes, sides, args, words):
    photos(tmp_path / "set", classes, sides=sides)
    status, out, err = cli("train", "set", *args.split(), "--out", "r")
    assert (status, out) == (2, "") and err.startswith("fastrbn train: error: ")
    assert all(part in err for part in words.split(" … ")), err
    assert len(err.splitlines()) == 1 and not Path("r").exists()


def test_a_channel_that_is_constant_is_refused_before_training(cli, tmp_path):
    for i in range(8):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (20 * i, 0, 0)).save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png")
    status, _, err = cli("train", "set", "--out", "r")
    assert status == 2 and "error: cannot train on set: normalize needs finite means" in err and not Path("r").exists()


def test_a_batch_larger_than_the_set_is_pointed_out(cli):
    status, out, _ = cli("train", "glyphs", "--limit", 16, "--bs", 32, "--out", "r")
    assert status == 0 and "batch size 32, more than there are images, learning rate" in out


def without_network(name, *args):
    if name == "glyphs":
        return small()
    raise DownloadError("MNIST could not be downloaded: no route to host.")


def test_without_mnist_and_network_a_bare_train_says_so_in_a_line_and_takes_glyphs(cli, monkeypatch):
    monkeypatch.setattr(cli_train, "load_dataset", without_network)
    status, out, err = cli("train", "--limit", 16)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == (
        "MNIST was not found and could not be downloaded (`fastrbn train mnist` says why); training on generated "
        "digits (glyphs)"
    )
    assert "glyphs: 16 training" in out.splitlines()[1]


def test_mnist_by_name_that_cannot_be_had_is_an_error_that_suggests_glyphs(cli, monkeypatch):
    monkeypatch.setattr(cli_train, "load_dataset", without_network)
    status, out, err = cli("train", "mnist")
    assert (status, out) == (1, "")
    assert "no route to host. `fastrbn train glyphs` needs no download." in err
    assert not Path("runs").exists()


def test_a_bare_train_takes_mnist_where_it_is(cli, real_data):
    status, out, _ = cli("train", "--data-dir", real_data, "--limit", 16, "--out", "r")
    assert status == 0 and out.startswith("mnist: 16 training and 500 validation images of 1×28×28")


def test_a_damaged_mnist_is_an_error_and_not_a_reason_to_fall_back(cli, tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03 and no more")
    status, out, err = cli("train", "--data-dir", tmp_path / "data")
    assert (status, out) == (1, "") and str(raw) in err


# bad arguments


@pytest.mark.parametrize(
    "args, words",
    [
        ("--bs 0", "--bs: must be a whole number, 1 or more; got '0'"),
        ("--bs 2.5", "must be a whole number, 1 or more; got '2.5'"),
        ("--lr -1", "--lr: must be a finite number above 0; got '-1'"),
        ("--lr nan", "must be a finite number above 0; got 'nan'"),
        ("--lr fast", "must be a finite number above 0; got 'fast'"),
        ("--epochs -1", "--epochs: must be a whole number, 0 or more; got '-1'"),
        ("--size 0", "--size: must be a whole number, 1 or more; got '0'"),
        ("--bs 99999999999999999999", "--bs: must be a whole number, 2147483647 at most; got '99999999999999999999'"),
        ("--seed 9223372036854775808", "--seed: must be a whole number, 9223372036854775807 at most"),
        ("--threads 99999999999", "--threads: must be a whole number, 1024 at most"),
        ("--cutout 100", "--cutout must leave some of the images, whose shorter side is 28; got 100"),
        ("--limit 0", "--limit: must be a whole number, 1 or more; got '0'"),
        ("--seed -3", "--seed: must be a whole number, 0 or more"),
        (
            "--layer conv_rnb",
            "--norm must be one of running, batch, group … conv_gn; got 'conv_rnb'. Did you mean 'conv_rbn'?",
        ),
        ("--model resnet", "--model: must be cnn, resnet9, a classification net … 'resnet'. Did you mean 'resnet9'?"),
        ("--model convnext_tinny", "Did you mean 'convnext_tiny'?"),
        ("--model nets.small", "got 'nets.small'. Put a colon before the function"),
        ("--model my/nets.py:small", "written package.module:function; got … write my.nets:small"),
        ("--model nets:small", "--model nets:small: there is no module 'nets' in … Start in the folder"),
        ("--model json:dmups", "--model json:dmups: needs a function or class … json has none of that name. Did you"),
        ("--model json:dumps", "'obj' too: give that a default, or rename it"),
        ("--model resnet18 --norm batch", "--norm must be own, which keeps the norms of resnet18, or running … batch"),
        ("--norm own", "--norm must be running, batch, group or a recipe for the model cnn; got own"),
        ("--opt adamm", "--opt: must be one of … got 'adamm'. Did you mean 'Adam'?"),
        ("--opt lbfgs", "--opt: must be one of"),
        ("--opt adamw --momentum 0.9", "--momentum is no setting of --opt AdamW: leave it out"),
        ("--opt rprop --weight-decay 0.1", "--weight-decay is no setting of --opt Rprop: leave it out"),
        ("--pretrained nowhere.pt", "--pretrained nowhere.pt is not there: give a file of weights"),
        ("--config nowhere.json", "--config must be a JSON file of options; nowhere.json cannot be read: No such file"),
        ("--config a.json --resume r", "--config does not go with --resume"),
        ("--sched cosine", "none, lin, cos, 1cycle; got 'cosine'"),
        ("--recipe corse", "must be one of default … got 'corse'. Did you mean 'course'?"),
        ("--layer conv_bn --recipe course", "--recipe is for --norm running, and --norm is conv_bn"),
        ("--device gpu", "--device must be auto, cpu, or … got 'gpu'"),
        ("--device meta", "--device must be auto, cpu, or … got 'meta'"),
        ("--epoch 3", "unrecognized arguments: --epoch 3. Did you mean '--epochs'? fastrbn train --help lists"),
        ("--limt=3", "unrecognized arguments: --limt=3. Did you mean '--limit'?"),
        ("--cb HaltOnNan2", "no callback 'HaltOnNan2'. Did you mean 'HaltOnNaN'? There are: ActivationStats, "),
        ("--cb HaltOnNaN:evry=2", "HaltOnNaN takes every=1, raise_error=False, path=None. Did you mean 'every'?"),
        ("--cb HaltOnNaN:every=0", "every must be a whole number, 1 or more; got 0"),
        ("--cb HaltOnNaN:every", "are written ARG=VALUE, separated by commas; got 'every'"),
        ("--cb HaltOnNaN:every=1,every=2", "'every' is given twice"),
        ("--cb ParamScheduler", "missing a required argument: 'pname'; ParamScheduler takes pname, sched_funcs"),
        ("--cb Recorder:x=1", "Recorder takes no arguments"),
        ("--data-dir file", "--data-dir must be a folder; file is a file"),
        ("--out file", "--out must be a folder; file is a file"),
        ("--out full", "--out full is not empty: take another name, or --force"),
    ],
)
def test_bad_arguments_end_with_2_and_the_rule_before_anything_is_written(cli, args, words):
    Path("file").touch()
    Path("full").mkdir()
    Path("full/other.txt").touch()
    status, out, err = cli("train", "glyphs", *args.split())
    assert (status, out) == (2, "")
    assert all(part in err for part in words.split(" … ")), err
    assert err.count("\n") == 1 and not Path("runs").exists()


def test_an_unknown_data_set_gets_a_suggestion(cli):
    status, _, err = cli("train", "fashon")
    assert status == 2 and "'fashon'" in err and "'fashion'" in err


def test_wrong_commands_end_with_2_and_help_and_version_with_0(cli):
    assert cli()[0] == 2
    assert cli("tran")[0] == 2
    assert cli("--version")[:2] == (0, f"fastrbn {fastrbn.__version__}\n")
    status, out, _ = cli("train", "--help")
    assert status == 0 and "2·bs/(bs + 32)" in out and "%%" not in out


@pytest.mark.parametrize("args", ["train --help", "compare --help", "train --bs 0", "compare --seeds a", "callback"])
def test_help_and_wrong_arguments_need_no_torch(args):
    code = f"import sys; from fastrbn.cli import main; main({args.split()}); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_force_writes_over_a_run_and_drops_what_would_pass_for_the_new_ones(cli):
    for name in ("r/nan_report.txt", "r/config.json", "r/notes.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("old")
    assert cli("train", "glyphs", "--limit", 16, "--out", "r", "--force")[0] == 0
    assert set(os.listdir("r")) == RESULTS | {"notes.txt"}
    assert Path("r/notes.txt").read_text() == "old" != Path("r/config.json").read_text()


def test_an_empty_folder_may_be_written_to(cli):
    Path("r").mkdir()
    assert cli("train", "glyphs", "--limit", 16, "--out", "r")[0] == 0


# endings


def test_nan_halts_with_3_a_sentence_a_report_and_all_results(cli):
    status, _, err = cli("train", "glyphs", "--lr", "1e30", "--out", "r")
    assert status == 3
    assert re.match(r"halted: NaN or Inf in the .* of step \d+ .*; results in r\n$", err), err
    assert set(os.listdir("r")) == RESULTS | {"nan_report.txt", "nan_report.json", "nan_batch.pt"}
    assert "last losses" in Path("r/nan_report.txt").read_text()
    report = json.loads(Path("r/nan_report.json").read_text())
    assert report["sentence"] in err and report["phase"] in ("forward", "backward", "step")
    assert torch.load("r/nan_batch.pt", weights_only=True)["xb"].dim() == 4
    assert json.loads(Path("r/config.json").read_text())["result"]["status"] == 3
    state = torch.load("r/model.pt", weights_only=True)
    assert all(t.isfinite().all() for t in state.values()), "the last finite state is what is wanted"


def test_no_halt_trains_on_through_nan(cli):
    status, out, _ = cli("train", "glyphs", "--lr", "1e30", "--no-halt", "--limit", 40, "--out", "r")
    assert status == 0 and "done: 1 epoch" in out
    assert json.loads(Path("r/config.json").read_text())["result"]["steps"] == 5


class Stop(Callback):
    """Ends the second epoch at its third batch, with `error`."""

    error = KeyboardInterrupt

    def after_batch(self):
        if self.epoch == 1 and self.iter == 2 and self.in_train:
            raise self.error("as planned")


def test_an_interrupt_keeps_what_there_is_so_far_and_ends_with_130(cli, monkeypatch):
    plug_in(monkeypatch, stop=lambda: Stop)
    status, _, err = cli("train", "glyphs", "--epochs", 3, "--limit", 80, "--cb", "stop", "--out", "r")
    assert status == 130
    assert err == "interrupted (Ctrl-C) in training, epoch 1, batch 2; results in r\n"
    assert set(os.listdir("r")) == RESULTS
    whole, part = rows("r/history.csv")
    assert float(whole["valid_loss"]) > 0 and part["epoch"] == "1"
    assert float(part["train_loss"]) > 0 and part["valid_loss"] == ""


def test_an_error_in_a_callback_shows_a_traceback_keeps_the_results_and_ends_with_1(cli, monkeypatch):
    plug_in(monkeypatch, stop=lambda: type("Failing", (Stop,), {"error": ZeroDivisionError}))
    status, _, err = cli("train", "glyphs", "--epochs", 2, "--limit", 80, "--cb", "stop", "--out", "r")
    assert status == 1
    assert "Traceback" in err and "raise self.error" in err
    assert err.splitlines()[-1].startswith("error: ZeroDivisionError in Failing.after_batch, in training, epoch 1")
    assert set(os.listdir("r")) == RESULTS and len(rows("r/history.csv")) == 2


def test_a_callback_that_ends_training_early_is_no_failure(cli, monkeypatch):
    plug_in(monkeypatch, stop=lambda: type("Enough", (Stop,), {"error": fastrbn.CancelTrainException}))
    status, out, _ = cli("train", "glyphs", "--epochs", 2, "--limit", 80, "--cb", "stop", "--out", "r")
    assert status == 0 and out.splitlines()[-1] == "ended early: as planned; results in r"


def test_a_result_that_cannot_be_written_costs_only_itself(cli, monkeypatch):
    def no_room(figure):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.plots, "png", no_room)
    status, _, err = cli("train", "glyphs", "--limit", 16, "--out", "r")
    assert status == 1
    assert (
        err.count("could not be written: No space left on device; make room, or choose another folder with --out") == 2
    )
    assert err.splitlines()[-1].startswith("done: 1 epoch") and err.endswith("; other results in r\n")
    assert set(os.listdir("r")) == RESULTS - {"curves.png", "params.png"}


@pytest.mark.parametrize("name", ["curves.png", "history.csv", "config.json"])
def test_a_folder_in_the_place_of_a_result_is_refused_before_training(cli, name):
    assert cli("train", "glyphs", "--limit", 16, "--checkpoint-every", 9, "--out", "r")[0] == 0
    Path("r", name).unlink()
    Path("r", name).mkdir()
    words = f"fastrbn train: error: r/{name} must be a file; it is a folder: move it away\n"
    assert cli("train", "glyphs", "--limit", 16, "--out", "r", "--force") == (2, "", words)
    if name != "config.json":
        assert cli("train", "--resume", "r", "--epochs", 2) == (2, "", words)


def test_a_file_in_the_place_of_the_checkpoints_is_refused_before_training(cli):
    Path("r").mkdir()
    Path("r/checkpoints").touch()
    status, _, err = cli("train", "glyphs", "--limit", 16, "--checkpoint-every", 9, "--out", "r", "--force")
    assert (status, err) == (2, "fastrbn train: error: r/checkpoints must be a folder; it is a file: move it away\n")


def test_a_folder_that_takes_the_place_of_a_result_during_training_is_named(cli, monkeypatch):
    class Maker(Callback):
        def after_fit(self):
            Path("r/curves.png").mkdir()

    plug_in(monkeypatch, maker=lambda: Maker)
    status, out, err = cli("train", "glyphs", "--limit", 16, "--cb", "maker", "--out", "r")
    first, last = err.splitlines()
    assert status == 1 and "done" not in out and last.startswith("done: 1 epoch")
    assert first == "fastrbn train: error: r/curves.png could not be written: Is a directory; move that folder away"


def test_an_interrupt_before_training_ends_with_130_too(cli, monkeypatch):
    def slow(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_train, "load_dataset", slow)
    status, _, err = cli("train", "glyphs")
    assert (status, err) == (130, "fastrbn train: interrupted (Ctrl-C)\n")


def test_an_interrupt_while_the_last_line_is_flushed_ends_with_130_quietly(cli, monkeypatch):
    class Interrupted(io.StringIO):
        def flush(self):
            if "\ndone: " in self.getvalue():
                raise KeyboardInterrupt

    stream, real = Interrupted(), sys.stderr
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["train", "glyphs", "--limit", "16", "--out", "r"]) == 130
    assert sys.stdout is stream and sys.stderr is real, "they are as they were"
    assert set(os.listdir("r")) == RESULTS


def test_ctrl_c_while_the_process_exits_shows_no_traceback(tmp_path):
    code = """if True:
        import atexit, signal, sys, torch
        from fastrbn.cli import main, run_folder, train
        from fastrbn.data import glyphs
        run_folder.plots.png = lambda figure: b"a picture"
        train.load_dataset = lambda *_: glyphs(16, 16)
        atexit.register(signal.raise_signal, signal.SIGINT)  # as if it came among torch's
        sys.exit(main(["train", "glyphs", "--limit", "16", "--out", "r"]))"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.splitlines()[-1].startswith("done: ")


def test_ctrl_c_in_a_real_process_ends_with_130_and_leaves_the_results(tmp_path):
    code = """if True:
        import sys
        from fastrbn import Recorder
        from fastrbn.cli import main, run_folder, train
        from fastrbn.data import glyphs

        run_folder.plots.png = lambda figure: b"a picture"
        train.load_dataset = lambda *_: glyphs(16, 16)

        def tell(self):
            if self.run.n_iter == 3:
                print("three steps", flush=True)

        Recorder.after_step = tell
        sys.exit(main(sys.argv[1:]))"""
    command = [sys.executable, "-c", code, "train", "glyphs", "--epochs", "1000", "--bs", "2", "--out", "r"]
    # where the tests run in the background the signal may be ignored, and children inherit that
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as process:
        while process.stdout.readline() not in ("three steps\n", ""):
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert re.fullmatch(r"interrupted \(Ctrl-C\) in training, epoch 0, batch \d+; results in r\n", err), err
    assert set(os.listdir(tmp_path / "r")) == RESULTS
    torch.load(tmp_path / "r" / "model.pt", weights_only=True)


# callbacks by name


@pytest.mark.parametrize("name", ["ParamMagnitudes", "param_magnitudes", "parammagnitudes"])
def test_an_added_callback_takes_the_place_of_the_commands_own(cli, name):
    assert cli("train", "glyphs", "--limit", 80, "--cb", f"{name}:every=4,stats='max'", "--out", "r")[0] == 0
    callbacks = json.loads(Path("r/config.json").read_text())["callbacks"]
    assert [cb for cb in callbacks if "Magnitudes" in cb] == ["ParamMagnitudes(every=4, stats=('max',))"]


def test_several_callbacks_can_be_added_and_the_commands_own_file_stays(cli):
    specs = ["--cb", "CSVLogger:path=mine.csv", "--cb", "activation_stats:hist=False"]
    assert cli("train", "glyphs", "--limit", 16, *specs, "--out", "r")[0] == 0
    assert Path("mine.csv").read_text() == Path("r/history.csv").read_text() != ""
    assert any("ActivationStats" in cb for cb in json.loads(Path("r/config.json").read_text())["callbacks"])


@pytest.mark.parametrize("name", ["AvgStatsCallback", "avg_stats", "AvgStats", "avg_stats_callback"])
def test_callbacks_go_by_class_name_and_snake_name_with_and_without_the_suffix(name):
    assert type(plugins.make_callback(name)) is fastrbn.AvgStatsCallback


@pytest.mark.parametrize("given, patterns", [("0.*", ("0.*",)), ("('0.*','4')", ("0.*", "4"))])
def test_several_values_go_to_an_argument_that_takes_them(given, patterns):
    freeze = plugins.make_callback(f"Freeze:patterns={given},until=2")
    assert (freeze.patterns, freeze.until) == (patterns, 2)


def test_an_argument_that_a_callback_refuses_in_the_fit_shows_no_traceback(cli):
    status, _, err = cli("train", "--cb", "Freeze:patterns=nope", "--max-steps", 1)
    assert status == 1 and err.startswith(
        "error: ValueError in Freeze.begin_fit, before the first batch: Freeze: 'nope'"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {}),
        ("a=1", {"a": 1}),
        ("a=1,b=2.5,c=True,d=None", {"a": 1, "b": 2.5, "c": True, "d": None}),
        ("a=(1, 2),b=[3,4],c={'x': 5, 'y': 6}", {"a": (1, 2), "b": [3, 4], "c": {"x": 5, "y": 6}}),
        ("a='x,y',b=\"u=(v\"", {"a": "x,y", "b": "u=(v"}),
        ("path=runs/a b.csv,mode=w:1", {"path": "runs/a b.csv", "mode": "w:1"}),
        (" a = 1 , b = cpu ", {"a": 1, "b": "cpu"}),
    ],
)
def test_arguments_are_literals_or_else_text(text, expected):
    assert plugins._arguments(text, "") == expected


def test_the_listing_names_every_built_in_callback_with_arguments_and_a_line(cli):
    status, out, _ = cli("callbacks")
    assert status == 0
    for name, cls in plugins.built_in().items():
        assert f"  {name}(" in out and cls.__doc__.splitlines()[0] in out
    assert "HaltOnNaN(every=1, raise_error=False, path=None)" in out


def test_a_plug_in_is_listed_and_trains(cli, monkeypatch):
    seen = []

    class Counts(Callback):
        """Counts steps by `by`."""

        def __init__(self, by=1):
            self.by = by

        def after_step(self):
            seen.append(self.by)

    plug_in(monkeypatch, counts=lambda: Counts)
    assert "  counts(by=1)\n      Counts steps by `by`." in cli("callbacks")[1]
    assert cli("train", "glyphs", "--limit", 24, "--cb", "counts:by=7", "--out", "r")[0] == 0
    assert seen == [7, 7, 7]


def test_a_broken_plug_in_is_named_and_does_not_stop_the_others(cli, monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'nowhere'")

    plug_in(monkeypatch, broken=broken, no_class=lambda: 3, good=lambda: Stop)
    status, out, _ = cli("callbacks")
    assert status == 0
    assert "the plug-in 'broken' (tests:broken) cannot be loaded: ModuleNotFoundError: No module named 'nowhere'" in out
    assert "the plug-in 'no_class' (tests:no_class) must be a callback class; it is 3" in out
    assert "  good()" in out and "HaltOnNaN(" in out
    assert cli("train", "glyphs", "--limit", 16, "--cb", "good", "--out", "r")[0] == 0
    status, _, err = cli("train", "glyphs", "--limit", 16, "--cb", "broken", "--out", "s")
    assert status == 1 and "the plug-in 'broken' (tests:broken) cannot be loaded" in err


def leaves(*_):
    sys.exit(0)


class LeavesWhenMade(Callback):
    __init__ = leaves


class Unmakeable(Callback):
    def __init__(self):
        raise LookupError("no such service")


@pytest.mark.parametrize(
    "load, words",
    [
        (leaves, "the plug-in 'mine' (tests:mine) cannot be loaded: SystemExit: 0"),
        (lambda: LeavesWhenMade, "--cb mine: mine cannot be made: SystemExit: 0"),
        (lambda: Unmakeable, "--cb mine: mine cannot be made: LookupError: no such service"),
    ],
)
def test_a_plug_in_that_exits_or_fails_before_training_is_an_error_that_names_it(cli, monkeypatch, load, words):
    plug_in(monkeypatch, mine=load)
    assert cli("train", "glyphs", "--cb", "mine", "--out", "r") == (1, "", f"fastrbn train: error: {words}\n")
    assert not Path("r").exists()
    assert cli("callbacks")[0] == 0


@pytest.mark.parametrize("event", ["begin_fit", "after_step", "after_fit"])
def test_a_plug_in_that_exits_during_training_is_an_error_that_names_it(cli, monkeypatch, event):
    made = {}
    exec(f"def {event}(self):\n    raise SystemExit(0)", made)  # by the name that errors are told with
    plug_in(monkeypatch, mine=lambda: type("Leaves", (Callback,), {event: made[event]}))
    status, _, err = cli("train", "glyphs", "--limit", 16, "--cb", "mine", "--out", "r")
    assert status == 1
    assert err.splitlines()[-1].startswith(f"error: SystemExit in Leaves.{event}, ")
    assert set(os.listdir("r")) == RESULTS
    assert json.loads(Path("r/config.json").read_text())["result"]["status"] == 1


def test_a_plug_in_that_makes_no_callback_is_refused(cli, monkeypatch):
    plug_in(monkeypatch, listing=lambda: list)
    status, _, err = cli("train", "glyphs", "--cb", "listing")
    assert status == 1 and "a callback derives from fastrbn.Callback; listing made a list" in err


def test_a_plug_in_that_is_truly_installed_is_found(cli, tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "speaks-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: speaks\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[fastrbn.callbacks]\nspeaks = speaks:Speaks\nmute = speaks:Mute\n\n[console_scripts]\nother = speaks:Speaks\n"
    )
    (site / "speaks.py").write_text(
        textwrap.dedent('''
            from fastrbn import Callback

            class Speaks(Callback):
                """Says `word` when a fit begins."""

                def __init__(self, word="hello"):
                    self.word = word

                def begin_fit(self):
                    print(f"speaks: {self.word}")
        ''')
    )
    monkeypatch.syspath_prepend(site)
    status, out, err = cli("callbacks")
    assert status == 0, err
    assert "  speaks(word='hello')\n      Says `word` when a fit begins." in out
    assert "the plug-in 'mute' (speaks:Mute of speaks 1.2) cannot be loaded: AttributeError" in out
    status, out, err = cli("train", "glyphs", "--limit", 16, "--cb", "speaks:word=moo", "--out", "r")
    assert status == 0, err
    assert "speaks: moo\n" in out


def test_the_listing_ends_quietly_when_its_reader_closes_the_pipe(tmp_path):
    code = "import sys; from fastrbn.cli import main; sys.exit(main(['callbacks']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()  # as `head` does
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0 and err == ""


# what is printed, and where


def printing_to(monkeypatch, file, encoding="utf-8"):
    """Redirect stdout to the binary `file`, as in a process of its own."""
    stream = io.TextIOWrapper(file, encoding, errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


@pytest.mark.parametrize(
    "encoding, shape, rate",
    [("ascii", "1x28x28", "0.4 -> 0.04"), ("cp1252", "1×28×28", "0.4 -> 0.04"), ("utf-8", "1×28×28", "0.4 → 0.04")],
)
def test_characters_that_the_encoding_of_stdout_lacks_are_spelt_out(cli, monkeypatch, encoding, shape, rate):
    file = io.BytesIO()
    stream = printing_to(monkeypatch, file, encoding)
    assert main(["train", "glyphs", "--limit", "16", "--out", "räksmörgås-\udcff"]) == 0
    assert main(["train", "--help"]) == 0
    out = file.getvalue().decode(encoding)
    assert f"images of {shape}, 10 classes" in out and f"learning rate {rate} (linear)" in out
    assert "r\\xe4ksm" in out if encoding == "ascii" else "räksmörgås-\\udcff" in out
    assert set(os.listdir("räksmörgås-\udcff")) == RESULTS
    config = json.loads(Path("räksmörgås-\udcff/config.json").read_text(encoding="utf-8"))
    assert config["command"].endswith("--out 'räksmörgås-\udcff'")
    assert stream.errors == "strict" and sys.stdout is stream, "it is as it was"


def test_a_rank_that_is_silent_prints_any_character(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    ranks = object.__new__(cli_ranks.Ranks)
    ranks.rank = 1
    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **kw: real(*a, **{"encoding": "ascii", **kw}))
    with ranks.quiet():
        assert print("0.4 → 0.04", flush=True) is None


@pytest.fixture
def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "wb", buffering=0)


def test_training_outlives_the_reader_of_its_pipe(cli, monkeypatch, closed_pipe, capsys):
    stream = printing_to(monkeypatch, closed_pipe)
    assert main(["train", "glyphs", "--limit", "80", "--epochs", "2", "--out", "r"]) == 0
    stream.close()
    assert set(os.listdir("r")) == RESULTS and len(rows("r/history.csv")) == 2
    assert capsys.readouterr().err == ""


def test_an_interrupt_after_the_reader_has_left_saves_the_results(cli, monkeypatch, closed_pipe, capsys):
    plug_in(monkeypatch, stop=lambda: Stop)
    stream = printing_to(monkeypatch, closed_pipe)
    assert main(["train", "glyphs", "--epochs", "3", "--limit", "80", "--cb", "stop", "--out", "r"]) == 130
    stream.close()
    assert set(os.listdir("r")) == RESULTS and len(rows("r/history.csv")) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_under_the_log_is_reported_once_and_training_continues(cli, monkeypatch, capsys):
    stream = printing_to(monkeypatch, open("/dev/full", "wb", buffering=0))
    assert main(["train", "glyphs", "--limit", "80", "--out", "r"]) == 0
    stream.close()
    err = capsys.readouterr().err
    assert err == "fastrbn: nothing more can be printed ([Errno 28] No space left on device); the command continues\n"
    assert set(os.listdir("r")) == RESULTS


def test_the_worst_ending_of_all_processes_counts_and_an_error_on_rank_0_is_raised_on_all():
    ranks = object.__new__(cli_ranks.Ranks)
    ranks.world, ranks.rank = 2, 1
    said = []
    ranks._channel = SimpleNamespace(texts=lambda text: said)
    said[:] = ['[0, "done"]', '[3, "halted"]']
    assert ranks.worst(0, "done") == (3, "halted")
    said[:] = ['[130, "interrupted"]', '[1, "error"]']
    assert ranks.worst(1, "error") == (1, "error")
    said[:] = ['{"value": "runs/a"}', ""]
    assert ranks.first(lambda: pytest.fail("it is not the first")) == "runs/a"
    said[:] = ['{"error": "the folder is not empty", "status": 2}', ""]
    with pytest.raises(cli_ranks.CliError, match="the folder is not empty") as caught:
        ranks.first(lambda: None)
    assert caught.value.status == 2


@pytest.mark.parametrize(
    "device, deterministic, before, want",
    [
        ("cuda:0", False, False, True),
        ("cuda:0", True, False, False),
        ("cuda:0", True, True, True),
        ("cpu", False, False, False),
    ],
)
def test_on_cuda_cudnn_chooses_its_convolutions_for_the_length_of_a_training(
    device, deterministic, before, want, cli, monkeypatch
):
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr("fastrbn.trainer.settings.find_device", lambda *_: device)
    monkeypatch.setattr(cli_train, "_train", lambda *_: seen.append(torch.backends.cudnn.benchmark) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("train", "--device", device)
    assert seen == [want] and torch.backends.cudnn.benchmark is before


def test_a_numbered_device_is_refused_for_many_processes():
    with pytest.raises(cli_ranks.CliError, match="must leave each of the 2 processes its own; got 'cuda:1': take cuda"):
        cli_ranks.check_device("cuda:1", SimpleNamespace(world=2))
    cli_ranks.check_device("cuda:1", SimpleNamespace(world=1))


def test_processes_that_cannot_meet_end_the_command_with_a_sentence(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    status, _, err = cli("train", "glyphs")
    assert status == 1 and err.startswith("fastrbn train: error: the environment has WORLD_SIZE=2 but not RANK")
