"""Comparisons: training a cell, surviving interrupts and crashes, tables and pictures."""

import dataclasses
import math
import multiprocessing
import os
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn import compare, plots
from fastrbn.callbacks import Recorder
from fastrbn.compare import (
    Cell,
    cells_of,
    describe,
    get_norm,
    grid,
    results,
    run_cell,
    run_grid,
    split_norms,
    table,
    tasks,
    workers,
)
from fastrbn.compare import cell as cell_module
from fastrbn.compare import report as report_module
from fastrbn.compare.norms import settle_statistics
from fastrbn.compare.peers import MABN, BatchRenorm, FilterResponseNorm2d, OnlineNorm
from fastrbn.data import glyphs
from fastrbn.norm import RECIPES, Memory, RunningBatchNorm


@cache
def small():
    return glyphs(64, 100)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A CSV that is not there yet, and cells of small images that are trained in this process."""
    for module in (grid, workers):
        monkeypatch.setattr(module, "load_images", lambda *_: small())
    monkeypatch.setattr(workers, "_IMAGES", {})
    return tmp_path / "cells.csv"


def run(cells, path, **kwargs):
    lines = []
    result = run_grid(cells, path, **{"jobs": 0, "log": lines.append, **kwargs})
    return result, lines


def few(norms=("default", "batchnorm"), bs=(8, 16), **kwargs):
    return cells_of(norms, bs, data=["glyphs"], **kwargs)


# norms by text


def test_a_list_of_norms_keeps_the_settings_with_their_norm():
    text = "default,batchnorm , default:mom=0.05,elements=none,groupnorm:groups=4"
    assert split_norms(text) == ["default", "batchnorm", "default:mom=0.05,elements=none", "groupnorm:groups=4"]


@pytest.mark.parametrize("text", ["", " , ", "frn,frn"])
def test_an_empty_list_and_repeated_norms_are_refused(text):
    with pytest.raises(ValueError, match="each once; got"):
        split_norms(text)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("batchnorm", nn.BatchNorm2d),
        ("instancenorm", nn.InstanceNorm2d),
        ("batchrenorm", BatchRenorm),
        ("frn", FilterResponseNorm2d),
        ("onlinenorm", OnlineNorm),
        ("mabn", MABN),
        ("groupnorm-ws", nn.GroupNorm),
        ("frozen", nn.BatchNorm2d),
        ("precise", nn.BatchNorm2d),
        ("none", type(None)),
        *((name, RunningBatchNorm) for name in RECIPES),
    ],
)
def test_each_name_makes_its_norm(text, kind):
    made = get_norm(text, steps=100)(8)
    assert type(made) is kind
    if kind is RunningBatchNorm:
        assert made.recipe is RECIPES[text]


def test_settings_reach_the_layer():
    assert get_norm("groupnorm")(16).num_groups == 8 and get_norm("groupnorm:groups=4")(16).num_groups == 4
    assert get_norm("layernorm")(16).num_groups == 1
    assert get_norm("batchnorm:momentum=0.01")(4).momentum == 0.01
    assert get_norm("frn:learn_eps=none,activate=false")(4).learnt_eps is None
    layer = get_norm("default:backward=exact,elements=none,rate=fixed,clamp=none,mom=0.2")(4)
    want = dataclasses.replace(RECIPES["default"], backward="exact", elements=None, clamp=None, name=layer.recipe.name)
    assert dataclasses.replace(layer.recipe, rate=want.rate) == want
    assert layer.mom == 0.2 and layer.recipe.rate(0.2, 8, 64) == 0.2
    assert get_norm("default:least=3,most=40")(4).recipe.rate == Memory(least=3, most=40)
    assert get_norm("course:rate=memory,share=0.02")(4).recipe.rate == Memory(share=0.02)


def test_batch_renorms_warm_up_and_memory_scale_with_the_run():
    made = get_norm("batchrenorm", steps=320)(4)
    assert made.warmup == (10, 80, 50) and made.mom == pytest.approx(10 / 320)
    assert get_norm("batchrenorm", steps=160_000)(4).mom == 0.01 and get_norm("batchrenorm", steps=20)(4).mom == 0.1
    assert get_norm("batchrenorm:mom=0.05,r_max=2", steps=20)(4).r_max == 2


def test_mabns_warm_up_scales_with_the_run():
    assert get_norm("mabn", steps=320)(4).warmup == (3.2, 32) and get_norm("mabn", steps=160_000)(4).warmup == (
        100,
        1000,
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("defalt", "a norm must be one of default, .*got 'defalt'. Did you mean 'default'?"),
        ("groupnorm:group=4", "groupnorm takes groups; got 'group'.*Did you mean 'groups'?"),
        ("default:element=1", "got 'element' in 'default:element=1'. Did you mean 'elements'?"),
        ("default:elements=0", "'default:elements=0': elements must be a whole number of elements.*got 0"),
        ("default:elements=abc", "'default:elements=abc': "),
        ("default:rate=fast", "rate must be one of fixed, course, per_32_samples, memory; got 'fast'"),
        ("default:rate=none", "rate must be one of .*; got 'None'"),
        ("default:most=1", "'default:most=1': Memory needs numbers: `least` above 0, `most` at least `least`.*most=1"),
        ("default:most=abc", "'default:most=abc': "),
        ("course:most=30", "most belong to rate=memory; 'course:most=30' has rate=course"),
        ("default:skip=3", "skip can only be switched off, skip=none; got '3'"),
        ("default:mom", "written default:name=value,name=value; got 'default:mom'"),
        ("none:eps=1", "none takes no settings; got 'eps'"),
        ("groupnorm:groups=0", "'groupnorm:groups=0' cannot be made: groups must be a whole number, 1 or more; got 0"),
    ],
)
def test_an_unknown_norm_or_setting_is_refused_before_training(text, words):
    with pytest.raises(ValueError, match=words):
        cells_of([text], [8])


def test_a_description_has_every_setting_and_changes_with_a_recipe(monkeypatch):
    text = describe("default:backward=exact")
    assert "backward=exact" in text and "rate=Memory(least=2,most=30,share=0.05)" in text and "0x" not in text
    assert "rate=rate_course" in describe("course:mom=0.2") and describe("course:mom=0.2").endswith("mom=0.2")
    before = describe("default")
    monkeypatch.setitem(RECIPES, "default", RECIPES["default"].but(name="default", elements=64))
    assert describe("default") != before


# one cell


@pytest.mark.parametrize("bs, factor, lr", [(1, 1, 0.05), (8, 1, 0.05 * 8**0.9), (512, 1, 2), (512, 0.25, 0.5)])
def test_the_learning_rate_follows_the_rule(bs, factor, lr):
    assert Cell("default", bs, lr_factor=factor).lr == pytest.approx(lr)


def watch(monkeypatch, name):
    """What a function of the cell's module returned."""
    found, real = [], getattr(cell_module, name)
    monkeypatch.setattr(cell_module, name, lambda *a: found.append(real(*a)) or found[-1])
    return found


def test_every_norm_has_the_same_initial_weights_and_batches_at_the_same_seed(monkeypatch):
    weights, orders = {}, {}
    for norm in ("default", "batchnorm", "frn", "none"):
        cell = Cell(norm, 8, seed=3)
        data, steps = cell_module._loaders(cell, small(), "cpu")
        model = cell_module._model(cell, data, steps)
        weights[norm] = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        orders[norm] = torch.cat([yb for _, yb in data.train_dl])
    for norm in weights:
        assert all(map(torch.equal, weights[norm], weights["default"])), norm
        assert torch.equal(orders[norm], orders["default"])
    other = cell_module._model(Cell("default", 8, seed=4), data, steps)
    assert not torch.equal(other[0][0].weight, weights["default"][0])


def test_the_courses_net_has_relu_before_the_norm_and_the_residual_one_after():
    data, _ = cell_module._loaders(Cell("default", 8), small(), "cpu")
    layer = cell_module._model(Cell("default", 8), data, 1)[0]
    assert [type(m).__name__ for m in layer] == ["Conv2d", "GeneralRelu", "RunningBatchNorm"] and layer[0].bias is None
    prep = cell_module._model(Cell("default", 8, net="resnet-small"), data, 1).prep
    assert [type(m).__name__ for m in prep] == ["Conv2d", "RunningBatchNorm", "ReLU"] and prep[0].out_channels == 16


@pytest.mark.parametrize("norm", ["default", "batchnorm"])
def test_a_cell_trains_to_the_accuracy_that_its_model_has(norm):
    models = []
    row, norms = run_cell(Cell(norm, 8, epochs=6), small(), look=models.append)
    (model,) = models
    x = (small().valid.x.float() / 255 - small().mean[0]) / small().std[0]
    model.eval()
    right = (model(x).argmax(1) == small().valid.y).float().mean().item()
    assert row["accuracy"] == pytest.approx(100 * right, abs=1e-3) and right > 0.3
    assert row["status"] == "trained" and row["steps"] == 48 and norms is None
    assert model[0][2].num_batches_tracked == 48, "validation leaves the statistics alone"
    assert float(row["weight_norm_end"]) > float(row["weight_norm_start"]) > 0


def test_batches_are_all_of_the_cells_size_and_the_rate_falls_to_a_tenth(monkeypatch):
    made = []
    monkeypatch.setattr(cell_module, "Recorder", lambda: made.append(Recorder()) or made[-1])
    row, _ = run_cell(Cell("default", 24, n_train=60, epochs=2), small())
    assert row["steps"] == 4, "what is left over is dropped"
    rate = Cell("default", 24).lr
    assert made[0].lrs[0] == pytest.approx([rate * (1 - 0.9 * i / 4) for i in range(4)])


def test_batch_norm_refusing_one_value_per_channel_is_a_result():
    row, _ = run_cell(Cell("batchnorm", 1), small())
    assert (row["status"], row["accuracy"]) == ("refused", None) and "more than 1 value per channel" in row["note"]


def test_a_nonfinite_loss_ends_the_cell():
    row, _ = run_cell(Cell("none", 8, lr_factor=1e6, epochs=5), small())
    assert row["status"] == "diverged" and row["note"].startswith(("loss nan at step", "loss inf at step"))
    assert row["steps"] < 40 and 0 <= row["accuracy"] <= 100 and row["train_loss"] == "nan"


def test_a_net_that_learnt_nothing_is_at_chance_but_one_that_evaluates_badly_is_not(monkeypatch):
    monkeypatch.setattr(cell_module, "valid_accuracy", lambda *_: 0.1)
    row, _ = run_cell(Cell("default", 8, lr_factor=1e-9), small())
    assert row["status"] == "chance"
    row, _ = run_cell(Cell("default", 8, epochs=10), small())
    assert float(row["train_loss"]) < 2 and row["status"] == "trained"


def test_recorded_norms_are_those_of_the_convolutions(monkeypatch):
    models = watch(monkeypatch, "_model")
    row, norms = run_cell(Cell("default", 8), small(), norms_every=7)
    convs = {n: m.weight for n, m in models[0].named_modules() if isinstance(m, nn.Conv2d)}
    assert norms["step"] == [0, 7] and list(norms) == ["step", *convs]
    for name, weight in convs.items():
        assert norms[name][-1] == pytest.approx(weight.norm().item(), rel=1e-5)
    total = math.fsum(w.detach().double().square().sum().item() for w in convs.values()) ** 0.5
    assert float(row["weight_norm_end"]) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("net", ["cnn", "resnet-small"])
@pytest.mark.parametrize("norm", ["groupnorm-ws", "mabn"])
def test_norms_that_change_weights_start_from_the_same_parameters_and_record_them(norm, net, monkeypatch):
    cell = Cell(norm, 24, net=net, n_train=48)
    data, steps = cell_module._loaders(cell, small(), "cpu")
    trained = cell_module.weights(cell_module._model(cell, data, steps), nn.Conv2d)
    plain = cell_module.weights(cell_module._model(Cell("default", 24, net=net), data, steps), nn.Conv2d)
    assert list(trained) == list(plain)
    assert all(torch.equal(trained[name][1], plain[name][1]) for name in plain)
    models = watch(monkeypatch, "_model")
    row, norms = run_cell(cell, small(), norms_every=1)
    convs = {n: m for n, m in models[0].named_modules() if isinstance(m, nn.Conv2d)}
    assert row["status"] != "diverged" and list(norms) == ["step", *convs]
    for name, conv in convs.items():
        assert norms[name][-1] == pytest.approx(conv.parametrizations.weight.original.norm().item(), rel=1e-5)
        w = conv.weight.detach().flatten(1)
        torch.testing.assert_close(w.mean(1), torch.zeros(len(w)), atol=1e-6, rtol=0)
        if norm == "groupnorm-ws":
            torch.testing.assert_close(w.var(1, correction=0), torch.ones(len(w)), atol=0.02, rtol=0)
    head = [m for m in models[0].modules() if isinstance(m, nn.Linear)]
    assert not any(nn.utils.parametrize.is_parametrized(m) for m in head)


@pytest.mark.parametrize("norm", ["onlinenorm", "mabn", "groupnorm-ws", "batchrenorm"])
def test_the_rivals_learn_in_batches_of_four(norm):
    row, _ = run_cell(Cell(norm, 4, lr_factor=0.3, epochs=8), small())
    assert row["status"] == "trained" and row["accuracy"] > 30


# norms whose statistics are measured


def measured(norm):
    """Two convolutions with `norm`, some inputs, and what each norm is fed when it evaluates them."""
    torch.manual_seed(0)
    make, x, fed = tasks.in_groups(get_norm(norm), 2), torch.randn(20, 3, 6, 6) * 3 + 1, []
    net = nn.Sequential(nn.Conv2d(3, 4, 3), make(4), nn.ReLU(), nn.Conv2d(4, 4, 3), make(4))
    hooks = [net[i].register_forward_pre_hook(lambda _, args: fed.append(args[0].detach())) for i in (1, 4)]

    def evaluated():
        fed.clear()
        with torch.no_grad():
            net.eval()(x)
        net.train()
        return list(fed)

    return net, x, evaluated, hooks


@pytest.mark.parametrize("norm, when", [("frozen", "before"), ("precise", "after")])
def test_measured_statistics_are_the_pooled_ones_that_each_layer_sees_in_evaluation(norm, when):
    net, x, evaluated, _ = measured(norm)
    other = {"before": "after", "after": "before"}[when]
    settle_statistics(norm, net, other, lambda: pytest.fail("this norm needs no inputs then"))
    settle_statistics(norm, net, when, lambda: x)
    for layer, seen in zip((net[1].norm, net[4].norm), evaluated(), strict=True):
        # evaluation divides by the unbiased variance
        torch.testing.assert_close(layer.running_mean, seen.mean((0, 2, 3)), rtol=0.01, atol=1e-3)
        torch.testing.assert_close(layer.running_var, seen.var((0, 2, 3)), rtol=0.01, atol=0)


def test_frozen_statistics_never_move_and_the_layer_is_a_fixed_affine_map():
    net, x, _, hooks = measured("frozen")
    settle_statistics("frozen", net, "before", lambda: x)
    for hook in hooks:
        hook.remove()
    norm, fixed = net[1].norm.double(), {n: b.clone() for n, b in net.named_buffers()}
    z, dy = (torch.randn(1, 4, 2, 2, dtype=torch.float64) for _ in range(2))
    z, column = z.requires_grad_(), lambda v: v[:, None, None]
    want = column(norm.weight) * (z - column(norm.running_mean)) / column(norm.running_var + norm.eps).sqrt()
    want = want + column(norm.bias)
    assert norm.training
    inputs = [z, norm.weight, norm.bias]
    got = norm(z)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy))
    assert all(torch.equal(b, fixed[n]) for n, b in net.named_buffers())


def test_a_diverged_net_keeps_its_statistics():
    net, x, *_ = measured("precise")
    net[0].weight.data.fill_(math.nan)
    settle_statistics("precise", net, "after", lambda: x)
    assert net[1].norm.running_var.tolist() == [1] * 4


@pytest.mark.parametrize("norm", ["frozen", "precise"])
def test_a_cell_measures_statistics_over_its_training_images(norm, monkeypatch):
    models, settle, found = watch(monkeypatch, "_model"), cell_module.settle_statistics, {}

    def watched(text, model, when, inputs):
        settle(text, model, when, inputs)
        found[when] = {n: b.clone() for n, b in model.named_buffers() if "running" in n}

    monkeypatch.setattr(cell_module, "settle_statistics", watched)
    row, _ = run_cell(Cell(norm, 4, lr_factor=0.1, n_train=48), small())
    before, after = found["before"], found["after"]
    assert row["status"] != "diverged" and len(after) == 10
    assert all(torch.equal(before[n], after[n]) for n in before) == (norm == "frozen")
    if norm == "precise":
        first, images = models[0][0], (small().train.x[:48].float() / 255 - small().mean[0]) / small().std[0]
        seen = F.relu(F.conv2d(images, first[0].weight, None, 2, 2))
        torch.testing.assert_close(next(iter(after.values())), seen.mean((0, 2, 3)).detach())


def test_recording_norms_changes_no_result():
    with_norms, without = (run_cell(Cell("default", 8), small(), norms_every=k)[0] for k in (1, None))
    assert with_norms | {"seconds": 0} == without | {"seconds": 0}


@pytest.mark.parametrize("n_train", [7, 65])
def test_an_impossible_number_of_images_is_refused(n_train):
    with pytest.raises(ValueError, match=f"from the batch size, 8, to the 64 training images of glyphs; got {n_train}"):
        run_cell(Cell("default", 8, n_train=n_train), small())


@pytest.mark.cuda
def test_a_cell_on_cuda_stops_at_a_nonfinite_loss():
    row, _ = run_cell(Cell("none", 8, lr_factor=1e6, epochs=100), small(), "cuda")
    assert row["status"] == "diverged" and row["steps"] < 800
    assert run_cell(Cell("default", 8, epochs=6), small(), "cuda")[0]["accuracy"] > 30


# the grid


def test_a_grid_has_all_combinations_by_seed_with_small_batches_first():
    cells = cells_of(["default", "frn"], [8, 2], seeds=[0, 1], lr_factors=[1, 2], n_train=64)
    assert len(cells) == 16 and len(set(cells)) == 16 and all(c.n_train == 64 for c in cells)
    assert [(c.seed, c.bs) for c in cells[::4]] == [(0, 2), (0, 8), (1, 2), (1, 8)]


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"bs": [0]}, "bs must be a whole number, 1 or more; got 0"),
        ({"seeds": [1.5]}, "seed must be a whole number, 0 or more; got 1.5"),
        ({"net": ["vgg"]}, "net must be one of cnn, .*got 'vgg'"),
        ({"lr_factors": [math.inf]}, "finite number above 0; got inf"),
        ({"norms": []}, "a grid needs at least a norm"),
    ],
)
def test_an_empty_grid_and_invalid_settings_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        cells_of(**{"norms": ["default"], "bs": [8], **kwargs})


def test_each_cell_has_a_row_with_settings_results_machine_and_versions(here):
    result, lines = run(few(), here)
    rows = table.read_rows(here)
    assert result.rows == rows and len(rows) == 4 and not result.failed and result.todo == 0
    assert [(r["norm"], r["bs"]) for r in rows] == [(n, b) for b in ("8", "16") for n in ("default", "batchnorm")]
    assert all(r["torch"] == torch.__version__ and r["machine"] and r["date"] and r["n_train"] == "64" for r in rows)
    assert lines[0] == "4 cells, 0 finished, 4 to train" and lines[-1].startswith(
        "[4/4] glyphs cnn batchnorm bs 16 seed 0:"
    )


def test_finished_cells_are_not_trained_again_and_new_ones_are(here):
    run(few(), here)
    before = here.read_bytes()
    result, lines = run(few(), here)
    assert here.read_bytes() == before and lines == ["4 cells, 4 finished, 0 to train"] and len(result.rows) == 4
    _, lines = run(few(bs=(8, 16, 32)), here)
    assert lines[0] == "6 cells, 4 finished, 2 to train" and here.read_bytes().startswith(before)


def test_another_version_or_recipe_is_another_cell(here, monkeypatch):
    run(few(["default"], [8]), here)
    monkeypatch.setattr(cell_module, "__version__", "9.9")
    assert run(few(["default"], [8]), here)[1][0] == "1 cell, 0 finished, 1 to train"
    monkeypatch.setitem(RECIPES, "default", RECIPES["default"].but(name="default", elements=64))
    assert run(few(["default"], [8]), here)[1][0] == "1 cell, 0 finished, 1 to train"
    assert len(table.read_rows(here)) == 3


def test_finished_cells_of_different_code_are_kept_and_noted(here, monkeypatch):
    run(few(["default"], [8]), here)
    monkeypatch.setattr(grid, "code_of", lambda: "changed")
    lines = run(few(["default"], [8]), here)[1]
    assert lines[0] == "1 cell, 1 finished, 0 to train"
    assert lines[1].startswith("note: 1 of the finished cells were trained with different code")


def test_the_same_cell_again_gives_the_same_result(here):
    first, second = (run(few(["default"], [8]), here.with_name(n))[0].rows[0] for n in ("a.csv", "b.csv"))
    assert {**first, "seconds": ""} == {**second, "seconds": ""}


def break_cell(monkeypatch, norm, error):
    real = workers.run_cell

    def broken(cell, *args):
        if cell.norm == norm:
            raise error
        return real(cell, *args)

    monkeypatch.setattr(workers, "run_cell", broken)


def test_a_failing_cell_is_named_and_tried_again_and_stops_no_other(here, monkeypatch):
    with monkeypatch.context() as broken:
        break_cell(broken, "default", RuntimeError("out of luck"))
        result, lines = run(few(), here)
    assert [c.norm for c in result.failed] == ["default", "default"] and result.todo == 2 and len(result.rows) == 2
    assert "out of luck" in next(iter(result.failed.values()))
    assert lines[1].startswith("[1/4] glyphs cnn default bs 8 seed 0: FAILED: RuntimeError: out of luck")
    result, lines = run(few(), here)
    assert lines[0] == "4 cells, 2 finished, 2 to train" and len(result.rows) == 4 and not result.failed


def test_ctrl_c_keeps_finished_cells_and_the_next_call_continues(here, monkeypatch):
    with monkeypatch.context() as broken:
        break_cell(broken, "batchnorm", KeyboardInterrupt())
        result, _ = run(few(), here)
    assert result.interrupted and result.todo == 3 and [r["norm"] for r in result.rows] == ["default"]
    result, lines = run(few(), here)
    assert lines[0] == "4 cells, 1 finished, 3 to train" and not result.interrupted and len(result.rows) == 4


def test_ctrl_c_in_the_middle_of_training_leaves_no_row(here, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cell_module._StopAtNonFinite, "after_loss", interrupt)
    result, _ = run(few(["default"], [8]), here)
    assert result.interrupted and result.rows == [] and table.read_rows(here) == []


def test_an_incomplete_row_is_ignored_and_its_cell_trained_again(here):
    run(few(["default"], [8, 16]), here)
    whole = here.read_text()
    here.write_text(whole[:-40])
    assert len(table.read_rows(here)) == 1
    _, lines = run(few(["default"], [8, 16]), here)
    assert lines[0] == "2 cells, 1 finished, 1 to train"
    again = table.read_rows(here)
    assert (
        len(again) == 2
        and here.read_text().count("\n") == 3
        and here.read_text().startswith(whole[: whole.rfind("\nglyphs")])
    )


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda row: row.replace(b"glyphs", b"glyp\xffs", 1), "cells.csv is not UTF-8 text: .*byte 0xff"),
        (lambda row: row.replace(b",", b"", 1), r"cells.csv, row 2 has 25 fields, not 26"),
        (lambda row: row.replace(b",8,", b",8x,", 1), r"cells.csv, row 2: bs must be a number; got '8x'"),
    ],
    ids=["no text", "a comma", "a number"],
)
def test_a_damaged_row_is_named_and_the_file_unchanged(damage, text, here):
    run(few(["default"], [8, 16]), here)
    head, first, second = here.read_bytes().splitlines(keepends=True)
    damaged = head + second + damage(first)
    here.write_bytes(damaged)
    with pytest.raises(ValueError, match=text):
        run(few(["default"], [8, 16, 32]), here)
    assert here.read_bytes() == damaged


def test_a_csv_with_other_columns_is_refused_and_unchanged(here):
    here.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns than this version of fastrbn writes"):
        run(few(), here)
    assert here.read_text() == "a,b\n1,2\n"


def test_weight_norms_have_their_own_file_and_a_cell_without_it_is_trained_again(here):
    result, _ = run(few(["default", "batchnorm"], [8]), here)
    assert not list(here.parent.glob("*_norms"))
    result, lines = run(few(["default", "batchnorm"], [8]), here, norms_every=3)
    assert lines[0] == "2 cells, 0 finished, 2 to train" and len(result.rows) == 2
    files = sorted(here.parent.glob("cells_norms/*.csv"))
    assert len(files) == 2 and files[0].name.startswith("glyphs-cnn-batchnorm-bs8-")
    assert files[0].read_text().splitlines()[0].startswith("step,0.0,1.0")
    assert run(few(["default"], [8]), here, norms_every=3)[1] == ["1 cell, 1 finished, 0 to train"]
    steps, norms = table.read_norms(files[1])
    assert steps == [0, 3, 6] and all(n > 1 for n in norms)


def test_jpeg_images_replace_a_missing_set_under_their_own_name(here, monkeypatch):
    jpeg = dataclasses.replace(small(), name="cifar10-jpeg")
    for module in (grid, workers):
        monkeypatch.setattr(module, "load_images", lambda *_: jpeg)
    result, lines = run(cells_of(["default"], [8], data=["cifar10"]), here)
    assert result.rows[0]["data"] == "cifar10-jpeg" and lines[0].startswith(
        "cifar10 was not found in its original format"
    )


def test_the_jpeg_folder_is_found_under_the_data_root(tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for i, label in enumerate("ab"):
            folder = tmp_path / "cifar10-jpeg" / part / label
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (i * 200, 0, 0)).save(folder / "1.png")
    for name in ("cifar10", "cifar10-jpeg"):
        images = compare.load_images(name, tmp_path)
        assert (images.name, len(images.train), images.c_in) == ("cifar10-jpeg", 2, 3)
    assert compare.load_images("cifar10@8", tmp_path).train.x.shape[2:] == (8, 8)
    cells, lines = compare.cells_of(["default"], [2], data=["cifar10@8"]), []
    assert grid._resolve_data(cells, tmp_path, lines.append)[0].data == "cifar10-jpeg@8"


# processes


@pytest.fixture
def folder(tmp_path):
    """Images that other processes can load too."""
    from PIL import Image

    data = small()
    for part, ds in (("train", data.train), ("valid", data.valid)):
        for i, (x, y) in enumerate(zip(ds.x, ds.y)):
            at = tmp_path / "images" / part / f"{int(y)}"
            at.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[0].numpy()).save(at / f"{i}.png")
    return tmp_path


def test_processes_give_the_same_results_and_a_dying_one_costs_its_cell_only(folder, monkeypatch):
    cells = cells_of(["default", "batchnorm"], [8, 16], data=[str(folder / "images")])
    alone, _ = run(cells, folder / "alone.csv")
    real = workers._Worker.give

    def give(self, cell):
        real(self, cell)
        if (cell.norm, cell.bs) == ("default", 8):
            self.process.kill()
            self.process.join()

    monkeypatch.setattr(workers._Worker, "give", give)
    before = os.environ.get("OMP_NUM_THREADS")
    result, lines = run(cells, folder / "together.csv", jobs=2)
    assert lines[0].endswith("to train in 2 processes on cpu") and os.environ.get("OMP_NUM_THREADS") == before
    assert [(c.norm, c.bs) for c in result.failed] == [("default", 8)]
    assert next(iter(result.failed.values())) == "its process died with exit status -9"
    same = [n for n in table.COLUMNS if n != "seconds"]
    want = [[r[n] for n in same] for r in alone.rows if (r["norm"], r["bs"]) != ("default", "8")]
    assert [[r[n] for n in same] for r in result.rows] == want
    assert multiprocessing.active_children() == []


# table and pictures


def made_row(norm="default", bs=8, seed=0, accuracy=98.0, status="trained", **others):
    row = dict.fromkeys(table.COLUMNS, "")
    row |= {"data": "mnist", "net": "cnn", "norm": norm, "settings": norm, "bs": bs, "lr_factor": 1, "seed": seed}
    row |= {"n_train": 50000, "epochs": 1, "augment": 0, "device": "cpu", "version": "1", "status": status}
    row |= {"accuracy": "" if accuracy is None else accuracy, "date": "2026-01-01", **others}
    return {k: str(v) for k, v in row.items()}


def cells_in(text, norm):
    line = next(line for line in text.splitlines() if line.startswith(f"| {norm} |"))
    return [c.strip() for c in line.split("|")[2:-1]]


def test_the_table_has_mean_spread_and_failures():
    rows = [made_row(seed=s, accuracy=a) for s, a in enumerate([98.0, 98.2, 98.4])]
    rows += [made_row("batchnorm", seed=s, accuracy=a) for s, a in enumerate([97.0, 97.2])]
    rows += [made_row("batchnorm", seed=2, accuracy=9.9, status="diverged")]
    rows += [made_row("frn", seed=s, accuracy=10, status="chance") for s in range(3)]
    rows += [made_row("batchnorm", bs=1, accuracy=None, status="refused"), made_row("frn", bs=1, accuracy=96.5)]
    text = compare.markdown(rows)
    assert text.splitlines()[0] == "### mnist, cnn, 50000 images, 1 epoch, 1 to 3 seeds"
    assert "| batch size | 1 | 8 |" in text
    assert cells_in(text, "default") == ["", "**98.20 ± 0.20**"]
    assert cells_in(text, "batchnorm") == ["refused", "97.10 ± 0.14 (1 of 3 diverged)"]
    assert cells_in(text, "frn") == ["**96.50**", "at chance (10.0)"]


def test_the_best_of_some_seeds_is_not_bold():
    rows = [
        made_row("frn", accuracy=99),
        made_row("frn", seed=1, accuracy=9.8, status="diverged"),
        made_row(accuracy=90),
    ]
    text = compare.markdown(rows)
    assert cells_in(text, "frn") == ["99.00 (1 of 2 diverged)"] and cells_in(text, "default") == ["**90.00**"]


def test_several_learning_rates_give_one_table_per_batch_size():
    rows = [made_row(bs=b, lr_factor=f, accuracy=90 + f) for b in (1, 512) for f in (0.5, 1, 2)]
    text = compare.markdown(rows)
    assert "| norm | 0.5 (0.025) | 1 (0.05) | 2 (0.1) |" in text and "| norm | 0.5 (1) | 1 (2) | 2 (4) |" in text


def test_data_nets_and_devices_have_separate_tables_and_titles():
    rows = [made_row(), made_row(device="cuda"), made_row(data="fashion"), made_row(accuracy=50, settings="changed")]
    titles = [line for line in compare.markdown(rows).splitlines() if line.startswith("###")]
    assert len(titles) == len(set(titles)) == 3
    assert cells_in(compare.markdown(rows), "default #2") == ["50.00"], "a recipe that was changed is another norm"


def test_the_order_is_recipes_with_their_variants_then_peers():
    names = ["frn", "batchnorm", "default:mom=0.05", "course", "default"]
    (group,) = results.groups_of([made_row(n) for n in names])
    assert group.norms == ["default", "default:mom=0.05", "course", "batchnorm", "frn"]


def test_the_picture_has_a_line_a_norm_and_the_lost_in_the_table_below():
    rows = [made_row(n, bs=b, accuracy=a) for n, a in (("default", 98.2), ("course", 97.9)) for b in (1, 2, 8)]
    rows += [made_row("frn", bs=b, accuracy=a) for b, a in ((1, 97.5), (2, 60.0), (8, 97.7))]
    rows += [made_row("batchnorm", bs=1, accuracy=None, status="refused")]
    rows += [made_row("batchnorm", bs=2, accuracy=9.8, status="diverged"), made_row("batchnorm", bs=8, accuracy=98)]
    fig = report_module.accuracy_figure(rows)
    upper, lower = fig.axes
    assert upper.get_ylim()[0] > 90, "60 % must not press the others into a line"
    assert [t.get_text() for t in lower.get_xticklabels()] == ["1", "2", "8"] and upper.get_xscale() == "log"
    cells = {t.get_text(): t.get_position()[0] for t in lower.texts}
    assert cells == {"60": 2, "NaN": 2, "refused": 1}
    assert [t.get_text() for t in lower.get_yticklabels()] == ["batchnorm", "frn"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["default", "course", "batchnorm", "frn"]


def test_a_norm_that_lost_some_of_its_seeds_is_on_the_axis_and_in_the_table():
    rows = [made_row(seed=s, accuracy=98 + s / 10) for s in (0, 1)] + [
        made_row(seed=2, accuracy=9.8, status="diverged")
    ]
    upper, lower = report_module.accuracy_figure(rows).axes
    assert [t.get_text() for t in lower.texts] == ["1/3 NaN"]
    (bars,) = [c for c in upper.containers if len(c[0].get_xdata())]
    assert bars[0].get_ydata()[0] == pytest.approx(98.05)


def test_a_picture_of_nothing_trained_can_be_drawn(tmp_path):
    fig = report_module.accuracy_figure([made_row("batchnorm", bs=1, accuracy=None, status="refused")])
    fig.savefig(tmp_path / "a.png")
    plots.plot_comparison([]).savefig(tmp_path / "b.png")
    plots.plot_weight_norms([]).savefig(tmp_path / "c.png")


def test_weight_norms_are_a_line_a_norm_with_a_cross_where_training_stopped():
    curves = {
        "default": ([0, 10, 20], [20, 21, 22]),
        "frn": ([0, 10], [20, 900]),
        "none": ([0, 10, 20], [20, 50, math.nan]),
    }
    (ax,) = plots.plot_weight_norms([("here", curves)]).axes
    crosses = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "x"]
    assert crosses == [(10, 900), (10, 50)] and ax.get_yscale() == "log"
    (ax,) = plots.plot_weight_norms([("here", {"default": curves["default"]})]).axes
    assert ax.get_yscale() == "linear"


def test_the_report_writes_table_and_the_pictures_there_are_data_for(here):
    run(few(["default"], [8], lr_factors=[0.5, 1]), here, norms_every=4)
    text, files = compare.write_report(here)
    assert [f.name for f in files] == ["table.md", "accuracy.png", "sweep.png", "weight_norms.png"]
    assert files[0].read_text() == text and all(f.read_bytes()[:4] == b"\x89PNG" for f in files[1:])
    _, files = compare.write_report(here, "named", table.read_rows(here)[:1])
    assert [f.name for f in files] == ["named.md", "named.png", "named_norms.png"]
    with pytest.raises(ValueError, match="no finished cell"):
        compare.write_report(here.with_name("none.csv"))
