"""The parts of a step that a callback takes over: one owner each, for one fit."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.learn import Callback, CancelTrainException, Learner, Runner


def make_learn():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    batches = [(torch.randn(5, 4), torch.randint(0, 2, (5,))) for _ in range(3)]
    data = SimpleNamespace(train_dl=batches, valid_dl=batches[:1])
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, data)


class Takes(Callback):
    def __init__(self, **functions):
        self.functions = functions

    def begin_fit(self):
        self.run.claim(self, **self.functions)


class Other(Takes):
    pass


def test_each_part_is_called_at_its_place():
    trace = []

    def forward(function, *args):
        trace.append("model" if isinstance(function, nn.Module) else "loss")
        return function(*args)

    def backward(loss):
        trace.append("backward")
        loss.backward()

    def weigh(loss):
        trace.append("weigh")
        return loss

    def step(opt):
        trace.append("step")
        opt.step()

    class Events(Callback):
        def after_loss(self):
            trace.append("after_loss")

        def after_backward(self):
            trace.append("after_backward")

        def after_step(self):
            trace.append("after_step")

    learn, plain = make_learn(), make_learn()
    Runner([Takes(forward=forward, weigh=weigh, backward=backward, step=step), Events()]).fit(1, learn)
    training = ["model", "loss", "after_loss", "weigh", "backward", "after_backward", "step", "after_step"]
    assert trace == [*training * 3, "model", "loss", "after_loss"]
    Runner().fit(1, plain)
    assert torch.equal(learn.model.weight, plain.model.weight)


def test_the_weighed_loss_is_differentiated_and_run_loss_is_unchanged():
    class Sees(Callback):
        def after_backward(self):
            self.run.seen = (self.run.loss.item(), self.run.model.bias.grad.clone())
            raise CancelTrainException

    seen = []
    for cbs in ([], [Takes(weigh=lambda loss: loss / 4)]):
        run = Runner([*cbs, Sees()])
        run.fit(1, make_learn())
        seen.append(run.seen)
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1] / 4, seen[1][1])


def test_a_second_claim_of_a_part_raises_naming_both_owners_and_claims_nothing():
    run = Runner([Takes(step=lambda opt: opt.step()), Other(backward=lambda loss: None, step=lambda opt: None)])
    words = "each part of a step belongs to one callback; Other claims 'step', which Takes has already: remove one"
    with pytest.raises(RuntimeError, match=words):
        run.fit(1, make_learn())
    assert run.stop_reason.startswith("RuntimeError in Other.begin_fit")


def test_a_failed_fit_releases_the_claimed_parts():
    learn = make_learn()
    before = learn.model.weight.clone()
    run = Runner([Takes(backward=lambda loss: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        run.fit(1, learn)
    assert run._parts.claims == {}
    assert torch.equal(learn.model.weight, before)
    run.remove_cbs(run.takes)
    run.fit(1, learn)
    assert not torch.equal(learn.model.weight, before)


@pytest.mark.parametrize(
    ("functions", "error", "words"),
    [
        (
            {"backwards": abs},
            ValueError,
            "parts of a step are forward, weigh, backward, step; Takes claims 'backwards'. Did",
        ),
        ({"step": 3}, TypeError, "must give a function; got 3"),
    ],
    ids=["unknown", "no function"],
)
def test_claiming_an_unknown_part_or_a_non_function_raises(functions, error, words):
    with pytest.raises(error, match=words):
        Runner([Takes(**functions)]).fit(1, make_learn())


def test_parts_can_be_claimed_only_during_a_fit():
    with pytest.raises(RuntimeError, match="claimed only during a fit"):
        Runner().claim(Takes(), step=print)


def test_a_removed_callback_has_no_name_and_gets_no_events():
    class Counts(Callback):
        n = 0

        def after_batch(self):
            self.n += 1

    counts, run = Counts(), Runner()
    run.add_cbs(counts)
    run.fit(1, make_learn())
    run.remove_cbs([counts])
    run.fit(1, make_learn())
    assert counts.n == 4 and not hasattr(run, "counts") and counts not in run.cbs
    with pytest.raises(ValueError, match="only a callback of this run can be removed"):
        run.remove_cbs(counts)


def test_a_callback_removed_during_a_fit_takes_part_until_its_end():
    class Leaves(Callback):
        ends = 0

        def begin_epoch(self):
            self.run.remove_cbs(self)

        def after_fit(self):
            self.ends += 1

    leaves = Leaves()
    run = Runner([leaves])
    run.fit(1, make_learn())
    run.fit(1, make_learn())
    assert leaves.ends == 1
