"""Each recipe runs as a user would run it, in a folder of its own, and reaches what it promises."""

import re
import runpy
import warnings
from pathlib import Path

import pytest

from fastrbn import accuracy

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPES = sorted(p for p in HERE.glob("*.py") if not p.name.startswith("test_"))
OPTIONAL = {"fastai", "lightning", "timm", "torchmetrics"}  # not in the test extra: large, and of one recipe each


def valid(name):
    """The last validation's value of a metric."""
    return lambda names, out: names["run"].avg_stats.history[-1][f"valid_{name}"]


# What shows that a recipe works: a value of its names and its output, and the least that it must be
PROMISES = {
    "class_weights": (lambda names, out: min(names["per_class"].compute()), 0.8),
    "dict_batch": (valid("accuracy"), 0.85),
    "export": (lambda names, out: "\nTrue\n" in out, True),
    "fastai_learner": (lambda names, out: names["learn"].recorder.values[-1][-1], 0.9),
    "images_of_different_sizes": (valid("accuracy"), 0.9),
    "lightning_trainer": (lambda names, out: len(names["magnitudes"].steps), 50),
    "load_a_run": (lambda names, out: names["run"].evaluate().accuracy, 0.5),
    "log_to_anything": (lambda names, out: len(names["board"].rows), 10),
    "mixed_precision": (valid("accuracy"), 0.2),
    "multi_label": (valid("f1"), 0.8),
    "own_loop": (lambda names, out: "of step 30" in out and out.endswith("True\n"), True),
    "predict": (lambda names, out: float(accuracy(*names["run"].predict()[:2])), 0.2),
    "reduce_on_plateau": (lambda names, out: len(set(names["run"].recorder.lrs[0])), 2),
    "regression": (lambda names, out: -valid("mean_absolute_error")(names, out), -0.4),
    "resume_in_the_middle": (lambda names, out: out.endswith("True\n"), True),
    "segmentation": (valid("accuracy"), 0.9),
    "signals": (valid("accuracy"), 0.7),
    "streaming": (valid("accuracy"), 0.9),
    "timm_net_converted": (valid("accuracy"), 0.4),
    "torchmetrics_in_a_fit": (valid("MulticlassF1Score"), 0.05),
    "two_inputs": (valid("accuracy"), 0.9),
    "two_processes": (valid("accuracy"), 0.2),
    "two_rates_and_freezing": (valid("accuracy"), 0.6),
    "validate": (lambda names, out: names["run"].validate()["accuracy"], 0.2),
}


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_and_keeps_its_promise(file, tmp_path, monkeypatch, capsys):
    packages = OPTIONAL & set(re.findall(r"^(?:import|from) (\w+)", file.read_text(), re.MULTILINE))
    for package in packages:
        warnings.simplefilter("ignore")  # they warn of each other's newer versions
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
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
