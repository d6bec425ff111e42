"""Test-time drift: a trained net meets images that change slowly. Should the statistics of its norms be frozen?

    python benchmarks/drift.py                     # about 10 minutes on one core; the same command goes on
    python benchmarks/drift.py --full --device cuda

Nets with nn.BatchNorm, GroupNorm and RunningBatchNorm are trained alike, with the same initial weights and batches.
Then each sees a stream of validation images: the light changes slowly and comes back at once; then the images become
blurred and noisy. No label is used and no weight changes; only statistics follow, for the contenders that adapt. The
strength of the drift was set with GroupNorm and frozen nn.BatchNorm, which loses a third to a half of its accuracy.
"""

from __future__ import annotations

import argparse
import copy
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import about
import torch
import torch.nn.functional as F
from about import machine, rewrite
from torch import Tensor, nn

from fastrbn import plots
from fastrbn.compare import ZOO, Cell, load_task, run_cell
from fastrbn.compare.report import plain_point
from fastrbn.compare.results import Point
from fastrbn.norm import RunningBatchNorm, convert_batchnorm
from fastrbn.util import one_of, write_whole

QUESTION = "Should the statistics of a trained net follow inputs that drift?"
RESULTS = Path(__file__).parent / "results" / "evidence" / "drift.csv"

TRAIN_BS = 32


@dataclass(frozen=True)
class Drift:
    """The change at full strength: gain and offset of each colour, share of the blurred image, standard deviation of
    the noise. Images are standardised."""

    gain: tuple[float, ...]
    offset: tuple[float, ...]
    blur: float
    noise: float


TITLES = {"drift-digits": "MNIST, course net", "drift-objects": "CIFAR-10, VGG"}
DRIFTS = {
    "drift-digits": Drift((0.6,), (0.5,), 1.0, 1.4),
    "drift-objects": Drift((0.5, 0.7, 0.9), (0.8, 0.4, 0.0), 0.5, 0.5),
}
KINDS: dict[str, Callable[[str], Any]] = {
    "task": lambda text: one_of("task", text.removesuffix("-full"), DRIFTS),
    **dict.fromkeys(("norm", "mode", "bs", "order"), str),
    **{"seed": int, "segment": int, "accuracy": lambda text: float(text or 0)},  # empty: refused
    **dict.fromkeys(("machine", "torch", "date"), str),
}
"""The columns of the CSV, and how they are read."""
SEGMENTS = 20
PARTS = {"no drift": (0, 2), "light": (8, 10), "after the return": (10, 12), "blur and noise": (18, 20)}  # of segments
RUN = 64  # images of one class in a row
STREAMS = ((1, "shuffled"), (4, "shuffled"), (32, "shuffled"), (32, "runs of one class"))


def strengths(n: int) -> tuple[Tensor, Tensor]:
    """Strength of the change of light, and of blur and noise, for each of n images: 0 to 1."""
    t = torch.arange(n) / n
    return ((t - 0.1) / 0.3).clamp(0, 1) * (t < 0.5), ((t - 0.6) / 0.3).clamp(0, 1)


def stream(drift: Drift, x: Tensor, y: Tensor, order: str, seed: int) -> tuple[Tensor, Tensor]:
    """All images once, in random order or in runs of one class, as they drift; a function of the seed."""
    g = torch.Generator().manual_seed(seed)
    i = torch.randperm(len(x), generator=g)
    if order != "shuffled":
        runs = [run for c in y.unique() for run in i[y[i] == c].split(RUN)]
        i = torch.cat([runs[j] for j in torch.randperm(len(runs), generator=g)])
    x, y = x[i], y[i]
    light, dim = (s.view(-1, 1, 1, 1) for s in strengths(len(x)))
    gain, offset = (torch.tensor(v).view(1, -1, 1, 1) for v in (drift.gain, drift.offset))
    x = x * (1 + light * (gain - 1)) + light * offset
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), "replicate"), 5, 1)
    return x.lerp(blurred, drift.blur * dim) + drift.noise * dim * torch.randn(x.shape, generator=g), y


# The ways to predict: each takes a trained net, which it may change, and returns a function of a batch.

Predict = Callable[[Tensor], Tensor]


def frozen(model: nn.Module) -> Predict:
    """Evaluation mode."""
    return model.eval()


def adapting(model: nn.Module) -> Predict:
    """RunningBatchNorm layers in training mode, the rest in evaluation mode: their statistics follow the stream."""
    model.eval()
    for module in model.modules():
        if isinstance(module, RunningBatchNorm):
            module.train()
    return model


def converted(model: nn.Module) -> Predict:
    """The same for a net that was trained with nn.BatchNorm."""
    return adapting(convert_batchnorm(model))


def of_the_batch(model: nn.Module) -> Predict:
    """Training mode of nn.BatchNorm: the statistics of each batch (Nado et al. 2020)."""
    return model.train()


def running(model: nn.Module, momentum: Callable[[int], float]) -> Predict:
    """The batch moves the running statistics of nn.BatchNorm in training mode, then is evaluated with them."""

    def predict(x: Tensor) -> Tensor:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum(len(x))
        model.train()(x)
        return model.eval()(x)

    return predict


def with_prior(model: nn.Module, prior: int = 16) -> Predict:
    """Statistics of the batch and of training, weighed as n : `prior` samples (Schneider et al. 2020)."""

    def mix(norm: nn.Module, args: tuple[Tensor], mean: Tensor, var: Tensor) -> None:
        (x,) = args
        v, m = torch.var_mean(x, (0, 2, 3), correction=0)
        share = len(x) / (len(x) + prior)
        norm.running_mean.copy_(mean.lerp(m, share))
        norm.running_var.copy_(var.lerp(v, share))

    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(partial(mix, mean=norm.running_mean.clone(), var=norm.running_var.clone()))
    return model.eval()


CONTENDERS: dict[tuple[str, str], tuple[str, Callable[[nn.Module], Predict]]] = {
    ("batchnorm", "frozen"): ("nn.BatchNorm, frozen", frozen),
    ("batchnorm", "batch"): ("nn.BatchNorm, batch statistics", of_the_batch),
    ("batchnorm", "prior"): ("nn.BatchNorm, mixed", with_prior),
    ("batchnorm", "running"): ("nn.BatchNorm, running", partial(running, momentum=lambda n: 0.1)),
    ("batchnorm", "memory"): (
        "nn.BatchNorm, running, 300 images",
        partial(running, momentum=lambda n: n / (n + 300)),
    ),
    ("batchnorm", "converted"): ("nn.BatchNorm converted, adapting", converted),
    ("groupnorm", "frozen"): ("GroupNorm", frozen),
    ("default", "frozen"): ("RunningBatchNorm, frozen", frozen),
    ("default", "adapting"): ("RunningBatchNorm, adapting", adapting),
}
"""Norm and mode → label, and the way to predict."""
NORMS = tuple(dict.fromkeys(norm for norm, _ in CONTENDERS))
DRAWN = [key for key in CONTENDERS if key[1] != "memory" and key != ("default", "frozen")]


@torch.no_grad()
def right(predict: Predict, x: Tensor, y: Tensor, bs: int) -> Tensor | None:
    """Whether the net is right for each image of a stream in batches; None if nn.BatchNorm refuses the batch."""
    try:
        return torch.cat([predict(part).argmax(1) for part in x.split(bs)]) == y
    except ValueError as e:
        if "more than 1 value per channel" not in str(e):
            raise
        return None


def measure(job: tuple[str, str, int], device: str = "cpu") -> list[dict]:
    """Train one net, (task, norm, seed), and show it the streams; its rows."""
    task, norm, seed = job
    loaded, models = _load(task), []
    run_cell(Cell(norm, TRAIN_BS, seed, data=ZOO, net=task), loaded, device, look=models.append)
    made = machine(torch.device(device))
    made = {"machine": made["device"], "torch": made["torch"], "date": made["date"]}
    rows = []
    drift = DRIFTS[task.removesuffix("-full")]
    for mode, bs, order in _streams(norm):
        x, y = (t.to(device) for t in stream(drift, loaded.valid_x, loaded.valid_y, order, seed))
        found = right(CONTENDERS[norm, mode][1](copy.deepcopy(models[0])), x, y, bs)
        where = {"task": task, "norm": norm, "mode": mode, "bs": "any" if mode == "frozen" else bs, "order": order}
        for segment, part in enumerate([None] * SEGMENTS if found is None else found.chunk(SEGMENTS)):
            accuracy = "" if part is None else f"{100 * part.float().mean().item():.2f}"
            rows.append({**where, "seed": seed, "segment": segment, "accuracy": accuracy, **made})
    return rows


_load = cache(load_task)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV, without those of a net that lost some."""
    rows = about.rows_of(path, KINDS)
    found = Counter(map(_net, rows))
    return [row for row in rows if found[_net(row)] >= SEGMENTS * sum(1 for _ in _streams(row["norm"]))]


def _net(row: dict[str, str]) -> tuple[str, str, int]:
    return row["task"], row["norm"], int(row["seed"])


def _streams(norm: str) -> Iterator[tuple[str, int, str]]:
    """Mode, batch size and order of what a net with this norm is shown."""
    for (bs, order), (its, mode) in product(STREAMS, CONTENDERS):
        if its == norm and (mode != "frozen" or bs >= TRAIN_BS):  # frozen: the same at every batch size
            yield mode, bs, order


def run(
    path: Path,
    tasks: Iterable[str] = tuple(DRIFTS),
    seeds: Iterable[int] = (0, 1, 2),
    jobs: int | None = None,
    device: str = "cpu",
    full: bool = False,
) -> bool:
    """Measure what the CSV does not have yet; False if Ctrl-C ended it. The rows of a net are written together."""
    done = set(map(_net, rows_of(path)))
    tasks = [task + "-full" * full for task in tasks]
    todo = [job for seed, task, norm in product(seeds, tasks, NORMS) if (job := (task, norm, seed)) not in done]
    print(f"{len(todo)} nets to train, {len(done)} finished", flush=True)
    jobs = min((os.cpu_count() or 1 if device == "cpu" else 1) if jobs is None else jobs, len(todo))
    context = torch.multiprocessing.get_context("spawn")
    try:
        with context.Pool(jobs, _begin) if jobs else nullcontext() as pool:
            work = partial(measure, device=device)
            for rows in pool.imap_unordered(work, todo) if pool else map(work, todo):
                rewrite(path, [*rows_of(path), *rows])
                print(f"{rows[0]['task']} {rows[0]['norm']} seed {rows[0]['seed']}: done", flush=True)
    except KeyboardInterrupt:
        return False
    return True


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def curves(rows: list[dict], task: str, bs: int, order: str) -> dict[tuple[str, str], list[list[float]]]:
    """For each contender a list of segments' accuracies per seed; empty where nn.BatchNorm refuses the batch."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row["task"] == task and row["order"] == order and row["bs"] in ("any", str(bs)):
            seeds = found.setdefault((row["norm"], row["mode"]), {})
            seeds.setdefault(row["seed"], []).extend([float(row["accuracy"])] if row["accuracy"] else [])
    return {key: [seed for seed in found[key].values() if seed] for key in CONTENDERS if key in found}


def table(rows: list[dict]) -> str:
    """Accuracy of each contender as Markdown, a table for each task: over whole streams, and in parts of one."""
    return "\n\n".join(_table(rows, task) for task in dict.fromkeys(row["task"] for row in rows)) + "\n"


def _table(rows: list[dict], task: str) -> str:
    columns = {f"batch {bs}" if order == "shuffled" else order: (bs, order, (0, SEGMENTS)) for bs, order in STREAMS}
    columns |= {f"{name}, batch 4": (4, "shuffled", part) for name, part in PARTS.items()}
    entries: dict[tuple[str, str], list[str]] = {}
    for bs, order, (start, stop) in columns.values():
        seeds = {key: [fmean(seed[start:stop]) for seed in runs] for key, runs in curves(rows, task, bs, order).items()}
        best = max((fmean(means) for means in seeds.values() if means), default=0)
        for key, means in seeds.items():
            spread = f" ± {stdev(means):.1f}" if len(means) > 1 else ""
            text = f"{fmean(means):.1f}{spread}" if means else "refused"
            entries.setdefault(key, []).append(f"**{text}**" if means and fmean(means) == best else text)
    lines = [f"| {_title(task)} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    return "\n".join(lines + [f"| {CONTENDERS[key][0]} | {' | '.join(cells)} |" for key, cells in entries.items()])


def _title(task: str) -> str:
    return TITLES[task.removesuffix("-full")]


def figure(rows: list[dict]) -> Any:
    """Accuracy over whole shuffled streams against the size of their batches, a panel for each task."""
    panels = []
    for task in dict.fromkeys(row["task"] for row in rows):
        lines: dict[str, list[dict]] = {}
        for bs in (bs for bs, order in STREAMS if order == "shuffled"):
            for key, seeds in curves(rows, task, bs, "shuffled").items():
                if key in DRAWN:
                    lines.setdefault(CONTENDERS[key][0], []).append(_point(bs, [fmean(seed) for seed in seeds]))
        panels.append((_title(task), "accuracy, %", lines))
    ours = [CONTENDERS[key][0] for key in (("default", "adapting"), ("batchnorm", "converted"))]
    level = [label for (_, mode), (label, _) in CONTENDERS.items() if mode == "frozen"]
    return plots.plot_study(QUESTION, panels, "images that arrive at once", ours, level)


def _point(x: int, means: list[float]) -> dict[str, Any]:
    refused = int(not means)
    mean, std = fmean(means) if means else None, stdev(means) if len(means) > 1 else None
    return plain_point(x, Point(len(means) + refused, 0, 0, refused, mean, std, None))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="longer trainings and streams, for a GPU")
    parser.add_argument("--jobs", type=int, help="processes (default: a core each; on CUDA 1)")
    parser.add_argument("--device", type=about.device_name, default="cpu")
    parser.add_argument("--csv", type=Path, help="default: results/evidence/drift.csv, with --full drift-full.csv")
    args = parser.parse_args()
    args.csv = args.csv or RESULTS.with_stem("drift-full" if args.full else "drift")
    whole = run(args.csv, jobs=args.jobs, device=args.device, full=args.full)
    if rows := rows_of(args.csv):
        print(table(rows))
        print(write_whole(args.csv.with_suffix(".png"), plots.png(figure(rows))))
    if not whole:
        print("interrupted: the same command goes on", file=sys.stderr)
    return 0 if whole else 130


if __name__ == "__main__":
    sys.exit(main())
