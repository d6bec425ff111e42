"""The rules for public callbacks: known events, copies, and model, optimiser and process left as they should be."""

import copy
import inspect
import io
import pickle
import random
import sys
from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import fastrbn.callbacks as package
from fastrbn.callbacks import (
    EMA,
    ActivationStats,
    AvgStatsCallback,
    BatchTransformXCallback,
    Checkpoint,
    Closure,
    CompileCallback,
    CSVLogger,
    CudaCallback,
    CUDAGraph,
    CutMix,
    Distributed,
    EarlyStopping,
    Freeze,
    GradientAccumulation,
    GradientClip,
    GraphMonitor,
    HaltOnNaN,
    JSONLLogger,
    Log,
    LR_Find,
    MixedPrecision,
    MixUp,
    ParamMagnitudes,
    ParamScheduler,
    Profiler,
    ProgressCallback,
    Recorder,
    SaveBest,
    TensorBoardLogger,
    TorchScheduler,
    Warmup,
    accuracy,
    sched_cos,
)
from fastrbn.learn import EVENTS, Callback, CancelTrainException, Runner, TrainEvalCallback


def double(x):
    return x * 2


def forget(numbers, step):
    pass


MAKERS = {
    TrainEvalCallback: TrainEvalCallback,
    ActivationStats: ActivationStats,
    AvgStatsCallback: lambda: AvgStatsCallback(accuracy),
    BatchTransformXCallback: lambda: BatchTransformXCallback(double),
    Checkpoint: lambda: Checkpoint("checkpoints", overwrite=True),
    CSVLogger: lambda: CSVLogger("history.csv"),
    Closure: Closure,
    CompileCallback: lambda: CompileCallback(disable=True),  # the compiler itself has its own tests
    CUDAGraph: CUDAGraph,
    CudaCallback: lambda: CudaCallback("cpu"),
    CutMix: CutMix,
    Distributed: Distributed,
    EMA: EMA,
    EarlyStopping: lambda: EarlyStopping("train_loss", patience=9),
    Freeze: lambda: Freeze("1", "1", until=1),
    GradientAccumulation: lambda: GradientAccumulation(2),
    GradientClip: lambda: GradientClip(0.1),
    GraphMonitor: GraphMonitor,
    HaltOnNaN: HaltOnNaN,
    JSONLLogger: lambda: JSONLLogger(every=1),
    Log: lambda: Log(forget, every=2),
    LR_Find: lambda: LR_Find(max_iter=20, max_lr=0.1),
    MixUp: MixUp,
    MixedPrecision: lambda: MixedPrecision("fp16", init_scale=1024.0),
    ParamMagnitudes: lambda: ParamMagnitudes(grads=True),
    ParamScheduler: lambda: ParamScheduler("lr", sched_cos(0.1, 0.2)),
    Profiler: lambda: Profiler(steps=1, wait=0, warmup=1),
    ProgressCallback: ProgressCallback,
    Recorder: Recorder,
    SaveBest: lambda: SaveBest("best.pt", monitor="train_loss"),
    TensorBoardLogger: TensorBoardLogger,
    TorchScheduler: lambda: TorchScheduler(partial(StepLR, step_size=1, gamma=0.5)),
    Warmup: lambda: Warmup(steps=3),
}
NEED_AVERAGES = {CSVLogger, EarlyStopping, SaveBest}
CHANGE_TRAINING = {BatchTransformXCallback, LR_Find, ParamScheduler}
CHANGE_TRAINING |= {Closure, CutMix, Freeze, GradientAccumulation, GradientClip, MixUp, MixedPrecision}
CHANGE_TRAINING |= {TorchScheduler, Warmup}
CHANGE_TRAINING |= {CUDAGraph}  # within rounding

every_callback = pytest.mark.parametrize("cls", MAKERS, ids=lambda c: c.__name__)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch, graphs_on_cpu):
    monkeypatch.chdir(tmp_path)
    writer = type(
        "SummaryWriter", (), dict.fromkeys(("__init__", "add_scalar", "flush", "close"), lambda *a, **k: None)
    )
    # TensorBoardLogger's package is an extra
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))


@pytest.fixture
def make_learn(make_learn):
    """The small model on images of 2 by 2 pixels: all callbacks take them."""

    def make(**kwargs):
        learn = make_learn(**kwargs)
        learn.model.insert(0, nn.Flatten())
        for name in ("train_dl", "valid_dl"):
            if (pairs := getattr(learn.data, name)) is not None:
                setattr(learn.data, name, [(x.view(-1, 1, 2, 2), y) for x, y in pairs])
        return learn

    return make


def make_run(cls, *cbs):
    extra = [AvgStatsCallback(accuracy)] if cls in NEED_AVERAGES else []
    return Runner([MAKERS[cls](), *extra, *cbs])


def fit(run, epochs, learn):
    with redirect_stdout(io.StringIO()):
        run.fit(epochs, learn)


def of(run, cls):
    return next(cb for cb in run.cbs if type(cb) is cls)


def check_left_clean(run, learn, grad_mode=True):
    for m in learn.model.modules():
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert not getattr(m, table), f"{table} of {m} are left"
        assert m._compiled_call_impl is None
    for p in learn.model.parameters():
        assert not p._backward_hooks
        assert not getattr(p, "_post_accumulate_grad_hooks", None)
        assert p.requires_grad
    assert [id(p) for g in learn.opt.param_groups for p in g["params"]] == [id(p) for p in learn.model.parameters()]
    assert (run.model, run.opt, run.loss_func, run.data) == (learn.model, learn.opt, learn.loss_func, learn.data)
    assert not learn.opt._optimizer_step_pre_hooks and not learn.opt._optimizer_step_post_hooks
    assert run._parts.claims == {}
    assert not torch.is_autocast_enabled("cpu")
    assert run.logger is print
    assert torch.is_grad_enabled() is grad_mode
    assert run._fitting is False


def test_the_list_of_callbacks_is_complete():
    assert {cls for cls, _, _ in package.ORDER} == set(MAKERS)


def test_public_names_are_listed_and_exist():
    assert sorted(package.__all__) == sorted(set(package.__all__))
    for name in package.__all__:
        assert getattr(package, name).__doc__, f"{name} has no docstring"


@every_callback
def test_it_handles_known_events_only_and_all_defaults_are_documented(cls):
    cb = MAKERS[cls]()
    events = [n for n in dir(cls) if n.startswith(("begin_", "after_"))]
    assert set(events) <= set(EVENTS)
    assert isinstance(cb._order, int)
    assert len(inspect.getdoc(cls)) > 60
    for name in inspect.signature(cls.__init__).parameters:
        if name not in ("self", "args", "kwargs"):
            documented = any(text in inspect.getdoc(cls) for text in (f"`{name}`", f"\n{name} : ", f"\n*{name} : "))
            assert documented or cls is BatchTransformXCallback, f"{name} is not documented"
    assert cls.__name__ in repr(cb)


@every_callback
@pytest.mark.parametrize("when", ["fresh", "within a fit", "after a fit"])
def test_it_can_be_copied_and_pickled(cls, when, make_learn):
    class Copies(Callback):
        _order = 99

        def after_loss(self):
            if self.run.n_iter == 2 and self.run.in_train:
                self.run.made = [copy.deepcopy(of(self.run, cls)), pickle.loads(pickle.dumps(of(self.run, cls)))]

    run = make_run(cls, Copies())
    cb = of(run, cls)
    if when == "within a fit":
        fit(run, 2, make_learn())
        copies = run.made
    else:
        if when == "after a fit":
            fit(run, 2, make_learn())
        copies = [copy.copy(cb), copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))]
    for other in copies:
        assert type(other) is cls
        assert "run" not in vars(other)
        assert repr(other) == repr(cb)
        learn = make_learn()
        extra = [AvgStatsCallback(accuracy)] if cls in NEED_AVERAGES else []
        again = Runner([other, *extra])
        fit(again, 1, learn)
        check_left_clean(again, learn)


@every_callback
def test_a_whole_fit_leaves_things_clean(cls, make_learn):
    learn = make_learn()
    run = make_run(cls)
    fit(run, 2, learn)
    check_left_clean(run, learn)
    assert run.stop_reason is None or cls is LR_Find


class Ends(Callback):
    _order = 50

    def __init__(self, event, error):
        vars(self)[event] = lambda: self._raise(error)

    def _raise(self, error):
        if self.run.epoch == 1 or self.run.dl is None:
            raise error


@every_callback
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), CancelTrainException("enough")], ids=repr)
@pytest.mark.parametrize("event", ["begin_fit", "after_pred", "after_backward", "begin_validate"])
def test_a_fit_that_is_cut_leaves_things_clean(cls, event, error, make_learn):
    learn = make_learn()
    run = make_run(cls, Ends(event, error))
    if isinstance(error, ValueError) and not (cls is LR_Find and event == "begin_validate"):  # it does not validate
        with pytest.raises(ValueError, match="broken"):
            fit(run, 4, learn)
        assert "broken" in run.stop_reason
    else:
        fit(run, 4, learn)
    check_left_clean(run, learn)
    plain = Runner()
    plain.fit(1, learn)
    assert plain.stop_reason is None


@every_callback
def test_a_failing_begin_fit_before_its_own_is_no_trouble(cls, make_learn):
    class First(Ends):
        _order = -99

    learn = make_learn()
    run = make_run(cls, First("begin_fit", ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        fit(run, 1, learn)
    check_left_clean(run, learn)


@every_callback
def test_what_only_watches_changes_nothing(cls, make_learn):
    if cls in CHANGE_TRAINING:
        pytest.skip("it is there to change training")
    ends = []
    for with_it in (False, True):
        random.seed(0)
        np.random.seed(0)
        learn = make_learn()
        run = make_run(cls) if with_it else Runner()
        fit(run, 3, learn)
        ends.append((learn, torch.get_rng_state(), random.getstate(), np.random.get_state()[1]))
    (a, *states_a), (b, *states_b) = ends
    for name, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[name]), name
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.equal(a.opt.state[p]["momentum_buffer"], b.opt.state[q]["momentum_buffer"])
    assert torch.equal(states_a[0], states_b[0])
    assert states_a[1] == states_b[1]
    assert np.array_equal(states_a[2], states_b[2])


@every_callback
@pytest.mark.filterwarnings("ignore:the training loader has no length:UserWarning")
def test_it_works_without_validation_without_length_and_without_batches(cls, make_learn):
    learn = make_learn(n_valid=0)
    pairs = learn.data.train_dl
    for loader in (pairs, type("NoLength", (), {"__iter__": lambda self: iter(pairs)})(), []):
        learn.data.train_dl = loader
        fit(make_run(cls), 2, learn)


def test_training_with_all_of_them_draws_nothing(make_learn):
    before = "matplotlib" in sys.modules
    alone = {Closure, CUDAGraph, LR_Find, TorchScheduler}  # refuse to share the step or the rate
    run = Runner([make() for cls, make in MAKERS.items() if cls not in alone])
    fit(run, 2, make_learn())
    assert run.stop_reason is None
    assert ("matplotlib" in sys.modules) == before


def get_batch(dl, run):
    """As in the course's notebook 06."""
    run.xb, run.yb = next(iter(dl))
    for cb in run.cbs:
        cb.set_runner(run)
    run("begin_batch")
    return run.xb, run.yb


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cls", MAKERS, ids=lambda c: c.__name__)
def test_a_batch_can_be_had_outside_a_fit(cls, when, make_learn):
    run, learn = make_run(cls), make_learn(n_valid=0)
    if when == "after":
        fit(run, 1, learn)
    xb, yb = learn.data.train_dl[0]
    got = get_batch(learn.data.train_dl, run)
    assert torch.equal(got[0], xb * 2 if cls is BatchTransformXCallback else xb) and got[1] is yb
