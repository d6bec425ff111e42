"""`run_study` and `best_points`: the rates with the first seed, the best of them with the others; and its script."""

import runpy
import sys
from pathlib import Path

import pytest

from fastrbn.compare import STUDIES, ZOO, Study, best_points, run_study, studies, table
from fastrbn.compare.grid import GridResult

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evidence.py"
STUDY = Study("Which?", {"dense": "Shapes", "mlp-adam": "Digits"}, {"default": "ours", "groupnorm": "GN"}, (1, 8),
              once=("groupnorm",))  # fmt: skip


def row(cell, score, **words):
    words = {"data": ZOO, "net": cell.net, "norm": cell.norm, "bs": cell.bs, "lr_factor": cell.lr_factor, **words}
    words |= {"seed": cell.seed, "accuracy": score}
    return (
        {"status": "trained"} | {k: "" for k in table.COLUMNS if k != "status"} | {k: str(v) for k, v in words.items()}
    )


@pytest.fixture
def stages(monkeypatch):
    """The cells of each stage of a study in which the score of the first seed falls with the rate, others' rise."""
    seen = []

    def run_grid(cells, path, *args, **settings):
        seen.append(list(cells))
        rows = [row(c, 50 - c.lr_factor if c.seed == 0 else 90 + c.lr_factor) for c in cells]
        return GridResult(rows, {}, False, 0)

    monkeypatch.setitem(STUDIES, "dense", STUDY)
    monkeypatch.setattr(studies, "run_grid", run_grid)
    return seen


def test_each_rate_is_trained_with_the_first_seed_and_the_best_with_the_others_a_task_at_a_time(stages):
    run_study("dense", "none.csv", log=print)
    first, others = stages
    assert len(first) == 2 * (2 + 1) * 3 and {cell.seed for cell in first} == {0}
    assert {(cell.norm, cell.bs) for cell in first} == {("default", 1), ("default", 8), ("groupnorm", 8)}
    assert len(others) == 2 * (2 + 1) * 2 and {cell.lr_factor for cell in others} == {0.333333}
    tasks = [cell.net for cell in others]
    assert tasks == sorted(tasks) and [cell.seed for cell in others[:6]] == [1] * 3 + [2] * 3


def test_the_best_rate_is_that_of_the_first_seed_whatever_the_others_reach(stages):
    first = studies._first(STUDY)
    rows = [row(c, 50 - c.lr_factor) for c in first]
    rows += [row(studies.Cell("default", 1, seed, 3, ZOO, "dense"), 99) for seed in (1, 2)]
    best = best_points(STUDY, rows)["dense", "default", 1]
    assert (best.factor, best.at_edge, best.point.total) == (0.333333, True, 1)
    rows += [row(studies.Cell("default", 1, 0, 1, ZOO, "dense"), 60, version="later")]
    assert best_points(STUDY, rows)["dense", "default", 1].factor == 1


needs_script = pytest.mark.skipif(not SCRIPT.is_file(), reason="the tests run outside the repository")


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run the script; its exit status and what its questions were given."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    names = runpy.run_path(str(SCRIPT))
    given = {}

    def other(name):
        return type(name, (), {"run": lambda path, **settings: given.update({name: (path.name, settings)}) or True})

    def run_study(name, path, jobs, device, full, log):
        given[name] = path.name, {"jobs": jobs, "device": device, "full": full}
        return GridResult([], {}, False, 0)

    names["main"].__globals__.update(OTHERS={n: other(n) for n in ("crossq", "drift")}, run_study=run_study)
    names["main"].__globals__["device_names"] = str  # a GPU need not be here

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["evidence.py", "--out", str(tmp_path / "out"), *words])
        return names["main"](), given

    return run


@needs_script
def test_on_a_gpu_everything_is_trained_and_crossq_on_the_cpu(command):
    status, given = command("--full", "--device", "cuda")
    assert status == 0 and list(given) == [*STUDIES, "crossq", "drift"]
    assert given["dense"] == ("dense-full.csv", {"jobs": None, "device": "cuda", "full": True})
    assert given["drift"][1]["device"] == "cuda" and given["crossq"][1].get("device", "cpu") == "cpu"


@needs_script
def test_a_wrong_name_is_found_before_anything_is_trained(command, tmp_path, capsys):
    given = None
    with pytest.raises(SystemExit) as end:
        _, given = command("dense", "norm-bacth")
    assert end.value.code == 2 and given is None and not (tmp_path / "out").exists()
    assert "got 'norm-bacth'" in capsys.readouterr().err


@needs_script
def test_results_at_full_length_are_shown_with_the_tasks_at_full_length(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    names = runpy.run_path(str(SCRIPT))
    cell = studies.Cell("default", 8, 0, 1, ZOO, "canvases-full")
    _, shown, _ = names["showing"]("dense", full=True)
    assert "| RunningBatchNorm |" in shown([row(cell, 61.5, date="2026-01-02")])
