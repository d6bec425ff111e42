"""Clipping and accumulation against loops by hand, bit for bit, and against the large batch."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.callbacks import (
    AvgStatsCallback,
    GradientAccumulation,
    GradientClip,
    HaltOnNaN,
    ParamMagnitudes,
    Recorder,
)
from fastrbn.learn import Callback, CancelBatchException, CancelEpochException, Learner, Runner


def make_learn(sizes=(6, 6, 6, 6), dtype=torch.float32, lr=0.3, length=True, valid=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    batches = [(torch.randn(n, 4, dtype=dtype), torch.randint(0, 3, (n,))) for n in sizes]
    train = batches if length else type("NoLength", (), {"__iter__": lambda self: iter(batches)})()
    data = SimpleNamespace(train_dl=train, valid_dl=batches[:valid] or None)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), F.cross_entropy, data)


def by_hand(learn, before_step, epochs=2):
    for _ in range(epochs):
        for xb, yb in learn.data.train_dl:
            learn.loss_func(learn.model(xb), yb).backward()
            before_step(list(learn.model.parameters()))
            learn.opt.step()
            learn.opt.zero_grad()


def check_same(a, b):
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name


class Steps(Callback):
    """Records the gradients in `after_step`."""

    _order = 5

    def begin_fit(self):
        self.at = []

    def after_step(self):
        self.at.append(self.run.n_iter)


# --- clipping


@pytest.mark.parametrize("norm_type", [2, 1, math.inf])
def test_clipping_by_norm_equals_pytorchs_bit_for_bit(norm_type):
    learn, hand = make_learn(), make_learn()
    run = Runner([GradientClip(max_norm=0.3, norm_type=norm_type)])
    run.fit(2, learn)
    norms = []
    by_hand(hand, lambda ps: norms.append(nn.utils.clip_grad_norm_(ps, 0.3, norm_type)))
    check_same(learn, hand)
    assert torch.equal(run.gradient_clip.norm, norms[-1])
    assert max(norms) > 0.3, "nothing was clipped"


def test_clipping_by_value_equals_pytorchs_bit_for_bit():
    learn, hand = make_learn(), make_learn()
    Runner([GradientClip(value=0.01)]).fit(2, learn)
    by_hand(hand, lambda ps: nn.utils.clip_grad_value_(ps, 0.01))
    check_same(learn, hand)


@pytest.mark.parametrize("kwargs", [{"max_norm": 1.0}, {"value": 1.0}], ids=str)
def test_a_step_without_gradients_has_nothing_to_clip(kwargs):
    class Takes(Callback):
        _order = GradientClip._order - 1

        def after_backward(self):
            self.run.opt.zero_grad()

    learn = make_learn()
    before = learn.model[0].weight.detach().clone()
    Runner([Takes(), GradientClip(**kwargs)]).fit(1, learn)
    assert torch.equal(learn.model[0].weight, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("opt", [torch.optim.SGD, torch.optim.Rprop])
def test_a_nan_gradient_does_not_spread_and_its_parameter_is_named(bad, opt):
    class Spoils(Callback):
        def after_backward(self):
            if self.run.n_iter == 2:
                self.run.model[0].weight.grad[1, 1] = bad

    learn = make_learn()
    learn.opt = opt(learn.model.parameters(), lr=0.1)
    run = Runner([Spoils(), GradientClip(1.0), HaltOnNaN()])
    run.fit(1, learn)
    report = run.halt_on_nan.report
    assert (report.step, report.phase, report.where) == (2, "backward", "0.weight")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (
            {},
            "needs one limit, max_norm for all gradients together or value for each element; got max_norm=None and",
        ),
        ({"max_norm": 1, "value": 1}, "give one, such as"),
        ({"max_norm": 0}, "max_norm must be a finite number above 0; got 0"),
        ({"max_norm": "1"}, "max_norm must be a finite number above 0; got '1'"),
        ({"value": math.nan}, "value must be a finite number above 0; got nan"),
        ({"max_norm": 1.0, "norm_type": 0}, "norm_type must be a number above 0, such as 2; got 0"),
    ],
    ids=str,
)
def test_an_invalid_limit_is_an_error(kwargs, words):
    with pytest.raises(ValueError, match=words):
        GradientClip(**kwargs)


@pytest.mark.parametrize(
    "kwargs", [{"value": 0.05}, *({"max_norm": 0.1, "norm_type": p} for p in (1, 2, math.inf))], ids=str
)
def test_sparse_gradients_are_clipped_as_dense_ones(kwargs):
    def embedding(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
        learn = make_learn((6,))
        learn.data.train_dl = [(torch.tensor([[1, 1], [1, 2], [4, 2]]), torch.tensor([0, 1, 2]))]
        learn.model, learn.opt = model, torch.optim.SGD(model.parameters(), lr=1.0)
        return learn

    learn, dense = embedding(True), embedding(False)
    before = learn.model[0].weight.clone()
    for each in (learn, dense):
        Runner(GradientClip(**kwargs)).fit(1, each)
    for p, q in zip(learn.model.parameters(), dense.model.parameters()):
        assert torch.allclose(p, q)
    if "value" in kwargs:
        assert (before - learn.model[0].weight).abs().max().item() == pytest.approx(0.05)


# --- accumulation


@pytest.mark.parametrize("n", [2, 3])
def test_accumulation_equals_a_loop_by_hand_bit_for_bit(n):
    learn, hand = make_learn((6,) * 6), make_learn((6,) * 6)
    run = Runner([GradientAccumulation(n), Steps(), Recorder()])
    run.fit(2, learn)
    for _ in range(2):
        for i, (xb, yb) in enumerate(hand.data.train_dl):
            (F.cross_entropy(hand.model(xb), yb) / n).backward()
            if (i + 1) % n == 0:
                hand.opt.step()
                hand.opt.zero_grad()
    check_same(learn, hand)
    assert run.steps.at == list(range(n - 1, 12, n))
    assert run.n_iter == 12 and len(run.recorder.losses) == 12


@pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
@pytest.mark.parametrize("valid", [0, 1], ids=["no validation", "validation"])
@pytest.mark.parametrize("sizes", [(6, 6, 6, 6), (6, 6, 6, 6, 6), (6, 6, 6, 6, 2), (5, 2, 7, 1, 3, 4, 6)], ids=str)
def test_a_step_equals_that_of_the_large_batch_even_for_uneven_batches(sizes, valid, length):
    n = 3
    learn = make_learn(sizes, torch.float64, length=length, valid=valid)
    large = make_learn(sizes, torch.float64)
    groups = [large.data.train_dl[i : i + n] for i in range(0, len(sizes), n)]
    large.data.train_dl = [tuple(map(torch.cat, zip(*group))) for group in groups]
    run = Runner([GradientAccumulation(n), Steps()])
    run.fit(2, learn)
    Runner().fit(2, large)
    assert len(run.steps.at) == 2 * len(groups)
    for p, q in zip(learn.model.parameters(), large.model.parameters()):
        assert torch.allclose(p, q, rtol=1e-13, atol=1e-15)


def test_a_loss_that_sums_over_samples_is_summed_over_the_group():
    learn, large = make_learn((5, 2, 7, 1), torch.float64, lr=0.01), make_learn((5, 2, 7, 1), torch.float64, lr=0.01)
    large.data.train_dl = [tuple(map(torch.cat, zip(*large.data.train_dl)))]
    for each, cbs in ((learn, GradientAccumulation(4)), (large, None)):
        each.loss_func = nn.CrossEntropyLoss(reduction="sum")
        Runner(cbs).fit(2, each)
    for p, q in zip(learn.model.parameters(), large.model.parameters()):
        assert torch.allclose(p, q, rtol=1e-13, atol=1e-15)


def test_the_last_group_takes_its_step_in_its_last_batch_if_the_length_is_known():
    run = Runner([GradientAccumulation(3), Steps()])
    run.fit(2, make_learn((6,) * 5, valid=1))
    assert run.steps.at == [2, 4, 7, 9]


def test_other_callbacks_see_gradients_of_whole_groups_only():
    class Looks(Callback):
        def begin_fit(self):
            self.at = []

        def after_backward(self):
            self.at.append(self.run.n_iter)

    run = Runner([Looks(), GradientAccumulation(2)])
    run.fit(1, make_learn())
    assert run.looks.at == [1, 3]


def test_one_batch_per_step_changes_nothing():
    learn, plain = make_learn((6, 6, 3)), make_learn((6, 6, 3))
    Runner([GradientAccumulation(1)]).fit(2, learn)
    Runner().fit(2, plain)
    check_same(learn, plain)


def test_losses_and_averages_are_per_batch():
    learn, plain = make_learn(lr=0.0, valid=1), make_learn(lr=0.0, valid=1)
    found = []
    for cbs, one in (([GradientAccumulation(2)], learn), ([], plain)):
        run = Runner([*cbs, AvgStatsCallback(), Recorder()])
        run.logger = lambda line: None
        run.fit(1, one)
        found.append(
            (run.recorder.losses, run.avg_stats.history[0]["train_loss"], run.avg_stats.history[0]["valid_loss"])
        )
    assert found[0] == found[1]


def test_a_cancelled_epoch_takes_a_step_with_the_gradients_so_far():
    class Cuts(Callback):
        def begin_batch(self):
            if self.run.in_train and self.run.iter == 4:
                raise CancelEpochException

    learn, hand = make_learn((6,) * 6, torch.float64, valid=1), make_learn((6,) * 6, torch.float64)
    run = Runner([GradientAccumulation(3), Cuts(), Steps()])
    run.fit(1, learn)
    hand.data.train_dl = hand.data.train_dl[:4]
    Runner([GradientAccumulation(3)]).fit(1, hand)
    assert run.steps.at == [2, 5]  # the interrupted batch is counted but not trained on
    for p, q in zip(learn.model.parameters(), hand.model.parameters()):
        assert torch.allclose(p, q, rtol=1e-13)


def test_a_cancel_in_the_step_before_validation_ends_only_that_step():
    class Cancels(Callback):
        def after_backward(self):
            if self.run.n_iter == 5:
                raise CancelBatchException

        def begin_batch(self):
            if not self.run.in_train:
                self.run.seen = self.run.model.training

    run = Runner([GradientAccumulation(3), Cancels(), Steps()])
    run.fit(1, make_learn((6,) * 5, length=False, valid=1))
    assert run.steps.at == [2] and run.seen is False


def test_batches_that_another_callback_cancels_do_not_count():
    class Skips(Callback):
        def begin_batch(self):
            if self.run.iter in (1, 5):
                raise CancelBatchException

    learn, hand = make_learn((6,) * 6), make_learn((6,) * 6)
    run = Runner([GradientAccumulation(2), Skips(), Steps()])
    run.fit(1, learn)
    hand.data.train_dl = [b for i, b in enumerate(hand.data.train_dl) if i not in (1, 5)]
    Runner([GradientAccumulation(2)]).fit(1, hand)
    check_same(learn, hand)
    assert run.steps.at == [2, 4]


def test_clipping_sees_the_whole_group():
    learn, hand = make_learn(), make_learn()
    Runner([GradientClip(0.1), GradientAccumulation(2)]).fit(1, learn)
    for i, (xb, yb) in enumerate(hand.data.train_dl):
        (F.cross_entropy(hand.model(xb), yb) / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(hand.model.parameters(), 0.1)
            hand.opt.step()
            hand.opt.zero_grad()
    check_same(learn, hand)


def test_magnitudes_of_gradients_are_recorded_for_whole_groups():
    run = Runner([GradientAccumulation(2), ParamMagnitudes(grads=True)])
    run.fit(1, make_learn())
    assert run.param_magnitudes.values["grad_max"].isfinite().all()


def test_an_interrupt_within_a_group_leaves_nothing_for_the_next_fit():
    class Interrupts(Callback):
        def begin_batch(self):
            if self.run.n_iter == 1:
                raise KeyboardInterrupt

    learn, plain = make_learn(lr=0.0), make_learn(lr=0.0)
    accumulates = GradientAccumulation(4)
    Runner([accumulates, Interrupts()]).fit(1, learn)
    for one, run in ((learn, Runner([accumulates])), (plain, Runner([GradientAccumulation(4)]))):
        one.opt.param_groups[0]["lr"] = 0.1
        run.fit(1, one)
    check_same(learn, plain)


def test_two_accumulations_in_one_run_are_an_error():
    with pytest.raises(
        RuntimeError, match="GradientAccumulation claims 'weigh', which GradientAccumulation has already"
    ):
        Runner([GradientAccumulation(2), GradientAccumulation(3)]).fit(1, make_learn())


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "4", None])
def test_n_must_be_a_whole_number(n):
    with pytest.raises(ValueError, match="n, the batches per step, must be a whole number, 1 or more; got"):
        GradientAccumulation(n)
