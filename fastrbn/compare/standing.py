"""One number over many tasks: how often a norm is as good as the best peer, and its mean rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from .norms import PEERS
from .report import groups_of


@dataclass(frozen=True)
class Standing:
    """A norm over all cells (task × batch size × learning-rate factor) that it and a peer have results for.

    - `cells`: how many there are. `blank`: how many more in which no norm learnt anything; they are left out.
    - `within`: the share in which its mean over the seeds is no more than two pooled standard deviations below that of
      the best other peer. A seed that was lost counts with what it reached; deviations are those of the trained seeds.
    - `rank`: its mean rank among the peers (1 is best, ties share); a peer's among the peers and `default`.
    - `lost`: cells in which not all of its seeds trained, where those of two other peers did.
    """

    cells: int
    blank: int
    within: float
    rank: float
    lost: int


def standings(rows, peers=None) -> dict[str, Standing]:
    """Each norm's `Standing` among `peers` (None: all of `PEERS` that the rows have), in the order of the tables."""
    cells, found = list(_cells(rows)), {}
    for norm in dict.fromkeys(norm for group in groups_of(rows) for norm in group.norms):
        shared = [cell for cell in cells if norm in cell and _rivals(norm, cell, peers)]
        told = [cell for cell in shared if any(p.mean is not None for p in cell.values())]
        if told:
            found[norm] = Standing(
                len(told),
                len(shared) - len(told),
                fmean(_is_within(norm, cell, peers) for cell in told),
                fmean(_rank(norm, cell, peers) for cell in told),
                sum(_is_lost(norm, cell, peers) for cell in told),
            )
    return found


def _cells(rows):
    """For each task, batch size and factor, {norm: Point}."""
    for group in groups_of(rows):
        for where in dict.fromkeys((bs, factor) for _, bs, factor in group.points):
            yield {norm: p for norm in group.norms if (p := group.points.get((norm, *where))) is not None}


def _rivals(norm, cell, peers):
    return [n for n in cell if n != norm and (n.split(":")[0] in PEERS if peers is None else n in peers)]


def _score(point):
    return -math.inf if point.score is None or math.isnan(point.score) else point.score


def _is_within(norm, cell, peers):
    best = max((cell[n] for n in _rivals(norm, cell, peers)), key=_score)
    pooled = math.sqrt(((cell[norm].std or 0) ** 2 + (best.std or 0) ** 2) / 2)
    return _score(cell[norm]) >= _score(best) - 2 * pooled and _score(cell[norm]) > -math.inf


def _rank(norm, cell, peers):
    rivals = set(_rivals(norm, cell, peers))
    if norm.split(":")[0] in PEERS and "default" in cell:
        rivals.add("default")
    mine, others = _score(cell[norm]), [_score(cell[n]) for n in rivals]
    return 1 + sum(o > mine for o in others) + sum(o == mine for o in others) / 2


def _is_lost(norm, cell, peers):
    return not cell[norm].whole and sum(cell[n].whole for n in _rivals(norm, cell, peers)) >= 2


USUAL = ("batchnorm", "groupnorm")


def standing_table(rows) -> str:
    """The standings as a Markdown table, with the share within reach of `USUAL` alone, and `default`'s in a sentence."""
    among_all, among_usual = standings(rows), standings(rows, USUAL)
    lines = [
        f"| norm | cells | within two deviations of the best peer | of {' and '.join(USUAL)} | mean rank | lost where two "
        "peers train |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for norm, s in among_all.items():
        usual = f"{100 * among_usual[norm].within:.0f} %" if norm in among_usual else ""
        lines.append(f"| {norm} | {s.cells} | {100 * s.within:.0f} % | {usual} | {s.rank:.2f} | {s.lost} |")
    return "\n".join([*lines, "", _sentence(among_all.get("default"))])


def _sentence(s) -> str:
    if s is None:
        return "There is no cell with results of both `default` and a peer."
    return (
        f"`default` is within two pooled standard deviations of the best peer in {100 * s.within:.0f} % of {s.cells} "
        f"cells (task × batch size × learning-rate factor; {s.blank} more, in which no norm learns, are left out); its "
        f"mean rank is {s.rank:.2f}."
    )
