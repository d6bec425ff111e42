"""MixUp against the formula by hand; the targets that metrics see; halts and interrupts."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.build import LabelSmoothingCrossEntropy
from fastrbn.callbacks import AvgStatsCallback, HaltOnNaN, MixUp, accuracy
from fastrbn.callbacks.diagnose.nonfinite import halt as nonfinite
from fastrbn.callbacks.diagnose.nonfinite.state import Flags
from fastrbn.learn import Callback, Learner, Runner


def make_learn(loss_func=F.cross_entropy, sizes=(6, 6, 4), classes=3):
    torch.manual_seed(0)
    model = nn.Linear(4, classes)
    batches = [(torch.randn(n, 4), torch.randint(0, classes, (n,))) for n in sizes]
    data = SimpleNamespace(train_dl=batches, valid_dl=batches[:1])
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_func, data)


def by_hand(learn, alpha, reduction="mean", epochs=1, **kwargs):
    """The mixed loss by a target distribution, which is the same by linearity."""
    torch.manual_seed(5)
    beta, losses = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(alpha)), []
    for _ in range(epochs):
        for xb, yb in learn.data.train_dl:
            lam = beta.sample((len(xb),))
            lam = torch.maximum(lam, 1 - lam)[:, None]
            order = torch.randperm(len(xb))
            one_hot = F.one_hot(yb, 3).float()
            target = lam * one_hot + (1 - lam) * one_hot[order]
            loss = F.cross_entropy(learn.model(lam * xb + (1 - lam) * xb[order]), target, reduction=reduction, **kwargs)
            losses.append(loss.item())
            loss.backward()
            learn.opt.step()
            learn.opt.zero_grad()
    return losses


class Looks(Callback):
    _order = 70

    def begin_fit(self):
        self.losses, self.targets, self.inputs = [], [], []

    def after_loss(self):
        run = self.run
        if run.in_train:
            self.losses.append(run.loss.item())
            self.targets.append(run.yb)
            self.inputs.append(run.xb)


def summed(pred, yb, reduction="sum"):
    return F.cross_entropy(pred, yb, reduction=reduction)


CASES = {
    "function": (F.cross_entropy, {}),
    "module": (nn.CrossEntropyLoss(), {}),
    "module that sums": (nn.CrossEntropyLoss(reduction="sum"), {"reduction": "sum"}),
    "function that sums": (summed, {"reduction": "sum"}),
    "label smoothing": (LabelSmoothingCrossEntropy(0.2), {"label_smoothing": 0.2}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [0.4, 2.0])
def test_it_trains_on_mixtures_by_the_formula(case, alpha):
    loss_func, kwargs = CASES[case]
    learn, hand = make_learn(loss_func), make_learn()
    torch.manual_seed(5)
    run = Runner([MixUp(alpha), Looks()])
    run.fit(2, learn)
    expected = by_hand(hand, alpha, epochs=2, **kwargs)
    assert run.looks.losses == pytest.approx(expected, rel=1e-5)
    for p, q in zip(learn.model.parameters(), hand.model.parameters()):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_metrics_see_true_targets_and_validation_is_left_alone():
    learn = make_learn()
    seen = []

    def notes(pred, yb):
        seen.append(yb)
        return accuracy(pred, yb)

    run = Runner([MixUp(), Looks(), AvgStatsCallback(notes)])
    run.logger = lambda line: None
    run.fit(1, learn)
    true = [yb for _, yb in learn.data.train_dl]
    assert all(a is b for a, b in zip(run.looks.targets, true, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen, [*true, learn.data.valid_dl[0][1]], strict=True))
    assert not any(torch.equal(x, xb) for x, (xb, _) in zip(run.looks.inputs, learn.data.train_dl))
    xb, yb = learn.data.valid_dl[0]
    assert run.avg_stats.history[0]["valid_loss"] == pytest.approx(F.cross_entropy(learn.model(xb), yb).item())


def test_each_sample_has_its_own_share_of_at_least_one_half():
    learn = make_learn(sizes=(400,))
    learn.data.train_dl = [(torch.eye(400), torch.zeros(400, dtype=torch.long))]
    learn.model, learn.data.valid_dl = nn.Linear(400, 3), None
    run = Runner([MixUp(1.0), Looks()])
    run.fit(1, learn)
    shares = run.looks.inputs[0].diagonal()
    assert shares.min() >= 0.5 and shares.unique().numel() > 300
    assert run.looks.inputs[0].sum(1).allclose(torch.ones(400))


def test_targets_per_pixel_are_mixed_by_sample():
    learn = make_learn()
    learn.model = nn.Conv1d(4, 3, 1)
    learn.data.train_dl = [(torch.randn(6, 4, 5), torch.randint(0, 3, (6, 5)))]
    learn.data.valid_dl = None
    xb, yb = learn.data.train_dl[0]
    torch.manual_seed(5)
    beta = torch.distributions.Beta(torch.tensor(0.4), torch.tensor(0.4))
    lam = beta.sample((6,))
    lam, order = torch.maximum(lam, 1 - lam)[:, None, None], torch.randperm(6)
    target = F.one_hot(yb, 3).transpose(1, 2).float()
    target, mixed = lam * target + (1 - lam) * target[order], lam * xb + (1 - lam) * xb[order]
    expected = F.cross_entropy(learn.model(mixed), target).item()
    torch.manual_seed(5)
    run = Runner([MixUp(), Looks()])
    run.fit(1, learn)
    assert run.looks.losses == pytest.approx([expected], rel=1e-5)


def test_losses_of_several_labels_are_summed_per_sample():
    learn = make_learn(nn.BCEWithLogitsLoss(reduction="sum"))
    xb, yb = torch.randn(6, 4), torch.randint(0, 2, (6, 3)).float()
    learn.data.train_dl, learn.data.valid_dl = [(xb, yb)], None
    torch.manual_seed(5)
    lam = torch.distributions.Beta(torch.tensor(0.4), torch.tensor(0.4)).sample((6,))
    lam, order = torch.maximum(lam, 1 - lam)[:, None], torch.randperm(6)
    mixed, target = (lam * t + (1 - lam) * t[order] for t in (xb, yb))
    expected = F.binary_cross_entropy_with_logits(learn.model(mixed), target, reduction="sum").item()
    torch.manual_seed(5)
    run = Runner([MixUp(), Looks()])
    run.fit(1, learn)
    assert run.looks.losses == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("error", [None, ValueError("broken"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_the_loss_function_is_restored_and_a_module_is_not_changed(error):
    class Ends(Callback):
        def after_loss(self):
            if error is not None:
                raise error

    module = nn.CrossEntropyLoss()
    learn = make_learn(module)
    run = Runner([MixUp(), Ends()])
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(1, learn)
    else:
        run.fit(1, learn)
    assert run.loss_func is learn.loss_func is module and module.reduction == "mean"


@pytest.mark.parametrize("way", ["at once", "late"])
def test_a_fault_is_found_under_mixup(way, monkeypatch):
    if way == "late":
        monkeypatch.setattr(nonfinite, "late_device", lambda model: torch.device("cpu"))
        monkeypatch.setattr(Flags, "LAG", 3)

    class Spoils(Callback):
        def after_pred(self):
            if self.run.n_iter == 2 and self.run.in_train:
                self.run.pred = self.run.pred * math.nan

    learn = make_learn(sizes=(6, 5, 4, 3, 2, 6))
    run = Runner([MixUp(), Spoils(), HaltOnNaN()])
    run.fit(1, learn)
    report = run.halt_on_nan.report
    assert report.step == 2 and report.phase == "forward"
    assert "failed" not in report.note, "the replay used the mixture of another batch"


def test_a_loss_function_without_a_loss_per_sample_is_an_error():
    for loss_func, words in (
        (
            lambda pred, yb: F.cross_entropy(pred, yb),
            r"a function with that parameter, such as F.cross_entropy; got <lambda>",
        ),
        (nn.CrossEntropyLoss(reduction="none"), r"got CrossEntropyLoss\(\) with reduction='none'"),
    ):
        with pytest.raises(ValueError, match=words):
            Runner([MixUp()]).fit(1, make_learn(loss_func))


def test_a_loss_function_that_ignores_reduction_is_an_error():
    def stubborn(pred, yb, reduction="mean"):
        return F.cross_entropy(pred, yb)

    with pytest.raises(ValueError, match=r"a loss for each of 6 samples; got shape \(\)"):
        Runner([MixUp()]).fit(1, make_learn(stubborn))


def test_inputs_that_cannot_be_mixed_are_an_error():
    learn = make_learn()
    learn.data.train_dl = [(torch.zeros(6, 4, dtype=torch.uint8), torch.zeros(6, dtype=torch.long))]
    with pytest.raises(TypeError, match="floating-point inputs and one tensor of targets; got torch.uint8, torch"):
        Runner([MixUp()]).fit(1, learn)


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, a, b):
        return self.linear(a + b)


def test_several_inputs_are_mixed_alike():
    learn = make_learn()
    learn.model = Adds()
    a, yb = torch.eye(6, 4), torch.arange(6) % 3
    learn.data.train_dl = [((a, 2 * a), yb)]
    learn.data.valid_dl = None
    run = Runner([MixUp(1.0), Looks()])
    run.fit(1, learn)
    ((mixed, twice),) = run.looks.inputs
    assert torch.equal(2 * mixed, twice) and not torch.equal(mixed, a)


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf, "0.4", True, None])
def test_alpha_must_be_above_0(alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number above 0, such as 0.4; got"):
        MixUp(alpha)
