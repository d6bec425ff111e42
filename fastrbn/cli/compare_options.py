"""What `fastrbn compare` takes. Imports no torch, so that `--help` comes at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import one_of, rate, whole

NETS = ("cnn", "resnet-small", "resnet9")


def listed(kind):
    """An argparse type: values of `kind` with commas between them, each once."""

    def check(text):
        values = [kind(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"must name each value once; got '{text}'")
        return values

    return check


def add_compare(commands) -> None:
    """Add the command to the subparsers `commands`."""
    p = commands.add_parser(
        "compare",
        help="compare norms over batch sizes",
        description="Train a net with each norm, batch size and seed, and leave in the folder cells.csv (a row a "
        "finished cell), table.md and accuracy.png. Interrupted, it goes on with the same command.",
        epilog="A norm is the name of a recipe (default, course, ...) or one of batchnorm, groupnorm, "
        "layernorm, instancenorm, batchrenorm, frn, onlinenorm, mabn, groupnorm-ws (with weight standardisation), none, "
        "and may have settings: groupnorm:groups=4, "
        "default:mom=0.05,elements=none. Every norm has the same net, initial weights, order of batches and learning "
        "rate at the same seed: on the cnn 0.05·bs^0.9, at most 2, falling on a line to a tenth.",
        allow_abbrev=False,
    )
    p.add_argument(
        "data",
        nargs="?",
        default="mnist",
        metavar="DATA",
        help="a data set or folder of images, as for train, or several with commas between them (default: mnist)",
    )
    p.add_argument("--norms", default="default,batchnorm,groupnorm", metavar="A,B,…", help="default: %(default)s")
    p.add_argument(
        "--bs", type=listed(whole(1)), default=[2, 8, 32], metavar="N,…", help="batch sizes (default: 2,8,32)"
    )
    p.add_argument("--seeds", type=listed(whole(0, 2**63 - 1)), default=[0, 1, 2], metavar="N,…", help="default: 0,1,2")
    p.add_argument(
        "--lr-factors",
        type=listed(rate),
        default=[1.0],
        metavar="X,…",
        help="times the learning-rate rule's rate (default: 1)",
    )
    p.add_argument(
        "--net",
        type=listed(one_of(*NETS)),
        default=["cnn"],
        metavar="NAME,…",
        help=f"{NETS[0]} (default), {', '.join(NETS[1:])}; the last two suit cifar10",
    )
    p.add_argument("--n-train", type=whole(1), metavar="N", help="train on the first N images (default: all)")
    p.add_argument("--epochs", type=whole(1), default=1, metavar="N", help="passes over the data (default: 1)")
    p.add_argument("--augment", action="store_true", help="random crops and left-right flips; not for digits")
    p.add_argument("--out", type=Path, default=Path("compare"), metavar="DIR", help="the folder (default: compare)")
    p.add_argument(
        "--jobs",
        type=whole(0),
        metavar="N",
        help="worker processes with one CPU thread each; 0: train in this process (default: one per core; 1 on CUDA)",
    )
    p.add_argument(
        "--device",
        default="cpu",
        metavar="NAME,…",
        help="cpu (default), cuda, or several, such as cuda:0,cuda:1, which processes take in turn",
    )
    p.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of the data sets (default: $FASTRBN_DATA or a cache)"
    )
    p.add_argument(
        "--record-norms",
        type=whole(1),
        metavar="K",
        help="record the norms of the convolutions' weights every K steps, and draw weight_norms.png",
    )
    p.add_argument("--table", type=Path, metavar="DIR", help="train nothing; redraw table and pictures of DIR/cells.csv")
