"""Which checkpoints are written and kept, full and failing disks, and SaveBest."""

import errno
import math
import random
import zipfile
from pathlib import Path

import pytest
import torch

from fastrbn.callbacks import (
    EMA,
    AvgStatsCallback,
    Checkpoint,
    CheckpointError,
    CSVLogger,
    HaltOnNaN,
    Profiler,
    SaveBest,
    accuracy,
)
from fastrbn.learn import Callback, CancelTrainException, Runner, checkpoint_file


class SetLoss(Callback):
    """Sets the loss of each epoch."""

    def __init__(self, losses):
        self._losses = losses

    def after_pred(self):
        loss = self._losses[self.run.epoch]
        self.run.loss_func = lambda pred, yb: pred.sum() * 0 + loss


def make_run(folder, *cbs, **kwargs):
    run = Runner([AvgStatsCallback(accuracy), Checkpoint(folder, **kwargs), *cbs])
    run.logger = lambda line: None
    return run


def steps(folder):
    """The steps of the checkpoints in a folder, in the order of writing."""
    return [int(p.stem.split("-")[-1]) for _, p in checkpoint_file.files(folder)]


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"keep": None}, [4, 8, 12]),
        ({}, [8, 12]),
        ({"keep": 1}, [12]),
        ({"every": 3, "keep": None}, [3, 6, 9, 12, 12]),
        ({"every": 5, "keep": None}, [5, 10, 12]),
        ({"every": 5, "keep": None, "monitor": "train_loss"}, [4, 5, 8, 10, 12]),
    ],
    ids=str,
)
def test_it_saves_on_schedule_and_keeps_the_newest(kwargs, expected, make_learn, tmp_path):
    make_run(tmp_path / "c", **kwargs).fit(3, make_learn())
    assert steps(tmp_path / "c") == expected
    assert not list(tmp_path.glob("c/.*")), "a temporary file is left"


def test_the_best_epochs_file_stays_beside_the_newest_even_after_a_resume(make_learn, tmp_path):
    losses = [3.0, 1.0, 2.0, math.nan, 1.0, 0.5]
    run = make_run(tmp_path / "c", SetLoss(losses), keep=1, monitor="train_loss")
    run.fit(4, make_learn())
    assert steps(tmp_path / "c") == [8, 16]
    assert run.checkpoint.best == 1.0 and run.checkpoint.best_path.name == "checkpoint-0002-step-8.pt"
    again = make_run(tmp_path / "c", SetLoss(losses), keep=1, monitor="train_loss")
    again.fit(5, make_learn(), resume=tmp_path / "c")
    assert steps(tmp_path / "c") == [8, 20], "an equal value is no improvement"
    again.fit(6, resume=tmp_path / "c")
    assert steps(tmp_path / "c") == [24] and again.checkpoint.best == 0.5


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"every": 0}, "every, unless it is None, must be a whole number, 1 or more; got 0"),
        ({"keep": 2.5}, "keep, unless it is None, must be a whole number"),
        ({"monitor": "valid_score"}, "whether 'valid_score' should fall .* got None"),
        ({"monitor": "valid_loss", "mode": "low"}, "got 'low'"),
        ({"mode": "min"}, "add monitor, or remove mode"),
    ],
    ids=str,
)
def test_an_invalid_setting_is_an_error(kwargs, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        Checkpoint(tmp_path / "c", **kwargs)


def test_a_file_in_place_of_the_folder_is_an_error(make_learn, tmp_path):
    with pytest.raises(ValueError, match=r"needs a folder, .*got the file .*model.pt"):
        Checkpoint(tmp_path / "model.pt")
    run = make_run(tmp_path / "c")
    (tmp_path / "c").write_text("")
    with pytest.raises(NotADirectoryError, match="use another name"):
        run.fit(1, make_learn())


@pytest.mark.parametrize("cls", [Checkpoint, SaveBest])
def test_a_monitor_that_is_not_measured_is_an_error_before_training(cls, make_learn, tmp_path):
    def fit(monitor, *cbs, **kwargs):
        Runner([cls(tmp_path / "c", monitor=monitor), *cbs]).fit(1, make_learn(**kwargs))

    with pytest.raises(ValueError, match="needs an AvgStatsCallback in the run, which measures 'valid_loss'"):
        fit("valid_loss")
    with pytest.raises(ValueError, match="got 'vaild_accuracy'. Did you mean 'valid_accuracy'?"):
        fit("vaild_accuracy", AvgStatsCallback(accuracy))
    with pytest.raises(ValueError, match="measured in validation, but data.valid_dl is None"):
        fit("accuracy", AvgStatsCallback(accuracy), n_valid=0)


# --- folders with checkpoints


def test_checkpoints_of_another_fit_are_not_overwritten_by_default(make_learn, tmp_path):
    run = make_run(tmp_path / "c")
    run.fit(1, make_learn())
    run.fit(1)  # the same callback may reuse its folder
    assert steps(tmp_path / "c") == [4, 4]
    with pytest.raises(FileExistsError, match=r"another fit \(checkpoint-0002-step-4.pt\): resume it with .*resume="):
        make_run(tmp_path / "c").fit(1, make_learn())
    make_run(tmp_path / "c").fit(2, make_learn(), resume=tmp_path / "c")
    assert steps(tmp_path / "c") == [4, 8]
    make_run(tmp_path / "c", overwrite=True).fit(1, make_learn())
    assert steps(tmp_path / "c") == [4]


def test_the_newest_is_the_one_written_last_not_the_one_with_most_steps(make_learn, tmp_path):
    make_run(tmp_path / "c", keep=None).fit(3, make_learn())
    first = checkpoint_file.files(tmp_path / "c")[0][1]
    again = make_run(tmp_path / "c", Ends(1), keep=None)
    again.fit(3, make_learn(), resume=first)
    assert steps(tmp_path / "c") == [4, 8, 12, 8]
    last = make_run(tmp_path / "c")
    last.fit(3, make_learn(), resume=tmp_path / "c")
    assert last.resumed_from.name == "checkpoint-0004-step-8.pt"


class Ends(Callback):
    _order = 2000

    def __init__(self, epoch):
        self._epoch = epoch

    def after_epoch(self):
        if self.run.epoch == self._epoch:
            raise CancelTrainException("enough")


# --- a full disk


class Disk:
    """A full disk: the writes with these numbers, counted from 1, fail halfway."""

    def __init__(self, monkeypatch, *full):
        self.full, self.count = full, 0
        self._write = checkpoint_file.write_whole
        monkeypatch.setattr(checkpoint_file, "write_whole", self)

    def __call__(self, path, content):
        self.count += 1
        if self.count in self.full:
            Path(path).with_name(f".{Path(path).name}.1.tmp").write_bytes(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write(path, content)


def test_one_failed_write_is_a_warning_and_the_next_one_succeeds(make_learn, tmp_path, monkeypatch):
    Disk(monkeypatch, 2)
    run = make_run(tmp_path / "c", SetLoss([2.0, 1.0, 1.5]), monitor="train_loss")
    text = (
        r"checkpoint-0002-step-8.pt could not be written \(No space left on device\); the previous one, "
        r"checkpoint-0001-step-4.pt, is intact. Training goes on"
    )
    with pytest.warns(RuntimeWarning, match=text):
        run.fit(3, make_learn())
    assert steps(tmp_path / "c") == [4, 12] and run.stop_reason is None
    assert run.checkpoint.best == 1.5 and run.checkpoint.best_path.exists(), "the best of the epochs that were saved"


def test_two_failed_writes_in_a_row_or_the_last_end_the_fit(make_learn, tmp_path, monkeypatch):
    Disk(monkeypatch, 2, 3, 5)
    run = make_run(tmp_path / "c")
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match="Free disk space and resume from it"):
        run.fit(5, make_learn())
    assert run.epoch == 2 and run.stop_reason.startswith("CheckpointError in Checkpoint.after_epoch")
    assert steps(tmp_path / "c") == [4]
    again = make_run(tmp_path / "c")
    with pytest.raises(CheckpointError, match="checkpoint-0003-step-12.pt could not be written"):
        again.fit(3, make_learn(), resume=tmp_path / "c")
    assert steps(tmp_path / "c") == [4, 8]
    again.fit(3, resume=tmp_path / "c")
    assert steps(tmp_path / "c") == [8, 12] and not list(tmp_path.glob("c/.*"))


def test_a_failed_first_write_says_that_there_is_no_previous_file(make_learn, tmp_path, monkeypatch):
    Disk(monkeypatch, 1)
    with pytest.raises(CheckpointError, match=r"there is no previous one\. Free disk space, or use"):
        make_run(tmp_path / "c").fit(1, make_learn())


def test_files_can_be_read_whatever_crc32_options_torch_has(make_learn, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        make_run(tmp_path / "c").fit(1, make_learn())
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    make_run(tmp_path / "c").fit(2, make_learn(), resume=tmp_path / "c")


# --- flipped bits


def small_state():
    parts = {part: {} for part in ("opt", "callbacks", "random")}
    position = {"phase": "end", "epoch": 0, "done": None, "n_iter": 3, "n_epochs": 1, "epochs": 1, "iters": 3}
    return {"model": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(7)}, "position": position, **parts}


def without_checksum(path):
    """Rewrites a file as torch.save does, without a checksum, as old versions did."""
    state = torch.load(path, weights_only=True)
    del state["checksum"]
    torch.save(state, path)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_is_an_error_or_changes_nothing(tmp_path):
    path, state = tmp_path / "checkpoint-0001-step-3.pt", small_state()
    checkpoint_file.write(path, state)
    whole, refused = path.read_bytes(), 0
    names = [info.filename.encode() for info in zipfile.ZipFile(path).infolist()]
    directory = [whole.rindex(name) for name in names]  # the last occurrence of a name is in the zip's directory
    bits = [8 * at + n for at in directory for n in (5, 6, 7)] + [8 * (at - 8) + 4 for at in directory]
    for bit in [*bits, *random.Random(1).sample(range(8 * len(whole)), 400)]:
        flip(path, bit)
        try:
            read = checkpoint_file.read(path)
        except CheckpointError as e:
            refused += 1
            assert str(path) in str(e)
        else:
            assert all(read[k] == state[k] for k in state if k != "model"), bit
            assert all(torch.equal(read["model"][k], v) for k, v in state["model"].items()), bit
        path.write_bytes(whole)
    assert refused > 400


def test_the_previous_file_is_used_whatever_error_reading_the_newest_gives(tmp_path, monkeypatch):
    for n in (1, 2):
        checkpoint_file.write(tmp_path / checkpoint_file.file_name(n, 3), small_state())
    newest = tmp_path / checkpoint_file.file_name(2, 3)
    without_checksum(newest)
    name = zipfile.ZipFile(newest).infolist()[0].filename.encode()
    flip(newest, 8 * newest.read_bytes().rindex(name) + 7)
    with pytest.warns(UserWarning, match=r"0002-step-3.pt is not whole .*; resuming from .*0001-step-3.pt instead"):
        file, _ = checkpoint_file.find(tmp_path)
    assert file.name == "checkpoint-0001-step-3.pt"


def test_a_file_without_a_checksum_is_read_with_a_warning(tmp_path):
    path = tmp_path / "checkpoint-0001-step-3.pt"
    checkpoint_file.write(path, small_state())
    without_checksum(path)
    with pytest.warns(UserWarning, match="has no checksum, because an older version wrote it"):
        assert checkpoint_file.read(path)["position"] == small_state()["position"]


def test_a_file_with_a_truncated_checksum_is_an_error(tmp_path):
    path = tmp_path / "checkpoint-0001-step-3.pt"
    checkpoint_file.write(path, small_state())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is not whole"):
        checkpoint_file.read(path)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"model": None}, "'model' must be a dict; got NoneType"),
        ({"position": {"phase": "end"}}, "position.epoch must be a whole number; got nothing"),
        ({"position": {**small_state()["position"], "n_iter": "3"}}, "position.n_iter must be a whole number; got '3'"),
        ({"position": {**small_state()["position"], "phase": "noon"}}, "position.phase must be train, valid or end"),
    ],
    ids=str,
)
def test_a_state_of_another_shape_is_an_error(change, text, tmp_path):
    checkpoint_file.write(tmp_path / "a.pt", {**small_state(), **change})
    with pytest.raises(CheckpointError, match=text):
        checkpoint_file.read(tmp_path / "a.pt")


def test_torch_alone_reads_the_file_with_and_without_mmap(tmp_path):
    checkpoint_file.write(tmp_path / "a.pt", small_state())
    for mmap in (False, True):
        read = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert torch.equal(read["model"]["w"], small_state()["model"]["w"])


# --- SaveBest


def save_best(path, losses, epochs, make_learn, **kwargs):
    run = Runner([SaveBest(path, **kwargs), AvgStatsCallback(accuracy), SetLoss(losses)])
    run.logger = lambda line: None
    seen = []

    class Keeps(Callback):
        def after_epoch(self):
            seen.append({k: v.clone() for k, v in self.run.model.state_dict().items()})

    run.add_cbs(Keeps)
    run.fit(epochs, make_learn())
    return run, seen


@pytest.mark.parametrize("mode, best", [(None, 1), ("min", 1), ("max", 0)])
def test_the_weights_are_those_of_the_best_epoch(mode, best, make_learn, tmp_path):
    run, seen = save_best(tmp_path / "a" / "best.pt", [3.0, 1.0, 2.0, math.nan, 1.0], 5, make_learn, mode=mode)
    assert (run.save_best.best, run.save_best.best_epoch) == ([3.0, 1.0][best], best)
    saved = torch.load(tmp_path / "a" / "best.pt", weights_only=True)
    learn = make_learn()
    learn.model.load_state_dict(saved)
    assert saved.keys() == seen[best].keys()
    assert all(torch.equal(saved[k], seen[best][k]) for k in saved)
    assert not all(torch.equal(saved[k], seen[best + 1][k]) for k in saved)


def test_a_metrics_name_means_validation_and_nothing_is_written_when_all_is_nan(make_learn, tmp_path):
    run, _ = save_best(tmp_path / "a.pt", [1.0, 1.0], 2, make_learn, monitor="accuracy")
    assert run.save_best.best == max(row["valid_accuracy"] for row in run.avg_stats.history)
    run, _ = save_best(tmp_path / "b.pt", [math.nan], 1, make_learn)
    assert run.save_best.best is None and not (tmp_path / "b.pt").exists()


def test_the_best_so_far_survives_a_resume(make_learn, tmp_path):
    def run():
        made = make_run(tmp_path / "c", SaveBest(tmp_path / "best.pt", "train_loss"), SetLoss([1.0, 2.0, 3.0, 0.5]))
        return made

    first = run()
    first.fit(2, make_learn())
    before = (tmp_path / "best.pt").read_bytes()
    again = run()
    again.fit(3, make_learn(), resume=tmp_path / "c")
    assert (tmp_path / "best.pt").read_bytes() == before and again.save_best.best_epoch == 0
    again.fit(4, resume=tmp_path / "c")
    assert (tmp_path / "best.pt").read_bytes() != before and again.save_best.best == 0.5


def test_a_folder_in_place_of_its_file_is_an_error(make_learn, tmp_path):
    with pytest.raises(IsADirectoryError, match=r"add a name, best.pt"):
        save_best(tmp_path, [1.0], 1, make_learn)


def test_a_further_fit_replaces_the_file_only_by_a_better_epoch(make_learn, tmp_path):
    path = tmp_path / "best.pt"
    losses = [3.0, 1.0]
    run, seen = save_best(path, losses, 2, make_learn)
    best = path.read_bytes()
    losses[:] = [2.0, 1.5]
    run.fit(2)
    assert path.read_bytes() == best and (run.save_best.best, run.save_best.best_epoch) == (1.0, 1)
    losses[:] = [0.5, 2.0]
    run.fit(2)
    assert torch.equal(torch.load(path, weights_only=True)["0.weight"], seen[4]["0.weight"])
    assert (run.save_best.best, run.save_best.best_epoch) == (0.5, 0)
    losses[:] = [4.0, 5.0]
    path.unlink()
    run.fit(2)
    assert path.exists() and run.save_best.best == 4.0, "without the file the search starts again"
    losses[:] = [6.0, 7.0]
    run.fit(2, make_learn())
    assert run.save_best.best == 6.0, "with another model the search starts again"


def test_the_file_of_a_compiled_model_loads_into_the_plain_one(make_learn, tmp_path):
    learn = make_learn()
    learn.model = torch.compile(learn.model, backend="eager")
    run = Runner([SaveBest(tmp_path / "best.pt"), AvgStatsCallback(), EMA()])
    run.logger = lambda line: None
    run.fit(1, learn)
    plain = make_learn().model
    plain.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert all(torch.equal(p, run.ema.weights[name]) for name, p in plain.named_parameters())
    run.ema.put()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), learn.model.parameters()))


def test_averages_are_saved_without_validation(make_learn, tmp_path):
    run = Runner([SaveBest(tmp_path / "best.pt", "train_loss"), AvgStatsCallback(), EMA()])
    run.logger = lambda line: None
    run.fit(1, make_learn(n_valid=0))
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in run.ema.weights.items())
    assert not torch.equal(saved["0.weight"], run.learn.model[0].weight)


def test_a_relative_path_is_resolved_at_construction(make_learn, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    cbs = [SaveBest("best.pt"), Checkpoint("c"), CSVLogger("history.csv"), Profiler("trace.json", 1, 0, 1)]
    halts = HaltOnNaN(path="report")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert halts.path == tmp_path / "report"
    run = Runner([AvgStatsCallback(), *cbs])
    run.logger = lambda line: None
    run.fit(1, make_learn())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "c", "elsewhere", "history.csv", "trace.json"]
    assert list((tmp_path / "elsewhere").iterdir()) == []
