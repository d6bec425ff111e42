"""The example of a plug-in package installs with pip, without the network, and trains."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastrbn.cli import main, run_folder, train
from fastrbn.data import glyphs

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


@pytest.fixture
def cli(site, tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder, with the example installed: returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(site)

    def run(*args):
        status = main([*args])
        return status, *capsys.readouterr()

    return run


def test_the_example_is_listed_with_the_first_line_of_its_documentation(cli):
    status, out, err = cli("callbacks")
    assert (status, err) == (0, "")
    built_in, _, plug_ins = out.partition("Plug-ins (entry points of the group fastrbn.callbacks):\n")
    first = "Adds normal noise to each gradient before the step, less and less of it."
    assert f"  GradientNoise(std=0.01, decay=0.55)\n      {first}\n" in plug_ins and "GradientNoise" not in built_in


def test_the_example_trains_by_name_and_its_errors_are_the_commands(cli, monkeypatch):
    monkeypatch.setattr(train, "load_dataset", lambda *_: glyphs(24, 24))
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
    status, out, err = cli("train", "glyphs", "--limit", "24", "--out", "r", "--cb", "GradientNoise:std=0.02")
    assert status == 0, err
    assert "GradientNoise: 3 steps" in out
    assert "GradientNoise(std=0.02)" in Path("r/config.json").read_text()


def test_the_example_refuses_a_wrong_argument_through_the_command_line(cli):
    status, _, err = cli("train", "glyphs", "--cb", "GradientNoise:std=-1")
    assert status == 2 and "--cb GradientNoise:std=-1: std must be 0 or more; got -1" in err
    status, _, err = cli("train", "glyphs", "--cb", "GradientNoise:sdt=1")
    assert status == 2 and "Did you mean 'std'?" in err
