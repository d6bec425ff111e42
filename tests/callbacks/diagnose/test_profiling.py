"""Profiler: the steps it records, its table, and a trace that is written whole."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.callbacks import Profiler
from fastrbn.learn import Callback, Learner, Runner


def make_learn(n=6, valid=1):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(n)]
    data = SimpleNamespace(train_dl=batches, valid_dl=batches[:valid] or None)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, data)


def fit(profiler, *cbs, epochs=1, **kwargs):
    run, lines = Runner([profiler, *cbs]), []
    run.logger = lines.append
    run.fit(epochs, make_learn(**kwargs))
    return run, lines


def steps_in(path):
    opened = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    with opened as f:
        events = json.load(f)["traceEvents"]
    return sorted({e["name"] for e in events if str(e.get("name", "")).startswith("ProfilerStep")}), events


@pytest.mark.parametrize("name", ["trace.json", "new/trace.json.gz"])
def test_it_records_the_steps_it_was_asked_for_and_writes_them_whole(name, tmp_path):
    path = tmp_path / name
    profiler = Profiler(path, steps=2, wait=1, warmup=1)
    _, lines = fit(profiler, epochs=2)
    steps, events = steps_in(path)
    assert steps == ["ProfilerStep#2", "ProfilerStep#3"] and profiler.recorded == 2
    assert sum(e.get("name") == "aten::addmm" for e in events) == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert len(lines) == 1 and lines[0].startswith(f"Profiler: 2 training steps; trace in {path}\n")
    assert "aten::addmm" in profiler.table and profiler.table in lines[0]
    assert next(a for a in profiler.averages() if a.key == "aten::addmm").count == 2


def test_the_table_has_so_many_rows():
    profiler = Profiler(steps=2, wait=0, warmup=1, rows=3)
    fit(profiler)
    rule = next(line for line in profiler.table.splitlines() if line.startswith("---"))
    assert len(profiler.table.split(rule)[2].strip().splitlines()) == 3


def test_a_fit_that_ends_within_the_window_gives_what_there_is(tmp_path):
    class Ends(Callback):
        def after_loss(self):
            if self.run.n_iter == 4:
                raise KeyboardInterrupt

    profiler = Profiler(tmp_path / "t.json", steps=5, wait=1, warmup=1)
    _, lines = fit(profiler, Ends())
    assert profiler.recorded == 2
    assert "Profiler: 2 training steps" in lines[0]
    assert len(steps_in(tmp_path / "t.json")[0]) == 3  # the one that was cut is in the trace too
    again = Profiler(steps=1, wait=0, warmup=1)
    fit(again)
    assert again.recorded == 1


def test_a_fit_without_enough_steps_is_told():
    with pytest.warns(
        UserWarning, match=r"recorded nothing: it starts after 7 steps \(wait=5, warmup=2\), and the fit had 6"
    ):
        fit(Profiler(wait=5))


def test_a_trace_that_cannot_be_written_is_told_and_the_fit_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    profiler = Profiler(tmp_path / "file" / "t.json", steps=1, wait=0, warmup=1)
    with pytest.warns(UserWarning, match="the trace could not be written to"):
        run, _ = fit(profiler)
    assert run.n_iter == 6 and profiler.table is not None


def test_shapes_and_memory_are_recorded_when_asked_for():
    profiler = Profiler(steps=1, wait=0, warmup=1, shapes=True, memory=True)
    fit(profiler)
    assert "Input Shapes" in profiler.table and "CPU Mem" in profiler.table


def test_nothing_recorded_has_no_averages():
    with pytest.raises(ValueError, match="Profiler has recorded nothing: run a fit of more than wait"):
        Profiler().averages()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"steps": 0}, "steps must be a whole number, 1 or more; got 0"),
        ({"wait": -1}, "wait must be a whole number, 0 or more; got -1"),
        ({"warmup": 0}, "warmup must be a whole number, 1 or more; got 0"),
        ({"rows": 2.5}, "rows must be a whole number, 1 or more; got 2.5"),
        ({"path": "trace.txt"}, "a file whose name ends in .json or .json.gz; got 'trace.txt'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_told(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Profiler(**kwargs)
