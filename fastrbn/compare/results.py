"""What the rows of a grid say: means over seeds, and how often a norm is as good as the best peer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from fastrbn.norm import RECIPES

from .norms import PEERS
from .table import number
from .tasks import Task, task_of

Row = dict[str, str]

STATUSES = ("trained", "diverged", "chance", "refused")
_COMMON = ("data", "net", "n_train", "epochs", "augment", "device", "version")  # the columns of a table's title


@dataclass(frozen=True)
class Point:
    """The cells of all seeds: how many, how they ended, and the accuracy in percent of those that trained."""

    total: int
    diverged: int
    chance: int
    refused: int
    mean: float | None
    std: float | None  # sample standard deviation; None for fewer than two
    lost: float | None  # mean accuracy of those that diverged or are at chance

    def __str__(self) -> str:
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
        """Mean accuracy of all seeds, including those that diverged or are at chance; None if the norm refuses."""
        if self.refused:
            return None
        lost = self.diverged + self.chance
        return ((self.mean or 0) * (self.total - lost) + (self.lost or 0) * lost) / self.total

    def within(self, best: Point) -> bool:
        """Whether its score is at most two pooled standard deviations below that of `best`."""
        pooled = math.sqrt(((self.std or 0) ** 2 + (best.std or 0) ** 2) / 2)
        return rank_score(self) >= rank_score(best) - 2 * pooled and rank_score(self) > -math.inf


def point_of(rows: list[Row]) -> Point:
    """The `Point` of rows that differ in the seed only."""
    by = {s: [number(r, "accuracy") for r in rows if r["status"] == s] for s in STATUSES}
    good, lost = ([a for a in scores if a is not None] for scores in (by["trained"], by["diverged"] + by["chance"]))
    mean = statistics.fmean(good) if good else None
    std = statistics.stdev(good) if len(good) > 1 else None
    lost_mean = statistics.fmean(lost) if lost else None
    return Point(len(rows), len(by["diverged"]), len(by["chance"]), len(by["refused"]), mean, std, lost_mean)


@dataclass
class Group:
    """Rows under one title: `points[norm label, bs, factor]`."""

    rows: list[Row]
    labels: dict[tuple[str, str], str]
    points: dict[tuple[str, int, float], Point]
    beside: str = ""  # tells apart groups with the same title

    @property
    def norms(self) -> list[str]:
        """Labels of the norms, in the order of the table."""
        return list(self.labels.values())

    @property
    def bs(self) -> list[int]:
        """Batch sizes."""
        return sorted({bs for _, bs, _ in self.points})

    @property
    def factors(self) -> list[float]:
        """Learning-rate factors."""
        return sorted({f for _, _, f in self.points})

    @property
    def main_factor(self) -> float:
        """1, or the factor closest to it."""
        return min(self.factors, key=lambda f: abs(math.log(f)))

    @property
    def task(self) -> Task | None:
        """The task of these rows; None for a net on images."""
        return task_of(self.rows[0]["data"], self.rows[0]["net"])

    @property
    def measure(self) -> str:
        """What the numbers are."""
        return f"validation {self.task.goal.called if self.task else 'accuracy'}"

    @property
    def title(self) -> str:
        """Data, net, number of images, epochs and seeds."""
        r = self.rows[0]
        few, most = (pick(point.total for point in self.points.values()) for pick in (min, max))
        seeds = f"{most} seed{'s' * (most > 1)}" if few == most else f"{few} to {most} seeds"
        if self.task:
            return f"{r['net']}, {seeds}{self.beside}"
        epochs = "1 epoch" if r["epochs"] == "1" else f"{r['epochs']} epochs"
        augmented = ", augmented" if r["augment"] == "1" else ""
        counts = f"{r['n_train']} images, {epochs}{augmented}, {seeds}"
        return f"{r['data']}, {r['net']}, {counts}{self.beside}"


def groups_of(rows: list[Row]) -> list[Group]:
    """Rows grouped by what a table has in its title."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in _COMMON), []).append(row)
    groups = [_group(members) for members in found.values()]
    titles = [group.title for group in groups]
    for group, title in zip(groups, titles):
        if titles.count(title) > 1:
            group.beside = f", {group.rows[0]['device']}, fastrbn {group.rows[0]['version']}"
    return groups


def _order(row: Row) -> tuple[int, str]:
    """Sorting key of the tables: recipes, each before its variants, then peers."""
    base = row["norm"].split(":")[0]
    known = [*RECIPES, *PEERS]
    return known.index(base) if base in known else len(known), row["norm"]


def _group(rows: list[Row]) -> Group:
    labels: dict[tuple[str, str], str] = {}
    for row in sorted(rows, key=_order):
        # one name with two settings is a recipe that changed between versions of the code
        same = [k for k in labels if k[0] == row["norm"] and k[1] != row["settings"]]
        labels.setdefault((row["norm"], row["settings"]), row["norm"] + (f" #{len(same) + 1}" if same else ""))
    cells: dict[tuple[str, int, float], list[Row]] = {}
    for row in rows:
        where = labels[row["norm"], row["settings"]], int(row["bs"]), float(row["lr_factor"])
        cells.setdefault(where, []).append(row)
    return Group(rows, labels, {where: point_of(members) for where, members in cells.items()})


@dataclass(frozen=True)
class Standing:
    """The standing of a norm over all cells (task × batch size × learning-rate factor) with results for it and a peer.

    - `cells`: number of such cells. `blank`: number of further cells, left out, in which no norm learnt anything.
    - `within`: share of cells in which its mean over the seeds is at most two pooled standard deviations below that of
      the best other peer. A lost seed counts with what it reached; deviations are those of the trained seeds.
    - `rank`: mean rank among the peers (1 is best, ties share); a peer is ranked among the peers and `default`.
    - `lost`: number of cells in which not all of its seeds trained, while those of two other peers did.
    """

    cells: int
    blank: int
    within: float
    rank: float
    lost: int


def standings(rows: list[Row], peers: Iterable[str] | None = None) -> dict[str, Standing]:
    """Rank norms over many tasks.

    Parameters
    ----------
    rows : list of dict
        From `read_rows`.
    peers : iterable of str, optional
        Norms to compare with; by default all of `PEERS` in the rows.

    Returns
    -------
    dict of str to Standing
        For each norm, in the order of the tables.

    Examples
    --------
    >>> standings([])
    {}
    """
    cells, found = list(_cells(rows)), {}
    peers = None if peers is None else list(peers)
    for norm in dict.fromkeys(norm for group in groups_of(rows) for norm in group.norms):
        shared = [cell for cell in cells if norm in cell and _rivals(norm, cell, peers)]
        learnt = [cell for cell in shared if any(p.mean is not None for p in cell.values())]
        if learnt:
            found[norm] = Standing(
                len(learnt),
                len(shared) - len(learnt),
                statistics.fmean(_is_within(norm, cell, peers) for cell in learnt),
                statistics.fmean(_rank(norm, cell, peers) for cell in learnt),
                sum(_is_lost(norm, cell, peers) for cell in learnt),
            )
    return found


def _cells(rows: list[Row]) -> Iterator[dict[str, Point]]:
    """{norm: Point} for each task, batch size and factor."""
    for group in groups_of(rows):
        for where in dict.fromkeys((bs, factor) for _, bs, factor in group.points):
            yield {norm: p for norm in group.norms if (p := group.points.get((norm, *where))) is not None}


def _rivals(norm: str, cell: dict[str, Point], peers: Container[str] | None) -> list[str]:
    return [n for n in cell if n != norm and (n.split(":")[0] in PEERS if peers is None else n in peers)]


def rank_score(point: Point) -> float:
    """The score, by which points are ranked; minus infinity if there is none."""
    return -math.inf if point.score is None or math.isnan(point.score) else point.score


def _is_within(norm: str, cell: dict[str, Point], peers: Container[str] | None) -> bool:
    return cell[norm].within(max((cell[n] for n in _rivals(norm, cell, peers)), key=rank_score))


def _rank(norm: str, cell: dict[str, Point], peers: Container[str] | None) -> float:
    rivals = set(_rivals(norm, cell, peers))
    if norm.split(":")[0] in PEERS and "default" in cell:
        rivals.add("default")
    mine, others = rank_score(cell[norm]), [rank_score(cell[n]) for n in rivals]
    return 1 + sum(o > mine for o in others) + sum(o == mine for o in others) / 2


def _is_lost(norm: str, cell: dict[str, Point], peers: Container[str] | None) -> bool:
    return not cell[norm].whole and sum(cell[n].whole for n in _rivals(norm, cell, peers)) >= 2
