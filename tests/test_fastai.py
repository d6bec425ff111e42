"""`fastrbn.fastai.Diagnose`, and the layer, in a real fastai Learner; skipped where fastai is not installed."""

import importlib.util
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pages import run_section
from torch import nn

from fastrbn import Checkpoint, GraphMonitor, HaltOnNaN, NonFiniteError, ParamMagnitudes, convert_batchnorm

if importlib.util.find_spec("fastai") is None:
    pytest.skip("fastai is not installed", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # of fastai for Python's and PyTorch's newer versions


@pytest.fixture(scope="module")
def fastai():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("fastai.basics")


@pytest.fixture(params=["fastai's optimiser", "PyTorch's"])
def learner(request, fastai):
    """A function that makes a Learner with `cbs` for the diagnosis."""
    opt = {} if request.param != "PyTorch's" else {"opt_func": partial(fastai.OptimWrapper, opt=torch.optim.SGD)}

    def make(*cbs, model=None, loss_func=F.cross_entropy, more=()):
        g = torch.Generator().manual_seed(1)
        data = [(torch.randn(4, generator=g), torch.randint(3, (), generator=g)) for _ in range(24)]
        dls = fastai.DataLoaders(fastai.DataLoader(data, bs=6), fastai.DataLoader(data, bs=6), device="cpu")
        diagnose = [importlib.import_module("fastrbn.fastai").Diagnose(*cbs)] if cbs else []
        learn = fastai.Learner(dls, model or net(), loss_func=loss_func, cbs=[*diagnose, *more], **opt)
        learn.remove_cbs(learn.cbs.filter(lambda cb: type(cb).__name__ in ("ProgressCallback", "Recorder")))
        return learn

    return make


def net(*last):
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3), *last
    return convert_batchnorm(nn.Sequential(*layers))


class Spoil(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x):
        self.calls += 1
        return x * math.nan if self.calls - 1 == self.at else x


def hooks(model):
    return [h for m in model.modules() for h in m._forward_hooks.values()]


def test_a_healthy_fit_is_as_without_it_and_everyone_has_seen_each_step(learner):
    want = learner()
    want.fit(2, lr=0.1)
    halt, magnitudes, monitor = HaltOnNaN(), ParamMagnitudes(), GraphMonitor()
    learn = learner(halt, magnitudes, monitor)
    learn.fit(2, lr=0.1)
    assert halt.report is None and monitor.report is None and hooks(learn.model) == []
    assert magnitudes.steps == monitor.steps == list(range(8))
    assert all(torch.equal(a, b) for a, b in zip(learn.model.state_dict().values(), want.model.state_dict().values()))
    learn.validate()  # without a fit


@pytest.mark.parametrize("at, place", [(2, (2, 0, 2, True)), (5, (4, 0, 1, False))])
def test_a_fit_with_a_fault_ends_with_the_report_and_the_last_finite_state(learner, capsys, at, place):
    halt = HaltOnNaN()
    learn = learner(halt, model=net(Spoil(at)))
    learn.fit(2, lr=0.1)
    report = halt.report
    assert (report.step, report.epoch, report.batch, report.in_train, report.where) == (*place, "5")
    assert report.sentence in capsys.readouterr().out and hooks(learn.model) == []
    state = [t for s in learn.opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert all(t.isfinite().all() for t in (*learn.model.state_dict().values(), *state))


def test_an_error_comes_through_where_it_was_asked_for(learner):
    learn = learner(HaltOnNaN(raise_error=True), loss_func=lambda pred, yb: F.cross_entropy(pred, yb) * math.nan)
    for _ in range(2):  # a second fit begins afresh
        with pytest.raises(NonFiniteError, match="step 0 .epoch 0, batch 0., first in the loss"):
            learn.fit(1)
        assert hooks(learn.model) == []


def test_accumulation_and_clipping_of_fastai_are_understood(learner):
    from fastai.callback.training import GradientAccumulation, GradientClip

    magnitudes = ParamMagnitudes()
    learn = learner(HaltOnNaN(), magnitudes, more=[GradientAccumulation(n_acc=12), GradientClip(1.0)])
    learn.fit(2, lr=0.1)
    assert magnitudes.steps == [1, 3, 5, 7]


def test_checkpoints_are_fastais_own(fastai, tmp_path):
    with pytest.raises(TypeError, match="Checkpoint needs this package's loop: use SaveModelCallback"):
        importlib.import_module("fastrbn.fastai").Diagnose(Checkpoint(tmp_path))


def test_the_page_runs(fastai, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_section("fastai")
    assert names["halt"].report is None and len(names["magnitudes"].steps) == 32
