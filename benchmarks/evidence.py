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
from functools import partial
from pathlib import Path

import crossq
import drift
from about import device_names
from small_batch import end

from fastrbn import plots
from fastrbn.compare import STUDIES, read_rows, run_study, study_figure, study_table, write_page
from fastrbn.data import DataError
from fastrbn.util import one_of, write_whole

RESULTS = Path(__file__).parent / "results" / "evidence"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"


OTHERS = {"crossq": crossq, "drift": drift}  # questions with a script of their own
QUESTIONS = {name: study.question for name, study in STUDIES.items()} | {n: o.QUESTION for n, o in OTHERS.items()}


def showing(name, full=False):
    """Functions of a question: the rows at a path, their table as Markdown, and their picture."""
    if name in OTHERS:
        return OTHERS[name].rows_of, OTHERS[name].table, OTHERS[name].figure
    study = STUDIES[name].full() if full else STUDIES[name]
    return read_rows, partial(study_table, study), partial(study_figure, study)


def write(name, path, page=PAGE, full=False):
    """Write the results of a question into the page, and the picture beside it; the picture's path."""
    read, table, figure = showing(name, full)
    rows = read(path)
    if not rows:
        return f"{path}: there are no results yet"
    picture = write_whole(page.with_name(f"{page.stem}-{name}.png"), plots.png(figure(rows)))
    write_page(page, {name: f"![{QUESTIONS[name]}]({picture.name})\n\n{table(rows)}"})
    return picture


def train(name, path, args):
    """Train what is missing; the exit status."""
    if name in OTHERS:
        # CrossQ's nets are so small that a CPU is faster
        device = {} if name == "crossq" else {"device": args.device.partition(",")[0]}
        return 0 if OTHERS[name].run(path, full=args.full, jobs=args.jobs, **device) else 130
    log = partial(print, flush=True)
    result = run_study(name, path, args.jobs, args.device, full=args.full, log=log)
    return end(result, range(len(result.rows) + result.todo), lambda: path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"default: {' '.join(QUESTIONS)}")
    parser.add_argument("--full", action="store_true", help="full length, for a GPU")
    parser.add_argument("--jobs", type=int, help="processes (default: a core each; on CUDA 1)")
    parser.add_argument("--device", type=device_names, default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs (default: results/evidence)")
    parser.add_argument("--write", action="store_true", help="write docs/evidence.md and its pictures; train nothing")
    parser.add_argument("--list", action="store_true", help="name the questions and end")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name}: {question}" for name, question in QUESTIONS.items()))
        return 0
    status = 0
    try:
        names = [one_of("a question", name, QUESTIONS) for name in args.questions or QUESTIONS]
        args.out.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = args.out / f"{name}{'-full' * args.full}.csv"
            if args.write:
                print(write(name, path, full=args.full))
                continue
            status = max(status, train(name, path, args))
            if status == 130:
                break
    except (ValueError, DataError) as e:
        parser.error(str(e))
    return status


if __name__ == "__main__":
    sys.exit(main())
