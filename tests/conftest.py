"""What every test shares: one thread, a known random state, no window system, and where real data may lie."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the nets are tiny: more threads cost more than they bring
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _known_random_state():
    """No test depends on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets: FASTRBN_DATA, else the cache of downloads; the test is skipped without MNIST."""
    root = Path(os.environ.get("FASTRBN_DATA") or Path.home() / ".cache" / "fastrbn" / "data")
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"no MNIST under {root}: set FASTRBN_DATA to the folder that holds MNIST/raw")
    return root
