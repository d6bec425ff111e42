"""A small model on data that can be learnt, for all tests of callbacks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tape import Tape
from torch import nn

from fastrbn.callbacks.step import cuda_graph
from fastrbn.learn import Learner


def small_model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def make(n_train=4, n_valid=2, bs=6, model=None, opt=None, loss_func=F.cross_entropy, seed=0):
    """A Learner; the same arguments give the same one, bit for bit."""
    torch.manual_seed(seed)
    weights = torch.randn(4, 3)
    xs = [torch.randn(bs, 4) for _ in range(n_train + n_valid)]
    pairs = [(x, (x @ weights).argmax(1)) for x in xs]
    model = small_model() if model is None else model
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if opt is None else opt(model.parameters())
    data = SimpleNamespace(train_dl=pairs[:n_train], valid_dl=pairs[n_train:] if n_valid else None)
    return Learner(model, opt, loss_func, data)


@pytest.fixture
def make_learn():
    return make


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Lets CUDAGraph work on the CPU, with `Tape` for CUDA's graphs."""
    monkeypatch.setattr(cuda_graph, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda_graph, "Recorder", Tape)
