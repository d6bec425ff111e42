"""HaltOnNaN's report on disk, in checkpoints, and what the quick looks rest on."""

import json
import math

import pytest
import torch
from torch import nn

from fastrbn.callbacks import HaltOnNaN
from fastrbn.callbacks.diagnose.nonfinite import halt as nonfinite
from fastrbn.callbacks.diagnose.nonfinite.replay import Outputs
from fastrbn.callbacks.diagnose.nonfinite.state import Flags, KeptState
from fastrbn.learn import Callback, Runner
from fastrbn.models import GeneralRelu, Lambda, flatten


def bad_batch(learn, at=2):
    x, y = learn.data.train_dl[at]
    learn.data.train_dl[at] = (x.clone().fill_diagonal_(math.nan), y)
    return learn


def test_the_report_and_the_batch_are_saved_beside_the_run(make_learn, tmp_path):
    learn, halt = bad_batch(make_learn()), HaltOnNaN(path=tmp_path / "run" / "halt")
    run = Runner([halt])
    run.fit(1, learn)
    folder = tmp_path / "run" / "halt"
    assert sorted(f.name for f in folder.iterdir()) == ["nan_batch.pt", "nan_report.json", "nan_report.txt"]
    assert (folder / "nan_report.txt").read_text() == f"{halt.report}\n"
    report = json.loads((folder / "nan_report.json").read_text(), parse_constant=pytest.fail)
    assert (report["sentence"], report["step"], report["where"]) == (run.stop_reason, 2, "input")
    assert report["losses"][-1] == "nan" and len(report["losses"]) == 3
    assert set(report["magnitudes"]) == {name for name, _ in learn.model.named_parameters()}
    batch = torch.load(folder / "nan_batch.pt", weights_only=True)
    assert torch.equal(batch["xb"].nan_to_num(99), learn.data.train_dl[2][0].nan_to_num(99))
    assert torch.equal(batch["yb"], learn.data.train_dl[2][1])


def test_without_a_path_nothing_is_written(make_learn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    halt = HaltOnNaN()
    Runner([halt]).fit(1, bad_batch(make_learn()))
    assert halt.report is not None and list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_is_told_and_halts_all_the_same(make_learn, tmp_path):
    halt = HaltOnNaN(path=tmp_path / "file" / "below")
    (tmp_path / "file").write_text("")
    run = Runner([halt])
    with pytest.warns(UserWarning, match="the report could not be written to .*below: "):
        run.fit(1, bad_batch(make_learn()))
    assert run.stop_reason == halt.report.sentence


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="path must be a folder for the report; .*file is a file"):
        HaltOnNaN(path=tmp_path / "file")


def test_a_checkpoint_is_not_written_of_a_state_that_will_be_found_bad(make_learn, monkeypatch):
    monkeypatch.setattr(nonfinite, "late_device", lambda model: torch.device("cpu"))
    monkeypatch.setattr(Flags, "LAG", 100)

    class Saves(Callback):
        _order = 10

        def begin_fit(self):
            self.states = []

        def after_batch(self):
            if self.run.iter == 3:  # the bad step was the one before; nobody has asked the device yet
                self.run.halt_on_nan.state_dict()
                self.states.append(self.run.model.state_dict())

    halt, saves, learn = HaltOnNaN(), Saves(), bad_batch(make_learn(n_train=8))
    Runner([halt, saves]).fit(1, learn)
    assert saves.states == [] and halt.report.step == 2
    assert all(t.isfinite().all() for t in learn.model.state_dict().values())


def test_what_it_remembers_goes_through_a_checkpoint(make_learn):
    class Copies(Callback):
        def after_batch(self):
            if self.run.n_iter == 3:
                self.run.saved = self.run.halt_on_nan.state_dict()

    run = Runner([HaltOnNaN(), Copies])
    run.fit(1, make_learn())
    again = HaltOnNaN()
    again.load_state_dict(run.saved)
    assert again.state_dict() == run.saved
    assert [step for step, _, _ in run.saved["losses"]] == [0, 1, 2]


class Signs(torch.optim.Optimizer):
    """Swallows what is not finite: the parameter never shows it."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    def step(self):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * p.grad.sign().nan_to_num()


def test_with_an_optimiser_that_hides_it_a_bad_gradient_is_found_before_the_step(make_learn):
    learn, halt = make_learn(opt=Signs), HaltOnNaN()
    learn.model[0].weight.register_hook(lambda g: g * math.inf)
    before = learn.model[0].weight.detach().clone()
    Runner([halt]).fit(1, learn)
    assert (halt.report.step, halt.report.phase, halt.report.where) == (0, "backward", "0.weight")
    assert torch.equal(learn.model[0].weight, before)


def test_a_bad_gradient_outside_of_the_optimiser_is_found(make_learn):
    learn, halt = make_learn(), HaltOnNaN()
    learn.opt = torch.optim.SGD(learn.model[3].parameters(), lr=0.1)
    learn.model[0].weight.register_hook(lambda g: g * math.nan)
    Runner([halt]).fit(1, learn)
    assert (halt.report.phase, halt.report.where) == ("backward", "0.weight")


def test_known_layers_are_hooked_for_full_looks_only():
    class Mine(nn.Module):
        def forward(self, x):
            return x

    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda m, i, o: None)
    model = nn.Sequential(nn.Linear(2, 2), GeneralRelu(), Lambda(flatten), Lambda(lambda x: x), Mine(), hooked)
    outputs = Outputs(model)
    outputs.begin()
    model(torch.ones(1, 2))
    assert [name for name, _ in outputs.take()] == ["3", "4", "5"]
    outputs.begin(full=True)
    model(torch.ones(1, 2))
    assert [name for name, _ in outputs.take()] == ["0", "1", "2", "3", "4", "5"]
    outputs.remove()
    assert [len(m._forward_hooks) for m in model] == [0, 0, 0, 0, 0, 1]


def test_large_weights_make_every_look_a_full_one(make_learn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))  # hides an overflow

    class Grows(Callback):
        def begin_batch(self):
            with torch.no_grad():
                if self.run.n_iter == 1:
                    model[0].weight.fill_(1e30)  # finite outputs still
                if self.run.n_iter == 3:
                    self.run.xb = self.run.xb.abs() * 1e20  # Inf, of which tanh makes 1

    halt = HaltOnNaN()
    Runner([Grows(), halt]).fit(2, make_learn(model=model, opt=lambda p: torch.optim.SGD(p, lr=0.0)))
    assert (halt.report.step, halt.report.phase, halt.report.where) == (3, "forward", "0")


class Many(nn.Module):
    """Tensors of every kind and layout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.low = nn.Parameter(torch.randn(5).half())
        self.wide = nn.Parameter(torch.randn(3, 2).double().t())
        self.pair = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.none = nn.Parameter(torch.empty(0))
        self.register_buffer("count", torch.tensor(-1))
        self.register_buffer("odd", torch.tensor([2**31 - 1, -5, 2**62]))
        self.register_buffer("flag", torch.tensor([True, False, True]))
        self.register_buffer("gaps", torch.arange(12.0).view(3, 4)[:, ::2])
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("absent", None)


def test_state_of_every_kind_is_kept_and_put_back_bit_for_bit():
    torch.manual_seed(0)
    model = Many()
    opt = torch.optim.Adam([model.conv.weight, model.conv.bias])
    kept = KeptState(model, opt, Flags(None))
    kept.save()
    model.conv.weight.grad, model.conv.bias.grad = torch.randn(4, 3, 3, 3), torch.randn(4)
    opt.step()
    assert kept.advance()
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    moments = opt.state[model.conv.weight]["exp_avg"].clone()
    opt.step()
    with torch.no_grad():
        for t in model.state_dict().values():
            t.copy_(torch.zeros_like(t) if t.dtype is torch.bool else t * 0 + 7)
        model.pair[1] = complex(1, math.nan)
    assert not kept.advance() and kept.not_finite() == ["pair"]
    kept.restore()
    for name, t in model.state_dict().items():
        assert torch.equal(t, expected[name]), name
    assert torch.equal(opt.state[model.conv.weight]["exp_avg"], moments)
    assert opt.state[model.conv.weight]["step"] == 1


def test_an_optimisers_plain_counters_are_put_back_and_its_first_state_is_taken_away():
    p = nn.Parameter(torch.ones(2))
    model = nn.Module()
    model.p = p
    opt = torch.optim.SGD([p], lr=0.1)
    kept = KeptState(model, opt, Flags(None))
    kept.save()
    opt.state[p]["count"], opt.state[p]["sum"] = 1, torch.ones(2)
    kept.restore()
    assert not opt.state
    opt.state[p]["count"], opt.state[p]["sum"] = 1, torch.ones(2)
    assert kept.advance()
    opt.state[p]["count"], opt.state[p]["sum"] = 2, torch.full((2,), math.nan)
    assert not kept.advance() and kept.not_finite() == ["p"]
    kept.restore()
    assert opt.state[p]["count"] == 1 and torch.equal(opt.state[p]["sum"], torch.ones(2))


@pytest.mark.parametrize("bad", [1.0, math.nan])
def test_a_gradient_that_cannot_be_written_to_is_looked_at(make_learn, bad):
    class Expands(Callback):
        def after_backward(self):
            self.run.model[3].bias.grad = torch.tensor([bad]).expand(3)

    halt = HaltOnNaN()
    Runner([Expands(), halt]).fit(1, make_learn())
    assert (halt.report and halt.report.where) == (None if bad == 1 else "3.bias")


MOVES = {
    "data": lambda m: setattr(m.conv.weight, "data", torch.randn(4, 3, 3, 3)),
    "size": lambda m: setattr(m.conv.bias, "data", torch.randn(70)),
    "slice": lambda m: setattr(m.conv.bias, "data", m.conv.bias.data[:2]),
    "buffer": lambda m: setattr(m, "count", torch.tensor(8)),
    "dtype": lambda m: m.double(),
    "no buffer": lambda m: setattr(m, "flag", None),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("bad", [False, True])
def test_memory_that_moves_between_two_looks_is_followed(move, bad):
    model = Many()
    kept = KeptState(model, None, Flags(None))
    assert kept.advance()
    MOVES[move](model)
    assert kept.advance()
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for t in model.parameters():
            t.mul_(3)
        model.conv.weight[0, 0, 0, 0] = math.nan if bad else 1.0
    assert kept.advance() is not bad
    expected = expected if bad else {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for t in model.parameters():
            t.mul_(5)
    kept.restore()
    assert list(model.state_dict()) == list(expected)
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_buffer_that_is_replaced_in_each_step_needs_no_new_room():
    model = Many()
    kept = KeptState(model, None, Flags(None))
    assert kept.advance()
    rooms = {id(kept._spare), id(kept._saved[1])}
    for _ in range(5):
        model.count = model.count + 1
        assert kept.advance()
        assert {id(kept._spare), id(kept._saved[1])} == rooms


@pytest.mark.cuda
@pytest.mark.parametrize("opt", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.Adam])
def test_on_cuda_no_step_waits_and_the_bad_step_is_found(make_learn, opt):
    class NoWait(Callback):
        _order = 99

        def begin_batch(self):
            torch.cuda.set_sync_debug_mode("error" if self.run.in_train and self.run.iter < 30 else "default")

        def after_fit(self):
            torch.cuda.set_sync_debug_mode("default")

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).cuda()
    learn, halt = make_learn(model=model, opt=opt, n_train=40), HaltOnNaN()
    learn.data.train_dl = [(x.cuda(), y.cuda()) for x, y in learn.data.train_dl]
    learn.data.valid_dl = None
    learn.data.train_dl[35][0][0, 0] = math.nan
    try:
        Runner([halt, NoWait()]).fit(1, learn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (halt.report.step, halt.report.phase, halt.report.where) == (35, "forward", "input")
    assert all(t.isfinite().all() for t in model.state_dict().values())
