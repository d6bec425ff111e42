"""README.md and docs/: the code of a page runs, commands parse, links lead somewhere, the reference is complete."""

import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import matplotlib.pyplot as plt
import pytest

import fastrbn
import fastrbn.basics
import fastrbn.data
from fastrbn.cli.options import parser

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("the tests run outside the repository: there are no pages", allow_module_level=True)

DOCS = sorted((ROOT / "docs").rglob("*.md"))
READMES = [ROOT / f for f in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "fastrbn/norm/README.md")]
PAGES = [*READMES, ROOT / "tests" / "plugin_example" / "README.md", *DOCS]
RUN = [READMES[0], *DOCS]

FENCE = re.compile(r"^(```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^\1 *$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")
INDENTED = re.compile(r"^(?: {4,}|\t)(.+)$", re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: \S[^\n]*-->\n\Z")  # on the line before a block, with the reason
COMMAND = re.compile(r"(?:\$ |torchrun .*-m )?fastrbn (\w.*)")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line number, code) of each block of Python that is to run."""
    blocks = [m for m in FENCE.finditer(text) if m["language"] == "python" and not NOT_RUN.search(text[: m.start()])]
    return [(text.count("\n", 0, m.start("code")), m["code"]) for m in blocks]


def commands(text: str) -> list[str]:
    """The arguments of each `fastrbn …` in code spans, indented code and blocks of shell commands."""
    text = text.replace("\\\n", " ")
    blocks = [m["code"] for m in FENCE.finditer(text) if m["language"] in ("", "sh", "bash", "shell", "console")]
    rest = FENCE.sub("", text)
    lines = [*SPAN.findall(rest), *INDENTED.findall(rest), *"".join(blocks).splitlines()]
    found = (COMMAND.match(" ".join(line.split("  #")[0].split())) for line in lines)
    return [m[1] for m in found if m]


def anchors(page: Path) -> set[str]:
    """What can follow # in a link to the page: headings as they are on the web, and the names of the reference."""
    text = read(page)
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    without_links = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    slugs = (re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in without_links)
    return {*slugs, *re.findall(r"^::: (\S+)", text, flags=re.MULTILINE)}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links in `text`, as if it stood on `page`, to files or headings that do not exist."""
    broken = []
    prose = SPAN.sub("code", INDENTED.sub("", FENCE.sub("", text)))
    for target in re.findall(r"\]\(<?([^)\s>]+)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not (file.exists() and file.is_relative_to(ROOT)) or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.fixture
def small_data(monkeypatch):
    """Generated digits in place of data sets that would be downloaded."""
    digits = fastrbn.glyphs(256, 64)

    def get_data(root=None):
        return tuple(t for d in (digits.train, digits.valid) for t in (d.x.flatten(1) / 255, d.y))

    for module in (fastrbn, fastrbn.basics, fastrbn.data):
        monkeypatch.setattr(module, "get_data", get_data)
        monkeypatch.setattr(module, "load_dataset", lambda *args, **kwargs: digits)


@pytest.mark.parametrize("page", [p for p in RUN if python_blocks(read(p))], ids=page_name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for line, code in python_blocks(read(page)):
        exec(compile("\n" * line + code, page, "exec"), names)  # a traceback has the page's line numbers
    plt.close("all")


@pytest.mark.parametrize("page", [p for p in PAGES if commands(read(p))], ids=page_name)
def test_the_commands_of_a_page_parse(page, capsys):
    for command in commands(read(page)):
        try:
            parser().parse_args(shlex.split(command))
        except SystemExit as e:  # `--help` ends with 0
            assert not e.code, f"fastrbn {command}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_links_of_a_page_lead_to_files_and_headings_that_exist(page):
    assert broken_links(page, read(page)) == []


def test_the_reference_has_every_public_name_once():
    pages = [page for page in DOCS if page.parent.name == "api"]
    listed = [name for page in pages for name in re.findall(r"^::: fastrbn\.(\S+)$", read(page), re.MULTILINE)]
    assert sorted(listed) == sorted([*fastrbn.__all__, "fastai.Diagnose", "lightning.Diagnose"])


def test_every_page_has_its_place_in_the_site():
    nav = re.findall(r": (\S+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert len(set(nav)) == len(nav) and all((ROOT / name).is_file() for name in nav)
    assert {page_name(page) for page in DOCS} <= set(nav)


def test_blocks_are_found_and_left_out_for_a_reason_only():
    block = "```python\nx\n```\n"
    text = f"{block}\n    indented\n\n<!-- not run: needs a GPU -->\n{block}<!-- not run: -->\n{block}"
    assert python_blocks(text) == [(1, "x\n"), (12, "x\n")]


def test_commands_are_found_in_every_kind_of_code():
    text = "`fastrbn train\n--bs 8`\n\n    fastrbn compare  # a grid\n\nfastrbn is a package\n\n"
    assert commands(text) == ["train --bs 8", "compare"]
    assert commands("```sh\ntorchrun -m fastrbn train \\\n  mnist\n```\n") == ["train mnist"]


def test_the_check_of_links_catches():
    page = ROOT / "docs" / "page.md"
    good = "[a](callbacks.md#events) [b](../setup.cfg) [c](https://x.org/y#z) [`d`](api/loop.md#fastrbn.Runner)"
    assert broken_links(page, f"{good} `[code](code)`") == []
    bad = ["nosuch.md", "callbacks.md#nosuch", "../../elsewhere.md", "api/loop.md#fastrbn.NoSuch"]
    assert broken_links(page, " ".join(f"[x]({target})" for target in bad)) == bad
