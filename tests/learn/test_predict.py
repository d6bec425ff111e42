"""validate and predict: the numbers of a fit's validation, every kind of data, and nothing left behind."""

import copy
import dataclasses
import random
from collections import OrderedDict, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastrbn.callbacks import (
    EMA,
    OUTSIDE_FIT,
    AvgStatsCallback,
    BatchTransformXCallback,
    Checkpoint,
    CSVLogger,
    CudaCallback,
    EarlyStopping,
    HaltOnNaN,
    MixedPrecision,
    MixUp,
    PerClassAccuracy,
    ProgressCallback,
    Recorder,
    SaveBest,
    accuracy,
)
from fastrbn.data import BatchLoader, DataBunch, Dataset, get_dls
from fastrbn.learn import (
    EVENTS,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    Learner,
    Runner,
)

X, Y = torch.randn(14, 4, generator=torch.Generator().manual_seed(1)), torch.arange(14) % 3


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def make_learn(model=None, loss_func=F.cross_entropy, data=None, **kwargs):
    model = net() if model is None else model
    data = DataBunch(*get_dls(Dataset(X, Y), Dataset(X, Y), 3, seed=0)) if data is None else data
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_func, data, **kwargs)


def outputs(learn, x=X):
    """The model's outputs in evaluation mode, from a copy."""
    with torch.no_grad():
        return copy.deepcopy(learn.model).eval()(x)


def test_validate_gives_the_numbers_of_the_fits_last_validation():
    learn, run = make_learn(), Runner([AvgStatsCallback(accuracy)])
    run.logger = lambda line: None
    run.fit(2, learn)
    last = run.avg_stats.history[-1]
    assert run.validate() == {"loss": last["valid_loss"], "accuracy": last["valid_accuracy"]}


@pytest.mark.parametrize(
    "loss_func", [F.cross_entropy, *(nn.CrossEntropyLoss(reduction=reduction) for reduction in ("sum", "none"))]
)
def test_validate_before_any_fit_averages_over_samples_also_without_metrics(loss_func):
    learn = make_learn(loss_func=loss_func)
    expected = F.cross_entropy(outputs(learn), Y).item()  # the last batch is smaller
    assert Runner().validate(learn=learn) == pytest.approx({"loss": expected}, rel=1e-5)
    assert Runner([AvgStatsCallback()]).validate(learn)["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "data",
    [
        DataBunch(*get_dls(Dataset(X, Y), Dataset(X[:5], Y[:5]), 2)),
        TensorDataset(X[:5], Y[:5]),
        Dataset(X[:5], Y[:5]),
        DataLoader(TensorDataset(X[:5], Y[:5]), 2),
        [(X[:2], Y[:2]), (X[2:5], Y[2:5])],
        (X[:5], Y[:5]),
        (X[:5].double().numpy(), Y[:5].numpy()),
        [X[:5], Y[:5]],  # a batch of a DataLoader
    ],
    ids=lambda data: type(data).__name__,
)
def test_both_take_every_kind_of_labelled_data(data):
    learn, run = make_learn(), Runner()
    assert run.validate(data, learn)["loss"] == pytest.approx(F.cross_entropy(outputs(learn, X[:5]), Y[:5]).item())
    found = run.predict(data, learn)
    torch.testing.assert_close(found.preds, outputs(learn, X[:5]))
    assert torch.equal(found.targets, Y[:5]) and found.losses is None


@pytest.mark.parametrize(
    "data",
    [X, X.double().numpy(), TensorDataset(X), [X[:9], X[9:]], [[X]], (x for x in X.split(5))],
    ids=["tensor", "array", "data set", "batches", "batch in a list", "generator"],
)
def test_predict_takes_data_without_targets(data):
    learn = make_learn()
    found = Runner().predict(data, learn)
    torch.testing.assert_close(found.preds, outputs(learn))
    assert found.targets is None


def test_predict_takes_a_stream():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y))

    assert torch.equal(Runner().predict(Stream(), make_learn()).targets, Y)


def test_bytes_and_data_sets_are_converted_as_the_validation_loader_converts_them():
    x, y = torch.randint(0, 256, (8, 1, 2, 2), dtype=torch.uint8), torch.arange(8) % 3
    train = BatchLoader(x, y, 3, shuffle=True, normalize=(0.4, 0.2), tfms=lambda xb: xb * 100)
    data = DataBunch(train, BatchLoader(x, y, 3, normalize=(0.4, 0.2), tfms=lambda xb: xb + 1))
    learn, run = make_learn(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), data=data), Runner()
    expected = run.predict(learn=learn).preds
    normalised = torch.cat([xb for xb, _ in data.valid_dl])
    for same in (x, x.numpy(), data.valid_ds, normalised):
        assert torch.equal(run.predict(same, learn).preds, expected)
    data.valid_dl = None  # then the training loader's normalisation, without its transforms
    torch.testing.assert_close(run.predict(x, learn).preds, outputs(learn, normalised - 1))


def state_of(run, learn, folder):
    """All that a fit's end leaves behind, in a form that can be compared."""
    held = [run, *(cb for cb in run.cbs)]
    return {
        "attributes": [{name: id(value) for name, value in vars(owner).items()} for owner in held],
        "history": [len(run.avg_stats.history), len(run.recorder.losses)],
        "weights": [value.tolist() for value in learn.model.state_dict().values()],
        "grad": learn.model[0].weight.grad.tolist(),
        "modes": [m.training for m in learn.model.modules()],
        "epochs": (learn.data.train_dl.epoch, learn.data.valid_dl.epoch),
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "files": {f: f.stat().st_mtime_ns for f in folder.rglob("*")},
    }


def test_nothing_of_the_run_is_touched_and_nothing_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = [CSVLogger("h.csv"), SaveBest("best.pt"), Checkpoint("ck")]
    cbs = [AvgStatsCallback(accuracy), *files, Recorder(), EarlyStopping(), MixUp(), HaltOnNaN(), ProgressCallback()]
    learn, run = make_learn(), Runner([*cbs, EMA()])
    run.fit(2, learn)
    learn.model.train()
    learn.model[1].eval()  # frozen by hand
    learn.model[0].weight.grad = torch.ones(8, 4)
    before = state_of(run, learn, tmp_path)
    capsys.readouterr()
    run.validate()
    run.predict(losses=True)
    with pytest.warns(UserWarning, match="this loader shuffles"):
        run.predict(learn.data.train_dl)
    assert state_of(run, learn, tmp_path) == before
    assert capsys.readouterr() == ("", "")


def test_metric_objects_hold_the_validation_afterwards():
    class Count:
        n = 0

        def reset(self):
            self.n = 0

        def update(self, pred, yb):
            self.n += len(yb)

        def compute(self):
            return float(self.n)

    metric, learn = Count(), make_learn()
    run = Runner([AvgStatsCallback(metric)])
    assert run.validate((X[:5], Y[:5]), learn)["Count"] == 5
    assert run.validate(learn=learn)["Count"] == 14 and metric.n == 14
    several = Runner([AvgStatsCallback([PerClassAccuracy(), accuracy])]).validate(learn=learn)
    assert several["per_class_accuracy"].shape == (3,) and isinstance(several["accuracy"], float)


class Double(Callback):
    def begin_batch(self):
        assert not self.in_train
        self.run.xb = self.xb * 2


class Unwrap(Callback):
    def after_pred(self):
        self.run.pred = self.pred[0]


class Watch(Callback):
    """Counts in every event."""

    def __init__(self):
        self.seen = []
        self.batches = 0


for event in set(EVENTS) - {"begin_batch", "after_pred"}:
    setattr(Watch, event, lambda self, event=event: self.seen.append(event))
Watch.begin_batch = lambda self: setattr(self, "batches", self.batches + 1)


def test_callbacks_that_change_batches_and_predictions_take_part_and_others_do_not():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    learn, watch = make_learn(Pair(4, 3)), Watch()
    run = Runner([Double(), Unwrap(), watch])
    expected = F.linear(2 * X, learn.model.weight, learn.model.bias).detach()
    torch.testing.assert_close(run.predict(learn=learn).preds, expected)
    assert run.validate(learn=learn)["loss"] == pytest.approx(F.cross_entropy(expected, Y).item())
    assert watch.seen == [] and watch.batches == 0


def test_a_callback_takes_part_in_the_events_that_it_names():
    class Named(Watch):
        _outside_fit = frozenset(EVENTS)

    cb = Named()
    Runner([cb]).validate((X[:3], Y[:3]), make_learn())
    assert cb.seen == ["begin_fit", "begin_validate", "after_loss", "after_batch", "after_fit"]
    assert cb.batches == 0  # a copy has counted


def test_the_packages_callbacks_that_prepare_a_batch_take_part():
    assert [cls for cls, _, _ in OUTSIDE_FIT] == [CudaCallback, MixedPrecision, BatchTransformXCallback]
    learn = make_learn()
    cbs = [CudaCallback("cpu"), MixedPrecision("bf16"), BatchTransformXCallback(lambda xb: -xb), MixUp()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = outputs(learn, -X).float()
    run = Runner(cbs)
    preds = run.predict(learn=learn).preds
    assert torch.equal(preds, expected) and preds.dtype == torch.float32
    assert not torch.equal(preds, outputs(learn, -X))
    assert run.mixed_precision.scale == 1 and run._parts.claims == {}


def test_the_weights_are_those_that_the_model_holds():
    learn, run = make_learn(), Runner([EMA(0.5)])
    run.fit(1, learn)
    trained = run.predict().preds
    torch.testing.assert_close(trained, outputs(learn))
    run.ema.put()
    assert not torch.allclose(run.predict().preds, trained)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, a, b):
        return {"out": self.lin(a - b), "parts": (a, [b])}


@pytest.mark.parametrize("form", ["nested", "named", "unpack", "no target"])
def test_several_inputs_and_outputs_are_joined_leaf_by_leaf(form):
    a, b = X, 2 * X
    batch = {
        "nested": ((a, b), Y),
        "named": {"a": a, "b": b, "label": Y},
        "unpack": (Y, a, b),
        "no target": (a, b),
    }[form]
    unpack = (lambda batch: (batch[1:], {}, batch[0])) if form == "unpack" else None
    loss = lambda pred, yb: F.cross_entropy(pred["out"], yb)  # noqa: E731
    data = SimpleNamespace(train_dl=[batch], valid_dl=[batch, batch])
    learn = make_learn(Two(), loss, data, unpack=unpack)
    found = Runner().predict(learn=learn, losses=form != "no target")
    torch.testing.assert_close(found.preds["out"], learn.model.lin(-torch.cat([X, X])).detach())
    assert torch.equal(found.preds["parts"][1][0], torch.cat([b, b]))
    if form == "no target":
        assert found.targets is None
    else:
        assert torch.equal(found.targets, torch.cat([Y, Y])) and found.losses.shape == (28,)
        assert Runner().validate(learn=learn)["loss"] == pytest.approx(found.losses.mean().item(), rel=1e-5)
    if form == "nested":
        assert torch.equal(Runner().predict([[a, b], Y], learn).targets, Y)  # a batch of a DataLoader
    assert torch.equal(Runner().predict(batch, learn).preds["out"], found.preds["out"][:14])


def test_inputs_alone_do_not_go_through_the_learners_unpack():
    learn = make_learn(unpack=lambda batch: ((batch["x"],), {}, batch["y"]))
    torch.testing.assert_close(Runner().predict(X, learn).preds, outputs(learn))
    assert torch.equal(Runner().predict({"x": X, "y": Y}, learn).targets, Y)


def test_a_model_that_returns_its_loss():
    class Own(nn.Linear):
        def forward(self, x, y=None):
            out = super().forward(x)
            return {"out": out, "loss": F.cross_entropy(out, y)}

    learn = make_learn(Own(4, 3), None)
    expected = F.cross_entropy(F.linear(X, learn.model.weight, learn.model.bias), Y).item()
    assert Runner().validate(learn=learn)["loss"] == pytest.approx(expected, rel=1e-5)
    preds = Runner().predict(learn=learn).preds
    assert preds["out"].shape == (14, 3) and preds["loss"].shape == (3,)  # one a batch
    with pytest.raises(ValueError, match="need a loss function; this learner has none"):
        Runner().predict(learn=learn, losses=True)


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Named(OrderedDict):
    """As transformers' outputs."""


def test_outputs_with_named_fields_keep_their_type_in_both_precisions():
    class Own(nn.Linear):
        def forward(self, x, y):
            out = super().forward(x)
            return self.kind({"loss": F.cross_entropy(out, y), "logits": out})

    for kind, read in ((lambda fields: Output(**fields), Output.__getattribute__), (Named, Named.__getitem__)):
        Own.kind = staticmethod(kind)
        preds = Runner([MixedPrecision()]).predict(learn=make_learn(Own(4, 3), None)).preds
        assert type(preds) in (Output, Named)
        assert read(preds, "logits").shape == (14, 3) and read(preds, "logits").dtype is torch.float32


class Opaque(nn.Module):
    """Has no reduction that could be turned off."""

    def forward(self, pred, yb):
        return F.cross_entropy(pred, yb)


class Deaf(Opaque):
    reduction = "mean"  # which forward does not read


@pytest.mark.parametrize(
    "loss_func",
    [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), Opaque(), Deaf()],
    ids=["function", "module", "sum", "sample by sample", "reduction not read"],
)
def test_losses_of_samples(loss_func):
    learn = make_learn(loss_func=loss_func)
    losses = Runner().predict(learn=learn, losses=True).losses
    torch.testing.assert_close(losses, F.cross_entropy(outputs(learn), Y, reduction="none"))
    assert getattr(loss_func, "reduction", "mean") in ("mean", "sum")


@pytest.mark.parametrize(("reduction", "places"), [("mean", 1), ("sum", 4)])
def test_the_loss_of_a_sample_is_reduced_as_the_loss_function_reduces(reduction, places):
    model, yb = nn.Linear(4, 4), torch.randn(14, 4)
    learn = make_learn(model, nn.MSELoss(reduction=reduction), SimpleNamespace(train_dl=None, valid_dl=[(X, yb)]))
    losses = Runner().predict(learn=learn, losses=True).losses
    torch.testing.assert_close(losses, (model(X) - yb).square().mean(1).detach() * places)


class Left(nn.Module):
    """The mean of each image's left column, and its square."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        left = x[..., 0].flatten(1).mean(1)
        return torch.stack([left * self.w, left.square()], 1)


def test_tta_averages_the_outputs_of_all_versions():
    x, learn = torch.rand(5, 1, 4, 4), make_learn(Left(), F.mse_loss)
    plain, flipped, negative = (learn.model(v).detach() for v in (x, x.flip(-1), -x))
    run = Runner()
    torch.testing.assert_close(run.predict(x, learn, tta="hflip").preds, (plain + flipped) / 2)
    both = ["hflip", lambda xb: -xb]
    torch.testing.assert_close(run.predict(x, learn, tta=both).preds, (plain + flipped + negative) / 3)
    torch.testing.assert_close(run.predict(x, learn, tta="vflip").preds, plain)
    found = run.predict((x, torch.zeros(5, 2)), learn, tta="hflip", losses=True)
    torch.testing.assert_close(found.losses, found.preds.square().mean(1))


def test_versions_of_tta_that_change_their_batch_in_place_change_no_other():
    x = torch.randn(5, 1, 4, 4)
    kept, learn = x.clone(), make_learn(nn.Sequential(nn.ReLU(inplace=True), Left()))
    want = sum(learn.model(v.clone()) for v in (x, -x, x + 1)).detach() / 3
    torch.testing.assert_close(Runner().predict(x, learn, tta=[torch.neg_, lambda xb: xb.add_(1)]).preds, want)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("tta", "x", "model", "message"),
    [
        ("hflop", torch.rand(2, 1, 4, 4), Left(), "'hflip', 'vflip', a function of xb, .*got 'hflop'.*mean 'hflip'"),
        (4, torch.rand(2, 1, 4, 4), Left(), "got 4"),
        ("hflip", X, nn.Linear(4, 3), r"needs batches of images \(N, C, H, W\); got .*\(6, 4\)"),
        ("hflip", torch.rand(2, 1, 4, 4), nn.Conv2d(1, 1, 1), r"shape \(2, 1, 4, 4\): an output with places"),
    ],
)
def test_tta_refuses(tta, x, model, message):
    with pytest.raises(ValueError, match=message):
        Runner().predict(x, make_learn(model), tta=tta)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (X[0], ValueError, r"shape \(4,\): for a single sample x pass x\[None\]"),
        ([], ValueError, "at least one batch; the loader gave none"),
        ("images", TypeError, "must be a loader, a DataBunch, .* got 'images'"),
        (7, TypeError, "got 7"),
        (SimpleNamespace(valid_dl=None), ValueError, "no validation loader"),
    ],
)
def test_data_that_cannot_be_predicted_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        Runner().predict(data, make_learn())


def test_batches_of_other_shapes_are_refused_with_what_to_do():
    data = [torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)]
    with pytest.raises(ValueError, match=r"differ: \(2, 3, 3\), \(2, 5, 3\): predict batch by batch"):
        Runner().predict(data, make_learn(nn.Linear(4, 3)))


def test_outputs_may_be_a_dictionary_with_a_default():
    class Made(nn.Linear):
        def forward(self, x):
            return defaultdict(list, out=super().forward(x))

    preds = Runner([MixedPrecision()]).predict(X, make_learn(Made(4, 3))).preds
    assert preds["out"].shape == (14, 3) and preds["other"] == []


@pytest.mark.parametrize("batch", [(X, Y[:-1]), (X[:-1], Y)])
def test_losses_need_a_target_for_each_sample(batch):
    with pytest.raises(ValueError, match="losses need a target for each sample"):
        Runner().predict(batch, make_learn(), losses=True)


def test_outputs_without_a_row_for_each_sample_are_refused():
    with pytest.raises(ValueError, match=r"a batch of 6 gave shape \(3, 6\)"):
        Runner().predict(
            X, make_learn(type("T", (nn.Linear,), {"forward": lambda m, x: nn.Linear.forward(m, x).T})(4, 3))
        )
    with pytest.raises(ValueError, match="got one number: set self.run.pred in after_pred"):
        Runner().predict(X, make_learn(type("S", (nn.Linear,), {"forward": lambda m, x: m.weight.sum()})(4, 3)))


def test_validate_refuses_no_data_and_a_run_without_learner():
    with pytest.raises(ValueError, match="validate needs at least one batch"):
        Runner().validate([], make_learn())
    with pytest.raises(TypeError, match=r"has not trained yet: name the learner, run.validate\(learn=learn\)"):
        Runner().validate()


@pytest.mark.parametrize("what", ["validate", "predict"])
def test_inside_a_fit_both_are_refused_and_a_second_runner_serves(what):
    class Calls(Callback):
        def after_step(self):
            getattr(Runner(), what)(learn=self.learn)
            assert self.learn.model.training
            getattr(self.run, what)()

    learn, run = make_learn(), Runner([Calls()])
    with pytest.raises(RuntimeError, match=rf"{what} was called inside a fit.*second Runner"):
        run.fit(1, learn)
    getattr(run, what)()  # the run is usable afterwards


@pytest.mark.parametrize("error", [CancelBatchException, CancelEpochException, CancelTrainException])
def test_a_cancel_is_no_silent_hole_in_the_predictions(error):
    class Cancels(Callback):
        def begin_batch(self):
            raise error

    learn, run = make_learn(), Runner([Cancels()])
    with pytest.raises(RuntimeError, match=f"a callback cancelled .*{error.__name__}"):
        run.predict(learn=learn)
    assert learn.model.training


def test_an_error_leaves_modes_and_random_states_as_they_were():
    learn, state = make_learn(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Runner().predict(torch.randn(2, 5), learn)
    torch.set_rng_state(state)
    with pytest.raises(ValueError, match="losses need targets"):
        Runner().predict(X, learn, losses=True)
    assert learn.model.training and torch.equal(torch.get_rng_state(), state)


def test_different_devices_are_named():
    learn = make_learn()
    learn.model.to("meta")
    with pytest.raises(RuntimeError, match="the model is on meta, the batch on cpu: give the run a CudaCallback"):
        Runner().predict(X, learn)
