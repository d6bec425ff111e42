"""What a grid has found: a table in Markdown, and pictures."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from fastrbn import plots
from fastrbn.norm import RECIPES
from fastrbn.util import write_whole

from .cell import LR_RULES
from .grid import norms_path
from .norms import PEERS
from .table import number, read_rows, row_key
from .tasks import task_of

STATUSES = ("trained", "diverged", "chance", "refused")
_COMMON = ("data", "net", "n_train", "epochs", "augment", "device", "version")  # what a table has in its title


LEGEND = (
    "mean ± standard deviation over the seeds that trained; beside it how many diverged (loss NaN or Inf) or ended at "
    "chance, and their mean where none trained. Best in bold, if all of its seeds trained."
)


@dataclass(frozen=True)
class Point:
    """The cells of all seeds: how many, how they ended, and the accuracy in percent of those that trained."""

    total: int
    diverged: int
    chance: int
    refused: int
    mean: float | None
    std: float | None  # of a sample; None for fewer than two
    lost: float | None  # mean accuracy of those that diverged or are at chance

    def __str__(self):
        if self.refused == self.total:
            return "refused"
        counts = {"diverged": self.diverged, "at chance": self.chance, "refused": self.refused}
        if self.mean is None:
            return f"{', '.join(word for word, n in counts.items() if n)} ({self.lost:.1f})"
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        lost = ", ".join(f"{n} of {self.total} {word}" for word, n in counts.items() if n)
        return f"{self.mean:.2f}{spread}" + (f" ({lost})" if lost else "")

    @property
    def whole(self) -> bool:
        """Whether every seed trained."""
        return self.mean is not None and not self.diverged + self.chance + self.refused

    @property
    def score(self) -> float | None:
        """Mean accuracy of all seeds, those that diverged or are at chance included; None where the norm refuses."""
        if self.refused:
            return None
        lost = self.diverged + self.chance
        return ((self.mean or 0) * (self.total - lost) + (self.lost or 0) * lost) / self.total


def point_of(rows) -> Point:
    """The `Point` of rows that differ in nothing but the seed."""
    by = {s: [number(r, "accuracy") for r in rows if r["status"] == s] for s in STATUSES}
    good, lost = by["trained"], by["diverged"] + by["chance"]
    mean = statistics.fmean(good) if good else None
    std = statistics.stdev(good) if len(good) > 1 else None
    lost_mean = statistics.fmean(lost) if lost else None
    return Point(len(rows), len(by["diverged"]), len(by["chance"]), len(by["refused"]), mean, std, lost_mean)


@dataclass
class Group:
    """Rows under one title: `points[norm label, bs, factor]`."""

    rows: list[dict]
    labels: dict[tuple[str, str], str]
    points: dict[tuple[str, int, float], Point]
    beside: str = ""  # what tells the title from another's

    @property
    def norms(self):
        return list(self.labels.values())

    @property
    def bs(self):
        return sorted({bs for _, bs, _ in self.points})

    @property
    def factors(self):
        return sorted({f for _, _, f in self.points})

    @property
    def main_factor(self):
        """1, or the one next to it."""
        return min(self.factors, key=lambda f: abs(math.log(f)))

    @property
    def task(self):
        """The task of these rows; None for a net on images."""
        return task_of(self.rows[0]["data"], self.rows[0]["net"])

    @property
    def measure(self):
        """What the numbers are."""
        return f"validation {self.task.goal.called if self.task else 'accuracy'}"

    @property
    def title(self):
        r = self.rows[0]
        few, most = (pick(point.total for point in self.points.values()) for pick in (min, max))
        seeds = f"{most} seed{'s' * (most > 1)}" if few == most else f"{few} to {most} seeds"
        if self.task:
            return f"{r['net']}, {seeds}{self.beside}"
        epochs = "1 epoch" if r["epochs"] == "1" else f"{r['epochs']} epochs"
        augmented = ", augmented" if r["augment"] == "1" else ""
        counts = f"{r['n_train']} images, {epochs}{augmented}, {seeds}"
        return f"{r['data']}, {r['net']}, {counts}{self.beside}"


def groups_of(rows) -> list[Group]:
    """Rows sorted by what they have in common."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in _COMMON), []).append(row)
    groups = [_group(members) for members in found.values()]
    titles = [group.title for group in groups]
    for group, title in zip(groups, titles):
        if titles.count(title) > 1:
            group.beside = f", {group.rows[0]['device']}, fastrbn {group.rows[0]['version']}"
    return groups


def _rank(row):
    """Recipes, each before its variants, then peers: the order of the table."""
    base = row["norm"].split(":")[0]
    known = [*RECIPES, *PEERS]
    return known.index(base) if base in known else len(known), row["norm"]


def _group(rows):
    labels = {}
    for row in sorted(
        rows, key=_rank
    ):  # one name with two settings: a recipe that was changed between versions of the code
        same = [k for k in labels if k[0] == row["norm"] and k[1] != row["settings"]]
        labels.setdefault((row["norm"], row["settings"]), row["norm"] + (f" #{len(same) + 1}" if same else ""))
    cells = {}
    for row in rows:
        where = labels[row["norm"], row["settings"]], int(row["bs"]), float(row["lr_factor"])
        cells.setdefault(where, []).append(row)
    return Group(rows, labels, {where: point_of(members) for where, members in cells.items()})


def markdown(rows) -> str:
    """The tables of all groups: norm × batch size; with several learning rates, norm × rate for each batch size."""
    groups = groups_of(rows)
    legend = [f"In the tables of tasks: {LEGEND}"] if any(group.task for group in groups) else []
    return "\n\n".join([*legend, *map(_section, groups)]) + "\n"


def _section(group) -> str:
    if group.task:
        rule = str(group.task)
    else:
        rate, cap = LR_RULES[group.rows[0]["net"]]
        rule = f"Learning rate {rate:g}·bs^0.9, at most {cap:g}, times the factor, falling on a line to a tenth; SGD."
    versions = {f"fastrbn {r['version']}, torch {r['torch']}, Python {r['python']}, {r['machine']}" for r in group.rows}
    dates = sorted({r["date"] for r in group.rows})
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
    parts += ["", f"{'; '.join(sorted(versions))}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."]
    notes = [f"- `{label}`: {settings}" for (norm, settings), label in group.labels.items() if norm != settings]
    return "\n".join([*parts, "", *notes]).rstrip().replace("\n\n\n", "\n\n")


def _table(group, columns, corner):
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


def _best(group, where):
    points = (group.points.get((n, *where)) for n in group.norms)
    return max((p.mean for p in points if p is not None and p.whole), default=None)


def accuracy_figure(rows):
    """Accuracy against batch size, a panel a group, at learning-rate factor 1 or the nearest."""
    panels = []
    for group in groups_of(rows):
        f = group.main_factor
        title = group.title + ("" if f == 1 else f", lr×{f:g}")
        panels.append((title, _series(group, [(bs, (bs, f)) for bs in group.bs])))
    return plots.plot_comparison(panels, "batch size", _dashed(rows))


def task_figure(group):
    """The score of a group's norms against batch size, a panel a learning-rate factor."""
    panels = [(f"{group.title}, lr×{f:.3g}", _series(group, [(bs, (bs, f)) for bs in group.bs])) for f in group.factors]
    return plots.plot_comparison(panels, "batch size", _dashed(group.rows), f"{group.measure}, %")


def sweep_figure(rows):
    """Accuracy against learning-rate factor, a panel a batch size; None where no group has several factors."""
    panels = [
        (f"{group.title}, batch size {bs}", _series(group, [(f, (bs, f)) for f in group.factors]))
        for group in groups_of(rows)
        if len(group.factors) > 1
        for bs in group.bs
    ]
    return plots.plot_comparison(panels, "learning-rate factor", _dashed(rows)) if panels else None


def _series(group, wheres):
    series = {}
    for norm in group.norms:
        points = [(x, group.points.get((norm, *where))) for x, where in wheres]
        points = [_plain(x, p) for x, p in points if p is not None]
        if points:
            series[norm] = points
    return series


def _plain(x, p):
    counts = {"at chance": p.chance, "diverged": p.diverged, "refused": p.refused}
    return {"x": x, "mean": p.mean, "std": p.std, "total": p.total, **counts}


def _dashed(rows):
    names = (item for group in groups_of(rows) for item in group.labels.items())
    return {label for (norm, _), label in names if norm.split(":")[0] in PEERS}


def norms_figure(rows, path):
    """Norms of the weights over steps, of the lowest seed, a panel a batch size and learning rate; None without any."""
    panels = []
    for group in groups_of(rows):
        found = {}
        for row in sorted(group.rows, key=lambda r: int(r["seed"])):
            file = norms_path(path, row_key(row))
            where, label = (int(row["bs"]), float(row["lr_factor"])), group.labels[row["norm"], row["settings"]]
            if file.is_file():
                found.setdefault(where, {}).setdefault(label, file)
        for (bs, f), files in sorted(found.items()):
            curves = {norm: read_norms(files[norm]) for norm in group.norms if norm in files}
            panels.append((f"{group.title}, batch size {bs}, lr×{f:g}", curves))
    return plots.plot_weight_norms(panels, _dashed(rows)) if panels else None


def read_norms(path) -> tuple[list[int], list[float]]:
    """(steps, norm of all convolutions' weights together) of a cell's file."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f))[1:]
    return [int(r[0]) for r in rows], [math.fsum(float(v) ** 2 for v in r[1:]) ** 0.5 for r in rows]


def write_report(path, name=None, rows=None) -> tuple[str, list[Path]]:
    """Write table and pictures beside the CSV at `path`; (the table, the files).

    - `name`: None for table.md, accuracy.png, sweep.png (several learning rates) and weight_norms.png (where norms were
      recorded); else `<name>.md`, `<name>.png`, `<name>_sweep.png`, `<name>_norms.png`.
    - `rows`: None for all of the CSV.

    ValueError where there is no row to show.
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
