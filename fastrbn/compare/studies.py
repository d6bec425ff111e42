"""Studies: a question about norms, and the grid of tasks that answers it, each norm at the best of some rates.

    result = run_study("norm-batch", "norm-batch.csv")    # trains what is not in the CSV yet
    best = best_points(STUDIES["norm-batch"], read_rows("norm-batch.csv"))
    print(best["norm-batch", "default", 2].point)         # 49.52 ± 2.30

`benchmarks/evidence.py` is the command for it; docs/evidence.md shows the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastrbn.util import one_of

from .cell import Cell
from .grid import GridResult, cells_of, run_grid
from .results import Point, Row, point_of, rank_score
from .tasks import ZOO


@dataclass(frozen=True)
class Study:
    """A question, and the grid that answers it.

    Each norm is trained at every rate with the first seed, then at its best rate with the other seeds.

    - `question`: one sentence.
    - `tasks`: title by name of the task. `norms`: label by text of the norm.
    - `bs`: batch sizes. `axis` says what they are.
    - `once`: norms whose result does not depend on the batch size. They are trained at the largest only.
    - `factors`: the rates to choose from, times the rate of the task.
    """

    question: str
    tasks: dict[str, str]
    norms: dict[str, str]
    bs: tuple[int, ...]
    once: tuple[str, ...] = ()
    factors: tuple[float, ...] = (0.333333, 1, 3)
    seeds: tuple[int, ...] = (0, 1, 2)
    axis: str = "batch size"

    def full(self) -> Study:
        """The same with the tasks at full length, for a GPU."""
        return replace(self, tasks={f"{name}-full": title for name, title in self.tasks.items()})


STUDIES = {
    "norm-batch": Study(
        "How many images does each norm need at once, if the optimiser's batch is always 128?",
        {"norm-batch": "CIFAR-10, ResNet, SGD over 128 images"},
        {
            "default": "RunningBatchNorm",
            "running-ws": "RunningBatchNorm + WS",
            "batchnorm": "nn.BatchNorm",
            "batchrenorm": "batch renorm",
            "mabn": "MABN",
            "onlinenorm": "Online Normalization",
            "groupnorm": "GroupNorm",
            "groupnorm-ws": "GroupNorm + WS",
        },
        (1, 2, 4, 8, 32),
        once=("onlinenorm", "groupnorm", "groupnorm-ws"),
        axis="images that the norm sees at once",
    ),
    "dense": Study(
        "Which norms train a net for dense prediction on batches of one or two images?",
        {
            "canvases": "labels of digits on cluttered canvases, U-Net, Adam",
            "inpainting": "CIFAR-10 inpainted, U-Net, Adam",
        },
        {
            "default": "RunningBatchNorm",
            "batchnorm": "nn.BatchNorm",
            "frozen": "frozen nn.BatchNorm",
            "groupnorm": "GroupNorm",
            "instancenorm": "InstanceNorm",
        },
        (1, 2, 8),
    ),
    "fine-tuning": Study(
        "How should a net with nn.BatchNorm be fine-tuned in small batches?",
        {"fine-tuning-digits": "MNIST, to dark rotated digits", "fine-tuning-cifar": "CIFAR-10, animals to vehicles"},
        {
            "default": "RunningBatchNorm, converted",
            "frozen": "frozen nn.BatchNorm",
            "batchnorm": "nn.BatchNorm",
            "precise": "PreciseBN",
        },
        (1, 2, 4, 32),
    ),
    "correlated": Study(
        "Which norms can be trained on batches of correlated samples?",
        {
            "order-shuffled": "MNIST, conv net: shuffled",
            "order-video": "MNIST, conv net: clips of 8 frames",
            "order-one-class": "MNIST, conv net: one class a batch",
            "order-runs": "MNIST, conv net: runs of 16 of a class",
            "order-one-class-mlp": "MNIST, MLP: one class a batch",
        },
        {
            "default": "RunningBatchNorm",
            "batchnorm": "nn.BatchNorm",
            "batchrenorm": "batch renorm",
            "groupnorm": "GroupNorm",
        },
        (2, 8, 32),
    ),
    "large-batch": Study(
        "Does the swap of the norm cost accuracy at a large batch?",
        {"large-batch": "CIFAR-10, ResNet, the recipe of nn.BatchNorm"},
        {"default": "RunningBatchNorm", "batchnorm": "nn.BatchNorm", "groupnorm": "GroupNorm"},
        (512, 1024),
        factors=(1,),
        seeds=(0, 1, 2, 3, 4),
    ),
}
"""Studies by name."""


@dataclass(frozen=True)
class Best:
    """The result of a norm at its best rate: the factor, whether it is at an end of those tried, and the `Point`."""

    factor: float
    at_edge: bool
    point: Point


def run_study(
    name: str,
    path: str | Path,
    jobs: int | None = None,
    device: str = "cpu",
    root: str | Path | None = None,
    full: bool = False,
    log: Any = print,
) -> GridResult:
    """Train what a study's CSV does not have yet.

    Parameters
    ----------
    name : str
        One of `STUDIES`.
    path : str or Path
        The CSV file.
    jobs, device, root, log
        As in `run_grid`.
    full : bool, default False
        Train the tasks at full length, which needs a GPU.

    Returns
    -------
    GridResult
        Of the last stage that was begun: all rates with the first seed, then the best rate with the others.

    Raises
    ------
    ValueError
        If there is no such study.

    Examples
    --------
    >>> run_study("norm-batch", "norm-batch.csv").todo   # doctest: +SKIP
    0
    """
    study = STUDIES[one_of("a study", name, STUDIES)]
    study = study.full() if full else study
    result = run_grid(_first(study), path, jobs, device, root, log=log)
    if result.interrupted or result.todo > len(result.failed):
        return result
    rest = run_grid(_others(study, result.rows), path, jobs, device, root, log=log)
    return replace(rest, failed={**result.failed, **rest.failed}, todo=result.todo + rest.todo)


def _sizes(study: Study, norm: str) -> Sequence[int]:
    return study.bs[-1:] if norm in study.once else study.bs


def _first(study: Study) -> list[Cell]:
    """All rates with the first seed."""
    cells = [
        cell
        for norm in study.norms
        for cell in cells_of([norm], _sizes(study, norm), study.seeds[:1], study.factors, [ZOO], study.tasks)
    ]
    return sorted(cells, key=lambda cell: (list(study.tasks).index(cell.net), cell.bs))


def _others(study: Study, rows: Iterable[Row]) -> list[Cell]:
    """The best rate with the other seeds."""
    best = best_points(study, rows)
    return [
        Cell(norm, bs, seed, found.factor, ZOO, of)
        for task in study.tasks  # a task at a time, as a process trains the net that a task starts from once then
        for seed in study.seeds[1:]
        for (of, norm, bs), found in best.items()
        if of == task
    ]


def best_points(study: Study, rows: Iterable[Row]) -> dict[tuple[str, str, int], Best]:
    """The result of each norm at the rate that was best with the first seed.

    Parameters
    ----------
    study : Study
    rows : iterable of dict
        From `read_rows`. Of several rows for the same training, with different code, the last counts.

    Returns
    -------
    dict of (str, str, int) to Best
        By task, norm and batch size, in the study's order; without those that have no row.

    Examples
    --------
    >>> best_points(STUDIES["norm-batch"], [])
    {}
    """
    latest = {(r["net"], r["norm"], int(r["bs"]), float(r["lr_factor"]), int(r["seed"])): r for r in rows}
    found = {}
    for task in study.tasks:
        for norm in study.norms:
            for bs in _sizes(study, norm):
                at = {f: latest.get((task, norm, bs, f, study.seeds[0])) for f in study.factors}
                tried = {f: row for f, row in at.items() if row is not None}
                if tried:
                    factor = max(tried, key=lambda f: rank_score(point_of([tried[f]])))
                    points = [latest.get((task, norm, bs, factor, seed)) for seed in study.seeds]
                    edge = len(study.factors) > 1 and factor in (min(study.factors), max(study.factors))
                    found[task, norm, bs] = Best(factor, edge, point_of([p for p in points if p is not None]))
    return found
