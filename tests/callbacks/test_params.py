"""ParamMagnitudes: the numbers are those of the parameters, on the host once an epoch, and in a file if wanted."""

import csv
import math
import os

import pytest
import torch
from torch import nn

from fastrbn.callbacks import ParamMagnitudes
from fastrbn.callbacks.params import _magnitudes
from fastrbn.learn import Callback, CancelBatchException, Runner


class Copies(Callback):
    """Parameters and gradients after each step."""

    _order = 5

    def begin_fit(self):
        self.params, self.grads = [], []

    def after_step(self):
        model = self.run.model
        self.params.append([p.detach().clone() for p in model.parameters()])
        self.grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])


def by_hand(rows, stat):
    def one(t):
        if t is None:
            return math.nan
        t = t.double()
        return (t.abs().max() if stat == "max" else t.pow(2).mean().sqrt()).item()

    return torch.tensor([[one(t) for t in row] for row in rows])


def test_the_values_are_those_of_the_parameters(make_learn):
    learn = make_learn()
    run = Runner([ParamMagnitudes(grads=True), Copies])
    run.fit(2, learn)
    m = run.param_magnitudes
    assert m.names == [n for n, _ in learn.model.named_parameters()]
    assert m.steps == list(range(8))
    assert list(m.values) == ["max", "rms", "grad_max", "grad_rms"]
    for stat in ("max", "rms"):
        torch.testing.assert_close(m.values[stat], by_hand(run.copies.params, stat))
        torch.testing.assert_close(m.values[f"grad_{stat}"], by_hand(run.copies.grads, stat))
    assert m.values["max"].dtype == torch.float32


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
    """Parameters of several types: half precision, none at all, complex, not used, frozen."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.sixteen = nn.Parameter(torch.full((3,), 300.0, dtype=torch.float16))
        self.empty = nn.Parameter(torch.empty(0))
        self.complex = nn.Parameter(torch.tensor([3 + 4j]))
        self.unused = nn.Parameter(torch.tensor(-7.0))
        self.frozen = nn.Parameter(torch.tensor([1.0, -1.0]), requires_grad=False)

    def forward(self, x):
        return self.inner(x) + self.sixteen.float() + self.complex.abs()


def test_odd_parameters_have_magnitudes_too(make_learn):
    run = Runner([ParamMagnitudes(grads=True)])
    run.fit(1, make_learn(n_train=1, model=Odd(), opt=lambda p: torch.optim.SGD(p, lr=0.0)))
    m = run.param_magnitudes
    rows = {stat: dict(zip(m.names, m.values[stat][0].tolist())) for stat in m.stats}
    for stat in ("max", "rms"):
        assert rows[stat]["sixteen"] == pytest.approx(300), "half precision overflowed"
        assert rows[stat]["empty"] == 0
        assert rows[stat]["complex"] == pytest.approx(5)
        assert rows[stat]["unused"] == 7
        assert rows[stat]["frozen"] == 1
        assert math.isnan(rows[f"grad_{stat}"]["unused"])
        assert math.isnan(rows[f"grad_{stat}"]["frozen"])
        assert rows[f"grad_{stat}"]["inner.bias"] > 0


def test_sparse_gradients_have_magnitudes():
    g = torch.sparse_coo_tensor([[0, 2, 0]], [1.0, -3.0, 4.0], (5,), check_invariants=True)
    maximum, absent, root, _ = _magnitudes([g, None], ("max", "rms"))
    assert (maximum, root) == (5, math.sqrt(34))
    assert math.isnan(absent)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    scalars = _magnitudes([torch.tensor([1.0, bad]), torch.ones(1)], ("max", "rms"))
    assert [s.isfinite().item() for s in scalars] == [False, True] * 2
    assert scalars[1] == scalars[3] == 1


def grown(first, last, stat="rms"):
    m = ParamMagnitudes(stats=(stat,))
    m.names, m.steps = [f"p{i}" for i in range(len(first))], [0, 1]
    m._host = [torch.tensor([[first], [last]])]
    return m


def test_growth_is_last_over_first_the_largest_first():
    assert grown([1.0, 2.0, 4.0], [2.0, 20.0, 2.0]).growth() == {"p1": 10.0, "p0": 2.0, "p2": 0.5}
    assert list(grown([1.0, 2.0, 4.0], [2.0, 20.0, 2.0]).growth()) == ["p1", "p0", "p2"]


def test_growth_from_nothing_and_to_nan_is_told():
    growth = grown([0.0, 0.0, 1.0, 2.0, 0.0], [1.0, 0.0, math.nan, 2.0, math.nan]).growth()
    assert math.isnan(growth["p2"])
    assert math.isnan(growth["p4"])
    assert (growth["p0"], growth["p1"], growth["p3"]) == (math.inf, 1.0, 1.0)
    assert list(growth) == ["p2", "p4", "p0", "p1", "p3"]


def test_growth_of_nothing_recorded_is_empty():
    assert ParamMagnitudes().growth() == {}


def test_growth_takes_what_was_recorded():
    assert grown([1.0], [3.0], "max").growth() == {"p0": 3.0}
    with pytest.raises(ValueError, match="recorded were max; got 'rms'"):
        grown([1.0], [3.0], "max").growth("rms")


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


@pytest.mark.parametrize("kwargs", [{"every": 0}, {"every": 1.5}, {"stats": ("mean",)}, {"stats": ()}])
def test_wrong_arguments_are_errors(kwargs):
    with pytest.raises(ValueError, match="must be a whole number|stats are some of max, rms"):
        ParamMagnitudes(**kwargs)
