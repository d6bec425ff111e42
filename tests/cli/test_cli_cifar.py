"""`fastrbn train cifar10 --model resnet9` with the options of its recipe: each does what it says, and no other."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from fastrbn import RECIPES, LabelSmoothingCrossEntropy, RunningBatchNorm
from fastrbn.cli import main, run_folder
from fastrbn.cli import train as cli_train
from fastrbn.data import Cutout, RandomCrop, RandomFlip, glyphs, to_channels_last
from fastrbn.trainer.settings import default_lr

REAL = Path(os.environ.get("FASTRBN_DATA") or "/nowhere") / "cifar10-jpeg"
ALL = (
    "--sched 1cycle --momentum 0.9 --weight-decay 5e-4 --label-smoothing 0.1 --cutout 8 --amp bf16 --channels-last "
    "--width 8"
).split()


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli("train", …) in an empty folder gives status, stdout, stderr; cli.built has the (learn, run) of each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTRBN_DATA", raising=False)
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
    real = cli_train.load_dataset
    small = glyphs(16, 10)
    monkeypatch.setattr(cli_train, "load_dataset", lambda name, *a: small if name == "glyphs" else real(name, *a))
    build = cli_train._build

    def run(*args):
        status = main([*map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err

    def built(*args):
        run.built.append(build(*args))
        return run.built[-1]

    run.built = []
    monkeypatch.setattr(cli_train, "_build", built)
    return run


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-10 as JPEG images, a few of each class: real ones if there are any, otherwise noise."""
    root = tmp_path / "data"
    for part, n in (("train", 16), ("test", 4)):
        for label in range(10):
            where = root / "cifar10-jpeg" / part / f"class{label}"
            where.mkdir(parents=True)
            if REAL.is_dir():
                for f in sorted(sorted((REAL / part).iterdir())[label].iterdir())[:n]:
                    (where / f.name).symlink_to(f)
            else:
                for k in range(n):
                    Image.effect_noise((32, 32), 10 + 10 * label).convert("RGB").save(where / f"{k}.jpg")
    return root


def test_a_short_training_on_cifar_with_every_option_ends_well(cli, cifar):
    status, out, err = cli(
        "train", "cifar10", "--model", "resnet9", *ALL, "--bs", 32, "--data-dir", cifar, "--out", "r"
    )
    assert (status, err) == (0, "")
    first, second, third = out.splitlines()[:3]
    assert first == "cifar10 is not here in its own format: training on the JPEG images in cifar10-jpeg"
    assert second == "cifar10-jpeg: 160 training and 40 validation images of 3×32×32, 10 classes"
    assert third.startswith("resnet9 of conv_rbn (recipe default)") and third.endswith(", bf16, channels last")
    config = json.loads(Path("r/config.json").read_text())
    wanted = dict(momentum=0.9, weight_decay=5e-4, label_smoothing=0.1, cutout=8, amp="bf16", channels_last=True)
    assert {k: config[k] for k in wanted} == wanted and config["width"] == 8 and config["compile"] is None
    assert config["data"]["name"] == "cifar10-jpeg" and config["result"]["steps"] == 5
    learn, run = cli.built[0]
    assert [type(t) for t in learn.data.train_dl.tfms[:-1]] == [RandomCrop, RandomFlip, Cutout]
    assert learn.data.train_dl.tfms[-1] is to_channels_last
    weight = learn.model.prep[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.dtype == torch.float32
    assert isinstance(learn.loss_func, LabelSmoothingCrossEntropy) and learn.loss_func.label_smoothing == 0.1
    with_decay, without = learn.opt.param_groups
    assert (with_decay["weight_decay"], without["weight_decay"]) == (5e-4, 0)
    assert all(g["momentum"] == 0.9 and g["nesterov"] for g in learn.opt.param_groups)
    assert run.mixed_precision.dtype is torch.bfloat16
    assert config["lr"] == pytest.approx(default_lr(32) * 0.1 / 4), "a tenth for the momentum, a quarter for the net"


def test_images_stay_bytes_until_their_batch(cli, cifar):
    assert cli("train", "cifar10", "--data-dir", cifar, "--epochs", 0, "--out", "r")[0] == 0
    data = cli.built[0][0].data
    assert data.train_ds.x.dtype == data.valid_ds.x.dtype == torch.uint8
    assert next(iter(data.train_dl))[0].dtype == torch.float32


def test_without_options_the_recipe_is_plain(cli):
    assert cli("train", "glyphs", "--out", "r")[0] == 0
    learn, run = cli.built[0]
    (group,) = learn.opt.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0, False, 0)
    assert learn.loss_func is nn.functional.cross_entropy and learn.data.train_dl.tfms == ()
    assert not {"MixedPrecision", "CompileCallback"} & {type(cb).__name__ for cb in run.cbs}


@pytest.mark.parametrize(
    "name, kind, recipe",
    [
        ("batch", nn.BatchNorm2d, None),
        ("group", nn.GroupNorm, None),
        ("running", RunningBatchNorm, "default"),
        ("course", RunningBatchNorm, "course"),
        ("detached", RunningBatchNorm, "detached"),
    ],
)
@pytest.mark.parametrize("model", ["cnn", "resnet9"])
def test_norm_names_the_layer_and_its_recipe(cli, model, name, kind, recipe):
    width = ["--width", 8] if model == "resnet9" else []
    assert cli("train", "glyphs", "--model", model, "--norm", name, *width, "--epochs", 0, "--out", "r")[0] == 0
    norms = [m for m in cli.built[0][0].model.modules() if "Norm" in type(m).__name__]
    assert {type(m) for m in norms} == {kind}
    assert recipe is None or {m.recipe for m in norms} == {RECIPES[recipe]}
    config = json.loads(Path("r/config.json").read_text())
    layer = {nn.BatchNorm2d: "conv_bn", nn.GroupNorm: "conv_gn"}.get(kind, "conv_rbn")
    assert (config["layer"], config["recipe"]) == (layer, recipe)


@pytest.mark.parametrize("args, mode", [(("--compile",), None), (("--compile", "reduce-overhead"), "reduce-overhead")])
def test_compile_takes_a_mode_or_none(cli, args, mode):
    status, out, _ = cli("train", "glyphs", *args, "--epochs", 0, "--out", "r")
    assert status == 0 and (f", compiled ({mode})\n" if mode else ", compiled\n") in out
    assert cli.built[0][1].compile.compile_args == ({"mode": mode} if mode else {})


@pytest.mark.cuda
@pytest.mark.parametrize("norm", ["batch", "group", "running"])
def test_a_compiled_training_with_cuda_graphs_ends_well_on_a_gpu(cli, cifar, norm):
    recipe = (*ALL, "--norm", norm, "--compile", "reduce-overhead", "--device", "cuda")
    status, _, err = cli(
        "train", "cifar10", "--model", "resnet9", *recipe, "--data-dir", cifar, "--epochs", 2, "--out", "r"
    )
    assert (status, err) == (0, "") and cli.built[0][0].data.train_ds.x.device.type == "cuda"


@pytest.mark.parametrize(
    "args, batches", [((), [7, 7, 2]), (("--compile",), [7, 7]), (("--compile", "--bs", 20), [16])]
)
def test_a_compiled_model_gets_no_smaller_last_batch_unless_it_is_the_only_one(cli, args, batches):
    assert cli("train", "glyphs", "--bs", 7, *args, "--epochs", 0, "--out", "r")[0] == 0
    assert [len(xb) for xb, _ in cli.built[0][0].data.train_dl] == batches


def test_an_added_callback_replaces_that_of_an_option(cli):
    assert (
        cli("train", "glyphs", "--amp", "bf16", "--cb", "MixedPrecision:dtype=fp16", "--epochs", 0, "--out", "r")[0]
        == 0
    )
    assert [cb.dtype for cb in cli.built[0][1].cbs if type(cb).__name__ == "MixedPrecision"] == [torch.float16]


def test_resume_goes_on_with_the_recipe_and_with_the_data_that_were_found(cli, cifar):
    common = ("train", "cifar10", "--model", "resnet9", *ALL, "--norm", "group", "--bs", 80, "--data-dir", cifar)
    assert cli(*common, "--epochs", 2, "--out", "whole")[0] == 0
    assert cli(*common, "--epochs", 2, "--checkpoint-every", 1, "--out", "r")[0] == 0
    newest = sorted(Path("r/checkpoints").glob("*"))
    for file in newest[1:]:
        file.unlink()  # as if it had been stopped there
    status, out, err = cli("train", "--resume", "r")
    assert (status, err) == (0, "") and "going on from" in out
    assert json.loads(Path("r/config.json").read_text())["arguments"]["data"] == "cifar10-jpeg"
    a, b = (torch.load(f"{n}/model.pt", weights_only=True) for n in ("whole", "r"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    status, _, err = cli("train", "--resume", "r", "--momentum", "0.5")
    assert status == 2 and "--momentum does not go with --resume: the run has 0.9, got 0.5" in err


@pytest.mark.parametrize(
    "args, words",
    [
        (
            "--norm bacth",
            "--norm must be one of running, batch, group, own, … got 'bacth'. Did you mean 'batch'?",
        ),
        ("--norm batch --layer conv_gn", "argument --layer: not allowed with argument --norm"),
        ("--norm course --recipe detached", "--norm course is a recipe already, and --recipe is detached"),
        ("--norm batch --recipe course", "--recipe is for --norm running, and --norm is batch"),
        ("--width 8", "--width is for resnet9, and --model is cnn: leave it out"),
        ("--momentum 1", "--momentum: must be a number from 0, below 1; got '1'"),
        ("--weight-decay -1", "--weight-decay: must be a number from 0, below 1; got '-1'"),
        ("--label-smoothing nan", "--label-smoothing: must be a number from 0, below 1; got 'nan'"),
        ("--cutout 0", "--cutout: must be a whole number, 1 or more; got '0'"),
        ("--amp fp8", "--amp: must be one of bf16, fp16; got 'fp8'"),
        ("--compile fast", "--compile: must be one of default, reduce-overhead … DATA goes before --compile"),
    ],
)
def test_a_bad_option_ends_with_2_and_the_rule_before_anything_is_written(cli, args, words):
    status, out, err = cli("train", "glyphs", *args.split())
    assert (status, out) == (2, "") and os.listdir() == []
    assert all(part in err for part in words.split(" … ")), err
