"""The layer's README and its table of situations name tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "fastrbn" / "norm" / "README.md"
DETAILS = HERE.parents[1] / "docs" / "layer-details.md"


def test_every_test_that_the_documents_name_exists():
    text = README.read_text(encoding="utf-8") + DETAILS.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)::(\w+)`", text))
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (HERE / f"{file}.py").read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_situation_has_a_test_of_ours():
    table = DETAILS.read_text(encoding="utf-8").split("## Situations")[1].split("\n\n")[2]
    rows = [line.split("|") for line in table.splitlines()[2:]]
    assert len(rows) > 25
    for row in rows:
        assert len(row) == 6 and "::" in row[4], row[1]
