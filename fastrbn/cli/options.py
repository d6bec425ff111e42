"""What the command line takes. Imports no torch, so that `--help` is quick.

The parser of `train` has no defaults: what it returns are the options that were given. `settings.py` has the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fastrbn._version import __version__
from fastrbn.trainer.settings import COMPILE, MANY, MODELS, OPTIMISERS, Rule, one_of, rate, rule, whole
from fastrbn.util import suggestion

DONE, ERROR, BAD_ARGUMENTS, HALTED, INTERRUPTED = 0, 1, 2, 3, 130

DATA_SETS = ("mnist", "fashion", "cifar10", "cifar100", "glyphs")
NETS = ("cnn", "resnet-small", "resnet9")  # of compare
DATA_DIR = "folder of the data sets (default: $FASTRBN_DATA or a cache)"


class CliError(Exception):
    """Ends a command: one sentence for the user and the exit status."""

    def __init__(self, message: str, status: int = ERROR):
        super().__init__(message)
        self.status = status


def typed(check: Rule) -> Callable[[str], Any]:
    """`check` as an argparse type, which shows the words of its ValueError."""

    def convert(text: str) -> Any:
        try:
            return check(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from e

    return convert


def _listed(kind: Rule) -> Rule:
    """Values of `kind` with commas between them, each once."""

    def check(text: str) -> list:
        values = [kind(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise ValueError(f"must name each value once; got '{text}'")
        return values

    return check


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in a line of its own, and an unknown option with the closest known one."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_ARGUMENTS, f"{self.prog}: error: {message}\n")  # not after ten lines of usage

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
            hint = suggestion(option, self._option_string_actions) if option else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint} {self.prog} --help lists what there is")
        return parsed, unknown


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="fastrbn",
        description="Train with running batch norm: batch norm for every batch size down to one.",
        epilog="exit status: 0 done, 1 error, 2 bad arguments, 3 halted on NaN or Inf, 130 interrupted",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"fastrbn {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_predict(commands)
    _add_eval(commands)
    _add_export(commands)
    _add_compare(commands)
    commands.add_parser(
        "callbacks",
        help="list what --cb takes: built-in callbacks and plug-ins",
        description="List the built-in callbacks and those of plug-ins (entry points of the group fastrbn.callbacks).",
    )
    return top


def _add_train(commands) -> None:
    p = commands.add_parser(
        "train",
        help="train a net on images",
        description="Train a net and write config.json, history.csv, curves.png, params.png and model.pt to the run's "
        "folder, also after an interrupt or a halt.",
        epilog="Without options: MNIST, the course's net with running batch norm, one epoch at batch 8, learning rate "
        "0.4 falling to 0.04.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given is not in the namespace
    )

    def setting(name: str, metavar: str, help: str, group=p, **more) -> None:
        check = rule(name)
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=check and typed(check), metavar=metavar, help=help, **more)

    p.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help=f"{', '.join(DATA_SETS)}, or a folder of images, one subfolder a class (default: mnist, or glyphs where "
        "MNIST can neither be found nor downloaded)",
    )
    norm = p.add_mutually_exclusive_group()
    setting(
        "norm",
        "NAME",
        "running (default), batch, group, or a recipe of running batch norm, such as course; `conv_rbn`, `conv_bn` and "
        "`conv_gn` are other names of the first three. For other models than cnn and resnet9: running or a recipe "
        "replaces their batch norms, own keeps their norms",
        norm,
    )
    norm.add_argument("--layer", dest="norm", metavar="NAME", help="another spelling of --norm")
    setting("recipe", "NAME", "how running batch norm averages its statistics (default: default)")
    setting(
        "size",
        "N",
        "scale each image to cover N x N pixels and cut out its centre (default: as they are; in a folder they must "
        "then be of one size)",
    )
    setting(
        "model",
        "NAME",
        f"{MODELS[0]} (default), {MODELS[1]}, a classification net of torchvision (resnet18, convnext_tiny, …), or "
        "your own, package.module:function; it is called with c_in=CHANNELS, classes=N, as far as it takes them",
    )
    p.add_argument(
        "--pretrained",
        type=Path,
        metavar="FILE",
        help="start from these weights, a state_dict saved by torch.save, except a head of another number of classes",
    )
    setting("bs", "N", "batch size; of each process under torchrun (default: 8)")
    setting("opt", "NAME", f"optimiser of torch.optim, in any case: {', '.join(OPTIMISERS)} (default: SGD)")
    setting(
        "lr",
        "X",
        "learning rate (default: 2·bs/(bs + 32) with bs summed over processes, 0.4 at batch 8; a quarter of that for "
        "resnet9, a sixteenth for other nets; times 1 − momentum; for other optimisers than SGD PyTorch's default)",
    )
    setting(
        "epochs",
        "N",
        "passes over the data (default: 1, or as many as --max-steps needs); the first is epoch 0, on screen as in "
        "history.csv and curves.png",
    )
    setting("max_steps", "N", "end after N training steps, or after --epochs if that is sooner")
    setting(
        "sched",
        "NAME",
        "learning-rate schedule: none; lin and cos fall to a tenth; 1cycle rises from a tenth for 30 %% of the steps, "
        "then falls to a hundredth (default: lin)",
    )
    setting("device", "NAME", "auto, cpu, cuda, cuda:N, mps (default: auto)")
    setting(
        "threads",
        "N",
        f"CPU threads (default: 1 for the cnn at batches below {MANY}, where extra threads slow it down; otherwise "
        "PyTorch's choice)",
    )
    setting("seed", "N", "of initial weights and batch order (default: 0)")
    setting("limit", "N", "train on at most N images, and validate on the same share (at least 500)")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help=DATA_DIR)
    setting(
        "cb",
        "NAME[:ARG=VALUE,…]",
        "add a callback, by its class name or in snake case; repeatable; `fastrbn callbacks` lists them",
        action="append",
    )
    p.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="take options from a JSON file, by name with _ for -, or from a run's config.json; options given here win",
    )
    p.add_argument("--no-halt", action="store_true", help="continue after NaN or Inf")
    p.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/DATA-LAYER-DATE-TIME)")
    p.add_argument("--force", action="store_true", help="write into --out although it is not empty")
    setting(
        "checkpoint_every",
        "N",
        "save a checkpoint for --resume every N steps, after Ctrl-C and at the end, in the run's folder",
    )
    p.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue the run in the folder RUN from its newest intact checkpoint, with the run's own arguments; "
        "--epochs and --max-steps may be larger (the schedule is stretched), --checkpoint-every and --data-dir may "
        "differ",
    )
    more = p.add_argument_group("recipe", "off by default")
    setting("width", "N", "channels of resnet9's first layer (default: 64)", more)
    setting("momentum", "X", "of SGD (Nesterov's) and RMSprop (default: 0)", more)
    setting("weight_decay", "X", "for weights, not for norms and biases (default: 0; for AdamW 0.01)", more)
    setting("label_smoothing", "X", "share of the target spread over all classes", more)
    setting(
        "augment",
        "NAME,…",
        "augment training images with these, in this order: crop, flip, color, trivial, randaugment, resized-crop, or "
        "your own package.module:function, which returns transforms (default: crop,flip for cifar10 and cifar100, "
        "otherwise none)",
        more,
    )
    setting("cutout", "N", "blank a square of N pixels a side in each training image", more)
    setting("amp", "NAME", "mixed precision: bf16, fp16", more)
    more.add_argument("--channels-last", action="store_true", help="keep images and weights in that memory order")
    setting(
        "compile",
        "MODE",
        f"compile the model: {', '.join(COMPILE)} (default: not; --compile alone: {COMPILE[0]}); an epoch's last, "
        "smaller training batch is dropped",
        more,
        nargs="?",
        const=COMPILE[0],
    )


def _add_run(p, device: bool = True) -> None:
    """The arguments of a command that loads a run."""
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a run of fastrbn train")
    p.add_argument(
        "--weights",
        type=typed(one_of("best", "last")),
        default="best",
        metavar="NAME",
        help="best (default): those that SaveBest kept, or the last if the run had none; last",
    )
    if device:
        p.add_argument("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, cuda:N, mps")


def _add_predict(commands) -> None:
    p = commands.add_parser(
        "predict",
        help="say which classes images are of",
        description="Print a line for each image, with tabs: its path, the most probable class and the probability.",
        epilog="An image that cannot be read is named on stderr, and the exit status is 1; the others are still done.",
        allow_abbrev=False,
    )
    _add_run(p)
    p.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="an image, or a folder of them at any depth; several"
    )
    p.add_argument(
        "--top", type=typed(whole(1)), default=1, metavar="N", help="the N most probable classes (default: 1)"
    )
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the lines there too, as a table with a header")


def _add_eval(commands) -> None:
    p = commands.add_parser(
        "eval",
        help="measure a run's loss and accuracy",
        description="Measure loss and accuracy of a run's model on its validation images, beside what the training "
        "measured, or on others.",
        allow_abbrev=False,
    )
    _add_run(p)
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--data", type=Path, metavar="DIR", help="other images: a folder with one folder for each class of the run"
    )
    which.add_argument(
        "--split",
        type=typed(one_of("valid", "test")),
        default="valid",
        metavar="NAME",
        help="of the run's data: valid (default), as in training; test, all test images",
    )
    p.add_argument("--per-class", action="store_true", help="print the accuracy of each class too")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the data sets (default: the run's)")


def _add_export(commands) -> None:
    p = commands.add_parser(
        "export",
        help="write a run's model for use without fastrbn",
        description="Write the model of a run as ONNX or as a PyTorch export (.pt2), in evaluation mode and for "
        "batches of any size. The file is compared with the model, and holds the classes and how images are prepared.",
        allow_abbrev=False,
    )
    _add_run(p, device=False)
    p.add_argument("--to", type=typed(one_of("onnx", "torch")), required=True, metavar="KIND", help="onnx or torch")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: model.onnx or model.pt2 in the run's folder")


def _add_compare(commands) -> None:
    p = commands.add_parser(
        "compare",
        help="compare norms over batch sizes",
        description="Train a net with each norm, batch size and seed, and leave in the folder cells.csv (a row a "
        "finished cell), table.md and accuracy.png. Interrupted, it goes on with the same command.",
        epilog="A norm is the name of a recipe (default, course, ...) or one of batchnorm, "
        "groupnorm, layernorm, instancenorm, batchrenorm, frn, onlinenorm, mabn, groupnorm-ws (with weight "
        "standardisation), frozen (nn.BatchNorm that trains with fixed statistics), precise (nn.BatchNorm with "
        "statistics measured after training), none, and may have settings: groupnorm:groups=4, "
        "default:mom=0.05,elements=none. "
        "Every norm has the same net, initial weights, order of batches and learning "
        "rate at the same seed: on the cnn 0.05·bs^0.9, at most 2, falling linearly to a tenth.",
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
        "--bs", type=typed(_listed(whole(1))), default=[2, 8, 32], metavar="N,…", help="batch sizes (default: 2,8,32)"
    )
    seeds = typed(_listed(whole(0, 2**63 - 1)))
    p.add_argument("--seeds", type=seeds, default=[0, 1, 2], metavar="N,…", help="default: 0,1,2")
    p.add_argument(
        "--lr-factors",
        type=typed(_listed(rate)),
        default=[1.0],
        metavar="X,…",
        help="times the learning-rate rule's rate (default: 1)",
    )
    p.add_argument(
        "--net",
        type=typed(_listed(one_of(*NETS))),
        default=["cnn"],
        metavar="NAME,…",
        help=f"{NETS[0]} (default), {', '.join(NETS[1:])}; the last two suit cifar10",
    )
    p.add_argument(
        "--size",
        type=typed(whole(1)),
        metavar="N",
        help="scale images to N x N pixels, as for train (default: as they are)",
    )
    p.add_argument("--n-train", type=typed(whole(1)), metavar="N", help="train on the first N images (default: all)")
    p.add_argument("--epochs", type=typed(whole(1)), default=1, metavar="N", help="passes over the data (default: 1)")
    p.add_argument("--augment", action="store_true", help="random crops and left-right flips; not for digits")
    p.add_argument("--out", type=Path, default=Path("compare"), metavar="DIR", help="the folder (default: compare)")
    p.add_argument(
        "--jobs",
        type=typed(whole(0)),
        metavar="N",
        help="worker processes with one CPU thread each; 0: train in this process (default: one per core; 1 on CUDA)",
    )
    p.add_argument(
        "--device",
        default="cpu",
        metavar="NAME,…",
        help="cpu (default), cuda, or several, such as cuda:0,cuda:1, which processes take in turn",
    )
    p.add_argument("--data-dir", type=Path, metavar="DIR", help=DATA_DIR)
    p.add_argument(
        "--record-norms",
        type=typed(whole(1)),
        metavar="K",
        help="record the norms of the convolutions' weights every K steps, and draw weight_norms.png",
    )
    p.add_argument(
        "--table", type=Path, metavar="DIR", help="train nothing; redraw table and pictures of DIR/cells.csv"
    )
