"""`fastrbn train` with other models, optimisers and weights, and with options from a file."""

import json
import os
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn, optim
from torchvision import models

from fastrbn import load_run
from fastrbn.cli import main, run_folder
from fastrbn.cli import train as cli_train
from fastrbn.data import glyphs
from fastrbn.data.image_data import resized
from fastrbn.norm import RunningBatchNorm, convert_batchnorm
from fastrbn.trainer import nets
from fastrbn.trainer.build import build_model
from fastrbn.trainer.settings import OPTIMISERS, settle

MINE = """
from torch import nn

def small(c_in, classes):
    norm = nn.Sequential(nn.Conv2d(c_in, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(norm, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes))

class Flat(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))

def lost(c_in, classes):
    small(c_in, classes)

def seven():
    return Flat(7)

def broken(in_chans):
    return nn.Linear(in_chans, undefined)

def clases(clases):
    return Flat(clases)

class Wrong(nn.Linear):
    def __init__(self, classes):
        super().__init__(3, classes)

    def forward(self, x):
        return super().forward(x.flatten(1))

ready = Flat()
"""


@cache
def small():
    return glyphs(40, 20)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run `fastrbn train` here, where mine.py is, on 40 images: cli("--bs", 8) returns status, stdout and stderr."""

    def load_dataset(name, root=None, size=None):
        return small() if size is None else resized(small(), (size, size))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    monkeypatch.setattr(cli_train, "load_dataset", load_dataset)
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
    before = set(sys.modules)
    Path("mine.py").write_text(MINE)
    Path("worse.py").write_text("import mine\nfirst = 1\nsecond = frist\n")

    def run(*args):
        status = main(["train", "glyphs", *map(str, args)])
        return status, *capsys.readouterr()

    yield run
    for name in set(sys.modules) - before:
        if name in ("mine", "worse"):
            del sys.modules[name]


def config(folder):
    return json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))


def weights(folder):
    return torch.load(Path(folder, "model.pt"), weights_only=True)


# the user's own


def test_a_function_in_the_current_directory_makes_the_model_and_its_run_is_resumed(cli):
    options = "--model mine:small --opt adamw --bs 10 --checkpoint-every 3".split()
    status, out, err = cli(*options, "--out", "r")
    assert status == 0, err
    assert "mine:small with 1 running batch norm (recipe default), 218 parameters, AdamW, batch size 10" in out
    kept = config("r")["arguments"]
    assert {k: kept[k] for k in ("model", "opt", "lr", "weight_decay")} == {
        "model": "mine:small",
        "opt": "AdamW",
        "lr": 0.001,
        "weight_decay": 0.01,
    }
    assert main(["train", "--resume", "r", "--epochs", "2", "--opt", "ADAMW"]) == 0
    assert config("r")["result"]["steps"] == 8
    assert load_run("r").model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert cli("--model", "mine:Flat", "--norm", "own", "--out", "flat", "--epochs", 0)[1].count("with its own norms")


@pytest.mark.parametrize(
    "model, words",
    [
        ("mine:smal", "mine has none of that name. Did you mean 'small'?"),
        ("mine:ready", "needs a function or class; mine has a Flat of that name"),
        ("mine:clases", "classes (or num_classes), by name; it needs 'clases' too … Did you mean 'classes'?"),
        ("min:small", "there is no module 'min' in … Did you mean 'mine'?"),
        ("worse:net", "worse cannot be imported: … worse.py\", line 3 … second = frist … NameError: name 'frist'"),
        ("mine:broken", "broken(in_chans=1) failed: … mine.py\" … in broken … NameError: name 'undefined'"),
        ("mine:lost", "must return an nn.Module; lost(c_in=1, classes=10) returned None; does it lack a return?"),
        ("mine:seven", "mine:seven cannot be trained on … (8, 10); it returned a tensor (8, 7): its last layer"),
        (
            "mine:Wrong",
            "mine:Wrong cannot be trained on … in forward … super().forward(x.flatten(1)) … RuntimeError: ",
        ),
    ],
)
def test_a_function_that_makes_no_model_gets_one_message_with_its_own_lines(cli, model, words):
    status, out, err = cli("--model", model, "--out", "r")
    assert (status, out) == (2, "") and err.startswith("fastrbn train: error: ") and not Path("r").exists()
    assert all(part in err for part in words.split(" … ")), err
    assert "importlib" not in err and "cli/train.py" not in err


# torchvision's


NET = "shufflenet_v2_x0_5"


def test_a_net_of_torchvision_takes_the_channels_classes_and_norms_that_are_asked_for():
    model = build_model(settle({"model": NET, "recipe": "course"}), 1, 7)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    norms = [m for m in model.modules() if isinstance(m, RunningBatchNorm)]
    assert len(norms) == 56 and norms[0].recipe.name == "course" and model.conv1[0].in_channels == 1
    own = build_model(settle({"model": NET, "norm": "own"}), 3, 7)
    assert sum(type(m) is nn.BatchNorm2d for m in own.modules()) == 56 and own.conv1[0].in_channels == 3


def test_weights_of_torchvision_give_the_same_output_for_grey_images_in_one_channel():
    whole = models.get_model(NET, num_classes=7).eval()
    grey = build_model(settle({"model": NET}), 1, 7).eval()
    assert nets.load_weights(grey, whole.state_dict()) == ["the weights of its 3 input channels are summed for 1"]
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), whole(x.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(grey.conv1(x), whole.conv1(x.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    "model, size, words",
    [
        ("squeezenet1_1", 8, "squeezenet1_1 cannot be trained on … Output size is too small; every net of torchvision"),
        ("squeezenet1_1", 24, ""),
    ],
)
def test_images_too_small_for_a_net_are_said_to_be(cli, model, size, words):
    status, out, err = cli("--model", model, "--size", size, "--limit", 8, "--epochs", 0, "--out", "r")
    assert status == (2 if words else 0) and all(part in err for part in words.split(" … ")), err
    if not words:
        assert f"of 1×{size}×{size}" in out and "squeezenet1_1 with no batch norm to replace" in out


# weights from a file


def net(classes=3, norm=nn.BatchNorm2d, c_in=3):
    return nn.Sequential(nn.Conv2d(c_in, 4, 3), norm(4), nn.Flatten(), nn.Linear(16, classes))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_weights_load_into_either_norm_from_either_norm():
    plain, running = net(), convert_batchnorm(net())
    for source in (plain, running):
        source(torch.randn(5, 3, 4, 4))  # statistics
        for target in (net(), convert_batchnorm(net())):
            assert nets.load_weights(target, source.state_dict()) == []
            torch.testing.assert_close(target.eval()(x := torch.randn(2, 3, 4, 4)), source.eval()(x))


def test_another_head_is_left_out_and_whatever_else_does_not_fit_is_listed():
    target, source = net(5), net(3)
    head = target[3].weight.clone()
    assert nets.load_weights(target, source.state_dict()) == [
        "its head of 3 classes is left out: that of 5 starts from random weights"
    ]
    assert torch.equal(target[3].weight, head) and torch.equal(target[0].weight, source[0].weight)
    state = {**source.state_dict(), "0.weight": torch.zeros(2, 3, 3, 3), "more": torch.zeros(1)}
    del state["1.bias"]
    with pytest.raises(ValueError, match="not those of this net .1 of another shape: 0.weight .2, 3, 3, 3. for") as e:
        nets.load_weights(net(), state)
    assert "1 missing: 1.bias; 1 unknown to the net: more): give a file of the same net" in str(e.value)


def test_weights_load_into_a_single_layer_and_a_net_without_its_head():
    layer = nn.Linear(4, 3)
    assert nets.load_weights(layer, {"weight": torch.ones(2, 4), "bias": torch.ones(2)})[0].startswith("its head of 2")
    state = {key: value for key, value in net().state_dict().items() if not key.startswith("3.")}
    assert nets.load_weights(net(), state) == ["it has no head: that of 3 starts from random weights"]


def test_names_of_older_densenets_and_auxiliary_heads_are_known():
    target = nn.Sequential(OrderedDict(layer=nn.Sequential(OrderedDict(norm1=nn.BatchNorm2d(2)))))
    state = {k.replace("norm1", "norm.1"): v + 1 for k, v in target.state_dict().items()} | {"aux1.b": torch.ones(1)}
    assert nets.load_weights(target, state) == ["its auxiliary heads are left out"]
    assert torch.equal(target.layer.norm1.weight, torch.full((2,), 2.0))


def test_a_run_starts_from_the_weights_of_another_and_needs_the_file_only_once(cli):
    assert cli("--model", "mine:small", "--out", "a", "--checkpoint-every", 2)[0] == 0
    lines = cli("--pretrained", "a/model.pt", "--model", "mine:small", "--lr", "1e-30", "--out", "b")[1]
    assert "left out" not in lines and torch.equal(weights("b")["3.weight"], weights("a")["3.weight"])
    torch.save({"state_dict": {f"module.{k}": v for k, v in net(1000).state_dict().items()}}, "wrapped.pt")
    wrapped = nets.read_weights(Path("wrapped.pt"))
    assert wrapped.keys() == net(1000).state_dict().keys()
    options = "--pretrained b/model.pt --model mine:small --checkpoint-every 2".split()
    assert cli(*options, "--out", "c")[0] == 0 and config("c")["pretrained"] == str(Path("b/model.pt").resolve())
    Path("b/model.pt").unlink()
    assert main(["train", "--resume", "c", "--epochs", "2", "--pretrained", "b/model.pt"]) == 0
    assert cli(*options, "--out", "d")[::2] == (
        2,
        "fastrbn train: error: --pretrained b/model.pt is not there: give a file of weights\n",
    )
    assert cli("--pretrained", "a/model.pt", "--out", "e")[0] == 2 and not Path("e").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "is a folder: give a file of weights"),
        (b"hello", "cannot be read as a state_dict .*save it with torch.save"),
        (net(), "it holds more than tensors, perhaps a whole model"),
        ([1], "must hold a state_dict, tensors by name; it holds a list: save it"),
        ({"epoch": 1, "opt": {}}, "it holds a dict of epoch, opt: save it"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content, words):
    path = tmp_path / "file"
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        nets.read_weights(path)


# optimisers


@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_optimiser_trains_with_pytorchs_defaults_and_decays_weights_alone(name):
    settings = settle({"opt": name, "bs": 8})
    net = nn.Linear(1, 2)
    plain = cli_train._optimiser(settings, net)(net.parameters(), lr=settings.lr)
    assert type(plain) is getattr(optim, name) and 0 < settings.lr <= 1
    assert bool(plain.param_groups[0].get("fused")) == (name in ("Adam", "AdamW"))
    if name != "SGD":
        made = getattr(optim, name)([nn.Parameter(torch.ones(2))])
        assert made.defaults["lr"] == settings.lr
        assert settings.weight_decay == made.defaults.get("weight_decay", 0)
    assert all(group.get("weight_decay", 0) in (0, settings.weight_decay) for group in plain.param_groups)


@pytest.mark.parametrize(
    "given, want",
    [
        ({"opt": "SGD", "momentum": 0.5}, {"momentum": 0.5, "nesterov": True, "weight_decay": 0}),
        ({"opt": "RMSprop", "momentum": 0.5}, {"momentum": 0.5}),
        ({"opt": "AdamW", "weight_decay": 0.0}, {"weight_decay": 0}),
    ],
)
def test_settings_reach_the_optimiser(given, want):
    net = nn.Linear(1, 2)
    made = cli_train._optimiser(settle(given), net)(net.parameters(), lr=0.1)
    assert {k: made.defaults[k] for k in want} == want


# a file of options


def test_the_configuration_of_a_run_trains_the_same_again_and_given_options_win(cli):
    assert cli("--model", "mine:small", "--norm", "course", "--bs", 10, "--momentum", 0.5, "--out", "a")[0] == 0
    assert cli("--config", "a", "--out", "b")[0] == 0, "the folder will do"
    assert same(weights("a"), weights("b")) and config("a")["arguments"] == config("b")["arguments"]
    status, out, _ = cli("--config", "a/config.json", "--bs", 20, "--norm", "own", "--out", "c")
    assert status == 0 and "batch size 20" in out and "with its own norms" in out
    assert config("c")["lr"] == config("a")["lr"], "the file's"


@pytest.mark.parametrize(
    "content, words",
    [
        ({"bs": 5, "epoch": 2}, "--config f.json: there is no epoch. Did you mean 'epochs'?"),
        ({"bs": 0}, "--config f.json: bs must be a whole number, 1 or more; got '0'"),
        ({"opt": "adamm"}, "opt must be one of ASGD, … Did you mean 'Adam'?"),
        ({"no_halt": 1}, "no_halt must be true or false; got 1"),
        ({"lr": None}, "lr must not be null"),
        ({"arguments": {"bs": 5, "nrom": "batch"}}, "there is no arguments.nrom. Did you mean 'norm'?"),
        ({"lr": 0.1, "arguments": {"lr": 0.2}}, "lr must be what arguments.lr is, 0.2: edit it there; got 0.1"),
        ([], "--config f.json: it must be an object; got []"),
        ("{", "--config f.json: Expecting property name"),
    ],
)
def test_a_file_with_a_wrong_option_is_refused_before_anything_is_loaded(cli, content, words):
    Path("f.json").write_text(content if isinstance(content, str) else json.dumps(content))
    status, out, err = cli("--config", "f.json", "--out", "r")
    assert (status, out) == (2, "") and not Path("r").exists()
    assert all(part in err for part in words.split(" … ")), err


def test_a_file_of_a_few_options_leaves_the_others_to_the_defaults(cli):
    Path("f.json").write_text(
        json.dumps({"bs": 20, "opt": "rmsprop", "layer": "conv_gn", "cb": ["GradientClip:max_norm=1"]})
    )
    assert cli("--config", "f.json", "--out", "r")[0] == 0
    made = config("r")
    assert (made["bs"], made["opt"], made["norm"], made["lr"]) == (20, "RMSprop", "group", 0.01)
    assert any("GradientClip" in cb for cb in made["callbacks"])
