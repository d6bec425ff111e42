"""A wheel built from this tree works where it is installed; metadata, commands and continuous integration fit."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import fastrbn
from fastrbn.cli import plugins

ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.cfg").is_file():
    pytest.skip("the tests run outside the repository: there is nothing to build", allow_module_level=True)


def run(*command, cwd, **env):
    """The output of a command; its words are in the failure."""
    # `make test` hands its own flags and variables on to every make below it
    outer = ("PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS", "WORKERS", "VENV", "PYTHON")
    clean = {k: v for k, v in os.environ.items() if k not in outer}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without network from a copy, so that no build folder is left in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "fastrbn", tree / "fastrbn", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "fastrbn" / "norm" / "README.md").touch()  # any folder's README belongs in
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    (made,) = (tree / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel laid out by pip, without its dependencies (they are here)."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_holds_every_module_kernel_and_readme_of_the_package_and_nothing_else(wheel):
    tree = wheel.parents[1]
    extra = ("README.md", "py.typed")
    kept = {p for p in (tree / "fastrbn").rglob("*") if p.suffix in (".py", ".c", ".h") or p.name in extra}
    assert tree / "fastrbn" / "py.typed" in kept
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == {p.relative_to(tree).as_posix() for p in kept}


def test_the_wheel_imports_elsewhere_with_every_public_name(installed, tmp_path):
    code = "import fastrbn; print(fastrbn.__file__); print(*(n for n in fastrbn.__all__ if not hasattr(fastrbn, n)))"
    file, missing = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(file) == installed / "fastrbn" / "__init__.py"
    assert missing == ""


def test_the_wheels_commands_run_elsewhere(installed, tmp_path):
    env = {"PYTHONPATH": str(installed)}
    script = installed / "bin" / "fastrbn"
    for command in ([sys.executable, "-m", "fastrbn"], [sys.executable, script]):
        assert "fastrbn" in run(*command, "--help", cwd=tmp_path, **env)
        assert run(*command, "--version", cwd=tmp_path, **env) == f"fastrbn {fastrbn.__version__}\n"


def test_the_wheel_trains_elsewhere(installed, tmp_path):
    out = run(
        *(sys.executable, "-m", "fastrbn", "train", "glyphs", "--limit", "64", "--out", "r"),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert "done" in out
    assert {"config.json", "history.csv", "curves.png", "params.png", "model.pt"} <= set(os.listdir(tmp_path / "r"))


def test_the_metadata_says_what_users_need(installed):
    (info,) = installed.glob("fastrbn-*.dist-info")
    dist = PathDistribution(info)
    meta = dist.metadata
    assert (meta["Name"], meta["Version"], meta["Requires-Python"]) == ("fastrbn", fastrbn.__version__, ">=3.10")
    assert "Apache-2.0" in (meta.get("License"), meta.get("License-Expression"))
    assert list(info.rglob("LICENSE")) != []
    extras = {"test", "notebooks", "dev", "docs", "tensorboard", "export", "lightning", "fastai"}
    assert extras == set(meta.get_all("Provides-Extra"))
    scripts = {e.name: e.value for e in dist.entry_points if e.group == "console_scripts"}
    assert scripts == {"fastrbn": "fastrbn.cli:main"}
    callbacks = {e.name: e for e in dist.entry_points if e.group == "fastrbn.callbacks"}
    assert set(callbacks) == set(plugins.built_in())
    assert all(e.load().__name__ == name for name, e in callbacks.items())


def test_users_get_the_newest_torch_with_the_torchvision_that_fits():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needs = {re.split("[><=]", r)[0]: r for r in config["options"]["install_requires"].split("\n") if r}
    for name in ("torch", "torchvision"):
        assert re.fullmatch(rf"{name}>=[\d.]+", needs[name]), "a pin or an upper bound would hold users back"


def test_the_build_file_holds_the_build_system_only():
    sections = re.findall(r"^\[(.+?)\]", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert sections == ["build-system"]


def test_make_knows_its_commands_and_installs_before_it_runs(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("there is no make on this machine")
    for target, extra, last in (
        ("train", 'install -e "."', ".venv/bin/fastrbn train glyphs"),
        ("test", 'install -e ".[test]"', ".venv/bin/python -m pytest -n 2 --dist worksteal glyphs"),
        ("docs", 'install -e ".[docs]"', ".venv/bin/zensical build --strict"),
    ):
        for name in ("Makefile", "setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        lines = run("make", "-n", target, "ARGS=glyphs", cwd=tmp_path).splitlines()
        assert lines[0].endswith("-m venv .venv") and lines[-1] == last
        assert extra.replace('"', "") in lines[1].replace('"', "")


def test_make_sets_up_once(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("there is no make on this machine")
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    for stamp in (".installed", ".installed-test"):
        (tmp_path / ".venv" / stamp).touch()
    assert run("make", "-n", "train", cwd=tmp_path).strip() == ".venv/bin/fastrbn train"
    os.utime(tmp_path / ".venv" / ".installed", (0, 0))  # older than setup.cfg: the dependencies changed since
    assert "pip" in run("make", "-n", "train", cwd=tmp_path)


def test_continuous_integration_is_a_script_that_can_be_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert all(line in script.read_text() for line in ("set -euo pipefail", "make test", "make docs"))
    run("bash", "-n", script, cwd=ROOT)
