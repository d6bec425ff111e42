"""CIFAR-10 with resnet9 and three norms: how long to which accuracy, and what does the step of a small batch cost?

    python benchmarks/cifar.py                   # on CUDA: the steps, then the trainings, then tables and a picture
    python benchmarks/cifar.py --minutes 9       # as much as goes; the same command goes on with what is left
    python benchmarks/cifar.py --out runs --device cpu --limit 256 --width 8 --epochs 1 --bs 64   # tries the script out

Steps: forward, backward and SGD under bfloat16, plain, compiled, compiled with "reduce-overhead", and recorded as CUDA
graphs (as the callback CUDAGraph does), in turns. Each way must reach the losses of the plain one on the same batch, or
is not timed.
Trainings: `fastrbn train cifar10 --model resnet9` with the same recipe for every norm, at several lengths, each a whole
one cycle. The length where the curve flattens is the shortest whose accuracy is within half a point of the longest's.
A row of either goes to OUT/cifar_steps.csv or OUT/cifar.csv as soon as it is measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from about import append, device_name, in_words, machine, rows_of

from fastrbn import image_databunch, load_dataset, plots, resnet9
from fastrbn.callbacks.step.recording import RecordedStep, Recorder, Watched
from fastrbn.cli import main as fastrbn
from fastrbn.plots import figure

NORMS = ("batch", "group", "running")
WAYS = ("plain", "compiled", "reduce-overhead", "graph")
LENGTHS = {512: [6, 12, 24], 32: [6, 12], 8: [4]}  # epochs: the smaller the batch, the longer each
RECIPE = "--sched 1cycle --momentum 0.9 --weight-decay 5e-4 --label-smoothing 0.1 --cutout 8 --amp bf16 --channels-last"
FLAT = 0.5  # points of accuracy
CHECKED, LR = 8, 0.001  # steps that must agree; small, so that they do
RESULTS = Path(__file__).parent / "results"
STEPS, TRAININGS = "cifar_steps.csv", "cifar.csv"
SKIP = {"steps": STEPS, "trainings": TRAININGS}


# steps


class Step:
    """A training step on one batch, in one way; calling it gives the loss, on the device."""

    def __init__(self, way, model, xb, yb):
        self.batch, self.model = (xb, yb), model
        self.opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True)
        self.call = (
            model if way in ("plain", "graph") else torch.compile(model, mode=None if way == "compiled" else way)
        )
        self.marks, self.recorded = way == "reduce-overhead", None
        if way == "graph":
            self.recorded = RecordedStep(self.evaluate, self.batch, Watched([model]), Recorder(xb.device))

    def evaluate(self, xb, yb):
        with torch.autocast(xb.device.type, dtype=torch.bfloat16):
            pred = self.call(xb).float()
            return pred, F.cross_entropy(pred, yb)

    def __call__(self):
        if self.marks:
            torch.compiler.cudagraph_mark_step_begin()
        if self.recorded is None:
            _, loss = self.evaluate(*self.batch)
            loss.backward()
            self.opt.step()
        else:
            _, loss = self.recorded.forward(self.batch)
            self.recorded.backward()
            if not self.recorded.update(self.opt):  # as for the first one
                self.opt.step()
        self.opt.zero_grad()
        return loss.detach()


def make_step(way, model, xb, yb):
    """`(losses of CHECKED steps, function of one more)`."""
    step = Step(way, copy.deepcopy(model), xb, yb)
    return torch.stack([step().clone() for _ in range(CHECKED)]).float().cpu(), step


def clock(run, steps, cuda):
    sync = torch.cuda.synchronize if cuda else lambda: None
    sync()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    sync()
    return (time.perf_counter() - began) / steps


def time_steps(norm, bs, missing, images, args):
    """A row for each missing way: milliseconds a step, or why there are none."""
    device = torch.device(args.device)
    data = image_databunch(images, bs, device=device, cutout=8, channels_last=True)
    xb, yb = next(iter(data.train_dl))
    torch.manual_seed(0)
    model = resnet9(norm=norm, width=args.width).to(device, memory_format=torch.channels_last)
    ways = list(dict.fromkeys(("plain", *missing)))  # plain tells the others' losses
    expected, steps, notes = None, {}, {}
    for way in ways:
        torch.compiler.reset()
        try:
            losses, run = make_step(way, model, xb, yb)
        except Exception as e:  # noqa: BLE001 - whatever the compiler or the capture cannot do is a result
            notes[way] = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
            print(f"  {norm} {bs} {way}: {notes[way]}", file=sys.stderr)
            continue
        expected = losses if expected is None else expected
        if not torch.allclose(losses, expected, rtol=0.05, atol=0.02):
            notes[way] = f"refused: losses {losses.tolist()} where the plain step has {expected.tolist()}"
            print(f"  {norm} {bs} {way}: {notes[way]}", file=sys.stderr)
        else:
            steps[way] = run
    times = {way: [] for way in steps}
    for _ in range(args.rounds):
        for way, run in steps.items():
            times[way].append(clock(run, args.steps, device.type == "cuda"))
    return [
        {
            "norm": norm,
            "bs": bs,
            "width": args.width,
            "way": way,
            "ms": round(1000 * statistics.median(times[way]), 4) if way in times else "",
            "note": notes.get(way, ""),
        }
        for way in missing
    ]


# trainings


def train(norm, bs, epochs, seed, args):
    """The row, alone in a list, of one run of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = (
            f"train cifar10 --model resnet9 --norm {norm} --bs {bs} --epochs {epochs} --seed {seed} {RECIPE}".split()
        )
        command += ["--width", str(args.width), "--device", args.device, "--out", f"{folder}/run"]
        how = ["--cb", "CUDAGraph"] if args.compile == "graph" else ["--compile", args.compile]
        command += how if args.compile else []
        command += ["--limit", str(args.limit)] if args.limit else []
        command += ["--data-dir", str(args.data_dir)] if args.data_dir else []
        torch.compiler.reset()
        status = fastrbn(command)
        if status == 130:
            raise KeyboardInterrupt
        if not Path(f"{folder}/run/config.json").is_file():
            raise SystemExit(f"fastrbn {' '.join(command)} ended with {status} and nothing trained")
        config, history = (
            json.loads(Path(f"{folder}/run/config.json").read_text()),
            rows_of(Path(f"{folder}/run/history.csv")),
        )
    accuracy = [float(row["valid_accuracy"]) * 100 for row in history if row["valid_accuracy"]]
    seconds = [float(row["time"]) for row in history if row["time"]]
    row = {
        "data": config["data"]["name"],
        "norm": norm,
        "bs": bs,
        "epochs": epochs,
        "seed": seed,
        "width": args.width,
        "limit": args.limit or "",
        "compile": args.compile,
        "lr": round(config["lr"], 6),
        "status": status,
        "accuracy": round(accuracy[-1], 2) if accuracy else "",
        "seconds": round(sum(seconds), 2),
        "epoch_seconds": round(statistics.median(seconds[1:] or seconds), 3) if seconds else "",
        "curve": " ".join(f"{a:.2f}" for a in accuracy),
    }
    return [row]


# what came of it


def step_table(rows):
    lines = [f"| norm | batch | {' | '.join(WAYS)} |", f"|{' --- |' * (2 + len(WAYS))}"]
    for norm, bs in dict.fromkeys((r["norm"], r["bs"]) for r in rows):
        ms = {r["way"]: r["ms"] for r in rows if (r["norm"], r["bs"]) == (norm, bs)}
        lines.append(f"| {norm} | {bs} | {' | '.join(str(ms.get(way) or '–') for way in WAYS)} |")
    return "\n".join(lines)


def training_table(rows):
    columns = ("norm", "bs", "epochs", "accuracy", "seconds", "epoch_seconds")
    lines = ["| norm | batch | epochs | accuracy, % | seconds | of an epoch |", f"|{' --- |' * len(columns)}"]
    for r in sorted(rows, key=lambda r: (-int(r["bs"]), r["norm"], int(r["epochs"]))):
        lines.append(f"| {' | '.join(str(r[k]) for k in columns)} |")
    return "\n".join(lines)


def flat(rows):
    """A sentence a norm and batch size: the shortest length within FLAT points of the longest."""
    for norm, bs in dict.fromkeys((r["norm"], r["bs"]) for r in rows):
        lengths = sorted(
            (int(r["epochs"]), float(r["accuracy"]), float(r["seconds"]))
            for r in rows
            if (r["norm"], r["bs"]) == (norm, bs) and r["accuracy"] != ""
        )
        if len(lengths) > 1:
            epochs, accuracy, seconds = next(row for row in lengths if row[1] >= lengths[-1][1] - FLAT)
            yield f"{norm} at batch {bs} flattens at {epochs} epochs: {accuracy:.2f} % in {seconds:.0f} s"


def plot(rows, path, title):
    sizes = sorted({int(r["bs"]) for r in rows}, reverse=True)
    fig = plots.new_figure(4 * len(sizes) + 1.2, 3.4)
    grid = fig.add_gridspec(1, len(sizes))
    for column, bs in enumerate(sizes):
        xlabel = "seconds, without the first epoch's compiling"
        ax = figure.axes(fig, grid[0, column], f"batch {bs}", xlabel, "validation accuracy, %")
        for i, norm in enumerate(NORMS):
            for r in (r for r in rows if r["norm"] == norm and int(r["bs"]) == bs and r["curve"]):
                curve = [float(a) for a in str(r["curve"]).split()]
                at = [(k + 1) * float(r["epoch_seconds"]) for k in range(len(curve))]
                ax.plot(at, curve, **figure.line_style(i), lw=1, alpha=0.6)
                ax.plot(at[-1:], curve[-1:], "o", color=figure.COLORS[i], ms=4)
    lines = [fig.axes[0].plot([], [], **figure.line_style(i))[0] for i in range(len(NORMS))]
    figure.outside_legend(fig, lines, NORMS, "norm")
    fig.suptitle(title, fontsize=figure.SMALL)
    fig.savefig(path, dpi=figure.DPI)


def arguments():
    def numbers(text):
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_name, default="cuda")
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 is (default: $FASTRBN_DATA or a cache)")
    parser.add_argument("--norms", type=lambda text: text.split(","), default=NORMS)
    parser.add_argument("--bs", type=numbers, default=list(LENGTHS))
    parser.add_argument("--epochs", type=numbers, help="instead of a batch size's own lengths")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--ways", type=lambda text: text.split(","), default=WAYS)
    parser.add_argument(
        "--compile", default="reduce-overhead", help="of the trainings; graph: CUDAGraph instead; '' for none"
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--limit", type=int, help="train on so many images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="in a block")
    parser.add_argument("--skip", choices=SKIP, help="leave one half out")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def step_cells(args):
    """What is left of the steps: names, and functions that give rows."""
    known = {(r["norm"], int(r["bs"]), int(r["width"]), r["way"]) for r in rows_of(args.out / STEPS)}
    ways = [w for w in args.ways if args.device.startswith("cuda") or w in ("plain", "compiled")]
    todo = {
        (norm, bs): missing
        for bs in args.bs
        for norm in args.norms
        if (missing := [way for way in ways if (norm, bs, args.width, way) not in known])
    }
    images = load_dataset("cifar10", args.data_dir) if todo else None
    for (norm, bs), missing in todo.items():
        yield f"steps of {norm} at {bs}: {', '.join(missing)}", partial(time_steps, norm, bs, missing, images, args)


def training_cells(args):
    """What is left of the trainings, the short ones first."""
    keys = ("norm", "bs", "epochs", "seed", "width", "limit", "compile")
    known = {tuple(r[k] for k in keys) for r in rows_of(args.out / TRAININGS)}
    lengths = {bs: args.epochs or LENGTHS.get(bs, [6]) for bs in args.bs}
    for seed in args.seeds:
        for i in range(max(map(len, lengths.values()))):
            for bs, norm in product((bs for bs in args.bs if i < len(lengths[bs])), args.norms):
                key = (norm, bs, lengths[bs][i], seed, args.width, args.limit or "", args.compile)
                if tuple(map(str, key)) not in known:
                    yield f"{norm} at {bs}, {key[2]} epochs, seed {seed}", partial(train, *key[:4], args)


def report(args, about):
    """Tables and sentences, on the screen and in cifar.md; the picture."""
    steps, trainings = rows_of(args.out / STEPS), rows_of(args.out / TRAININGS)
    words = [f"CIFAR-10, resnet9, {in_words(about)}\n"]
    words += ["Milliseconds a step:\n", step_table(steps), ""] if steps else []
    words += ["Trainings:\n", training_table(trainings), "", *flat(trainings), ""] if trainings else []
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cifar.md").write_text("\n".join(words))
    print("\n".join(words))
    if trainings:
        plot(trainings, args.out / "cifar.png", in_words(about))


def main():
    args, began, left = arguments(), time.perf_counter(), 0
    about = machine(torch.device(args.device))
    parts = {STEPS: step_cells, TRAININGS: training_cells}
    todo = [(file, *cell) for file, cells in parts.items() if SKIP.get(args.skip) != file for cell in cells(args)]
    try:
        for file, name, measure in todo:
            if args.minutes and time.perf_counter() - began > 60 * args.minutes:
                left += 1
                continue
            print(f"== {name}", flush=True)
            append(args.out / file, measure(), about)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        report(args, about)
        return 130
    report(args, about)
    if left:
        print(f"{left} of {len(todo)} are left: the same command goes on", file=sys.stderr)
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
