"""PyTorch's schedulers as a callback: when they move, what a second fit and a resumed one do, and who they refuse."""

from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler as ls

from fastrbn.callbacks import (
    AvgStatsCallback,
    Checkpoint,
    GradientAccumulation,
    LR_Find,
    MixedPrecision,
    ParamScheduler,
    Recorder,
    TorchScheduler,
    Warmup,
    accuracy,
    sched_lin,
)
from fastrbn.learn import Callback, CancelBatchException, CancelEpochException, Runner

EPOCHS, ITERS = 3, 4
pytestmark = pytest.mark.filterwarnings(
    "ignore:The epoch parameter:UserWarning"
)  # SequentialLR's own, before torch 2.10

MAKERS = {
    "cosine": (partial(ls.CosineAnnealingLR, T_max=3), None),
    "cosine per step": (partial(ls.CosineAnnealingLR, T_max=12), "step"),
    "multi-step": (partial(ls.MultiStepLR, milestones=[1, 2, 2]), None),
    "lambda": (lambda opt: ls.LambdaLR(opt, lambda k: 1 / (k + 1)), "step"),
    "one cycle": (partial(ls.OneCycleLR, max_lr=0.4), None),
    "one cycle by epochs": (partial(ls.OneCycleLR, max_lr=0.4, epochs=3, steps_per_epoch=4), None),
    "cyclic": (partial(ls.CyclicLR, base_lr=0.1, max_lr=0.4, step_size_up=3), None),
    "sequential": (
        lambda opt: ls.SequentialLR(
            opt, [ls.LinearLR(opt, 0.1, total_iters=4), ls.CosineAnnealingLR(opt, T_max=8)], milestones=[4]
        ),
        "step",
    ),
    "chained": (lambda opt: ls.ChainedScheduler([ls.ExponentialLR(opt, 0.9), ls.StepLR(opt, 2)], opt), None),
    "plateau": (partial(ls.ReduceLROnPlateau, patience=0, threshold=10.0, threshold_mode="abs"), None),
}
every_maker = pytest.mark.parametrize(("make", "per"), MAKERS.values(), ids=MAKERS)


def make_run(scheduler, *cbs):
    run = Runner([scheduler, Recorder(), AvgStatsCallback(accuracy), *cbs])
    run.logger = lambda line: None
    return run


def settings(opt):
    return [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]


def by_hand(learn, make, per):
    """The rates of a loop as PyTorch's documentation writes it."""
    scheduler, rates = (
        make(learn.opt, **({"total_steps": EPOCHS * ITERS} if make is MAKERS["one cycle"][0] else {})),
        [],
    )
    per = per or ("step" if isinstance(scheduler, (ls.OneCycleLR, ls.CyclicLR)) else "epoch")
    for _ in range(EPOCHS):
        learn.model.train()
        for xb, yb in learn.data.train_dl:
            rates.append(learn.opt.param_groups[0]["lr"])
            learn.loss_func(learn.model(xb), yb).backward()
            learn.opt.step()
            learn.opt.zero_grad()
            if per == "step":
                scheduler.step()
        if per == "epoch":
            scheduler.step(*([1.0] if isinstance(scheduler, ls.ReduceLROnPlateau) else []))
    return rates


@every_maker
def test_it_moves_as_in_pytorchs_own_loop_and_each_fit_starts_again(make, per, make_learn):
    learn, twin = make_learn(), make_learn()
    before = settings(learn.opt)
    run = make_run(TorchScheduler(make, per))
    expected = by_hand(twin, make, per)
    for _ in range(2):
        run.fit(EPOCHS, learn)
        assert run.recorder.lrs[0] == expected and len(set(expected)) > 1
        assert settings(learn.opt) == before
        assert "step" not in vars(learn.opt) and not learn.opt._optimizer_step_post_hooks


def test_it_starts_from_the_present_rate_not_from_that_of_an_earlier_scheduler(make_learn):
    learn = make_learn()
    ls.StepLR(learn.opt, 1)
    learn.opt.param_groups[0]["lr"] = 0.02
    run = make_run(TorchScheduler(*MAKERS["lambda"]))
    run.fit(1, learn)
    assert run.recorder.lrs[0] == pytest.approx([0.02, 0.01, 0.02 / 3, 0.005])
    assert settings(learn.opt)[0]["lr"] == 0.02 and settings(learn.opt)[0]["initial_lr"] == 0.1


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("plateau", None),
        ("multi-step", 4),
        *((n, 5) for n in ("plateau", "multi-step", "lambda", "one cycle", "cyclic", "sequential")),
    ],
)
def test_a_resumed_fit_has_the_rates_and_weights_of_the_whole_one(name, every, make_learn, tmp_path):
    learn, (make, per) = make_learn(), MAKERS[name]
    run = make_run(TorchScheduler(make, per), Checkpoint(tmp_path / "whole", every=every, keep=None))
    run.fit(EPOCHS, learn)
    again, fresh = make_run(TorchScheduler(make, per), Checkpoint(tmp_path / "again")), make_learn()
    torch.manual_seed(99)
    file = min((tmp_path / "whole").iterdir(), key=lambda f: f.stat().st_mtime_ns)  # after an epoch, or within one
    again.fit(EPOCHS, fresh, resume=file)
    assert again.recorder.lrs == run.recorder.lrs and len(set(run.recorder.lrs[0])) > 1
    for key, value in learn.model.state_dict().items():
        assert torch.equal(value, fresh.model.state_dict()[key]), key
    assert settings(fresh.opt) == settings(learn.opt)


def test_another_scheduler_does_not_take_the_state(make_learn, tmp_path):
    make_run(TorchScheduler(*MAKERS["cosine"]), Checkpoint(tmp_path / "c")).fit(1, make_learn())
    run = make_run(TorchScheduler(*MAKERS["chained"]), Checkpoint(tmp_path / "d"))
    with pytest.raises(ValueError, match="the saved one is a CosineAnnealingLR, TorchScheduler has made a ChainedSch"):
        run.fit(2, make_learn(), resume=tmp_path / "c")


def test_the_number_of_steps_is_that_of_the_optimisers(make_learn):
    seen = []

    def make(opt, total_steps):
        seen.append(total_steps)
        return ls.OneCycleLR(opt, 0.4, total_steps=total_steps)

    for scheduler, cbs in [
        (TorchScheduler(make), []),
        (TorchScheduler(make), [GradientAccumulation(3)]),
        (TorchScheduler(make, per="epoch"), []),
    ]:
        run = make_run(scheduler, *cbs)
        run.fit(2, make_learn(n_train=4))
        assert scheduler.scheduler.last_epoch == seen[-1]
    assert seen == [8, 4, 2]


def test_a_loader_without_length_needs_the_number(make_learn):
    learn = make_learn()
    pairs = learn.data.train_dl
    learn.data.train_dl = type("NoLength", (), {"__iter__": lambda self: iter(pairs)})()
    with pytest.raises(ValueError, match="the training loader has no length, so the total_steps .* are not known"):
        make_run(TorchScheduler(partial(ls.OneCycleLR, max_lr=0.1))).fit(1, learn)
    make_run(TorchScheduler(partial(ls.OneCycleLR, max_lr=0.1, total_steps=4))).fit(1, learn)


class Skips(Callback):
    """Nothing but the third epoch has a step."""

    def __init__(self, error):
        self.error = error

    def after_loss(self):
        if self.run.in_train and self.run.epoch < 2:
            raise self.error


@pytest.mark.parametrize("per", ["step", "epoch"])
@pytest.mark.parametrize("error", [CancelBatchException(), CancelEpochException()], ids=repr)
def test_it_does_not_move_before_the_optimiser(per, error, make_learn):
    """PyTorch would warn, and warnings are errors here."""
    run = make_run(TorchScheduler(partial(ls.ExponentialLR, gamma=0.5), per), Skips(error))
    run.fit(4, make_learn())
    rates = sorted({rate for rate in run.recorder.lrs[0]}, reverse=True)
    assert rates == [0.1 / 2**k for k in range(2 if per == "epoch" else 8)]


def test_it_moves_once_for_batches_that_are_accumulated(make_learn):
    run = make_run(TorchScheduler(partial(ls.ExponentialLR, gamma=0.5), per="step"), GradientAccumulation(3))
    run.fit(2, make_learn(n_train=4))  # steps of 3 and 1 batches
    assert run.recorder.lrs[0] == [0.1] * 3 + [0.05] + [0.025] * 3 + [0.0125]


def test_a_step_that_mixed_precision_skips_does_not_count(make_learn):
    class Overflows(Callback):
        _order = -2  # before the gradients are unscaled

        def after_backward(self):
            if self.run.n_iter < 2:
                next(self.run.model.parameters()).grad.fill_(torch.inf)

    precision = MixedPrecision("fp16", init_scale=8.0)
    run = make_run(TorchScheduler(partial(ls.ExponentialLR, gamma=0.5), per="step"), precision, Overflows())
    run.fit(1, make_learn(n_train=4))
    assert run.mixed_precision.skipped == 2
    assert run.recorder.lrs[0] == [0.1, 0.1, 0.1, 0.05]


def test_a_rate_in_a_tensor_stays_in_that_tensor(make_learn):
    learn = make_learn(opt=lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)))
    rate = learn.opt.param_groups[0]["lr"]
    run = make_run(TorchScheduler(partial(ls.CosineAnnealingLR, T_max=3)), Warmup(2))
    run.fit(3, learn)
    assert run.recorder.lrs[0][::4] == pytest.approx([0.05, 0.075, 0.025])
    assert learn.opt.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.1)


# --- a monitor


def test_a_plateau_follows_the_average_it_is_given(make_learn):
    class Sets(Callback):
        _order = 1

        def after_epoch(self):
            self.run.avg_stats.history[-1]["train_accuracy"] = [0.1, 0.2, 0.2, 0.2, 0.9][self.run.epoch]

    make = partial(ls.ReduceLROnPlateau, mode="max", factor=0.5, patience=0)
    run = make_run(TorchScheduler(make, monitor="train_accuracy"), Sets())
    run.fit(5, make_learn(n_valid=0))
    assert run.recorder.lrs[0][::ITERS] == [0.1, 0.1, 0.1, 0.05, 0.025]


PLATEAU = ls.ReduceLROnPlateau
REFUSED = [
    (TorchScheduler(PLATEAU, monitor="accuracy"), "'accuracy' should rise, and the ReduceLROnPlateau has mode='min'"),
    (TorchScheduler(partial(PLATEAU, mode="max")), "'valid_loss' should fall, .* make it with mode='min'"),
    (TorchScheduler(PLATEAU, monitor="valid_score"), "Did you mean 'valid_loss'|monitor must be one of"),
    (TorchScheduler(PLATEAU, per="step"), "ReduceLROnPlateau follows an average of the epoch: leave out per='step'"),
    (TorchScheduler(MAKERS["cosine"][0], monitor="valid_loss"), "CosineAnnealingLR takes no monitor; got 'valid_loss'"),
]


@pytest.mark.parametrize(("scheduler", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_monitor_that_does_not_suit_is_refused(scheduler, words, make_learn):
    learn = make_learn()
    before = settings(learn.opt)
    with pytest.raises(ValueError, match=words):
        make_run(scheduler).fit(1, learn)
    assert settings(learn.opt) == before


def test_without_averages_or_validation_a_plateau_is_refused(make_learn):
    with pytest.raises(ValueError, match="TorchScheduler needs an AvgStatsCallback in the run"):
        Runner([TorchScheduler(PLATEAU)]).fit(1, make_learn())
    with pytest.raises(ValueError, match="valid_loss is measured in validation, but data.valid_dl is None"):
        make_run(TorchScheduler(PLATEAU)).fit(1, make_learn(n_valid=0))


# --- wrong use


@pytest.mark.parametrize(
    "other",
    [ParamScheduler("lr", sched_lin(0.1, 0)), LR_Find(), TorchScheduler(MAKERS["chained"][0])],
    ids=lambda cb: type(cb).__name__,
)
def test_two_callbacks_that_set_the_rate_are_refused(other, make_learn):
    learn = make_learn()
    before = settings(learn.opt)
    with pytest.raises(
        ValueError, match="TorchScheduler sets the learning rate, and so does (Par|LR|Tor).*: leave one"
    ):
        make_run(TorchScheduler(MAKERS["cosine"][0]), other).fit(1, learn)
    assert settings(learn.opt) == before


def test_a_scheduler_of_another_hyper_parameter_may_stand_beside_it(make_learn):
    learn = make_learn()
    run = make_run(TorchScheduler(MAKERS["cosine"][0]), ParamScheduler("weight_decay", sched_lin(0.0, 0.1)))
    run.fit(1, learn)
    assert learn.opt.param_groups[0]["weight_decay"] == pytest.approx(0.075)


def test_what_makes_no_scheduler_of_the_optimiser_is_refused(make_learn):
    learn, other = make_learn(), make_learn()
    with pytest.raises(TypeError, match="TorchScheduler needs a function that makes a scheduler .*; got <torch.optim"):
        TorchScheduler(ls.StepLR(other.opt, 1))
    with pytest.raises(TypeError, match="make must return a scheduler of torch.optim.lr_scheduler .*; got None"):
        make_run(TorchScheduler(lambda opt: None)).fit(1, learn)
    with pytest.raises(TypeError, match="for the optimiser that it is given; got <torch.optim.lr_scheduler.StepLR"):
        make_run(TorchScheduler(lambda opt: ls.StepLR(other.opt, 1))).fit(1, learn)
    with pytest.raises(ValueError, match="per must be one of step, epoch; got 'batch'"):
        TorchScheduler(ls.StepLR, per="batch")


def test_it_shows_how_it_was_made():
    one_cycle = TorchScheduler(partial(ls.OneCycleLR, max_lr=0.4), per="step")
    assert repr(one_cycle) == "TorchScheduler(partial(OneCycleLR, max_lr=0.4), per='step')"
