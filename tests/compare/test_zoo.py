"""Tasks of `fastrbn.compare`: training each, equal starts for all norms, and the standing over all tasks."""

import dataclasses
import runpy
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.compare import (
    PEERS,
    TASKS,
    ZOO,
    Cell,
    cell,
    cells_of,
    get_norm,
    load_task,
    read_rows,
    run_cell,
    run_grid,
    standing_table,
    standings,
    table,
    task_data,
    task_nets,
    tasks,
    workers,
)
from fastrbn.compare.report import markdown
from fastrbn.compare.results import groups_of
from fastrbn.data import DataError, glyphs
from fastrbn.data.image_data import ImageData
from fastrbn.data.sets import Dataset
from fastrbn.norm import RunningBatchNorm, convert_batchnorm

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "zoo.py"
DRAWN = (task_data.shapes, task_data.signals, task_data.volumes, task_data.table)


@cache
def images(name, root=None):
    digits = glyphs(200, 40)
    if name == "mnist":
        return digits
    x = torch.randint(256, (240, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y = torch.arange(240) % 10
    return ImageData(name, Dataset(x[:200], y[:200]), Dataset(x[200:], y[200:]), digits.classes)


@pytest.fixture
def tiny(monkeypatch):
    """Every task with little data and two steps."""
    monkeypatch.setattr(task_data, "_images", images)
    monkeypatch.setattr(workers, "_IMAGES", {})
    for name, task in tasks.STUDY_TASKS.items():
        monkeypatch.setitem(tasks.STUDY_TASKS, name, dataclasses.replace(task, steps={1: 2}))
    for name, task in TASKS.items():
        drawn = getattr(task.data, "func", task.data) in DRAWN
        data = partial(task.data, n=64, n_valid=20) if drawn else task.data
        monkeypatch.setitem(TASKS, name, dataclasses.replace(task, data=data, steps={1: 2}))


# the tasks


@pytest.mark.parametrize("name", TASKS)
def test_each_task_trains_and_scores_and_every_norm_has_the_same_weights_and_batches(name, tiny, monkeypatch):
    seen, starts = {}, {}
    data = load_task(name)
    for norm in ("default", "batchnorm", "groupnorm", "none"):
        start = tasks.build(TASKS[name], data, get_norm(norm, 2), seed=3)
        starts[norm] = {n: w.detach().clone() for n, (_, w) in task_nets.weights(start).items()}
        seen[norm] = list(tasks.Batches(TASKS[name], data, 8, seed=3))
        models = []
        row, norms = run_cell(Cell(norm, 8, seed=3, data=ZOO, net=name), data, norms_every=1, look=models.append)
        assert row["steps"] == 2 and row["status"] in ("trained", "chance") and -100 <= row["accuracy"] <= 100
        trained = {n: w for n, (_, w) in task_nets.weights(models[0]).items()}
        assert list(norms) == ["step", *trained] and not any(map(torch.equal, trained.values(), starts[norm].values()))
        with torch.no_grad():
            score = TASKS[name].goal.score(models[0](data.valid_x), data.valid_y).item()
        assert row["accuracy"] == pytest.approx(score, abs=1e-3)
    for norm in seen:
        assert all(map(torch.equal, starts[norm].values(), starts["default"].values())), norm
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(seen[norm], seen["default"]))
    assert len(seen["default"]) == 2 and len(seen["default"][0][0]) == 8
    other = tasks.build(TASKS[name], data, get_norm("default"), seed=4)
    changed = [
        not torch.equal(a, b)
        for a, b in zip((w for _, w in task_nets.weights(other).values()), starts["default"].values())
    ]
    assert changed[-1] and all(changed) == (data.state is None)
    assert not torch.equal(next(iter(tasks.Batches(TASKS[name], data, 8, seed=4)))[0], seen["default"][0][0])


def test_drawn_data_is_the_same_every_time_and_has_both_answers(tiny):
    for make in DRAWN:
        first, again = make(n=64, n_valid=20), make(n=64, n_valid=20)
        assert all(map(torch.equal, first, again)) and [len(t) for t in first] == [64, 64, 20, 20]
        assert len(first[1].unique()) > 1 and first[0].isfinite().all()
    plain, gained = (task_data.shapes(n=64, n_valid=20, gain=gain) for gain in (False, True))
    assert torch.equal(plain[1], gained[1])
    assert plain[0].mean((1, 2, 3)).std() < 0.5 < gained[0].mean((1, 2, 3)).std()


def test_the_course_net_has_both_orders_and_without_a_norm_layers_have_a_bias():
    kinds = [[type(m).__name__ for m in task_nets.course(get_norm("batchnorm"), first)[0]] for first in (True, False)]
    assert kinds == [["Conv2d", "ReLU", "BatchNorm2d"], ["Conv2d", "BatchNorm2d", "ReLU"]]
    bare = task_nets.course(get_norm("none"))[0]
    assert [type(m).__name__ for m in bare] == ["Conv2d", "ReLU"] and bare[0].bias is not None


def test_rate_and_number_of_steps_follow_the_tasks_rule():
    assert Cell("default", 8, lr_factor=3, data=ZOO, net="mlp-adam").lr == pytest.approx(3 * 1e-3 * 8**0.5)
    assert Cell("default", 256, data=ZOO, net="dense").lr == 1
    assert [TASKS["dense"].n_steps(bs) for bs in (1, 4, 8, 500)] == [1500, 1200, 500, 60]


@pytest.mark.parametrize("kind", ["shuffled", "one class each", "runs of one class", "each sample twice"])
def test_batches_are_composed_as_their_name_says(kind):
    y = torch.arange(200) % 10
    found = list(tasks.BATCHES[kind](y, 6, 40, torch.Generator().manual_seed(0)))
    assert len(found) == 40 and all(len(i) == 6 for i in found)
    classes = [set(y[i].tolist()) for i in found]
    if kind == "shuffled":
        assert len(set(torch.cat(found[:33]).tolist())) == 198, "an epoch has each sample once"
    elif kind == "each sample twice":
        assert all(len(set(i.tolist())) == 3 for i in found)
    else:
        assert all(len(c) == 1 for c in classes) and len(set(map(tuple, classes))) > 2
        if kind == "runs of one class":
            assert all(classes[i] == classes[i // 8 * 8] for i in range(40))


def test_a_batch_larger_than_the_data_is_refused(tiny):
    with pytest.raises(ValueError, match="the batch size must be 1 to 64, the number of the task's samples; got 65"):
        tasks.Batches(TASKS["dense"], load_task("dense"), 65, 0)


@pytest.mark.parametrize("norm", ["default", "batchnorm", "groupnorm", "batchrenorm"])
def test_fine_tuning_starts_from_the_state_trained_with_batch_norm_and_a_new_head(norm, tiny):
    data = load_task("fine-tuning")
    assert data.state["0.1.num_batches_tracked"] == 2
    state = tasks.build(TASKS["fine-tuning"], data, get_norm(norm, 2), 0).state_dict()
    for key in ("0.0.weight", "0.1.weight", "4.1.bias", *(["4.1.running_mean"] if norm != "groupnorm" else [])):
        assert torch.equal(state[key], data.state[key]), key
    if norm == "batchrenorm":
        assert torch.allclose(state["0.1.running_std"] ** 2, data.state["0.1.running_var"] + 1e-5)
    assert not torch.equal(state["6.weight"], data.state["6.weight"])


def test_fine_tuning_equals_that_of_a_user_who_converts_the_trained_net(tiny):
    task, data = TASKS["fine-tuning"], load_task("fine-tuning")
    ours = tasks.build(task, data, get_norm("default"), 0)
    users = convert_batchnorm(tasks.build(task, data, get_norm("batchnorm"), 0))
    states = ours.state_dict(), users.state_dict()
    assert states[0].keys() == states[1].keys() and states[0]["0.1.running_count"] == -1
    for model in (ours, users):
        for x, y in tasks.Batches(task, data, 2, seed=0):
            task.goal.loss(model(x), y).backward()
    for a, b in zip((*ours.parameters(), *ours.buffers()), (*users.parameters(), *users.buffers()), strict=True):
        assert torch.equal(a, b) and (a.grad is None or torch.equal(a.grad, b.grad))


def test_the_net_that_a_task_starts_from_is_trained_on_the_same_device(monkeypatch):
    given = []

    def run_cell(start, data, device="cpu", look=None):
        given.append((start.net, device))
        look(nn.Linear(1, 1))

    monkeypatch.setattr(cell, "run_cell", run_cell)
    monkeypatch.setattr(task_data, "_images", images)
    monkeypatch.setattr(workers, "_IMAGES", {})
    workers._answer(Cell("default", 8, data=ZOO, net="fine-tuning"), "meta", None, None)
    assert given == [("course-norm-first", "meta")]


@pytest.mark.parametrize("norm, moves", [("frozen", False), ("precise", True)])
def test_frozen_keeps_the_statistics_of_the_trained_net(norm, moves, tiny):
    data, models = load_task("fine-tuning-cifar"), []
    row, _ = run_cell(Cell(norm, 2, data=ZOO, net="fine-tuning-cifar"), data, look=models.append)
    assert row["status"] in ("trained", "chance") and row["steps"] == 2
    kept = [torch.equal(b, data.state[n]) for n, b in models[0].named_buffers() if "running" in n]
    assert len(kept) == 10 and all(kept) != moves


def test_a_part_of_cifar_has_the_classes_it_names_numbered_from_0(tiny):
    x, y, _, valid_y = task_data.cifar(n=30, n_valid=10, classes=task_data.VEHICLES)
    assert x.shape == (30, 3, 32, 32) and y.unique().tolist() == valid_y.unique().tolist() == [0, 1, 2, 3]
    trucks = images("cifar10").train.x[9::10].float() / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images("cifar10").mean, images("cifar10").std))
    assert any(torch.allclose(x[y == 3][0], (truck - mean) / std) for truck in trucks)


def test_real_and_fake_pass_separately_and_a_recurrent_net_uses_one_norm_at_each_step(tiny):
    for name, calls in (("two-passes", 2), ("recurrent", 14)):
        model, data = tasks.build(TASKS[name], load_task(name), get_norm("batchnorm"), 0), load_task(name)
        model(data.x[:8])
        assert {b.item() for n, b in model.named_buffers() if n.endswith("num_batches_tracked")} == {calls}
    x, y, *_ = task_data.real_and_fake()
    assert x.shape[1:] == (2, 1, 14, 14) and y[0].tolist() == [1, 0]
    assert torch.equal(x[3, 1, :, :7], x[2, 0, :, :7]) and torch.equal(x[3, 1, :, 7:], x[1, 0, :, 7:])


def test_scores_are_percents_and_a_blind_net_is_below_the_bounds():
    y, p = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert tasks.SEGMENT.score(p, y).item() == pytest.approx(100 / 3)
    assert tasks.TELL_APART.score(p, y).item() == 50
    assert tasks.SEGMENT.blind(y) == pytest.approx((50, 0.9 * 0.6931), rel=1e-3)
    t = torch.tensor([[1.0], [2.0], [3.0]])
    assert tasks.REGRESS.score(t, t).item() == 100 and tasks.REGRESS.score(t.mean().expand(3, 1), t).item() == 0
    assert tasks.REGRESS.score(t * torch.nan, t).item() == -100
    assert tasks.CLASSIFY.blind(torch.arange(10)) == pytest.approx((20, 0.9 * 2.302585))


# norms of every rank


@pytest.mark.parametrize("norm", ["default", *(n for n in PEERS if n not in ("none", "instancenorm"))])
@pytest.mark.parametrize("dims", [0, 1, 3])
def test_a_norm_over_another_rank_equals_that_over_images_of_one_column(norm, dims):
    torch.manual_seed(0)
    x = torch.randn(6, 16, *[3, 4, 2][:dims])
    if norm in ("groupnorm", "groupnorm-ws") and dims == 0:
        assert torch.allclose(get_norm(norm)(16, 0)(x), F.layer_norm(x, (16,)), atol=1e-6)
        return
    made, on_images = get_norm(norm, 10)(16, dims), get_norm(norm, 10)(16)
    want = on_images(x.flatten(2).unsqueeze(-1) if dims else x[:, :, None, None]).view_as(x)
    assert torch.allclose(made(x), want, atol=1e-6)


def test_batch_norm_is_torchs_own_of_each_rank_and_running_batch_norm_takes_any():
    made = [type(get_norm("batchnorm")(4, dims)) for dims in range(4)]
    assert made == [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
    assert all(type(get_norm("default")(4, dims)) is RunningBatchNorm for dims in range(4))


# the grid


def test_finished_cells_of_tasks_are_not_trained_again(tiny, tmp_path):
    path, lines = tmp_path / "zoo.csv", []
    cells = cells_of(["default", "batchnorm"], [1, 8], data=[ZOO], net=["regression", "signals"])
    for first in ("8 cells, 0 finished, 8 to train", "8 cells, 8 finished, 0 to train"):
        result = run_grid(cells, path, jobs=0, log=lines.append)
        assert lines[0] == first and result.todo == 0 and not result.failed
        lines.clear()
    rows = {(r["net"], r["norm"], r["bs"]): r for r in result.rows}
    assert {r["data"] for r in result.rows} == {ZOO} and {r["n_train"] for r in result.rows} == {"64"}
    assert rows["regression", "batchnorm", "1"]["status"] == "refused"
    assert rows["regression", "default", "1"]["steps"] == "2" and rows["regression", "default", "1"]["lr"] == "0.005"


def test_a_folder_called_zoo_is_an_ordinary_data_set():
    assert cells_of(["default"], [8], data=[ZOO], n_train=64)[0].task is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"net": ["sense"]}, "a task must be one of dense, .*got 'sense'"),
        ({"net": ["dense"], "epochs": 2}, "leave out n_train, epochs and augment for dense"),
    ],
)
def test_an_unknown_task_and_settings_of_a_task_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        cells_of(["default"], [8], data=[ZOO], **settings)


# the standing


def row(norm, score, seed=0, net="dense", bs=8, factor="1", status="trained"):
    words = {"data": ZOO, "net": net, "norm": norm, "settings": norm, "bs": bs, "lr_factor": factor, "seed": seed}
    words |= {"n_train": 64, "epochs": 1, "augment": 0, "device": "cpu", "version": "1", "status": status}
    return {k: "" for k in table.COLUMNS} | {k: str(v) for k, v in words.items()} | {"accuracy": str(score)}


def handmade():
    """Four cells: `default` best; behind but within two deviations; lost where both peers train; nobody learns."""
    rows = []
    for seed, spread in enumerate((-1, 0, 1)):
        rows += [row("default", 90 + spread, seed), row("batchnorm", 80 + spread, seed), row("groupnorm", 70, seed)]
        for norm, score in (("default", 80), ("batchnorm", 81.9), ("groupnorm", 50)):
            rows.append(row(norm, score + spread, seed, bs=2))
        rows += [row("batchnorm", 60, seed, factor=4), row("groupnorm", 61, seed, factor=4)]
        rows.append(row("default", 60 if seed else 5, seed, factor=4, status="trained" if seed else "chance"))
        rows += [row(n, 10, seed, "signals", status="diverged") for n in ("default", "batchnorm", "groupnorm")]
    return rows


def test_the_standing_counts_cells_within_two_pooled_deviations_ranks_and_losses(tmp_path):
    path = tmp_path / "zoo.csv"
    table.begin(path)
    for r in handmade():
        table.append(path, r)
    found = standings(read_rows(path))
    mine = found["default"]
    assert list(found) == ["default", "batchnorm", "groupnorm"]
    assert (mine.cells, mine.blank, mine.lost) == (3, 1, 1)
    assert mine.within == pytest.approx(2 / 3) and mine.rank == pytest.approx((1 + 2 + 3) / 3)
    assert found["batchnorm"].rank == pytest.approx((2 + 1 + 2) / 3) and found["groupnorm"].rank == pytest.approx(7 / 3)
    assert standings(read_rows(path), ["groupnorm"])["default"].within == pytest.approx(2 / 3)
    text = standing_table(read_rows(path))
    assert "| default | 3 | 67 % | 67 % | 2.00 | 1 |" in text
    assert "in 67 % of 3 cells" in text and "1 more, in which no norm learns" in text and "mean rank is 2.00" in text


def test_just_beyond_two_deviations_is_not_within_and_a_refused_norm_is_last():
    rows = [row(n, score + s, s) for s in (0, 1, 2) for n, score in (("default", 80), ("batchnorm", 82.01))]
    assert standings(rows)["default"].within == 0
    rows = [row("default", 50), row("batchnorm", "", status="refused"), row("groupnorm", 40)]
    found = standings(rows)
    assert found["default"].rank == 1 and found["batchnorm"].rank == 3 and found["batchnorm"].within == 0
    assert "no cell with results of both `default` and a peer" in standing_table([row("default", 50)])


def test_the_table_of_a_task_names_its_score_rule_and_optimiser():
    rows = [r | {"date": "2026-01-01"} for r in handmade()]
    text = markdown(rows)
    assert "### dense, 3 seeds" in text and "Validation overlap (IoU) in percent" in text
    assert "Learning rate 0.05·bs^0.9, at most 1, times the factor, falling on a line to a tenth; SGD" in text
    assert groups_of(rows)[0].points["default", 8, 4.0].score == pytest.approx((5 + 60 + 60) / 3)


# the command


def test_the_script_runs_resumes_and_skips_a_task_without_data(tiny, tmp_path, monkeypatch, capsys):
    if not SCRIPT.is_file():
        pytest.skip("the tests run outside the repository")

    def missing(root=None):
        raise DataError("there is no such data\nand more")

    monkeypatch.setitem(TASKS, "vgg", dataclasses.replace(TASKS["vgg"], data=missing))
    path = tmp_path / "results" / "zoo.csv"
    words = "--tasks regression,vgg --norms default,batchnorm --bs 2,8 --factors 1/3,1 --seeds 0,1 --jobs 0 --csv"
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words.split(), str(path)])
    for count in ("16 cells, 0 finished, 16 to train", "16 cells, 16 finished, 0 to train"):
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out = capsys.readouterr().out
        assert end.value.code == 0 and out.splitlines()[1] == count
        assert out.startswith("vgg is skipped, its data is missing: there is no such data\n")
        assert "| default |" in out and "mean rank is" in out
    rows = read_rows(path)
    assert [r["seed"] + " " + r["lr_factor"] for r in rows[::4]] == ["0 1", "0 0.333333", "1 1", "1 0.333333"]
    found = {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*.*")}
    assert found == {"zoo.csv", "zoo.md", "zoo/regression.png"}
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text.startswith("## Standing\n\n| norm | cells |") and "### regression, 2 seeds" in text


def test_the_script_names_an_unknown_task_and_lists_those_there_are(monkeypatch, capsys):
    if not SCRIPT.is_file():
        pytest.skip("the tests run outside the repository")
    for args, code in ((["--tasks", "sense"], 2), (["--list"], 0)):
        monkeypatch.syspath_prepend(SCRIPT.parent)  # as Python does for a script
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert end.value.code == code
    said = capsys.readouterr()
    assert "got 'sense'" in said.err and [line.split(":")[0] for line in said.out.splitlines()] == list(TASKS)
