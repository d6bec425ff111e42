"""What the frameworks cost, side by side: fastrbn, fastai, Lightning, Ignite, skorch, and plain PyTorch.

    python benchmarks/peers.py --install            # once: an environment for each peer in benchmarks/.envs
    python benchmarks/peers.py [--csv results/peers_cpu.csv] [--rounds 9] [--epochs 3] [--steps 1000]
                               [--only fastai ignite]

- A step of a tiny model (nn.Linear(10, 10), batches of 8 that are ready, SGD), `peer_scripts/steps.py`: what is added
  to a plain loop in the same process, the framework bare, and full: loss and rate of each step kept, average loss and
  accuracy of the training epoch, a progress bar.
- One epoch of MNIST at batch 64 with validation, the course's net with nn.BatchNorm2d, the tensors ready:
  `peer_scripts/mnist_*.py`, whose lines of code are counted. Setting up is part of it; importing is not.
- The batches of that epoch alone: fastrbn's loader, and torch's DataLoader on tensors and on torchvision's MNIST.

Every framework runs in a process of its own with a terminal of its own, one thread; the processes take turns, so that a
machine that slows down slows all; medians. A training that does not end with the plain loop's parameters, bit for bit,
is not timed, nor is an epoch below 95 %.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import pty
import statistics
import subprocess
import sys
import threading
import tokenize
from pathlib import Path

import torch
from about import in_words, machine, write_csv

from fastrbn.data import data_root

HERE = Path(__file__).resolve().parent
SCRIPTS, ENVS = HERE / "peer_scripts", HERE / ".envs"
PEERS = {"fastai": ["fastai"], "lightning": ["lightning"], "ignite": ["pytorch-ignite", "tqdm"], "skorch": ["skorch"]}
NAMES = ("raw", "fastrbn", *PEERS)
LEAST_ACCURACY = 0.95


def python_of(name) -> Path:
    return ENVS / name / "bin" / "python" if name in PEERS else Path(sys.executable)


def install(name):
    """An environment for one peer, with the newest torch that pip finds for it."""
    subprocess.run([sys.executable, "-m", "venv", ENVS / name], check=True)
    packages = ["torch", "torchvision", *PEERS[name]]
    subprocess.run([python_of(name), "-m", "pip", "install", "--quiet", *packages], check=True)


class Worker:
    """A process that runs one framework, with a terminal whose output nobody reads."""

    def __init__(self, name, root, steps):
        terminal, theirs = pty.openpty()
        answers, into = os.pipe()
        self.process = subprocess.Popen(
            [python_of(name), SCRIPTS / "worker.py", name, root, str(steps)],
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=theirs,
            pass_fds=[into],
            env={**os.environ, "PEERS_ANSWERS": str(into), "OMP_NUM_THREADS": "1"},
            text=True,
        )
        os.close(theirs)
        os.close(into)
        self.answers = os.fdopen(answers)
        self.printed = b""
        self.reader = threading.Thread(target=self._read, args=(terminal,), daemon=True)
        self.reader.start()

    def _read(self, terminal):
        try:
            while piece := os.read(terminal, 65536):
                self.printed = (self.printed + piece)[-2000:]
        except OSError:  # how a terminal says that the other side is gone
            os.close(terminal)

    def ask(self, question) -> dict:
        """The answer; RuntimeError with the worker's own words when there is none."""
        try:
            print(question, file=self.process.stdin, flush=True)
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.reader.join(5)  # it has read all when the other side is gone
            raise RuntimeError(f"the process ended:\n{self.printed.decode(errors='replace').strip()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self):
        self.process.stdin.close()  # nothing more is asked
        self.process.wait()
        self.answers.close()


def start(names, root, steps):
    """(workers, what each said about itself): those that are there and train as the plain loop does."""
    workers, abouts = {}, {}
    for name in names:
        if not python_of(name).exists():
            print(f"{name}: skipped, not installed; `python benchmarks/peers.py --install --only {name}`")
            continue
        worker = Worker(name, root, steps)
        try:
            about = worker.ask("about")
            different = [mode for mode, same in about["same"].items() if not same]
            why = f"not timed: {', '.join(different)} ends with other parameters than a plain loop" if different else ""
        except RuntimeError as error:
            why = f"skipped: {error}"
        if why:
            print(f"{name}: {why}")
            worker.close()
        else:
            workers[name], abouts[name] = worker, about
    return workers, abouts


def measure(workers, rounds, epochs):
    """Answers of each worker, asked in turns: (to `steps`, to `epoch`). One that fails is named and left out."""
    answers = {"steps": {name: [] for name in workers}, "epoch": {name: [] for name in workers}}
    for question in ["steps"] * (rounds + 1) + ["epoch"] * epochs:
        for name in list(workers):
            try:
                answers[question][name].append(workers[name].ask(question))
            except RuntimeError as error:
                print(f"{name}: left out: {error}")
                workers.pop(name).close()
    # the first round warms up
    return {n: answers["steps"][n][1:] for n in workers}, {n: answers["epoch"][n] for n in workers}


def added(answers, mode):
    """Median of what a step takes beyond that of the plain loop in the same round, microseconds."""
    return statistics.median(a[mode] - a["raw"] for a in answers)


def lines_of_code(path) -> int:
    """Lines with code on them: no blank ones, comments, docstrings or imports (one name a line or `*` is taste)."""
    passed_over = {
        line
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for line in range(node.lineno, node.end_lineno + 1)
    }
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with open(path, encoding="utf-8") as f:
        tokens = [t for t in tokenize.generate_tokens(f.readline) if t.type not in empty]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - passed_over)


def report(steps, whole, abouts):
    rows = []
    for name, answers in steps.items():
        accuracy = min((e["accuracy"] for e in whole[name]), default=None)
        if accuracy is not None and accuracy < LEAST_ACCURACY:
            sys.exit(f"{name} trained to {accuracy:.1%} on MNIST, others to more than {LEAST_ACCURACY:.0%}")
        rows.append(
            {
                "framework": name,
                "version": abouts[name]["version"],
                "plain_us": round(statistics.median(a["raw"] for a in answers), 1),
                "bare_added_us": "" if name == "raw" else round(added(answers, "bare"), 1),
                "full_added_us": "" if name == "raw" else round(added(answers, "full"), 1),
                "epoch_s": round(statistics.median(e["seconds"] for e in whole[name]), 2) if whole[name] else "",
                "lowest_accuracy": accuracy if accuracy is None else round(accuracy, 4),
                "lines": lines_of_code(SCRIPTS / f"mnist_{name}.py"),
                "peer_torch": abouts[name]["torch"],
            }
        )
    return rows


def table(rows):
    head = {
        "framework": "framework",
        "version": "version",
        "bare_added_us": "bare, µs a step",
        "full_added_us": "full, µs a step",
        "epoch_s": "epoch of MNIST, s",
        "lines": "lines of code",
    }
    print("| " + " | ".join(head.values()) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in head) + " |")


def measure_loaders(worker, times):
    """Median seconds for the batches of an epoch, a row for each loader, printed."""
    answers = [worker.ask("loaders") for _ in range(times)]
    rows = [{"loader": name, "epoch_s": round(statistics.median(a[name] for a in answers), 3)} for name in answers[0]]
    print("\n| batches of an epoch | s |\n| --- | --- |")
    for row in rows:
        print(f"| {row['loader']} | {row['epoch_s']} |")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the peers' environments, several GB each")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these frameworks (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of steps (default 9)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of a round's epoch (default 1000)")
    parser.add_argument("--epochs", type=int, default=3, help="times that each trains MNIST (default 3; 0: not at all)")
    parser.add_argument("--csv", type=Path, help="write the table here; the loaders' beside it")
    args = parser.parse_args()

    if args.install:
        for name in PEERS:
            if name in args.only and not python_of(name).exists():
                install(name)
        return
    torch.set_num_threads(1)
    about = machine()
    print(in_words(about))
    workers, abouts = start(args.only, data_root(), args.steps)
    if not workers:
        sys.exit("nothing to measure")
    rows = report(*measure(workers, args.rounds, args.epochs), abouts)
    table(rows)
    if args.csv:
        write_csv(args.csv, rows, about)
    if args.epochs and "fastrbn" in workers:
        loaders = measure_loaders(workers["fastrbn"], args.epochs)
        if args.csv:
            write_csv(args.csv.with_stem(f"{args.csv.stem}_loaders"), loaders, about)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
