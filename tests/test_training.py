"""fit_one_cycle, seed_everything, LabelSmoothingCrossEntropy."""

import copy
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from fastrbn.build import LabelSmoothingCrossEntropy, fit_one_cycle, seed_everything
from fastrbn.callbacks import Checkpoint, ParamScheduler, Recorder, sched_lin
from fastrbn.learn import Callback, Learner, Runner


def make_learn(opt=None, n=10):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(n)]
    data = SimpleNamespace(train_dl=batches, valid_dl=None)
    return Learner(model, (opt or partial_sgd)(model.parameters()), F.cross_entropy, data)


def partial_sgd(params):
    return optim.SGD(params, lr=0.05, momentum=0.9)


class Moms(Callback):
    def begin_fit(self):
        self.seen = []

    def after_loss(self):
        group = self.run.opt.param_groups[0]
        self.seen.append(group["betas"][0] if "betas" in group else group["momentum"])


# --- one cycle


def test_the_rate_is_that_of_pytorchs_one_cycle():
    """Their cosine takes the last step at the end of the way, ours begins it there: the same up to one step in 2000."""
    learn, twin = make_learn(n=1000), make_learn(n=1)
    run = Runner([Recorder(), Moms()])
    fit_one_cycle(run, learn, 2, 0.4)
    theirs = optim.lr_scheduler.OneCycleLR(
        twin.opt, max_lr=0.4, total_steps=2000, pct_start=0.3, div_factor=25, final_div_factor=1e4 / 25
    )
    rates, moms = [], []
    for _ in range(2000):
        rates.append(twin.opt.param_groups[0]["lr"])
        moms.append(twin.opt.param_groups[0]["momentum"])
        twin.opt.step()
        if len(rates) < 2000:
            theirs.step()
    assert run.recorder.lrs[0] == pytest.approx(rates, abs=0.4 * 4e-3)
    assert run.moms.seen == pytest.approx(moms, abs=2e-3)
    assert max(run.recorder.lrs[0]) == pytest.approx(0.4) and min(run.moms.seen) == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("opt", "moves"),
    [
        (partial_sgd, True),
        (lambda p: optim.SGD(p, lr=0.1), False),
        (lambda p: optim.AdamW(p, lr=0.01), True),
    ],
    ids=["momentum", "none", "adamw"],
)
def test_momentum_moves_where_there_is_one_and_everything_is_put_back(opt, moves):
    learn = make_learn(opt)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups])
    moms = Moms() if "momentum" in before[0] or "betas" in before[0] else None
    run = Runner([Recorder(), *([moms] if moms else [])])
    fit_one_cycle(run, learn, 1, 0.4, moms=(0.9, 0.8, 0.85))
    assert run.recorder.lrs[0][0] == pytest.approx(0.4 / 25)
    assert (max(moms.seen) > 0.85) == moves and (len(set(moms.seen)) > 1) == moves
    assert [{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups] == before
    assert not hasattr(run, "param_scheduler") and len(run.cbs) == 3


def test_each_param_group_has_its_rate():
    learn = make_learn(lambda p: optim.SGD([{"params": [q]} for q in p], lr=0.1))
    run = Runner([Recorder()])
    fit_one_cycle(run, learn, 1, [0.1, 0.4], div=10, pct_start=0.5)
    assert [lrs[0] for lrs in run.recorder.lrs] == pytest.approx([0.01, 0.04])
    assert [max(lrs) for lrs in run.recorder.lrs] == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_a_fit_that_is_cut_has_its_own_rates_and_callbacks_back(error):
    class Ends(Callback):
        def after_loss(self):
            if self.run.n_iter == 3:
                raise error

    learn = make_learn()
    run = Runner([Ends()])
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            fit_one_cycle(run, learn, 1, 0.4)
    else:
        fit_one_cycle(run, learn, 1, 0.4)
    assert (learn.opt.param_groups[0]["lr"], learn.opt.param_groups[0]["momentum"]) == (0.05, 0.9)
    assert [type(cb).__name__ for cb in run.cbs] == ["TrainEvalCallback", "Ends"]


def test_it_goes_on_from_a_checkpoint(tmp_path):
    whole = make_learn()
    fit_one_cycle(Runner([Checkpoint(tmp_path / "c", every=1, keep=None)]), whole, 2, 0.4)
    (file,) = (tmp_path / "c").glob("*-step-13.pt")
    again = make_learn()
    fit_one_cycle(Runner([Checkpoint(tmp_path / "other")]), again, 2, 0.4, resume=file)
    assert torch.equal(whole.model.weight, again.model.weight)


def test_a_rate_in_a_tensor_stays_in_it():
    learn = make_learn(lambda p: optim.SGD(p, lr=torch.tensor(0.05), momentum=0.9))
    lr = learn.opt.param_groups[0]["lr"]
    fit_one_cycle(Runner(), learn, 1, 0.4)
    assert learn.opt.param_groups[0]["lr"] is lr and lr == 0.05


def test_a_rate_that_is_scheduled_already_is_told():
    with pytest.raises(ValueError, match="schedules 'lr', and the run has a ParamScheduler for it: leave one"):
        fit_one_cycle(Runner([ParamScheduler("lr", sched_lin(0.1, 0.0))]), make_learn(), 1, 0.4)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"lr_max": 0}, "lr_max is a finite number above 0; got 0"),
        ({"lr_max": [0.1, 0.2]}, "lr_max is one rate, or one for each of the optimiser's 1 param groups; got 2"),
        ({"pct_start": 1}, "pct_start is a share of the steps, above 0 and below 1; got 1"),
        ({"div": 0.5}, "div divides lr_max, a finite number of 1 or more; got 0.5"),
        ({"div_final": math.inf}, "div_final divides lr_max, a finite number of 1 or more; got inf"),
        ({"moms": (0.9, 0.8)}, r"moms is three numbers, .*; got \(0.9, 0.8\)"),
        ({"moms": 0.9}, "moms is three numbers, .*; got 0.9"),
    ],
    ids=str,
)
def test_wrong_arguments_are_told_and_nothing_is_trained(kwargs, words):
    learn, run = make_learn(), Runner()
    before = learn.model.weight.clone()
    with pytest.raises(ValueError, match=words):
        fit_one_cycle(run, learn, 1, **{"lr_max": 0.4, **kwargs})
    assert torch.equal(learn.model.weight, before) and len(run.cbs) == 1


# --- seeds


def test_a_seed_repeats_every_generator():
    def draw():
        return [random.random(), np.random.rand(), torch.rand(1).item()]

    seed_everything(3)
    first = draw()
    seed_everything(4)
    assert not set(first) & set(draw())
    seed_everything(3)
    assert draw() == first


def test_deterministic_is_switched_on_when_asked_for_only():
    code = """if True:
        import os, torch, fastrbn
        fastrbn.seed_everything(1)
        print(torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        fastrbn.seed_everything(1, deterministic=True)
        print(torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False None", "True :4096:8"]


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "1", True, None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match=r"seed is a whole number from 0 to 2\*\*32 - 1; got"):
        seed_everything(seed)


def test_deterministic_is_true_or_false():
    with pytest.raises(ValueError, match="deterministic is True or False; got 'yes'"):
        seed_everything(1, deterministic="yes")


# --- label smoothing


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
def test_label_smoothing_is_cross_entropy_against_softened_targets(eps, reduction):
    pred, yb = torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 4, (5,))
    target = (1 - eps) * F.one_hot(yb, 4).double() + eps / 4
    losses = -(target * pred.log_softmax(1)).sum(1)
    expected = losses if reduction == "none" else getattr(losses, reduction)()
    assert torch.allclose(LabelSmoothingCrossEntropy(eps, reduction)(pred, yb), expected, rtol=1e-12)


def test_label_smoothing_reads_well_and_tells_wrong_arguments():
    assert repr(LabelSmoothingCrossEntropy()) == "LabelSmoothingCrossEntropy(eps=0.1, reduction='mean')"
    with pytest.raises(ValueError, match="eps is a share of the target, 0 to 1; got 2"):
        LabelSmoothingCrossEntropy(2)
    with pytest.raises(ValueError, match="reduction is mean, sum or none; got 'avg'"):
        LabelSmoothingCrossEntropy(reduction="avg")


def test_an_optimiser_without_pytorchs_groups_is_an_error_in_one_sentence():
    learn = make_learn()
    learn.opt = type("Own", (), {"param_groups": [list(learn.model.parameters())], "step": print, "zero_grad": print})()
    with pytest.raises(TypeError, match="^fit_one_cycle: .*Own lacks param_groups, a list of dictionaries"):
        fit_one_cycle(Runner(), learn, 1, 0.1)


def test_a_cycle_over_a_loader_without_length_is_told():
    learn = make_learn()
    pairs = learn.data.train_dl
    learn.data.train_dl = type("NoLength", (), {"__iter__": lambda self: iter(pairs)})()
    run = Runner(Recorder())
    with pytest.warns(UserWarning, match="the training loader has no length.* give the loader or its data set a __len__"):
        fit_one_cycle(run, learn, 1, 0.1)
    assert run.recorder.lrs[0] == pytest.approx([0.004] * 10)
