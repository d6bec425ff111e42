"""What `GraphMonitor` costs: time inside its handlers for each training step of the course's net, one CPU thread.

    python benchmarks/graph.py [--csv results/graph_cpu.csv] [--steps 300]

Before anything is timed it must find a planted leak by name and say nothing of a sound net. The handlers are timed from
inside the fit, since what they add is less than a whole fit's time varies; the step is the same fit's, so that the
ratio is of one process. Medians; the steps in which all attributes are looked through apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from about import in_words, machine, write_csv

from fastrbn import Callback, GraphMonitor, Learner, Runner, conv_rbn, get_cnn_model

HANDLERS = ("begin_batch", "after_loss", "after_batch")


class Leak(Callback):
    def begin_fit(self):
        self.losses = []

    def after_loss(self):
        self.losses.append(self.run.loss)


class Timed(GraphMonitor):
    """Adds up the time inside the handlers, step by step; the step's own from the first of them to the last."""

    def begin_fit(self):
        super().begin_fit()
        self.own, self.whole, self.began = [], [], 0.0


def _timed(event):
    def handler(self):
        start = time.perf_counter()
        getattr(GraphMonitor, event)(self)
        end = time.perf_counter()
        if event == "begin_batch":
            self.own.append(0.0)
            self.began = start
        self.own[-1] += end - start
        if event == "after_batch":
            self.whole.append(end - self.began)

    return handler


for _event in HANDLERS:
    setattr(Timed, _event, _timed(_event))


def fit(monitor, batch, steps, cbs=(), **kwargs):
    torch.manual_seed(0)
    model = get_cnn_model(SimpleNamespace(c=10, c_in=1), [8, 16, 32, 64, 64], conv_rbn, **kwargs)
    pairs = [(torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,)))] * steps
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    run = Runner([*cbs, monitor])
    run.logger = lambda text: None
    run.fit(1, Learner(model, opt, F.cross_entropy, SimpleNamespace(train_dl=pairs, valid_dl=None)))
    return monitor


def check():
    (holder,) = fit(GraphMonitor(), 4, 5, [Leak()]).report.holders
    assert holder.name == "Leak.losses", holder
    assert fit(GraphMonitor(every=1), 4, 5).report is None


def measure(batch, steps, **kwargs):
    monitor = fit(Timed(), batch, steps, **kwargs)
    looks = [i for i in range(steps) if i < 4 or i % monitor.every == 0]
    plain = sorted(set(range(steps)) - set(looks))
    own, look = (statistics.median(monitor.own[i] for i in some) * 1e6 for some in (plain, looks))
    step = statistics.median(monitor.whole[i] - monitor.own[i] for i in plain) * 1e6
    return {
        "backend": kwargs.get("backend", "auto"),
        "batch": batch,
        "nodes": monitor.counts[0],
        "step_us": round(step, 1),
        "monitor_us": round(own, 1),
        "look_us": round(look - own, 1),
        "share": round((own + (look - own) / monitor.every) / step, 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    check()
    cases = [{"batch": 8}, {"batch": 64}, {"batch": 8, "backend": "reference"}]
    rows = [measure(steps=args.steps, **case) for case in cases]
    about = machine()
    print(in_words(about))
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    if args.csv:
        write_csv(args.csv, rows, about)


if __name__ == "__main__":
    main()
