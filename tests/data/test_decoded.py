"""Decoded images in a file: used while the images are the same, replaced when they change, never half trusted."""

import os
import warnings

import pytest
import torch
from PIL import Image

from fastrbn.data import DataNotFoundError, decoded, folder, load_dataset, load_folder


def lay_out(root, parts=("train", "test"), n=4):
    for part in parts:
        for label in range(2):
            where = root / part / "ab"[label]
            where.mkdir(parents=True)
            for k in range(n):
                Image.new("RGB", (32, 32), (100 * label + k, 0, 0)).save(where / f"{k}.png")
    return root


@pytest.fixture
def decodings(monkeypatch):
    """How many images were decoded, call by call."""
    counts, real = [], folder._decode
    monkeypatch.setattr(folder, "_decode", lambda files, *a: counts.append(len(files)) or real(files, *a))
    return counts


@pytest.fixture
def images(tmp_path):
    lay_out(tmp_path / "cifar10-jpeg")
    return tmp_path


def same(a, b):
    return all(
        torch.equal(p, q)
        for p, q in zip(
            (*vars(a.train).values(), *vars(a.valid).values()), (*vars(b.train).values(), *vars(b.valid).values())
        )
    )


def test_images_in_place_of_a_set_are_decoded_once(images, decodings):
    first, second = load_dataset("cifar10", images), load_dataset("cifar10", images)
    assert decodings == [16] and same(first, second) and first.name == second.name == "cifar10-jpeg"
    assert same(first, load_folder(images / "cifar10-jpeg")), "what a folder gives without a file beside it"
    assert sorted(os.listdir(images)) == ["cifar10-jpeg", "cifar10-jpeg.decoded.pt"]
    assert same(load_dataset("cifar10-jpeg", images), first) and decodings == [16, 16]


def test_the_seed_shuffles_cached_images_too(images, decodings):
    a, b = (load_dataset("cifar10", images, seed=s) for s in (0, 1))
    assert len(decodings) == 1 and not torch.equal(a.train.x, b.train.x)
    assert torch.equal(a.train.y, a.train.x[:, 0, 0, 0].long() // 100), "labels follow their images"


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "renamed", "touched"])
def test_other_images_are_decoded_again(images, decodings, change):
    load_dataset("cifar10", images)
    where = images / "cifar10-jpeg" / "train" / "a"
    if change == "removed":
        (where / "0.png").unlink()
    elif change == "renamed":
        (where / "0.png").rename(where / "9.png")
    elif change == "touched":
        os.utime(where / "0.png", ns=(0, 0))
    else:
        Image.new("RGB", (32, 32), (77, 9, 9)).save(where / ("9.png" if change == "added" else "0.png"))
    data = load_dataset("cifar10", images)
    assert len(decodings) == 2
    assert same(data, load_dataset("cifar10", images)) and len(decodings) == 2
    assert (data.train.x == 77).any() == (change in ("added", "replaced"))


def test_another_size_is_cached_separately(images, decodings):
    for size in (None, 8, 8):
        data = load_folder(images / "cifar10-jpeg", size=size, cache=images / "kept.pt")
    assert decodings == [16, 16] and data.train.x.shape == (8, 3, 8, 8)


def test_other_folders_are_cached_only_if_asked(images, decodings):
    for _ in range(2):
        load_dataset(images / "cifar10-jpeg")
    assert decodings == [16, 16] and os.listdir(images) == ["cifar10-jpeg"]


@pytest.mark.parametrize("content", [b"", b"no zip", "cut", {"x": 1}, "short"])
def test_a_damaged_cache_is_reported_and_rewritten(images, decodings, content):
    whole = load_dataset("cifar10", images)
    path = images / "cifar10-jpeg.decoded.pt"
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif content == "short":
        torch.save({**torch.load(path, weights_only=True), "x": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}, path)
    elif isinstance(content, dict):
        torch.save(content, path)
    else:
        path.write_bytes(content)
    with pytest.warns(
        UserWarning, match="cifar10-jpeg.decoded.pt is not a valid cache of decoded images and is rewritten"
    ):
        again = load_dataset("cifar10", images)
    assert same(again, whole) and len(decodings) == 2
    assert same(load_dataset("cifar10", images), whole) and len(decodings) == 2


def test_a_changed_bit_in_the_cached_images_is_found(images, decodings):
    whole = load_dataset("cifar10", images)
    path = images / "cifar10-jpeg.decoded.pt"
    data = path.read_bytes()
    start = data.index(bytes(load_dataset("cifar10", images).train.x[0, 0].flatten().tolist()))
    for at in (start, start + 3000, len(data) - 30, data.rindex(b"/data.pkl")):
        path.write_bytes(data[:at] + bytes([data[at] ^ 128]) + data[at + 1 :])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert same(load_dataset("cifar10", images), whole), at
        assert all("is not a valid cache of decoded images and is rewritten" in str(w.message) for w in told)
    assert len(decodings) > 2


def test_a_cache_that_cannot_be_written_is_reported_and_the_images_are_returned(images, monkeypatch):
    monkeypatch.setattr(decoded, "whole_file", lambda path: (images / "no such" / "folder").open("wb"))
    with pytest.warns(UserWarning, match="cannot be cached in .*cifar10-jpeg.decoded.pt, so every run decodes"):
        data = load_dataset("cifar10", images)
    assert len(data.train) == 8


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_no_file(images, monkeypatch, error):
    def fails(*args):
        raise error("here")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(error):
        load_dataset("cifar10", images)
    assert os.listdir(images) == ["cifar10-jpeg"]


def test_decoding_many_images_is_announced(images, monkeypatch, capsys):
    load_dataset("cifar10", images)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(decoded, "MANY", 16)
    (images / "cifar10-jpeg.decoded.pt").unlink()
    load_dataset("cifar10", images)
    assert (
        capsys.readouterr().err
        == f"decoding 16 images once; the result is cached in {images}/cifar10-jpeg.decoded.pt\n"
    )


def test_a_share_of_the_training_images_may_be_held_out_instead_of_the_test_images(images):
    data = load_dataset("cifar10", images, valid=0.25)
    assert (len(data.train), len(data.valid), data.name) == (6, 2, "cifar10-jpeg")


def test_a_missing_set_without_images_is_not_found(tmp_path, images):
    with pytest.raises(DataNotFoundError, match="CIFAR100 was not found in"):
        load_dataset("cifar100", images, download=False)
    with pytest.raises(DataNotFoundError, match="'cifar100-jpeg' is neither"):
        load_dataset("cifar100-jpeg", images)


def test_a_size_leaves_the_cache_as_it_is(images):
    load_dataset("cifar10", images)
    before = (images / "cifar10-jpeg.decoded.pt").stat().st_mtime_ns
    data = load_dataset("cifar10-jpeg", images, size=8)
    assert data.train.x.shape[2:] == (8, 8) and data.name == "cifar10-jpeg"
    assert (images / "cifar10-jpeg.decoded.pt").stat().st_mtime_ns == before
