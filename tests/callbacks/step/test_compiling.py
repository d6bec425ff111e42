"""CompileCallback gives the same numbers and names, and restores the model. The backends only trace, which is fast."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.callbacks import (
    EMA,
    ActivationStats,
    Checkpoint,
    CompileCallback,
    HaltOnNaN,
    MixedPrecision,
    ParamMagnitudes,
)
from fastrbn.learn import Callback, Learner, Runner
from fastrbn.norm import RunningBatchNorm

# torch 2.9's own tracer instantiates the functions that it traces
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_learn(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(4)]
    data = SimpleNamespace(train_dl=batches, valid_dl=batches[:1])
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), F.cross_entropy, data)


class Counts:
    """A backend that runs each graph as it is, and counts graphs and calls."""

    def __init__(self):
        self.graphs = self.calls = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return graph(*args)

        return run


def check_close(a, b):
    for name, value in a.model.state_dict().items():
        assert torch.allclose(value, b.model.state_dict()[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RunningBatchNorm])
def test_a_compiled_fit_ends_as_the_plain_one_with_the_same_names(norm):
    learn, plain, counts = make_learn(norm), make_learn(norm), Counts()

    class Names(Callback):
        def after_loss(self):
            self.run.names = list(self.run.model.state_dict())

    run = Runner([CompileCallback(backend=counts), Names()])
    run.fit(2, learn)
    Runner().fit(2, plain)
    check_close(learn, plain)
    assert run.names == list(plain.model.state_dict())
    assert counts.graphs == 2 and counts.calls == 10, "one graph each for training and validation, run for each batch"
    assert learn.model._compiled_call_impl is None
    learn.model(torch.randn(6, 4))
    assert counts.calls == 10, "the model is still compiled"


def test_it_works_with_other_callbacks(tmp_path):
    learn, plain = make_learn(), make_learn()
    others = [EMA, MixedPrecision, ParamMagnitudes]
    run = Runner([CompileCallback(backend="aot_eager"), Checkpoint(tmp_path), *(cb() for cb in others)])
    run.fit(1, learn)
    Runner([cb() for cb in others]).fit(1, plain)
    check_close(learn, plain)
    assert run.param_magnitudes.names == [n for n, _ in plain.model.named_parameters()]


def test_hooks_on_inner_modules_see_their_outputs():
    found = []
    for cbs in ([CompileCallback(backend="eager")], []):
        run = Runner([ActivationStats(hist=False, every=1), *cbs])
        run.fit(1, make_learn())
        found.append(run.activation_stats.means)
    assert torch.allclose(*found, atol=1e-6) and found[0].shape == (4, 4)


def test_a_fault_in_a_compiled_model_is_found():
    class Spoils(Callback):
        def after_pred(self):
            if self.run.in_train and self.run.n_iter == 2:
                self.run.pred = self.run.pred * math.nan

    learn = make_learn()
    run = Runner([CompileCallback(backend="eager"), Spoils(), HaltOnNaN()])
    run.fit(1, learn)
    assert run.halt_on_nan.report.step == 2
    assert learn.model._compiled_call_impl is None
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())


def test_a_compiler_error_is_raised_and_the_model_is_restored():
    def broken(graph, inputs):
        raise ArithmeticError("cannot")

    learn = make_learn()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="cannot"):
        Runner([CompileCallback(backend=broken)]).fit(1, learn)
    assert learn.model._compiled_call_impl is None
    Runner().fit(1, learn)


def test_a_compiled_model_is_an_error_and_stays_compiled():
    learn = make_learn()
    learn.model.compile(backend="eager")
    before = learn.model._compiled_call_impl
    with pytest.raises(RuntimeError, match="compiles the model itself, but this Sequential is compiled already"):
        Runner([CompileCallback()]).fit(1, learn)
    assert learn.model._compiled_call_impl is before
    learn.model = torch.compile(make_learn().model, backend="eager")
    with pytest.raises(RuntimeError, match="OptimizedModule is compiled already"):
        Runner([CompileCallback()]).fit(1, learn)


def test_arguments_are_those_of_torch_compile():
    with pytest.raises(TypeError, match="takes the keyword arguments of torch.compile: .*mode.*; got modus"):
        CompileCallback(modus="default")
    assert repr(CompileCallback(mode="reduce-overhead")) == "CompileCallback(mode='reduce-overhead')"


def test_many_models_can_be_compiled_one_after_the_other(recwarn):
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        counts = Counts()
        Runner([CompileCallback(backend=counts)]).fit(1, make_learn())
        assert counts.graphs == 2 and counts.calls == 5
