"""`fastrbn train --augment`: names, the user's functions, and a run that is resumed."""

import json
from pathlib import Path

import pytest
from torchvision.transforms import v2

from fastrbn.cli import main, run_folder
from fastrbn.cli import train as cli_train
from fastrbn.data import RandomCrop, RandomFlip, glyphs
from fastrbn.trainer.augment import transforms

OWN = """
from torchvision.transforms import v2

def gentle():
    return v2.RandomRotation(10)

def several():
    return [v2.RandomRotation(10), v2.RandomErasing()]

def needs(size):
    return v2.RandomCrop(size)

def floats():
    return v2.ToDtype(__import__("torch").float32)
"""


@pytest.fixture(scope="module")
def small():
    return glyphs(16, 10)


@pytest.fixture
def cli(small, tmp_path, monkeypatch, capsys):
    """cli("train", …) in a folder with the module own_augment gives status and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_augment", raising=False)
    Path("own_augment.py").write_text(OWN)
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
    monkeypatch.setattr(cli_train, "load_dataset", lambda name, *a, **k: small)

    build = cli_train._build

    def run(*args):
        return main([*map(str, args)]), capsys.readouterr().err

    def built(*args):
        made = build(*args)
        run.built.append(made[0])
        return made

    run.built = []
    monkeypatch.setattr(cli_train, "_build", built)
    return run


def test_names_stand_for_transforms_in_their_order(cli):
    assert transforms(None, (8, 8)) is None and transforms("none", (8, 8)) == []
    made = transforms("color,resized-crop,trivial,randaugment,crop,flip", (8, 9))
    kinds = [v2.ColorJitter, v2.RandomResizedCrop, v2.TrivialAugmentWide, v2.RandAugment, RandomCrop, RandomFlip]
    assert [type(t) for t in made] == kinds and tuple(made[1].size) == (8, 9)
    own = transforms("flip,own_augment:several,own_augment:gentle", (8, 8))
    assert [type(t) for t in own] == [RandomFlip, v2.RandomRotation, v2.RandomErasing, v2.RandomRotation]


def test_a_run_is_augmented_and_goes_on_as_it_was(cli):
    options = ("--augment", "trivial, crop,own_augment:gentle", "--checkpoint-every", 2)
    assert cli("train", "glyphs", *options, "--out", "r") == (0, "")
    assert json.loads(Path("r/config.json").read_text())["augment"] == "trivial,crop,own_augment:gentle"
    assert cli("train", "--resume", "r", "--epochs", 2) == (0, "")
    kinds = [v2.TrivialAugmentWide, RandomCrop, v2.RandomRotation]
    assert [[type(t) for t in learn.data.train_dl.tfms] for learn in cli.built] == [kinds, kinds]
    status, err = cli("train", "--resume", "r", "--augment", "crop")
    assert status == 2 and "--augment does not go with --resume" in err


@pytest.mark.parametrize(
    "names, words",
    [
        (
            "trivail",
            "--augment: must be one of none, crop, … got 'trivail'. Did you mean 'trivial'? Your own: package",
        ),
        ("none,flip", "must be none, or names without it; got 'none,flip'"),
        ("own-augment:gentle", "must name a function as package.module:function; got 'own-augment:gentle'"),
        ("own_augment:gentel", "own_augment has none of that name. Did you mean 'gentle'?"),
        ("nosuch:f", "--augment must name a function … nosuch:f: there is no module 'nosuch'"),
        ("own_augment:needs", "takes no arguments and returns transforms; it failed: … needs()"),
        ("own_augment:floats", "cannot train on glyphs: tfms take and return torch.uint8 here"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(cli, names, words):
    status, err = cli("train", "glyphs", "--augment", names, "--out", "r")
    assert status == 2 and not Path("r").exists()
    assert all(part in err for part in words.split(" … ")), err
