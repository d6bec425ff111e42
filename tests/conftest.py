"""What every test shares: one thread, a known random state, no window system, and where real data may lie."""

import importlib.util
import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the nets are tiny: more threads cost more than they bring
os.environ["MPLBACKEND"] = "Agg"

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

# They take longest, and so are given out first: at the end there are short ones left for every process
LONG = (
    "test_notebooks.py",
    "test_distributed.py",
    "test_triton_anywhere.py",
    "test_packaging.py",
    "test_benchmark_peers.py",
)

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def _known_random_state():
    """No test depends on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def benchmark_script(monkeypatch):
    """Import a script of benchmarks/ by name, as Python finds it and its neighbours when it is run."""

    def load(name):
        folder = Path(__file__).parent.parent / "benchmarks"
        monkeypatch.syspath_prepend(folder)
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets: FASTRBN_DATA, else the cache of downloads; the test is skipped without MNIST."""
    root = Path(os.environ.get("FASTRBN_DATA") or Path.home() / ".cache" / "fastrbn" / "data")
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"no MNIST under {root}: set FASTRBN_DATA to the folder that holds MNIST/raw")
    return root


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """Photos of two classes, and a run of two epochs on them: a folder with `photos` and `run`. Change a copy only."""
    from fastrbn.cli import main, run_folder

    root, draw = tmp_path_factory.mktemp("trained_run"), torch.Generator().manual_seed(1)
    for c, level in (("cat", 128), ("dog", 256)):
        (root / "photos" / c).mkdir(parents=True)
        for i in range(8):
            height, width = torch.randint(9, 14, (2,), generator=draw).tolist()
            x = torch.randint(level, (height, width, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(x.numpy()).save(root / "photos" / c / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
        size = "--size 8 --bs 4 --epochs 2 --label-smoothing 0.1 --cb SaveBest --device cpu"
        assert main(["train", str(root / "photos"), *size.split(), "--out", str(root / "run")]) == 0
    return root


@pytest.fixture
def run_copy(trained_run, tmp_path):
    """A copy of that run's folder, to change."""
    return Path(shutil.copytree(trained_run / "run", tmp_path / "run"))
