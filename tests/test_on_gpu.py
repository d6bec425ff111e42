"""`benchmarks/on_gpu.sh`: its parts in order, what a second call does, what it reports; and that its commands work."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tape import Tape
from torch import nn

from fastrbn.cli import main, run_folder
from fastrbn.cli import train as cli_train
from fastrbn.cli.options import parser
from fastrbn.data import glyphs

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.sh"
if not SCRIPT.is_file():
    pytest.skip("the tests run outside the repository: there are no benchmarks", allow_module_level=True)

ALL = "tests mnist nan norm norm-compiled steps cifar steps-compiled callbacks mnist-graph small".split()
# in place of Python: records the command, and is slow or fails where it is told to
STUB = r"""#!/usr/bin/env bash
[ "$1" != -c ] || exit 0
printf '%q ' "$@" >>"$CALLS" && echo >>"$CALLS"
[[ " $* " != *" ${SLOW:-nothing} "* ]] || exec sleep 60
[[ " $* " != *" ${BROKEN:-nothing} "* ]] || exit 1
[[ $* != *"--lr 1e30"* ]] || exit 3
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with CIFAR-10 as a few images, and an empty one called MNIST."""
    root = tmp_path_factory.mktemp("data")
    (root / "MNIST").mkdir()
    for part, n in (("train", 7), ("test", 1)):
        for label in range(10):
            folder = root / "cifar10-jpeg" / part / f"class{label}"
            folder.mkdir(parents=True)
            for k in range(n):
                Image.effect_noise((32, 32), 10 + 10 * label).convert("RGB").save(folder / f"{k}.jpg")
    return root


@pytest.fixture
def on_gpu(tmp_path, data):
    """on_gpu(argument, …) runs the script with the stub and gives status, output and the commands that it started."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "tmp").mkdir()

    def run(*args, **env):
        calls.write_text("")
        given = {"PYTHON": stub, "CALLS": calls, "TMPDIR": tmp_path / "tmp", "FASTRBN_DATA": data, **env}
        done = subprocess.run(
            ["bash", SCRIPT, *args],
            env=os.environ | {name: str(value) for name, value in given.items()},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        commands = [shlex.split(line) for line in calls.read_text().splitlines()]
        return done.returncode, done.stdout + done.stderr, commands

    return run


def results(output):
    """(part, result) in order; the other lines about a part show its command, which starts with a path."""
    lines = [line[3:].split(": ", 1) for line in output.splitlines() if line.startswith("== ")]
    return [(name, text.split(",")[0]) for name, text in lines if name in ALL and text[0] != "/"]


def test_a_rehearsal_runs_every_part_in_order_of_worth_and_leaves_nothing_behind(on_gpu, tmp_path):
    status, output, _ = on_gpu("--rehearse")
    assert status == 0 and results(output) == [(name, "done") for name in ALL]
    assert not any((tmp_path / "tmp").iterdir())


def test_a_second_call_goes_on_with_what_failed_or_ran_out_of_time(on_gpu, tmp_path):
    arguments = ("--rehearse", "--out", str(tmp_path / "out"), "D", "nan", "steps")
    trouble = {"BROKEN": "benchmarks/callbacks.py", "SLOW": "plain,graph", "LIMITS": "nan=7 steps=0.1"}
    status, output, _ = on_gpu(*arguments, **trouble)
    assert status == 1 and output.endswith("== callbacks (FAILED, status 1)\n== steps (out of time)\n")
    status, output, commands = on_gpu(*arguments)
    assert status == 0
    assert results(output) == [("callbacks", "done"), ("nan", "done before"), ("steps", "done")]
    assert [command[0] for command in commands] == ["benchmarks/callbacks.py", "benchmarks/cifar.py"]
    assert "== nan: done" in (tmp_path / "out" / "nan.log").read_text()


def test_a_part_that_does_not_exist_is_refused_before_anything_runs(on_gpu):
    status, output, commands = on_gpu("--rehearse", "nan", "typo")
    assert (status, commands) == (2, []) and "no part is called typo: " in output
    assert set(output.split(": ")[-1].split()) == {*ALL, *"ABCDE"}


def test_parts_whose_images_are_missing_are_skipped(on_gpu, tmp_path):
    status, output, commands = on_gpu("--out", str(tmp_path / "out"), FASTRBN_DATA=tmp_path)
    assert status == 0 and len(commands) == 4
    skipped = [name for name, result in results(output) if result == "skipped"]
    assert skipped == ["mnist", "nan", "steps", "cifar", "steps-compiled", "mnist-graph", "small"]


@pytest.mark.parametrize("form", [(), ("--rehearse",)], ids=["device", "rehearsal"])
def test_every_option_of_every_command_exists(on_gpu, form, tmp_path, benchmark_script, monkeypatch):
    class Parsed(Exception):
        pass

    def stop(device):
        raise Parsed

    _, _, commands = on_gpu(*form, "--out", str(tmp_path / "out"))
    assert len(commands) == len(ALL)
    for command in commands:
        command = ["cpu" if word == "cuda" else word for word in command]  # other devices are refused
        if command[1] == "pytest":
            files = [SCRIPT.parents[1] / name for name in command if name.endswith(".py")]
            assert len(files) > 5 and all(file.is_file() for file in files)
        elif command[1] == "fastrbn":
            parser().parse_args(command[2:])  # ends with a message otherwise
        else:
            module = benchmark_script(Path(command[0]).stem)
            monkeypatch.setattr(module, "machine", stop)  # all of them ask for it next
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(Parsed):
                module.main()


@pytest.mark.parametrize(
    "part, result, files",
    [
        ("mnist", 0, ["mnist/history.csv"]),
        ("nan", 3, ["nan/config.json"]),
        ("norm", 0, ["norm_cuda.csv", "norm_cuda.png"]),
        ("steps", 0, ["cifar_steps.csv", "cifar.md"]),
        ("small", 0, ["cifar.csv", "cifar.png"]),
        ("callbacks", 0, ["callbacks_cuda.csv"]),
    ],
)
def test_a_part_works(on_gpu, part, result, files, tmp_path, data, benchmark_script, monkeypatch, capsys):
    """In this process, because every start of Python costs seconds; what compiles is left to the whole rehearsal."""
    _, _, [command] = on_gpu("--rehearse", "--out", str(tmp_path / "out"), part)
    monkeypatch.setenv("FASTRBN_DATA", str(data))
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
    small, real = glyphs(16, 10), cli_train.load_dataset
    monkeypatch.setattr(cli_train, "load_dataset", lambda name, *a: small if name == "glyphs" else real(name, *a))
    if command[0] == "-m":
        assert main(command[2:]) == result
    else:
        module = benchmark_script(Path(command[0]).stem)
        monkeypatch.setattr(sys, "argv", command)
        assert (module.main() or 0) == result
    for file in files:
        assert (tmp_path / "out" / file).stat().st_size > 0


def test_recorded_steps_of_cifar_reach_the_losses_of_plain_ones(benchmark_script, monkeypatch):
    """What a rehearsal on the CPU leaves out, with `Tape` for CUDA's graphs."""
    cifar = benchmark_script("cifar")
    monkeypatch.setattr(cifar, "Recorder", Tape)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
    xb, yb = torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    plain, recorded = (cifar.make_step(way, model, xb, yb)[0] for way in ("plain", "graph"))
    assert len(plain.unique()) == len(plain) > 1
    torch.testing.assert_close(recorded, plain)
