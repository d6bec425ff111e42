"""Every notebook runs from top to bottom on little data, and is committed with outputs small enough for the web."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))
LIMIT, LIMITS = 2000, {"04_cifar": 1000}  # training samples, in place of the notebooks' `limit = None`


@pytest.fixture(scope="session")
def real_cifar():
    """The folder of real data sets, where CIFAR-10 is among them in one format or the other."""
    root = Path(os.environ.get("FASTRBN_DATA") or Path.home() / ".cache" / "fastrbn" / "data")
    if not any((root / name).is_dir() for name in ("cifar-10-batches-py", "cifar10-jpeg")):
        pytest.skip(f"no CIFAR-10 under {root}: set FASTRBN_DATA to the folder that holds cifar-10-batches-py")
    return root


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
def test_notebook_runs_and_its_asserts_hold(path, request, monkeypatch):
    if "get_data" in path.read_text():
        monkeypatch.setenv("FASTRBN_DATA", str(request.getfixturevalue("real_data")))
    if "cifar10" in path.read_text():
        monkeypatch.setenv("FASTRBN_DATA", str(request.getfixturevalue("real_cifar")))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("limit = None", f"limit = {LIMITS.get(path.stem, LIMIT)}")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable  # this environment's, not one that is registered elsewhere
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_executed_without_errors_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code), "execute it before committing"
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert os.path.getsize(path) < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_text_escapes_no_backslash_twice(path):
    # a formula would show its commands' names, and a shell command would end at the line's end
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type != "markdown" or "\\\\" not in cell.source, cell.source


def test_there_are_notebooks():
    assert NOTEBOOKS
