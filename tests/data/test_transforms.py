"""view_tfm, normalize_to and the two augmentations, against plain loops."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrbn.data import Cutout, RandomCrop, RandomFlip, normalize_to, to_channels_last, view_tfm


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "tfm", [view_tfm(1, 28, 28), view_tfm((1, 28, 28)), pickle.loads(pickle.dumps(view_tfm(1, 28, 28)))]
)
def test_view_tfm_makes_images_of_rows(tfm):
    x = torch.arange(2 * 784).view(2, 784)
    assert torch.equal(tfm(x), x.view(2, 1, 28, 28))
    assert torch.equal(tfm(x[:, ::1].T.contiguous().T), x.view(2, 1, 28, 28))


def test_view_tfm_names_the_shape_that_does_not_divide():
    with pytest.raises(ValueError, match=r"multiple of 784.*\(2, 780\)"):
        view_tfm(1, 28, 28)(torch.zeros(2, 780))


@pytest.mark.parametrize("size", [(), (0,), (-1, 28), ("28",), (2.0,)])
def test_view_tfm_takes_positive_integers_only(size):
    with pytest.raises(ValueError, match="positive integers"):
        view_tfm(*size)


def test_normalize_to_uses_the_training_statistics_for_both():
    train, valid = torch.randn(50, 4, generator=generator()) * 3 + 2, torch.full((2, 4), 7.0)
    a, b = normalize_to(train, valid)
    assert abs(a.mean()) < 1e-6 and abs(a.std() - 1) < 1e-6
    torch.testing.assert_close(b, (valid - train.mean()) / train.std())


@pytest.mark.parametrize(
    "train, valid, words",
    [
        (torch.ones(5), torch.ones(5), "which is 0"),
        (torch.ones(5, dtype=torch.uint8), torch.ones(5), "train is torch.uint8"),
        (torch.arange(5.0), torch.arange(5), "valid is torch.int64"),
        (torch.tensor([1.0, float("nan")]), torch.ones(5), "which is nan"),
    ],
)
def test_normalize_to_refuses_what_it_cannot_divide(train, valid, words):
    with pytest.raises(ValueError, match=words):
        normalize_to(train, valid)


@settings(deadline=None, max_examples=50, database=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_each_crop_is_a_window_of_its_own_padded_image(n, c, padding, seed):
    x = torch.randn(n, c, 5, 6, generator=generator(seed))
    out = RandomCrop(padding)(x, generator(seed))
    assert out.shape == x.shape
    for before, after in zip(F.pad(x, (padding,) * 4), out):
        windows = before.unfold(1, 5, 1).unfold(2, 6, 1)
        assert any(torch.equal(windows[:, i, j], after) for i in range(2 * padding + 1) for j in range(2 * padding + 1))


def test_crops_reach_every_position():
    x = torch.arange(1.0, 10).view(1, 1, 3, 3).expand(500, -1, -1, -1)
    assert len(RandomCrop(1)(x, generator()).flatten(1).unique(dim=0)) == 9


def test_the_crops_border_is_filled_as_asked():
    out = RandomCrop(2, fill=9.0)(torch.zeros(50, 1, 3, 3), generator())
    assert set(out.unique().tolist()) == {0.0, 9.0}


def test_about_half_of_the_images_are_flipped():
    x = torch.randn(1000, 2, 3, 4, generator=generator())
    out = RandomFlip()(x, generator(1))
    flipped = (out == x.flip(-1)).flatten(1).all(1)
    kept = (out == x).flatten(1).all(1)
    assert torch.equal(flipped, ~kept) and 430 < flipped.sum() < 570


def test_flip_probabilities_of_0_and_1_are_certain():
    x = torch.randn(20, 1, 2, 3)
    assert torch.equal(RandomFlip(0)(x, generator()), x)
    assert torch.equal(RandomFlip(1)(x, generator()), x.flip(-1))


@pytest.mark.parametrize("tfm", [RandomCrop(2), RandomFlip()], ids=repr)
def test_augmentation_follows_its_generator_and_leaves_its_input(tfm):
    x = torch.randn(30, 3, 8, 8, generator=generator())
    before = x.clone()
    torch.testing.assert_close(tfm(x, generator(4)), tfm(x, generator(4)), rtol=0, atol=0)
    assert not torch.equal(tfm(x, generator(4)), tfm(x, generator(5)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("tfm", [RandomCrop(), RandomFlip()], ids=repr)
def test_augmentation_of_rows_is_refused(tfm):
    with pytest.raises(ValueError, match=r"\(2, 784\)"):
        tfm(torch.zeros(2, 784), generator())


@pytest.mark.parametrize("make", [lambda: RandomCrop(0), lambda: RandomFlip(1.5), lambda: RandomCrop(1.5)])
def test_invalid_settings_of_augmentations_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


@settings(deadline=None, max_examples=50, database=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 9), st.integers(0, 99))
def test_cutout_blanks_a_square_around_one_of_the_pixels_and_nothing_else(n, c, size, seed):
    x = torch.rand(n, c, 5, 6, generator=generator(seed)) + 1
    out = Cutout(size, fill=-1.0)(x, generator(seed))
    for before, after in zip(x, out):
        squares = []
        for row in range(5):
            for column in range(6):
                wanted = before.clone()
                top, left = row - size // 2, column - size // 2
                wanted[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = -1
                squares.append(torch.equal(after, wanted))
        assert any(squares)


def test_cutout_centres_are_uniform_and_drawn_per_image():
    blank = (Cutout(1)(torch.ones(40_000, 1, 4, 5), generator()) == 0).float()
    assert torch.equal(blank.sum((1, 2, 3)), torch.ones(40_000))
    torch.testing.assert_close(blank.mean((0, 1)), torch.full((4, 5), 1 / 20), atol=0.005, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_cutout_keeps_dtype_and_its_input(dtype):
    x = torch.ones(4, 3, 8, 8, dtype=dtype)
    out = Cutout(4)(x, generator())
    assert out.dtype == dtype
    assert x.eq(1).all() and out.eq(0).any()
    assert repr(pickle.loads(pickle.dumps(Cutout(4)))) == "Cutout(size=4, fill=0.0)"


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_cutout_refuses_an_invalid_size(size):
    with pytest.raises(ValueError, match="positive number of pixels; got"):
        Cutout(size)


@pytest.mark.parametrize("tfm", [to_channels_last, lambda x: Cutout()(x, generator())])
def test_cutout_and_memory_order_are_for_images(tfm):
    with pytest.raises(ValueError, match=r"batches of images \(N, C, H, W\); got shape \(2, 784\)"):
        tfm(torch.zeros(2, 784))
