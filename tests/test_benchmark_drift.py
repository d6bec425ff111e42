"""`benchmarks/drift.py`: the stream, what each way to predict changes of a net, resuming, table and figure."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from fastrbn.compare import STUDY_TASKS, get_norm, task_nets
from fastrbn.compare.tasks import TaskData
from fastrbn.norm import RunningBatchNorm

TASK = "drift-digits"
COLUMNS = "task norm mode bs order seed segment accuracy machine torch date".split()


@pytest.fixture
def drift(benchmark_script, monkeypatch):
    module = benchmark_script("drift")
    g = torch.Generator().manual_seed(0)
    data = TaskData(*(t for n in (64, 40) for t in (torch.randn(n, 1, 12, 12, generator=g), torch.arange(n) % 10)))
    monkeypatch.setattr(module, "_load", lambda task: data)
    monkeypatch.setattr(module, "STREAMS", ((4, "shuffled"), (32, "shuffled"), (32, "runs of one class")))
    monkeypatch.setitem(STUDY_TASKS, TASK, replace(STUDY_TASKS[TASK], steps={1: 2}))
    return module


@pytest.fixture
def trained():
    """A small net with the given norm, its statistics moved once, and images of another distribution."""

    def make(norm):
        model = task_nets.conv_net(get_norm(norm), [8, 8], 10)
        task_nets.initialise(model, 0)
        model(torch.randn(8, 1, 12, 12))
        return model

    return make


IMAGES = 3 + 2 * torch.arange(8.0).view(-1, 1, 1, 1).sin() * torch.ones(8, 1, 12, 12).cumsum(3)


def test_a_stream_depends_on_the_seed_and_shows_every_image_once(drift):
    x, y = torch.arange(200.0).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), torch.arange(200) % 2
    still = drift.Drift((1.0,), (0.0,), 0.0, 0.0)
    first, labels = drift.stream(still, x, y, "shuffled", 0)
    assert torch.equal(first, drift.stream(still, x, y, "shuffled", 0)[0])
    assert not torch.equal(first, drift.stream(still, x, y, "shuffled", 1)[0])
    assert sorted(first[:, 0, 0, 0].tolist()) == list(range(200)) and torch.equal(labels, first[:, 0, 0, 0] % 2)
    _, labels = drift.stream(still, x, y, "runs of one class", 0)
    assert 1 <= (labels.diff() != 0).sum() <= 3  # 64 and 36 images of each class


def test_a_stream_drifts_slowly_and_returns_at_once(drift):
    x, y = torch.ones(100, 1, 4, 4), torch.zeros(100, dtype=torch.long)
    light = drift.stream(drift.Drift((3.0,), (1.0,), 0.0, 0.0), x, y, "shuffled", 0)[0][:, 0, 0, 0]
    assert light[:10].tolist() == [1] * 10 and light[25].item() == pytest.approx(2.5)
    assert light[40:50].tolist() == [4] * 10 and light[50:].tolist() == [1] * 50
    noisy = drift.stream(drift.Drift((1.0,), (0.0,), 0.0, 5.0), x, y, "shuffled", 0)[0].std((1, 2, 3))
    assert noisy[:60].max() == 0 and noisy[61:75].mean() < noisy[90:].mean() == pytest.approx(5, abs=0.6)
    edge = torch.zeros(100, 1, 6, 6)
    edge[..., 3:] = 1
    blurred = drift.stream(drift.Drift((1.0,), (0.0,), 1.0, 0.0), edge, y, "shuffled", 0)[0][:, 0, 2, 2]
    assert blurred[:60].max() == 0 and blurred[95] == pytest.approx(0.4)


@pytest.mark.parametrize("norm, mode", [("batchnorm", "frozen"), ("groupnorm", "frozen"), ("default", "frozen")])
def test_a_frozen_net_keeps_all_its_state(drift, trained, norm, mode):
    model = trained(norm)
    before = copy.deepcopy(model.state_dict())
    assert drift.right(drift.CONTENDERS[norm, mode][1](model), IMAGES, torch.zeros(8), 4) is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_adapting_moves_statistics_and_no_weight(drift, trained):
    adapting = [key for key in drift.CONTENDERS if key[1] != "frozen"]
    for norm, mode in adapting:
        model = trained(norm)
        parameters = copy.deepcopy(dict(model.named_parameters()))
        means = [m.running_mean.clone() for m in model.modules() if hasattr(m, "running_mean")]
        drift.right(drift.CONTENDERS[norm, mode][1](model), IMAGES, torch.zeros(8), 4)
        assert all(torch.equal(value, parameters[name]) for name, value in model.named_parameters()), mode
        after = [m.running_mean for m in model.modules() if hasattr(m, "running_mean")]
        assert not any(torch.equal(a, b) for a, b in zip(means, after, strict=True)), mode


def test_adapting_and_converted_put_only_the_norms_in_training_mode(drift, trained):
    for norm, mode in (("default", "adapting"), ("batchnorm", "converted")):
        model = nn.Sequential(trained(norm), nn.Dropout())
        drift.CONTENDERS[norm, mode][1](model)
        norms = [m for m in model.modules() if isinstance(m, RunningBatchNorm)]
        assert len(norms) == 2 and all(m.training for m in norms) and not model[1].training


@torch.no_grad()
def test_statistics_mixed_with_those_of_training_do_not_depend_on_earlier_batches(drift, trained):
    model = trained("batchnorm")
    norm, x = model[0][1], IMAGES
    source = norm.running_mean.clone()
    predict = drift.with_prior(model)
    first = predict(x)
    expected = source.lerp(model[0][0](x).mean((0, 2, 3)), len(x) / (len(x) + 16))
    torch.testing.assert_close(norm.running_mean, expected)
    predict(x + 5)
    torch.testing.assert_close(predict(x), first)


@torch.no_grad()
def test_running_statistics_move_before_the_batch_is_evaluated(drift, trained):
    model = trained("batchnorm")
    predict = drift.running(model, lambda n: 1.0)
    torch.testing.assert_close(predict(IMAGES), model.eval()(IMAGES))
    assert model[0][1].momentum == 1.0


def test_only_the_refusal_of_a_batch_is_no_result(drift):
    assert drift.right(nn.BatchNorm1d(2).train(), torch.ones(3, 2), torch.zeros(3), 1) is None
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        drift.right(nn.BatchNorm1d(2).train(), torch.ones(3, 2, 1, 1), torch.zeros(3), 2)


def test_a_run_goes_on_with_what_is_missing_and_ctrl_c_keeps_what_is_finished(drift, tmp_path, monkeypatch):
    path, work, trained = tmp_path / "drift.csv", drift.measure, []

    def measure(job, device):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(job)
        return work(job, device)

    monkeypatch.setattr(drift, "measure", measure)
    settings = {"tasks": [TASK], "seeds": [0], "jobs": 0}
    assert drift.run(path, **settings) is False
    rows = drift.rows_of(path)
    assert list(rows[0]) == COLUMNS and {row["norm"] for row in rows} == {"batchnorm"}
    # 20 segments of each stream for five that adapt, and of each order for the frozen one
    assert len(rows) == 20 * (5 * 3 + 2)
    monkeypatch.setattr(drift, "measure", lambda job, device: trained.append(job) or work(job, device))
    assert drift.run(path, **settings) is True
    assert trained == [(TASK, norm, 0) for norm in drift.NORMS]
    assert drift.rows_of(path)[: len(rows)] == rows
    assert drift.run(path, **settings) is True and len(trained) == 3
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:20], *lines[21:]]))  # a row of the first net is lost
    assert {row["norm"] for row in drift.rows_of(path)} == {"groupnorm", "default"}


@pytest.fixture
def rows(drift):
    """Two seeds: `default` adapting has 80 and 82, the others 70; nn.BatchNorm refuses a stream."""
    made = []
    for (norm, mode), (bs, order), seed, segment in product(drift.CONTENDERS, drift.STREAMS, (0, 1), range(20)):
        accuracy = "" if mode == "batch" and bs == 4 else 80 + 2 * seed if mode == "adapting" else 70
        values = (TASK, norm, mode, bs, order, seed, segment, accuracy, "", "", "")
        made.append({name: str(value) for name, value in zip(COLUMNS, values, strict=True)})
    return made


def test_the_table_has_means_spreads_the_best_in_bold_and_refusals(drift, rows):
    lines = drift.table(rows).splitlines()
    assert lines[0].startswith("| MNIST, course net | batch 4 | batch 32 | runs of one class | no drift, batch 4 |")
    assert f"| RunningBatchNorm, adapting |{' **81.0 ± 1.4** |' * 7}" in lines
    assert f"| GroupNorm |{' 70.0 ± 0.0 |' * 7}" in lines
    assert f"| nn.BatchNorm, batch statistics | refused |{' 70.0 ± 0.0 |' * 2}{' refused |' * 4}" in lines


def test_the_figure_shows_whole_shuffled_streams_and_what_is_refused(drift, rows):
    fig = drift.figure(rows)
    panel, below = fig.axes
    assert panel.get_title(loc="left") == "MNIST, course net"
    names = {text.get_text() for text in panel.texts}
    assert names == {drift.CONTENDERS[key][0] for key in drift.DRAWN}
    assert "refused" in {text.get_text() for text in below.texts}
    assert any(list(line.get_ydata()) == [81, 81] for line in panel.lines)
