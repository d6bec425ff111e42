"""What the loop costs: time that `Runner` adds to a training step, over a loop in plain PyTorch on the same batches.

    python benchmarks/loop.py [--csv results/loop.csv] [--blocks 30] [--steps 2000]

The model is as small as can be (nn.Linear(10, 10), batches of 8, SGD), so that the framework is what is left. One
thread. Blocks of the loops take turns, so that a machine that slows down slows all of them; reported is the median
block's time per step, and the median of the differences to the plain loop's block of the same turn. Before anything is
timed the loops must end with identical parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from about import in_words, machine, write_csv

from fastrbn.callbacks import AvgStatsCallback, ProgressCallback, Recorder, accuracy
from fastrbn.learn import Learner, Runner

TARGETS = {"Runner": 8.0, "Runner + Recorder + AvgStats(accuracy) + Progress": 40.0}  # microseconds a step


def make():
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 10)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def plain(batches):
    model, opt = make()

    def run():
        for xb, yb in batches:
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()

    return model, run


def with_runner(batches, cb_funcs=()):
    model, opt = make()
    learn = Learner(model, opt, F.cross_entropy, SimpleNamespace(train_dl=batches, valid_dl=None))
    runner = Runner(cb_funcs=list(cb_funcs))

    def run():
        with contextlib.redirect_stdout(io.StringIO()):  # no terminal: plain lines
            runner.fit(1, learn)

    return model, run


def contenders(batches):
    bare, full = TARGETS
    cbs = [Recorder, functools.partial(AvgStatsCallback, accuracy), ProgressCallback]
    return {"plain PyTorch": plain(batches), bare: with_runner(batches), full: with_runner(batches, cbs)}


def check(batches):
    """All loops end with the same parameters, bit for bit, or there is nothing to time."""
    loops = contenders(batches)
    for _, run in loops.values():
        run()
    reference, *others = [(name, model) for name, (model, _) in loops.items()]
    for name, model in others:
        for p, q in zip(reference[1].parameters(), model.parameters(), strict=True):
            if not torch.equal(p, q):
                raise SystemExit(f"'{name}' does not train as '{reference[0]}': parameters differ; nothing was timed")


def measure(batches, blocks):
    """Microseconds a step, for each loop a list with one number for each block."""
    loops = contenders(batches)
    times = {name: [] for name in loops}
    for block in range(blocks + 1):
        for name, (_, run) in loops.items():
            start = time.perf_counter()
            run()
            if block:  # the first one warms up
                times[name].append((time.perf_counter() - start) / len(batches) * 1e6)
    return times


def report(times):
    reference = times["plain PyTorch"]
    rows = []
    for name, values in times.items():
        target = TARGETS.get(name)
        added = statistics.median(v - r for v, r in zip(values, reference, strict=True))
        met = "" if target is None else "yes" if added <= target else "NO"
        rows.append(
            {
                "loop": name,
                "us_per_step": round(statistics.median(values), 2),
                "added_us": round(added, 2),
                "target_us": target or "",
                "met": met,
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--blocks", type=int, default=30, help="timed blocks of each loop (default 30)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps in a block (default 2000)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(1)
    batches = [(torch.randn(8, 10), torch.randint(0, 10, (8,))) for _ in range(args.steps)]
    check(batches)
    rows, about = report(measure(batches, args.blocks)), machine()

    print(in_words(about))
    print(f"{'loop':<55}{'µs a step':>10}{'added':>8}{'target':>8}  met")
    for row in rows:
        print("{loop:<55}{us_per_step:>10}{added_us:>8}{target_us:>8}  {met}".format(**row))
    if args.csv:
        write_csv(args.csv, rows, about)


if __name__ == "__main__":
    main()
