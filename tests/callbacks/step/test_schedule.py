"""Schedules, the callback that follows them, and the search for a learning rate that leaves no trace."""

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fastrbn.callbacks import (
    EMA,
    LR_Find,
    ParamScheduler,
    Recorder,
    annealer,
    combine_scheds,
    cos_1cycle_anneal,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)
from fastrbn.learn import Callback, CancelTrainException, Runner


@annealer
def sched_square(start, end, pos):
    """An annealer of one's own, at module level as pickle wants it."""
    return start + (end - start) * pos**2


# --- functions of the position


@pytest.mark.parametrize(
    ("sched", "quarter", "half"),
    [
        (sched_lin, 1.75, 2.5),
        (sched_cos, 1 + 3 * (1 - math.cos(math.pi / 4)) / 2, 2.5),
        (sched_no, 1.0, 1.0),
        (sched_exp, 4**0.25, 2.0),
        (sched_square, 1 + 3 / 16, 1.75),
    ],
)
def test_an_annealer_gives_a_function_of_the_position(sched, quarter, half):
    f = sched(1.0, 4.0)
    assert f(0.0) == 1.0
    assert f(0.25) == pytest.approx(quarter)
    assert f(0.5) == pytest.approx(half)
    assert f(1.0) == pytest.approx(1.0 if sched is sched_no else 4.0)


@pytest.mark.parametrize("sched", [sched_lin, sched_cos, sched_no, sched_exp, sched_square])
def test_a_schedule_can_be_copied_and_pickled_and_tells_what_it_is(sched):
    f = sched(0.1, 0.6)
    for g in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert g(0.3) == f(0.3)
    assert repr(f) == f"{sched.__name__}(0.1, 0.6)"


def test_a_schedule_takes_a_tensor_as_the_course_plots_it():
    for sched in (sched_lin, sched_cos, sched_exp):
        assert float(sched(1.0, 2.0)(torch.tensor(0.5))) == pytest.approx(sched(1.0, 2.0)(0.5))


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 0), (-1, 1)])
def test_an_exponential_schedule_through_zero_says_what_to_do(start, end):
    with pytest.raises(ValueError, match="sched_exp needs two numbers of the same sign"):
        sched_exp(start, end)(0.5)


def test_combined_schedules_follow_one_another():
    f = combine_scheds([0.25, 0.25, 0.5], [sched_lin(0, 1), sched_no(5, 5), sched_lin(1, 3)])
    assert [f(p) for p in (0, 0.125, 0.2499999, 0.25, 0.4, 0.5, 0.75, 1.0)] == pytest.approx(
        [0, 0.5, 1, 5, 5, 1, 2, 3], abs=1e-5
    )


@pytest.mark.parametrize("pcts", [[0.7, 0.2, 0.1], [0.1] * 10, [1 / 3] * 3, [0.5, 0.0, 0.5], [1.0]])
def test_the_last_position_is_the_last_schedules_end_whatever_floats_do(pcts):
    f = combine_scheds(pcts, [sched_lin(i, i + 1) for i in range(len(pcts))])
    assert f(1.0) == len(pcts)
    assert f(0.0) == 0.0
    assert f(1.0 + 1e-9) == len(pcts)


def test_a_share_of_zero_at_the_end_is_never_reached():
    f = combine_scheds([0.5, 0.5, 0.0], [sched_no(1, 1), sched_no(2, 2), sched_no(3, 3)])
    assert f(1.0) == 2


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.floats(0, 1))
def test_a_combined_schedule_is_the_piece_that_its_position_falls_in(weights, pos):
    pcts = [w / sum(weights) for w in weights]
    f = combine_scheds(pcts, [sched_no(i, i) for i in range(len(pcts))])
    ends = [sum(weights[: i + 1]) / sum(weights) for i in range(len(pcts))]
    near = [i for i in range(len(pcts)) if ends[i] - pcts[i] - 1e-9 <= pos <= ends[i] + 1e-9]
    assert f(pos) in near


def test_the_last_share_may_be_left_out():
    f = combine_scheds([0.3, 0.3], [sched_no(i, i) for i in range(3)])
    assert [f(p) for p in (0.1, 0.5, 0.61, 1.0)] == [0, 1, 2, 2]
    assert f.pcts[-1] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("pcts", "n", "message"),
    [
        ([0.5, 0.6], 2, "pcts must sum to 1"),
        ([0.3, 0.3], 2, "pcts must sum to 1"),
        ([-0.5, 1.5], 2, "none negative"),
        ([math.nan, 0.5], 2, "none negative"),
        ([0.2, 0.3, 0.5], 2, "got 3 shares for 2 schedules"),
        ([0.5], 3, "got 1 shares for 3 schedules"),
        ([], 0, "one schedule at least"),
    ],
)
def test_wrong_shares_are_errors(pcts, n, message):
    with pytest.raises(ValueError, match=message):
        combine_scheds(pcts, [sched_lin(0, 1)] * n)


def test_a_combined_schedule_of_numbers_is_an_error():
    with pytest.raises(TypeError, match="scheds are functions of a position"):
        combine_scheds([0.5, 0.5], [0.1, 0.2])


def test_one_cycle_is_two_halves_and_a_combined_schedule_pickles():
    f = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.2, 0.6, 0.1))
    assert [f(0), f(0.3), f(1)] == pytest.approx([0.2, 0.6, 0.1])
    assert pickle.loads(pickle.dumps(f))(0.4) == f(0.4)


# --- ParamScheduler


class Watch(Callback):
    """Writes down, before each training step's end, what the optimiser's groups hold."""

    def begin_fit(self):
        self.seen = []

    def after_step(self):
        self.seen.append([{k: v for k, v in g.items() if k != "params"} for g in self.run.opt.param_groups])


def test_a_scheduler_sets_each_step_from_the_position(make_learn):
    run = Runner([ParamScheduler("lr", sched_lin(0.0, 1.0)), Watch])
    run.fit(2, make_learn(n_train=4))
    assert [s[0]["lr"] for s in run.watch.seen] == pytest.approx([i / 8 for i in range(8)])


def test_two_schedulers_work_side_by_side(make_learn):
    run = Runner([ParamScheduler("lr", sched_lin(0.1, 0.2)), ParamScheduler("momentum", sched_lin(0.9, 0.8)), Watch])
    run.fit(1, make_learn(n_train=2))
    assert (run.param_scheduler.pname, run.param_scheduler_2.pname) == ("lr", "momentum")
    assert [(s[0]["lr"], s[0]["momentum"]) for s in run.watch.seen] == [
        (0.1, 0.9),
        (pytest.approx(0.15), pytest.approx(0.85)),
    ]


def two_groups(params):
    first, *rest = params
    return torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1)


def test_each_param_group_can_have_its_schedule(make_learn):
    run = Runner([ParamScheduler("lr", [sched_no(0.1, 0), sched_no(0.2, 0)]), Watch])
    run.fit(1, make_learn(opt=two_groups))
    assert {(s[0]["lr"], s[1]["lr"]) for s in run.watch.seen} == {(0.1, 0.2)}


def test_one_schedule_serves_all_groups(make_learn):
    run = Runner([ParamScheduler("lr", sched_no(0.3, 0)), Watch])
    run.fit(1, make_learn(opt=two_groups))
    assert {(s[0]["lr"], s[1]["lr"]) for s in run.watch.seen} == {(0.3, 0.3)}


def test_momentum_of_an_optimiser_of_adams_kind_is_its_first_beta(make_learn):
    run = Runner([ParamScheduler("momentum", sched_lin(0.9, 0.8)), Watch])
    run.fit(1, make_learn(n_train=2, opt=torch.optim.Adam))
    assert [s[0]["betas"] for s in run.watch.seen] == [(0.9, 0.999), (pytest.approx(0.85), 0.999)]


def test_a_rate_kept_in_a_tensor_stays_in_that_tensor(make_learn):
    rate = torch.tensor(0.1)
    learn = make_learn(opt=lambda p: torch.optim.SGD(p, lr=rate))
    Runner([ParamScheduler("lr", sched_no(0.5, 0))]).fit(1, learn)
    assert learn.opt.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_validation_leaves_the_rate_alone(make_learn):
    learn = make_learn(n_train=2, n_valid=3)
    Runner([ParamScheduler("lr", sched_lin(0.0, 1.0))]).fit(1, learn)
    assert learn.opt.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["larning_rate", "params", "betas[0]"])
def test_an_unknown_hyper_parameter_names_those_there_are(make_learn, name):
    with pytest.raises(ValueError, match=f"SGD has no hyper-parameter '{name[:5]}.*there are lr, momentum"):
        Runner([ParamScheduler(name, sched_lin(0, 1))]).fit(1, make_learn())


def test_a_wrong_number_of_schedules_says_both_numbers(make_learn):
    with pytest.raises(ValueError, match="got 3 schedules for 2 groups"):
        Runner([ParamScheduler("lr", [sched_no(1, 1)] * 3)]).fit(1, make_learn(opt=two_groups))


def test_a_number_in_place_of_a_schedule_is_an_error():
    with pytest.raises(TypeError, match="needs a function of the position"):
        ParamScheduler("lr", 0.1)


# --- LR_Find


def with_everything():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


def optimisers():
    sgd = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4)
    return [sgd, torch.optim.Adam, two_groups]


def everything(learn):
    """All that a fit may change, copied."""
    return copy.deepcopy(
        {
            "model": learn.model.state_dict(),
            "training": [m.training for m in learn.model.modules()],
            "grads": [p.grad for p in learn.model.parameters()],
            "opt": learn.opt.state_dict(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": [np.random.get_state()[i] for i in (1, 2)],
        }
    )


def same(a, b):
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Uses(Callback):
    """Draws random numbers of all kinds in each batch, and ends the fit in the way asked for."""

    _order = 2

    def __init__(self, error=None, at=5):
        self.error, self.at = error, at

    def after_batch(self):
        random.random()
        np.random.rand()
        self.run.opt.param_groups[0]["note"] = self.run.n_iter
        if self.error is not None and self.run.n_iter == self.at:
            raise self.error


def test_the_comparison_of_everything_sees_each_change(make_learn):
    learn = make_learn(model=with_everything())
    before = everything(learn)
    assert same(before, everything(learn))
    for change in (torch.rand, lambda n: random.random(), lambda n: np.random.rand(), lambda n: Runner().fit(1, learn)):
        change(1)
        after = everything(learn)
        assert not same(before, after)
        before = after
    learn.model[1].running_mean[0] += 1
    assert not same(before, everything(learn))


@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
@pytest.mark.parametrize("opt", optimisers(), ids=["sgd", "adam", "groups"])
@pytest.mark.parametrize(
    "error", [None, ValueError("broken"), KeyboardInterrupt(), CancelTrainException()], ids=lambda e: type(e).__name__
)
def test_lr_find_leaves_everything_bit_for_bit(make_learn, opt, used, error):
    learn = make_learn(n_train=8, model=with_everything(), opt=opt)
    if used:
        Runner().fit(1, learn)  # momentum and running statistics are not those of the start
    before = everything(learn)
    objects = [*learn.model.parameters(), *learn.model.buffers(), *learn.opt.param_groups]
    finder = LR_Find(max_iter=30)
    run = Runner([finder, Uses(error)])
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(10, learn)
    else:
        run.fit(10, learn)
    assert len(finder.lrs) == len(finder.losses) > 3
    assert same(before, everything(learn))
    now = [*learn.model.parameters(), *learn.model.buffers(), *learn.opt.param_groups]
    assert all(a is b for a, b in zip(objects, now)), "what others refer to was replaced"


class Shuffled:
    """Draws its order from its own generator, and counts its epochs as the library's loader does."""

    def __init__(self, pairs, seed=3):
        self.pairs, self.generator, self.epoch = pairs, torch.Generator().manual_seed(seed), 0

    def __len__(self):
        return len(self.pairs)

    def __iter__(self):
        self.epoch += 1
        order = torch.randperm(len(self.pairs), generator=self.generator).tolist()
        return (self.pairs[(i + self.epoch) % len(self.pairs)] for i in order)

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


@pytest.mark.parametrize("max_lr", [1.0, 1e30], ids=["whole sweep", "exploding"])
def test_a_fit_after_lr_find_equals_one_without(make_learn, max_lr):
    ends = []
    for find in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        learn = make_learn(n_train=6, model=with_everything())
        learn.data.train_dl = Shuffled(learn.data.train_dl)
        run = Runner([Recorder])
        run.fit(1, learn)
        if find:
            Runner([LR_Find(max_iter=25, max_lr=max_lr)]).fit(10, learn)
        run.fit(2, learn)
        ends.append((everything(learn), run.recorder.losses))
    assert same(*ends)


def test_lr_find_sweeps_from_the_first_rate_to_the_last(make_learn):
    finder = LR_Find(max_iter=7, min_lr=1e-6, max_lr=1e-3)
    run = Runner([finder])
    run.fit(5, make_learn())
    assert finder.lrs == pytest.approx([1e-6 * 10 ** (i / 2) for i in range(7)])
    assert "7 steps, the whole sweep" in run.stop_reason


def test_lr_find_stops_where_the_loss_explodes(make_learn):
    finder = LR_Find(max_iter=100, max_lr=1e4)
    run = Runner([finder])
    run.fit(100, make_learn())
    assert len(finder.lrs) < 100
    assert "over 10 times its best" in run.stop_reason or "the loss is" in run.stop_reason
    assert max(finder.losses[:5]) < 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lr_find_stops_at_a_loss_that_is_not_finite(make_learn, bad):
    class Spoils(Callback):
        def after_loss(self):
            if self.run.n_iter == 4:
                self.run.loss = self.run.loss * bad

    finder = LR_Find()
    run = Runner([Spoils, finder])
    run.fit(10, make_learn())
    assert len(finder.losses) == 5
    assert f"the loss is {bad}" in run.stop_reason


def test_losses_below_zero_do_not_end_the_sweep(make_learn):
    finder = LR_Find(max_iter=20, max_lr=1e-5)
    Runner([finder]).fit(10, make_learn(loss_func=lambda p, y: p.mean() - 3))
    assert len(finder.losses) == 20


def test_lr_find_does_not_validate(make_learn):
    class Counts(Callback):
        def begin_fit(self):
            self.n = 0

        def after_loss(self):
            self.n += not self.run.in_train

    run = Runner([LR_Find(max_iter=10), Counts])
    run.fit(4, make_learn(n_train=4))
    assert run.counts.n == 0
    assert run.n_iter == 10


def test_the_suggestion_lies_where_the_loss_falls():
    finder = LR_Find()
    finder.lrs = [1e-6 * 1.2**i for i in range(90)]
    generator = random.Random(0)
    finder.losses = [2.3 - 1.5 / (1 + math.exp(-(i - 50) / 4)) + 0.02 * generator.random() for i in range(80)]
    finder.losses += [0.8 * 1.5**i for i in range(10)]
    assert finder.lrs[44] < finder.suggestion < finder.lrs[56]


def test_each_rule_finds_its_place_on_a_sweep_that_is_known():
    finder = LR_Find()
    finder.lrs = [10 ** (-6 + i / 10) for i in range(70)]
    # level to 1e-3, then straight down to 1e-1, then up
    finder.losses = [2.0] * 30 + [2.0 - 0.05 * i for i in range(1, 21)] + [1.0 + 0.2 * i for i in range(1, 21)]
    assert finder.suggest("steepest") == finder.suggestion
    assert 1e-3 < finder.suggestion < 1e-1
    assert 10**-2.6 <= finder.suggest("minimum") <= 10**-1.9
    assert finder.suggest("valley") == pytest.approx(1e-2, rel=0.3)


def test_the_valley_may_have_bumps():
    finder = LR_Find()
    finder.lrs = list(range(1, 14))
    finder.losses = [9.0, 9.5, 8.0, 9.9, 7.0, 6.0, 6.5, 5.0, 4.0, 9.0, 9.0, 8.0, math.nan]
    assert finder.suggest("valley") in (5, 6), "the middle of 9 8 7 6 5 4"


def test_a_rule_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="the rules of LR_Find are steepest, minimum, valley; got 'slide'"):
        LR_Find().suggest("slide")


def test_without_a_fall_there_is_no_suggestion():
    finder = LR_Find()
    assert finder.suggestion is None
    finder.lrs, finder.losses = [1e-6 * 1.2**i for i in range(30)], [1 + 0.1 * i for i in range(30)]
    assert [finder.suggest(rule) for rule in ("steepest", "minimum", "valley")] == [None] * 3


@pytest.mark.parametrize("kwargs", [{"max_iter": 1}, {"min_lr": 0}, {"min_lr": 2, "max_lr": 1}, {"max_iter": 3.5}])
def test_a_sweep_that_cannot_be_is_an_error(kwargs):
    with pytest.raises(ValueError, match="LR_Find needs max_iter of 2 or more and 0 < min_lr < max_lr"):
        LR_Find(**kwargs)


def test_buffers_that_a_module_replaces_or_adds_are_put_back(make_learn):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("sums", torch.zeros(4))
            self.register_buffer("absent", None)
            self.calls, self.last = 0, torch.zeros(1)

        def forward(self, x):
            self.sums = self.sums + x.detach().sum(0)
            self.calls += 1
            self.last = x.detach().mean()
            if "late" not in self._buffers:
                self.register_buffer("late", torch.ones(1))
            self.absent = torch.ones(2)
            return x

    odd = Odd()
    sums, last = odd.sums, odd.last
    Runner([LR_Find(max_iter=5)]).fit(5, make_learn(model=nn.Sequential(odd, nn.Linear(4, 3))))
    assert (odd.calls, odd.absent, "late" in odd._buffers) == (0, None, False)
    assert odd.sums is sums
    assert odd.last is last
    assert not sums.any()


# --- what LR_Find must take back, and what it cannot work with


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, pred, yb):
        return nn.functional.cross_entropy(pred * self.temperature, yb)


def test_lr_find_takes_back_a_loss_functions_parameters_and_kept_averages(make_learn):
    learn = make_learn(n_train=30, n_valid=0)
    learn.loss_func = Tempered()
    learn.opt.add_param_group({"params": list(learn.loss_func.parameters())})
    before = {name: v.clone() for name, v in learn.model.state_dict().items()}
    run = Runner([LR_Find(max_iter=20, max_lr=1.0), EMA(keep=True)])
    run.fit(1, learn)
    assert len(run.lr_find.lrs) > 10 and run.ema.updates > 10
    assert learn.loss_func.temperature.item() == 1.0
    assert all(torch.equal(v, before[name]) for name, v in learn.model.state_dict().items())


def test_a_schedule_that_overrides_lr_find_is_an_error_and_leaves_no_trace(make_learn):
    learn = make_learn()
    before = learn.model[0].weight.clone()
    with pytest.raises(RuntimeError, match="another callback has changed 1e-06 to 0.4 before the step: leave out"):
        Runner([LR_Find(), ParamScheduler("lr", sched_lin(0.4, 0.1))]).fit(1, learn)
    assert torch.equal(learn.model[0].weight, before) and learn.opt.param_groups[0]["lr"] == 0.1
    run = Runner([ParamScheduler("lr", sched_lin(0.4, 0.1)), LR_Find(max_iter=4), Recorder()])
    run.fit(1, learn)
    assert run.lr_find.lrs == run.recorder.lrs[0]


def test_lr_find_asks_for_a_batch_where_modules_are_lazy(make_learn):
    with pytest.raises(ValueError, match="lazy modules .*0.weight.* give it a batch first"):
        Runner(LR_Find()).fit(1, make_learn(model=nn.Sequential(nn.LazyLinear(3))))


class Unknown:
    """A loader without a length."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        return iter(self.pairs)


def test_a_schedule_over_a_loader_without_length_is_told_once(make_learn):
    learn, run = make_learn(), Runner([ParamScheduler("lr", sched_lin(0.4, 0.1)), Recorder()])
    learn.data.train_dl = Unknown(learn.data.train_dl)
    with pytest.warns(UserWarning, match="no length, so schedules move only between epochs: this fit of 2") as told:
        run.fit(2, learn)
    assert len(told) == 1 and run.recorder.lrs[0] == pytest.approx([0.4] * 4 + [0.25] * 4)


class Stream(IterableDataset):
    """Each of its workers yields all of it."""

    def __len__(self):
        return 8

    def __iter__(self):
        return ((torch.zeros(4), 0) for _ in range(8))


@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")
def test_a_stream_that_gives_more_than_its_length_stays_within_the_schedule(make_learn):
    learn, run = make_learn(n_valid=0), Runner([ParamScheduler("lr", sched_lin(0.4, 0.04)), Recorder()])
    learn.data.train_dl = DataLoader(Stream(), 2, num_workers=2)
    run.fit(1, learn)
    assert run.recorder.lrs[0] == pytest.approx([0.4, 0.31, 0.22, 0.13, *[0.04] * 4])
