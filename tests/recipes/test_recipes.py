"""Each recipe runs as a user would run it, in a folder of its own, and reaches what it promises."""

import re
import runpy
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPES = sorted(p for p in HERE.glob("*.py") if not p.name.startswith("test_"))
OPTIONAL = {"fastai", "lightning", "timm", "torchmetrics"}  # not in the test extra: large, and of one recipe each


def valid(name):
    """The last validation's value of a metric."""
    return lambda names, out: names["run"].avg_stats.history[-1][f"valid_{name}"]


# What shows that a recipe works: a value of its names and its output, and the least that it must be
PROMISES = {
    "class_weights": (valid("accuracy"), 0.85),
    "dict_batch": (valid("accuracy"), 0.9),
    "images_of_different_sizes": (valid("accuracy"), 0.9),
    "mixed_precision": (valid("accuracy"), 0.2),
    "regression": (lambda names, out: -valid("mean_absolute_error")(names, out), -0.4),
    "resume_in_the_middle": (lambda names, out: out.endswith("True\n"), True),
    "segmentation": (valid("accuracy"), 0.93),
    "signals": (valid("accuracy"), 0.75),
    "streaming": (valid("accuracy"), 0.9),
    "timm_net_converted": (valid("accuracy"), 0.2),
    "two_inputs": (valid("accuracy"), 0.9),
    "two_processes": (valid("accuracy"), 0.2),
}


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_and_keeps_its_promise(file, tmp_path, monkeypatch, capsys):
    missing = OPTIONAL & set(re.findall(r"^(?:import|from) (\w+)", file.read_text(), re.MULTILINE))
    for package in missing:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        names = runpy.run_path(str(file))
    value, least = PROMISES[file.stem]
    assert value(names, capsys.readouterr().out) >= least


def test_recipes_are_short_and_each_has_a_page():
    assert {p.stem for p in RECIPES} == set(PROMISES)
    for file in RECIPES:
        assert len(file.read_text().splitlines()) < 25, file.name
        page = ROOT / "docs" / "recipes" / f"{file.stem.replace('_', '-')}.md"
        assert f'--8<-- "tests/recipes/{file.name}"' in page.read_text()
        assert f"]({page.name})" in (page.parent / "index.md").read_text()
