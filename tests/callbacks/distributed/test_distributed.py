"""One fit in many processes: what `ranks.py` checks in two gloo processes, one test a check, and torchrun itself."""

import csv
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from callbacks.distributed.ranks import BROKEN, CHECKS
from processes import run_ranks

import fastrbn
from fastrbn.callbacks import AvgStats, Distributed
from fastrbn.callbacks.distributed.agreement import ERROR, Agreement
from fastrbn.callbacks.distributed.shards import Dealt, Part, shard
from fastrbn.learn import Runner
from fastrbn.learn.passes import set_epoch
from fastrbn.learn.ranks import _is_running

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
ROOT = Path(fastrbn.__file__).parents[1]
TESTS = Path(__file__).parents[2]
TIMEOUT = 600


def environment(**variables):
    path = os.pathsep.join([str(ROOT), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **variables}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def results_of(folder, checks, world=2):
    """What `ranks.py` says of its `checks`, by rank."""
    env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return run_ranks(folder, world, "callbacks.distributed.ranks", checks, env=env, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("ranks"), "CHECKS")


@pytest.fixture(scope="module")
def broken_ranks(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("broken"), "BROKEN", world=4)  # some have no link to the one that fails


def check_found(ranks, name):
    for rank, (found, error) in enumerate(zip(*ranks, strict=True)):
        assert name in found, f"rank {rank} did not come to an end: hung, or a check before failed\n{error}"
        assert found[name] == "", f"rank {rank}: {found[name]}"


@pytest.mark.parametrize("name", [f.__name__ for f in CHECKS])
def test_ranks(ranks, name):
    check_found(ranks, name)


@pytest.mark.parametrize("name", [f.__name__ for f in BROKEN])
def test_ranks_that_fail(broken_ranks, name):
    results, errors = map(list, broken_ranks)
    if "killed" in name:
        del results[1], errors[1]
    check_found((results, errors), name)


# torchrun

SCRIPT = """
import sys
from functools import partial
import torch
from callbacks.distributed.ranks import loaders, net
from fastrbn import *

torch.set_num_threads(1)
opt = partial(torch.optim.SGD, momentum=0.9)
cbs = [Recorder, partial(AvgStatsCallback, accuracy), ProgressCallback, Distributed]
learn, run = get_runner(net(), loaders(4), lr=0.1, cbs=cbs, opt_func=opt)
run.fit(3, learn)
if run.distributed.rank == 0:
    torch.save(learn.model.state_dict(), sys.argv[1])
"""


def torchrun(*args, cwd, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def test_a_torchrun_script_runs_unchanged_in_one_process(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = torchrun("script.py", "a.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("valid_loss") == 1, "rank 0 speaks"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", "b.pt"])
    runpy.run_path("script.py")
    a, b = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "ab")
    assert a.keys() == b.keys() and int(a["1.num_samples_tracked"]) == int(b["1.num_samples_tracked"]) == 3 * 45


DYING_COMMAND = """
import os, signal, sys
from fastrbn.cli import run_folder, train
from fastrbn.callbacks import Recorder
from fastrbn.cli import main
from fastrbn.data import glyphs

def after_step(self):
    if self.run.n_iter == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

Recorder.after_step = after_step
run_folder.plots.png = lambda figure: b"a picture"
train.load_dataset = lambda *_: glyphs(64, 64)
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_line_prints_once_and_resumes_when_torchrun_restarts_it(tmp_path):
    (tmp_path / "dying.py").write_text(DYING_COMMAND)
    arguments = ("train", "glyphs", "--limit", 64, "--epochs", 3, "--checkpoint-every", 3)
    done = torchrun("dying.py", *arguments, cwd=tmp_path, restarts=1)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"going on from runs/{folder.name}/checkpoints/checkpoint-0002-step-6.pt" in done.stdout
    assert done.stdout.count("batch size 8 on each of 2 processes (16 a step), learning rate 0.6667") == 2
    assert len(re.findall("^done: 3 epochs", done.stdout, re.M)) == 1
    config = json.loads((folder / "config.json").read_text())
    assert len(config["resumed"]) == 1 and config["processes"] == 2
    assert config["result"] == {**config["result"], "status": 0, "steps": 12}
    with open(folder / "history.csv", newline="") as f:
        assert [row["epoch"] for row in csv.DictReader(f)] == ["0", "1", "2"]


# one process


def test_without_torchrun_it_changes_nothing(make_learn, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ends = []
    for cbs in ([], [Distributed()]):
        learn = make_learn()
        Runner(cbs).fit(2, learn)
        ends.append(learn.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, ends)))
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        ({"timeout": 0}, ValueError, "timeout is a number of seconds above 0; got 0"),
        ({"timeout": "5"}, TypeError, "timeout is a number of seconds; got '5'"),
        ({"backend": 3}, TypeError, "backend is a name such as 'gloo' or 'nccl', or None; got 3"),
        ({"sync_norm": 1}, TypeError, "sync_norm is True or False; got 1"),
        ({"shard": "no"}, TypeError, "shard is True or False; got 'no'"),
    ],
)
def test_invalid_arguments_raise_with_the_rule(kwargs, error, text):
    with pytest.raises(error, match=re.escape(text)):
        Distributed(**kwargs)
    assert Distributed(timeout=timedelta(minutes=1)).timeout.total_seconds() == 60


def test_an_incomplete_environment_raises_naming_the_missing_variables(make_learn, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="has WORLD_SIZE=2 but not RANK, MASTER_ADDR, MASTER_PORT: start the"):
        Runner([Distributed()]).fit(1, make_learn())
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(RuntimeError, match="WORLD_SIZE in the environment is the number of processes; got 'two'"):
        Runner([Distributed()]).fit(1, make_learn())


def test_a_pytorch_without_distributed_is_named(make_learn, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed, and this PyTorch was built without it"):
        Runner([Distributed()]).fit(1, make_learn())


# parts of the data


@pytest.mark.parametrize("n", [32, 45, 43, 41, 40, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_parts_of_a_batch_sampler_have_equal_lengths_and_make_the_whole(n, drop_last):
    def parts(rows, bs, world, train):
        batches = torch.utils.data.BatchSampler(rows, bs, drop_last)
        return [Part(batches, rank, world, train) for rank in range(world)]

    world, bs = 3, 4
    made = parts(range(n), bs, world, train=True)
    lists = [list(p) for p in made]
    assert [len(p) for p in made] == [len(got) for got in lists]
    assert len({len(got) for got in lists}) == 1
    whole = list(torch.utils.data.BatchSampler(range(n), bs * world, drop_last))
    whole = [batch for batch in whole if len(batch) >= world]
    assert [sum((part[i] for part in lists), []) for i in range(len(lists[0]))] == whole
    sizes = [{len(part[i]) for part in lists} for i in range(len(lists[0]))]
    assert all(max(s) - min(s) <= 1 for s in sizes)
    valid = [list(p) for p in parts(range(n), bs, world, train=False)]
    assert [len(p) for p in parts(range(n), bs, world, train=False)] == [len(got) for got in valid]
    kept = n - n % bs if drop_last else n
    assert sorted(sum((row for part in valid for row in part), [])) == list(range(kept))


class Numbered(torch.utils.data.SequentialSampler):
    def set_epoch(self, number):
        self.number = number


class OtherLoader(torch.utils.data.DataLoader):
    """Not cut by sample."""


@pytest.mark.parametrize("kind", [torch.utils.data.DataLoader, OtherLoader])
def test_samplers_that_shuffle_by_the_number_of_the_pass_are_told_of_it_behind_a_part(kind):
    loader = kind(range(6), 2, sampler=Numbered(range(6)))
    set_epoch(shard(loader, 0, 2, train=True), 7)
    assert loader.sampler.number == 7


def test_batches_are_dealt_out_in_turn():
    with pytest.warns(
        UserWarning, match=r"last batches are left out of training \(1\): there is not one for each of the 2 processes"
    ):
        assert list(Dealt(range(7), 0, 2, True)) == [0, 2, 4]
    assert list(Dealt(range(7), 1, 2, True)) == [1, 3, 5] and len(Dealt(range(7), 1, 2, True)) == 3
    valid = [Dealt(range(7), r, 2, False) for r in range(2)]
    assert [list(d) for d in valid] == [[0, 2, 4, 6], [1, 3, 5]] and [len(d) for d in valid] == [4, 3]


def test_merged_averages_are_those_of_all_samples():
    stats = [AvgStats(lambda p, y: p.mean(), in_train=True) for _ in range(3)]
    for i, s in enumerate(stats[:2]):  # the third has seen nothing
        s.load_state_dict(
            {
                "names": s.names,
                "sizes": torch.tensor([2, 4][: i + 1]),
                "columns": [torch.tensor([1.0, 2.0])[: i + 1].double() for _ in s.names],
            }
        )
    rows = [[s.count, *s.all_stats] for s in stats]
    for s in stats:
        s.merge(lambda numbers: rows)
        assert s.count == 8 and s.avg_stats == [(2 * 1 + 2 * 1 + 4 * 2) / 8] * 2
    empty = AvgStats()
    empty.merge(lambda numbers: [[0, 0.0], [0, 0.0]])
    assert empty.avg_stats == []


def test_ranks_that_meet_with_errors_name_the_first_one():
    class Channel:
        rank, world, timeout = 0, 2, timedelta(seconds=3)

        def post(self, reason, caused):
            assert caused

        def gather(self, numbers, wait=None):
            return [numbers, numbers]  # the other one came as well

        def texts(self, text):
            return [text, "ValueError: broken"]

        def posts(self, wait):
            return {1: ("ValueError: broken", False), 0: ("timed out", True)}

        def leave_posts(self, wait):
            pass

    error = RuntimeError("gloo: Timed out waiting 3000ms")
    why = Agreement(Channel()).farewell(ERROR, "timed out", error)
    assert why.startswith("rank 1 ended the fit: ValueError: broken") and str(error) == why


@pytest.mark.parametrize(
    "alive, words",
    [
        ({1: True, 2: False, 3: None}, "rank 2 is gone without a word: its process has ended; see what"),
        ({1: False, 2: True, 3: False}, "rank 1 and rank 3 are gone without a word: their processes have ended; see"),
        ({1: True, 2: None, 3: None}, "rank 2 or rank 3 is gone or stuck without a word: see what it printed"),
        ({1: True, 2: True, 3: True}, "rank 1 or rank 2 or rank 3 is stuck: it does not answer, and its process is"),
    ],
)
def test_of_ranks_without_a_reason_those_not_known_to_be_alive_are_blamed(alive, words):
    class Channel:
        rank, world, timeout = 0, 4, timedelta(seconds=3)
        is_alive = alive.get

        def posts(self, wait):
            return {}  # the store was in a process that is gone, and so was this rank's own word

        def leave_posts(self, wait):
            pass

    error = RuntimeError("gloo: Connection closed by peer")
    assert Agreement(Channel())._amend(error, 3).startswith(words)
    assert str(error).endswith("; what that led to here: gloo: Connection closed by peer")


def test_an_ended_process_is_recognised_before_its_parent_collects_it():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert _is_running(process.pid) and _is_running(os.getpid())
    process.stdin.close()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still in the table
    assert not _is_running(process.pid)
    process.wait()
    assert not _is_running(process.pid)


def test_a_running_norm_with_its_own_process_group_keeps_it_without_a_warning():
    model, group = fastrbn.RunningBatchNorm(3), object()
    model.process_group = group
    distributed = Distributed()
    distributed.rank, distributed._norms = 0, []
    distributed._merge_norms(model)
    assert model.process_group is group and distributed._norms == []
