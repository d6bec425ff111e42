"""A study as a table and a picture, and the page that shows the tables of all studies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastrbn import plots
from fastrbn.norm import RECIPES
from fastrbn.util import write_whole

from .report import origin, plain_point
from .results import Row
from .studies import Best, Study, best_points
from .tasks import get_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "batchnorm": "#D55E00",
    "groupnorm": "#009E73",
    "groupnorm-ws": "#6b8e23",
    "layernorm": "#117733",
    "instancenorm": "#44AA99",
    "batchrenorm": "#CC79A7",
    "mabn": "#882255",
    "onlinenorm": "#000000",
    "frn": "#999933",
    "frozen": "#E69F00",
    "precise": "#AA4466",
    "none": "#888888",
}
"""A peer has the same colour in the pictures of all studies."""

_MARK = re.compile(r"^<!-- (?:table: (?P<name>\S+)|end) -->\n", re.MULTILINE)


def study_table(study: Study, rows: list[Row]) -> str:
    """The results of a study as Markdown: a table for each task, with a row for each norm.

    Parameters
    ----------
    study : Study
        What was compared.
    rows : list of dict
        From `read_rows`.

    Returns
    -------
    str
        Mean ± standard deviation of the seeds that trained, at the norm's best rate. In parentheses the number of seeds
        that were lost (a loss of NaN, or at chance), or of those there are if some are missing. ↓ and ↑ mark the lowest
        and highest of the rates. Bold: all seeds trained, and the mean is at most two pooled standard deviations below
        the best of these. † marks norms that were trained once for all batch sizes. Under each table is the rule of its
        task, at the end versions and dates.

    Examples
    --------
    >>> print(study_table(STUDIES["dense"], read_rows("dense.csv")))   # doctest: +SKIP
    """
    best, parts = best_points(study, rows), []
    for task, title in study.tasks.items():
        parts += [f"**{title}**: validation {get_task(task).goal.called}, %", ""]
        parts += [f"| {' | '.join([study.axis, *map(str, study.bs)])} |", "| --- |" + " --- |" * len(study.bs)]
        columns = [
            {n: b for n in study.norms if (b := best.get((task, n, study.bs[-1] if n in study.once else bs)))}
            for bs in study.bs
        ]
        leaders = [max((b for b in c.values() if _counts(study, b)), key=_mean, default=None) for c in columns]
        for norm, label in study.norms.items():
            words = [_cell(study, column.get(norm), leader) for column, leader in zip(columns, leaders)]
            parts += [f"| {label}{' †' * (norm in study.once)} | {' | '.join(words)} |"] if any(words) else []
        parts += ["", str(get_task(task)), ""]
    mine = [r for r in rows if r["net"] in study.tasks]
    return "\n".join([*parts, *([origin(mine)] if mine else [])])


def _counts(study: Study, best: Best) -> bool:
    return best.point.whole and best.point.total >= len(study.seeds)


def _mean(best: Best) -> float:
    return best.point.mean or 0.0


def _cell(study: Study, best: Best | None, leader: Best | None) -> str:
    if best is None:
        return ""
    p = best.point
    if p.mean is None:
        return "refused" if p.refused else "lost"
    text = f"{p.mean:.1f}" + ("" if p.std is None else f" ± {p.std:.1f}")
    if leader is not None and _counts(study, best) and p.within(leader.point):
        text = f"**{text}**"
    lost, seeds = p.diverged + p.chance, len(study.seeds)
    notes = [f"{lost} of {p.total} lost"] * bool(lost) + [f"{p.total} of {seeds} seeds"] * (p.total < seeds)
    edge = (" ↑" if best.factor == max(study.factors) else " ↓") if best.at_edge else ""
    return text + edge + (f" ({', '.join(notes)})" if notes else "")


def study_figure(study: Study, rows: list[Row]) -> Figure:
    """The picture of a study: score against batch size, with a panel for each task.

    Parameters
    ----------
    study : Study
        What was compared.
    rows : list of dict
        From `read_rows`.

    Returns
    -------
    matplotlib.figure.Figure
        See `plots.plot_study`.

    Examples
    --------
    >>> study_figure(STUDIES["dense"], read_rows("dense.csv")).savefig("dense.png")   # doctest: +SKIP
    """
    best, panels = best_points(study, rows), []
    for task, title in study.tasks.items():
        lines: dict[str, list[dict]] = {}
        for (of, norm, bs), found in best.items():
            if of == task:
                lines.setdefault(study.norms[norm], []).append(plain_point(bs, found.point))
        panels.append((title, f"{get_task(task).goal.called}, %", lines))
    ours = [label for norm, label in study.norms.items() if _base(norm) in (*RECIPES, "running-ws")]
    colors = {label: COLORS[_base(norm)] for norm, label in study.norms.items() if _base(norm) in COLORS}
    level = [study.norms[norm] for norm in study.once]
    return plots.plot_study(study.question, panels, study.axis, ours, level, colors)


def _base(norm: str) -> str:
    return norm.split(":")[0]


def write_page(path: str | Path, tables: Mapping[str, str]) -> Path:
    """Replace tables in a page of Markdown.

    Parameters
    ----------
    path : str or Path
        The page. The table NAME stands between the lines `<!-- table: NAME -->` and `<!-- end -->`; what is outside
        such lines, and tables that are not given, stay as they are.
    tables : dict of str to str
        Tables by name, or any other Markdown.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ValueError
        If the page does not have each of the tables once, or an end is missing; nothing is written then.

    Examples
    --------
    >>> write_page("docs/evidence.md", {"dense": study_table(STUDIES["dense"], rows)})   # doctest: +SKIP
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    rule = "a table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`, and each NAME is there once"
    marks = list(_MARK.finditer(text))
    begins, ends = marks[::2], marks[1::2]
    if len(begins) != len(ends) or not all(m["name"] for m in begins) or any(m["name"] for m in ends):
        raise ValueError(f"the marks in {path} do not come in pairs: {rule}")
    names = [m["name"] for m in begins]
    wrong = [name for name in tables if names.count(name) != 1]
    if wrong:
        raise ValueError(f"{path} has no single place for {', '.join(wrong)}: {rule}")
    for begin, end in reversed(list(zip(begins, ends))):
        if begin["name"] in tables:
            text = f"{text[: begin.end()]}\n{tables[begin['name']].strip()}\n\n{text[end.start() :]}"
    return write_whole(path, text)
