"""What the command line takes: options, their rules and defaults. Imports no torch, so that `--help` comes at once."""

from __future__ import annotations

import argparse
import difflib
import math
from pathlib import Path

from fastrbn._version import __version__

DONE, ERROR, BAD_ARGUMENTS, HALTED, INTERRUPTED = 0, 1, 2, 3, 130

DATA_SETS = ("mnist", "fashion", "cifar10", "cifar100", "glyphs")
LAYERS = {"conv_rbn": "running", "conv_bn": "batch", "conv_gn": "group"}  # and the norm= of resnet9
MODELS = ("cnn", "resnet9")
MANY = 128  # batch size from which several CPU threads make the course's net faster
SCHEDULES = ("none", "lin", "cos", "1cycle")


class CliError(Exception):
    """Ends a command: one sentence for the user and the exit status."""

    def __init__(self, message: str, status: int = ERROR):
        super().__init__(message)
        self.status = status


def nearest(name: str, names) -> str:
    """` Did you mean 'x'?`, or nothing when no name resembles it."""
    names = list(names)
    by_lower = {n.lower(): n for n in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean '{by_lower[near[0]]}'?" if near else ""


def default_lr(bs: int) -> float:
    """2·bs/(bs + 32): 0.05 a sample while batches are small, never above 2. It passes through the rates measured to
    train the course net well with a linear schedule (0.4 at 8, 1.0 at 32) and near the others (0.1 at 2, 1.5 at 128)."""
    return 2 * bs / (bs + 32)


def one_of(*names: str):
    """An argparse type: one of `names`, otherwise an error with the nearest."""

    def check(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}; got '{text}'.{nearest(text, names)}")
        return text

    return check


def whole(least: int, most: int = 2**31 - 1):
    """An argparse type: a whole number from `least` to `most`."""

    def check(text):
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more; got '{text}'")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be a whole number, {most} at most; got '{text}'")
        return number

    return check


def rate(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0; got '{text}'")
    return number


def share(text: str) -> float:
    """An argparse type: a number from 0, below 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0, below 1; got '{text}'")
    return number


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    return _both()[0]


def _both() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole command line's parser, and that of `train` within it."""
    from .compare_options import add_compare

    top = argparse.ArgumentParser(
        prog="fastrbn",
        description="Train with running batch norm: batch norm for every batch size down to one.",
        epilog="exit status: 0 done, 1 error, 2 bad arguments, 3 halted on NaN or Inf, 130 interrupted",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"fastrbn {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = _add_train(commands)
    add_compare(commands)
    commands.add_parser(
        "callbacks",
        help="list what --cb takes: built-in callbacks and plug-ins",
        description="List the built-in callbacks and those of plug-ins (entry points of the group fastrbn.callbacks).",
    )
    return top, train


def given(argv) -> set[str]:
    """The names of the options of `train` that `argv` has, also those given their default."""
    top, train = _both()
    names, unset = vars(top.parse_args(argv)), []  # a list, which an option that is repeatable copies and extends
    train.set_defaults(**dict.fromkeys(names, unset))
    return {name for name, value in vars(top.parse_args(argv)).items() if value is not unset} - {"command"}


def options() -> dict[str, argparse.Action]:
    """The options of `train` by the names that their values have."""
    return {action.dest: action for action in _both()[1]._actions}


def _add_train(commands) -> argparse.ArgumentParser:
    from . import recipe

    p = commands.add_parser(
        "train",
        help="train a net on images",
        description="Train a net and write config.json, history.csv, curves.png, params.png and model.pt to the run's "
        "folder, also after an interrupt or a halt.",
        epilog="Without options: MNIST, the course's net with running batch norm, one epoch at batch 8, learning rate "
        "0.4 falling to 0.04.",
        allow_abbrev=False,
    )
    p.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help=f"{', '.join(DATA_SETS)}, or a folder of images, one subfolder a class (default: mnist, or glyphs where "
        "MNIST can neither be found nor downloaded)",
    )
    norm = p.add_mutually_exclusive_group()
    norm.add_argument("--layer", type=one_of(*LAYERS), default="conv_rbn", metavar="NAME", help=_names(LAYERS))
    recipe.add_norm(norm)
    p.add_argument(
        "--size",
        type=whole(1),
        metavar="N",
        help="for a folder of images: scale each to cover N x N pixels and cut out its centre (default: as they are, "
        "which must then be of one size)",
    )
    p.add_argument("--recipe", metavar="NAME", help="how conv_rbn averages its statistics (default: default)")
    p.add_argument("--model", type=one_of(*MODELS), default="cnn", metavar="NAME", help=_names(MODELS))
    p.add_argument(
        "--bs", type=whole(1), default=8, metavar="N", help="batch size; of each process under torchrun (default: 8)"
    )
    p.add_argument(
        "--lr",
        type=rate,
        metavar="X",
        help="learning rate (default: 2·bs/(bs + 32) with bs summed over processes, 0.4 at batch 8; a quarter of that "
        "for resnet9; times 1 − momentum)",
    )
    p.add_argument(
        "--epochs",
        type=whole(0),
        default=1,
        metavar="N",
        help="passes over the data (default: 1); the first is epoch 0, on screen as in history.csv and curves.png",
    )
    p.add_argument(
        "--sched",
        type=one_of(*SCHEDULES),
        default="lin",
        metavar="NAME",
        help="learning-rate schedule: none; lin and cos fall to a tenth; 1cycle rises from a tenth for 30 %% of the "
        "steps, then falls to a hundredth (default: lin)",
    )
    p.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    p.add_argument(
        "--threads",
        type=whole(1, 1024),
        metavar="N",
        help=f"CPU threads (default: 1 for the cnn at batches below {MANY}, where extra threads slow it down; otherwise "
        "PyTorch's choice)",
    )
    p.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="of initial weights and batch order (default: 0)"
    )
    p.add_argument(
        "--limit", type=whole(1), metavar="N", help="train on at most N images, and validate on the same share (at least 500)"
    )
    p.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of the data sets (default: $FASTRBN_DATA or a cache)"
    )
    p.add_argument(
        "--cb",
        action="append",
        default=[],
        metavar="NAME[:ARG=VALUE,…]",
        help="add a callback, by its class name or in snake case; repeatable; `fastrbn callbacks` lists them",
    )
    p.add_argument("--no-halt", action="store_true", help="continue after NaN or Inf")
    p.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/DATA-LAYER-DATE-TIME)")
    p.add_argument("--force", action="store_true", help="write into --out although it is not empty")
    p.add_argument(
        "--checkpoint-every",
        type=whole(1),
        metavar="N",
        help="save a checkpoint for --resume every N steps, after Ctrl-C and at the end, in the run's folder",
    )
    p.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue the run in the folder RUN from its newest intact checkpoint, with the run's own arguments; "
        "--epochs may be larger (the schedule is stretched), --checkpoint-every and --data-dir may differ",
    )
    recipe.add_options(p)
    return p


def _names(names) -> str:
    first, *others = names
    return f"{first} (default), {', '.join(others)}"
