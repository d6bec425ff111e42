"""HaltOnNaN: where the first NaN or Inf came up, and what the model holds afterwards."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn import RunningBatchNorm
from fastrbn.callbacks import HaltOnNaN, NonFiniteError, NonFiniteReport, ParamScheduler
from fastrbn.callbacks.step.schedule import set_hyper_parameter
from fastrbn.learn import Callback, CancelBatchException, CancelTrainException, Runner

BADS = [math.nan, math.inf, -math.inf]


class Spoils(nn.Module):
    """Passes its input on; in training call number `at` one element of the output is `bad`."""

    def __init__(self, at, bad=math.nan, in_eval=False):
        super().__init__()
        self.at, self.bad, self.in_eval, self.calls = at, bad, in_eval, 0

    def forward(self, x):
        if self.training == self.in_eval:
            return x
        self.calls += 1
        if self.calls - 1 != self.at:
            return x
        spoilt = x.clone()
        spoilt.view(-1)[1] = self.bad
        return spoilt


def net(*middle):
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), *middle, nn.ReLU()),
        nn.Linear(8, 3),
    )


def state_after(make_learn, model, steps, **kwargs):
    """The state of the same fit, stopped after so many steps, without HaltOnNaN."""

    class Stops(Callback):
        def begin_batch(self):
            if self.run.in_train and self.run.n_iter == steps:
                raise CancelTrainException

    learn = make_learn(model=model, **kwargs)
    Runner([Stops]).fit(5, learn)
    return copy.deepcopy(learn.model.state_dict())


def check_state(model, expected):
    now = model.state_dict()
    assert list(now) == list(expected)
    for name, value in expected.items():
        assert torch.equal(now[name], value), name
        assert now[name].isfinite().all()


def halted(make_learn, model, *cbs, epochs=3, every=1, **kwargs):
    """(report, run, learn) of a fit that HaltOnNaN ended."""
    halt = HaltOnNaN(every=every)
    learn = make_learn(model=model, **kwargs)
    run = Runner([halt, *cbs])
    run.fit(epochs, learn)
    assert halt.report is not None, "it did not stop"
    assert run.stop_reason == halt.report.sentence
    assert all(p.grad is None for p in learn.model.parameters())
    assert not any(m._forward_hooks for m in learn.model.modules())
    return halt.report, run, learn


# --- where


@pytest.mark.parametrize("bad", BADS)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_modules_output_is_found_and_the_model_is_as_the_batch_found_it(make_learn, at, bad):
    torch.manual_seed(1)
    model = net(Spoils(at, bad))
    clean = copy.deepcopy(model)
    report, _, learn = halted(make_learn, model)
    assert (report.phase, report.where) == ("forward", "1.2")
    assert (report.step, report.epoch, report.batch) == (at, at // 4, at % 4)
    assert report.in_train
    expected = state_after(make_learn, clean, at)
    check_state(learn.model, expected)


def test_an_output_that_the_loss_does_not_show_is_found_too(make_learn):
    class Squashes(nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    torch.manual_seed(1)
    report, _, _ = halted(make_learn, net(Spoils(2, math.inf), Squashes()))
    assert (report.step, report.phase, report.where) == (2, "forward", "1.2")


def test_a_fault_between_modules_is_that_of_the_module_around(make_learn):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = nn.Linear(4, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) / (0 if self.calls == 2 else 1)

    assert halted(make_learn, Around())[0].where == "model"
    assert halted(make_learn, nn.Sequential(Around()))[0].where == "0"


def test_outputs_in_tuples_and_dictionaries_are_looked_at(make_learn):
    class Two(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.inner, self.wrap, self.calls = nn.Linear(4, 3), wrap, 0

        def forward(self, x):
            self.calls += 1
            return self.wrap(self.inner(x), torch.full((2,), math.nan if self.calls == 3 else 1.0))

    for wrap, first in ((lambda a, b: (a, [b]), lambda p: p[0]), (lambda a, b: {"a": a, "b": b}, lambda p: p["a"])):
        report, _, _ = halted(make_learn, Two(wrap), loss_func=lambda p, y, first=first: F.cross_entropy(first(p), y))
        assert (report.step, report.phase, report.where) == (2, "forward", "model")


@pytest.mark.parametrize("bad", BADS)
@pytest.mark.parametrize("at", [0, 3])
def test_bad_data_is_the_input_and_running_statistics_are_saved_from_it(make_learn, at, bad):
    torch.manual_seed(1)
    model = net()
    clean = copy.deepcopy(model)
    learn = make_learn(model=model)
    x, y = learn.data.train_dl[at]
    learn.data.train_dl[at] = (x.clone().index_fill_(0, torch.tensor([2]), bad), y)
    halt = HaltOnNaN()
    Runner([halt]).fit(2, learn)
    assert (halt.report.step, halt.report.phase, halt.report.where) == (at, "forward", "input")
    check_state(learn.model, state_after(make_learn, clean, at))


@pytest.mark.parametrize("loss", ["targets", "function"])
def test_a_bad_target_or_loss_function_is_the_loss(make_learn, loss):
    learn = make_learn(loss_func=lambda p, y: F.mse_loss(p, y) if loss == "targets" else p.sum() * math.inf)
    learn.data.train_dl = [(x, F.one_hot(y, 3).float()) for x, y in learn.data.train_dl]
    if loss == "targets":
        learn.data.train_dl[1] = (learn.data.train_dl[1][0], torch.full((6, 3), math.nan))
    halt = HaltOnNaN()
    Runner([halt]).fit(1, learn)
    assert (halt.report.phase, halt.report.where) == ("forward", "loss")
    assert halt.report.step == (1 if loss == "targets" else 0)


def test_a_loss_that_a_callback_spoils_is_the_loss(make_learn):
    class SpoilsLoss(Callback):
        def after_loss(self):
            if self.run.n_iter == 2:
                self.run.loss = self.run.loss * math.nan

    report, _, _ = halted(make_learn, net(), SpoilsLoss())
    assert (report.step, report.phase, report.where) == (2, "forward", "loss")


def test_a_weight_that_is_bad_from_the_start_is_its_module(make_learn):
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    report, _, _ = halted(make_learn, model)
    assert (report.step, report.phase, report.where) == (0, "forward", "2")


def test_a_bad_buffer_is_its_module(make_learn):
    model = net()
    model[1][1].running_var[0] = math.inf  # training does not use it, validation does
    learn, halt = make_learn(model=model), HaltOnNaN()
    learn.data.train_dl = []
    model[1][1].running_mean[0] = math.nan
    Runner([halt]).fit(1, learn)
    assert (halt.report.phase, halt.report.where, halt.report.in_train) == ("forward", "1.1", False)


@pytest.mark.parametrize("name", ["0.0.bias", "1.1.weight", "2.weight"])
def test_a_single_bad_gradient_is_named(make_learn, name):
    class SpoilsOne(Callback):
        def after_backward(self):
            if self.run.n_iter == 3:
                self.run.model.get_parameter(name).grad.view(-1)[0] = math.inf

    report, _, _ = halted(make_learn, net(), SpoilsOne())
    assert (report.step, report.phase, report.where) == (3, "backward", name)


class RateAt(Callback):
    _order = 2

    def __init__(self, at, rate):
        self.at, self.rate = at, rate

    def begin_batch(self):
        if self.run.in_train:
            for group in self.run.opt.param_groups:
                group["lr"] = self.rate if self.run.n_iter == self.at else 0.1


def test_a_parameter_that_a_callback_spoils_is_named(make_learn):
    class SpoilsParameter(Callback):
        def after_step(self):
            if self.run.n_iter == 1:
                with torch.no_grad():
                    self.run.model[1][0].bias[0] = math.nan

    report, _, _ = halted(make_learn, net(), SpoilsParameter())
    assert (report.step, report.phase, report.where) == (1, "step", "1.0.bias")


class Nested(nn.Module):
    """A model that is no container: its own output is one of a module as well."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), RunningBatchNorm(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("make_model", [lambda: Nested().layers, Nested], ids=["container", "module"])
@pytest.mark.parametrize(
    ("name", "event", "phase"),
    [
        ("running_mean", "begin_batch", "forward"),
        ("running_var", "begin_batch", "forward"),
        ("running_mean", "after_pred", "forward"),
        ("running_grad", "begin_batch", "backward"),
        ("running_grad", "after_pred", "backward"),
        ("running_grad", "after_step", "forward"),
    ],
)
def test_a_buffer_that_a_callback_spoils_is_named(make_learn, make_model, name, event, phase):
    class SpoilsBuffer(Callback):
        def spoil(self):
            if self.run.in_train and self.run.n_iter == 2:
                dict(self.run.model.named_buffers())[where].view(-1)[0] = math.nan

    setattr(SpoilsBuffer, event, SpoilsBuffer.spoil)
    torch.manual_seed(1)
    model = make_model()
    where = next(n for n, _ in model.named_buffers() if n.endswith(name))
    clean = copy.deepcopy(model)
    report, _, learn = halted(make_learn, model, SpoilsBuffer())
    assert (report.step, report.phase, report.where) == (2, phase, where)
    assert f"first in buffer '{where}'" in report.sentence
    check_state(learn.model, state_after(make_learn, clean, 2))


def test_of_a_bad_gradient_that_comes_from_elsewhere_a_norms_buffers_are_not_named(make_learn):
    class Spoils(Callback):
        def after_pred(self):
            if self.run.in_train and self.run.n_iter == 2:
                self.run.pred.register_hook(lambda g: g * math.nan)  # which a replay does not show

    torch.manual_seed(1)
    report, _, _ = halted(make_learn, Nested(), Spoils())
    assert (report.phase, report.where) == ("backward", "layers.3.weight")


def test_a_module_that_fails_in_validation_is_named(make_learn):
    report, _, _ = halted(make_learn, net(Spoils(0, in_eval=True)))
    assert (report.where, report.in_train, report.batch) == ("1.2", False, 0)


# --- how often


@pytest.mark.parametrize(
    ("at", "found", "in_train", "kept"),
    # looks at steps 0, 3, 6, and at the first batch of validation, which comes after steps 3 and 7
    [(3, 3, True, 1), (4, 6, True, 4), (5, 6, True, 4), (6, 6, True, 4), (7, 8, False, 7)],
)
def test_every_third_step_finds_it_at_the_next_look_and_keeps_the_last_one_seen(make_learn, at, found, in_train, kept):
    torch.manual_seed(1)
    model = net()
    clean = copy.deepcopy(model)
    report, _, learn = halted(make_learn, model, RateAt(at, math.inf), every=3)
    assert (report.step, report.in_train) == (found, in_train)
    check_state(learn.model, state_after(make_learn, clean, kept))


@pytest.mark.parametrize("n_valid", [0, 2])
def test_what_goes_wrong_after_the_last_look_is_found_at_the_end_of_the_epoch(make_learn, n_valid):
    report, _, _ = halted(make_learn, net(), RateAt(3, math.inf), every=2, n_valid=n_valid, epochs=1)
    assert (report.step, report.epoch) == (4, 0)
    assert report.phase == ("forward" if n_valid else "step")


@pytest.mark.parametrize("every", [1, 2, 100])
def test_a_healthy_fit_is_left_alone_bit_for_bit(make_learn, every):
    states = []
    for cbs in ([], [HaltOnNaN(every=every)]):
        torch.manual_seed(1)
        learn = make_learn(model=nn.Sequential(net(), nn.Dropout(0.3)))
        run = Runner(cbs)
        run.fit(3, learn)
        assert run.stop_reason is None
        states.append((learn.model.state_dict(), torch.get_rng_state()))
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name
    assert torch.equal(states[0][1], states[1][1]), "it drew random numbers"
    assert cbs[0].report is None


def test_very_large_numbers_that_are_finite_are_no_reason_to_stop(make_learn):
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 1e30))
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(x) + 0 * self.weight

    halt = HaltOnNaN()
    Runner([halt]).fit(1, make_learn(model=Huge()))
    assert halt.report is None


def test_half_precision_outputs_are_summed_in_float32(make_learn):
    class Half(nn.Module):
        def forward(self, x):
            return (x * 0 + 60000.0).half().float()

    class HalfOut(nn.Module):
        def forward(self, x):
            return (x * 0 + 60000.0).half()

    model = nn.Sequential(HalfOut(), Half(), nn.Linear(4, 3))
    halt = HaltOnNaN()
    Runner([halt]).fit(1, make_learn(model=model, opt=lambda p: torch.optim.SGD(p, lr=0.0)))
    assert halt.report is None


def test_a_mask_of_infinities_in_a_buffer_is_let_be(make_learn):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -math.inf]))
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return torch.softmax(self.inner(x) + self.mask, 1) + 1e-6

    halt = HaltOnNaN()
    Runner([halt]).fit(2, make_learn(model=Masked(), loss_func=lambda p, y: F.nll_loss(p.log(), y)))
    assert halt.report is None


def test_buffers_that_a_module_replaces_are_followed(make_learn):
    class Replaces(nn.Module):
        def __init__(self, at):
            super().__init__()
            self.register_buffer("sums", torch.zeros(4))
            self.at, self.calls = at, 0

        def forward(self, x):
            self.calls += 1
            self.sums = self.sums + x.detach().sum(0) * (math.nan if self.calls - 1 == self.at else 1)
            return x

    torch.manual_seed(1)
    model = nn.Sequential(Replaces(2), nn.Linear(4, 3))
    clean = copy.deepcopy(model)
    report, _, learn = halted(make_learn, model)
    assert (report.step, report.phase, report.where) == (2, "forward", "0.sums")
    check_state(learn.model, state_after(make_learn, clean, 2))


def test_a_cancelled_batch_is_no_trouble(make_learn):
    class Skips(Callback):
        def after_pred(self):
            raise CancelBatchException

    halt = HaltOnNaN()
    Runner([halt, Skips]).fit(2, make_learn())
    assert halt.report is None


# --- what it says


def test_the_report_tells_the_last_losses_and_rates(make_learn):
    class Losses(Callback):
        def begin_fit(self):
            self.seen = []

        def after_loss(self):
            if self.run.in_train:
                self.seen.append(self.run.loss.item())

    report, run, learn = halted(
        make_learn, net(Spoils(14)), Losses(), ParamScheduler("lr", lambda pos: 0.1 + pos), n_valid=0, epochs=4
    )
    assert report.losses[:-1] == run.losses.seen[:-1]
    assert len(report.losses) == len(report.lrs) == 15
    assert math.isnan(report.losses[-1])
    assert report.lrs == pytest.approx([0.1 + i / 16 for i in range(15)])
    assert report.magnitudes == pytest.approx({n: p.abs().max().item() for n, p in learn.model.named_parameters()})


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("event", ["begin_batch", "after_backward"])
def test_a_rate_that_is_not_finite_does_not_stay(make_learn, event, kind):
    class Rates(Callback):
        def set(self):
            if self.run.in_train:
                lr = math.inf if self.run.n_iter == 3 else 0.1 + self.run.n_iter / 100
                set_hyper_parameter(self.run.opt.param_groups[1], "lr", lr)

    def groups(params):
        first, *rest = params
        return torch.optim.SGD([{"params": [first], "lr": kind(0.5)}, {"params": rest, "lr": kind(0.1)}])

    rates = Rates()
    vars(rates)[event] = rates.set
    report, _, learn = halted(make_learn, net(), rates, opt=groups)
    rate = learn.opt.param_groups[1]["lr"]
    assert float(learn.opt.param_groups[0]["lr"]) == 0.5 and math.isinf(report.lrs[-1]) == (event != "after_backward")
    assert float(rate) == pytest.approx(0.12) and type(rate) is type(kind(0.0))
    assert report.lrs[-2] == 0.5


def test_of_several_groups_the_largest_rate_is_told(make_learn):
    def groups(params):
        first, *rest = params
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1)

    assert halted(make_learn, net(Spoils(1)), opt=groups)[0].lrs == [0.5, 0.5]


def make_report(**kwargs):
    values = {
        "step": 7,
        "epoch": 1,
        "batch": 3,
        "phase": "forward",
        "where": "2.0",
        "losses": [0.5, math.nan],
        "lrs": [0.1, 0.2],
        "magnitudes": {"a": 1.0, "b": 30.0},
    }
    return NonFiniteReport(**{**values, **kwargs})


def test_the_report_reads_well():
    assert str(make_report()).splitlines() == [
        "NaN or Inf in the forward pass of step 7 (epoch 1, batch 3), first in module '2.0'",
        "  last losses: 0.5 nan",
        "  last rates:  0.1 0.2",
        "  largest parameters in the model as it was kept: b 30, a 1",
    ]


@pytest.mark.parametrize(
    ("phase", "where", "words"),
    [
        ("forward", "input", "in the forward pass of step 7 (epoch 1, batch 3), first in the input"),
        ("forward", "loss", "first in the loss"),
        ("backward", "2.weight", "in the backward pass of step 7 (epoch 1, batch 3), first in parameter '2.weight'"),
        ("step", "2.weight", "in the optimiser's step of step 7 (epoch 1, batch 3), first in parameter '2.weight'"),
    ],
)
def test_each_phase_has_its_sentence(phase, where, words):
    assert words in make_report(phase=phase, where=where).sentence


def test_with_raise_error_the_error_carries_the_report_and_the_model_is_restored(make_learn):
    torch.manual_seed(1)
    model = net(Spoils(2))
    clean = copy.deepcopy(model)
    halt, learn = HaltOnNaN(raise_error=True), make_learn(model=model)
    run = Runner([halt])
    with pytest.raises(NonFiniteError, match="first in module '1.2'") as caught:
        run.fit(1, learn)
    assert caught.value.report is halt.report
    assert run.stop_reason.startswith("NonFiniteError in HaltOnNaN.after_loss")
    check_state(learn.model, state_after(make_learn, clean, 2))
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.report.where == "1.2"


def test_a_new_fit_forgets_the_old_report(make_learn):
    halt, learn = HaltOnNaN(), make_learn(model=net(Spoils(2)))
    run = Runner([halt])
    run.fit(1, learn)
    assert halt.report is not None
    run.fit(1, learn)
    assert halt.report is None
    assert run.stop_reason is None


def test_it_is_reachable_by_a_name_one_can_type():
    halt = HaltOnNaN()
    assert Runner([halt]).halt_on_nan is halt


def test_a_copy_of_the_model_within_a_fit_works_on_its_own(make_learn):
    class Copies(Callback):
        def after_pred(self):
            if self.run.n_iter == 1:
                model = pickle.loads(pickle.dumps(copy.deepcopy(self.run.model)))
                self.run.kept = model(self.run.xb * math.nan)

    halt = HaltOnNaN()
    run = Runner([halt, Copies])
    run.fit(1, make_learn())
    assert halt.report is None
    assert run.kept.isnan().any()


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_must_be_a_whole_number(every):
    with pytest.raises(ValueError, match="every must be a whole number"):
        HaltOnNaN(every=every)
