"""What callbacks cost: time that each adds to a training step of the course's net, over the same fit without it.

    python benchmarks/callbacks.py [--csv results/callbacks_cpu.csv] [--case HaltOnNaN] [--rounds 15] [--steps 200]

Each case is a callback and a check that it does its work: HaltOnNaN must find a planted NaN, name the parameter, and
give the weights back; ParamMagnitudes and ActivationStats must have the numbers that double precision gives. No case is
timed before its check has passed, and before fits with and without it have ended with the same parameters, bit for bit.
Then fits with and without it take turns in one process; reported is the median of the ratios of neighbours, "plain
again" against "plain" being the noise of the machine. On the CPU the clock is the process's own (time that others take
does not count). The net is the course's (8, 16, 32, 64, 64 channels) at batch 32 and others, with one thread on the
CPU; `--device cuda` times the whole fit until the device is done.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from about import append, device_name, in_words, machine, rows_of

from fastrbn import ActivationStats, Callback, HaltOnNaN, ParamMagnitudes, conv_rbn, get_learn_run

NFS = [8, 16, 32, 64, 64]


class SpoilsGradient(Callback):
    """Puts NaN into one gradient of step `at`, in the backward pass."""

    name_of = "3.0.weight"

    def __init__(self, at):
        self.at = at

    def begin_fit(self):
        p = self.run.model.get_parameter(self.name_of)
        self._handle = p.register_hook(lambda g: g * math.nan if self.run.n_iter == self.at else g)

    def after_fit(self):
        self._handle.remove()


def check_halt(make):
    """HaltOnNaN names a planted NaN's step and parameter, and the weights are those from before it."""
    learn, run = make([HaltOnNaN, functools.partial(SpoilsGradient, 5)])
    run.fit(1, learn)
    report = run.halt_on_nan.report
    found = report and (report.step, report.phase, report.where)
    if found != (5, "backward", SpoilsGradient.name_of):
        raise SystemExit(f"HaltOnNaN found {found} where NaN was planted in step 5: nothing was timed")
    if not all(t.isfinite().all() for t in learn.model.state_dict().values()):
        raise SystemExit("HaltOnNaN left a model that is not finite: nothing was timed")


class Watches(Callback):
    """Parameters before and after step `at`, gradients and the first module's output in it, in double precision."""

    _order = 99

    def __init__(self, at):
        self.at = at

    def begin_fit(self):
        self._handle = self.run.model[0].register_forward_hook(self._look)

    def _look(self, module, inp, out):
        if self.run.n_iter == self.at:
            self.out = out.detach().double()

    def after_backward(self):
        if self.run.n_iter == self.at:
            self.before = [p.detach().double() for p in self.run.model.parameters()]

    def after_step(self):
        if self.run.n_iter == self.at:
            self.params = [p.detach().double() for p in self.run.model.parameters()]
            self.grads = [p.grad.double() for p in self.run.model.parameters()]

    def after_fit(self):
        self._handle.remove()


def _refuse(what, found, expected):
    expected = torch.tensor([float(v) for v in expected], dtype=torch.float64)
    if not torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-7):
        raise SystemExit(f"{what} is wrong: nothing was timed")


def check_magnitudes(make):
    """Its numbers are those of the parameters, computed in double precision."""
    everything = functools.partial(ParamMagnitudes, stats=("max", "rms", "update"), grads=True)
    learn, run = make([everything, functools.partial(Watches, 7)])
    run.fit(1, learn)
    seen, values = run.watches, run.param_magnitudes.values

    def rms(t):
        return t.square().mean().sqrt()

    _refuse("max", values["max"][7], [p.abs().max() for p in seen.params])
    _refuse("rms", values["rms"][7], [rms(p) for p in seen.params])
    _refuse("grad_rms", values["grad_rms"][7], [rms(g) for g in seen.grads])
    _refuse("grad_max", values["grad_max"][7], [g.abs().max() for g in seen.grads])
    changed = [rms(b - a) / rms(a) for a, b in zip(seen.before, seen.params, strict=True)]
    grown_from_nothing = torch.tensor([not a.any() for a in seen.before])
    update = values["update"][7].masked_fill(grown_from_nothing, 0)
    if not torch.allclose(update.double(), torch.tensor(changed).double().nan_to_num(posinf=0), rtol=1e-2):
        raise SystemExit("update is wrong: nothing was timed")


def check_activations(make):
    """Its numbers are those of the first module's output, computed in double precision."""
    learn, run = make([functools.partial(ActivationStats, every=1), functools.partial(Watches, 7)])
    run.fit(1, learn)
    stats, out = run.activation_stats, run.watches.out
    near = out.abs() < 0.01
    found = torch.stack([stats.means[7, 0], stats.stds[7, 0], stats.near_zero[7, 0], stats.dead[7, 0]])
    expected = [out.mean(), out.std(correction=0), near.double().mean(), near.all(3).all(2).all(0).double().mean()]
    if not torch.allclose(found.double(), torch.tensor([float(v) for v in expected]).double(), atol=1e-5):
        raise SystemExit("ActivationStats is wrong: nothing was timed")
    if (stats.hists[7, 0] - out.float().histc(40, -5, 5).cpu()).abs().sum() > 1e-3 * out.numel():
        raise SystemExit("the histogram is wrong: nothing was timed")


def no_check(make):
    """Nothing to find: that it trains as without is checked for each case."""


# name: (callbacks, check, target for the added share on the CPU at batch 32, on CUDA at batch 512; None: no target)
CASES = {
    "plain again": ([], no_check, None, None),
    "HaltOnNaN()": ([HaltOnNaN], check_halt, 0.08, None),
    "HaltOnNaN(every=10)": ([functools.partial(HaltOnNaN, every=10)], no_check, None, None),
    "ParamMagnitudes()": ([ParamMagnitudes], check_magnitudes, 0.05, 0.03),
    "ParamMagnitudes + update": (
        [functools.partial(ParamMagnitudes, stats=("max", "rms", "update"))],
        no_check,
        None,
        None,
    ),
    "ParamMagnitudes(grads)": ([functools.partial(ParamMagnitudes, grads=True)], no_check, None, None),
    "ParamMagnitudes(every=10)": ([functools.partial(ParamMagnitudes, every=10)], no_check, None, None),
    "ActivationStats()": ([ActivationStats], check_activations, 0.15, None),
    "ActivationStats(hist=False)": ([functools.partial(ActivationStats, hist=False)], no_check, None, None),
    "ActivationStats(every=1)": ([functools.partial(ActivationStats, every=1)], no_check, None, None),
}


def maker(bs, steps, device):
    torch.manual_seed(0)
    batches = [
        (torch.randn(bs, 1, 28, 28, device=device), torch.randint(0, 10, (bs,), device=device)) for _ in range(steps)
    ]
    data = SimpleNamespace(c=10, c_in=1, train_dl=batches, valid_dl=None)

    def make(cbs):
        torch.manual_seed(1)
        learn, run = get_learn_run(NFS, data, 0.01, conv_rbn, cbs=list(cbs))
        learn.model.to(device)
        return learn, run

    return make


def check(cases, make):
    plain, run = make([])
    run.fit(1, plain)
    for name, (cbs, find, *_) in cases.items():
        find(make)
        learn, run = make(cbs)
        run.fit(1, learn)
        for p, q in zip(plain.model.parameters(), learn.model.parameters(), strict=True):
            if not torch.equal(p, q):
                raise SystemExit(f"a fit with {name} does not end as one without: nothing was timed")


def measure(cases, make, rounds, steps, device):
    """Seconds a step of each round, for "plain" and each case."""
    fits = {"plain": make([]), **{name: make(cbs) for name, (cbs, *_) in cases.items()}}
    times = {name: [] for name in fits}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for turn in range(rounds + 2):
        for name, (learn, run) in fits.items():
            start = clock()
            run.fit(1, learn)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn > 1:  # the first ones warm up
                times[name].append((clock() - start) / steps)
    return times


def report(times, cases, bs, device):
    rows = []
    for name, values in times.items():
        ratio = statistics.median(v / p for v, p in zip(values, times["plain"], strict=True))
        target = cases[name][2 if device.type == "cpu" else 3] if name in cases else None
        timed = bs == (32 if device.type == "cpu" else 512)
        rows.append(
            {
                "callback": name,
                "batch": bs,
                "us_per_step": round(statistics.median(values) * 1e6, 1),
                "ratio": round(ratio, 4),
                "target": 1 + target if target and timed else "",
                "met": ("yes" if ratio <= 1 + target else "NO") if target and timed else "",
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--resume", action="store_true", help="leave out the batch sizes that --csv has, keep its rows")
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--bs", type=int, nargs="+", help="batch sizes (default 2 32; on CUDA 32 512)")
    parser.add_argument("--rounds", type=int, default=15, help="fits of each case that are timed (default 15)")
    parser.add_argument("--steps", type=int, default=200, help="training steps of a fit (default 200)")
    parser.add_argument("--device", type=device_name, default="cpu")
    args = parser.parse_args()

    torch.set_num_threads(1)
    cases = {name: case for name, case in CASES.items() if args.case in name or name == "plain again"}
    if len(cases) == 1:
        sys.exit(f"--case must be part of one of: {', '.join(CASES)}; got {args.case!r}")
    args.device = torch.device(args.device)
    about = machine(args.device)
    if args.csv and not args.resume:
        args.csv.unlink(missing_ok=True)
    known = {int(row["batch"]) for row in rows_of(args.csv)}
    print(in_words(about))
    print(f"{'callback':<28}{'batch':>6}{'µs a step':>11}{'ratio':>8}{'target':>8}  met")
    for bs in args.bs or ([2, 32] if args.device.type == "cpu" else [32, 512]):
        if bs in known:
            continue
        make = maker(bs, args.steps, args.device)
        check(cases, make)
        rows = report(measure(cases, make, args.rounds, args.steps, args.device), cases, bs, args.device)
        for row in rows:
            print("{callback:<28}{batch:>6}{us_per_step:>11}{ratio:>8}{target:>8}  {met}".format(**row), flush=True)
        if args.csv:
            append(args.csv, rows, about)


if __name__ == "__main__":
    main()
