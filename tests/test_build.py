"""get_runner and get_learn_run: what they put together, and what they refuse."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from fastrbn.build import get_learn_run, get_runner, param_groups
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
    """Sixteen images whose class is where the bright half is."""
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
def test_a_rate_that_is_none_is_refused(data, lr):
    with pytest.raises(ValueError, match="lr must be a finite number, 0 or more; got"):
        get_runner(nn.Linear(2, 2), data, lr=lr)


def test_wrong_arguments_say_what_came(data):
    with pytest.raises(TypeError, match="model must be an nn.Module; got .* of type list"):
        get_runner([nn.Linear(2, 2)], data)
    with pytest.raises(TypeError, match="opt_func must be callable; got 'sgd'"):
        get_runner(nn.Linear(2, 2), data, opt_func="sgd")
    with pytest.raises(TypeError, match="loss_func must be callable; got None"):
        get_runner(nn.Linear(2, 2), data, loss_func=None)
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


def test_norms_biases_and_vectors_are_left_out_of_weight_decay():
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


def test_a_runner_takes_weight_decay_in_groups():
    data = SimpleNamespace(train_dl=[], valid_dl=None)
    learn, _ = get_runner(nn.Linear(3, 2), data, weight_decay=0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in learn.opt.param_groups] == [(1, 0.1), (1, 0.0)]
    learn, _ = get_runner(nn.Linear(3, 2), data, opt_func=optim.AdamW)
    assert [(len(g["params"]), g["weight_decay"]) for g in learn.opt.param_groups] == [(2, 0.01)]


@pytest.mark.parametrize("wd", [-1, "0.1", True, float("nan")])
def test_a_weight_decay_that_is_none_is_told(wd):
    with pytest.raises(ValueError, match="weight_decay is a finite number, 0 or more; got"):
        param_groups(nn.Linear(3, 2), wd)
    with pytest.raises(TypeError, match="param_groups needs an nn.Module; got"):
        param_groups([torch.zeros(3)])


def test_a_loss_class_in_place_of_an_instance_is_an_error_at_once(data):
    with pytest.raises(TypeError, match=r"got the class CrossEntropyLoss: write loss_func=CrossEntropyLoss\(\)"):
        get_runner(nn.Linear(4, 3), data, loss_func=nn.CrossEntropyLoss)
