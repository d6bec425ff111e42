"""The studies behind docs/evidence.md: one question each, each norm at the best of three rates, three seeds or more.

    python benchmarks/evidence.py                           # everything, in hours on two cores
    python benchmarks/evidence.py norm-batch dense          # some questions
    python benchmarks/evidence.py --full --device cuda      # at full length, for a GPU
    python benchmarks/evidence.py --write                   # tables and pictures of what is trained, into docs/
    python benchmarks/evidence.py --list

Each training goes to results/evidence/NAME.csv as soon as it is done; the same command goes on after an interrupt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from small_batch import end

from fastrbn import plots
from fastrbn.compare import STUDIES, read_rows, run_study, study_figure, study_table, write_page
from fastrbn.util import one_of, write_whole

RESULTS = Path(__file__).parent / "results" / "evidence"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"


def write(name, rows, page=PAGE):
    """Write a study's table into the page, and its picture beside it."""
    study, picture = STUDIES[name], page.with_name(f"{page.stem}-{name}.png")
    write_whole(picture, plots.png(study_figure(study, rows)))
    write_page(page, {name: f"![{study.question}]({picture.name})\n\n{study_table(study, rows)}"})
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"default: {' '.join(STUDIES)}")
    parser.add_argument("--full", action="store_true", help="full length, for a GPU")
    parser.add_argument("--jobs", type=int, help="processes (default: a core each; on CUDA 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs (default: results/evidence)")
    parser.add_argument("--write", action="store_true", help="write docs/evidence.md and its pictures; train nothing")
    parser.add_argument("--list", action="store_true", help="name the questions and end")
    args = parser.parse_args()
    if args.list:
        for name, study in STUDIES.items():
            print(f"{name}: {study.question}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for name in args.questions or STUDIES:
        path = args.out / f"{name}{'-full' * args.full}.csv"
        try:
            if args.write:
                rows = read_rows(path)
                print(write(one_of("a study", name, STUDIES), rows) if rows else f"{path}: there are no results yet")
                continue
            result = run_study(name, path, args.jobs, args.device, full=args.full, log=lambda s: print(s, flush=True))
        except ValueError as e:
            parser.error(str(e))
        status = max(status, end(result, result.rows, lambda: path))
        if result.interrupted:
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
