"""The search for a learning rate: the sweep, its suggestions, and that it leaves no trace."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from fastrbn.callbacks import EMA, LR_Find, ParamScheduler, Recorder, sched_lin
from fastrbn.learn import Callback, CancelTrainException, Runner


def two_groups(params):
    first, *rest = params
    return torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1)


def with_everything():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


def optimisers():
    sgd = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4)
    return [sgd, torch.optim.Adam, two_groups]


def everything(learn):
    """A copy of everything that a fit may change."""
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
    """Draws random numbers of all kinds in each batch, and raises `error` in batch `at`."""

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
        Runner().fit(1, learn)  # so that momentum and running statistics are not the initial ones
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
    assert all(a is b for a, b in zip(objects, now)), "objects that others refer to were replaced"


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


def test_each_rule_on_a_known_sweep():
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


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="rule must be one of steepest, minimum, valley; got 'slide'"):
        LR_Find().suggest("slide")


def test_a_loss_that_never_falls_gives_no_suggestion():
    finder = LR_Find()
    assert finder.suggestion is None
    finder.lrs, finder.losses = [1e-6 * 1.2**i for i in range(30)], [1 + 0.1 * i for i in range(30)]
    assert [finder.suggest(rule) for rule in ("steepest", "minimum", "valley")] == [None] * 3


@pytest.mark.parametrize("kwargs", [{"max_iter": 1}, {"min_lr": 0}, {"min_lr": 2, "max_lr": 1}, {"max_iter": 3.5}])
def test_an_invalid_sweep_is_an_error(kwargs):
    with pytest.raises(ValueError, match="LR_Find needs max_iter of 2 or more and 0 < min_lr < max_lr"):
        LR_Find(**kwargs)


def test_buffers_that_a_module_replaces_or_adds_are_restored(make_learn):
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


# --- what LR_Find must restore, and what it cannot work with


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, pred, yb):
        return nn.functional.cross_entropy(pred * self.temperature, yb)


def test_lr_find_restores_a_loss_functions_parameters_and_kept_averages(make_learn):
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
    with pytest.raises(RuntimeError, match="another callback changed 1e-06 to 0.4 before the step: remove"):
        Runner([LR_Find(), ParamScheduler("lr", sched_lin(0.4, 0.1))]).fit(1, learn)
    assert torch.equal(learn.model[0].weight, before) and learn.opt.param_groups[0]["lr"] == 0.1
    run = Runner([ParamScheduler("lr", sched_lin(0.4, 0.1)), LR_Find(max_iter=4), Recorder()])
    run.fit(1, learn)
    assert run.lr_find.lrs == run.recorder.lrs[0]


def test_lr_find_refuses_lazy_modules_without_a_batch(make_learn):
    with pytest.raises(ValueError, match="lazy modules .*0.weight.* give it a batch first"):
        Runner(LR_Find()).fit(1, make_learn(model=nn.Sequential(nn.LazyLinear(3))))


def test_the_picture_says_that_minimum_is_a_tenth_of_the_rate_at_the_minimum():
    finder = LR_Find()
    finder.lrs = [10 ** (i / 10 - 4) for i in range(41)]
    finder.losses = [2 + (i / 10 - 3) ** 2 for i in range(41)]
    shown = [text.get_text() for text in finder.plot().axes[0].texts]
    assert any(text.startswith("minimum / 10: ") for text in shown)
