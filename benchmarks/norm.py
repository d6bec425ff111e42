"""What a training step of the layer costs: running batch norm beside nn.BatchNorm, GroupNorm and the thread's form.

    python benchmarks/norm.py                        # the device there is, all shapes, float32
    python benchmarks/norm.py --dtype bfloat16 --shapes 64x64x32x32 --compile --csv norm.csv --plot norm.png
    python benchmarks/norm.py --dtype float32 bfloat16 --capture --csv norm.csv --resume     # goes on with what is left

Answers come first: every form of ours must equal the float64 reference in output, gradients and state over three steps,
or is named and not timed, and the exit status is 1. Then the contenders take turns within each round, so that a machine
that slows down slows all of them; reported is the median over rounds of the time, and of the ratio to nn.BatchNorm in
the same round. `passes` is the time of forward and backward in reads or writes of the activations, at the speed of a
copy measured beside it (`copy_gb_s` counts what it reads and writes): what a form that only moves memory would need.
Backward is the difference of the two times measured. A case (shape, format, dtype) goes to the CSV once it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
import warnings
from itertools import product
from pathlib import Path

import torch
from about import append, device_name, in_words, machine, rows_of
from torch import nn

from fastrbn import plots
from fastrbn.norm import RECIPES, RunningBatchNorm
from fastrbn.plots import figure

SHAPES = ["2x8x14x14", "32x64x14x14", "64x64x32x32", "128x64x56x56", "128x256x14x14", "4096x512", "8x32x8x28x28"]
CUDA_SHAPES = [*SHAPES, "512x64x32x32"]
OURS = {"default": RECIPES["default"]}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
COLUMNS = [
    "shape",
    "format",
    "dtype",
    "layer",
    "forward_us",
    "backward_us",
    "both_us",
    "ratio",
    "passes",
    "peak_mb",
    "copy_gb_s",
]


class ThreadForm(nn.Module):
    """The thread's arithmetic in eager PyTorch: sums, squares and count, each moved towards the batch's."""

    def __init__(self, nf, rate=0.1):
        super().__init__()
        self.rate = rate
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        for name in ("sums", "squares"):
            self.register_buffer(name, torch.zeros(nf))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        dims, shape = (0, *range(2, x.dim())), (1, -1, *(1,) * (x.dim() - 2))
        for name, new in (("sums", x.sum(dims)), ("squares", (x * x).sum(dims))):
            setattr(self, name, getattr(self, name).detach().lerp(new.float(), self.rate))
        self.count = self.count.lerp(self.count.new_tensor(x.numel() / x.shape[1]), self.rate)
        mean = self.sums / self.count
        factor = self.weight / (self.squares / self.count - mean * mean + 1e-5).sqrt()
        return (x * factor.view(shape) + (self.bias - mean * factor).view(shape)).to(x.dtype)


def batchnorm(x):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    return kind(x.shape[1])


def backends_of(x):
    """Backends that are timed beside "auto"."""
    if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return ("reference", "fused", "triton")
    return ()


def contenders(x, compiled):
    """Names to (layer, context) pairs, nn.BatchNorm first."""
    nf, nothing = x.shape[1], contextlib.nullcontext
    made = {"nn.BatchNorm": (batchnorm(x), nothing)}
    if x.is_cuda:
        made["nn.BatchNorm, no cuDNN"] = (batchnorm(x), lambda: torch.backends.cudnn.flags(enabled=False))
    made["GroupNorm"] = (nn.GroupNorm(8, nf), nothing)
    made["thread's form"] = (ThreadForm(nf), nothing)
    for name, recipe in OURS.items():
        made[name] = (RunningBatchNorm(nf, recipe=recipe), nothing)
        for backend in backends_of(x):
            made[f"{name}, {backend}"] = (RunningBatchNorm(nf, recipe=recipe, backend=backend), nothing)
    if compiled:
        torch.compiler.reset()  # the shapes before count towards the limit of recompilations
        for name in ("nn.BatchNorm", *OURS):
            layer = batchnorm(x) if name not in OURS else RunningBatchNorm(nf, recipe=OURS[name])
            made[f"{name}, compiled"] = (torch.compile(layer.to(x.device), fullgraph=True), nothing)
    return {name: (layer.to(x.device), context) for name, (layer, context) in made.items()}


def check(name, recipe, backend, x, dy):
    """Say how three steps differ from the reference in float64 in output, gradients or state, if they do."""
    torch.manual_seed(0)
    ours = RunningBatchNorm(x.shape[1], recipe=recipe, backend=backend).to(x.device)
    oracle = RunningBatchNorm(x.shape[1], recipe=recipe, backend="reference", dtype=torch.float64).to(x.device)
    for p, q in zip(ours.parameters(), oracle.parameters(), strict=True):
        p.data.normal_()
        q.data.copy_(p.data)
    for i in range(3):
        found = []
        for layer in (ours, oracle):
            z = (x * (1 + i) + i).to(torch.float64 if layer is oracle else x.dtype).requires_grad_()
            layer.zero_grad()
            y = layer(z)
            y.backward(dy.to(y.dtype))
            found.append([y, z.grad, *(p.grad for p in layer.parameters()), *(b for b in layer.buffers())])
        for got, want in zip(*found, strict=True):
            error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)
            if not error < TOLERANCE[x.dtype]:
                return f"wrong answer, error {error:.2g}"
    return None


def runs(layer, context, x, dy):
    """Forward alone, and forward and backward, as functions without arguments."""
    params = [x, *layer.parameters()]

    def forward():
        with context():
            layer(x)

    def both():
        with context():
            layer(x).backward(dy)
        for p in params:
            p.grad = None

    return {"forward": forward, "both": both}


def captured(run):
    """`run` as one CUDA graph."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def clock(run, repeats, cuda):
    """Seconds a call, after one that is not counted: it finds memory and caches as another contender left them."""
    run()
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats / 1e3
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def measure(todo, rounds, block, cuda):
    """Times of every function of `todo` in each round, the functions in turn, `block` seconds for each."""
    repeats = {}
    for key, run in todo.items():
        for _ in range(3):
            run()
        repeats[key] = max(1, round(block / max(clock(run, 3, cuda), 1e-7)))
    return [{key: clock(run, repeats[key], cuda) for key, run in todo.items()} for _ in range(rounds)]


def peak_memory(run, cuda):
    if not cuda:
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def name_of(memory_format):
    return "contiguous" if memory_format is torch.contiguous_format else "channels_last"


def bench(shape, memory_format, dtype, device, options):
    """The rows of one shape, format and dtype, and what failed, by contender."""
    size, cuda = tuple(map(int, shape.split("x"))), device.type == "cuda"
    x, dy = (torch.randn(size, device=device).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    failed = {}

    def attempt(name, function, *args):
        try:
            return function(*args)
        except Exception as e:  # noqa: BLE001 - what a backend, the compiler or a capture cannot do must not stop the rest
            failed[name] = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"

    for name, recipe in OURS.items():
        for backend in ("auto", *backends_of(x)):
            full = name if backend == "auto" else f"{name}, {backend}"
            if wrong := attempt(full, check, full, recipe, backend, x, dy):
                failed[full] = wrong
    x.requires_grad_()
    made, todo = contenders(x, options.compile), {}
    for name, (layer, context) in made.items():
        if name in failed or (name != "nn.BatchNorm" and not any(part in name for part in options.layers or [""])):
            continue
        forms = {name: runs(layer, context, x, dy)}
        if attempt(name, lambda: [run() for run in forms[name].values()]) is None:  # compiles
            continue
        if options.capture and cuda and name.startswith(("nn.BatchNorm", *OURS)) and "compiled" not in name:
            graph = f"{name}, captured"
            found = attempt(graph, lambda: {what: captured(run) for what, run in forms[name].items()})
            forms |= {graph: found} if found else {}
        for form, calls in forms.items():
            todo |= {(form, what): run for what, run in calls.items()}
    names = list(dict.fromkeys(name for name, _ in todo))
    if "nn.BatchNorm" not in names:
        return [], failed
    source = x.detach()
    out = torch.empty_like(source)
    todo["copy", "both"] = lambda: out.copy_(source)
    found = measure(todo, options.rounds, options.block, cuda)
    speed = 2 * source.nbytes / statistics.median(r["copy", "both"] for r in found) / 1e9
    rows = []
    for name in names:
        forward, both = (statistics.median(r[name, what] for r in found) for what in ("forward", "both"))
        ratio = statistics.median(r[name, "both"] / r["nn.BatchNorm", "both"] for r in found)
        passes = statistics.median(2 * r[name, "both"] / r["copy", "both"] for r in found)
        times = [f"{1e6 * t:.1f}" for t in (forward, both - forward, both)]
        memory = peak_memory(todo[name, "both"], cuda)
        case = [shape, name_of(memory_format), str(dtype).removeprefix("torch."), name]
        rows.append([*case, *times, f"{ratio:.2f}", f"{passes:.1f}", memory, f"{speed:.0f}"])
    return rows, failed


def plot(rows, path, machine):
    """Ratios to nn.BatchNorm, a group of bars a shape and format, each with its number."""
    cases = list(dict.fromkeys((r["shape"], r["format"]) for r in rows))
    names = [n for n in dict.fromkeys(r["layer"] for r in rows) if n not in ("nn.BatchNorm", "thread's form")]
    top = 1.05 * max(float(r["ratio"]) for r in rows if r["layer"] in OURS)
    fig = plots.new_figure(max(7, 1.15 * len(cases)), 4)
    ax = figure.axes(fig, title=machine, ylabel="forward + backward, nn.BatchNorm = 1")
    bars = []
    for i, name in enumerate(names):
        at = [c + (i + 1) / (len(names) + 1) for c in range(len(cases))]
        by_case = {(r["shape"], r["format"]): float(r["ratio"]) for r in rows if r["layer"] == name}
        ratios = [by_case.get(c, 0) for c in cases]
        color = figure.COLORS[i % len(figure.COLORS)]
        bars.append(ax.bar(at, ratios, width=0.9 / (len(names) + 1), color=color))
        for x, ratio in zip(at, ratios):
            number = ax.text(x, min(ratio, top), f"{ratio:.2f}", fontsize=figure.SMALL, ha="center", va="bottom")
            number.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    ax.axhline(1, color="black", lw=0.8, zorder=0)
    ax.set_xticks([c + 0.5 for c in range(len(cases))], [f"{s}\n{f}" for s, f in cases])
    ax.grid(False)
    ax.set(ylim=(0, top), xlim=(0, len(cases)))
    figure.outside_legend(fig, bars, names, "layer")
    fig.savefig(path, dpi=figure.DPI)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=dtypes)
    parser.add_argument("--shapes", nargs="+", help="such as 64x64x32x32 (default: all)")
    parser.add_argument("--formats", nargs="+", default=["contiguous", "channels_last"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=float, default=0.05, help="seconds a contender gets in a round")
    parser.add_argument("--compile", action="store_true", help="torch.compile variants too")
    parser.add_argument("--capture", action="store_true", help="on CUDA: each as one CUDA graph too")
    parser.add_argument("--layers", nargs="+", help="beside nn.BatchNorm only those whose name has one of these in it")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the rows of --csv, measure what is not there")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    device, status = torch.device(options.device), 0
    about = machine(device)
    line = "{:>14} {:>13} {:>8} {:>32}" + " {:>11}" * 3 + " {:>6} {:>7} {:>8} {:>9}"
    print(in_words(about))
    print(line.format(*COLUMNS))
    rows = rows_of(options.csv) if options.resume else []
    known = {(r["shape"], r["format"], r["dtype"]) for r in rows}
    if options.csv and not options.resume:
        options.csv.unlink(missing_ok=True)
    for shape in options.shapes or (CUDA_SHAPES if device.type == "cuda" else SHAPES):
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(shape.count("x") + 1)
        formats = [torch.contiguous_format] if "contiguous" in options.formats else []
        formats += [last] if last and "channels_last" in options.formats else []
        for fmt, dtype in product(formats, options.dtype):
            if (shape, name_of(fmt), dtype) in known:
                continue
            found, failed = bench(shape, fmt, getattr(torch, dtype), device, options)
            for row in found:
                print(line.format(*row), flush=True)
            for name, why in failed.items():
                status = 1
                print(f"not timed: {name} on {shape}, {name_of(fmt)}, {dtype}: {why}", file=sys.stderr, flush=True)
            found = [dict(zip(COLUMNS, row, strict=True)) for row in found]
            rows += found
            if options.csv:
                append(options.csv, found, about)
    if options.plot:
        plot(rows, options.plot, in_words(about))
    return status


if __name__ == "__main__":
    sys.exit(main())
