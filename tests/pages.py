"""Runs parts of docs/other-loops.md that need packages which the tests do not install."""

import re
from pathlib import Path

import pytest


def run_section(title):
    """Run the first block of docs/other-loops.md and those of a section. Returns their names."""
    page = Path(__file__).parents[1] / "docs" / "other-loops.md"
    if not page.is_file():
        pytest.skip("the tests run outside the repository: there are no pages")
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
    names = {"__name__": "page"}
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    for code in (fence.findall(text)[0], *fence.findall(section)):
        exec(compile(code, page, "exec"), names)
    return names
