"""Statistics of what modules put out."""

import copy
import functools
import math
import pickle

import pytest
import torch
from torch import nn

from fastrbn.callbacks import ActivationStats
from fastrbn.learn import Callback, Runner

Stats = functools.partial(ActivationStats, every=1)


def hooks_on(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class Copies(Callback):
    """Outputs of the modules in training, taken by hand."""

    def __init__(self, *names):
        self.names = names

    def begin_fit(self):
        self.outs = {n: [] for n in self.names}
        self._handles = [
            self.run.model.get_submodule(n).register_forward_hook(
                lambda m, i, o, n=n: self.outs[n].append(o.detach().clone()) if m.training else None
            )
            for n in self.names
        ]

    def after_fit(self):
        for h in self._handles:
            h.remove()


def test_the_statistics_are_those_of_the_outputs(make_learn):
    run = Runner([Stats(bins=20, value_range=(-2, 2), near=0.1), Copies("0", "2")])
    run.fit(2, make_learn(n_train=3))
    stats = run.activation_stats
    assert stats.names == ["0", "1", "2", "3"]
    assert stats.steps == list(range(6))
    assert stats.means.shape == stats.stds.shape == stats.near_zero.shape == (6, 4)
    assert stats.hists.shape == (6, 4, 20)
    for name, column in (("0", 0), ("2", 2)):
        for step, out in enumerate(run.copies.outs[name]):
            torch.testing.assert_close(stats.means[step, column], out.mean())
            torch.testing.assert_close(stats.stds[step, column], out.std(correction=0))
            torch.testing.assert_close(stats.near_zero[step, column], (out.abs() < 0.1).float().mean())
            torch.testing.assert_close(stats.hists[step, column], out.histc(20, -2, 2))
            dead = (out.abs() < 0.1).all(0).float().mean()
            torch.testing.assert_close(stats.dead[step, column], dead)


def test_validation_costs_no_look(make_learn):
    class Counts(Callback):
        _order = 5

        def after_pred(self):
            assert bool(self.run.activation_stats._found) is self.run.in_train

    Runner([Stats, Counts]).fit(1, make_learn())


def test_a_module_that_is_frozen_in_evaluation_mode_is_looked_at(make_learn):
    class Freezes(Callback):
        _order = 5

        def begin_epoch(self):
            self.run.model[1].eval()

    run = Runner([Stats, Freezes])
    run.fit(1, make_learn())
    assert run.activation_stats.means.isfinite().all()


def test_without_histograms_none_are_kept(make_learn):
    run = Runner([Stats(hist=False)])
    run.fit(1, make_learn())
    assert run.activation_stats.hists.shape[-1] == 0
    assert len(run.activation_stats.means) == 4
    with pytest.raises(ValueError, match="make it with hist=True"):
        run.activation_stats.plot_hist()


def test_an_only_child_is_looked_into(make_learn):
    run = Runner([Stats])
    run.fit(1, make_learn(model=nn.Sequential(nn.Sequential(net()))))
    assert run.activation_stats.names == ["0.0.0", "0.0.1", "0.0.2"]


def test_a_model_without_children_is_looked_at_itself(make_learn):
    run = Runner([Stats])
    run.fit(1, make_learn(model=nn.Linear(4, 3)))
    assert run.activation_stats.names == ["model"]
    assert run.activation_stats.means.isfinite().all()


def test_modules_can_be_given_as_such_or_by_name(make_learn):
    model = net()
    run = Runner([Stats([model[2], "1"])])
    run.fit(1, make_learn(model=model))
    assert run.activation_stats.names == ["2", "1"]
    run = Runner([Stats("0")])
    run.fit(1, make_learn(model=model))
    assert run.activation_stats.names == ["0"]


@pytest.mark.parametrize("wrong", ["7", nn.ReLU()], ids=["name", "module"])
def test_a_module_of_another_model_is_an_error(make_learn, wrong):
    with pytest.raises(ValueError, match="ActivationStats needs modules of the model.*There are: 0, 1, 2, 3"):
        Runner([Stats([wrong])]).fit(1, make_learn())


class Odd(nn.Module):
    """A child that returns a tuple, one that is not called each time, one that is called twice."""

    def __init__(self):
        super().__init__()
        self.lstm, self.rare, self.act, self.out = nn.LSTM(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x, _ = self.lstm(x)
        if self.calls % 2:
            x = self.rare(x)
        return self.out(self.act(self.act(x) + 1))


def test_odd_children_are_counted_once_and_absent_ones_are_nan(make_learn):
    run = Runner([Stats(["lstm", "rare", "act", "out"])])
    run.fit(1, make_learn(n_train=4, model=Odd()))
    means = run.activation_stats.means
    assert means[:, 0].isfinite().all(), "of a tuple its first tensor counts"
    assert means[:, 1].isnan().tolist() == [False, True, False, True]
    assert (means[:, 2] >= 1).all(), "of two calls the last one counts"
    assert means[:, 3].isfinite().all()


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_hooks_go_and_statistics_stay_whatever_ends_the_fit(make_learn, error):
    class Ends(Callback):
        def after_loss(self):
            if self.run.n_iter == 2:
                raise error

    learn = make_learn()
    run = Runner([Stats, Ends])
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(1, learn)
    else:
        run.fit(1, learn)
    assert hooks_on(learn.model) == 0
    stats = run.activation_stats
    assert len(stats.means) == len(stats.steps) >= 2


def test_a_module_that_replaces_another_is_looked_at_from_the_next_epoch_on(make_learn):
    class Replaces(Callback):
        def begin_batch(self):
            if self.run.in_train and self.run.n_iter == 1:
                self.run.model[2] = nn.Threshold(10.0, 3.0)

    learn = make_learn(n_train=3)
    run = Runner([Stats(), Replaces])
    run.fit(2, learn)
    means = run.activation_stats.means[:, 2]
    assert means.isnan().tolist() == [False, True, True, False, False, False]
    assert (means[3:] == 3).all()
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_a_second_fit_begins_anew(make_learn):
    run, learn = Runner([Stats]), make_learn(n_train=2)
    run.fit(2, learn)
    run.fit(1, learn)
    assert len(run.activation_stats.means) == len(run.activation_stats.steps) == 2


def test_it_waits_for_the_device_once_an_epoch(make_learn, monkeypatch):
    waits = []
    for name in ("item", "tolist", "cpu", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _r=real: (waits.append(1), _r(self, *a))[1])
    Runner([Stats]).fit(2, make_learn(n_valid=0))
    assert len(waits) == 2


def test_a_copy_of_the_model_within_a_fit_works_on_its_own(make_learn):
    class Copy(Callback):
        def after_pred(self):
            if self.run.in_train:
                pickle.loads(pickle.dumps(copy.deepcopy(self.run.model)))(self.run.xb * math.nan)

    run = Runner([Stats, Copy])
    run.fit(1, make_learn())
    assert run.activation_stats.means.isfinite().all()


def test_by_default_every_fourth_step_is_looked_at(make_learn):
    run = Runner([ActivationStats])
    run.fit(2, make_learn(n_train=5))
    assert run.activation_stats.steps == [0, 4, 8]


def test_dead_channels_are_those_near_zero_throughout_the_batch(make_learn):
    class Kills(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :2], x[:, 2:] * 0], dim=1)[:, :, None].expand(-1, -1, 5)

    model = nn.Sequential(nn.Linear(4, 8), Kills(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3))
    run = Runner([Stats(["0", "1"], near=1e-12)])
    run.fit(1, make_learn(model=model))
    assert run.activation_stats.dead[:, 1].tolist() == [0.75] * 4
    assert run.activation_stats.near_zero[:, 1].tolist() == [0.75] * 4
    assert run.activation_stats.dead[:, 0].tolist() == [0] * 4


def test_outputs_with_nan_show_and_the_rest_goes_on(make_learn):
    class Spoils(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            bad = torch.zeros_like(x)
            bad[0, 0] = math.nan if self.calls > 4 else 0.0  # two of them in training
            return x + bad

    run = Runner([Stats])
    run.fit(1, make_learn(n_train=6, model=nn.Sequential(nn.Linear(4, 3), Spoils(), nn.Tanh())))
    stats = run.activation_stats
    for values in (stats.means, stats.stds, stats.near_zero, stats.dead):
        assert values[:4].isfinite().all()
        assert values[4:, 1].isnan().all()
    assert stats.hists.isfinite().all()
    assert stats.hists[4, 1].sum() == 17
    stats.plot()
    stats.plot_hist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_other_precision_are_looked_at_in_float32_at_least(make_learn, dtype):
    class Casts(nn.Module):
        def forward(self, x):
            return {"ids": torch.ones(3, dtype=torch.int64), "out": (x * 3e4).clamp(-6e4, 6e4).to(dtype)}

    class Takes(nn.Module):
        def forward(self, found):
            return found["out"].float()

    run = Runner([Stats(["1"])])
    learn = make_learn(model=nn.Sequential(nn.Linear(4, 3), Casts(), Takes()))
    run.fit(1, learn)
    assert (run.activation_stats.stds > 1000).all()
    assert run.activation_stats.stds.isfinite().all(), "half precision overflowed"


def test_hooks_that_are_on_go_when_the_next_one_fails(make_learn, monkeypatch):
    learn = make_learn(model=net())

    def fails(hook):
        raise RuntimeError("no hooks here")

    learn.model[2].register_forward_hook = fails
    with pytest.raises(RuntimeError, match="no hooks here"):
        Runner([Stats]).fit(1, learn)
    assert hooks_on(learn.model) == 0


def test_every_so_many_steps_and_no_more_rows_than_wanted(make_learn):
    lines = []
    run = Runner([ActivationStats(every=2, keep=3, hist=False)])
    run.logger = lines.append
    run.fit(2, make_learn(n_train=5))
    assert run.activation_stats.steps == [0, 8]
    assert len(run.activation_stats.means) == 2
    assert "ActivationStats has 3 rows" in lines[0]


def test_a_layer_that_is_called_again_in_the_backward_pass_counts_once(make_learn):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    class Counts(Callback):
        def after_backward(self):
            assert not self.run.activation_stats._looking

    run = Runner([Stats(["0.inner"]), Counts])
    run.fit(1, make_learn(model=nn.Sequential(Again(), nn.Tanh())))
    assert run.activation_stats.means.isfinite().all()


@pytest.mark.parametrize(
    "kwargs", [{"every": 0}, {"bins": 0}, {"keep": 1}, {"value_range": (1, 1)}, {"value_range": (0, math.inf)}]
)
def test_wrong_arguments_are_errors(kwargs):
    with pytest.raises(ValueError, match="must be a whole number|must be two finite numbers, the smaller first; got"):
        Stats(**kwargs)


@pytest.mark.cuda
def test_on_a_gpu_it_never_waits_within_an_epoch(make_learn):
    class NoWaiting(Callback):
        _order = -9

        def begin_batch(self):
            torch.cuda.set_sync_debug_mode("error")

        def after_epoch(self):
            torch.cuda.set_sync_debug_mode("default")

        after_fit = after_epoch

    learn = make_learn(n_valid=0)
    learn.model.cuda()
    learn.data.train_dl = [(x.cuda(), y.cuda()) for x, y in learn.data.train_dl]
    run = Runner([NoWaiting, Stats])
    run.fit(1, learn)
    assert run.activation_stats.means.isfinite().all()
