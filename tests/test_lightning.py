"""`fastrbn.lightning.Diagnose` in a real Trainer; skipped where the package is not installed."""

import importlib.util
import logging
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from pages import run_section
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastrbn import (
    ActivationStats,
    Callback,
    CancelTrainException,
    Checkpoint,
    GraphMonitor,
    HaltOnNaN,
    NonFiniteError,
    ParamMagnitudes,
    Recorder,
)

PACKAGES = [p for p in ("lightning.pytorch", "pytorch_lightning") if importlib.util.find_spec(p.partition(".")[0])]
if not PACKAGES:
    pytest.skip("neither lightning nor pytorch_lightning is installed", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice


@pytest.fixture(params=PACKAGES)
def L(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = importlib.import_module(request.param)
    logging.getLogger(request.param).setLevel(logging.ERROR)
    return package


@pytest.fixture
def diagnose(L):
    return importlib.import_module("fastrbn.lightning").Diagnose


def module(L, bad=None, where="loss", manual=False):
    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            xb, yb = batch
            if batch_idx == bad and where == "skipped":
                return None
            h = self.net(xb)
            if batch_idx == bad and where == "grad":
                h.register_hook(lambda grad: grad * math.nan)
            loss = F.cross_entropy(h, yb)
            self.log("loss", loss)
            if batch_idx == bad and where == "loss":
                loss = {"loss": loss * math.nan}
            if manual:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss["loss"] if isinstance(loss, dict) else loss)
                opt.step()
            return loss

        def validation_step(self, batch, batch_idx):
            assert not self.net(batch[0]).requires_grad

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Net()


def loader():
    g = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 4, generator=g), torch.randint(3, (24,), generator=g))
    return DataLoader(data, batch_size=6)


def fit(L, net, *cbs, **settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=list(cbs), **quiet, **settings)
    trainer.fit(net, loader(), loader())
    return trainer


def hooks(net):
    return [h for m in net.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@pytest.mark.parametrize("manual", [False, True])
def test_a_healthy_fit_is_as_without_it_and_everyone_has_seen_each_step(L, diagnose, manual):
    want = module(L, manual=manual)
    fit(L, want)
    net = module(L, manual=manual)
    halt, magnitudes, monitor, stats = HaltOnNaN(), ParamMagnitudes(), GraphMonitor(), ActivationStats(every=1)
    trainer = fit(L, net, diagnose(halt, magnitudes, monitor, stats))
    assert halt.report is None and monitor.report is None and hooks(net) == []
    assert magnitudes.steps == monitor.steps == stats.steps == list(range(8)) and trainer.global_step == 8
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), want.state_dict().values()))


@pytest.mark.parametrize("where, found", [("loss", "loss"), ("grad", "net.4.weight")])
def test_a_fit_with_a_fault_ends_with_the_report_and_the_last_finite_state(L, diagnose, where, found):
    net, halt = module(L, bad=2, where=where), HaltOnNaN()
    with pytest.raises(NonFiniteError) as e:
        fit(L, net, diagnose(halt))
    report = e.value.report
    assert report is halt.report and (report.step, report.epoch, report.batch, report.where) == (2, 0, 2, found)
    assert (report.note, len(report.losses)) == ("", 3)
    assert all(t.isfinite().all() for t in net.state_dict().values()) and hooks(net) == []
    assert "log" not in vars(net)


def test_a_batch_that_training_step_skips_has_no_loss(L, diagnose):
    recorder = Recorder()
    fit(L, module(L, bad=2, where="skipped"), diagnose(HaltOnNaN(), GraphMonitor(), recorder))
    assert len(recorder.losses) == 6


def test_manual_optimisation_is_not_gone_through_again(L, diagnose):
    net = module(L, bad=2, manual=True)
    with pytest.raises(NonFiniteError) as e:
        fit(L, net, diagnose())
    assert e.value.report.where == "loss" and "takes steps of its own" in e.value.report.note


def test_accumulation_clipping_and_autocast_are_understood(L, diagnose):
    magnitudes = ParamMagnitudes()
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}
    fit(L, module(L), diagnose(HaltOnNaN(), magnitudes), **settings)
    assert magnitudes.steps == [1, 3, 5, 7]


def test_a_cancelled_fit_ends_after_the_batch(L, diagnose):
    class Enough(Callback):
        def after_step(self):
            if self.n_iter == 1:
                raise CancelTrainException("enough")

    assert fit(L, module(L), diagnose(Enough())).global_step == 2


def test_an_error_elsewhere_ends_the_diagnosis_too(L, diagnose):
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise ZeroDivisionError

    net, magnitudes = module(L), ParamMagnitudes()
    with pytest.raises(ZeroDivisionError):
        fit(L, net, diagnose(HaltOnNaN(), magnitudes), Fails())
    assert magnitudes.steps == [0, 1] and hooks(net) == []


def test_what_it_cannot_do_it_says(L, diagnose, tmp_path):
    with pytest.raises(TypeError, match="Checkpoint needs this package's loop: use ModelCheckpoint"):
        diagnose(Checkpoint(tmp_path))
    net = module(L, manual=True)
    two = [torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2)]
    net.configure_optimizers = lambda: two
    with pytest.raises(RuntimeError, match="looks after one optimiser; Net has 2"):
        fit(L, net, diagnose())


def test_the_page_runs(L, tmp_path, monkeypatch):
    if L.__name__ != "lightning.pytorch":
        pytest.skip("the page imports lightning")
    monkeypatch.chdir(tmp_path)
    names = run_section("Lightning")
    assert names["halt"].report is None and len(names["magnitudes"].steps) == 32
