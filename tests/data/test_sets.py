"""Named data sets: found, checked, downloaded completely or not at all. No test needs the network."""

import gzip
import hashlib
import os
import pickle
import tarfile
import threading
import urllib.error
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from fastrbn.data import BadDataError, DataNotFoundError, DownloadError, data_root, get_data, glyphs, load_dataset, sets
from fastrbn.data import download as download_module

REAL = Path(os.environ.get("FASTRBN_DATA") or "/nowhere")
needs_mnist = pytest.mark.skipif(
    not (REAL / "MNIST/raw/train-images-idx3-ubyte").is_file(),
    reason="real MNIST: FASTRBN_DATA is not a folder that holds MNIST/raw",
)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def idx(shape, values):
    head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return head + values.tobytes()


@pytest.fixture(scope="session")
def mirror(tmp_path_factory):
    """Stand-ins for MNIST's four archives, to be served: pixel 0 and 1 hold the image's number."""
    folder = tmp_path_factory.mktemp("mirror")
    for name, n in (("train", 60000), ("t10k", 10000)):
        x = np.zeros((n, 28, 28), np.uint8)
        x[:, 0, 0], x[:, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
        y = (np.arange(n) // 3 % 10).astype(np.uint8)
        for kind, data in (("images-idx3", idx((n, 28, 28), x)), ("labels-idx1", idx((n,), y))):
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(data, 1))
    return folder


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(folder): an address on this machine from which its files can be downloaded."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def fake_mnist(mirror, serve, monkeypatch):
    """torchvision's MNIST with our mirror for an address."""
    cls = torchvision.datasets.MNIST
    resources = [(name, md5(mirror / name)) for name, _ in cls.resources]
    monkeypatch.setattr(cls, "resources", resources)
    monkeypatch.setattr(cls, "mirrors", [serve(mirror)])
    return cls


@pytest.fixture
def no_network(monkeypatch):
    """The addresses that were requested."""
    asked = []

    def refuse(request, *args, **kwargs):
        asked.append(request.full_url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


def lay_out(mirror, root):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in mirror.iterdir():
        (raw / archive.stem).write_bytes(gzip.decompress(archive.read_bytes()))
    return raw


def image_numbers(x):
    return x[:, 0, 0, 0].long() + 256 * x[:, 0, 0, 1].long()


def test_the_data_folder_is_the_argument_or_the_variable_or_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRBN_DATA", "~/elsewhere")
    assert data_root(tmp_path) == tmp_path and data_root() == Path.home() / "elsewhere"
    monkeypatch.setenv("FASTRBN_DATA", "")
    assert data_root() == Path.home() / ".cache/fastrbn/data"


def test_without_a_home_directory_the_data_folder_is_required(monkeypatch):
    monkeypatch.delenv("FASTRBN_DATA", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    with pytest.raises(DataNotFoundError, match="no home directory .*Give the folder .* --data-dir or FASTRBN_DATA"):
        data_root()


def test_a_data_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadDataError, match="must be a folder.*file"):
        load_dataset("mnist", tmp_path / "file")


def test_mnist_is_downloaded_once_and_found_later_without_network(fake_mnist, monkeypatch, tmp_path, capfd):
    root = tmp_path / "new" / "data"
    first = load_dataset("mnist", root)
    assert sorted(p.name for p in root.iterdir()) == ["MNIST"]
    assert capfd.readouterr().err.count("\n") == 1  # no progress bars into a file
    monkeypatch.setattr("urllib.request.urlopen", None)
    monkeypatch.setattr(fake_mnist, "mirrors", [])
    again = load_dataset("mnist", root, download=False)
    assert torch.equal(first.train.x, again.train.x)
    assert capfd.readouterr().err == ""


def test_mnist_has_the_courses_split_and_its_test_images_on_demand(fake_mnist, mirror, tmp_path):
    lay_out(mirror, tmp_path)
    data = load_dataset("mnist", tmp_path)
    assert torch.equal(image_numbers(data.train.x), torch.arange(50000))
    assert torch.equal(image_numbers(data.valid.x), torch.arange(50000, 60000))
    assert (data.name, data.c, data.c_in, data.train.x.dtype) == ("mnist", 10, 1, torch.uint8)
    data = load_dataset("mnist", tmp_path, valid="test")
    assert len(data.train) == 60000 and torch.equal(image_numbers(data.valid.x), torch.arange(10000))


@pytest.mark.parametrize("size, shape", [(40, (40, 40)), ((9, 14), (9, 14))])
def test_the_images_of_a_named_set_are_scaled_as_a_folders_are(size, shape, monkeypatch, tmp_path):
    monkeypatch.setattr(sets, "glyphs", lambda seed: glyphs(30, 10, seed))
    data = load_dataset("glyphs", size=size)
    assert data.train.x.shape == (30, 1, *shape) and data.valid.x.shape == (10, 1, *shape)
    assert data.train.x.dtype == torch.uint8 and torch.equal(data.train.y, glyphs(30, 10).train.y)
    for x, got in zip(glyphs(30, 10).train.x, data.train.x):
        want = ImageOps.fit(Image.fromarray(x[0].numpy()), shape[::-1], Image.Resampling.BILINEAR)
        off = (torch.from_numpy(np.array(want)).int() - got[0].int()).abs().float()
        assert off.mean() < (0.01 if shape[0] == shape[1] else 3), "Pillow crops between pixels"


def test_a_share_splits_by_seed_class_by_class(fake_mnist, mirror, tmp_path):
    lay_out(mirror, tmp_path)
    a, b, c = (load_dataset("mnist", tmp_path, valid=0.1, seed=s) for s in (1, 1, 2))
    assert a.valid.y.bincount().tolist() == [600] * 10
    numbers = torch.cat([image_numbers(a.train.x), image_numbers(a.valid.x)])
    assert torch.equal(numbers.sort().values, torch.arange(60000))
    assert torch.equal(numbers // 3 % 10, torch.cat([a.train.y, a.valid.y]))
    assert torch.equal(a.valid.x, b.valid.x)
    held = [set(image_numbers(d.valid.x).tolist()) for d in (a, c)]
    assert len(held[0] & held[1]) < 900  # of 6000; 600 by chance


def test_get_data_gives_the_courses_rows(fake_mnist, mirror, tmp_path, monkeypatch):
    lay_out(mirror, tmp_path)
    monkeypatch.setenv("FASTRBN_DATA", str(tmp_path))
    x_train, y_train, x_valid, y_valid = get_data()
    assert x_train.shape == (50000, 784) and x_valid.shape == (10000, 784)
    assert x_train.dtype == x_valid.dtype == torch.float32 and y_train.dtype == y_valid.dtype == torch.int64
    assert torch.equal(torch.cat([y_train, y_valid]), torch.arange(60000) // 3 % 10)
    assert x_train[51, 0] == np.float32(51) / np.float32(255) and x_train.max() == 1


def test_archives_already_there_are_unpacked_without_network(fake_mnist, mirror, no_network, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in mirror.iterdir():
        (raw / archive.name).write_bytes(archive.read_bytes())
    assert len(load_dataset("mnist", tmp_path, download=False).train) == 50000


@pytest.mark.parametrize("name", ["mnist", "fashion", "cifar10", "cifar100"])
def test_a_download_without_network_asks_each_address_once_and_leaves_nothing(name, no_network, tmp_path):
    with pytest.raises(DownloadError, match="no route to host.*--data-dir") as e:
        load_dataset(name, tmp_path / "data")
    assert len(set(no_network)) == len(no_network) > 0
    assert isinstance(e.value, OSError) and not (tmp_path / "data").exists()


def test_a_silent_network_times_out(monkeypatch, tmp_path):
    answer, waiting = threading.Event(), []

    def swallow(*args, **kwargs):
        waiting.append(threading.current_thread())
        answer.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(download_module, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr("urllib.request.urlopen", swallow)
    try:
        with pytest.raises(DownloadError, match="no answer within 0.2 s"):
            load_dataset("mnist", tmp_path)
        assert waiting and all(thread.is_alive() for thread in waiting)
    finally:
        answer.set()
        for thread in waiting:
            thread.join()


def test_an_interrupted_download_leaves_no_file_and_is_repeated(fake_mnist, mirror, serve, monkeypatch, tmp_path):
    real = fake_mnist.resources
    broken = tmp_path / "broken"
    broken.mkdir()
    for archive in mirror.iterdir():
        (broken / archive.name).write_bytes(archive.read_bytes()[: 20000 if "t10k-images" in archive.name else None])
    monkeypatch.setattr(fake_mnist, "mirrors", [serve(broken)])
    with pytest.raises(DownloadError, match="Nothing was kept"):
        load_dataset("mnist", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    # also if the checksums match and unpacking fails
    monkeypatch.setattr(fake_mnist, "resources", [(n, md5(broken / n)) for n, _ in real])
    with pytest.raises(DownloadError, match="Nothing was kept"):
        load_dataset("mnist", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr(fake_mnist, "resources", real)
    monkeypatch.setattr(fake_mnist, "mirrors", [serve(mirror)])
    assert len(load_dataset("mnist", tmp_path / "data").train) == 50000


def test_a_missing_set_is_not_downloaded_if_forbidden(tmp_path):
    with pytest.raises(DataNotFoundError, match="MNIST was not found in .*train-images-idx3-ubyte.*FASTRBN_DATA") as e:
        load_dataset("mnist", tmp_path, download=False)
    assert isinstance(e.value, FileNotFoundError) and list(tmp_path.iterdir()) == []


def damage(path, how):
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[:-1],
            "empty": b"",
            "too long": whole + b"x",
            "zeros": bytes(len(whole)),
            "other": whole[:4] + (5).to_bytes(4, "big") + whole[8:],
        }[how]
    )


@pytest.mark.parametrize(
    "how, words",
    [
        ("truncated", "is truncated: 47040015 bytes, but its header promises 47040016"),
        ("too long", "is too long"),
        ("empty", "nothing"),
        ("zeros", "must be an idx file"),
        ("other", "begins with"),
    ],
)
def test_a_damaged_image_file_is_named_with_what_to_do(how, words, fake_mnist, mirror, tmp_path):
    path = lay_out(mirror, tmp_path) / "train-images-idx3-ubyte"
    damage(path, how)
    with pytest.raises(BadDataError, match=words) as e:
        get_data(tmp_path)
    assert isinstance(e.value, ValueError)
    assert str(path) in str(e.value) and "Delete it and run again" in str(e.value)


def test_labels_out_of_range_are_refused(fake_mnist, mirror, tmp_path):
    path = lay_out(mirror, tmp_path) / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(BadDataError, match="0 to 9; found 0 to 10"):
        get_data(tmp_path)


@pytest.fixture
def fake_cifar(tmp_path, serve, monkeypatch):
    """CIFAR-10 and CIFAR-100 of a few images, served from this machine."""
    for cls, key in ((torchvision.datasets.CIFAR10, "labels"), (torchvision.datasets.CIFAR100, "fine_labels")):
        folder = tmp_path / "source" / cls.base_folder
        folder.mkdir(parents=True)
        meta = {cls.meta["key"]: ["cat", "dog"]}
        x = np.arange(6 * 3072, dtype=np.uint32).reshape(6, 3072).astype(np.uint8)
        for name, content in (
            ("batch", {"data": x, key: [0, 1] * 3}),
            ("held", {"data": x[:2], key: [1, 0]}),
            (cls.meta["filename"], meta),
        ):
            (folder / name).write_bytes(pickle.dumps(content))
        archive = tmp_path / "source" / cls.filename
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, cls.base_folder)
        monkeypatch.setattr(cls, "train_list", [["batch", md5(folder / "batch")]])
        monkeypatch.setattr(cls, "test_list", [["held", md5(folder / "held")]])
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(folder / cls.meta["filename"])})
        monkeypatch.setattr(cls, "tgz_md5", md5(archive))
        monkeypatch.setattr(cls, "url", serve(archive.parent) + archive.name)
    return x


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_checked_and_split_as_published(name, fake_cifar, tmp_path, monkeypatch):
    data = load_dataset(name, tmp_path / "data")
    assert torch.equal(data.train.x, torch.from_numpy(fake_cifar).view(6, 3, 32, 32)) and data.train.x.is_contiguous()
    assert data.train.y.tolist() == [0, 1] * 3 and data.valid.y.tolist() == [1, 0]
    assert (data.classes, data.c_in, data.name) == (("cat", "dog"), 3, name)
    monkeypatch.setattr("urllib.request.urlopen", None)
    assert torch.equal(load_dataset(name, tmp_path / "data").valid.x, data.valid.x)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    ]


def test_a_damaged_cifar_file_is_named(fake_cifar, tmp_path):
    load_dataset("cifar10", tmp_path / "data")
    path = tmp_path / "data" / "cifar-10-batches-py" / "batch"
    damage(path, "truncated")
    with pytest.raises(BadDataError, match="damaged: its md5 sum.*Delete it") as e:
        load_dataset("cifar10", tmp_path / "data")
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    "args, kwargs, error, words",
    [
        (("mnits",), {}, DataNotFoundError, "known data sets are mnist.*Did you mean 'mnist'"),
        (("/no/such/folder",), {}, DataNotFoundError, "neither the name of a data set nor a folder"),
        ((__file__,), {}, DataNotFoundError, "a file, not a folder"),
        (("mnist",), {"valid": "train"}, ValueError, "'auto', 'test', or the share.*'train'"),
        (("mnist",), {"valid": 1.5}, ValueError, "1.5"),
        (("mnist",), {"valid": 1}, ValueError, "got 1"),
        (("mnist",), {"size": 0}, ValueError, "size must be a side in pixels or .height, width.; got 0"),
        (("glyphs",), {"valid": 0.5}, ValueError, "n_valid"),
    ],
)
def test_bad_arguments_are_refused(args, kwargs, error, words):
    with pytest.raises(error, match=words):
        load_dataset(*args, **kwargs)


@needs_mnist
def test_real_mnist_has_the_courses_statistics():
    x_train, y_train, x_valid, _ = get_data(REAL)
    # the course prints 0.1304 and 0.3073 for its pickle, whose values are bytes / 256
    assert abs(x_train.mean() * 255 / 256 - 0.1304) < 1e-4 and abs(x_train.std() * 255 / 256 - 0.3073) < 1e-4
    assert y_train[:5].tolist() == [5, 0, 4, 1, 9] and 0 <= x_valid.min() and x_valid.max() == 1
    data = load_dataset("mnist", REAL, download=False)
    torch.testing.assert_close(data.train.x.flatten(1).float() / 255, x_train)
    assert abs(data.mean[0] - x_train.mean()) < 1e-4
