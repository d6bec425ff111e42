"""CutMix against the formula by hand, alone and beside MixUp; resume in the middle."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.callbacks import AvgStatsCallback, Checkpoint, CutMix, GradientAccumulation, MixUp, accuracy
from fastrbn.data import BatchLoader, DataBunch
from fastrbn.learn import Callback, Learner, Runner


def numbered(n=8, side=6):
    """Images whose pixels all hold the image's own number, from 1."""
    return torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 2, side, side).contiguous(), torch.arange(n) % 3


def make_learn(loss_func=F.cross_entropy, batches=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    batch = numbered()
    data = SimpleNamespace(train_dl=[batch] * batches, valid_dl=[batch])
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.01), loss_func, data)


class Looks(Callback):
    _order = 70

    def begin_fit(self):
        self.seen = []

    def after_loss(self):
        if self.run.in_train:
            self.seen.append((self.run.xb, self.run.pred.detach(), self.run.loss.item(), self.run.yb))


def plain(pred, yb):
    """A loss function without reduction."""
    return F.cross_entropy(pred, yb)


@pytest.mark.parametrize("loss_func", [F.cross_entropy, plain, nn.CrossEntropyLoss(reduction="sum")])
def test_a_box_of_another_image_and_the_losses_by_area(loss_func):
    learn, seen = make_learn(loss_func, batches=8), []
    torch.manual_seed(1)
    run = Runner([CutMix(), Looks(), AvgStatsCallback(lambda pred, yb: seen.append(yb) or accuracy(pred, yb))])
    run.logger = lambda line: None
    run.fit(1, learn)
    shares = set()
    for xb, pred, loss, yb in run.looks.seen:
        pasted = xb != numbered()[0]
        mixed = pasted.flatten(1).any(1)
        assert yb is learn.data.train_dl[0][1]
        if not mixed.any():  # an empty box
            assert loss == pytest.approx(loss_func(pred, yb).item(), rel=1e-5)
            continue
        box = pasted[mixed][0]
        assert all(torch.equal(p, box) for p in pasted[mixed]), "one box a batch"
        rows, columns = box[0].any(1).nonzero().flatten(), box[0].any(0).nonzero().flatten()
        assert box.sum() == 2 * len(rows) * len(columns), "a whole box, in all channels"
        other = (xb[:, 0, rows[0], columns[0]] - 1).long()  # the image that each box comes from
        assert other.sort().values.equal(torch.arange(8)), "from a shuffled copy of the batch"
        share = 1 - box.float().mean().item()
        expected = share * loss_func(pred, yb) + (1 - share) * loss_func(pred, yb[other])
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        shares.add(share)
    assert len(shares) > 3 and all(torch.equal(y, learn.data.train_dl[0][1]) for y in seen)
    xb, yb = learn.data.valid_dl[0]
    assert torch.equal(xb, numbered()[0]), "the data are as they were"
    run.fit(0, learn)
    assert run.loss_func is learn.loss_func


def test_with_mixup_each_batch_gets_one_of_the_two():
    learn = make_learn(batches=24)
    torch.manual_seed(2)
    run = Runner([MixUp(1.0), CutMix(), Looks()])
    run.fit(1, learn)
    blended = [bool(xb.frac().ne(0).any()) for xb, *_ in run.looks.seen]
    assert 6 < sum(blended) < 18
    for (xb, pred, loss, yb), blend in zip(run.looks.seen, blended):
        if not blend:
            assert {len(im.unique()) for im in xb} <= {1, 2}
            continue
        # each image is λ·own + (1 − λ)·other in all pixels, so its loss lies between those of the targets
        assert all(im.unique().numel() == 1 for im in xb)
        every = torch.stack([F.cross_entropy(pred, torch.full_like(yb, c), reduction="none") for c in range(3)])
        assert every.amin(0).mean() - 1e-4 <= loss <= every.amax(0).mean() + 1e-4
    assert run.loss_func is learn.loss_func


def test_resumed_in_the_middle_it_ends_with_the_same_weights(tmp_path):
    def fit(epochs, folder, resume=None):
        torch.manual_seed(3)
        x, y = torch.randn(20, 2, 6, 6), torch.arange(20) % 3
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
        data = DataBunch(BatchLoader(x, y, 4, shuffle=True, seed=1), None, c=3, c_in=2)
        learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, data)
        cbs = [CutMix(), MixUp(), GradientAccumulation(2), Checkpoint(folder, every=1, keep=None)]
        Runner(cbs).fit(epochs, learn, resume=resume)
        return model[1].weight

    whole = fit(2, tmp_path / "a")
    middle = sorted((tmp_path / "a").iterdir())[3]
    assert torch.equal(fit(2, tmp_path / "b", middle), whole)


@pytest.mark.parametrize(
    "batch, error, words",
    [
        (
            (torch.zeros(4, 72), torch.zeros(4).long()),
            ValueError,
            r"images \(N, C, H, W\).*got shapes \(4, 72\), \(4,\)",
        ),
        ((torch.zeros(4, 2, 6, 6), torch.zeros(4, 6, 6)), ValueError, r"\(4, 2, 6, 6\), \(4, 6, 6\): use MixUp"),
        ((torch.zeros(4, 2, 6, 6).byte(), torch.zeros(4)), TypeError, "CutMix needs floating-point inputs"),
        (((torch.zeros(4, 2, 6, 6),) * 2, torch.zeros(4)), ValueError, "CutMix needs images"),
        ((torch.zeros(4, 2, 6, 6), torch.zeros(3)), ValueError, "CutMix needs one target per sample; got 4 samples"),
    ],
)
def test_batches_that_cannot_be_mixed_are_an_error(batch, error, words):
    learn = make_learn()
    learn.data.train_dl = [batch]
    with pytest.raises(error, match=words):
        Runner([CutMix()]).fit(1, learn)


def test_alpha_is_checked_under_its_own_name():
    with pytest.raises(ValueError, match="CutMix: alpha must be a finite number above 0"):
        CutMix(0)
    assert repr(CutMix()) == "CutMix(alpha=1.0)"
