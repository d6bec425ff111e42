"""The example of a plug-in package installs with pip, without the network, and trains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastrbn

ROOT = Path(fastrbn.__file__).parents[1]
EXAMPLE = Path(__file__).parent / "plugin_example"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that pip has installed the example into, from a copy: a build leaves folders behind."""
    tree, target = tmp_path_factory.mktemp("tree") / "example", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, tree, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(tree)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(site, cwd, *args):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "error", "-m", "fastrbn", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_the_example_is_listed_with_the_first_line_of_its_documentation(site, tmp_path):
    done = run(site, tmp_path, "callbacks")
    assert (done.returncode, done.stderr) == (0, "")
    built_in, _, plug_ins = done.stdout.partition("Plug-ins (entry points of the group fastrbn.callbacks):\n")
    first = "Adds normal noise to each gradient before the step, less and less of it."
    assert f"  GradientNoise(std=0.01, decay=0.55)\n      {first}\n" in plug_ins and "GradientNoise" not in built_in


def test_the_example_trains_by_name_and_its_errors_are_the_commands(site, tmp_path):
    done = run(site, tmp_path, "train", "glyphs", "--limit", "24", "--out", "r", "--cb", "GradientNoise:std=0.02")
    assert done.returncode == 0, done.stderr
    assert "GradientNoise: 3 steps" in done.stdout
    assert "GradientNoise(std=0.02)" in (tmp_path / "r" / "config.json").read_text()


def test_the_example_refuses_a_wrong_argument_through_the_command_line(site, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(site)
    from fastrbn.cli import main

    assert main(["train", "glyphs", "--cb", "GradientNoise:std=-1"]) == 2
    assert "--cb GradientNoise:std=-1: std must be 0 or more; got -1" in capsys.readouterr().err
    assert main(["train", "glyphs", "--cb", "GradientNoise:sdt=1"]) == 2
    assert "Did you mean 'std'?" in capsys.readouterr().err
