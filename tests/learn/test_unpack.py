"""From a batch to the calls of model and loss function: what is understood, what is refused, and who follows it."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastrbn import (
    AvgStatsCallback,
    Callback,
    Checkpoint,
    CudaCallback,
    GradientAccumulation,
    HaltOnNaN,
    Learner,
    Recorder,
    Runner,
    accuracy,
    get_runner,
)
from fastrbn.learn.batch import batch_size
from fastrbn.learn.unpack import Unpack

X, Z, Y = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


class One(nn.Module):
    def forward(self, x):
        return x


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 2)

    def forward(self, a, b):
        return self.lin(torch.cat([a, b], 1))


class Optional(nn.Module):
    def forward(self, x, mask=None, labels=None):
        return x


class Any(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


class ByName(nn.Module):
    def forward(self, **kwargs):
        return kwargs


class OwnLoss(nn.Module):
    """As language models have it: the target is an argument, and the loss comes back."""

    def __init__(self, how=lambda loss, pred: types.SimpleNamespace(loss=loss, logits=pred)):
        super().__init__()
        self.lin, self.how = nn.Linear(3, 2), how

    def forward(self, x, labels=None):
        pred = self.lin(x)
        return self.how(F.cross_entropy(pred, labels), pred)


def same(a, b):
    """Equal, with the very same tensors."""
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, (tuple, dict)):
        return (
            type(a) is type(b)
            and len(a) == len(b)
            and all(same(a[k], b[k]) for k in (a if isinstance(a, dict) else range(len(a))))
        )
    return a == b


@pytest.mark.parametrize(
    ("model", "batch", "form", "xb", "yb"),
    [
        (One(), (X, Y), "one", X, Y),
        (One(), [X, Y], "one", X, Y),
        (One(), (X, None), "one", X, None),
        (One(), X, "one", X, None),
        (One(), [X], "one", X, None),
        (One(), ((X, Z), Y), "one", (X, Z), Y),
        (One(), ({"u": X, "v": Z}, Y), "one", {"u": X, "v": Z}, Y),
        (One(), {"x": X, "y": Y}, "one", X, Y),
        (One(), {"image": X, "label": Y}, "one", X, Y),
        (One(), {"x": X}, "one", X, None),
        (nn.Sequential(nn.Linear(3, 2)), {"pixels": X, "targets": Y}, "one", X, Y),
        (Two(), ((X, Z), Y), "args", (X, Z), Y),
        (Two(), (X, Z, Y), "args", (X, Z), Y),
        (Two(), (X, Z), "args", (X, Z), None),
        (Two(), ({"a": X, "b": Z}, Y), "kwargs", {"a": X, "b": Z}, Y),
        (Two(), {"b": X, "target": Y, "a": Z}, "kwargs", {"b": X, "a": Z}, Y),
        (Two(), {"a": X, "b": Z}, "kwargs", {"a": X, "b": Z}, None),
        (Optional(), (X, Y), "one", X, Y),
        (Optional(), ((X, Z), Y), "args", (X, Z), Y),
        (Optional(), {"x": X, "mask": Z, "labels": Y}, "kwargs", {"x": X, "mask": Z, "labels": Y}, None),
        (Optional(), {"x": X, "mask": Z, "y": Y}, "kwargs", {"x": X, "mask": Z}, Y),
        (Any(), ((X, Z), Y), "args", (X, Z), Y),
        (Any(), {"p": X, "q": Z, "labels": Y}, "kwargs", {"p": X, "q": Z}, Y),
        (ByName(), {"pixels": X, "label": Y}, "kwargs", {"pixels": X}, Y),
        (nn.DataParallel(Two()), ((X, Z), Y), "args", (X, Z), Y),
        (torch.compile(Two()), ((X, Z), Y), "args", (X, Z), Y),
    ],
)
def test_batches_are_understood_from_the_arguments_of_forward(model, batch, form, xb, yb):
    unpack = Unpack(model)
    got = unpack(batch)
    assert same(got, (xb, yb)) and unpack.form == form


@pytest.mark.parametrize(
    ("model", "batch", "got"),
    [
        (One(), (X, Z, Y), "got tuple of 3, and the model's forward takes x: .*unpack=lambda"),
        (One(), (), "got tuple of 0"),
        (One(), {"a": X, "b": Z, "y": Y}, "got a dictionary with 'a', 'b', 'y'"),
        (One(), {"x": X, "index": Y}, r"got a dictionary with 'x', 'index'.*batch\['x'\].*batch\['index'\]"),
        (Optional(), {"x": X, "mask": Z, "index": Y}, "'index'"),
        (Optional(), (X, Z, Y), "got tuple of 3"),
        (One(), "xy", "got str"),
        (One(), 7, "got int"),
        (One(), {}, "got a dictionary"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_what_to_write(model, batch, got):
    with pytest.raises(TypeError, match=got):
        Unpack(model)(batch)


def test_a_function_decides_instead():
    unpack = Unpack(Any(), lambda b: ((b["p"],), {"q": b["q"]}, b["truth"]))
    xb, yb = unpack({"p": X, "q": Z, "truth": Y})
    assert yb is Y and same(unpack.call_model(Any(), xb), ((X,), {"q": Z}))
    pair = Unpack(Any(), lambda b: ([(b[0], b[1])], {}, None))
    xb, yb = pair((X, Z))
    assert yb is None and same(pair.call_model(Any(), xb), (((X, Z),), {}))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda b: (b[0], b[1]), r"must return \(args, kwargs, target\).*got \(Tensor, Tensor\)"),
        (lambda b: (b[0], {}, b[1]), r"got \(Tensor, dict, Tensor\)"),
        (lambda b: b[0], "got a tensor"),
        (lambda b: ((), {}, b[1]), "at least one argument"),
    ],
)
def test_a_function_that_returns_something_else_is_told_what_is_expected(function, message):
    with pytest.raises(TypeError, match=message):
        Unpack(One(), function)((X, Y))


def test_unpack_must_be_a_function():
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="unpack must be a function of the batch, or None; got 'x'"):
        get_runner(model, bunch([(X, Y)]), unpack="x")


def bunch(batches, valid=None):
    return types.SimpleNamespace(train_dl=batches, valid_dl=valid)


def learner(model, batches, loss_func=F.cross_entropy, **kwargs):
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_func, bunch(batches, batches[:1]), **kwargs)


def trained(model, batches, cbs=(), **kwargs):
    """The model's weights after an epoch."""
    model = copy.deepcopy(model)
    run = Runner(list(cbs))
    run.fit(1, learner(model, batches, **kwargs))
    return [p.detach() for p in model.parameters()], run


def test_every_form_trains_as_the_same_step_by_hand():
    torch.manual_seed(0)
    model = Two()
    by_hand = copy.deepcopy(model)
    opt = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(4):
        F.cross_entropy(by_hand(X, Z), Y).backward()
        opt.step()
        opt.zero_grad()
    forms = {
        "nested": ((X, Z), Y),
        "flat": (X, Z, Y),
        "names": {"b": Z, "a": X, "label": Y},
        "names and target": ({"b": Z, "a": X}, Y),
    }
    cbs = lambda: [CudaCallback("cpu"), AvgStatsCallback(accuracy), Recorder(), HaltOnNaN()]
    for name, batch in forms.items():
        weights, run = trained(model, [batch] * 4, cbs())
        assert all(map(torch.equal, weights, by_hand.parameters())), name
        assert run.avg_stats.train_stats.count == 16
    odd = lambda b: ((b[2],), {"b": b[1]}, b[0])
    weights, _ = trained(model, [(Y, Z, X)] * 4, cbs(), unpack=odd)
    assert all(map(torch.equal, weights, by_hand.parameters()))


HOWS = {
    "attribute": lambda loss, pred: types.SimpleNamespace(loss=loss, logits=pred),
    "key": lambda loss, pred: {"loss": loss, "logits": pred},
    "scalar": lambda loss, pred: loss,
    "tuple": lambda loss, pred: (pred, loss),
}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize(
    ("loss_func", "batch"),
    [
        (None, (X, Y)),
        (None, {"x": X, "labels": Y}),
        (F.cross_entropy, {"x": X, "labels": Y}),
        (nn.MSELoss(), {"x": X, "labels": Y}),
    ],
    ids=["whole pair", "names", "a loss function that needs a target", "another"],
)
def test_a_model_may_return_its_loss(how, loss_func, batch):
    torch.manual_seed(0)
    model = OwnLoss(how)
    plain, _ = trained(model.lin, [(X, Y)] * 3)
    weights, run = trained(model, [batch] * 3, [AvgStatsCallback(), HaltOnNaN()], loss_func=loss_func)
    assert all(map(torch.equal, weights, plain))
    assert run.loss.dim() == 0


def test_a_loss_must_be_a_tensor():
    loss_func = lambda pred, yb: (pred.mean(), {})  # noqa: E731
    with pytest.raises(TypeError, match="must return a scalar tensor; <lambda> returned tuple of 2"):
        trained(nn.Linear(3, 2), [(X, Y)], loss_func=loss_func)


def test_a_loss_function_may_do_without_a_target():
    torch.manual_seed(0)
    model, seen = nn.Linear(3, 2), []
    trained(model, [X] * 2, loss_func=lambda pred, yb: seen.append(yb) or pred.square().mean())
    assert seen == [None] * 3  # two training batches and one of validation


@pytest.mark.parametrize(
    ("loss_func", "message"),
    [
        (F.cross_entropy, "the batch has no target, which cross_entropy cannot do without.* tensor of shape"),
        (nn.MSELoss(), "which MSELoss cannot do without"),
        (None, r"there is no loss function \(loss_func=None\), so the model must return its loss"),
    ],
)
def test_a_missing_loss_is_explained(loss_func, message):
    with pytest.raises(TypeError, match=message):
        trained(nn.Linear(3, 2), [X], loss_func=loss_func)


def test_accumulated_batches_of_several_inputs_are_weighted_by_their_size():
    torch.manual_seed(0)
    model = Two()
    whole, _ = trained(model, [((X, Z), Y)])
    parts = [{"a": X[:3], "b": Z[:3], "y": Y[:3]}, {"a": X[3:], "b": Z[3:], "y": Y[3:]}]
    weights, _ = trained(model, parts, [GradientAccumulation(2)])
    for a, b in zip(weights, whole):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("xb", "size"), [((X, Z), 4), ({"scale": torch.tensor(2.0), "x": X[:2]}, 2), ((0.5, X), 4), ({"text": "abcde"}, 5)]
)
def test_the_size_of_a_batch_is_that_of_its_first_tensor_with_samples(xb, size):
    assert batch_size(xb) == size


def test_a_batch_without_a_size_is_described():
    with pytest.raises(TypeError, match="length of its first tensor; got object without"):
        batch_size((object(),))


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.log = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, a, *, b):
        return self.log((self.first(a) + b[:, :2]).log())


def test_the_replay_of_a_nan_calls_the_model_in_the_same_way():
    torch.manual_seed(0)
    model, halt = Broken(), HaltOnNaN()
    good = {"a": X, "b": torch.full((4, 3), 50.0), "y": Y}
    Runner([halt]).fit(1, learner(model, [good, {**good, "b": torch.full((4, 3), -50.0)}]))
    assert (halt.report.step, halt.report.where) == (1, "log")


def test_a_resumed_fit_of_named_batches_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    class Stop(Callback):
        def after_step(self):
            if self.n_iter == 4:
                raise KeyboardInterrupt

    torch.manual_seed(0)
    start, batches = Two(), [{"a": torch.randn(4, 3), "b": Z, "y": Y} for _ in range(6)]
    fresh = lambda: learner(copy.deepcopy(start), batches)
    whole, stopped, resumed = fresh(), fresh(), fresh()
    Runner().fit(2, whole)
    Runner([Checkpoint(tmp_path, every=2), Stop()]).fit(2, stopped)
    Runner([Checkpoint(tmp_path, every=2)]).fit(2, resumed, resume=tmp_path)
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


def test_the_summary_follows():
    named = learner(Two(), [{"b": Z, "a": X, "y": Y}])
    own = learner(Any2(), [(Y, X)], unpack=lambda b: ((b[1],), {"scale": 2}, b[0]))
    for learn in (named, own, learner(Two(), [((X, Z), Y)])):
        assert "4 × 2" in str(learn.summary()) and "4 × 2" in str(Runner().summary(learn=learn))
    assert "4 × 2" in str(named.summary((X, Z))) and "4 × 2" in str(named.summary({"a": X, "b": Z}))
    assert "loss: the model's own" in str(learner(OwnLoss(HOWS["key"]), [(X, Y)], loss_func=None).summary())


class Any2(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x, *, scale):
        return self.lin(x) * scale
