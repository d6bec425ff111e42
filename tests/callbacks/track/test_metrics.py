"""Metrics that accumulate: against plain definitions, however batches are cut, and in a fit."""

import copy
import csv
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from fastrbn.callbacks import (
    F1,
    AvgStats,
    AvgStatsCallback,
    Checkpoint,
    ConfusionMatrix,
    CSVLogger,
    EpochMetric,
    IoU,
    PerClassAccuracy,
    SaveBest,
    TopK,
    accuracy,
)
from fastrbn.learn import Callback, Runner

NAN = float("nan")


def silent(*cbs):
    run = Runner(cbs)
    run.lines = []
    run.logger = run.lines.append
    return run


def computed(metric, pred, yb, cuts=1):
    for p, y in zip(pred.chunk(cuts), yb.chunk(cuts)):
        metric.update(p, y)
    return metric.compute()


# Plain definitions, sample by sample


def table(pred, yb):
    """[target][prediction] counts, by loops; -100 does not count."""
    classes = pred.shape[1]
    counts = [[0] * classes for _ in range(classes)]
    for p, y in zip(pred.movedim(1, -1).reshape(-1, classes).tolist(), yb.flatten().tolist()):
        if y != -100:
            counts[y][p.index(max(p))] += 1
    return counts


def per_class(counts, ratio):
    """`ratio(hits, predicted, there)` of each class, NaN for 0 / 0."""
    found = []
    for c, row in enumerate(counts):
        over, under = ratio(row[c], sum(r[c] for r in counts), sum(row))
        found.append(over / under if under else NAN)
    return found


def mean(values):
    kept = [v for v in values if v == v]
    return sum(kept) / len(kept)


def f1(hits, predicted, there):
    return 2 * hits, predicted + there


def iou(hits, predicted, there):
    return hits, predicted + there - hits


def recall(hits, predicted, there):
    return hits, there


def micro(counts, ratio):
    hits, every = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    over, under = ratio(hits, every, every)
    return over / under


def top(k):
    def share(pred, yb):
        samples = zip(pred.movedim(1, -1).reshape(-1, pred.shape[1]).tolist(), yb.flatten().tolist())
        hits = [sorted(p, reverse=True).index(p[y]) < k for p, y in samples if y != -100]
        return sum(hits) / len(hits)

    return share


PLAIN = {
    "f1": (F1, lambda p, y: mean(per_class(table(p, y), f1))),
    "micro f1": (lambda: F1("micro"), lambda p, y: micro(table(p, y), f1)),
    "f1 of each class": (lambda: F1(None), lambda p, y: per_class(table(p, y), f1)),
    "iou": (IoU, lambda p, y: mean(per_class(table(p, y), iou))),
    "micro iou": (lambda: IoU("micro"), lambda p, y: micro(table(p, y), iou)),
    "accuracy of each class": (PerClassAccuracy, lambda p, y: per_class(table(p, y), recall)),
    "top 1": (lambda: TopK(1), top(1)),
    "top 3": (lambda: TopK(3), top(3)),
    "confusion matrix": (ConfusionMatrix, table),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(), (3, 2)], ids=["samples", "pixels"])
def test_a_metric_is_its_plain_definition_however_the_pass_is_cut(name, shape):
    make, plain = PLAIN[name]
    for seed in range(3):
        torch.manual_seed(seed)
        pred, yb = torch.randn(40, 7, *shape), torch.randint(5, (40, *shape))  # class 5 may only be predicted
        yb[torch.rand(yb.shape) < 0.2] = -100
        pred[:, [4, 6]] = -9.0  # class 4 may only be a target, class 6 is neither
        expected = torch.tensor(plain(pred, yb))
        for cuts in (1, 7):
            got = computed(make(), pred, yb, cuts)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_values_of_scikit_learn():
    """f1_score and jaccard_score of scikit-learn for targets 0 1 2 0 1 2 and predictions 0 2 1 0 0 1 (its docs)."""
    pred, yb = torch.eye(3)[[0, 2, 1, 0, 0, 1]], torch.tensor([0, 1, 2, 0, 1, 2])
    assert computed(F1(), pred, yb).item() == pytest.approx(0.26666666)
    assert computed(F1("micro"), pred, yb).item() == pytest.approx(0.33333333)
    assert computed(F1("none"), pred, yb).tolist() == pytest.approx([0.8, 0.0, 0.0])
    assert computed(ConfusionMatrix(), pred, yb).tolist() == [[2, 0, 0], [1, 0, 1], [0, 2, 0]]
    labels, there = torch.tensor([[1.0, -1], [2, 3], [-4, -1]]), torch.tensor([[1.0, 1], [1, 1], [1, 0]])
    assert computed(IoU(None), labels, there).tolist() == pytest.approx([2 / 3, 1 / 2])


@pytest.mark.parametrize("shape", [(), (2, 2)], ids=["samples", "pixels"])
def test_targets_of_the_scores_shape_are_labels(shape):
    logits, there = torch.randn(30, 3, *shape), torch.randint(2, (30, 3, *shape)).float()
    there[torch.rand(there.shape) < 0.2] = -100
    expected = []
    for label in range(3):
        pairs = list(zip((logits[:, label] > 0).flatten().tolist(), there[:, label].flatten().tolist()))
        hits = sum(p and t == 1 for p, t in pairs)
        sums = sum(p and t != -100 for p, t in pairs) + sum(t == 1 for _, t in pairs)
        expected.append(2 * hits / sums)
    assert computed(F1(None), logits, there, cuts=4).tolist() == pytest.approx(expected)
    assert computed(F1(), logits, there).item() == pytest.approx(mean(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_one_logit_is_one_label_or_two_classes(dtype):
    logits, yb = torch.tensor([2.0, -1.0, 0.5, -3.0, 1.0]), torch.tensor([1, 1, 0, 0, 1]).to(dtype)
    for out in (logits, logits[:, None]):
        for target in (yb, yb[:, None]):
            assert computed(F1(), out, target).item() == pytest.approx(2 / 3), "of class 1"
            assert computed(ConfusionMatrix(), out, target).tolist() == [[1, 1], [1, 2]]
            assert computed(PerClassAccuracy(), out, target).tolist() == pytest.approx([1 / 2, 2 / 3])


MAKE = [TopK, F1, IoU, PerClassAccuracy, ConfusionMatrix, lambda: F1(None, ignore_index=7)]


@pytest.mark.parametrize("make", MAKE)
def test_a_metric_is_copied_and_pickled_with_what_it_has_counted(make):
    pred, yb = torch.randn(20, 6), torch.randint(6, (20,))
    metric = make()
    metric.update(pred[:10], yb[:10])
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert repr(other) == repr(metric) and other.__name__ == metric.__name__
        other.update(pred[10:], yb[10:])
        torch.testing.assert_close(other.compute(), computed(make(), pred, yb), equal_nan=True)
    torch.testing.assert_close(metric.compute(), computed(make(), pred[:10], yb[:10]), equal_nan=True)
    metric.reset()
    with pytest.raises(RuntimeError, match="has seen no batch: call update"):
        metric.compute()


@pytest.mark.parametrize("make", MAKE)
def test_processes_merge_what_they_have_counted(make):
    pred, yb = torch.randn(20, 6), torch.randint(6, (20,))
    parts = [make(), make(), make()]  # the third has no batch
    parts[0].update(pred[:15], yb[:15])
    parts[1].update(pred[15:], yb[15:])
    counted = [part._counts for part in parts]
    for part in parts:
        part.merge(lambda value: counted)
        torch.testing.assert_close(part.compute(), computed(make(), pred, yb), equal_nan=True)
    alone = make()
    alone.merge(lambda value: [None, None])
    assert alone._counts is None


@pytest.mark.parametrize("bad", [6, -1, 1.5, NAN])
def test_a_target_that_is_no_class_is_an_error_when_the_value_is_computed(bad):
    for make in MAKE:
        with pytest.raises(ValueError, match="1 targets are no class index from 0.*leave out by"):
            computed(make(), torch.randn(3, 6), torch.tensor([0, 5, bad]))
    with pytest.raises(ValueError, match="1 targets are no class index.*labels of the scores' shape: not 0 or 1"):
        computed(F1(), torch.randn(2, 2), torch.tensor([[1.0, 0.3], [0, 1]]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TopK(0), ValueError, "TopK: k must be a whole number, 1 or more; got 0"),
        (lambda: F1("mean"), ValueError, "F1: average must be one of macro, micro, none; got 'mean'"),
        (lambda: TopK(7).update(torch.randn(3, 6), torch.zeros(3)), ValueError, r"at least 7 classes.*shape \(3, 6\)"),
        (lambda: TopK(1).update(torch.randn(3, 1), torch.zeros(3)), ValueError, "or accuracy"),
        (lambda: F1().update(torch.randn(3, 6), torch.zeros(2)), ValueError, r"one target for each row.*shape \(2,\)"),
        (
            lambda: PerClassAccuracy().update(torch.randn(3, 6), torch.zeros(3, 6)),
            ValueError,
            "one target for each row",
        ),
        (
            lambda: F1().update({"out": 1}, torch.zeros(3)),
            TypeError,
            "predictions of a batch as one tensor; got dict with",
        ),
        (lambda: IoU().update(torch.randn(3, 6), None), TypeError, "targets of a batch as one tensor; got NoneType"),
        (lambda: AvgStats(F1), TypeError, r"got the class F1: write F1\(\)"),
        (lambda: AvgStats([partial(TopK, 2)]), TypeError, r"got a partial of TopK: write TopK\(…\)"),
        (lambda: accuracy(torch.zeros(2, 3), torch.eye(3)[:2]), ValueError, r"yb.argmax\(1\) if they are one-hot"),
    ],
)
def test_bad_input_is_an_error_with_the_rule(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_class_156_in_bytes_is_not_ignored_as_minus_100():
    pred, yb = torch.eye(200)[[156, 7]], torch.tensor([156, 8], dtype=torch.uint8)
    assert computed(TopK(1), pred, yb) == 0.5


def test_batches_of_one_pass_have_the_same_classes():
    metric = ConfusionMatrix()
    metric.update(torch.randn(3, 6), torch.zeros(3))
    with pytest.raises(ValueError, match="the same number of classes"):
        metric.update(torch.randn(3, 5), torch.zeros(3))


def test_what_is_confused_most_comes_first():
    pred, yb = torch.eye(3)[[1, 1, 2, 0, 2]], torch.tensor([0, 0, 1, 0, 2])
    matrix = ConfusionMatrix()
    matrix.update(pred, yb)
    assert matrix.most_confused() == [(0, 1, 2), (1, 2, 1)]
    assert matrix.most_confused(1, "abc") == [("a", "b", 2)]
    assert matrix.plot("abc").axes[0].get_title("left").endswith("40.0 % of 5 samples right")


# In a fit


class Collection(nn.Module):
    """As torchmetrics' MetricCollection: modules inside, a dictionary of values with keys that are known before."""

    def __init__(self, **metrics):
        super().__init__()
        self.metrics = nn.ModuleDict(metrics)

    def keys(self):
        return self.metrics.keys()

    def update(self, pred, yb):
        for m in self.metrics.values():
            m.update(pred, yb)

    def compute(self):
        return {name: m.compute() for name, m in self.metrics.items()}

    def reset(self):
        for m in self.metrics.values():
            m.reset()


class Mean(nn.Module):
    """As a metric of torchmetrics: a module whose state is no buffer, and refuses another device."""

    def __init__(self, several=False):
        super().__init__()
        self.several = several
        self.state, self.batches = torch.zeros(3), 0

    def _apply(self, fn):
        self.state = fn(self.state)
        return super()._apply(fn)

    def update(self, pred, yb):
        assert self.state.device == pred.device
        self.state, self.batches = self.state + pred.softmax(1).sum(0), self.batches + len(pred)

    def compute(self):
        means = self.state / self.batches
        return means if self.several else means[0]

    def reset(self):
        self.state, self.batches = torch.zeros(3), 0


def test_a_collection_has_a_column_for_each_of_its_metrics(make_learn):
    run = silent(AvgStatsCallback([accuracy, Collection(mean=Mean(), other=Mean())]))
    run.fit(1, make_learn())
    row = run.avg_stats.history[0]
    assert [n for n in row if n.startswith("valid")] == ["valid_loss", "valid_accuracy", "valid_mean", "valid_other"]
    assert 0 < row["valid_mean"] == row["valid_other"] < 1
    assert run.avg_stats.valid_stats.objects.keys() == {"Collection"}
    both = AvgStats([Collection(a=Mean()), Collection(a=Mean())])
    assert both.names == ["loss", "a_1", "a_2"] and len(both.objects) == 2
    with pytest.raises(ValueError, match="at least one"):
        AvgStats(Collection())


def test_metrics_of_several_numbers_are_in_values_and_break_no_table_log_or_monitor(make_learn, tmp_path):
    matrix, known = ConfusionMatrix(), ["epoch", "train_loss", "train_f1", "train_Mean"]
    cbs = [AvgStatsCallback([F1(), matrix, PerClassAccuracy(), Mean(several=True)]), CSVLogger(tmp_path / "h.csv")]
    run = silent(*cbs, SaveBest(tmp_path / "best.pt", monitor="f1"))
    learn = make_learn()
    run.fit(2, learn)
    stats = run.avg_stats
    assert stats.columns == [*known, "valid_loss", "valid_f1", "valid_Mean", "lr", "time"]
    with open(tmp_path / "h.csv", newline="") as f:
        assert [row["valid_Mean"] for row in csv.DictReader(f)] == ["", ""], (
            "foreign ones are known by their value alone"
        )
    assert run.lines[-1] == "valid: [{:.6g}, {:.6g}, …]".format(*stats.valid_stats.avg_stats)
    assert list(stats.valid_stats.values) == ["loss", "f1", "confusion_matrix", "per_class_accuracy", "Mean"]
    x, y = (torch.cat(parts) for parts in zip(*learn.data.valid_dl))
    with torch.no_grad():
        pred = learn.model(x)
    assert stats.valid_stats.values["confusion_matrix"].tolist() == matrix.compute().tolist() == table(pred, y)
    assert stats.valid_stats.values["Mean"].tolist() == pytest.approx(pred.softmax(1).mean(0).tolist())
    assert stats.train_stats.objects["confusion_matrix"].compute().sum() == 24, "training has a copy of its own"
    assert run.save_best.best is not None
    run = silent(AvgStatsCallback(Mean(several=True)), SaveBest(tmp_path / "best.pt", "Mean", "max"))
    with pytest.raises(ValueError, match="valid_Mean computes several: choose another"):
        run.fit(1, learn)


def test_a_table_shows_a_sign_in_place_of_several_numbers(make_learn):
    rows = []

    def logger(row):
        rows.append(row)

    logger.table = True
    run = Runner([AvgStatsCallback(Mean(several=True))])
    run.logger = logger
    run.fit(1, make_learn())
    assert [row[2] for row in rows] == ["train_Mean", "…"]


@pytest.mark.parametrize(
    "make", [lambda: Collection(a=Mean(), b=Mean()), F1, ConfusionMatrix, lambda: EpochMetric(accuracy)]
)
def test_a_resumed_epoch_goes_on_with_what_metrics_have_accumulated(make_learn, tmp_path, make):
    class Stops(Callback):
        _order = 2000

        def after_batch(self):
            if self.run.n_iter == 3:
                raise KeyboardInterrupt

    def fit(*cbs, **kwargs):
        run = silent(AvgStatsCallback(make()), *cbs)
        run.fit(1, make_learn(n_train=5), **kwargs)
        return run.avg_stats.train_stats.values

    whole = fit()
    fit(Checkpoint(tmp_path, every=3), Stops())
    resumed = fit(Checkpoint(tmp_path), resume=tmp_path)
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(torch.as_tensor(resumed[name]), torch.as_tensor(value))


def test_a_fit_is_not_resumed_with_other_objects():
    state = AvgStats([ConfusionMatrix()]).state_dict()
    with pytest.raises(
        ValueError, match="saved ones are loss, confusion_matrix, now they are loss, per_class_accuracy"
    ):
        AvgStats([PerClassAccuracy()]).load_state_dict(state)


def test_a_module_follows_the_predictions_to_their_device(make_learn):
    stats, run = AvgStats(Mean(), in_train=False), silent(AvgStatsCallback())
    run.fit(1, make_learn())
    run.pred, run.loss = torch.randn(6, 3, device="meta"), torch.zeros(())
    stats.accumulate(run)
    assert stats.metrics[0].state.device.type == "meta"
    stats.load_state_dict({**AvgStats(Mean()).state_dict(), "sizes": torch.tensor([2])})
    stats.accumulate(run)
    assert stats.metrics[0].state.device.type == "meta", "also after a checkpoint, whose tensors are on the CPU"


def test_a_batch_without_a_target_is_named_as_the_reason(make_learn):
    stats, run = AvgStats(F1()), silent(AvgStatsCallback())
    run.fit(1, make_learn())
    run.yb = None
    with pytest.raises(RuntimeError, match=r"metric 'f1' failed: TypeError.*\(the batch has no target: yb is None\)"):
        stats.accumulate(run)


@pytest.mark.parametrize("value", ["high", None])
def test_what_is_no_number_is_refused(value, make_learn):
    class Words(Mean):
        def compute(self):
            return value

    with pytest.raises(ValueError, match="the metric 'Words' must compute numbers"):
        silent(AvgStatsCallback(Words())).fit(1, make_learn())


@pytest.mark.parametrize("several", [False, True])
def test_foreign_objects_are_compared_between_processes(several):
    def stats(seed, count):
        one = AvgStats(Mean(several), in_train=False)
        torch.manual_seed(seed)
        if count:
            one.metrics[0].update(torch.randn(count, 3), None)
        one._sizes = [count] if count else []
        one._tape.add([torch.zeros(())])
        return one

    def merge(one, other):
        rows = []
        other.merge(lambda row: rows.append(row) or [row])
        rest = iter(rows)
        one.merge(lambda row: [row, next(rest)])

    one = stats(0, 4)
    merge(one, stats(0, 4))
    assert one.count == 8
    one, other = stats(0, 4), stats(1, 2)
    expected = (4 * one.avg_stats[1] + 2 * other.avg_stats[1]) / 6
    with pytest.warns(UserWarning, match="'Mean' is not merged over processes"):
        merge(one, other)
    assert several or one.avg_stats[1] == pytest.approx(expected)


def test_torchmetrics_work_as_they_are(make_learn, tmp_path):
    classification = pytest.importorskip("torchmetrics.classification")
    from torchmetrics import MetricCollection

    several = classification.MulticlassAccuracy(3, average=None)
    collection = MetricCollection([classification.MulticlassF1Score(3), classification.MulticlassAUROC(3)])
    run = silent(AvgStatsCallback([F1(), several, collection]), CSVLogger(tmp_path / "h.csv"), Checkpoint(tmp_path))
    learn = make_learn(n_train=5)
    run.fit(2, learn)
    row = run.avg_stats.history[-1]
    assert row["valid_MulticlassF1Score"] == pytest.approx(row["valid_f1"])
    assert row["train_MulticlassF1Score"] == pytest.approx(row["train_f1"])
    assert row["valid_MulticlassAccuracy"] is None and len(run.avg_stats.valid_stats.values["MulticlassAccuracy"]) == 3
    run.fit(3, make_learn(n_train=5), resume=tmp_path)
    assert len(run.avg_stats.history) == 3
