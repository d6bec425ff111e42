"""Tables of results that were copied by hand into a page say what the CSV files in benchmarks/results say."""

import re
from pathlib import Path

import pytest

from fastrbn.compare import read_rows
from fastrbn.compare.report import markdown, standing_table
from fastrbn.compare.results import groups_of, rank_score

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
if not RESULTS.is_dir():
    pytest.skip("the tests run outside the repository: there are no results", allow_module_level=True)

NAMES = {"`RunningBatchNorm`": "default", "nn.BatchNorm2d": "batchnorm", "GroupNorm": "groupnorm"}


def tables(path):
    """The tables of a page, each a list of rows, each a list of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()] for table in found]


def number(cell):
    """The first number of a cell, if it has one."""
    return float(found[0]) if (found := re.findall(r"-?\d+(?:\.\d+)?", cell)) else None


@pytest.mark.parametrize("name", ["small_batch_full", "small_batch_sweep", "small_batch_cifar", "zoo"])
def test_the_tables_beside_a_csv_are_those_of_its_rows(name):
    rows = read_rows(RESULTS / f"{name}.csv")
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert text.endswith(markdown(rows)), "the script that trained the rows writes them"
    assert name != "zoo" or standing_table(rows) in text


def test_the_sweep_and_cifar_are_copied_word_by_word():
    copied = [t for t in tables(ROOT / "benchmarks" / "README.md") if "default" in [row[0] for row in t]]
    original = [t[2:] for name in ("sweep", "cifar") for t in tables(RESULTS / f"small_batch_{name}.md")]
    assert len(copied) == 3
    assert all(table[2:] in original for table in copied)


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_mnist_at_each_batch_size_is_as_it_was_trained(page):
    (head, _, *rows), *_ = (t for t in tables(ROOT / page) if "nn.BatchNorm2d" in [row[0] for row in t])
    (group,) = groups_of(read_rows(RESULTS / "small_batch_full.csv"))
    shown = {NAMES[name]: cells for name, *cells in rows if name in NAMES}
    assert len(shown) == 3
    for norm, cells in shown.items():
        for bs, cell in zip(head[1:], cells, strict=True):
            point = group.points.get((norm, int(bs), 1.0))
            expected = point and point.mean
            assert number(cell) == (expected and pytest.approx(expected, abs=0.051)), (norm, bs)


def test_the_seventeen_tasks_are_as_they_were_trained():
    page, rows = ROOT / "docs" / "evidence.md", read_rows(RESULTS / "zoo.csv")
    (head, _, *lines), standing = (t for t in tables(page) if t[0][0] in ("task", "norm") and "default" in sum(t, []))
    assert standing == [[c.strip() for c in line[1:-1].split("|")] for line in standing_table(rows).splitlines()[:5]]
    assert [cell.partition(",")[0] for cell in head[1:]] == ["nn.BatchNorm", "GroupNorm", "default"]
    shown = {task: dict(zip(("batchnorm", "groupnorm", "default"), cells, strict=True)) for task, *cells in lines}
    groups = {group.rows[0]["net"]: group for group in groups_of(rows)}
    assert shown.keys() == groups.keys()
    for task, norms in shown.items():
        for i, bs in enumerate((2, 8, 32)):
            points = {norm: groups[task].points[norm, bs, 1.0] for norm in norms}
            best = max(points.values(), key=rank_score)
            for norm, point in points.items():
                cell = norms[norm].split(" · ")[i]
                good = point.mean is not None and (point is best or point.within(best))
                assert number(cell) == (point.mean and pytest.approx(point.score, abs=0.051)), (task, norm, bs)
                assert cell.startswith("**") == good, (task, norm, bs)
