"""EarlyStopping: when it ends a fit, what it reports, and how it resumes."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastrbn.callbacks import AvgStatsCallback, Checkpoint, EarlyStopping, SaveBest
from fastrbn.learn import Callback, Learner, Runner

VALUES = [5.0, 4.0, 3.0, 3.5, 2.9, 2.95, 2.92, 2.91, 2.0, 1.0]


def make_learn(values=VALUES):
    """Sets the validation loss of epoch i to values[i]."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)

    def loss_func(pred, yb):
        return pred.mean() if model.training else values[loss_func.run.epoch] + 0 * pred.mean()

    batch = [(torch.randn(3, 2), torch.zeros(3))]
    data = SimpleNamespace(train_dl=batch, valid_dl=batch)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.01), loss_func, data)


def last_row(pred, yb):
    return pred.mean()


def fit(learn, epochs, *cbs, resume=None):
    run = Runner([AvgStatsCallback(last_row), *cbs])
    learn.loss_func.run = run
    run.logger = lambda line: None
    run.fit(epochs, learn, resume=resume)
    return run


@pytest.mark.parametrize(
    ("kwargs", "epochs", "best_epoch", "sentence"),
    [
        ({"patience": 1}, 4, 2, "valid_loss has not fallen for 1 epoch (best: 3 in epoch 2)"),
        ({"patience": 2}, 7, 4, "valid_loss has not fallen for 2 epochs (best: 2.9 in epoch 4)"),
        ({"patience": 3}, 8, 4, "valid_loss has not fallen for 3 epochs (best: 2.9 in epoch 4)"),
        ({"patience": 4}, 10, 9, None),
        (
            {"patience": 2, "min_delta": 0.5},
            5,
            2,
            "valid_loss has not fallen by more than 0.5 for 2 epochs (best: 3 in epoch 2)",
        ),
        ({"patience": 2, "mode": "max"}, 3, 0, "valid_loss has not risen for 2 epochs (best: 5 in epoch 0)"),
    ],
    ids=str,
)
def test_it_ends_after_patience_epochs_without_improvement(kwargs, epochs, best_epoch, sentence):
    run = fit(make_learn(), 10, EarlyStopping(**kwargs))
    stopping = run.early_stopping
    assert len(run.avg_stats.history) == epochs
    assert run.stop_reason == sentence
    assert (stopping.best_epoch, stopping.best) == (best_epoch, pytest.approx(VALUES[best_epoch]))
    assert run.epoch == epochs - 1


def test_nan_is_no_improvement():
    run = fit(make_learn([math.nan] * 5), 5, EarlyStopping(patience=2))
    assert run.stop_reason == "valid_loss has not fallen for 2 epochs (it was NaN throughout)"
    assert len(run.avg_stats.history) == 2


def test_other_callbacks_see_the_last_epoch(tmp_path):
    class Counts(Callback):
        n = 0

        def after_epoch(self):
            self.n += 1

        def state_dict(self):
            return {}

    run = fit(
        make_learn(), 10, EarlyStopping(patience=2), Counts(), Checkpoint(tmp_path / "c"), SaveBest(tmp_path / "b")
    )
    assert run.counts.n == 7 == len(run.avg_stats.history)
    assert max(p.name for p in (tmp_path / "c").iterdir()).endswith("step-7.pt")
    assert run.save_best.best_epoch == 4


@pytest.mark.parametrize(("number", "epochs"), [*((n, 10) for n in range(1, 8)), (7, 7)])
def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(number, epochs, tmp_path):
    whole = fit(make_learn(), epochs, EarlyStopping(patience=2), Checkpoint(tmp_path / "c", keep=None))
    (file,) = (tmp_path / "c").glob(f"checkpoint-*{number}-step-*.pt")
    again = fit(make_learn(), epochs, EarlyStopping(patience=2), Checkpoint(tmp_path / "c", keep=None), resume=file)
    assert again.stop_reason == whole.stop_reason
    assert len(again.avg_stats.history) == 7
    assert vars(again.early_stopping)["best"] == whole.early_stopping.best
    assert again.n_iter == whole.n_iter


def test_a_new_fit_starts_counting_again():
    stopping = EarlyStopping(patience=2)
    fit(make_learn(), 10, stopping)
    run = fit(make_learn(), 2, stopping)
    assert run.stop_reason is None and stopping.waited == 0 and stopping.best_epoch == 1


def test_a_metric_of_unknown_direction_needs_a_mode():
    with pytest.raises(
        ValueError, match=r"EarlyStopping: mode must say whether 'last_row' should fall \('min'\) or rise"
    ):
        EarlyStopping("last_row")
    run = fit(make_learn(), 2, EarlyStopping("last_row", mode="max"))
    assert run.early_stopping.best is not None


def test_an_unknown_name_is_an_error():
    with pytest.raises(
        ValueError, match="EarlyStopping: monitor must be one of train_loss, .*; got 'val_loss'. Did you mean"
    ):
        fit(make_learn(), 1, EarlyStopping("val_loss"))
    with pytest.raises(
        ValueError, match="EarlyStopping needs an AvgStatsCallback in the run, which measures 'valid_loss'"
    ):
        Runner([EarlyStopping()]).fit(1, make_learn())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"patience": 0}, "patience must be a whole number, 1 or more; got 0"),
        ({"patience": 2.5}, "patience must be a whole number, 1 or more; got 2.5"),
        ({"min_delta": -1}, "min_delta must be a finite number, 0 or more; got -1"),
        ({"min_delta": math.nan}, "min_delta must be a finite number, 0 or more; got nan"),
    ],
    ids=str,
)
def test_invalid_arguments_are_errors(kwargs, words):
    with pytest.raises(ValueError, match=words):
        EarlyStopping(**kwargs)


@pytest.mark.parametrize("cls", [EarlyStopping, lambda name: SaveBest(monitor=name)], ids=["EarlyStopping", "SaveBest"])
def test_only_whole_words_decide_the_direction(cls):
    for name in ("inaccuracy", "valid_inaccuracy", "gloss"):
        with pytest.raises(ValueError, match=f"mode must say whether '{name}' should fall .* or rise"):
            cls(name)
    rising = ("accuracy", "valid_accuracy_2", "top5_accuracy", "f1", "valid_f1_2", "micro_f1", "iou")
    assert {cls(name).monitor.mode for name in rising} == {"max"}
    assert {cls(name).monitor.mode for name in ("loss", "valid_loss")} == {"min"}
