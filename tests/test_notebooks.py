"""Every notebook runs from top to bottom on little data, and is committed with outputs small enough for the web."""

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the package nbformat is not installed")
NotebookClient = pytest.importorskip("nbclient", reason="the package nbclient is not installed").NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))
# Less work for the tests: texts of a notebook's code, and what stands in their place there
SMALLER = {
    "00_mnist": {
        "limit = None": "limit = 1200",
        "x_valid[:limit], y_valid[:limit]": "x_valid[:400], y_valid[:400]",
        "limit or 10000": "800",
    },
    "02_small_batches": {
        "limit = None": "limit = 500",
        "x_valid[:2000], y_valid[:2000]": "x_valid[:200], y_valid[:200]",
        "bs=[2, 8, 32]": "bs=[2, 32]",
    },
    "03_diagnose": {"samples, bs = 2000, 8": "samples, bs = 1200, 8"},
    "04_cifar": {
        "limit = None": "limit = 1000",
        "(128, 32, 8)": "(128, 8)",
        "(limit or 4000, 8, 1)": "(limit or 4000, 4, 1)",
    },
}


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
    for old, new in SMALLER.get(path.stem, {}).items():
        cells = [c for c in notebook.cells if c.cell_type == "code" and old in c.source]
        assert cells, f"the notebook has no {old!r} any more: SMALLER needs another text"
        for cell in cells:
            cell.source = cell.source.replace(old, new)
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
