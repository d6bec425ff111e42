"""Summaries: the table, and that model, random states and loaders are unchanged afterwards."""

import random
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrbn
from fastrbn import (
    BatchLoader,
    BatchTransformXCallback,
    Callback,
    DataBunch,
    HaltOnNaN,
    Learner,
    Recorder,
    Runner,
    RunningBatchNorm,
    model_summary,
)


class Net(nn.Module):
    """Shared parameters, a module that is not called, one that is called twice, a tuple as output, a frozen layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), RunningBatchNorm(6, recipe="course"), nn.Dropout(0.5))
        self.act, self.unused, self.rnn = nn.ReLU(), nn.Linear(2, 2), nn.GRU(6, 4)
        self.tied, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.tied.weight = self.body[0].weight
        self.gain = nn.Parameter(torch.ones(3))
        self.body[0].bias.requires_grad_(False)
        self.seen, self.last = 0, torch.zeros(1)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        self.count += 1
        self.replaced = self.replaced + 1
        self.last = x.sum() + torch.rand(()) + random.random()
        self.new = "made in the pass"
        x = self.act(self.bn(self.tied(self.act(self.body(x)))))
        return self.rnn(x)


def net():
    torch.manual_seed(0)
    return Net()


def rows_of(found):
    return {row.name: row for row in found.rows}


def test_the_table_has_modules_shapes_parameters_and_recipes():
    found = model_summary(net(), torch.randn(5, 6))
    rows = rows_of(found)
    assert list(rows)[:4] == ["(itself)", "body", "body.0", "body.1"]
    assert (rows["(itself)"].params, rows["(itself)"].output) == (3, "(5 × 4, 1 × 4)")
    assert (rows["body.0"].output, rows["body.0"].params, rows["body.0"].trainable) == ("5 × 6", 42, 36)
    assert (rows["body"].params, rows["body.1"].norm) == (0, "recipe course, mom 0.1")
    assert rows["bn"].norm == "momentum 0.1"
    assert (rows["act"].calls, rows["unused"].calls) == (2, 0)
    assert (rows["tied"].params, rows["tied"].shared) == (6, ["body.0.weight"])
    assert found.input == "5 × 6"


def test_the_totals_are_those_of_the_model():
    model = net()
    found = model_summary(model, torch.randn(5, 6))
    params = list(model.parameters())
    assert found.params == sum(p.numel() for p in params) == sum(row.params for row in found.rows)
    assert found.trainable == found.params - 6 == sum(row.trainable for row in found.rows)
    assert found.buffers == sum(b.numel() for b in model.buffers())
    assert found.bytes == sum(t.numel() * t.element_size() for t in (*params, *model.buffers()))


def test_it_prints_as_a_table():
    text = str(model_summary(net(), torch.randn(5, 6)))
    lines = text.splitlines()
    assert lines[0] == "input: 5 × 6"
    assert lines[1].split() == ["module", "type", "output", "parameters", "trainable", "norm"]
    assert any(line.split()[:4] == ["0", "Linear", "5", "×"] and line.endswith("  42  36") for line in lines)
    assert any(line.startswith("unused") and "not called" in line for line in lines)
    assert any("6 + body.0.weight" in line for line in lines)
    assert "parameters: 225, trainable 219, frozen 6" in text
    assert "norm" not in str(model_summary(nn.Linear(2, 2), torch.randn(1, 2)))


def state(model):
    return {
        "tensors": {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())},
        "ids": [id(t) for t in (*model.parameters(), *model.buffers())],
        "modes": [m.training for m in model.modules()],
        "plain": (model.seen, model.last.clone(), hasattr(model, "new")),
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "grads": [p.grad is None for p in model.parameters()],
        "random": (torch.get_rng_state(), random.getstate()),
    }


def check_same(a, b):
    for name, value in a["tensors"].items():
        assert torch.equal(value, b["tensors"][name]), name
    assert torch.equal(a["random"][0], b["random"][0])
    assert a["random"][1] == b["random"][1]
    assert torch.equal(a["plain"][1], b["plain"][1])
    assert (a["plain"][0], a["plain"][2]) == (b["plain"][0], b["plain"][2])
    assert all(a[key] == b[key] for key in ("ids", "modes", "hooks", "grads"))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_unchanged_afterwards(fails):
    model = net()
    model(torch.randn(5, 6))
    model.body.eval()
    before = state(model)
    if fails:
        with pytest.raises(RuntimeError, match=r"failed on a batch of shape 5 × 7, RuntimeError: .*summary\(xb\)"):
            model_summary(model, torch.randn(5, 7))
            torch.manual_seed(1)
    else:
        x = torch.ones(5, 6)
        model_summary(model, x)
    after = state(model)
    if fails:
        before["random"] = after["random"]  # the batch itself was drawn
    check_same(before, after)


def test_ctrl_c_during_the_pass_leaves_the_model_unchanged():
    model, before = net(), None
    model.act.forward = lambda x: (_ for _ in ()).throw(KeyboardInterrupt)
    before, x = state(model), torch.ones(5, 6)
    with pytest.raises(KeyboardInterrupt):
        model_summary(model, x)
    check_same(before, state(model))


def test_a_pending_backward_still_works():
    model = net()
    out = model(torch.randn(5, 6))[0].sum()
    model_summary(model, torch.randn(5, 6))
    out.backward()
    assert model.body[0].weight.grad is not None


def test_a_lazy_model_is_summarised_from_a_copy():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    random = torch.get_rng_state()
    found = model_summary(model, torch.randn(2, 4, generator=torch.Generator()))
    assert [(row.kind, row.output, row.params) for row in found.rows] == [
        ("Linear", "2 × 3", 15),
        ("BatchNorm1d", "2 × 3", 6),
    ]
    assert (found.params, found.trainable, found.buffers) == (21, 21, 7)
    assert "lazy, as this batch would initialise them: 0, 1" in str(found)
    assert all(map(nn.parameter.is_lazy, model.parameters()))
    assert torch.equal(torch.get_rng_state(), random)


def test_lazy_modules_that_the_batch_does_not_reach_are_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    model.forward = model[0].forward
    model.spare = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="does not reach the lazy modules of spare.weight, spare.bias"):
        model_summary(model, torch.randn(2, 4))


def test_models_that_write_to_parameters_are_refused():
    class Writes(nn.Linear):
        def forward(self, x):
            self.weight.data.add_(0)
            with torch.no_grad():
                self.weight.add_(1)
            return x

    with pytest.raises(RuntimeError, match=r"writes to its parameters \(0.weight\)"):
        model_summary(nn.Sequential(Writes(2, 2)), torch.randn(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precision_are_summarised(dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).to(dtype)
    assert model_summary(model, torch.randn(2, 4, dtype=dtype)).bytes == 15 * torch.finfo(dtype).bits // 8


def test_inputs_and_outputs_may_be_nested():
    class Dicts(nn.Module):
        def forward(self, x):
            return {"a": x["b"][0], "n": 3}

    found = model_summary(nn.Sequential(Dicts()), {"b": [torch.ones(2, 3)]})
    assert (found.input, found.rows[0].output) == ("{b: (2 × 3)}", "{a: 2 × 3, n: int}")


# --- from a learner and a run


def learner(shuffle=True):
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    data = DataBunch(BatchLoader(x, y, 8, shuffle=shuffle, seed=3), BatchLoader(x, y, 8), c=3, c_in=1)
    model = nn.Sequential(nn.Linear(6, 4), RunningBatchNorm(4), nn.Linear(4, 3))
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, data)


def test_a_learner_is_summarised_from_its_first_batch_with_its_optimiser():
    learn = learner()
    text = str(learn.summary())
    assert text.startswith("input: 8 × 6\n")
    assert "optimiser: SGD, 1 param group, lr 0.1; loss: cross_entropy" in text
    learn.opt = torch.optim.SGD(learn.model[0].parameters(), lr=0.1)
    assert "trainable, but not in the optimiser: 1.weight, 1.bias, 2.weight and 1 more" in str(learn.summary())


@pytest.mark.parametrize("kind", ["BatchLoader", "DataLoader"])
def test_a_summary_does_not_change_the_fit_after_it(kind):
    ends = []
    for looks in (False, True):
        learn = learner()
        if kind == "DataLoader":
            learn.data.train_dl = torch.utils.data.DataLoader(learn.data.train_dl.dataset, 8, shuffle=True)
        run = Runner([Recorder])
        torch.manual_seed(5)
        if looks:
            run.summary(learn=learn)
        run.fit(1, learn)
        if looks:
            run.summary()
        run.fit(1, learn)
        ends.append(run.recorder.losses)
    assert ends[0] == ends[1]


def test_a_run_applies_only_callbacks_that_change_batches():
    class Counts(Callback):
        def begin_fit(self):
            raise AssertionError("no fit begins")

        def begin_batch(self):
            raise AssertionError("it needs a begin_fit")

    class Halves(Callback):
        def begin_batch(self):
            self.run.xb = self.xb[:4]

    learn = learner()
    run = Runner([Counts, Halves, HaltOnNaN, BatchTransformXCallback(lambda x: x * 0), Recorder])
    found = run.summary(learn=learn)
    assert found.input == "4 × 6"
    assert "callbacks: " in found.notes[-1]
    assert run.xb is None
    assert run.summary(torch.ones(2, 6), learn).input == "2 × 6"


def test_a_missing_learner_or_batch_is_named():
    with pytest.raises(TypeError, match=r"has not trained yet: name the learner, run.summary\(learn=learn\)"):
        Runner().summary()
    learn = learner()
    learn.data = types.SimpleNamespace(train_dl=iter([]), valid_dl=None)
    with pytest.raises(ValueError, match="would be missing in the fit"):
        learn.summary()
    learn.data.train_dl = []
    with pytest.raises(ValueError, match="has no batch to try"):
        learn.summary()


def test_it_is_public():
    assert fastrbn.model_summary is model_summary
