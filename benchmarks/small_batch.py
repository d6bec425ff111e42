"""Which norm trains at which batch size? The named grids, on top of `fastrbn compare`'s function.

    python benchmarks/small_batch.py                      # --grid quick
    python benchmarks/small_batch.py --grid full --jobs 2
    python benchmarks/small_batch.py --grid full --norms default,course --seeds 0

Every norm has the same net, initial weights, order of batches and learning rate at the same seed; the rule for the
rate was fixed before anything was compared, and the sweep shows what each norm would make of others. A row a cell goes
to results/small_batch_<grid>.csv as soon as it is trained, with machine, versions and date; a grid that was interrupted
goes on with the same command. Table and pictures are written beside it; the full grid has docs/small-batches.png too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from about import device_names

from fastrbn import plots
from fastrbn.compare import cells_of, read_rows, run_grid, split_norms, write_report
from fastrbn.compare.report import accuracy_figure
from fastrbn.util import write_whole

RECIPES = "default,course,skip-alternate,skip-tenth,detached"
PEERS = "batchnorm,batchrenorm,groupnorm,layernorm,frn"  # on the course net InstanceNorm has one value a channel
GRIDS = {
    "quick": {"norms": "default,course,batchnorm,groupnorm", "bs": [2, 8, 32], "seeds": [0], "n_train": 5000},
    "full": {"norms": f"{RECIPES},{PEERS}", "bs": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], "seeds": [0, 1, 2]},
    "sweep": {
        "norms": f"default,course,detached,{PEERS}",
        "bs": [2, 8, 32],
        "seeds": [0, 1, 2],
        "lr_factors": [0.25, 0.5, 1, 2, 4],
    },
    "cifar": {
        "norms": "default,course,batchnorm,groupnorm,layernorm,instancenorm",
        "bs": [1, 2, 4, 8, 32, 128, 512],
        "seeds": [0, 1, 2],
        "data": ["cifar10"],
        "net": ["resnet-small"],
        "n_train": 10_000,
        "epochs": 3,
        "augment": True,
    },
}
RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "small-batches.png"  # of three norms of the full grid, for README.md


def numbers(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def end(result, cells, report) -> int:
    """Say how a grid of `cells` ended, with what `report()` writes and returns in words; the exit status."""
    for cell, words in result.failed.items():
        print(f"\n{cell} failed:\n{words}", file=sys.stderr)
    if result.rows:
        print(f"\n{report()}")
    if result.todo:
        print(f"{result.todo} of {len(cells)} cells are left: the same command goes on", file=sys.stderr)
    return 130 if result.interrupted else int(bool(result.todo))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default="quick")
    parser.add_argument("--norms", help="other norms than the grid's, such as default,default:mom=0.05")
    parser.add_argument("--bs", type=numbers(int), help="other batch sizes")
    parser.add_argument("--seeds", type=numbers(int), help="other seeds")
    parser.add_argument("--lr-factors", type=numbers(float), help="other learning-rate factors")
    parser.add_argument("--n-train", type=int, help="train on so many images")
    parser.add_argument("--jobs", type=int, help="processes (default: a core each; on CUDA 1)")
    parser.add_argument("--device", type=device_names, default="cpu")
    parser.add_argument("--record-norms", type=int, metavar="K", help="weight norms every K steps")
    parser.add_argument("--csv", type=Path, help="instead of results/small_batch_<grid>.csv")
    args = parser.parse_args()

    grid = dict(GRIDS[args.grid])
    for name in ("norms", "bs", "seeds", "lr_factors", "n_train"):
        if getattr(args, name) is not None:
            grid[name] = getattr(args, name)
    path = args.csv or RESULTS / f"small_batch_{args.grid}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = cells_of(split_norms(grid.pop("norms")), **grid)
    result = run_grid(
        cells, path, args.jobs, args.device, norms_every=args.record_norms, log=lambda line: print(line, flush=True)
    )

    def report():
        table, files = write_report(path, path.stem)
        if path == RESULTS / "small_batch_full.csv":
            rows = [row for row in read_rows(path) if row["norm"] in ("default", "batchnorm", "groupnorm")]
            files.append(write_whole(PICTURE, plots.png(accuracy_figure(rows))))
        return f"{table}\n{', '.join(map(str, files))}"

    return end(result, cells, report)


if __name__ == "__main__":
    sys.exit(main())
