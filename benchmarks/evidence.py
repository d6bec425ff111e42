"""The studies behind docs/evidence.md: one question each, each norm at the best of three rates, three seeds or more.

    python benchmarks/evidence.py                           # everything, in hours on two cores
    python benchmarks/evidence.py norm-batch dense          # some questions
    python benchmarks/evidence.py --full --device cuda      # at full length, for a GPU
    python benchmarks/evidence.py --list

Each training goes to results/evidence/NAME.csv as soon as it is done; the same command goes on after an interrupt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from small_batch import end

from fastrbn.compare import STUDIES, run_study

RESULTS = Path(__file__).parent / "results" / "evidence"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"default: {' '.join(STUDIES)}")
    parser.add_argument("--full", action="store_true", help="full length, for a GPU")
    parser.add_argument("--jobs", type=int, help="processes (default: a core each; on CUDA 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs (default: results/evidence)")
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
            result = run_study(name, path, args.jobs, args.device, full=args.full, log=lambda s: print(s, flush=True))
        except ValueError as e:
            parser.error(str(e))
        status = max(status, end(result, result.rows, lambda: path))
        if result.interrupted:
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
