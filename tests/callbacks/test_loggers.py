"""CSVLogger: the file is whole after each epoch, whatever happens then."""

import csv
import os
from pathlib import Path

import pytest

from fastrbn.callbacks import AvgStatsCallback, CSVLogger, accuracy
from fastrbn.files import write_whole
from fastrbn.learn import Callback, Runner


def make_run(path, *cbs, metric=accuracy, **kwargs):
    run = Runner([CSVLogger(path, **kwargs), AvgStatsCallback(metric), *cbs])
    run.logger = lambda line: None
    return run


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def check(rows, history):
    assert [list(r) for r in rows] == [list(h) for h in history]
    for row, entry in zip(rows, history):
        assert {k: None if v == "" else float(v) for k, v in row.items()} == entry


def test_there_is_a_row_for_each_epoch(make_learn, tmp_path):
    run = make_run(tmp_path / "runs" / "a" / "history.csv")
    run.fit(3, make_learn())
    check(read(tmp_path / "runs" / "a" / "history.csv"), run.avg_stats.history)


def test_what_was_not_measured_is_an_empty_cell(make_learn, tmp_path):
    run = make_run(tmp_path / "h.csv")
    run.fit(1, make_learn(n_valid=0))
    assert read(tmp_path / "h.csv")[0]["valid_loss"] == ""


def test_the_file_is_complete_after_each_epoch(make_learn, tmp_path):
    class Reads(Callback):
        _order = 99

        def after_epoch(self):
            check(read(tmp_path / "h.csv"), self.run.avg_stats.history)
            assert os.listdir(tmp_path) == ["h.csv"], "a temporary file is left"

    run = make_run(tmp_path / "h.csv", Reads())
    run.fit(3, make_learn())
    assert len(run.avg_stats.history) == 3


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_rows_so_far_survive_what_ends_the_fit(make_learn, tmp_path, error):
    class Ends(Callback):
        def begin_epoch(self):
            if self.run.epoch == 2:
                raise error

    run = make_run(tmp_path / "h.csv", Ends())
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(5, make_learn())
    else:
        run.fit(5, make_learn())
    assert [r["epoch"] for r in read(tmp_path / "h.csv")] == ["0", "1"]


@pytest.mark.parametrize(("append", "epochs"), [(False, ["0"]), (True, ["0", "1", "0"])])
def test_a_second_fit_overwrites_or_appends(make_learn, tmp_path, append, epochs):
    run, learn = make_run(tmp_path / "h.csv", append=append), make_learn()
    run.fit(2, learn)
    run.fit(1, learn)
    assert [r["epoch"] for r in read(tmp_path / "h.csv")] == epochs


def test_appending_to_other_columns_is_an_error_and_leaves_the_file(make_learn, tmp_path):
    path = tmp_path / "h.csv"
    make_run(path).fit(1, make_learn())
    before = path.read_text()
    with pytest.raises(ValueError, match="needs a file with the columns epoch, train_loss, valid_loss.*has epoch"):
        make_run(path, metric=None, append=True).fit(1, make_learn())
    assert path.read_text() == before


def test_without_averages_the_error_says_what_to_add(make_learn, tmp_path):
    with pytest.raises(ValueError, match="CSVLogger writes what AvgStatsCallback measures, and the run has none"):
        Runner([CSVLogger(tmp_path / "h.csv")]).fit(1, make_learn())


def test_averages_of_a_subclass_serve_as_well(make_learn, tmp_path):
    class MyAverages(AvgStatsCallback):
        pass

    run = Runner([MyAverages(accuracy), CSVLogger(tmp_path / "h.csv")])
    run.logger = lambda line: None
    run.fit(1, make_learn())
    assert len(read(tmp_path / "h.csv")) == 1


def test_a_folder_in_place_of_a_file_is_an_error_before_training(make_learn, tmp_path):
    with pytest.raises(IsADirectoryError, match=r"add a name, history\.csv"):
        make_run(tmp_path).fit(1, make_learn())


# --- files that are written whole


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a" / "b.txt", "old")

    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff"])
def test_text_and_bytes_are_written_as_they_are(tmp_path, content):
    path = write_whole(str(tmp_path / "f"), content)
    assert isinstance(path, Path)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
