"""ProgressCallback: bars in terminals and notebooks, plain lines elsewhere, and nothing left open."""

import contextlib
import functools
import io
import sys

import pytest
import torch

from fastrbn import plots
from fastrbn.callbacks import AvgStatsCallback, LR_Find, ProgressCallback, Recorder, accuracy
from fastrbn.callbacks.track import progress as progress_module
from fastrbn.learn import Callback, CancelEpochException, CancelTrainException, Runner


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=["pipe", "terminal"])
def stdout(request):
    return Terminal() if request.param == "terminal" else io.StringIO()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def fit_into(out, run, *args):
    with contextlib.redirect_stdout(out):  # not in the fixture, since pytest replaces it in each phase
        run.fit(*args)


def always_draws(monkeypatch):
    monkeypatch.setattr(progress_module, "_REDRAW", 0.0)
    monkeypatch.setattr(progress_module, "_SPEAK", 0.0)


class Raises(Callback):
    def __init__(self, event, error):
        vars(self)[event] = lambda: self._raise(error)

    def _raise(self, error):
        raise error


def with_stats(*cbs):
    return Runner([*cbs, functools.partial(AvgStatsCallback, accuracy)])


# --- pipes, files, CI logs


def test_in_a_pipe_there_is_a_plain_table(make_learn, capsys):
    run = with_stats(ProgressCallback)
    run.fit(3, make_learn())
    out = capsys.readouterr().out
    assert "\r" not in out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].split() == ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "time"]
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"
    for i, line in enumerate(lines[1:]):
        assert line.split()[0] == str(i)
        assert float(line.split()[1]) == pytest.approx(run.avg_stats.history[i]["train_loss"], abs=1e-6)


@pytest.mark.parametrize("late", [False, True])
def test_it_works_in_whatever_order_callbacks_are_given(make_learn, capsys, late):
    cbs = [functools.partial(AvgStatsCallback, accuracy), Recorder]
    Runner([*cbs, ProgressCallback] if late else [ProgressCallback, *cbs]).fit(1, make_learn())
    assert capsys.readouterr().out.split()[0] == "epoch"


def test_in_a_pipe_a_long_pass_prints_at_most_every_ten_seconds(make_learn, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])

    class Takes(Callback):
        def after_step(self):
            clock[0] += 3.0

    Runner([ProgressCallback, Takes]).fit(1, make_learn(n_train=10, n_valid=0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", loss ")[0] for line in lines] == [
        "epoch 0 (1 of 1) train: 4 of 10 (40 %) batches in 12 s",
        "epoch 0 (1 of 1) train: 8 of 10 (80 %) batches in 24 s",
    ]


def test_an_epoch_has_one_number_in_lines_table_and_history(make_learn, capsys, monkeypatch):
    always_draws(monkeypatch)
    run = with_stats(ProgressCallback)
    run.fit(2, make_learn(n_train=1, n_valid=0))
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] if "batches" in line else int(line.split()[0]) for line in lines] == [
        "epoch 0 (1 of 2) train",
        0,
        "epoch 1 (2 of 2) train",
        1,
    ]
    assert [row["epoch"] for row in run.avg_stats.history] == [0, 1]


def test_lines_show_the_mean_loss(make_learn, capsys, monkeypatch):
    always_draws(monkeypatch)
    run = Runner([ProgressCallback, Recorder])
    run.fit(1, make_learn(n_train=3, n_valid=0))
    losses = run.recorder.losses
    told = [float(line.split("loss ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert told == [pytest.approx(sum(losses[:n]) / n, rel=1e-3) for n in (1, 2, 3)]


def test_a_loader_without_length_has_no_share(make_learn, capsys, monkeypatch):
    always_draws(monkeypatch)
    learn = make_learn(n_train=1, n_valid=0)
    pairs = learn.data.train_dl
    learn.data.train_dl = type("NoLength", (), {"__iter__": lambda self: iter(pairs)})()
    Runner([ProgressCallback]).fit(1, learn)
    assert capsys.readouterr().out.startswith("epoch 0 (1 of 1) train: 1 batches in 0 s")


def test_the_loss_is_not_read_at_each_step(make_learn, monkeypatch):
    waits = []
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: (waits.append(1), real(self))[1])
    Runner([ProgressCallback]).fit(1, make_learn(n_train=100, bs=2))
    assert len(waits) <= 1


# --- terminals


def test_in_a_terminal_there_are_bars_and_the_same_table(make_learn, terminal, monkeypatch):
    always_draws(monkeypatch)
    fit_into(terminal, with_stats(ProgressCallback), 2, make_learn())
    out = terminal.getvalue()
    bars = ("epoch 0 (1 of 2) train: |", "epoch 0 (1 of 2) valid: |", "epoch 1 (2 of 2) train: |")
    for piece in (*bars, "[3/4 ", "loss 0.", "valid_accuracy"):
        assert piece in out, piece
    rows = [line.split("\r")[-1].split() for line in out.split("\n")]
    assert [r[0] for r in rows if r] == ["epoch", "0", "1"]


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("n_train", [0, 2])
def test_empty_loaders_and_fits_work(make_learn, stdout, epochs, n_train):
    fit_into(stdout, Runner([ProgressCallback]), epochs, make_learn(n_train=n_train, n_valid=0))


def test_a_loader_without_length_has_a_bar_without_end(make_learn, terminal, monkeypatch):
    always_draws(monkeypatch)
    learn = make_learn(n_train=3, n_valid=0)
    pairs = learn.data.train_dl
    learn.data.train_dl = type("NoLength", (), {"__iter__": lambda self: iter(pairs)})()
    fit_into(terminal, Runner([ProgressCallback]), 2, learn)
    assert "[2/? " in terminal.getvalue()


def test_many_short_epochs_are_numbered_correctly(make_learn, terminal):
    fit_into(terminal, Runner([ProgressCallback]), 30, make_learn(n_train=1, n_valid=0))
    out = terminal.getvalue()
    assert all(f"epoch {i} ({i + 1} of 30) train:" in out for i in range(30))


def test_a_plot_in_a_terminal_does_nothing(make_learn, terminal):
    fit_into(terminal, with_stats(ProgressCallback(plot=True)), 2, make_learn())
    assert "epoch 1 (2 of 2) valid:" in terminal.getvalue()


@pytest.mark.parametrize("event", ["begin_batch", "after_epoch", "begin_validate"])
@pytest.mark.parametrize(
    "error", [ValueError("broken"), KeyboardInterrupt(), CancelTrainException(), CancelEpochException()], ids=repr
)
def test_after_an_interrupted_fit_the_bar_is_closed_and_the_logger_restored(make_learn, stdout, event, error):
    run = with_stats(ProgressCallback, Raises(event, error))
    logger = run.logger
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            fit_into(stdout, run, 1, make_learn())
    else:
        fit_into(stdout, run, 1, make_learn())
    assert run.logger is logger
    assert run.progress._display is None
    last = stdout.getvalue().rpartition("\n")[2]
    assert last.rpartition("\r")[2].strip() == "", "the next line of output would overwrite the bar"


def test_it_survives_an_earlier_begin_fit_that_fails(make_learn, stdout):
    class First(Raises):
        _order = -5

    with pytest.raises(ValueError, match="broken"):
        fit_into(stdout, Runner([ProgressCallback, First("begin_fit", ValueError("broken"))]), 1, make_learn())


def test_it_works_with_lr_find(make_learn, stdout):
    run = with_stats(ProgressCallback, LR_Find(max_iter=10))
    fit_into(stdout, run, 5, make_learn())
    assert "the whole sweep" in run.stop_reason


def test_other_callbacks_can_log_lines(make_learn, stdout):
    class Says(Callback):
        def after_epoch(self):
            self.run.logger("half way")

    fit_into(stdout, with_stats(ProgressCallback, Says), 1, make_learn())
    assert "half way\n" in stdout.getvalue()


# --- notebooks, with a stand-in for their display; the tests of the notebooks run a real kernel


class FakeMaster:
    def __init__(self, epochs):
        self.lines, self.graphs, self.ended, self.updates = [], [], 0, []

    def update(self, n):
        self.updates.append(n)

    def write(self, line, table=False):
        self.lines.append((line, table))

    def update_graph(self, graphs):
        self.graphs.append([tuple(map(list, g)) for g in graphs])

    def on_iter_end(self):
        self.ended += 1

    def add_child(self, child):
        pass


@pytest.fixture
def notebook(monkeypatch):
    import fastprogress.fastprogress as fp

    made = []
    monkeypatch.setattr(fp, "master_bar", lambda gen: made.append(FakeMaster(len(gen))) or made[-1])
    monkeypatch.setattr(plots, "in_notebook", lambda: True)
    return made


def test_in_a_notebook_a_curve_of_both_losses_grows_with_the_fit(make_learn, notebook):
    run = with_stats(ProgressCallback(plot=True), Recorder)
    run.fit(2, make_learn(n_train=3, n_valid=1))
    (master,) = notebook
    (train_x, train_y), (valid_x, valid_y) = master.graphs[-1]
    assert (train_x, valid_x) == ([3, 6], [3, 6])
    assert valid_y == pytest.approx([row["valid_loss"] for row in run.avg_stats.history])
    assert train_y[0] == pytest.approx(sum(run.recorder.losses[:3]) / 3)
    assert [table for _, table in master.lines] == [True] * 3
    assert master.ended == 1


def test_without_plot_there_is_no_curve(make_learn, notebook):
    Runner([ProgressCallback()]).fit(1, make_learn())
    assert notebook[0].graphs == []


def test_without_fastprogress_there_are_plain_lines(make_learn, notebook, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastprogress.fastprogress", None)
    with_stats(ProgressCallback).fit(1, make_learn())
    assert notebook == []
    assert "train_loss" in capsys.readouterr().out
