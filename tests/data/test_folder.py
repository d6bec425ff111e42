"""Folders of images: decoded, shuffled, split; every fault is named."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrbn.data import BadDataError, DataNotFoundError, load_dataset, load_folder

REAL = Path(os.environ.get("FASTRBN_DATA") or "/nowhere") / "cifar10-jpeg"


def colour(k):
    return (k % 256, 2 * k % 256, 255 - k % 256)


def write(folder, n, start=0, size=(6, 4), mode="RGB", kind="png"):
    """n images of one colour each, `colour(start)` and on."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(start, start + n):
        Image.new("RGB", size, colour(k)).convert(mode).save(folder / f"{k:03}.{kind}")


def make(root, parts=("train", "valid"), classes=("cat", "dog"), n=5):
    start = 0
    for part in parts:
        for c in classes:
            write(root / part / c, n, start)
            start += n
    return root


def numbers(x):
    """Which image each is, and that its channels are in order."""
    k = x[:, 0, 0, 0].long()
    assert torch.equal(x, torch.tensor([colour(int(i)) for i in k], dtype=torch.uint8)[:, :, None, None].expand_as(x))
    return k


@pytest.mark.parametrize("held", ["valid", "val", "test"])
def test_train_and_validation_folders_keep_their_images_and_labels(held, tmp_path):
    data = load_dataset(make(tmp_path / "pets", ("train", held)))
    assert data.train.x.shape == (10, 3, 4, 6) and data.train.x.dtype == torch.uint8
    order = numbers(data.train.x)
    assert torch.equal(order.sort().values, torch.arange(10)) and torch.equal(data.train.y, order // 5)
    assert torch.equal(numbers(data.valid.x), torch.arange(10, 20))
    assert torch.equal(data.valid.y, torch.arange(10) // 5)
    assert (data.name, data.classes, data.c_in) == ("pets", ("cat", "dog"), 3)


def test_training_images_are_shuffled_by_seed(tmp_path):
    make(tmp_path, n=30)
    a, b, c = (numbers(load_folder(tmp_path, seed=s).train.x) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert 0 < (a[:20] < 30).sum() < 20


def test_valid_is_preferred_to_test_unless_asked(tmp_path):
    make(tmp_path, ("train", "test", "valid"))
    assert numbers(load_folder(tmp_path).valid.x).min() == 20
    assert numbers(load_folder(tmp_path, valid="test").valid.x).min() == 10


@pytest.mark.parametrize("valid, held", [("auto", 4), (0.5, 10), (0.01, 1), (0.99, 19)])
def test_a_single_folder_is_split_class_by_class(valid, held, tmp_path):
    make(tmp_path, ("all",), n=20)
    data = load_folder(tmp_path / "all", valid=valid, seed=1)
    assert data.valid.y.bincount().tolist() == [held, held]
    both = torch.cat([numbers(data.train.x), numbers(data.valid.x)])
    assert torch.equal(both.sort().values, torch.arange(40))
    assert torch.equal(both // 20, torch.cat([data.train.y, data.valid.y]))
    again = load_folder(tmp_path / "all", valid=valid, seed=1)
    assert torch.equal(numbers(again.valid.x), numbers(data.valid.x))


def test_many_images_come_in_order_from_any_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrbn.data.folder.CHUNK", 7)
    make(tmp_path, n=50)
    a, b = (load_folder(tmp_path, workers=w) for w in (1, 5))
    assert torch.equal(a.train.x, b.train.x)
    assert torch.equal(numbers(a.valid.x), torch.arange(100, 200))


def test_grey_images_have_one_channel_unless_one_is_coloured(tmp_path):
    for part in ("train", "valid"):
        write(tmp_path / part / "a", 3, mode="L")
    grey = load_folder(tmp_path)
    assert grey.train.x.shape == (3, 1, 4, 6) and grey.c_in == 1
    write(tmp_path / "valid" / "a", 1, start=90)
    data = load_folder(tmp_path)
    assert data.train.x.shape == (3, 3, 4, 6)
    assert torch.equal(data.train.x, grey.train.x.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_palettes_and_transparency_become_rgb(mode, tmp_path):
    write(tmp_path / "a", 3, mode=mode)
    assert load_folder(tmp_path).train.x.shape[1] == 3


@pytest.mark.parametrize("size, shape", [(8, (8, 8)), ((5, 7), (5, 7))])
def test_images_of_different_sizes_are_resized(size, shape, tmp_path):
    write(tmp_path / "a", 2, size=(12, 9))
    write(tmp_path / "a", 3, start=2, size=(6, 30))
    data = load_dataset(tmp_path, size=size)
    assert data.train.x.shape[2:] == shape
    numbers(torch.cat([data.train.x, data.valid.x]))


def test_resizing_cuts_at_the_centre(tmp_path):
    a = np.zeros((10, 30, 3), np.uint8)
    a[:, 10:20] = 200
    for k in range(2):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(a).save(tmp_path / "a" / f"{k}.png")
    assert load_folder(tmp_path, size=10).train.x.unique().tolist() == [200]


def test_different_sizes_without_resizing_name_two_files(tmp_path):
    write(tmp_path / "a", 2)
    write(tmp_path / "a", 1, start=7, size=(9, 5))
    with pytest.raises(
        BadDataError, match=r"a/000.png is 4 by 6 .*a/007.png is 5 by 9 .*size=N, or `fastrbn train --size N`"
    ):
        load_folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_folder(tmp_path / "nowhere")


def test_a_folder_without_class_folders_is_refused(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(BadDataError, match="a folder of images for each class.*no folders"):
        load_folder(tmp_path)


def test_an_empty_class_is_named(tmp_path):
    make(tmp_path)
    (tmp_path / "train" / "ant").mkdir()
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    with pytest.raises(BadDataError, match="train/ant. Remove it") as e:
        load_folder(tmp_path)
    assert isinstance(e.value, ValueError)


def test_classes_that_differ_between_the_folders_are_named(tmp_path):
    make(tmp_path)
    write(tmp_path / "valid" / "eel", 1)
    with pytest.raises(BadDataError, match="same class folders; eel is in only one"):
        load_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", "half"], ids=["empty", "text", "truncated"])
def test_an_unreadable_image_is_named(content, tmp_path):
    make(tmp_path)
    path = tmp_path / "valid" / "dog" / "bad.jpg"
    if content == "half":
        noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    with pytest.raises(BadDataError, match=r"1 of 21 are not: .*dog/bad.jpg.*Replace or delete it"):
        load_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    make(tmp_path)
    os.mkfifo(tmp_path / "train" / "dog" / "pipe.png")
    with pytest.raises(BadDataError, match=r"1 of 21 are not: .*dog/pipe.png \(neither a file nor a link to one\)"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    "link, target, again",
    [
        ("train/cat/up", "train", "train/cat/up/cat is .*train/cat again"),
        ("train/cat/self", "train/cat", "train/cat/self is .*train/cat again"),
        ("train/emu", "train/cat", "train/emu is .*train/cat again"),
        ("valid/dog/more", "train/dog", "valid/dog/more is .*train/dog again"),
    ],
)
def test_a_link_that_leads_to_a_folder_twice_is_refused(link, target, again, tmp_path):
    make(tmp_path)
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(BadDataError, match=f"each folder of images must be found only once; .*{again}, through a link"):
        load_folder(tmp_path)


def test_links_to_folders_elsewhere_and_folders_within_a_class_are_followed(tmp_path):
    make(tmp_path / "store", ("a",), n=3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "a" / "cat")
    write(tmp_path / "data" / "dog" / "young" / "small", 2, 3)
    write(tmp_path / "data" / "dog", 2, 5)
    data = load_folder(tmp_path / "data", valid=0.5)
    x, y = torch.cat([data.train.x, data.valid.x]), torch.cat([data.train.y, data.valid.y])
    order = numbers(x).sort()
    assert order.values.tolist() == list(range(7)) and y[order.indices].tolist() == [0] * 3 + [1] * 4


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    make(tmp_path)
    write(tmp_path / "train" / "dog" / "closed", 1)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadDataError, match="every folder must be readable; .*dog/closed is not: Permission denied"):
        load_folder(tmp_path)


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    root = tmp_path / "b\udcffb"
    make(root, classes=("k\udce4fer", "ähre"))
    data = load_folder(root)
    assert (data.name, data.classes) == ("b\\xffb", ("k\\xe4fer", "ähre"))
    assert data.train.y.bincount().tolist() == [5, 5]


def test_images_of_more_than_8_bits_are_refused_not_clipped(tmp_path):
    make(tmp_path)
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "train" / "dog" / "deep.png")
    with pytest.raises(BadDataError, match="deep.png.*8 bits per channel"):
        load_folder(tmp_path)


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    write(tmp_path / "a", 3)
    write(tmp_path / "lone", 1)
    with pytest.raises(BadDataError, match="'lone' has 1"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    "parts, kwargs, error, words",
    [
        (("train",), {}, DataNotFoundError, "valid or val or test"),
        (("train", "valid"), {"valid": "test"}, DataNotFoundError, "validation images: test"),
        (("train", "valid"), {"valid": 0.5}, ValueError, "train folder, which is not split; got valid=0.5"),
        (("a", "b"), {"valid": "test"}, DataNotFoundError, "has no train"),
        (("train", "valid"), {"size": 0}, ValueError, "size must be a side"),
        (("train", "valid"), {"size": (1, 2, 3)}, ValueError, "size must be a side"),
        (("train", "valid"), {"valid": -0.5}, ValueError, "-0.5"),
    ],
)
def test_layouts_that_do_not_fit_the_request_are_refused(parts, kwargs, error, words, tmp_path):
    make(tmp_path, parts)
    with pytest.raises(error, match=words):
        load_folder(tmp_path, **kwargs)


@pytest.mark.skipif(not REAL.is_dir(), reason="real images: FASTRBN_DATA is not a folder that holds cifar10-jpeg")
def test_real_jpegs_decode(tmp_path):
    for part in ("train", "test"):
        for c in sorted((REAL / part).iterdir()):
            (tmp_path / part / c.name).mkdir(parents=True)
            for f in sorted(c.iterdir())[:20]:
                (tmp_path / part / c.name / f.name).symlink_to(f)
    data = load_dataset(tmp_path)
    assert data.train.x.shape == data.valid.x.shape == (200, 3, 32, 32) and data.c == 10
    assert data.train.y.bincount().tolist() == [20] * 10
    assert all(0.3 < m < 0.6 for m in data.mean) and all(0.15 < s < 0.35 for s in data.std)
