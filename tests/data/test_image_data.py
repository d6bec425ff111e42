"""ImageData's statistics, and the loaders made from it."""

import pickle

import pytest
import torch

from fastrbn.data import Cutout, Dataset, ImageData, RandomCrop, RandomFlip, image_databunch


def some_images(name="some", n=1000, c=3):
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(n, c, 8, 8, generator=g) * torch.tensor([255.0, 100, 30])[:c, None, None]).to(torch.uint8)
    y = torch.arange(n) % 5
    return ImageData(name, Dataset(x[200:], y[200:]), Dataset(x[:200], y[:200]), tuple("abcde"))


def test_statistics_are_those_of_the_training_images():
    data = some_images()
    x = data.train.x.double() / 255
    torch.testing.assert_close(torch.tensor(data.mean).double(), x.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(data.std).double(), x.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_image_data_is_frozen_and_has_a_repr():
    data = some_images()
    with pytest.raises(AttributeError):
        data.name = "other"
    assert repr(data) == "ImageData('some', 800 training and 200 validation images of (3, 8, 8), 5 classes)"
    assert len(pickle.loads(pickle.dumps(data)).train) == 800


def test_a_bunch_is_normalised_per_channel_with_training_statistics():
    data = image_databunch(some_images(), 100)
    x = torch.cat([xb for xb, _ in data.train_dl]).double()
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    (xb, yb), *_ = data.valid_dl
    assert xb.shape == (200, 3, 8, 8) and xb.dtype == torch.float32 and yb.dtype == torch.int64
    assert (data.c, data.c_in, data.train_dl.bs, data.valid_dl.bs) == (5, 3, 100, 200)


@pytest.mark.parametrize(
    "name, augment, kinds",
    [
        ("cifar10", None, [RandomCrop, RandomFlip]),
        ("cifar100", None, [RandomCrop, RandomFlip]),
        ("mnist", None, []),
        ("glyphs", None, []),
        ("cifar10", False, []),
        ("mnist", True, [RandomCrop, RandomFlip]),
        ("mnist", [RandomCrop(2)], [RandomCrop]),
    ],
)
def test_augmentation_depends_on_the_set_unless_given(name, augment, kinds):
    data = image_databunch(some_images(name), 8, augment=augment)
    assert [type(t) for t in data.train_dl.tfms] == kinds and data.valid_dl.tfms == ()


@pytest.mark.parametrize("limit, n_train, n_valid", [(80, 80, 150), (1, 1, 150), (400, 400, 150), (10**6, 1500, 300)])
def test_a_limit_keeps_the_first_images_and_the_same_share_of_validation(limit, n_train, n_valid, monkeypatch):
    monkeypatch.setattr("fastrbn.data.image_data.LEAST_VALID", 150)
    whole = some_images(n=1800)
    whole = ImageData("some", Dataset(*whole.train[:1500]), Dataset(*whole.train[1300:1600]), whole.classes)
    data = image_databunch(whole, 8, limit=limit)
    assert (len(data.train_ds), len(data.valid_ds)) == (n_train, n_valid)
    assert torch.equal(data.train_ds.x, whole.train.x[:limit])
    assert data.train_dl.normalize == image_databunch(whole, 8).train_dl.normalize


def test_a_limit_keeps_every_class_of_a_sorted_validation_set(monkeypatch):
    monkeypatch.setattr("fastrbn.data.image_data.LEAST_VALID", 20)
    x, y = torch.arange(6400).remainder(256).to(torch.uint8).view(100, 1, 8, 8), torch.arange(100) // 20
    held = Dataset(torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 1, 8, 8), y)
    data = image_databunch(ImageData("pets", Dataset(x, y.flip(0)), held, tuple("abcde")), 8, limit=10)
    assert data.valid_ds.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert torch.equal(data.valid_ds.x[:, 0, 0, 0].long() // 20, data.valid_ds.y), "images and labels stay together"


def test_cutout_comes_after_the_other_augmentations_and_only_in_training():
    data = image_databunch(some_images("cifar10-jpeg"), 8, cutout=3)
    assert [type(t) for t in data.train_dl.tfms] == [RandomCrop, RandomFlip, Cutout] and data.valid_dl.tfms == ()
    assert data.train_dl.tfms[-1].size == 3
    with pytest.raises(ValueError, match="positive number of pixels; got 0"):
        image_databunch(some_images(), 8, cutout=0)


def test_channels_last_batches_have_the_same_values_in_that_memory_order():
    plain, last = (image_databunch(some_images("cifar10"), 50, cutout=2, channels_last=c) for c in (False, True))
    for a, b in zip([*plain.train_dl, *plain.valid_dl], [*last.train_dl, *last.valid_dl]):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert b[0].is_contiguous(memory_format=torch.channels_last) and not b[0].is_contiguous()
    assert "Cutout(size=2, fill=0.0), to_channels_last)" in repr(last.train_dl), "by its name, not its address"


def test_options_of_the_bunch_reach_the_loaders():
    data = image_databunch(some_images(), 9, valid_bs=7, seed=5, drop_last=True, device="meta")
    assert (data.valid_dl.bs, data.train_dl.seed, data.train_dl.drop_last) == (7, 5, True)
    assert data.train_dl.device.type == data.valid_dl.device.type == "meta"


@pytest.mark.parametrize("kwargs, words", [({"bs": 0}, "batch size"), ({"bs": 8, "limit": 0}, "at least 1, .*; got 0")])
def test_invalid_sizes_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        image_databunch(some_images(), **kwargs)
