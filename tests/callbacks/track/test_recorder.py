"""Recorder, metrics and averages."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.callbacks import (
    AvgStats,
    AvgStatsCallback,
    Checkpoint,
    EpochMetric,
    Log,
    ParamScheduler,
    Recorder,
    accuracy,
    sched_lin,
)
from fastrbn.learn import Callback, CancelBatchException, CancelTrainException, Runner


class At(Callback):
    """Raises `error` in `event` of the training batch `n_iter == at`."""

    def __init__(self, event, error, at=1, order=-5):
        self._order = order
        vars(self)[event] = lambda: self._raise(error, at)

    def _raise(self, error, at):
        if self.run.in_train and self.run.n_iter == at:
            raise error


class Losses(Callback):
    """Records the loss of each step, waiting for the device each time."""

    def begin_fit(self):
        self.train, self.valid = [], []

    def after_loss(self):
        (self.train if self.run.in_train else self.valid).append(self.run.loss.item())


def make_silent(run):
    run.lines = []
    run.logger = run.lines.append
    return run


# --- Recorder


def test_losses_of_samples_that_a_callback_weighs_are_recorded_as_their_mean(make_learn):
    class Weighs(Callback):
        def begin_fit(self):
            self.run.claim(self, weigh=torch.mean)

    rows, found = [], []
    for loss_func, cbs in ((F.cross_entropy, []), (nn.CrossEntropyLoss(reduction="none"), [Weighs])):
        torch.manual_seed(0)
        log = Log(lambda numbers, step: rows.append(numbers.get("step_loss")), every=1)
        run = make_silent(Runner([*cbs, AvgStatsCallback, Recorder, log]))
        run.fit(1, make_learn(loss_func=loss_func))
        means = [v for name, v in run.avg_stats.history[0].items() if name.endswith("loss")]
        found.append([*means, *run.recorder.losses, *filter(None, rows)])
        rows.clear()
    assert found[1] == pytest.approx(found[0])


def test_recorder_keeps_loss_and_rate_of_each_step(make_learn):
    run = Runner([ParamScheduler("lr", sched_lin(0.1, 0.5)), Recorder, Losses])
    run.fit(2, make_learn(n_train=4))
    assert run.recorder.losses == run.losses.train
    assert len(run.recorder.lrs) == 1
    assert run.recorder.lrs[0] == pytest.approx([0.1 + 0.4 * i / 8 for i in range(8)])
    assert all(type(v) is float for v in run.recorder.losses)


def test_recorder_keeps_the_rates_of_each_group(make_learn):
    def groups(params):
        first, *rest = params
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1)

    run = Runner([Recorder])
    run.fit(1, make_learn(n_train=3, opt=groups))
    assert run.recorder.lrs == [[0.5] * 3, [0.1] * 3]


def test_recorder_can_be_read_within_an_epoch(make_learn):
    class Reads(Callback):
        _order = 5

        def begin_fit(self):
            self.lengths = []

        def after_batch(self):
            self.lengths.append(len(self.run.recorder.losses))

    run = Runner([Recorder, Reads])
    run.fit(1, make_learn(n_train=4, n_valid=1))
    assert run.reads.lengths == [1, 2, 3, 4, 4]


def test_recorder_waits_for_the_device_once_an_epoch(make_learn, monkeypatch):
    waits = []
    for name in ("item", "tolist", "cpu", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _real=real, _name=name: (waits.append(_name), _real(self, *a))[1]
        )
    run = make_silent(Runner([Recorder, functools.partial(AvgStatsCallback, [accuracy, accuracy])]))
    run.fit(1, make_learn(n_train=150, n_valid=3, bs=2))
    assert waits == ["tolist"] * 7  # one column for the recorder, three for training, three for validation


@pytest.mark.parametrize("n", [63, 64, 65, 200])
def test_recorder_loses_nothing_where_scalars_are_joined(make_learn, n):
    run = Runner([Recorder, Losses])
    run.fit(1, make_learn(n_train=n, bs=2))
    assert run.recorder.losses == run.losses.train


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), CancelTrainException()], ids=repr)
def test_the_record_survives_whatever_ends_the_fit(make_learn, error):
    run = Runner([Recorder, At("after_backward", error, at=2)])
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(1, make_learn())
    else:
        run.fit(1, make_learn())
    assert len(run.recorder.losses) == len(run.recorder.lrs[0]) == 3


def test_a_second_fit_starts_a_new_record(make_learn):
    run, learn = Runner([Recorder]), make_learn(n_train=4)
    run.fit(2, learn)
    run.fit(1, learn)
    assert len(run.recorder.losses) == len(run.recorder.lrs[0]) == 4


def test_a_batch_cancelled_before_its_loss_has_no_entry(make_learn):
    run = Runner([Recorder, Losses, At("begin_batch", CancelBatchException())])
    run.fit(1, make_learn(n_train=4))
    assert run.recorder.losses == run.losses.train
    assert len(run.recorder.losses) == len(run.recorder.lrs[0]) == 3


def test_a_rate_in_a_tensor_is_recorded_by_value(make_learn):
    learn = make_learn(n_train=2, opt=lambda p: torch.optim.SGD(p, lr=torch.tensor(0.5)))
    run = Runner([ParamScheduler("lr", sched_lin(0.5, 0.25)), Recorder])
    run.fit(1, learn)
    assert run.recorder.lrs == [[0.5, 0.375]]
    assert all(type(v) is float for v in run.recorder.lrs[0])


def test_the_record_keeps_no_graph(make_learn):
    class Looks(Callback):
        _order = 5

        def after_batch(self):
            assert not any(v.requires_grad for row in self.run.recorder._tape._new for v in row)

    Runner([Recorder, Looks]).fit(1, make_learn())


def test_plotting_before_a_fit_is_an_error():
    assert Recorder().losses == []
    with pytest.raises(ValueError, match="not been part of a fit"):
        Recorder().plot_lr()


# --- accuracy and averages


def test_accuracy_is_the_share_of_correct_rows():
    out = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    value = accuracy(out, torch.tensor([1, 0, 0, 1]))
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.item() == 0.5


def test_accuracy_works_for_each_pixel():
    out = torch.zeros(2, 3, 4, 4)
    out[:, 2] = 1
    assert accuracy(out, torch.full((2, 4, 4), 2)).item() == 1.0


def test_accuracy_does_not_broadcast_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"output of shape \(5, 3\) and targets of shape \(5, 1\)"):
        accuracy(torch.randn(5, 3), torch.zeros(5, 1, dtype=torch.long))


def test_averages_are_weighted_by_batch_size(make_learn):
    learn = make_learn(n_train=2, n_valid=0)
    (xa, ya), (xb, yb) = learn.data.train_dl
    learn.data.train_dl = [(xa, ya), (xb[:1], yb[:1])]
    learn.model = nn.Linear(4, 3)
    learn.opt = torch.optim.SGD(learn.model.parameters(), lr=0.0)
    run = make_silent(Runner([AvgStatsCallback(accuracy)]))
    run.fit(1, learn)
    x, y = torch.cat([xa, xb[:1]]), torch.cat([ya, yb[:1]])
    pred = learn.model(x)
    row = run.avg_stats.history[0]
    assert row["train_loss"] == pytest.approx(F.cross_entropy(pred, y).item(), rel=1e-6)
    assert row["train_accuracy"] == pytest.approx(accuracy(pred, y).item(), rel=1e-6)
    assert run.avg_stats.train_stats.count == 7


def test_a_row_of_history_has_the_listed_columns(make_learn):
    run = make_silent(Runner([functools.partial(AvgStatsCallback, accuracy)]))
    run.fit(3, make_learn())
    rows = run.avg_stats.history
    names = ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "lr", "time"]
    assert [list(r) for r in rows] == [names] * 3
    assert run.avg_stats.columns == names
    assert [r["epoch"] for r in rows] == [0, 1, 2]
    assert all(r["lr"] == 0.1 and r["time"] > 0 for r in rows)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_without_validation_its_columns_are_none(make_learn):
    run = make_silent(Runner([AvgStatsCallback(accuracy)]))
    run.fit(1, make_learn(n_valid=0))
    row = run.avg_stats.history[0]
    assert (row["valid_loss"], row["valid_accuracy"]) == (None, None)
    assert len(run.lines) == 1


def test_it_prints_as_the_course_does(make_learn):
    run = make_silent(Runner([AvgStatsCallback([accuracy])]))
    run.fit(2, make_learn())
    assert [line.split(":")[0] for line in run.lines] == ["train", "valid"] * 2
    row = run.avg_stats.history[1]
    assert run.lines[2] == f"train: [{row['train_loss']:.6g}, {row['train_accuracy']:.6g}]"
    assert run.lines[3] == f"valid: [{row['valid_loss']:.6g}, {row['valid_accuracy']:.6g}]"


def test_it_writes_rows_to_a_logger_that_wants_a_table(make_learn):
    lines = []

    def table(line):
        lines.append(line)

    table.table = True
    run = Runner([AvgStatsCallback(accuracy)])
    run.logger = table
    run.fit(1, make_learn(n_valid=0))
    assert lines[0] == ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "time"]
    assert len(lines) == 2
    assert [type(c) for c in lines[1]] == [str] * 6
    assert (lines[1][0], lines[1][3], lines[1][5]) == ("0", "-", "00:00")
    assert float(lines[1][1]) == pytest.approx(run.avg_stats.history[0]["train_loss"], abs=1e-6)


@pytest.mark.parametrize("event", ["begin_batch", "after_pred"])
def test_a_batch_cancelled_before_its_loss_does_not_count(make_learn, event):
    run = make_silent(Runner([AvgStatsCallback(accuracy), Losses, At(event, CancelBatchException())]))
    run.fit(1, make_learn(n_train=4))
    assert run.avg_stats.train_stats.count == 3 * 6
    assert run.avg_stats.history[0]["train_loss"] == pytest.approx(sum(run.losses.train) / 3)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), CancelTrainException()], ids=repr)
def test_history_survives_whatever_ends_the_fit(make_learn, error):
    run = make_silent(Runner([AvgStatsCallback(accuracy), At("after_loss", error, at=10)]))
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(5, make_learn(n_train=4))
    else:
        run.fit(5, make_learn(n_train=4))
    assert [r["epoch"] for r in run.avg_stats.history] == [0, 1]
    assert run.avg_stats.train_stats.count == 2 * 6, "the averages of the interrupted epoch are lost"


def test_a_second_fit_starts_a_new_history(make_learn):
    run, learn = make_silent(Runner([AvgStatsCallback(accuracy)])), make_learn()
    run.fit(2, learn)
    run.fit(1, learn)
    assert len(run.avg_stats.history) == 1


def broken_metric(pred, yb):
    return pred @ yb


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (broken_metric, RuntimeError, "the metric 'broken_metric' failed: RuntimeError"),
        (functools.partial(broken_metric), RuntimeError, "the metric 'broken_metric' failed"),
        (lambda p, y: p, ValueError, r"the metric 'lambda' must return one number for a batch; got shape \(6, 3\)"),
    ],
)
def test_a_failing_metric_is_named(make_learn, metric, error, message):
    with pytest.raises(error, match=message):
        Runner([AvgStatsCallback(metric)]).fit(1, make_learn())


@pytest.mark.parametrize("wrong", [3, "accuracy", [accuracy, 3]], ids=["number", "name", "list"])
def test_an_invalid_metric_is_an_error_at_construction(wrong):
    with pytest.raises(TypeError, match="a metric must be a function of"):
        AvgStatsCallback(wrong)


def test_metrics_may_return_plain_numbers_and_get_detached_predictions(make_learn):
    def constant(pred, yb):
        assert not pred.requires_grad
        return 2

    run = make_silent(Runner([AvgStatsCallback([constant, constant])]))
    run.fit(1, make_learn())
    assert run.avg_stats.history[0]["train_constant_1"] == run.avg_stats.history[0]["valid_constant_2"] == 2.0


def test_a_metric_of_several_outputs_keeps_no_graph(make_learn):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            out = self.inner(x)
            return out, out.sum()

    class Looks(Callback):
        _order = 5

        def after_batch(self):
            assert not any(v.requires_grad for row in self.run.avg_stats.train_stats._tape._new for v in row)

    run = make_silent(Runner([AvgStatsCallback(lambda p, y: p[1]), Looks]))
    run.fit(1, make_learn(model=Two(), loss_func=lambda p, y: F.cross_entropy(p[0], y)))
    assert math.isfinite(run.avg_stats.history[0]["train_lambda"])


def test_inputs_in_tuples_and_dictionaries_count_by_their_first(make_learn):
    class Two(nn.Module):
        def __init__(self, key):
            super().__init__()
            self.inner, self.key = nn.Linear(4, 3), key

        def forward(self, x):
            return self.inner(x[self.key])

    for key, wrap in ((0, lambda x: (x, x)), ("a", lambda x: {"a": x})):
        learn = make_learn(model=Two(key), n_valid=0)
        learn.data.train_dl = [(wrap(x), y) for x, y in learn.data.train_dl]
        run = make_silent(Runner([AvgStatsCallback()]))
        run.fit(1, learn)
        assert run.avg_stats.train_stats.count == 24


def test_an_infinite_average_is_shown_unchanged(make_learn):
    run = make_silent(Runner([AvgStatsCallback(lambda p, y: math.inf)]))
    run.fit(1, make_learn())
    assert run.avg_stats.history[0]["train_lambda"] == math.inf


def test_averages_of_nothing_are_empty():
    stats = AvgStats(accuracy, True)
    assert (stats.count, stats.avg_stats, repr(stats)) == (0, [], "")


def test_a_copy_within_an_epoch_has_the_averages_so_far(make_learn):
    class Copies(Callback):
        _order = 5

        def after_loss(self):
            if self.run.n_iter == 2 and self.run.in_train:
                self.run.copied = copy.deepcopy(self.run.avg_stats)

    run = make_silent(Runner([AvgStatsCallback(accuracy), Losses, Copies]))
    run.fit(1, make_learn())
    assert run.copied.train_stats.count == 18
    assert run.copied.train_stats.avg_stats[0] == pytest.approx(sum(run.losses.train[:3]) / 3)


# --- metrics of a whole pass


class F1:
    """The F1 score of two classes, which differs from the mean over batches."""

    def __init__(self):
        self.resets = 0
        self.reset()

    def reset(self):
        self.resets += 1
        self.hits = self.guessed = self.there = 0

    def update(self, pred, yb):
        guess = pred.argmax(1) == 1
        self.hits += int((guess & (yb == 1)).sum())
        self.guessed += int(guess.sum())
        self.there += int((yb == 1).sum())

    def compute(self):
        return 2 * self.hits / max(self.guessed + self.there, 1)


def f1(pred, yb):
    metric = F1()
    metric.update(pred, yb)
    return metric.compute()


def whole_pass(learn, dl):
    with torch.no_grad():
        return f1(torch.cat([learn.model(xb) for xb, _ in dl]), torch.cat([yb for _, yb in dl]))


@pytest.mark.parametrize("metric", [F1, lambda: EpochMetric(f1)], ids=["object", "EpochMetric"])
def test_an_object_accumulates_over_each_pass_and_is_reset_before(make_learn, metric):
    learn, metric = make_learn(n_train=5, n_valid=3), metric()
    learn.opt.param_groups[0]["lr"] = 0.0
    run = make_silent(Runner([functools.partial(AvgStatsCallback, [accuracy, metric])]))
    run.fit(2, learn)
    name = "f1" if isinstance(metric, EpochMetric) else "F1"
    expected = whole_pass(learn, learn.data.valid_dl)
    with torch.no_grad():
        batchwise = sum(f1(learn.model(xb), yb) for xb, yb in learn.data.valid_dl) / 3
    assert abs(expected - batchwise) > 0.01, "otherwise this test shows nothing"
    assert [row[f"valid_{name}"] for row in run.avg_stats.history] == pytest.approx([expected] * 2)
    assert metric.compute() == pytest.approx(expected), "validation must use the object itself"
    learn.model.train()
    expected = whole_pass_in_training(learn)
    assert run.avg_stats.history[0][f"train_{name}"] == pytest.approx(expected)


def whole_pass_in_training(learn):
    with torch.no_grad():
        preds = [learn.model(xb) for xb, _ in learn.data.train_dl]  # each batch is normalised by its own statistics
    return f1(torch.cat(preds), torch.cat([yb for _, yb in learn.data.train_dl]))


def test_a_checkpoint_within_an_epoch_has_the_state_of_accumulating_objects(make_learn, tmp_path):
    def fit(epochs, n_train, resume=None):
        learn = make_learn(n_train=5)
        run = make_silent(Runner([AvgStatsCallback(F1()), Checkpoint(tmp_path, every=3)]))
        if n_train:
            run.add_cbs(At("after_batch", KeyboardInterrupt, at=4, order=2000))
        run.fit(epochs, learn, resume=resume)
        return [row["train_F1"] for row in run.avg_stats.history]

    whole = make_silent(Runner([AvgStatsCallback(F1())]))
    whole.fit(1, make_learn(n_train=5))
    assert fit(1, 4) == []
    assert fit(1, 0, resume=tmp_path) == [whole.avg_stats.history[0]["train_F1"]]


class Resets:
    def __call__(self, pred, yb):
        return 0.0

    def reset(self):
        pass


@pytest.mark.parametrize(
    ("metric", "message"),
    [(F1, r"got the class F1: write F1\(\)"), (Resets(), r"lacks update, compute: add what is missing")],
)
def test_an_incomplete_protocol_is_an_error_at_construction(metric, message):
    with pytest.raises(TypeError, match=message):
        AvgStatsCallback(metric)


def test_a_metric_may_not_take_the_name_of_the_loss():
    def loss(pred, yb):
        return 0.0

    with pytest.raises(ValueError, match="'loss' is the name of the loss; got accuracy, loss: rename 'loss'"):
        AvgStatsCallback([accuracy, loss])


def test_accuracy_of_one_logit_is_that_of_two_classes():
    logits = torch.tensor([2.0, -1.0, 0.5, -3.0])
    for out in (logits, logits[:, None]):
        for yb in (torch.tensor([1, 0, 1, 0]), torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None], logits > 0):
            assert accuracy(out, yb).item() == 1.0
        assert accuracy(out, torch.tensor([1, 0, 0, 0])).item() == 0.75


SUMS = [nn.CrossEntropyLoss(reduction="sum"), functools.partial(F.cross_entropy, reduction="sum")]


@pytest.mark.parametrize("loss_func", SUMS, ids=["module", "function"])
def test_a_summed_loss_is_shown_as_the_mean_over_samples(make_learn, loss_func):
    learn = make_learn(n_train=2, n_valid=3, loss_func=loss_func)
    learn.opt.param_groups[0]["lr"] = 0.0
    learn.data.valid_dl[2] = tuple(t[:1] for t in learn.data.valid_dl[2])
    run = make_silent(Runner([AvgStatsCallback()]))
    run.fit(1, learn)
    x, y = (torch.cat(parts) for parts in zip(*learn.data.valid_dl))
    with torch.no_grad():
        expected = F.cross_entropy(learn.model(x), y).item()
    assert run.avg_stats.history[0]["valid_loss"] == pytest.approx(expected, rel=1e-5)


def test_an_optimiser_without_pytorchs_groups_has_no_rate_in_the_history(make_learn):
    learn = make_learn()
    opt = learn.opt
    learn.opt = type("Own", (), {"step": lambda self: opt.step(), "zero_grad": lambda self: opt.zero_grad()})()
    run = make_silent(Runner([AvgStatsCallback()]))
    run.fit(1, learn)
    assert run.avg_stats.history[0]["lr"] is None and run.avg_stats.history[0]["train_loss"] > 0


def test_objects_with_different_values_in_processes_are_a_warning():
    stats = AvgStats([F1()], in_train=False)
    stats._sizes, f1 = [4], stats.objects["F1"]
    f1.hits, f1.guessed, f1.there = 1, 2, 2
    stats._tape.add((torch.tensor(1.0),))
    of_the_other = iter([[12, 24.0], torch.tensor([12, 1.0]).double()])
    with pytest.warns(UserWarning, match="'F1' is not merged over processes"):
        stats.merge(lambda numbers: [numbers, next(of_the_other)])
    assert stats.avg_stats == [28 / 16, 14 / 16] and stats.count == 16
