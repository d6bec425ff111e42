"""CUDAGraph: replayed steps equal the plain ones, and what a replay would leave out is refused with its reason.

On the CPU, `Tape` stands for CUDA's graphs: it repeats operators with the tensors and numbers that it has seen, without
Python. What only a device shows is tested there.
"""

import copy
import math
import random
import re
from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tape import Tape
from torch import nn, optim
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastrbn import freeze
from fastrbn.build import fit_one_cycle
from fastrbn.callbacks import (
    EMA,
    ActivationStats,
    AvgStatsCallback,
    Checkpoint,
    Closure,
    CompileCallback,
    CudaCallback,
    CUDAGraph,
    Freeze,
    GradientAccumulation,
    GradientClip,
    GraphMonitor,
    HaltOnNaN,
    MixedPrecision,
    MixUp,
    ParamMagnitudes,
    ParamScheduler,
    Recorder,
    accuracy,
    sched_cos,
)
from fastrbn.callbacks.step import cuda_graph
from fastrbn.learn import Callback, CancelBatchException, Learner, Runner
from fastrbn.norm import RunningBatchNorm

pytestmark = pytest.mark.usefixtures("graphs_on_cpu")

SGD = partial(optim.SGD, lr=0.1, momentum=0.9)
FUSED = partial(SGD, fused=True)
ADAM = partial(optim.AdamW, lr=0.01, fused=True)


def small_net(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    # without a bias before the norm, whose gradient is rounding alone
    return nn.Sequential(nn.Linear(4, 8, bias=False), norm(8), nn.ReLU(), nn.Linear(8, 3))


def make_learn(model=None, opt=FUSED, loss_func=F.cross_entropy, device="cpu", sizes=(6, 6, 6, 4)):
    model = (small_net() if model is None else model).to(device)
    torch.manual_seed(1)
    batches = [(torch.randn(n, 4).to(device), torch.randint(0, 3, (n,)).to(device)) for n in sizes]
    return Learner(model, opt(model.parameters()), loss_func, SimpleNamespace(train_dl=batches, valid_dl=batches[:1]))


def fit(learn, *cbs, epochs=3, says=()):
    """The run of a fit with CUDAGraph, which must print lines that match `says`, and no other."""
    run, lines = Runner([CUDAGraph(), *cbs]), []
    run.logger = lambda line: lines.append(line) if line.startswith("CUDAGraph") else None
    run.fit(epochs, learn)
    assert len(lines) == len(says), lines
    for line, pattern in zip(lines, says):
        assert re.search(pattern, line), line
    return run


def refused(why):
    return [f"^CUDAGraph: this fit goes on without CUDA graphs: .*{why}"]


def state_of(learn):
    opt = {(i, k): v for i, s in enumerate(learn.opt.state.values()) for k, v in s.items()}
    return {**learn.model.state_dict(), **opt}


def check_equal(a, b, **tolerance):
    one, other = state_of(a), state_of(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def check_as_plain(make, *cbs, graphs=2, replays=9, epochs=3, **tolerance):
    """A fit of `make()` with the callbacks that `cbs` make ends as the one without graphs; returns the run."""
    learn, plain = make(), make()
    run, other = fit(learn, *(cb() for cb in cbs), epochs=epochs), Runner([cb() for cb in cbs])
    other.logger = lambda line: None
    other.fit(epochs, plain)
    assert (run.cuda_graph.why_not, run.cuda_graph.graphs, run.cuda_graph.replays) == (None, graphs, replays)
    check_equal(learn, plain, **tolerance)
    return run, other


# three epochs of batches of 6, 6, 6 and 4 samples: one of each kind runs as usual in the first epoch


@pytest.mark.parametrize("opt", [SGD, FUSED, ADAM], ids=["SGD", "fused SGD", "AdamW"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, partial(RunningBatchNorm, backend="fused"), nn.LayerNorm])
def test_replayed_steps_equal_the_plain_ones(norm, opt):
    # a recorded SGD takes its fused form, and rates are float32
    exact = {"rtol": 0, "atol": 0} if opt is FUSED else {"rtol": 1e-5, "atol": 1e-6}
    run, other = check_as_plain(lambda: make_learn(small_net(norm), opt), Recorder, replays=10, **exact)
    torch.testing.assert_close(run.recorder.losses, other.recorder.losses, **exact)
    assert len(set(run.recorder.losses)) == 12


CALLBACKS = {
    "a schedule": [partial(ParamScheduler, "lr", sched_cos(0.2, 0.01))],
    "clipping": [partial(GradientClip, 0.1)],
    "averages": [partial(EMA, 0.9)],
    "diagnosis": [HaltOnNaN, partial(ParamMagnitudes, grads=True)],
    "bfloat16": [MixedPrecision],
    "metrics": [partial(AvgStatsCallback, accuracy)],
    "a compiler": [partial(CompileCallback, backend="eager")],
}


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be:DeprecationWarning")
@pytest.mark.parametrize("cbs", CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks_work_as_in_plain_steps(cbs):
    check_as_plain(make_learn, *cbs, replays=10, rtol=0, atol=0)


def test_the_optimisers_hooks_are_called_once_a_step():
    learn, calls = make_learn(), []
    learn.opt.register_step_post_hook(lambda *args: calls.append("after"))
    assert fit(learn).cuda_graph.replays == 10
    assert calls == ["after"] * 12


class Halving(optim.AdamW):
    """Does more than its kernels."""

    count = 0

    def step(self, closure=None):
        super().step(closure)
        self.count += 1
        if self.count % 2 == 0:
            torch._foreach_mul_([p.detach() for group in self.param_groups for p in group["params"]], 0.5)


def patched(params):
    opt = FUSED(params)
    step = opt.step

    def slower():
        opt.param_groups[0]["lr"] *= 0.9
        step()

    opt.step = slower
    return opt


def hooked(params):
    opt = FUSED(params)
    opt.register_step_pre_hook(lambda opt, args, kwargs: opt.param_groups[0].update(lr=opt.param_groups[0]["lr"] * 0.9))
    return opt


class Bare:
    """Has what the loop needs."""

    def __init__(self, params):
        self.params, self.state = list(params), {}

    @torch.no_grad()
    def step(self):
        for p in self.params:
            p -= 0.1 * p.grad

    def zero_grad(self):
        for p in self.params:
            p.grad = None


@pytest.mark.parametrize(
    "opt, why",
    [
        (partial(Halving, lr=0.01, fused=True), "this Halving has a step of its own"),
        (patched, "this SGD has a step of its own"),
        (hooked, "leave out a hook before the step"),
        (Bare, "this Bare has a step of its own"),
    ],
)
def test_what_else_an_optimiser_does_is_not_left_out(opt, why):
    learn, plain = make_learn(opt=opt), make_learn(opt=opt)
    run = fit(learn, says=[f"the optimiser's step stays outside the graphs: .*{why}"])
    Runner().fit(3, plain)
    assert run.cuda_graph.replays == 10
    check_equal(learn, plain, rtol=0, atol=0)


def test_hooks_on_all_optimisers_are_called_once_a_step():
    learn, calls = make_learn(), []
    handle = register_optimizer_step_post_hook(lambda *args: calls.append("after"))
    try:
        fit(learn, says=["leave out a hook before the step, or on all optimisers"])
    finally:
        handle.remove()
    assert calls == ["after"] * 12


def test_groups_have_rates_of_their_own_and_keep_their_numbers():
    class Rates(Callback):
        def after_batch(self):
            for group in self.run.opt.param_groups:
                assert isinstance(group["lr"], float) and not group.get("capturable")
                group["lr"] *= 0.9

    def opt(params):
        params = list(params)
        return optim.SGD([{"params": params[:2], "lr": 0.2}, {"params": params[2:]}], lr=0.1, momentum=0.9, fused=True)

    check_as_plain(lambda: make_learn(opt=opt), Rates, replays=10, rtol=0, atol=0)


def test_a_rate_in_a_tensor_is_followed():
    class Halves(Callback):
        def after_batch(self):
            self.run.opt.param_groups[0]["lr"].mul_(0.5)

    opt = lambda params: optim.SGD(params, lr=torch.tensor(0.1), fused=True)
    check_as_plain(lambda: make_learn(opt=opt), Halves, replays=10, rtol=0, atol=0)


def test_a_momentum_that_is_scheduled_is_taken_outside():
    learn, plain = make_learn(), make_learn()
    run, other = Runner([CUDAGraph()]), Runner()
    fit_one_cycle(run, learn, 3)
    fit_one_cycle(other, plain, 3)
    assert run.cuda_graph.replays == 10
    check_equal(learn, plain, rtol=0, atol=0)


def test_an_optimiser_that_cannot_be_recorded_steps_outside():
    make = lambda: make_learn(opt=partial(optim.Adam, lr=0.1))
    learn, plain = make(), make()
    run = fit(learn, says=["the optimiser's step stays outside the graphs: make Adam with fused=True"])
    assert run.cuda_graph.why_not is None and run.cuda_graph.replays == 10
    Runner().fit(3, plain)
    check_equal(learn, plain)


def test_state_that_is_replaced_is_not_missed():
    class Replaces(Callback):
        def begin_epoch(self):
            for state in self.run.opt.state.values():
                state["momentum_buffer"] = state["momentum_buffer"].clone()

    check_as_plain(make_learn, Replaces, replays=10, rtol=0, atol=0)


CHANGES = ["parameter", "buffer", "memory", "module", "mode", "attribute", "momentum", "norm", "freezing", "new"]


@pytest.mark.parametrize("opt", [SGD, ADAM], ids=["SGD", "AdamW"])
def test_state_that_is_cleared_is_made_anew(opt):
    class Clears(Callback):
        def begin_epoch(self):
            self.run.opt.state.clear()

    make = lambda: make_learn(opt=opt, sizes=(6, 6))
    learn, plain = make(), make()
    fit(learn, Clears(), says=["the optimiser's step stays outside the graphs: its state was cleared"])
    Runner([Clears()]).fit(3, plain)
    check_equal(learn, plain)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 2, 2))[0][:, -1])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "pruned", "frozen"])
def test_hooks_that_compute_weights_or_fix_statistics_are_recorded(name):
    def make():
        net = small_net()
        if name == "pruned":
            prune.l1_unstructured(net[0], "weight", 0.5)
        elif name == "frozen":
            freeze(net, "1")
        else:
            getattr(nn.utils, name)(net[0])
        return make_learn(net, sizes=(6, 6, 6, 6))

    learn, plain = make(), make()
    run = fit(learn)
    Runner().fit(3, plain)
    assert run.cuda_graph.replays > 0
    check_equal(learn, plain, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["model", "loss"])
def test_modules_outside_the_tree_are_watched(place):
    """Such as a teacher in a list, whose parameters should not be the model's."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.teacher = small_net(), {"teachers": [small_net()]}

        def forward(self, x):
            return self.net(x) + self.teacher["teachers"][0](x).detach()

    class Loss:
        def __init__(self):
            self.teacher = small_net()

        def __call__(self, pred, target):
            return F.cross_entropy(pred, target) + self.teacher(pred @ torch.ones(3, 4)).square().mean()

    class Moves(Callback):
        def begin_epoch(self):
            for p in teacher(self.run.learn).parameters():
                p.data = p.data * 0.5

    teacher = lambda learn: learn.model.teacher["teachers"][0] if place == "model" else learn.loss_func.teacher
    make = lambda: make_learn(Net()) if place == "model" else make_learn(loss_func=Loss())
    learn, plain = make(), make()
    assert fit(learn, Moves()).cuda_graph.replays > 0
    Runner([Moves()]).fit(3, plain)
    check_equal(learn, plain, rtol=0, atol=0)
    for one, other in zip(teacher(learn).buffers(), teacher(plain).buffers()):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gradient", "accumulation", "global"])
def test_hooks_on_parameters_or_all_modules_are_not_left_out(kind):
    def halve(p):
        p.grad.mul_(0.5)

    class Hooks(Callback):
        def begin_batch(self):
            if self.run.n_iter == 6 and self.run.in_train:
                weight, double = self.run.learn.model[0].weight, lambda grad: 2 * grad
                if kind == "gradient":
                    self._handle = weight.register_hook(double)
                elif kind == "accumulation":
                    self._handle = weight.register_post_accumulate_grad_hook(halve)
                else:
                    self._handle = register_module_forward_hook(lambda m, args, out: 0.9 * out)

        def after_fit(self):
            self._handle.remove()

    learn, plain = make_learn(), make_learn()
    run = fit(learn, Hooks(), says=refused("it would leave out a hook on (a parameter|all modules)"))
    Runner([Hooks()]).fit(3, plain)
    assert run.cuda_graph.replays > 0
    check_equal(learn, plain, rtol=0, atol=0)


def test_recurrent_nets_are_recorded():
    check_as_plain(lambda: make_learn(Recurrent()), replays=10, rtol=0, atol=0)


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_the_model_is_recorded_anew(what):
    class Changes(Callback):
        def begin_batch(self):
            net, run = self.run.learn.model, self.run
            if not (run.in_train and run.epoch == 1 and run.iter == 2):
                return
            if what == "buffer":
                net[1].running_mean = net[1].running_mean + 1
            elif what == "memory":
                net[0].weight.data = net[0].weight.data * 2
            elif what == "parameter":
                net[3].bias.data = net[3].bias.data.clone() + 1
            elif what == "mode":
                net[1].eval()
            elif what == "freezing":
                net[0].weight.requires_grad_(False)
            elif what == "module":
                net[2] = nn.Tanh()
            elif what == "attribute":
                net[1].eps = 0.1
            elif what == "momentum":
                net[1].momentum = 0
            elif what == "norm":
                net[1].freeze()
            elif what == "new":
                net[2].scale = 2.0

    norm = partial(RunningBatchNorm, backend="fused") if what in ("momentum", "norm") else nn.BatchNorm1d
    make = lambda: make_learn(small_net(norm), sizes=(6, 6, 6, 6))
    learn, plain = make(), make()
    run = fit(learn, Changes())
    Runner([Changes()]).fit(3, plain)
    check_equal(learn, plain, rtol=0, atol=0)
    # train() at the next epoch is one more change of the mode
    assert run.cuda_graph.graphs == (3 if what == "mode" else 2)


def test_freeze_and_resume_work(tmp_path):
    whole, cut, rest, plain = (make_learn(opt=SGD) for _ in range(4))
    fit(whole, Freeze("0", until=1))
    Runner([Freeze("0", until=1)]).fit(3, plain)
    check_equal(whole, plain)
    fit(cut, Freeze("0", until=1), Checkpoint(tmp_path / "cut"), epochs=2)
    run = Runner([CUDAGraph(), Freeze("0", until=1), Checkpoint(tmp_path / "cut")])
    run.fit(3, rest, resume=tmp_path / "cut")
    assert run.cuda_graph.replays > 0
    check_equal(whole, rest)


def test_a_callback_may_replace_gradients_or_end_the_batch():
    class Acts(Callback):
        def after_loss(self):
            if self.run.in_train and self.run.n_iter == 4:
                raise CancelBatchException

        def after_backward(self):
            weight = self.run.learn.model[0].weight
            if self.run.n_iter == 5:
                weight.grad = weight.grad * 2
            if self.run.n_iter == 6:
                weight.grad = None

    check_as_plain(make_learn, Acts, replays=10, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["new", "data", "none", "kept", "more"])
def test_gradients_may_be_replaced_in_each_step(what):
    """Kept: the batch is cancelled before the step, so that the next one adds to its gradients."""

    class Acts(Callback):
        def after_backward(self):
            run = self.run
            if what == "kept" and run.n_iter % 3 != 2:
                raise CancelBatchException
            for p in [p for p in run.learn.model.parameters() if p.grad is not None]:
                if what == "new":
                    p.grad = p.grad * 2
                elif what == "data":
                    p.grad.data = p.grad.data * 2
            if what == "none" and run.n_iter % 4 == 3:
                run.learn.model[0].weight.grad = None
            if what == "more":
                run.learn.model.extra.grad = torch.ones(3) * run.n_iter

    def make():
        net = small_net()
        net.register_parameter("extra", nn.Parameter(torch.zeros(3)))
        return make_learn(net)

    check_as_plain(make, Acts, replays=10, rtol=0, atol=0)


def test_memory_that_changes_before_the_step_is_not_missed():
    class Moves(Callback):
        def after_backward(self):
            weight = self.run.learn.model[0].weight
            if self.run.n_iter == 5:
                weight.data = weight.data.clone()

    learn, plain = make_learn(sizes=(6, 6, 6, 6)), make_learn(sizes=(6, 6, 6, 6))
    fit(learn, Moves())
    Runner([Moves()]).fit(3, plain)
    check_equal(learn, plain, rtol=0, atol=0)


def test_a_batch_that_is_cancelled_before_the_backward_pass_leaves_its_state():
    class Cancels(Callback):
        def after_loss(self):
            if self.run.in_train and self.run.n_iter % 3 == 1:
                raise CancelBatchException

    make = lambda: make_learn(small_net(partial(RunningBatchNorm, backend="fused")))
    check_as_plain(make, Cancels, replays=10, rtol=0, atol=0)


def test_what_callbacks_keep_stays_as_it_was():
    class Keeps(Callback):
        def __init__(self):
            self.kept = []

        def after_loss(self):
            if self.run.in_train:
                self.kept.append((self.run.pred, self.run.loss))

    run, other = check_as_plain(make_learn, Keeps, replays=10, rtol=0, atol=0)
    for a, b in zip(run.keeps.kept, other.keeps.kept, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not any(t.requires_grad for t in run.keeps.kept[-1])


class Named(nn.Module):
    """A dictionary comes in, and a dictionary with a loss goes out."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, a, b, target=None):
        pred = self.net(a + b)
        return {"logits": pred, "loss": F.cross_entropy(pred, target)}


def make_named():
    learn = make_learn(Named(), loss_func=None)
    loader = [{"a": x, "b": x, "target": y} for x, y in learn.data.train_dl]
    learn.data.train_dl, learn.data.valid_dl = loader, loader[:1]
    return learn


def test_dictionaries_and_losses_of_the_models_own_are_recorded():
    check_as_plain(make_named, Recorder, replays=10, rtol=0, atol=0)


def test_a_loss_with_parameters_and_a_target_that_is_none_are_recorded():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, pred, target):
            self.seen += 1
            return (pred - self.seen).square().mean()

    def make():
        learn = make_learn(loss_func=Loss())
        learn.data.train_dl = [(x, None) for x, _ in learn.data.train_dl]
        learn.data.valid_dl = None
        return learn

    run, other = check_as_plain(make, replays=10, rtol=0, atol=0)
    assert int(run.learn.loss_func.seen) == 12


def test_many_shapes_are_not_all_recorded():
    learn, plain = make_learn(sizes=range(2, 14)), make_learn(sizes=range(2, 14))
    run = fit(learn)
    Runner().fit(3, plain)
    assert run.cuda_graph.graphs == 8 and run.cuda_graph.replays == 16
    check_equal(learn, plain, rtol=0, atol=0)


def test_a_recording_begins_when_the_graph_of_the_step_before_is_gone(monkeypatch):
    """Its nodes would tie the gradients to the stream of that step, which breaks a recording on CUDA."""

    def accumulators(model):
        return [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]

    class Marks(Callback):
        def after_loss(self):
            if self.run.loss.requires_grad:
                for node in accumulators(self.run.model):
                    node.metadata["seen"] = True
                assert all(node.metadata for node in accumulators(self.run.model))

    class Looks(Tape):
        def warm_up(self, function):
            assert not any(node.metadata for node in accumulators(learn.model))
            super().warm_up(function)

    monkeypatch.setattr(cuda_graph, "Recorder", Looks)
    learn = make_learn()
    watching = [Recorder(), HaltOnNaN(), ParamMagnitudes(), EMA(), AvgStatsCallback(accuracy), MixedPrecision()]
    assert fit(learn, Marks(), *watching).cuda_graph.graphs == 2


# faults


def test_a_fault_is_located_in_a_replayed_step():
    learn = make_learn()
    xb, yb = learn.data.train_dl[2]
    learn.data.train_dl[2] = (xb * 1e38 * 1e38, yb)
    run = fit(learn, HaltOnNaN(), epochs=1)
    assert (run.halt_on_nan.report.where, run.halt_on_nan.report.step) == ("input", 2)

    for make, where in ((make_learn, "3"), (make_named, "net.3")):

        class Spoils(Callback):
            def begin_batch(self, where=where):
                if self.run.in_train and self.run.n_iter == 6:
                    self.run.learn.model.get_submodule(where).weight.data[0] = math.inf

        run = fit(make(), HaltOnNaN(), Spoils())
        assert (run.halt_on_nan.report.where, run.halt_on_nan.report.step) == (where, 6)
        assert run.cuda_graph.replays > 0
        assert all(p.isfinite().all() for p in run.learn.model.parameters())


# what a replay would leave out


class Odd(nn.Module):
    """A net that does one thing which a replay would leave out."""

    def __init__(self, what):
        super().__init__()
        self.what, self.net, self.count = what, small_net(), 0
        self.last, self.kept, self.random = torch.zeros(4), {"means": deque([torch.zeros(4)])}, None
        if what == "own":
            self.random = random.Random(0)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.what == "waits":
            x = x / x.abs().max().item()
        elif self.what == "counts":
            self.count += 1
        elif self.what == "replaces":
            self.mean = self.mean.lerp(x.mean(0).detach(), 0.1)
        elif self.what == "remembers":
            x, self.last = x + self.last, x.mean(0).detach()
        elif self.what == "lists":
            x, self.kept["means"][0] = x + self.kept["means"][0], x.mean(0).detach()
        elif self.what == "own":
            x = x * self.random.random()
        elif self.what == "python":
            x = x * random.random()
        elif self.what == "torch":
            x = x * float(torch.rand(()))
        return self.net(x - self.mean)


@pytest.mark.parametrize(
    "what, why",
    [
        ("waits", "cannot be recorded: RuntimeError: operation not permitted"),
        ("counts", "the forward pass changes 'count', an attribute of Odd"),
        ("replaces", "the forward pass replaces the tensor 'mean' instead of changing it in place"),
        ("remembers", "the forward pass replaces the tensor 'last' instead of changing it in place"),
        ("lists", "the forward pass changes a deque, an attribute of Odd"),
        ("own", "it would leave out random numbers of a Random"),
        ("python", "the model draws random numbers on the host"),
    ],
)
def test_models_that_a_replay_would_not_repeat_train_without_graphs(what, why):
    def make():
        random.seed(0)
        return make_learn(Odd(what))

    learn = make()
    run = fit(learn, says=refused(why))
    plain = make()
    Runner().fit(3, plain)
    assert run.cuda_graph.graphs == 0
    check_equal(learn, plain, rtol=0, atol=0)
    assert learn.model.count == plain.model.count


def test_a_loss_that_counts_trains_without_graphs():
    class Loss:
        count = 0

        def __call__(self, pred, target):
            self.count += 1
            return F.cross_entropy(pred, target) / self.count

    learn, plain = make_learn(loss_func=Loss()), make_learn(loss_func=Loss())
    fit(learn, says=refused("the forward pass changes 'count', an attribute of Loss"))
    Runner().fit(3, plain)
    assert learn.loss_func.count == plain.loss_func.count
    check_equal(learn, plain, rtol=0, atol=0)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_hook_that_comes_later_is_not_left_out(epoch):
    class Hooks(Callback):
        def begin_batch(self):
            if self.run.epoch == epoch and self.run.in_train and self.run.iter == 2:
                self._handle = self.run.model[0].register_forward_hook(lambda m, args, out: 2 * out)

    learn, plain = make_learn(), make_learn()
    fit(learn, Hooks(), says=refused("it would leave out a hook on module '0'"))
    Runner([Hooks()]).fit(3, plain)
    check_equal(learn, plain, rtol=0, atol=0)


class Penalty(Callback):
    first = 0

    def after_loss(self):
        if self.run.in_train and self.run.n_iter >= self.first:
            self.run.loss = self.run.loss + 0.1 * self.run.learn.model[0].weight.square().sum()


class Doubled(Callback):
    def after_pred(self):
        self.run.pred = 2 * self.run.pred


class InPlace(Callback):
    def __init__(self, what):
        self.what = what

    def after_pred(self):
        if self.what == "prediction":
            self.run.pred.mul_(0.5)
        elif self.what == "target" and self.run.in_train:
            self.run.yb.fill_(1)

    def after_loss(self):
        if self.what == "loss":
            self.run.loss.mul_(0.5)


class Reads(Callback):
    def __init__(self, how):
        self.how = how

    def after_pred(self):
        if self.run.in_train:
            self.how(self.run.pred)


class Targets(Callback):
    def after_pred(self):
        self.run.yb = (self.run.yb + 1) % 3


class LaterLoss(Callback):
    def begin_epoch(self):
        if self.run.epoch == self.run.epochs - 1:
            self.run.loss_func = partial(F.cross_entropy, label_smoothing=0.5)


class Claims(Callback):
    _order = 500

    def begin_fit(self):
        self.run.claim(self, backward=lambda loss: (2 * loss).backward())


class Hooked(Callback):
    def begin_fit(self):
        self._handle = self.run.model[0].register_forward_hook(lambda *args: None)

    def after_fit(self):
        self._handle.remove()


class Swapped(Callback):
    def begin_fit(self):
        self.run.model = copy.deepcopy(self.run.model)


@pytest.mark.parametrize(
    "cb, why",
    [
        (Penalty, "a callback replaces the loss"),
        (Doubled, "a callback replaces the prediction"),
        (partial(InPlace, "prediction"), "a callback replaces the prediction"),
        (partial(InPlace, "target"), "a callback replaces the target"),
        (partial(InPlace, "loss"), "a callback replaces the loss"),
        (Targets, "a callback replaces the target"),
        (partial(Reads, torch.Tensor.retain_grad), "a callback reads gradients of the prediction or the loss"),
        (partial(Reads, lambda pred: pred.register_hook(torch.neg)), "a callback reads gradients of the prediction"),
        (Claims, r"Claims takes part in the step \(it claims 'backward'\)"),
        (Hooked, "it would leave out a hook on module '0'"),
        (Swapped, "a callback has replaced run.model"),
        (MixUp, "a callback has replaced run.loss_func"),
        (ActivationStats, "it would leave out a hook on module '0'"),
        (GraphMonitor, "GraphMonitor reads the autograd graph of each loss"),
        (Closure, r"Closure takes part in the step \(it claims 'step'\)"),
        (partial(GradientAccumulation, 2), r"GradientAccumulation takes part in the step \(it claims 'weigh'\)"),
        (partial(MixedPrecision, "fp16"), r"MixedPrecision takes part in the step \(it claims 'backward'\)"),
        (partial(CompileCallback, mode="reduce-overhead", disable=True), "makes CUDA graphs itself"),
    ],
)
def test_callbacks_that_a_replay_would_leave_out_work_without_graphs(cb, why):
    learn, plain = make_learn(opt=SGD), make_learn(opt=SGD)
    torch.manual_seed(3)
    run = fit(learn, cb(), says=refused(why))
    torch.manual_seed(3)
    other = Runner([cb()])
    other.logger = lambda line: None
    other.fit(3, plain)
    assert run.cuda_graph.graphs == 0
    check_equal(learn, plain, rtol=0, atol=0)
    for name in ("activation_stats", "graph_monitor"):
        if hasattr(run, name):
            assert len(getattr(run, name).steps) == len(getattr(other, name).steps) > 0


def test_a_loss_function_that_is_replaced_later_is_not_missed():
    learn, plain = make_learn(), make_learn()
    run = fit(learn, LaterLoss(), says=refused("a callback has replaced run.loss_func"))
    Runner([LaterLoss()]).fit(3, plain)
    assert run.cuda_graph.replays == 6
    check_equal(learn, plain, rtol=0, atol=0)


def test_parameters_from_elsewhere_are_not_missed():
    def make():
        scale = nn.Parameter(torch.ones(()))
        opt = lambda params: FUSED([*params, scale])
        return make_learn(opt=opt, loss_func=lambda pred, target: F.cross_entropy(pred * scale, target))

    learn, plain = make(), make()
    fit(learn, says=refused("parameters that are neither the model's nor the loss function's"))
    Runner().fit(3, plain)
    check_equal(learn, plain, rtol=0, atol=0)


class Boxed:
    def __init__(self, x):
        self.x = x


class Unboxing(nn.Module):
    def __init__(self, boxed, shrinks=False):
        super().__init__()
        self.net, self.boxed, self.shrinks = small_net(), boxed, shrinks

    def forward(self, x):
        x = x.x if self.boxed == "input" else x.to_dense() if x.is_sparse else x
        pred = self.net(x.mul_(0.9) if self.shrinks else x)
        return Boxed(pred) if self.boxed == "output" else pred


@pytest.mark.parametrize(
    "boxed, why",
    [
        ("input", "batches and predictions may consist of .* got Boxed"),
        ("output", "batches and predictions may consist of .* got Boxed"),
        ("sparse", "batches and predictions may consist of .* got sparse tensors"),
        ("shrinks", "the forward pass changes its inputs"),
    ],
)
def test_batches_that_a_replay_would_not_read_train_without_graphs(boxed, why):
    class Packs(Callback):
        def begin_batch(self):
            run = self.run
            run.xb = Boxed(run.xb) if boxed == "input" else run.xb.to_sparse() if boxed == "sparse" else run.xb

    def make():
        loss = lambda pred, target: F.cross_entropy(pred.x if boxed == "output" else pred, target)
        return make_learn(Unboxing(boxed, boxed == "shrinks"), loss_func=loss)

    learn, plain = make(), make()
    fit(learn, Packs(), says=refused(why))
    Runner([Packs()]).fit(3, plain)
    check_equal(learn, plain, rtol=0, atol=0)


def test_a_loss_that_is_replaced_later_is_an_error():
    class Late(Penalty):
        first = 6

    with pytest.raises(RuntimeError, match="in step 6 a callback replaced the loss.*remove one of the two"):
        fit(make_learn(), Late())


def test_two_of_them_are_an_error():
    with pytest.raises(RuntimeError, match="one CUDAGraph records the steps of a run; got more"):
        fit(make_learn(), CUDAGraph())


def test_sparse_gradients_are_not_recorded():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
        learn = make_learn(model, partial(optim.SGD, lr=0.1))
        loader = [(torch.randint(0, 9, (6, 2)), y) for _, y in learn.data.train_dl[:3]]
        learn.data.train_dl, learn.data.valid_dl = loader, None
        return learn

    learn, plain = make(), make()
    fit(learn, says=refused("gradients are sparse"))
    Runner().fit(3, plain)
    check_equal(learn, plain)


def test_a_machine_without_cuda_trains_without_graphs(monkeypatch):
    monkeypatch.undo()
    learn, plain = make_learn(), make_learn()
    run = fit(learn, says=refused("model and batches must be on one CUDA device; they are on cpu"))
    Runner().fit(3, plain)
    assert (run.cuda_graph.graphs, run.cuda_graph.replays) == (0, 0)
    check_equal(learn, plain, rtol=0, atol=0)


# on a device


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.undo()


@pytest.mark.cuda
@pytest.mark.parametrize("opt", [SGD, ADAM], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("cbs", [[], *CALLBACKS.values()], ids=["nothing", *CALLBACKS])
def test_replayed_steps_equal_the_plain_ones_on_cuda(on_cuda, cbs, opt):
    make = lambda: make_learn(small_net(RunningBatchNorm), opt, device="cuda")
    check_as_plain(make, CudaCallback, *cbs, replays=10, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_dropout_draws_new_numbers_in_each_replay(on_cuda):
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    learn = make_learn(model, partial(optim.SGD, lr=0.0, fused=True), device="cuda", sizes=(6,))
    run = fit(learn, CudaCallback(), Recorder(), epochs=8)
    assert run.cuda_graph.replays == 7 and len(set(run.recorder.losses)) == 8


@pytest.mark.cuda
def test_a_model_that_waits_trains_without_graphs_on_cuda(on_cuda):
    learn = make_learn(Odd("waits"), device="cuda")
    fit(learn, CudaCallback(), says=refused("cannot be recorded: RuntimeError"))
    Runner([CudaCallback()]).fit(1, learn)  # the device is in order


@pytest.mark.cuda
def test_a_recording_that_fails_leaves_the_device_in_order(on_cuda):
    class Waits(nn.Module):
        def forward(self, x):
            torch.cuda.synchronize()  # the warm-up does not see this
            return x

    learn = make_learn(nn.Sequential(nn.Linear(4, 64), Waits(), nn.Dropout(), nn.Linear(64, 3)), device="cuda")
    fit(learn, CudaCallback(), says=refused("cannot be recorded"))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert fit(make_learn(device="cuda"), CudaCallback()).cuda_graph.graphs == 2


@pytest.mark.cuda
def test_a_replayed_step_does_not_wait_for_the_device(on_cuda):
    class Strict(Callback):
        _order = 98

        def begin_batch(self):
            strict = self.run.in_train and self.run.epoch == 3  # recordings, which wait, are done by then
            torch.cuda.set_sync_debug_mode("error" if strict else "default")

        def after_batch(self):
            torch.cuda.set_sync_debug_mode("default")

    cbs = [CudaCallback(), Recorder(), Strict(), ParamScheduler("lr", sched_cos(0.2, 0.01))]
    run = fit(make_learn(device="cuda"), *cbs, epochs=4)
    assert run.cuda_graph.replays == 14


@pytest.mark.cuda
def test_a_fault_is_located_on_cuda(on_cuda):
    class Spoils(Callback):
        def begin_batch(self):
            if self.run.in_train and self.run.n_iter == 6:
                self.run.learn.model[3].weight.data[0] = math.inf

    run = fit(make_learn(device="cuda"), CudaCallback(), HaltOnNaN(), Spoils())
    assert (run.halt_on_nan.report.where, run.halt_on_nan.report.step) == ("3", 6)
