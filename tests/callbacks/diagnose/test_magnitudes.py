"""ParamMagnitudes: the numbers are those of the parameters, on the host once an epoch, and in a file if wanted."""

import copy
import csv
import math
import os
import pickle
import sys

import pytest
import torch
from torch import nn

from fastrbn.callbacks import ParamMagnitudes
from fastrbn.callbacks.diagnose import meter as meter_module
from fastrbn.callbacks.diagnose.meter import Meter, norms
from fastrbn.callbacks.diagnose.rows import Rows
from fastrbn.learn import Callback, CancelBatchException, Runner


class Copies(Callback):
    """Parameters before and after each step, and gradients."""

    _order = 5

    def begin_fit(self):
        self.before, self.params, self.grads = [], [], []

    def after_backward(self):
        self._start = [p.detach().clone() for p in self.run.model.parameters()]

    def after_step(self):
        model = self.run.model
        self.before.append(self._start)
        self.params.append([p.detach().clone() for p in model.parameters()])
        self.grads.append([None if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()])


def by_hand(rows, stat):
    def one(t):
        if t is None:
            return math.nan
        if not t.numel():
            return 0.0
        t = t.to(torch.complex128) if t.is_complex() else t.double()
        return (t.abs().max() if stat == "max" else t.abs().square().mean().sqrt()).item()

    return torch.tensor([[one(t) for t in row] for row in rows])


def updates_by_hand(copies):
    change = [[b - a for a, b in zip(*rows)] for rows in zip(copies.before, copies.params)]
    table = by_hand(change, "rms") / by_hand(copies.before, "rms")
    return torch.where(by_hand(change, "rms") == 0, 0.0, table)


@pytest.fixture(params=["copied", "copied, 3 rows", "on the spot"])
def way(request, monkeypatch):
    """Small models are copied and reduced in blocks, for some steps at a time; large ones are not copied."""
    if request.param == "on the spot":
        monkeypatch.setattr(meter_module, "BYTES_CPU", 0)
    elif request.param == "copied, 3 rows":
        monkeypatch.setattr(meter_module, "ROWS", 3)
        monkeypatch.setattr(meter_module, "BLOCK", 5)
    return request.param


def check(run):
    m, copies = run.param_magnitudes, run.copies
    expected = {
        "max": by_hand(copies.params, "max"),
        "rms": by_hand(copies.params, "rms"),
        "update": updates_by_hand(copies),
        "grad_max": by_hand(copies.grads, "max"),
        "grad_rms": by_hand(copies.grads, "rms"),
    }
    assert list(m.values) == list(expected)
    for stat, table in expected.items():
        torch.testing.assert_close(m.values[stat], table, equal_nan=True, msg=lambda text, s=stat: f"{s}: {text}")
        assert m.values[stat].dtype == torch.float32


ALL = ("max", "rms", "update")


def test_the_values_are_those_of_the_parameters(make_learn, way):
    learn = make_learn(n_train=11)
    run = Runner([ParamMagnitudes(stats=ALL, grads=True), Copies])
    run.fit(2, learn)
    m = run.param_magnitudes
    assert m.names == [n for n, _ in learn.model.named_parameters()]
    assert m.steps == list(range(22))
    check(run)


@pytest.mark.parametrize("stat", ALL)
def test_one_statistic_alone_is_the_same_as_among_others(make_learn, way, stat):
    values = []
    for stats in (ALL, (stat,)):
        run = Runner([ParamMagnitudes(stats=stats)])
        run.fit(1, make_learn(n_train=5))
        values.append(run.param_magnitudes.values[stat])
    assert torch.equal(*values)


def test_gradients_of_updates_alone_are_measured_by_their_rms(make_learn):
    run = Runner([ParamMagnitudes(stats="update", grads=True)])
    run.fit(1, make_learn())
    assert list(run.param_magnitudes.values) == ["update", "grad_rms"]
    assert (run.param_magnitudes.values["grad_rms"] > 0).all()


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6]), (100, [0])])
def test_every_so_many_steps(make_learn, every, steps):
    run = Runner([ParamMagnitudes(every=every, stats=("max",))])
    run.fit(2, make_learn(n_train=4))
    m = run.param_magnitudes
    assert m.steps == steps
    assert m.values["max"].shape == (len(steps), 6)


def test_it_can_be_read_within_an_epoch(make_learn):
    class Reads(Callback):
        _order = 5

        def after_batch(self):
            m = self.run.param_magnitudes
            assert len(m.values["rms"]) == len(m.steps)

    run = Runner([ParamMagnitudes, Reads])
    run.fit(2, make_learn())
    assert len(run.param_magnitudes.values["rms"]) == 8


def test_it_waits_for_the_device_once_an_epoch(make_learn, monkeypatch):
    waits = []
    for name in ("item", "tolist", "cpu", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _r=real: (waits.append(1), _r(self, *a))[1])
    Runner([ParamMagnitudes(grads=True)]).fit(2, make_learn(n_valid=0))
    assert len(waits) == 2


class Odd(nn.Module):
    """Parameters of several types: half precision, none at all, complex, double, unused, frozen, with gaps, turned."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.sixteen = nn.Parameter(torch.full((3,), 300.0, dtype=torch.float16))
        self.empty = nn.Parameter(torch.empty(0))
        self.complex = nn.Parameter(torch.tensor([3 + 4j]))
        self.sixty_four = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
        self.unused = nn.Parameter(torch.tensor(-7.0))
        self.frozen = nn.Parameter(torch.tensor([1.0, -1.0]), requires_grad=False)
        self.gaps = nn.Parameter(torch.arange(8.0)[::2])
        self.turned = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.rows = nn.Embedding(5, 2, sparse=True)

    def forward(self, x):
        more = self.empty.sum() + self.sixty_four.sum() + self.gaps.sum() + (self.turned**2).sum() + self.complex.abs()
        return self.inner(x) + self.sixteen.float() + 1e-3 * more + self.rows(torch.tensor([1, 3, 1])).sum()


def test_odd_parameters_have_magnitudes_too(make_learn, way):
    run = Runner([ParamMagnitudes(stats=ALL, grads=True), Copies])
    learn = make_learn(n_train=4, model=Odd(), opt=lambda p: torch.optim.SGD(p, lr=0.1))
    run.fit(1, learn)
    m = run.param_magnitudes
    row = {name: m.values["rms"][-1, i].item() for i, name in enumerate(m.names)}
    assert row["sixteen"] == pytest.approx(300, rel=0.01), "half precision overflowed"
    assert (row["empty"], row["unused"], row["frozen"]) == (0, 7, 1)
    assert m.values["grad_rms"][:, m.names.index("rows.weight")].isfinite().all(), "sparse"
    check(run)


def test_sparse_gradients_have_magnitudes():
    g = torch.sparse_coo_tensor([[0, 2, 0]], [1.0, -3.0, 4.0], (5,), check_invariants=True)
    assert norms([g, None], "max")[0] == 5
    root, absent = norms([g, None], "rms")
    assert root == math.sqrt(34)
    assert math.isnan(absent)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad, way):
    a, b = nn.Parameter(torch.tensor([1.0, bad])), nn.Parameter(torch.ones(1))
    meter = Meter([("a", a), ("b", b)], ("max", "rms"))
    meter.after()
    assert meter.flush()[0].isfinite().tolist() == [[False, True]] * 2


def test_shared_parameters_count_once_and_lazy_ones_as_soon_as_they_are_there(make_learn):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    model[0].bias = model[1].bias

    def opt(params):
        return torch.optim.SGD([p for p in params if not nn.parameter.is_lazy(p)], lr=0.1)

    lazy = nn.Sequential(nn.LazyLinear(3))
    run = Runner([ParamMagnitudes(stats=ALL, grads=True)])
    run.fit(1, make_learn(model=nn.Sequential(nn.Linear(4, 4), lazy), opt=opt))
    assert run.param_magnitudes.names == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert (run.param_magnitudes.values["rms"] > 0).all()
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    tied[1].weight = tied[0].weight
    run.fit(1, make_learn(model=tied))
    assert run.param_magnitudes.names == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]


def test_parameters_without_memory_are_nan(make_learn):
    model = nn.Sequential(nn.Linear(4, 3))
    model.ghost = nn.Parameter(torch.empty(3, device="meta"))
    model.waits = nn.LazyLinear(3)
    model.forward = model[0].forward
    run = Runner([ParamMagnitudes(stats=ALL)])
    run.fit(1, make_learn(model=model, opt=lambda p: torch.optim.SGD(list(model[0].parameters()), lr=0.1)))
    m = run.param_magnitudes
    assert m.values["rms"].isnan().any(0).tolist() == [n not in ("0.weight", "0.bias") for n in m.names]
    assert list(m.growth()) and set(m.growth()) == {"0.weight", "0.bias"}
    assert m.not_finite == {}, "without memory is not the same as not finite"


class Changes(Callback):
    """Changes the model at step `at`, before it is used."""

    _order = -5

    def __init__(self, at, change):
        self.at, self.change = at, change

    def begin_batch(self):
        if self.run.in_train and self.run.n_iter == self.at:
            self.change(self.run)


def test_a_parameter_that_is_unfrozen_and_given_to_the_optimiser_goes_on(make_learn):
    def unfreeze(run):
        run.model[0].requires_grad_(True)
        run.opt.add_param_group({"params": list(run.model[0].parameters())})

    learn = make_learn(n_train=6, opt=lambda p: torch.optim.SGD(list(p)[2:], lr=0.1))
    learn.model[0].requires_grad_(False)
    run = Runner([ParamMagnitudes(stats=ALL, grads=True), Changes(4, unfreeze), Copies])
    run.fit(1, learn)
    check(run)
    grads, updates = (run.param_magnitudes.values[s][:, 0] for s in ("grad_rms", "update"))
    assert grads.isnan().tolist() == [True] * 4 + [False] * 2
    assert (updates > 0).tolist() == [False] * 4 + [True] * 2


def new_head(run):
    run.model[3] = nn.Linear(8, 3, bias=False)
    run.opt.add_param_group({"params": list(run.model[3].parameters())})


def new_scale(run):
    new_head(run)
    run.model.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(("change", "seen"), [(new_head, 12), (new_scale, 8)])
def test_parameters_that_come_and_go_have_nan_where_they_are_not(make_learn, way, change, seen):
    learn = make_learn(n_train=6)
    run = Runner([ParamMagnitudes(stats=ALL), Changes(8, change)])
    run.fit(3, learn)
    m = run.param_magnitudes
    rms = dict(zip(m.names, m.values["rms"].T))
    assert rms["3.bias"].isnan().tolist() == [False] * seen + [True] * (18 - seen)
    assert rms["0.weight"].isfinite().all()
    assert rms["3.weight"].isfinite().all()
    if change is new_scale:
        assert m.names[-1] == "scale"
        assert rms["scale"].isnan().tolist() == [True] * 8 + [False] * 10
        assert m.growth()["scale"] == 1
    assert 0 < m.growth()["3.bias"] < 10 and m.not_finite == {}, "what is gone did not blow up"
    m.plot()
    m.plot(kind="lines")


def test_a_model_that_is_moved_within_a_fit_is_still_measured(make_learn):
    def moves(run):
        for p in run.model.parameters():
            p.data = p.data.clone()

    run = Runner([ParamMagnitudes(stats=ALL, grads=True), Changes(3, moves), Copies])
    run.fit(1, make_learn(n_train=6))
    check(run)


def test_with_half_the_rows_it_goes_on_when_there_are_too_many_and_says_so(make_learn, way):
    lines = []
    run = Runner([ParamMagnitudes(stats=ALL, keep=6), Copies])
    run.logger = lines.append
    run.fit(3, make_learn(n_train=7))
    m = run.param_magnitudes
    assert m.steps == [0, 8, 16]
    torch.testing.assert_close(m.values["rms"], by_hand([run.copies.params[s] for s in m.steps], "rms"))
    torch.testing.assert_close(m.values["update"], updates_by_hand(run.copies)[m.steps])
    assert len(lines) == 3
    assert "every second one is dropped, and from now on each 2-th step is recorded (keep=6" in lines[0]


def test_reading_between_gradient_and_step_does_no_harm(make_learn, way):
    class Reads(Callback):
        _order = 5

        def after_backward(self):
            self.run.param_magnitudes.growth()

    run = Runner([ParamMagnitudes(stats=ALL, grads=True), Reads, Copies])
    run.fit(1, make_learn(n_train=5))
    check(run)


def test_a_parameter_of_another_shape_is_measured_from_the_next_epoch_on(make_learn, way):
    def grows(run):
        run.model.spare.data = torch.full((7,), 3.0)

    learn = make_learn(n_train=4)
    learn.model.spare = nn.Parameter(torch.ones(2), requires_grad=False)
    run = Runner([ParamMagnitudes(stats=ALL), Changes(4, grows)])
    run.fit(2, learn)
    rms = dict(zip(run.param_magnitudes.names, run.param_magnitudes.values["rms"].T))
    assert rms["spare"].tolist() == [1] * 4 + [3] * 4


@pytest.mark.parametrize("on_host", [0, 3, 4])
def test_of_rows_every_second_one_goes_whether_they_are_on_the_host_or_not(on_host):
    rows = Rows(8, (1,))
    for step in range(8):
        rows.steps.append(step)
        rows.put(torch.tensor([[float(step)]]))
        if step == on_host - 1:
            rows.fetch()
    assert rows.is_full()
    rows.thin()
    assert rows.steps == rows.fetch().flatten().tolist() == [0, 2, 4, 6]
    assert [step for step in range(12) if rows.wants(step, 3)] == [0, 6]


def test_it_goes_on_from_its_state(make_learn, way):
    run = Runner([ParamMagnitudes(stats=ALL, keep=4)])
    run.logger = lambda line: None
    run.fit(1, make_learn(n_train=5))
    m, again = run.param_magnitudes, ParamMagnitudes(stats=ALL, keep=4)
    again.load_state_dict(pickle.loads(pickle.dumps(m.state_dict())))
    assert (again.steps, again.names, again._rows.stride) == (m.steps, m.names, 2)
    assert all(torch.equal(again.values[s], m.values[s]) for s in ALL)
    with pytest.raises(ValueError, match="only with the same stats; the saved ones are max, rms, update, here"):
        ParamMagnitudes().load_state_dict(m.state_dict())


def test_a_copy_within_a_fit_has_what_was_recorded_so_far(make_learn):
    class Copy(Callback):
        def after_backward(self):
            if self.run.n_iter == 2:
                self.run.made = copy.deepcopy(self.run.param_magnitudes)

    run = Runner([ParamMagnitudes(stats=ALL), Copy])
    run.fit(1, make_learn())
    assert run.made.steps == [0, 1]
    assert len(run.made.values["update"]) == 2
    assert len(run.param_magnitudes.values["update"]) == 4


@pytest.mark.cuda
@pytest.mark.parametrize("limit", [2**26, 0], ids=["copied", "on the spot"])
def test_on_a_gpu_it_never_waits_within_an_epoch(make_learn, monkeypatch, limit):
    class NoWaiting(Callback):
        def begin_batch(self):
            torch.cuda.set_sync_debug_mode("error")

        def after_epoch(self):
            torch.cuda.set_sync_debug_mode("default")

        after_fit = after_epoch
        _order = -9

    monkeypatch.setattr(meter_module, "BYTES", limit)
    learn = make_learn(n_train=40, n_valid=0)
    learn.model.cuda()
    learn.data.train_dl = [(x.cuda(), y.cuda()) for x, y in learn.data.train_dl]
    run = Runner([NoWaiting, ParamMagnitudes(stats=ALL, grads=True), Copies])
    run.fit(1, learn)
    torch.testing.assert_close(run.param_magnitudes.values["rms"], by_hand(run.copies.params, "rms"))


def grown(*rows, stat="rms"):
    m = ParamMagnitudes(stats=(stat,))
    m.load_state_dict(
        {
            "steps": torch.arange(len(rows)),
            "names": [f"p{i}" for i in range(len(rows[0]))],
            "values": {stat: torch.tensor(rows)},
        }
    )
    return m


def test_growth_is_last_over_first_the_largest_first():
    assert grown([1.0, 2.0, 4.0], [2.0, 20.0, 2.0]).growth() == {"p1": 10.0, "p0": 2.0, "p2": 0.5}
    assert list(grown([1.0, 2.0, 4.0], [2.0, 20.0, 2.0]).growth()) == ["p1", "p0", "p2"]


def test_growth_from_next_to_nothing_is_measured_against_the_other_parameters():
    first, last = [0.1, 4e-10, 0.0, 0.0, 0.0, 0.2], [100.0, 4e-4, 0.1, 60.0, 0.0, 0.1]
    growth = grown(first, last).growth()
    assert list(growth) == ["p0", "p3", "p1", "p2", "p4", "p5"], "the one that blew up is first"
    assert growth == pytest.approx({"p0": 1000, "p3": 300, "p1": 1, "p2": 1, "p4": 1, "p5": 0.5})
    alone = grown([0.0], [0.01], [0.04])
    assert alone.growth() == pytest.approx({"p0": 4}), "from its first value that is not 0"


def test_what_is_not_finite_is_told_apart_and_growth_goes_up_to_it():
    nan, inf = math.nan, math.inf
    m = grown([1.0, 1.0, 2.0, nan], [8.0, 4.0, 2.0, nan], [nan, inf, 2.0, nan], [nan, nan, 2.0, nan])
    assert m.growth() == {"p0": 8.0, "p1": 4.0, "p2": 1.0}
    assert m.not_finite == {"p3": 0, "p0": 2, "p1": 2}
    assert grown([1.0, 2.0]).not_finite == {}


def test_what_diverges_is_named_with_its_step(make_learn):
    run = Runner([ParamMagnitudes(every=2)])
    run.fit(3, make_learn(opt=lambda p: torch.optim.SGD(p, lr=1e30)))
    m = run.param_magnitudes
    for name, step in m.not_finite.items():
        column = m.values["max"][:, m.names.index(name)]
        assert column.isfinite().tolist() == [s < step for s in m.steps]
    assert m.not_finite


def test_growth_of_nothing_recorded_is_empty():
    assert ParamMagnitudes().growth() == {}


def test_growth_takes_what_was_recorded():
    assert grown([1.0], [3.0], stat="max").growth() == {"p0": 3.0}
    with pytest.raises(ValueError, match="stat must be one of max; got 'rms'"):
        grown([1.0], [3.0], stat="max").growth("rms")


def test_the_file_holds_a_row_a_step(make_learn, tmp_path):
    run = Runner([ParamMagnitudes(every=2)])
    run.fit(1, make_learn(n_train=5))
    m = run.param_magnitudes
    m.to_csv(tmp_path / "new" / "m.csv")
    with open(tmp_path / "new" / "m.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["step"]) for r in rows] == [0, 2, 4]
    assert list(rows[0]) == ["step", *(f"{n}:{s}" for s in ("max", "rms") for n in m.names)]
    read = torch.tensor([[float(r[f"{n}:rms"]) for n in m.names] for r in rows])
    torch.testing.assert_close(read, m.values["rms"])


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(make_learn, tmp_path, monkeypatch):
    (tmp_path / "m.csv").write_text("old")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        ParamMagnitudes().to_csv(tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_batch_without_a_step_leaves_no_row(make_learn):
    class Skips(Callback):
        def after_backward(self):
            if self.run.n_iter == 1:
                raise CancelBatchException

    run = Runner([ParamMagnitudes, Skips])
    run.fit(1, make_learn(n_train=3))
    assert run.param_magnitudes.steps == [0, 2]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_what_was_recorded_survives_what_ends_the_fit(make_learn, error):
    class Ends(Callback):
        def after_batch(self):
            if self.run.n_iter == 3:
                raise error

    run = Runner([ParamMagnitudes, Ends])
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(1, make_learn())
    else:
        run.fit(1, make_learn())
    assert run.param_magnitudes.values["max"].shape == (3, 6)


def test_a_second_fit_begins_anew(make_learn):
    run, learn = Runner([ParamMagnitudes]), make_learn()
    run.fit(2, learn)
    run.fit(1, learn)
    assert run.param_magnitudes.steps == [0, 1, 2, 3]
    assert len(run.param_magnitudes.values["rms"]) == 4


def test_a_model_without_parameters_is_no_trouble(make_learn):
    learn = make_learn(opt=lambda p: torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
    learn.model = nn.Flatten()
    learn.loss_func = lambda p, y: p.mean().requires_grad_()
    run = Runner([ParamMagnitudes])
    run.fit(1, learn)
    assert run.param_magnitudes.values["max"].shape == (0, 0)


@pytest.mark.parametrize(
    "kwargs", [{"every": 0}, {"every": 1.5}, {"every": True}, {"keep": 1}, {"stats": ("mean",)}, {"stats": ()}]
)
def test_wrong_arguments_are_errors(kwargs):
    with pytest.raises(ValueError, match="must be a whole number|stats must be some of max, rms, update; got"):
        ParamMagnitudes(**kwargs)


def test_a_picture_of_another_kind_is_an_error():
    with pytest.raises(ValueError, match="kind must be one of map, lines; got 'pie'"):
        grown([1.0], [2.0]).plot(kind="pie")


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, *args):
        self.scalars.append(args)


def test_tensorboard_gets_a_scalar_for_each_value():
    writer = Writer()
    grown([1.0, 2.0], [3.0, 4.0]).to_tensorboard(writer)
    assert writer.scalars == [("rms/p0", 1, 0), ("rms/p0", 3, 1), ("rms/p1", 2, 0), ("rms/p1", 4, 1)]


def test_without_tensorboard_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard, or use to_csv"):
        grown([1.0], [2.0]).to_tensorboard(tmp_path)
