"""Tables, picture and page of a study, from made-up rows; docs/evidence.md says what the results do."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

from fastrbn.compare import STUDIES, ZOO, Study, study_figure, study_table, table, write_page
from fastrbn.plots.figure import MAIN

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence.md"
SCRIPT = ROOT / "benchmarks" / "evidence.py"
STUDY = Study(
    "Which norm is best?",
    {"dense": "Shapes", "mlp-adam": "Digits"},
    {"default": "ours", "batchnorm": "BN", "groupnorm": "GN", "mabn": "MABN"},
    (1, 8),
    once=("groupnorm",),
)


def row(norm, bs, score, seed=0, status="trained", factor="1", net="dense"):
    words = {"data": ZOO, "net": net, "norm": norm, "settings": norm, "bs": bs, "lr_factor": factor, "seed": seed}
    words |= {"version": "1", "torch": "2", "python": "3", "machine": "Z80", "date": "2026-01-02", "status": status}
    return {k: "" for k in table.COLUMNS} | {k: str(v) for k, v in words.items()} | {"accuracy": str(score)}


def seeds(norm, bs, *scores, **words):
    return [row(norm, bs, score, seed, **words) for seed, score in enumerate(scores)]


ROWS = [
    *seeds("default", 1, 80, 81, 82, factor="3"),
    *seeds("default", 8, 90, 90, 93),
    row("default", 8, 89, factor="0.333333"),
    *seeds("batchnorm", 1, "", "", "", status="refused"),
    *seeds("batchnorm", 8, 93, 94, 95, factor="0.333333"),
    *seeds("groupnorm", 8, 79, 80, 81),
    *seeds("mabn", 1, 96, 97),
    row("mabn", 1, 5, 2, status="diverged"),
    *seeds("mabn", 8, 10, 10, status="chance"),
    *seeds("default", 1, 70, 70, net="mlp-adam"),
]


def test_the_table_has_means_rates_at_an_end_lost_seeds_and_the_best_in_bold():
    shapes, digits = study_table(STUDY, ROWS).split("**Digits**: validation accuracy, %")
    assert shapes.splitlines()[:8] == [
        "**Shapes**: validation overlap (IoU), %",
        "",
        "| batch size | 1 | 8 |",
        "| --- | --- | --- |",
        "| ours | **81.0 ± 1.0** ↑ | 91.0 ± 1.7 |",
        "| BN | refused | **94.0 ± 1.0** ↓ |",
        "| GN † | **80.0 ± 1.0** | 80.0 ± 1.0 |",
        "| MABN | 96.5 ± 0.7 (1 of 3 lost) | lost |",
    ]
    assert "Learning rate 0.05·bs^0.9" in shapes
    assert "| ours | 70.0 ± 0.0 (2 of 3 seeds) |  |\n\n" in digits and "| BN" not in digits
    assert digits.endswith("\nfastrbn 1, torch 2, Python 3, Z80; 2026-01-02.")


def test_what_is_within_two_pooled_deviations_of_the_best_is_bold():
    for behind, bold in ((1.99, True), (2.01, False)):
        rows = [*seeds("default", 8, 90, 91, 92), *seeds("batchnorm", 8, *(s - behind for s in (90, 91, 92)))]
        text = study_table(STUDY, rows)
        assert "**91.0 ± 1.0**" in text and (f"**{91 - behind:.1f} ± 1.0**" in text) is bold


def test_a_study_without_rows_has_an_empty_table():
    assert "| --- | --- | --- |\n\nLearning rate" in study_table(STUDY, [])


def test_the_picture_has_ours_in_front_and_names_at_the_ends():
    fig = study_figure(STUDY, ROWS)
    shapes, under, digits = fig.axes
    assert fig._suptitle.get_text() == STUDY.question
    assert [ax.get_title(loc="left") for ax in (shapes, digits)] == ["Shapes", "Digits"]
    assert (shapes.get_ylabel(), digits.get_xlabel()) == ("overlap (IoU), %", "batch size")
    lines = [(line, list(line.get_ydata())) for line in shapes.lines]
    thick, means = max(lines, key=lambda pair: pair[0].get_linewidth())
    assert thick.get_color() == MAIN and means == pytest.approx([81, 91])
    assert [means[0] for line, means in lines if list(line.get_xdata()) == [0, 1]] == [80], "GN is level"
    names = {text.get_text(): text.get_fontweight() for text in shapes.texts}
    assert names == {"ours": "bold", "BN": "normal", "GN": "normal", "MABN": "normal"}
    assert {text.get_text() for text in under.texts} == {"refused", "1/3 NaN", "chance"}


PAGE = "# T\n\n<!-- table: a -->\nold\n<!-- end -->\nbetween\n<!-- table: b -->\n<!-- end -->\n"


def test_tables_of_a_page_are_replaced_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    for _ in range(2):
        assert write_page(page, {"b": "| ± |", "a": "x\n"}) == page
    want = PAGE.replace("old", "\nx\n").replace("b -->\n", "b -->\n\n| ± |\n\n")
    assert page.read_text(encoding="utf-8") == want
    write_page(page, {"b": "y"})
    assert page.read_text(encoding="utf-8") == want.replace("| ± |", "y")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PAGE.replace("table: a", "table: c"), "no single place for a"),
        (PAGE.replace("table: b", "table: a"), "no single place for a"),
        (PAGE.replace("old\n<!-- end -->", "old"), "do not come in pairs"),
        (PAGE + "<!-- table: c -->\n", "do not come in pairs"),
    ],
)
def test_a_page_without_the_place_of_a_table_is_refused_and_left_as_it_is(text, words, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{words}.*: a table stands between the lines `<!-- table: NAME -->`"):
        write_page(page, {"a": "x"})
    assert page.read_text(encoding="utf-8") == text


needs_page = pytest.mark.skipif(not EVIDENCE.is_file(), reason="the tests run outside the repository")


@pytest.fixture(scope="module")
def script():
    """Names of the script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as Python does for a script
        return runpy.run_path(str(SCRIPT))


@needs_page
@pytest.mark.parametrize("name", [*STUDIES, "crossq", "drift"])
def test_the_page_has_the_tables_of_the_results(name, script):
    read, shown, _ = script["showing"](name)
    rows = read(SCRIPT.parent / "results" / "evidence" / f"{name}.csv")
    if not rows:
        pytest.skip("there are no results")
    page = EVIDENCE.read_text(encoding="utf-8")
    assert shown(rows).strip() in page, "python benchmarks/evidence.py --write writes them"


@needs_page
def test_the_page_has_a_place_for_each_question(tmp_path, script):
    copy = shutil.copy(EVIDENCE, tmp_path)
    write_page(copy, dict.fromkeys(script["QUESTIONS"], "x"))


@needs_page
def test_the_script_writes_picture_and_table_into_the_page(tmp_path, script):
    page, rows = Path(shutil.copy(EVIDENCE, tmp_path)), seeds("default", 2, 50, 51, 52, net="norm-batch")
    path = tmp_path / "norm-batch.csv"
    assert "no results yet" in script["write"]("norm-batch", path, page)
    table.begin(path)
    for row in rows:
        table.append(path, row)
    picture = script["write"]("norm-batch", path, page)
    assert picture == tmp_path / "evidence-norm-batch.png" and picture.read_bytes()[1:4] == b"PNG"
    study = STUDIES["norm-batch"]
    text = f"![{study.question}](evidence-norm-batch.png)\n\n{study_table(study, rows)}\n\n<!-- end -->"
    assert text in page.read_text(encoding="utf-8") and "51.0 ± 1.0" in text


@needs_page
def test_every_test_that_the_page_names_exists():
    text, tests = (p.read_text(encoding="utf-8") for p in (EVIDENCE, Path(__file__).with_name("test_peers.py")))
    named = re.findall(r"`test_peers::(\w+)`", text)
    assert len(named) > 3 and all(f"def {name}(" in tests for name in named)
