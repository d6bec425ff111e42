"""The drawn digits: repeatable, quick, without side effects, and of the difficulty promised."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrbn
from fastrbn.data import DataNotFoundError, glyphs, image_databunch, load_dataset


@pytest.fixture(scope="module")
def digits():
    return glyphs()


def test_the_set_has_its_shapes_types_and_classes(digits):
    assert digits.train.x.shape == (20000, 1, 28, 28) and digits.valid.x.shape == (4000, 1, 28, 28)
    assert digits.train.x.dtype == torch.uint8 and digits.train.y.dtype == torch.int64
    assert digits.classes == tuple("0123456789") and (digits.c, digits.c_in, digits.name) == (10, 1, "glyphs")


def test_each_digit_is_there_equally_often(digits):
    assert digits.train.y.bincount().tolist() == [2000] * 10
    assert digits.valid.y.bincount().tolist() == [400] * 10


def test_digits_are_white_on_black_whole_and_not_blank(digits):
    x = digits.train.x.float()
    assert (x.flatten(1).max(1).values > 150).all()
    assert x.flatten(1).median(1).values.max() < 60
    assert x.mean((0, 1))[10:18, 10:18].mean() > 5 * x.mean((0, 1))[:2].mean()


def test_no_two_images_are_alike(digits):
    both = torch.cat([digits.train.x, digits.valid.x]).flatten(1).float()
    marks = both @ torch.randn(784, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    assert len(marks.unique()) > 0.999 * len(marks)


def test_one_seed_gives_one_set_and_another_gives_another():
    a, b, c = glyphs(100, 50, seed=3), glyphs(100, 50, seed=3), glyphs(100, 50, seed=4)
    assert torch.equal(a.train.x, b.train.x) and torch.equal(a.valid.x, b.valid.x) and torch.equal(a.valid.y, b.valid.y)
    assert not torch.equal(a.train.x, c.train.x)


def test_a_quarter_of_the_validation_images_use_unseen_fonts(monkeypatch):
    module, drawn = sys.modules["fastrbn.data.glyphs"], []
    monkeypatch.setattr(
        module, "_draw", lambda atlas, cell, *_: drawn.append(cell) or cell.new_zeros(len(cell), 1, 28, 28)
    )
    data = glyphs(2000, 2000)
    train, valid = drawn
    assert not torch.equal(train, valid)
    seen = len(module.TRAIN_FONTS)
    assert (train // 10).unique().tolist() == list(range(seen))
    assert 400 < (valid // 10 >= seen).sum() < 600 and (valid // 10).max() == seen + len(module.UNSEEN_FONTS) - 1
    assert torch.equal(train % 10, data.train.y) and not torch.equal(data.train.y, data.valid.y)


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    glyphs(20, 20)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_dataset_knows_the_glyphs_and_passes_the_seed(monkeypatch):
    monkeypatch.setattr("fastrbn.data.sets.glyphs", lambda seed: f"glyphs of {seed}")
    assert load_dataset("glyphs", seed=3) == "glyphs of 3"


@pytest.mark.parametrize("sizes", [(9, 100), (100, 0)])
def test_fewer_than_ten_images_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 10"):
        glyphs(*sizes)


def test_missing_fonts_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataNotFoundError, match="DejaVuSans.ttf.*Reinstall"):
        glyphs(10, 10)


def test_a_fresh_process_draws_them_without_pyplot_and_torchvision_in_as_many_threads_as_it_had():
    code = """if True:
        import sys, torch
        threads = torch.get_num_threads()
        from fastrbn.data import glyphs
        glyphs(10, 10)
        assert not {"matplotlib.pyplot", "matplotlib.font_manager", "torchvision"} & set(sys.modules)
        assert torch.get_num_threads() == threads"""
    env = {**os.environ, "PYTHONPATH": str(Path(fastrbn.__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def course_net():
    layers, nf = [], 1
    for out, size in ((8, 5), (16, 3), (32, 3), (64, 3), (64, 3)):
        layers += [nn.Conv2d(nf, out, size, 2, size // 2, bias=False), nn.ReLU(), nn.BatchNorm2d(out)]
        nn.init.kaiming_normal_(layers[-3].weight)
        nf = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nf, 10))


def accuracy(model, data):
    model.eval()
    with torch.no_grad():
        return sum((model(xb).argmax(1) == yb).sum().item() for xb, yb in data.valid_dl) / len(data.valid_ds)


def trained(model, digits, opt, lrs, bs, epochs):
    data = image_databunch(digits, bs, seed=0)
    total, step = epochs * len(data.train_dl), 0
    for _ in range(epochs):
        for xb, yb in data.train_dl:
            for group in opt.param_groups:
                group["lr"] = lrs[0] + (lrs[1] - lrs[0]) * step / total
            F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
            step += 1
    return accuracy(model, data)


def test_a_linear_model_stays_below_95_percent(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    got = trained(model, digits, torch.optim.Adam(model.parameters()), (5e-3, 1e-5), 200, epochs=8)
    assert 0.85 < got < 0.95


def test_the_course_net_passes_97_percent_in_an_epoch(digits):
    model = course_net()
    assert trained(model, digits, torch.optim.SGD(model.parameters()), (0.4, 0.04), 32, epochs=1) > 0.97
