"""Public docstrings have numpy's form, name every parameter, and their examples run; public functions are annotated."""

import doctest
import inspect
import re
from collections.abc import Iterator

import matplotlib.pyplot as plt
import pytest
import torch

import fastrbn
import fastrbn.basics

NAMES = [name for name in fastrbn.__all__ if callable(getattr(fastrbn, name))]
INHERITED = {"forward", "extra_repr", "state_dict", "load_state_dict"}  # documented by the base class, as events are
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def parameters(function, skip_self: bool) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[skip_self:]


def section(doc: str, title: str) -> str:
    """The text of a section, empty if there is none."""
    found = re.search(rf"^{title}\n-{{{len(title)}}}\n(.*?)(?=^\w[\w ]*\n---|\Z)", doc, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def faults_of_form(doc: str | None, params: list, returns: bool = False, example: bool = False) -> Iterator[str]:
    if not doc:
        yield "no docstring"
        return
    heads = [head for line in section(doc, "Parameters").splitlines() if (head := line.split(" : ")[0]) != line]
    listed = {name.strip().lstrip("*") for head in heads for name in head.split(",")}
    for p in params:
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in listed:
            yield f"Parameters does not list {p.name}"
    yield from (f"Parameters lists {name}, which is not one" for name in listed - {p.name for p in params})
    if returns and not section(doc, "Returns") and not section(doc, "Yields"):
        yield "no Returns section"
    if example and ">>>" not in section(doc, "Examples"):
        yield "no example"


def faults_of_annotation(function, skip_self: bool, returns: bool = True) -> Iterator[str]:
    for p in parameters(function, skip_self):
        if p.annotation is p.empty and not p.name.startswith("_"):
            yield f"parameter {p.name} is not annotated"
    if returns and inspect.signature(function).return_annotation is inspect.Signature.empty:
        yield "the return value is not annotated"


def methods(cls: type) -> Iterator[tuple[str, object, bool]]:
    """(name, function, takes self?) of the public methods and properties that `cls` itself defines."""
    for name, value in vars(cls).items():
        if name.startswith("_") or name in INHERITED or (name in fastrbn.EVENTS and cls is not fastrbn.Callback):
            continue
        static = isinstance(value, staticmethod)
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(value) and value.__module__ == cls.__module__:
            yield name, value, not static


def faults(obj) -> list[str]:
    if not inspect.isclass(obj):
        returns = inspect.signature(obj).return_annotation not in (None, "None")
        form = faults_of_form(inspect.getdoc(obj), parameters(obj, False), returns, example=True)
        return [*form, *faults_of_annotation(obj, False)]
    own = vars(obj).get("__doc__") and inspect.getdoc(obj)
    if issubclass(obj, BaseException):
        return list(faults_of_form(own, []))
    record = hasattr(obj, "__dataclass_fields__") or issubclass(obj, tuple)
    made_here = {"__init__", "__new__"} & vars(obj).keys()
    found = list(faults_of_form(own, parameters(obj, False) if made_here else [], example=not record))
    if "__init__" in made_here:
        found += faults_of_annotation(obj.__init__, True, returns=False)
    for name, method, takes_self in methods(obj):
        of_method = [*faults_of_annotation(method, takes_self), *([] if inspect.getdoc(method) else ["no docstring"])]
        found += [f"{name}: {fault}" for fault in of_method]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_has_its_sections_and_everything_is_annotated(name):
    assert faults(getattr(fastrbn, name)) == []


@pytest.fixture(scope="module")
def names():
    """What examples may use: the names of `fastrbn.basics`, and `data`, small batches of digits."""
    basics = {name: getattr(fastrbn.basics, name) for name in fastrbn.basics.__all__}
    return {**basics, "data": fastrbn.image_databunch(fastrbn.glyphs(256, 64), 16)}


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_run(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner, report = doctest.DocTestRunner(optionflags=OPTIONS), []
    for test in doctest.DocTestFinder().find(getattr(fastrbn, name), name, globs=names):
        torch.manual_seed(0)
        runner.run(test, out=report.append)
    plt.close("all")
    assert runner.failures == 0, "".join(report)


def test_the_checks_catch():
    def wrong(x, y: int):
        """Add.

        Parameters
        ----------
        z : int
            Not there.
        """

    assert faults(wrong) == [
        *("Parameters does not list x", "Parameters does not list y", "Parameters lists z, which is not one"),
        *("no Returns section", "no example", "parameter x is not annotated", "the return value is not annotated"),
    ]
