"""get_runner, get_learn_run, param_groups, fit_one_cycle, seed_everything and LabelSmoothingCrossEntropy."""

import copy
import math
import random
import subprocess
import sys
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR

from fastrbn.build import (
    LabelSmoothingCrossEntropy,
    fit_one_cycle,
    get_learn_run,
    get_runner,
    param_groups,
    seed_everything,
)
from fastrbn.callbacks import Checkpoint, ParamScheduler, Recorder, TorchScheduler, sched_lin
from fastrbn.learn import Callback, Learner, Runner, TrainEvalCallback
from fastrbn.models import conv_bn, conv_rbn
from fastrbn.norm import RunningBatchNorm


class Losses(Callback):
    def __init__(self, scale=1.0):
        self.scale, self.values = scale, []

    def after_batch(self):
        if self.in_train:
            self.values.append(self.loss.item() * self.scale)


@pytest.fixture
def data():
    """Sixteen images; the class says which half is bright."""
    x, y = torch.randn(16, 1, 8, 8) * 0.1, torch.arange(16) % 2
    x[y == 0, :, :4] += 1
    x[y == 1, :, 4:] += 1
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)]
    return SimpleNamespace(train_dl=batches, valid_dl=batches[:1], c=2)


def test_get_learn_run_trains_the_course_net(data):
    learn, run = get_learn_run([8, 16], data, 0.3, conv_rbn, cbs=[Losses])
    run.fit(6, learn)
    losses = run.losses.values
    assert len(losses) == 24
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_get_runner_defaults_to_plain_sgd_at_the_courses_rate_and_cross_entropy(data):
    learn, run = get_runner(nn.Linear(2, 2), data)
    assert type(learn) is Learner and type(run) is Runner
    assert type(learn.opt) is optim.SGD
    assert learn.opt.param_groups[0]["lr"] == 0.6 and learn.opt.param_groups[0]["momentum"] == 0
    assert learn.loss_func is F.cross_entropy and learn.data is data
    assert [type(cb) for cb in run.cbs] == [TrainEvalCallback]


class Bag(nn.EmbeddingBag):
    def forward(self, x):
        return super().forward(x.long())


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.w.dtype) @ self.w).real


class Subclassed(nn.Parameter):
    """Stands for parameters that are more than tensors, such as FSDP's."""


def with_gaps():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.rand(2, 4)[:, ::2])
    return model


def subclassed():
    model = nn.Linear(2, 2)
    model.bias = Subclassed(model.bias.detach())
    return model


@pytest.mark.parametrize(
    "make, dtype, fused",
    [
        (lambda: nn.Linear(2, 2), torch.float32, True),
        (lambda: nn.Linear(2, 2).double(), torch.float64, True),
        (lambda: nn.LazyLinear(2), torch.float32, False),
        (with_gaps, torch.float32, False),
        (lambda: nn.Linear(2, 2).bfloat16(), torch.bfloat16, False),
        (lambda: nn.Linear(2, 2).half(), torch.float16, False),
        (lambda: Bag(3, 2), torch.float32, True),
        (lambda: nn.Sequential(Bag(3, 2, sparse=True), nn.Linear(2, 2)), torch.float32, False),
        (Complex, torch.float32, False),
        (subclassed, torch.float32, False),
    ],
)
def test_the_default_optimiser_is_fused_where_that_trains_the_model_as_plain_sgd_does(make, dtype, fused):
    x, y = torch.ones(4, 2, dtype=dtype), torch.tensor([0, 0, 0, 1])
    model = make()
    learn, run = get_runner(model, SimpleNamespace(train_dl=[(x, y)], valid_dl=None), lr=0.1)
    assert bool(learn.opt.param_groups[0]["fused"]) == fused
    model(x)  # makes what is lazy
    before = [p.detach().clone() for p in model.parameters()]
    other = copy.deepcopy(model)
    run.fit(3, learn)
    Runner().fit(3, Learner(other, optim.SGD(other.parameters(), lr=0.1), F.cross_entropy, learn.data))
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q)
    assert not any(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    "cbs",
    [Losses, Losses(), [Losses], (partial(Losses, scale=1.0),), [Losses()]],
    ids=["class", "instance", "list", "partial", "list of instances"],
)
def test_cbs_takes_callables_and_instances_one_or_many(data, cbs):
    _, run = get_runner(nn.Linear(2, 2), data, cbs=cbs)
    assert type(run.losses) is Losses


def test_the_optimiser_function_gets_all_parameters_and_the_rate(data):
    opt_func = partial(optim.Adam, betas=(0.8, 0.9))
    learn, _ = get_learn_run([8], data, 0.01, conv_bn, opt_func=opt_func)
    (group,) = learn.opt.param_groups
    assert type(learn.opt) is optim.Adam and (group["lr"], group["betas"]) == (0.01, (0.8, 0.9))
    assert [id(p) for p in group["params"]] == [id(p) for p in learn.model.parameters()]


def test_keywords_reach_the_layers_and_uniform_the_initialisation(data):
    learn, _ = get_learn_run([32], data, 0.1, conv_rbn, uniform=True, recipe="course", leak=0.2)
    conv, relu, norm = learn.model[0]
    assert relu.leak == 0.2 and "course" in repr(norm)
    std = (2 / (1 + 0.1**2) / 25) ** 0.5
    assert 1.5 * std < conv.weight.abs().max().item() <= 3**0.5 * std + 1e-6


@pytest.mark.parametrize("missing", ["train_dl", "valid_dl"])
def test_data_without_a_loader_is_named(data, missing):
    delattr(data, missing)
    with pytest.raises(TypeError, match=f"got SimpleNamespace without {missing}"):
        get_learn_run([8], data, 0.1, conv_rbn)
    with pytest.raises(TypeError, match=f"got SimpleNamespace without {missing}"):
        get_runner(nn.Linear(2, 2), data)


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), "0.1", None, True], ids=str)
def test_an_invalid_learning_rate_is_refused(data, lr):
    with pytest.raises(ValueError, match="lr must be a finite number, 0 or more; got"):
        get_runner(nn.Linear(2, 2), data, lr=lr)


def test_wrong_arguments_of_the_builders_are_named(data):
    with pytest.raises(TypeError, match="model must be an nn.Module; got .* of type list"):
        get_runner([nn.Linear(2, 2)], data)
    with pytest.raises(TypeError, match="opt_func must be callable; got 'sgd'"):
        get_runner(nn.Linear(2, 2), data, opt_func="sgd")
    with pytest.raises(TypeError, match="loss_func must be callable; got 'mse'"):
        get_runner(nn.Linear(2, 2), data, loss_func="mse")
    with pytest.raises(ValueError, match="whole number, 1 or more; got -8"):
        get_learn_run([-8], data, 0.1, conv_rbn)
    with pytest.raises(TypeError, match="layer must be a function"):
        get_learn_run([8], data, 0.1, "conv_rbn")
    with pytest.raises(TypeError, match="derive from fastrbn.Callback; got"):
        get_runner(nn.Linear(2, 2), data, cbs=[dict])


# --- weight decay


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.rbn = nn.Conv2d(1, 4, 3), RunningBatchNorm(4)
        self.norm, self.own = nn.LayerNorm((4, 6, 6)), nn.Parameter(torch.zeros(4))
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.attention = nn.MultiheadAttention(4, 2)


def test_norms_biases_and_vectors_get_no_weight_decay():
    net = Net()
    names = {p: n for n, p in net.named_parameters()}
    decay, rest = param_groups(net, 0.05)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert [names[p] for p in decay["params"]] == [
        "conv.weight",
        "a.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    assert sorted(map(names.get, (*decay["params"], *rest["params"]))) == sorted(names.values())
    optim.AdamW([decay, rest], lr=0.1)


def test_an_empty_group_is_left_out():
    (group,) = param_groups(nn.Linear(3, 2, bias=False))
    assert group["weight_decay"] == 0.01
    (group,) = param_groups(nn.BatchNorm1d(3))
    assert group["weight_decay"] == 0.0


def two_parts():
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(4, 2, bias=False), more=nn.Linear(2, 2)))


def test_groups_have_rates_by_pattern_and_the_first_match_counts():
    model = two_parts()
    groups = param_groups(model, 0.1, lr={"body.1": 1e-3, "body": 1e-4, "*head.w*": 0.5})
    names = {p: name for name, p in model.named_parameters()}
    assert [(g["name"], g.get("lr"), g["weight_decay"], [names[p] for p in g["params"]]) for g in groups] == [
        ("body.1", 1e-3, 0.0, ["body.1.weight", "body.1.bias"]),
        ("body", 1e-4, 0.1, ["body.0.weight"]),
        ("body", 1e-4, 0.0, ["body.0.bias"]),
        ("*head.w*", 0.5, 0.1, ["head.weight"]),
        ("rest", None, 0.1, ["more.weight"]),
        ("rest", None, 0.0, ["more.bias"]),
    ]
    assert [g["lr"] for g in optim.AdamW(groups, lr=0.2).param_groups] == [1e-3, 1e-4, 1e-4, 0.5, 0.2, 0.2]


def test_a_shared_parameter_has_the_rate_of_any_of_its_names():
    model = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), last=nn.Linear(2, 2)))
    model.last.weight = model.first.weight
    groups = param_groups(model, lr={"last": 0.1})
    assert [(g["name"], len(g["params"])) for g in groups] == [("last", 1), ("last", 1), ("rest", 1)]


@pytest.mark.parametrize(
    ("error", "lr", "words"),
    [
        (ValueError, {"boddy": 0.1}, "param_groups: 'boddy' matches no name .* Did you mean 'body'?"),
        (ValueError, {"zzz.*": 0.1}, "'zzz.*' matches no name .* At the top it has body, head, more."),
        (ValueError, {"body": 0.1, "body.0": 0.2}, "all that 'body.0' matches has a rate from an earlier pattern"),
        (ValueError, {"body": 0}, r"lr\['body'\] must be a finite number above 0; got 0: .* freeze\(model, 'body'\)"),
        (TypeError, 0.1, "lr gives rates by names, such as .*; got 0.1"),
    ],
    ids=str,
)
def test_wrong_rates_of_groups_are_refused(error, lr, words):
    with pytest.raises(error, match=words):
        param_groups(two_parts(), lr=lr)


def test_a_runner_takes_weight_decay_in_groups():
    data = SimpleNamespace(train_dl=[], valid_dl=None)
    learn, _ = get_runner(nn.Linear(3, 2), data, weight_decay=0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in learn.opt.param_groups] == [(1, 0.1), (1, 0.0)]
    learn, _ = get_runner(nn.Linear(3, 2), data, opt_func=optim.AdamW)
    assert [(len(g["params"]), g["weight_decay"]) for g in learn.opt.param_groups] == [(2, 0.01)]


@pytest.mark.parametrize("wd", [-1, "0.1", True, float("nan")])
def test_an_invalid_weight_decay_is_refused(wd):
    with pytest.raises(ValueError, match="weight_decay must be a finite number, 0 or more; got"):
        param_groups(nn.Linear(3, 2), wd)
    with pytest.raises(TypeError, match="param_groups needs an nn.Module; got"):
        param_groups([torch.zeros(3)])


def test_a_loss_class_instead_of_an_instance_is_refused(data):
    with pytest.raises(TypeError, match=r"got the class CrossEntropyLoss: write loss_func=CrossEntropyLoss\(\)"):
        get_runner(nn.Linear(4, 3), data, loss_func=nn.CrossEntropyLoss)


# --- one cycle


def make_learn(opt=None, n=10):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(n)]
    data = SimpleNamespace(train_dl=batches, valid_dl=None)
    return Learner(model, (opt or momentum_sgd)(model.parameters()), F.cross_entropy, data)


def momentum_sgd(params):
    return optim.SGD(params, lr=0.05, momentum=0.9)


class Moms(Callback):
    def begin_fit(self):
        self.seen = []

    def after_loss(self):
        group = self.run.opt.param_groups[0]
        self.seen.append(group["betas"][0] if "betas" in group else group["momentum"])


def test_the_rate_follows_pytorchs_one_cycle():
    """PyTorch's cosine ends at the last step and ours one step later, so they agree up to one step in 2000."""
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
        (momentum_sgd, True),
        (lambda p: optim.SGD(p, lr=0.1), False),
        (lambda p: optim.AdamW(p, lr=0.01), True),
    ],
    ids=["momentum", "none", "adamw"],
)
def test_momentum_is_scheduled_if_there_is_one_and_everything_is_restored(opt, moves):
    learn = make_learn(opt)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups])
    moms = Moms() if "momentum" in before[0] or "betas" in before[0] else None
    run = Runner([Recorder(), *([moms] if moms else [])])
    fit_one_cycle(run, learn, 1, 0.4, moms=(0.9, 0.8, 0.85))
    assert run.recorder.lrs[0][0] == pytest.approx(0.4 / 25)
    assert (max(moms.seen) > 0.85) == moves and (len(set(moms.seen)) > 1) == moves
    assert [{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups] == before
    assert not hasattr(run, "param_scheduler") and len(run.cbs) == 3


def test_each_param_group_has_its_own_rate():
    learn = make_learn(lambda p: optim.SGD([{"params": [q]} for q in p], lr=0.1))
    run = Runner([Recorder()])
    fit_one_cycle(run, learn, 1, [0.1, 0.4], div=10, pct_start=0.5)
    assert [lrs[0] for lrs in run.recorder.lrs] == pytest.approx([0.01, 0.04])
    assert [max(lrs) for lrs in run.recorder.lrs] == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize(("lr_max", "highest"), [(None, 0.2), (0.2, 0.2), (1.0, 1.0)])
def test_groups_of_different_rates_keep_their_ratio(lr_max, highest):
    learn = make_learn(lambda p: optim.SGD([{"params": [q], "lr": 0.1 * i} for i, q in enumerate(p, 1)], lr=1.0))
    run = Runner([Recorder()])
    fit_one_cycle(run, learn, 1, lr_max, div=10, pct_start=0.5)
    assert [lrs[0] for lrs in run.recorder.lrs] == pytest.approx([highest / 20, highest / 10])
    assert [max(lrs) for lrs in run.recorder.lrs] == pytest.approx([highest / 2, highest])
    assert [g["lr"] for g in learn.opt.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_fit_restores_rates_and_callbacks(error):
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


def test_one_cycle_resumes_from_a_checkpoint(tmp_path):
    whole = make_learn()
    fit_one_cycle(Runner([Checkpoint(tmp_path / "c", every=1, keep=None)]), whole, 2, 0.4)
    (file,) = (tmp_path / "c").glob("*-step-13.pt")
    again = make_learn()
    fit_one_cycle(Runner([Checkpoint(tmp_path / "other")]), again, 2, 0.4, resume=file)
    assert torch.equal(whole.model.weight, again.model.weight)


def test_a_rate_held_in_a_tensor_stays_in_that_tensor():
    learn = make_learn(lambda p: optim.SGD(p, lr=torch.tensor(0.05), momentum=0.9))
    lr = learn.opt.param_groups[0]["lr"]
    fit_one_cycle(Runner(), learn, 1, 0.4)
    assert learn.opt.param_groups[0]["lr"] is lr and lr == 0.05


def test_a_rate_that_is_already_scheduled_is_refused():
    with pytest.raises(ValueError, match="schedules 'lr', but the run has a ParamScheduler for it: leave one"):
        fit_one_cycle(Runner([ParamScheduler("lr", sched_lin(0.1, 0.0))]), make_learn(), 1, 0.4)
    with pytest.raises(ValueError, match="the run has a TorchScheduler for it"):
        fit_one_cycle(Runner([TorchScheduler(partial(StepLR, step_size=1))]), make_learn(), 1, 0.4)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"lr_max": 0}, "lr_max must be a finite number above 0; got 0"),
        ({"lr_max": [0.1, 0.2]}, "lr_max must be one rate, or one for each of the optimiser's 1 param groups; got 2"),
        ({"pct_start": 1}, "pct_start must be a share of the steps, above 0 and below 1; got 1"),
        ({"div": 0.5}, "div divides lr_max and must be finite, 1 or more; got 0.5"),
        ({"div_final": math.inf}, "div_final divides lr_max and must be finite, 1 or more; got inf"),
        ({"moms": (0.9, 0.8)}, r"moms must be three numbers .*; got \(0.9, 0.8\)"),
        ({"moms": 0.9}, "moms must be three numbers .*; got 0.9"),
    ],
    ids=str,
)
def test_wrong_arguments_of_one_cycle_are_named_and_nothing_is_trained(kwargs, words):
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


def test_deterministic_mode_is_switched_on_only_on_request():
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
def test_an_invalid_seed_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\*\*32 - 1; got"):
        seed_everything(seed)


def test_deterministic_is_true_or_false():
    with pytest.raises(ValueError, match="deterministic must be True or False; got 'yes'"):
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


def test_label_smoothing_has_a_repr_and_names_wrong_arguments():
    assert repr(LabelSmoothingCrossEntropy()) == "LabelSmoothingCrossEntropy(eps=0.1, reduction='mean')"
    with pytest.raises(ValueError, match="eps must be a share of the target, 0 to 1; got 2"):
        LabelSmoothingCrossEntropy(2)
    with pytest.raises(ValueError, match="reduction must be mean, sum or none; got 'avg'"):
        LabelSmoothingCrossEntropy(reduction="avg")


def test_an_optimiser_without_param_groups_is_refused_in_one_sentence():
    learn = make_learn()
    learn.opt = type("Own", (), {"param_groups": [list(learn.model.parameters())], "step": print, "zero_grad": print})()
    with pytest.raises(TypeError, match="^fit_one_cycle: .*Own lacks param_groups, a list of dictionaries"):
        fit_one_cycle(Runner(), learn, 1, 0.1)


def test_a_cycle_over_a_loader_without_length_warns():
    learn = make_learn()
    pairs = learn.data.train_dl
    learn.data.train_dl = type("NoLength", (), {"__iter__": lambda self: iter(pairs)})()
    run = Runner(Recorder())
    with pytest.warns(
        UserWarning, match="the training loader has no length.* give the loader or its data set a __len__"
    ):
        fit_one_cycle(run, learn, 1, 0.1)
    assert run.recorder.lrs[0] == pytest.approx([0.004] * 10)
    fit_one_cycle(run, learn, None, 0.1, max_steps=20)  # without a warning, and as if the length were known
    rates, learn.data.train_dl = run.recorder.lrs[0], pairs
    fit_one_cycle(run, learn, 2, 0.1)
    assert rates == pytest.approx(run.recorder.lrs[0]) and len(rates) == 20
