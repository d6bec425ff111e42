"""The report of a grid: tables in Markdown, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrbn import plots
from fastrbn.util import write_whole

from .cell import LR_RULES
from .norms import PEERS
from .results import Group, Point, Row, Standing, groups_of, standings
from .table import norms_path, read_norms, read_rows, row_key

Where = tuple[int, float]  # batch size and learning-rate factor

LEGEND = (
    "mean ± standard deviation over the seeds that trained; beside it how many diverged (loss NaN or Inf) or ended at "
    "chance, and their mean where none trained. Best in bold, if all of its seeds trained."
)


def markdown(rows: list[Row]) -> str:
    """The tables of a grid as Markdown.

    Each group of rows has a table norm × batch size, or norm × rate for each batch size if there are several learning
    rates.

    Parameters
    ----------
    rows : list of dict
        From `read_rows`.

    Returns
    -------
    str

    Examples
    --------
    >>> print(markdown(read_rows("compare/cells.csv")))   # doctest: +SKIP
    """
    groups = groups_of(rows)
    legend = [f"In the tables of tasks: {LEGEND}"] if any(group.task for group in groups) else []
    return "\n\n".join([*legend, *map(_section, groups)]) + "\n"


def _section(group: Group) -> str:
    if group.task:
        rule = str(group.task)
    else:
        rate, cap = LR_RULES[group.rows[0]["net"]]
        rule = f"Learning rate {rate:g}·bs^0.9, at most {cap:g}, times the factor, falling on a line to a tenth; SGD."
    measure = f"V{group.measure[1:]} in percent"
    about = f"{measure}. {rule}" if group.task else f"{measure}: {LEGEND} {rule}"
    parts = [f"### {group.title}", "", about, ""]
    if len(group.factors) == 1:
        factor = group.factors[0]
        parts += [] if factor == 1 else [f"Learning-rate factor {factor:g}.", ""]
        parts += _table(group, [(f"{bs}", (bs, factor)) for bs in group.bs], "batch size")
    else:
        for bs in group.bs:
            lr = group.task.lr(bs) if group.task else min(rate * bs**0.9, cap)
            columns = [(f"{f:g} ({f * lr:.3g})", (bs, f)) for f in group.factors]
            parts += [f"Batch size {bs}; columns: learning-rate factor (rate)", "", *_table(group, columns, "norm"), ""]
    parts += ["", origin(group.rows)]
    notes = [f"- `{label}`: {settings}" for (norm, settings), label in group.labels.items() if norm != settings]
    return "\n".join([*parts, "", *notes]).rstrip().replace("\n\n\n", "\n\n")


def origin(rows: list[Row]) -> str:
    """Versions, machines and dates of rows, in a sentence."""
    versions = {f"fastrbn {r['version']}, torch {r['torch']}, Python {r['python']}, {r['machine']}" for r in rows}
    dates = sorted({r["date"] for r in rows})
    return f"{'; '.join(sorted(versions))}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


def _table(group: Group, columns: list[tuple[str, Where]], corner: str) -> list[str]:
    columns = [c for c in columns if any((n, *c[1]) in group.points for n in group.norms)]
    best = {where: _best(group, where) for _, where in columns}
    lines = [f"| {corner} | {' | '.join(head for head, _ in columns)} |", "| --- |" + " --- |" * len(columns)]
    for norm in group.norms:
        cells = []
        for _, where in columns:
            p = group.points.get((norm, *where))
            bold = p is not None and p.whole and p.mean == best[where]
            cells.append("" if p is None else f"**{p}**" if bold else str(p))
        if any(cells):
            lines.append(f"| {norm} | {' | '.join(cells)} |")
    return lines


def _best(group: Group, where: Where) -> float | None:
    points = (group.points.get((n, *where)) for n in group.norms)
    return max((p.mean for p in points if p is not None and p.whole and p.mean is not None), default=None)


USUAL = ("batchnorm", "groupnorm")


def standing_table(rows: list[Row]) -> str:
    """The standings of all norms as a Markdown table, with that of `default` in a sentence.

    Parameters
    ----------
    rows : list of dict
        From `read_rows`.

    Returns
    -------
    str
        With columns for the standing among all peers, and among `USUAL` only.

    Examples
    --------
    >>> print(standing_table([]).splitlines()[-1])
    There is no cell with results of both `default` and a peer.
    """
    among_all, among_usual = standings(rows), standings(rows, USUAL)
    lines = [
        f"| norm | cells | within two deviations of the best peer | of {' and '.join(USUAL)} | mean rank | "
        "lost where two peers train |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for norm, s in among_all.items():
        usual = f"{100 * among_usual[norm].within:.0f} %" if norm in among_usual else ""
        lines.append(f"| {norm} | {s.cells} | {100 * s.within:.0f} % | {usual} | {s.rank:.2f} | {s.lost} |")
    return "\n".join([*lines, "", _sentence(among_all.get("default"))])


def _sentence(s: Standing | None) -> str:
    if s is None:
        return "There is no cell with results of both `default` and a peer."
    return (
        f"`default` is within two pooled standard deviations of the best peer in {100 * s.within:.0f} % of {s.cells} "
        f"cells (task × batch size × learning-rate factor; {s.blank} more, in which no norm learns, are left out); its "
        f"mean rank is {s.rank:.2f}."
    )


def accuracy_figure(rows: list[Row]) -> Any:
    """Accuracy against batch size, one panel per group, at learning-rate factor 1 or the closest."""
    panels = []
    for group in groups_of(rows):
        f = group.main_factor
        title = group.title + ("" if f == 1 else f", lr×{f:g}")
        panels.append((title, _series(group, [(bs, (bs, f)) for bs in group.bs])))
    return plots.plot_comparison(panels, "batch size", _dashed(rows))


def task_figure(group: Group) -> Any:
    """The scores of a group's norms against batch size, one panel per learning-rate factor."""
    panels = [(f"{group.title}, lr×{f:.3g}", _series(group, [(bs, (bs, f)) for bs in group.bs])) for f in group.factors]
    return plots.plot_comparison(panels, "batch size", _dashed(group.rows), f"{group.measure}, %")


def sweep_figure(rows: list[Row]) -> Any:
    """Accuracy against learning-rate factor, one panel per batch size; None if no group has several factors."""
    panels = [
        (f"{group.title}, batch size {bs}", _series(group, [(f, (bs, f)) for f in group.factors]))
        for group in groups_of(rows)
        if len(group.factors) > 1
        for bs in group.bs
    ]
    return plots.plot_comparison(panels, "learning-rate factor", _dashed(rows)) if panels else None


def _series(group: Group, wheres: list[tuple[float, Where]]) -> dict[str, list[dict[str, Any]]]:
    """The points of each norm's line, as plain data."""
    series: dict[str, list[dict[str, Any]]] = {}
    for norm in group.norms:
        found = [(x, group.points.get((norm, *where))) for x, where in wheres]
        points = [plain_point(x, p) for x, p in found if p is not None]
        if points:
            series[norm] = points
    return series


def plain_point(x: float, p: Point) -> dict[str, Any]:
    """A point of a line as `plots` takes it."""
    counts = {"at chance": p.chance, "diverged": p.diverged, "refused": p.refused}
    return {"x": x, "mean": p.mean, "std": p.std, "total": p.total, **counts}


def _dashed(rows: list[Row]) -> set[str]:
    """Labels of the peers, whose lines are dashed."""
    names = (item for group in groups_of(rows) for item in group.labels.items())
    return {label for (norm, _), label in names if norm.split(":")[0] in PEERS}


def norms_figure(rows: list[Row], path: str | Path) -> Any:
    """Norms of the weights over steps for the lowest seed, one panel per batch size and rate; None without data."""
    panels = []
    for group in groups_of(rows):
        found: dict[Where, dict[str, Path]] = {}
        for row in sorted(group.rows, key=lambda r: int(r["seed"])):
            file = norms_path(path, row_key(row))
            where, label = (int(row["bs"]), float(row["lr_factor"])), group.labels[row["norm"], row["settings"]]
            if file.is_file():
                found.setdefault(where, {}).setdefault(label, file)
        for (bs, f), files in sorted(found.items()):
            curves = {norm: read_norms(files[norm]) for norm in group.norms if norm in files}
            panels.append((f"{group.title}, batch size {bs}, lr×{f:g}", curves))
    return plots.plot_weight_norms(panels, _dashed(rows)) if panels else None


def write_report(path: str | Path, name: str | None = None, rows: list[Row] | None = None) -> tuple[str, list[Path]]:
    """Write the tables and pictures of a grid next to its CSV.

    Parameters
    ----------
    path : str or Path
        The CSV.
    name : str, optional
        Write `<name>.md`, `<name>.png`, `<name>_sweep.png` (with several learning rates) and `<name>_norms.png` (if
        norms were recorded). By default table.md, accuracy.png, sweep.png and weight_norms.png.
    rows : list of dict, optional
        Rows to show; by default all of the CSV.

    Returns
    -------
    text : str
        The tables.
    files : list of Path
        The files written.

    Raises
    ------
    ValueError
        If there is no row to show.

    Examples
    --------
    >>> text, files = write_report("compare/cells.csv")   # doctest: +SKIP
    """
    path = Path(path)
    rows = read_rows(path) if rows is None else rows
    if not rows:
        raise ValueError(f"there is no finished cell in {path}")
    names = ("table.md", "accuracy.png", "sweep.png", "weight_norms.png")
    if name is not None:
        names = (f"{name}.md", f"{name}.png", f"{name}_sweep.png", f"{name}_norms.png")
    text = markdown(rows)
    contents = text, accuracy_figure(rows), sweep_figure(rows), norms_figure(rows, path)
    files = []
    for file, content in zip(names, contents):
        if content is not None:
            files.append(write_whole(path.parent / file, content if isinstance(content, str) else plots.png(content)))
    return text, files
