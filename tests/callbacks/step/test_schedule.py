"""Schedules and the callback that follows them."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, IterableDataset

from fastrbn.callbacks import (
    Checkpoint,
    GradientAccumulation,
    ParamScheduler,
    Recorder,
    TorchScheduler,
    Warmup,
    annealer,
    combine_scheds,
    cos_1cycle_anneal,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)
from fastrbn.learn import Callback, CancelBatchException, Runner


@annealer
def sched_square(start, end, pos):
    """An annealer at module level, where pickle finds it."""
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
def test_a_schedule_has_a_repr_and_can_be_copied_and_pickled(sched):
    f = sched(0.1, 0.6)
    for g in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert g(0.3) == f(0.3)
    assert repr(f) == f"{sched.__name__}(0.1, 0.6)"


def test_a_schedule_takes_a_tensor_as_the_course_plots_it():
    for sched in (sched_lin, sched_cos, sched_exp):
        assert float(sched(1.0, 2.0)(torch.tensor(0.5))) == pytest.approx(sched(1.0, 2.0)(0.5))


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 0), (-1, 1)])
def test_an_exponential_schedule_through_zero_is_an_error(start, end):
    with pytest.raises(ValueError, match="sched_exp needs start and end of the same sign"):
        sched_exp(start, end)(0.5)


def test_combined_schedules_follow_one_another():
    f = combine_scheds([0.25, 0.25, 0.5], [sched_lin(0, 1), sched_no(5, 5), sched_lin(1, 3)])
    assert [f(p) for p in (0, 0.125, 0.2499999, 0.25, 0.4, 0.5, 0.75, 1.0)] == pytest.approx(
        [0, 0.5, 1, 5, 5, 1, 2, 3], abs=1e-5
    )


@pytest.mark.parametrize("pcts", [[0.7, 0.2, 0.1], [0.1] * 10, [1 / 3] * 3, [0.5, 0.0, 0.5], [1.0]])
def test_the_last_position_is_the_last_schedules_end_despite_rounding(pcts):
    f = combine_scheds(pcts, [sched_lin(i, i + 1) for i in range(len(pcts))])
    assert f(1.0) == len(pcts)
    assert f(0.0) == 0.0
    assert f(1.0 + 1e-9) == len(pcts)


def test_a_share_of_zero_at_the_end_is_never_reached():
    f = combine_scheds([0.5, 0.5, 0.0], [sched_no(1, 1), sched_no(2, 2), sched_no(3, 3)])
    assert f(1.0) == 2


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.floats(0, 1))
def test_a_combined_schedule_follows_the_piece_at_its_position(weights, pos):
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
        ([-0.5, 1.5], 2, "each 0 or more"),
        ([math.nan, 0.5], 2, "each 0 or more"),
        ([0.2, 0.3, 0.5], 2, "got 3 shares for 2 schedules"),
        ([0.5], 3, "got 1 shares for 3 schedules"),
        ([], 0, "at least one schedule"),
    ],
)
def test_wrong_shares_are_errors(pcts, n, message):
    with pytest.raises(ValueError, match=message):
        combine_scheds(pcts, [sched_lin(0, 1)] * n)


def test_combining_numbers_is_an_error():
    with pytest.raises(TypeError, match="scheds must be functions of a position"):
        combine_scheds([0.5, 0.5], [0.1, 0.2])


def test_one_cycle_is_two_halves_and_a_combined_schedule_pickles():
    f = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.2, 0.6, 0.1))
    assert [f(0), f(0.3), f(1)] == pytest.approx([0.2, 0.6, 0.1])
    assert pickle.loads(pickle.dumps(f))(0.4) == f(0.4)


# --- ParamScheduler


class Watch(Callback):
    """Records the hyper-parameters of each training step."""

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


def test_momentum_of_adam_is_its_first_beta(make_learn):
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
def test_an_unknown_hyper_parameter_is_an_error_that_lists_the_known_ones(make_learn, name):
    with pytest.raises(ValueError, match=f"SGD has no hyper-parameter '{name[:5]}.*it has lr, momentum"):
        Runner([ParamScheduler(name, sched_lin(0, 1))]).fit(1, make_learn())


def test_a_wrong_number_of_schedules_says_both_numbers(make_learn):
    with pytest.raises(ValueError, match="got 3 schedules for 2 groups"):
        Runner([ParamScheduler("lr", [sched_no(1, 1)] * 3)]).fit(1, make_learn(opt=two_groups))


def test_a_number_in_place_of_a_schedule_is_an_error():
    with pytest.raises(TypeError, match="needs a function of the position"):
        ParamScheduler("lr", 0.1)


class Unknown:
    """A loader without a length."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        return iter(self.pairs)


def test_a_schedule_over_a_loader_without_length_warns_once(make_learn):
    learn, run = make_learn(), Runner([ParamScheduler("lr", sched_lin(0.4, 0.1)), Recorder()])
    learn.data.train_dl = Unknown(learn.data.train_dl)
    with pytest.warns(UserWarning, match="no length, so schedules move only between epochs: in this fit of 2") as told:
        run.fit(2, learn)
    assert len(told) == 1 and run.recorder.lrs[0] == pytest.approx([0.4] * 4 + [0.25] * 4)


class Stream(IterableDataset):
    """Each worker yields the whole stream."""

    def __len__(self):
        return 8

    def __iter__(self):
        return ((torch.zeros(4), 0) for _ in range(8))


@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")
def test_a_stream_longer_than_its_length_stays_within_the_schedule(make_learn):
    learn, run = make_learn(n_valid=0), Runner([ParamScheduler("lr", sched_lin(0.4, 0.04)), Recorder()])
    learn.data.train_dl = DataLoader(Stream(), 2, num_workers=2)
    run.fit(1, learn)
    assert run.recorder.lrs[0] == pytest.approx([0.4, 0.31, 0.22, 0.13, *[0.04] * 4])


# --- warm-up


HALVED = pytest.param(lambda: [TorchScheduler(partial(ExponentialLR, gamma=0.5), per="step")], id="TorchScheduler")
FALLING = pytest.param(lambda: [ParamScheduler("lr", lambda pos: 0.1 * 0.5 ** round(8 * pos))], id="ParamScheduler")


@pytest.mark.parametrize("schedule", [pytest.param(list, id="none"), HALVED, FALLING])
def test_a_warm_up_scales_what_a_schedule_sets(schedule, make_learn):
    learn, run = make_learn(), Runner([Warmup(steps=4), *schedule(), Recorder()])
    run.fit(2, learn)
    falls = [1.0] * 8 if len(run.cbs) == 3 else [0.5**k for k in range(8)]
    warm = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert run.recorder.lrs[0] == pytest.approx([0.1 * f * w for f, w in zip(falls, warm)])
    run.fit(1, learn)
    assert run.recorder.lrs[0][0] == pytest.approx(0.025), "each fit warms up"


def test_a_warm_up_counts_steps_and_can_be_a_share_of_them(make_learn):
    run = Runner([Warmup(share=0.5), GradientAccumulation(2), Recorder()])
    run.fit(2, make_learn(n_train=4))
    assert run.recorder.lrs[0] == pytest.approx([0.05, 0.05, *[0.1] * 6])


def test_a_warm_up_keeps_the_ratio_of_the_groups_and_leaves_the_rates(make_learn):
    learn = make_learn(opt=lambda p: torch.optim.SGD([{"params": [q], "lr": 0.1 * i} for i, q in enumerate(p, 1)]))

    class Stops(Callback):
        def after_loss(self):
            if self.run.n_iter == 1:
                raise CancelBatchException
            if self.run.n_iter == 2:
                raise KeyboardInterrupt

    run = Runner([Warmup(10), Recorder(), Stops()])
    run.fit(1, learn)
    assert [lrs[:3] for lrs in run.recorder.lrs] == [pytest.approx([0.01 * i, 0.02 * i, 0.02 * i]) for i in range(1, 7)]
    assert [g["lr"] for g in learn.opt.param_groups] == [0.1 * i for i in range(1, 7)]


def test_a_step_between_batches_is_warmed_up_too(make_learn):
    """Without a length the rest of an epoch makes a step before validation."""

    class Rates(Callback):
        seen: list = []

        def after_backward(self):
            self.seen.append(self.run.opt.param_groups[0]["lr"])

    Rates._order, learn = 5, make_learn()
    learn.data.train_dl = Unknown(learn.data.train_dl)
    Runner([Warmup(10), GradientAccumulation(3), Rates()]).fit(2, learn)
    assert Rates.seen == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert learn.opt.param_groups[0]["lr"] == 0.1


def test_a_warm_up_resumes_and_the_file_has_the_full_rate(make_learn, tmp_path):
    run, learn = Runner([Warmup(6), Recorder(), Checkpoint(tmp_path, every=3, keep=None)]), make_learn()
    run.fit(2, learn)
    file = min(tmp_path.iterdir())
    assert torch.load(file)["opt"]["param_groups"][0]["lr"] == 0.1
    again = Runner([Warmup(6), Recorder()])
    again.fit(2, make_learn(), resume=file)
    assert again.recorder.lrs == run.recorder.lrs


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, "either in steps or as a share of the fit; got steps=None and share=None: give one"),
        ({"steps": 5, "share": 0.1}, "got steps=5 and share=0.1"),
        ({"steps": 0}, "Warmup: steps must be a whole number, 1 or more; got 0"),
        ({"steps": 0.05}, "Warmup: steps must be a whole number"),
        ({"share": 5}, "share is a share of the fit's steps, above 0 and up to 1; got 5"),
    ],
    ids=str,
)
def test_a_warm_up_of_no_length_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Warmup(**kwargs)


def test_a_share_of_an_unknown_length_is_refused(make_learn):
    learn = make_learn()
    learn.data.train_dl = Unknown(learn.data.train_dl)
    with pytest.raises(ValueError, match="the training loader has no length, so a share of the fit is not known"):
        Runner([Warmup(share=0.1)]).fit(1, learn)
