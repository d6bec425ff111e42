"""`watch`: diagnosis and checkpoints in a loop that is not the package's."""

import copy
import itertools
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrbn.callbacks.diagnose.nonfinite.halt as halt
from fastrbn import (
    ActivationStats,
    Callback,
    CancelTrainException,
    Checkpoint,
    CheckpointError,
    GradientClip,
    GraphMonitor,
    HaltOnNaN,
    NonFiniteError,
    ParamMagnitudes,
    Recorder,
    RunningBatchNorm,
    RunningBatchNorm1d,
    convert_batchnorm,
    watch,
)
from fastrbn.callbacks.diagnose.nonfinite.state import Flags


def make(bad=None, seed=0):
    """Model and optimiser; `bad`: the number of the training batch whose output goes NaN in module '2'."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), RunningBatchNorm1d(8), Spoil(bad), nn.Dropout(0.5), nn.Linear(8, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Spoil(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x):
        self.calls += self.training
        return x * math.nan if self.training and self.calls - 1 == self.at else x.relu()


def batches(n=5):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(n)]


def state(model, opt):
    return [*model.state_dict().values(), *(s["momentum_buffer"] for s in opt.state.values())]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def plain(model, opt, n=5):
    """The loop that the others are compared with."""
    for xb, yb in batches(n):
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
    return state(model, opt)


def hooks(model, opt):
    tables = [t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]
    return [h for t in (*tables, opt._optimizer_step_pre_hooks, opt._optimizer_step_post_hooks) for h in t]


def test_the_loop_trains_as_without_it_and_everyone_has_seen_each_step():
    want = plain(*make())
    model, opt = make()
    cbs = HaltOnNaN(), ParamMagnitudes(), GraphMonitor(), Recorder(), ActivationStats(every=1)
    with watch(model, opt, *cbs) as w:
        for xb, yb in batches():
            w.step(F.cross_entropy(model(xb), yb))
    assert same(state(model, opt), want)
    assert (w.stop_reason, w.n_iter, w.halt_on_nan.report, w.graph_monitor.report) == (None, 5, None, None)
    assert w.param_magnitudes.steps == w.activation_stats.steps == w.graph_monitor.steps == list(range(5))
    assert len(w.recorder.losses) == 5 and len(set(w.graph_monitor.counts)) == 1
    assert hooks(model, opt) == []


def test_a_loop_that_does_not_know_of_it_halts_with_the_place_and_the_last_finite_state(capsys):
    want = plain(*make(), n=3)
    model, opt = make(bad=3)
    with watch(model, opt) as w:
        plain(model, opt)
    assert w.stop_reason == "NaN or Inf in the forward pass of step 3, first in module '2'"
    assert w.stop_reason in capsys.readouterr().out
    assert same(state(model, opt), want) and hooks(model, opt) == []
    assert w.halt_on_nan.report.epoch is None and len(w.halt_on_nan.report.lrs) == 4


@pytest.mark.parametrize("shown", [True, False])
def test_a_loss_that_is_nan_is_named_by_its_value_or_by_its_gradient(shown):
    model, opt = make()
    with watch(model, opt, HaltOnNaN(raise_error=True)) as w, pytest.raises(NonFiniteError) as e:
        for i, (xb, yb) in enumerate(batches()):
            loss = F.cross_entropy(model(xb), yb) * (math.nan if i == 2 else 1)
            (w.look(loss) if shown else loss).backward()
            opt.step()
            opt.zero_grad()
    report = e.value.report
    assert (report.step, report.phase, report.where) == (2, "forward" if shown else "backward", "loss")
    assert ("was not shown" in report.note) is not shown and len(report.losses) == (3 if shown else 0)
    assert all(t.isfinite().all() for t in state(model, opt))


class Steep(torch.autograd.Function):
    """x, whose gradient overflows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1e38 * 1e38


@pytest.fixture
def late(monkeypatch):
    """What CUDA does, with its delay."""
    monkeypatch.setattr(halt, "late_device", lambda model: torch.device("cpu"))
    monkeypatch.setattr(Flags, "LAG", 3)


def test_a_gradient_that_overflows_inside_the_model_is_found_by_the_gradients_of_its_outputs(late):
    model, opt = make()
    model[2].forward = Steep.apply
    with watch(model, opt) as w:
        plain(model, opt)
    report = w.halt_on_nan.report
    assert (report.step, report.phase, report.where, report.note) == (0, "backward", "1.weight", "")


def test_a_step_that_overflows_is_taken_back():
    want = plain(*make(), n=2)
    model, opt = make()
    with watch(model, opt) as w:
        for i, (xb, yb) in enumerate(batches()):
            F.cross_entropy(model(xb), yb).backward()
            if i == 2:
                opt.param_groups[0]["lr"] = math.inf
            opt.step()
            opt.zero_grad()
    assert (w.halt_on_nan.report.phase, w.halt_on_nan.report.note) == ("step", "the learning rate is not finite")
    assert same(state(model, opt), want)


def test_validation_and_other_passes_without_gradients_are_no_batches():
    model, opt = make()
    with watch(model, opt, HaltOnNaN(), ParamMagnitudes()) as w:
        for xb, yb in batches(3):
            w.step(F.cross_entropy(model(xb), yb))
            with torch.no_grad():
                model(xb * math.nan)
            model.eval()
            model(xb * math.nan)
            model.train()
    assert (w.n_iter, w.stop_reason, w.param_magnitudes.steps) == (3, None, [0, 1, 2])


def test_accumulated_batches_count_and_the_one_with_the_fault_is_named():
    model, opt = make(bad=3)
    with watch(model, opt, HaltOnNaN(), ParamMagnitudes()) as w:
        for i, (xb, yb) in enumerate(batches(6)):
            w.look(F.cross_entropy(model(xb), yb)).backward()
            if i % 2:
                opt.step()
                opt.zero_grad()
    assert w.halt_on_nan.report.step == 3 and w.param_magnitudes.steps == [1]


def test_several_calls_of_the_model_before_one_loss_are_one_batch():
    model, opt = make(bad=3)
    with watch(model, opt) as w:
        for xb, yb in batches():
            F.cross_entropy(model(xb) + model(input=xb.flip(0)), yb).backward()
            opt.step()
            opt.zero_grad()
    report = w.halt_on_nan.report
    assert (report.step, report.where) == (1, "2") and len(w.xb) == 2


def test_a_penalty_on_a_gradient_and_its_loss_are_one_batch():
    model, opt = make(bad=4)
    with watch(model, opt) as w:
        for xb, _ in batches():
            xb.requires_grad_()
            (slope,) = torch.autograd.grad(model(xb).sum(), xb, create_graph=True)
            (model(xb).mean() + slope.square().mean()).backward()
            opt.step()
            opt.zero_grad()
    report = w.halt_on_nan.report
    assert (report.step, report.where, report.note) == (2, "2", "")


def test_of_many_calls_before_one_loss_the_first_are_gone_through_again():
    model, opt = make()
    model[2].forward = Steep.apply
    with watch(model, opt) as w:
        sum(model(batches()[0][0]).square().mean() for _ in range(12)).backward()
        opt.step()
    report = w.halt_on_nan.report
    assert (report.step, report.phase, report.where, report.note) == (0, "backward", "1.weight", "")


def test_a_batch_that_the_loop_skips_needs_no_loss_and_a_loss_shown_twice_counts_once():
    model, opt = make()
    with watch(model, opt, GraphMonitor(), Recorder()) as w:
        for i, (xb, yb) in enumerate(batches()):
            loss = w.look(F.cross_entropy(model(xb), yb)) if i != 2 else model(xb).sum().backward()
            if loss is not None:
                w.step(loss)
            opt.zero_grad()
    assert w.n_iter == 5 and len(w.recorder.losses) == 4 and w.graph_monitor.steps == [0, 1, 3, 4]


def test_a_scaler_that_skips_a_step_is_no_reason_to_halt():
    model, opt = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with watch(model, opt, HaltOnNaN(), ParamMagnitudes()) as w:
        for i, (xb, yb) in enumerate(batches()):
            scaler.scale(F.cross_entropy(model(xb), yb) * (1e38 if i == 2 else 1)).backward()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert (w.stop_reason, w.n_iter, w.param_magnitudes.steps) == (None, 5, [0, 1, 3, 4])


@pytest.mark.parametrize("named", [True, False])
def test_closures_are_looked_into(named):
    model, opt = make(bad=3)
    with watch(model, opt, HaltOnNaN(), ParamMagnitudes()) as w:
        opt.register_step_pre_hook(lambda *args: None)  # a hook of the user's own, after ours
        for xb, yb in batches():

            def closure(xb=xb, yb=yb):
                opt.zero_grad()
                loss = F.cross_entropy(model(xb), yb)
                loss.backward()
                return loss

            opt.step(closure=closure) if named else opt.step(closure)
    report = w.halt_on_nan.report
    assert (report.step, report.where, len(report.losses)) == (3, "2", 4) and w.param_magnitudes.steps == [0, 1, 2]
    with pytest.raises(RuntimeError, match="GraphMonitor must be shown the loss"), watch(model, opt, GraphMonitor()):
        opt.step(closure)  # its graph is gone after the backward pass


def test_autocast_is_on_when_the_batch_goes_through_the_model_again():
    model, opt = make()
    seen = []
    model[2].forward = lambda x: seen.append(x.dtype) or x.bfloat16()
    model[4].register_forward_hook(lambda m, args, out: out * (math.nan if len(seen) > 2 else 1))
    with watch(model, opt) as w:
        for xb, yb in batches():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(xb), yb)
            w.step(loss)
    assert w.halt_on_nan.report.where == "4" and len(set(seen)) == 1 and len(seen) == 4


def test_a_model_in_evaluation_mode_is_watched_by_its_steps():
    model, opt = make()
    model.eval()
    with watch(model, opt) as w:
        for i, (xb, yb) in enumerate(batches()):
            (F.cross_entropy(model(xb), yb) * (math.nan if i == 2 else 1)).backward()
            opt.step()
            opt.zero_grad()
    report = w.halt_on_nan.report
    assert (report.step, report.phase) == (2, "backward") and "not seen in training mode" in report.note


def test_a_graph_that_reaches_back_is_named():
    model, opt = make()
    kept = model.kept = []
    with watch(model, opt, GraphMonitor()) as w:
        w.logger = lambda line: None
        for xb, yb in batches():
            loss = F.cross_entropy(model(xb), yb)
            kept.append(loss)
            w.step(loss)
    assert w.graph_monitor.report.holders[0].name == "kept" and "epoch" not in w.graph_monitor.report.sentence


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("at", ["output", "loss"])
def test_a_device_that_answers_late_gives_the_same_report_and_state(shown, at, late):
    want = plain(*make(), n=3)
    model, opt = make(bad=3 if at == "output" else None)
    with watch(model, opt) as w:
        for i, (xb, yb) in enumerate(batches(9)):
            loss = F.cross_entropy(model(xb), yb) * (math.nan if at == "loss" and i == 3 else 1)
            (w.look(loss) if shown else loss).backward()
            opt.step()
            opt.zero_grad()
    report = w.halt_on_nan.report
    phase = "backward" if at == "loss" and not shown else "forward"
    assert (report.step, report.phase, report.where) == (3, phase, "2" if at == "output" else "loss")
    assert i > 3 and same(state(model, opt), want)


def test_what_needs_the_loss_says_how_to_show_it():
    model, opt = make()
    with pytest.raises(RuntimeError, match=r"Recorder, GraphMonitor must be shown the loss.*w.look\(loss\).backward"):
        with watch(model, opt, GraphMonitor(), Recorder()):
            plain(model, opt)
    assert hooks(model, opt) == []


def test_an_error_of_the_loop_passes_through_and_history_stays():
    model, opt = make()
    with pytest.raises(ZeroDivisionError), watch(model, opt, ParamMagnitudes(), Recorder()) as w:
        for i, (xb, yb) in enumerate(batches()):
            w.step(F.cross_entropy(model(xb), yb))
            1 / (2 - i)
    assert w.stop_reason == "ZeroDivisionError in step 2: division by zero"
    assert w.param_magnitudes.steps == [0, 1, 2] and len(w.recorder.losses) == 3 and hooks(model, opt) == []


def test_a_callback_of_the_users_own_can_end_the_block_and_the_loop_cannot_go_on():
    class Enough(Callback):
        def after_step(self):
            if self.n_iter == 1:
                raise CancelTrainException("enough")

    model, opt = make()
    tried = 0
    with watch(model, opt, Enough) as w:
        w.logger = lambda line: None
        while True:
            try:
                plain(model, opt)
            except CancelTrainException:
                tried += 1
                if tried == 3:
                    raise
    assert (w.stop_reason, w.n_iter) == ("enough", 1)


def test_two_models_with_an_optimiser_each_are_watched_side_by_side():
    torch.manual_seed(0)
    make_net = lambda a, b: nn.Sequential(nn.Linear(a, b))
    gen, critic = make_net(2, 4), make_net(4, 1)
    opt_gen, opt_critic = (torch.optim.Adam(m.parameters()) for m in (gen, critic))
    with watch(gen, opt_gen, HaltOnNaN()) as one, watch(critic, opt_critic) as two:
        for i in range(4):
            fake = gen(torch.randn(8, 2))
            opt_critic.zero_grad()
            F.softplus(critic(fake.detach()) - critic(torch.randn(8, 4))).mean().backward()
            opt_critic.step()
            opt_gen.zero_grad()
            (critic(fake).mean() * (math.nan if i == 2 else 1)).backward()
            opt_gen.step()
    assert (one.halt_on_nan.report.step, two.halt_on_nan.report) == (2, None)
    assert two.stop_reason.startswith("CancelTrainException in step 5: NaN or Inf")


def loop(folder, first, last, interrupt=None):
    """Train from the checkpoint in `folder`, if there is one, up to step `last`."""
    model, opt = make(seed=first)
    sched = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    with watch(model, opt, Checkpoint(folder, every=2), Recorder(), sched=sched) as w:
        before = torch.get_rng_state()
        start = w.resume()
        assert torch.equal(torch.get_rng_state(), before)
        for xb, yb in itertools.islice(batches(last), start, None):
            w.step(F.cross_entropy(model(xb), yb) + torch.rand(()))  # the loop's own random numbers
            sched.step()
            if interrupt == w.n_iter:
                raise KeyboardInterrupt
    return start, w, [*state(model, opt), opt.param_groups[0]["lr"] * torch.ones(1)]


def test_a_resumed_loop_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    zero, w, want = loop(tmp_path / "whole", 0, 7)
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "cut", 0, 7, interrupt=4)
    start, again, got = loop(tmp_path / "cut", 1, 7)  # another initialisation, and other random numbers before
    assert (zero, start) == (0, 4) and same(got, want)
    assert again.recorder.losses == w.recorder.losses and again.n_iter == 7


def test_a_fault_in_the_first_resumed_step_leaves_the_resumed_state(tmp_path):
    model, opt = make()
    with watch(model, opt, Checkpoint(tmp_path)):
        want = plain(model, opt)
    model, opt = make(bad=5, seed=1)
    with watch(model, opt) as w:
        with pytest.warns(UserWarning, match="no state for these callbacks, which start fresh: halt_on_nan"):
            assert w.resume(tmp_path) == 5
        model[2].calls = 5
        plain(model, opt)
    assert w.halt_on_nan.report.step == 5 and same(state(model, opt), want)


def test_ctrl_c_saves_after_the_batch(tmp_path):
    model, opt = make()
    with pytest.raises(KeyboardInterrupt), watch(model, opt, Checkpoint(tmp_path)) as w:
        for i, (xb, yb) in enumerate(batches()):
            if i == 2:
                os.kill(os.getpid(), signal.SIGINT)
            w.step(F.cross_entropy(model(xb), yb))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0001-step-2.pt"]
    assert w.stop_reason.startswith("interrupted (Ctrl-C)")


def test_resume_says_what_is_wrong(tmp_path):
    model, opt = make()
    with pytest.raises(ValueError, match=r"there is no Checkpoint: give it to watch"), watch(model, opt) as w:
        w.resume()
    with pytest.raises(CheckpointError, match="does not exist"), watch(model, opt) as w:
        w.resume(tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="before the first batch"), watch(model, opt) as w:
        w.step(F.cross_entropy(model(batches()[0][0]), batches()[0][1]))
        w.resume(tmp_path)
    loop(tmp_path / "ck", 0, 2)
    with pytest.raises(ValueError, match="has the states of sched, and watch was given scaler"):
        with watch(model, opt, Recorder, scaler=torch.amp.GradScaler("cpu")) as w:
            w.resume(tmp_path / "ck")
    with pytest.raises(FileExistsError), watch(model, opt, Checkpoint(tmp_path / "ck")) as w:
        plain(model, opt)
    assert hooks(model, opt) == []


def test_a_copy_of_the_model_made_in_the_block_is_not_watched():
    model, opt = make()
    with watch(model, opt) as w:
        plain(model, opt, 2)
        model(batches()[0][0])  # without a backward pass
        other = copy.deepcopy(model)
        other(torch.full((2, 4), math.nan)).sum().backward()
    assert (w.n_iter, w.stop_reason) == (2, None)


def test_misuse_is_an_error_that_says_what_to_do(tmp_path):
    model, opt = make()
    with pytest.raises(TypeError, match="GradientClip needs this package's loop: use Runner"):
        watch(model, opt, GradientClip(1.0))
    with pytest.raises(TypeError, match=r"watch\(model, opt, …\).*got SGD and Sequential"):
        watch(opt, model)
    with pytest.raises(TypeError, match="state_dict and load_state_dict; steps is a int"):
        watch(model, opt, steps=3)
    w = watch(model, opt)
    with pytest.raises(RuntimeError, match="inside the block only"):
        w.step(torch.zeros((), requires_grad=True))
    with pytest.raises(TypeError, match=r"one number.*got of shape \(6,\)"), w:
        w.step(F.cross_entropy(model(batches()[0][0]), batches()[0][1], reduction="none"))
    with pytest.raises(RuntimeError, match="to train with this package's, use Runner"):
        w.fit(1)
    for forgets in (lambda: None, lambda: F.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()):
        with pytest.warns(UserWarning, match=r"no step of the optimiser: take it.*opt.step\(\) or w.step\(loss\)"):
            with watch(model, opt):
                forgets()
    with pytest.raises(ValueError, match="SGD has none of the parameters of Linear: give watch"):
        watch(nn.Linear(2, 2), opt)
    assert hooks(model, opt) == []
    with pytest.raises(RuntimeError, match="in use already"), w, w:
        pass


def test_a_timm_model_with_the_layer_trains_and_is_watched():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = convert_batchnorm(timm.create_model("resnet10t", num_classes=3))
    assert any(isinstance(m, RunningBatchNorm) for m in model.modules())
    with watch(model, torch.optim.SGD(model.parameters(), lr=0.01), HaltOnNaN(), ParamMagnitudes()) as w:
        for _ in range(2):
            w.step(F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])))
    assert (w.stop_reason, w.n_iter) == (None, 2)
