"""How `fastrbn train` trains beyond rate and batch size: what of the recipe has an option, and what comes of it.

Options that are left out change nothing. The upper half imports no torch, so that `--help` comes at once.
"""

from __future__ import annotations

import argparse
from functools import partial

from .options import BAD_ARGUMENTS, LAYERS, CliError, nearest, one_of, share, whole

NORMS = {norm: layer for layer, norm in LAYERS.items()}  # what --norm calls what --layer names
COMPILE = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
NAMES = ("norm", "width", "momentum", "weight_decay", "label_smoothing", "cutout", "amp", "channels_last", "compile")


def add_norm(group) -> None:
    """`--norm`, to `--layer`'s group: one says what the other says."""
    group.add_argument(
        "--norm",
        metavar="NAME",
        help="--layer and --recipe in one: batch, group, running, or a recipe of running batch norm",
    )


def add_options(p) -> None:
    """The other options of `NAMES`, to the parser of `train`."""
    group = p.add_argument_group("recipe", "none of these is on by default")
    group.add_argument("--width", type=whole(1, 4096), metavar="N", help="channels of resnet9's first layer (default: 64)")
    group.add_argument(
        "--momentum", type=share, default=0.0, metavar="X", help="Nesterov momentum of SGD (default: 0)"
    )
    group.add_argument(
        "--weight-decay", type=share, default=0.0, metavar="X", help="for weights, not for norms and biases (default: 0)"
    )
    group.add_argument(
        "--label-smoothing", type=share, default=0.0, metavar="X", help="share of the target spread over all classes"
    )
    group.add_argument(
        "--cutout", type=whole(1), metavar="N", help="blank a square of N pixels a side in each training image"
    )
    group.add_argument("--amp", type=one_of("bf16", "fp16"), metavar="NAME", help="mixed precision: bf16, fp16")
    group.add_argument("--channels-last", action="store_true", help="keep images and weights in that memory order")
    group.add_argument(
        "--compile",
        nargs="?",
        const=COMPILE[0],
        type=_mode,
        metavar="MODE",
        help=f"compile the model: {', '.join(COMPILE)} (default: not; --compile alone: {COMPILE[0]}); an epoch's last, "
        "smaller training batch is dropped",
    )


def _mode(text):
    if text not in COMPILE:
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(COMPILE)}; got '{text}'.{nearest(text, COMPILE)} DATA goes before --compile"
        )
    return text


def settle_norm(args) -> None:
    """Say what `--norm` says in `args.layer` and `args.recipe`. CliError for a norm there is not, or two of them."""
    from fastrbn.norm import RECIPES

    if args.norm is None:
        return
    known = (*NORMS, *(r for r in RECIPES if r not in NORMS))
    if args.norm not in known:
        raise CliError(
            f"--norm must be one of {', '.join(known)}; got '{args.norm}'.{nearest(args.norm, known)}", BAD_ARGUMENTS
        )
    recipe = None if args.norm in NORMS else args.norm
    if args.recipe is not None and recipe is not None and args.recipe != recipe:
        raise CliError(
            f"--norm {args.norm} is a recipe already, and --recipe is {args.recipe}: leave one of them out",
            BAD_ARGUMENTS,
        )
    args.layer, args.recipe = NORMS.get(args.norm, "conv_rbn"), args.recipe or recipe


def model_kwargs(args) -> dict:
    """Of `resnet9`, beside its norm. CliError for a width that the model does not take."""
    if args.width is None:
        return {}
    if args.model != "resnet9":
        raise CliError(f"--width is for resnet9, and --model is {args.model}: leave it out", BAD_ARGUMENTS)
    return {"width": args.width}


def data_kwargs(args, images, world=1) -> dict:
    """Keyword arguments of `image_databunch`. CliError for a square as large as the images.

    A compiled model does not get an epoch's last, smaller batch, for which it would be compiled once more (unless there
    is no whole one)."""
    side = min(images.train.x.shape[2:])
    if args.cutout is not None and args.cutout >= side:
        raise CliError(
            f"--cutout must leave some of the images, whose shorter side is {side}; got {args.cutout}", BAD_ARGUMENTS
        )
    n = min(len(images.train), args.limit or len(images.train))
    drop_last = args.compile is not None and n >= args.bs * world
    return {"cutout": args.cutout, "channels_last": args.channels_last, "drop_last": drop_last}


def default_factor(args) -> float:
    """What the course net's default rate is multiplied by. A step of SGD with momentum m moves on for 1/(1 − m) steps'
    worth; resnet9's largest features go to its last layer undamped (Page divides them by 8), and trained best at a
    quarter of the rate or near it, at batches of 8 to 256, in short trainings."""
    return (1 - args.momentum) * (0.25 if args.model == "resnet9" else 1)


def learner_kwargs(args) -> dict:
    """Of `get_runner` and `get_learn_run`."""
    from torch import optim

    opt_func = partial(optim.SGD, momentum=args.momentum, nesterov=True) if args.momentum else None
    return {"opt_func": opt_func, "weight_decay": args.weight_decay or None}


def finish(args, learn, device) -> None:
    """Put the model where and how it is to train, and the loss function that was asked for in its place."""
    import torch

    from fastrbn.build import LabelSmoothingCrossEntropy

    learn.model.to(device)
    if args.channels_last:
        learn.model.to(memory_format=torch.channels_last)
    if args.label_smoothing:
        learn.loss_func = LabelSmoothingCrossEntropy(args.label_smoothing)


def callbacks(args) -> list:
    """Those of mixed precision and the compiler."""
    from fastrbn.callbacks import CompileCallback, MixedPrecision

    made = [MixedPrecision(args.amp)] if args.amp else []
    if args.compile:
        made.append(CompileCallback() if args.compile == COMPILE[0] else CompileCallback(mode=args.compile))
    return made


def config(args) -> dict:
    """The recipe's part of config.json."""
    return {name: getattr(args, name) for name in NAMES if name != "norm"}


def words(config) -> str:
    """`, bf16, channels last, compiled`: what speeds the run up, for its announcement."""
    found = [config["amp"]] if config["amp"] else []
    found += ["channels last"] if config["channels_last"] else []
    if config["compile"]:
        found.append("compiled" if config["compile"] == COMPILE[0] else f"compiled ({config['compile']})")
    return "".join(f", {word}" for word in found)
