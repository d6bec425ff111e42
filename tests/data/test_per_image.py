"""torchvision's transforms in a loader: image by image, on bytes, with the loader's own draws."""

import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from fastrbn.data import BatchLoader, Dataset, ImageData, RandomCrop, RandomFlip, image_databunch
from fastrbn.util import torchvision_parts


def images(n=12, c=3, side=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, c, side, side), generator=g, dtype=torch.uint8), torch.arange(n)


def equal_images(n=12):
    return images(1)[0].expand(n, -1, -1, -1).contiguous(), torch.arange(n)


def first(loader):
    return next(iter(loader))[0]


JITTER = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)


@pytest.mark.parametrize(
    "tfm",
    [
        JITTER,
        v2.RandomCrop(8, padding=4),
        v2.RandomResizedCrop(6),
        v2.RandAugment(),
        v2.Compose([v2.ToImage(), v2.RandomErasing(p=1.0, inplace=True)]),
        nn.Sequential(v2.RandomRotation(90)),
        v1.ColorJitter(0.4),
        v1.RandomOrder([v1.RandomRotation(90), v1.RandomCrop(8, padding=4)]),
    ],
    ids=lambda t: type(t).__name__,
)
def test_equal_images_get_draws_of_their_own_which_the_loader_repeats(tfm):
    x, y = equal_images()
    before = x.clone()
    loader = BatchLoader(x, y, 6, seed=3, tfms=tfm)
    random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    (a, _), (b, _) = loader
    assert type(a) is torch.Tensor and a.dtype == torch.float32
    assert len(torch.cat([a, b]).flatten(1).unique(dim=0)) > 8
    assert 0 <= a.min() and a.max() <= 1 and torch.equal(x, before)
    torch.manual_seed(9)
    random.seed(9)
    loader.set_epoch(0)
    ((again, _),) = loader.iter_from(1)
    assert torch.equal(again, b), "the end of an epoch is the same without its beginning"
    assert torch.equal(first(pickle.loads(pickle.dumps(BatchLoader(x, y, 6, seed=3, tfms=tfm)))), a)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    list(loader)
    assert torch.equal(torch.get_rng_state(), states[0]), "the global generators are as they were"
    assert random.getstate() == states[1] and np.array_equal(np.random.get_state()[1], states[2])


def test_each_image_is_what_the_transform_makes_of_its_bytes():
    x, y = images()
    seen = []
    note = v2.Lambda(lambda im: seen.append(im) or 255 - im)
    loader = BatchLoader(x, y, 12, normalize=(0.5, 0.25), tfms=note)
    seen.clear()  # it was tried
    torch.testing.assert_close(first(loader), ((255 - x).float() / 255 - 0.5) / 0.25)
    assert [im.dtype for im in seen] == [torch.uint8] * 12 and torch.equal(torch.stack(seen), x)


def test_functions_before_the_last_one_see_bytes_and_those_after_it_the_normalised_batch():
    x, y = images(4)
    seen = {}

    def look(name):
        return lambda xb: seen.setdefault(name, xb)

    tfms = [look("first"), v2.RandomInvert(p=1.0), look("middle"), v2.RandomInvert(p=1.0), look("last")]
    out = first(BatchLoader(x, y, 4, normalize=(0.5, 0.5), tfms=tfms))
    assert torch.equal(seen["first"], x) and torch.equal(seen["middle"], 255 - x)
    assert seen["last"] is out and out.dtype == torch.float32 and out.min() < 0


def test_our_crops_and_flips_mix_with_them_in_either_order():
    x, y = equal_images(40)
    before = first(BatchLoader(x, y, 40, seed=1, normalize=(0.5, 0.5), tfms=[RandomCrop(3), RandomFlip(), JITTER]))
    after = first(BatchLoader(x, y, 40, seed=1, normalize=(0.5, 0.5), tfms=[JITTER, RandomCrop(3), RandomFlip()]))
    assert ((before == -1).all(1).any(0)).any(), "the border of bytes is black"
    assert (after == 0).all(1).any(), "the border of normalised images is the mean colour"


def test_two_of_them_draw_different_numbers():
    x, y = torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.arange(40)
    add = [v2.Lambda(lambda im, by=by: im + by * int(torch.rand(()) < 0.5)) for by in (1, 2)]
    out = first(BatchLoader(x, y, 40, seed=1, tfms=add)).mul(255).round()
    assert set(out.unique().tolist()) == {0, 1, 2, 3}


def test_parts_of_a_sharded_batch_draw_different_numbers():
    x, y = equal_images(8)
    a, b = (first(BatchLoader(x, y, 4, seed=1, tfms=JITTER).shard(rank, 2)) for rank in (0, 1))
    assert not torch.equal(a, b)


def test_floats_in_0_to_1_are_images_too():
    x, y = images()
    out = first(BatchLoader(x / 255, y, 12, seed=1, normalize=(0.5, 0.5), tfms=JITTER))
    assert out.dtype == torch.float32 and out.min() < 0 and out.min() >= -1 and out.max() <= 1


def test_image_databunch_augments_training_alone():
    x, y = equal_images()
    data = ImageData("some", Dataset(x, y), Dataset(x, y), tuple("abcdefghijkl"))
    bunch = image_databunch(data, 12, augment=v2.Compose([v2.TrivialAugmentWide(), JITTER]), cutout=2)
    assert len(first(bunch.train_dl).flatten(1).unique(dim=0)) > 8
    assert len(first(bunch.valid_dl).flatten(1).unique(dim=0)) == 1
    assert "\n" not in repr(bunch.train_dl) and "tfms=(Compose( TrivialAugmentWide(" in repr(bunch.train_dl)


def test_transforms_can_be_replaced():
    loader = BatchLoader(*equal_images(), 12, seed=1)
    loader.tfms = JITTER
    assert loader.tfms == (JITTER,) and len(first(loader).flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize(
    "tfm, error, words",
    [
        (v2.CutMix(num_classes=3), ValueError, "CutMix mixes .* Use the callback fastrbn.CutMix"),
        (v2.Compose([v2.RandomApply(nn.ModuleList([v2.MixUp(num_classes=3)]))]), ValueError, "callback fastrbn.MixUp"),
        (v2.Compose([JITTER, v2.Normalize([0.5], [0.5])]), ValueError, "normalised once; .* Leave out v2.Normalize"),
        (
            v2.ToDtype(torch.float32, scale=True),
            TypeError,
            r"return torch.uint8 here; ToDtype.* torch.float32",
        ),
        (v2.FiveCrop(4), TypeError, "one image as a tensor; FiveCrop.* returned tuple"),
        (v2.ToPILImage(), TypeError, "returned Image"),
        (v2.Grayscale(), ValueError, r"keep the channels; .* made \(1, 8, 8\) of \(3, 8, 8\)"),
        (v2.RandAugment, TypeError, r"got the class RandAugment. Write RandAugment\("),
    ],
    ids=lambda v: getattr(v, "__name__", None) or type(v).__name__,
)
def test_what_a_loader_cannot_use_is_refused_when_it_is_made(tfm, error, words):
    with pytest.raises(error, match=words):
        BatchLoader(*images(), 4, normalize=(0.5, 0.5), tfms=[tfm])


def test_sizes_that_differ_within_a_batch_are_refused():
    loader = BatchLoader(*images(), 12, seed=0, tfms=v2.RandomResize(4, 30))
    with pytest.raises(ValueError, match=r"every image the same size; RandomResize.*v2.Resize\(\(8, 8\)\)"):
        list(loader)


@pytest.mark.parametrize(
    "x, words",
    [
        (torch.zeros(4, 784), r"images \(N, C, H, W\); x has shape \(4, 784\)"),
        (torch.tensor([-0.42, 2.8]).view(2, 1, 1, 1), r"clip others; x ranges from -0.42 to 2.8. .*normalize="),
        (torch.full((2, 1, 1, 1), float("nan")), "ranges from nan"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.int64), "x is torch.int64"),
    ],
)
def test_data_that_they_would_spoil_are_refused(x, words):
    with pytest.raises(ValueError, match=words):
        BatchLoader(x, torch.zeros(len(x)), 2, tfms=JITTER)


def test_parts_are_found_in_what_contains_them():
    inner = v2.RandomApply([v2.RandomCrop(3)])
    parts = torchvision_parts(nn.Sequential(nn.Identity(), inner))
    assert [type(p).__name__ for p in parts] == ["RandomApply", "RandomCrop"]
    assert torchvision_parts(RandomCrop()) == torchvision_parts(lambda xb: xb) == torchvision_parts(nn.ReLU()) == []

    class Own(v2.Transform):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(torchvision_parts(Own())) == 1
