"""Does a norm do well everywhere, no setting touched? Norms over many small tasks, on `fastrbn compare`'s machinery.

    python benchmarks/zoo.py                                                     # everything: days on one core
    python benchmarks/zoo.py --tasks dense,mlp-adam --norms default,batchnorm --bs 2,8 --factors 1 --seeds 0
    python benchmarks/zoo.py --list

Every norm has the same initial weights, batches and learning rate at the same seed. The rules for the rates were fixed
before anything was compared. A row a cell goes to results/zoo.csv as soon as it is trained; the same command goes on
after an interrupt. Cells at the rule's rate come first, seed by seed. Beside the CSV are written zoo.md (the standing
of each norm over all tasks, then a table a task) and zoo/<task>.png (score against batch size). A task without its
data (MNIST, CIFAR-10) is skipped.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from about import device_names
from small_batch import end, numbers

from fastrbn import plots
from fastrbn.compare import PEERS, TASKS, ZOO, cells_of, get_task, read_rows, run_grid, split_norms
from fastrbn.compare.report import markdown, standing_table, task_figure
from fastrbn.compare.results import groups_of
from fastrbn.compare.tasks import task_of
from fastrbn.data import DataError
from fastrbn.util import write_whole

# frn takes the place of ReLU too; layernorm is groupnorm of one group; frozen and precise are ways to use batchnorm
LEFT_OUT = ("none", "frn", "layernorm", "frozen", "precise")
NORMS = ["default", *(name for name in PEERS if name not in LEFT_OUT)]
RESULTS = Path(__file__).parent / "results" / "zoo.csv"


def factors(text):
    """`1/3,1` → 0.333333, 1."""
    return [float(f"{float(a) / float(b or 1):.6g}") for a, _, b in (part.partition("/") for part in text.split(","))]


def present(names, root=None) -> list[str]:
    """Those whose data is here; the others are named."""
    here = []
    for name in names:
        try:
            get_task(name).data(root)
        except (DataError, OSError) as e:
            print(f"{name} is skipped, its data is missing: {str(e).splitlines()[0]}", flush=True)
        else:
            here.append(name)
    return here


def in_order(cells):
    """Seed by seed, the rule's own rate first, task by task: what is cut short has something of everything."""
    names = list(TASKS)
    return sorted(cells, key=lambda c: (c.seed, abs(math.log(c.lr_factor)), names.index(c.net)))


def report(path) -> str:
    """Write table and pictures of all rows of the CSV at `path` (of its newest version); the standing in words."""
    rows = [row for row in read_rows(path) if task_of(row["data"], row["net"])]
    rows = [row for row in rows if row["version"] == rows[-1]["version"]]
    standing = standing_table(rows)
    write_whole(path.with_suffix(".md"), f"## Standing\n\n{standing}\n\n## Tasks\n\n{markdown(rows)}")
    pictures = path.with_suffix("")
    pictures.mkdir(exist_ok=True)
    for group in groups_of(rows):
        name = f"{group.rows[0]['net']}{group.beside}".replace(", ", "-").replace(" ", "_")
        write_whole(pictures / f"{name}.png", plots.png(task_figure(group)))
    return standing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS), help="default: all")
    parser.add_argument("--norms", type=split_norms, default=NORMS, help=f"default: {','.join(NORMS)}")
    parser.add_argument("--bs", type=numbers(int), default=[1, 2, 8, 32, 256], help="default: 1,2,8,32,256")
    parser.add_argument("--factors", type=factors, default=factors("1/3,1,3,4"), help="default: 1/3,1,3,4")
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--jobs", type=int, help="processes (default: a core each; on CUDA 1)")
    parser.add_argument("--device", type=device_names, default="cpu")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="default: results/zoo.csv")
    parser.add_argument("--list", action="store_true", help="name the tasks and end")
    args = parser.parse_args()
    if args.list:
        for name, task in TASKS.items():
            print(f"{name}: {task.goal.called}. {task}")
        return 0

    args.csv.parent.mkdir(parents=True, exist_ok=True)
    try:
        cells = cells_of(args.norms, args.bs, args.seeds, args.factors, [ZOO], present(args.tasks))
    except ValueError as e:
        parser.error(str(e))
    result = run_grid(in_order(cells), args.csv, args.jobs, args.device, log=lambda line: print(line, flush=True))
    where = f"{args.csv.with_suffix('.md')}, pictures in {args.csv.with_suffix('')}"
    return end(result, cells, lambda: f"{report(args.csv)}\n\n{where}")


if __name__ == "__main__":
    sys.exit(main())
