"""How much of a norm's accuracy is lost to the statistics that it is evaluated with?

    python benchmarks/evaluation_statistics.py [--norms default,leaning,batchnorm] [--bs 8] [--seeds 0,1,2]
        [--csv results/evaluation_statistics_cpu.csv]

Trains resnet-small on CIFAR-10 as `small_batch.py --grid cifar` does, and prints the validation accuracy with the net's own running
statistics and with those of 2,000 training images, which are set layer by layer, each from what the layers before make of
the images with theirs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch
from about import machine, write_csv
from small_batch import GRIDS, numbers
from torch import nn

from fastrbn import RunningBatchNorm
from fastrbn.compare import cells_of, describe, split_norms
from fastrbn.compare.cell import load_images, run_cell, valid_accuracy
from fastrbn.data import BatchLoader

IMAGES = 2000


@torch.no_grad()
def set_statistics(model, images):
    """Give every norm with running statistics those of the first `IMAGES` training images, without augmentation."""

    def take(norm, inputs):
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)

    norms = [m for m in model.modules() if isinstance(m, (RunningBatchNorm, nn.BatchNorm2d))]
    hooks = [norm.register_forward_pre_hook(take) for norm in norms]
    x, y = images.train.x[:IMAGES], images.train.y[:IMAGES]
    (xb, _), *_ = BatchLoader(x, y, IMAGES, normalize=(images.mean, images.std))
    model.eval()(xb)
    for hook in hooks:
        hook.remove()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", default="default,leaning,batchnorm", help="norms with running statistics")
    parser.add_argument("--bs", type=numbers(int), default=[8])
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    parser.add_argument("--n-train", type=int, default=GRIDS["cifar"]["n_train"])
    parser.add_argument("--csv", type=Path, help="write a row a training here too")
    args = parser.parse_args()

    torch.set_num_threads(1)
    images = load_images("cifar10")
    grid = GRIDS["cifar"] | {"bs": args.bs, "seeds": args.seeds, "n_train": args.n_train}
    del grid["norms"]
    print("norm, batch size: accuracy with its own statistics; with those of 2,000 images; a seed each, and the means")
    rows = []
    for norm in split_norms(args.norms):
        for bs in args.bs:
            own, given = [], []
            for cell in cells_of([norm], **grid | {"bs": [bs]}):
                trained = []
                own.append(run_cell(cell, images, look=trained.append)[0]["accuracy"])
                set_statistics(trained[0], images)
                given.append(round(100 * valid_accuracy(trained[0], images), 2))
                row = {"norm": norm, "settings": describe(norm), "bs": bs, "seed": cell.seed}
                rows.append(row | {"accuracy": own[-1], "with_statistics_of_2000": given[-1]})
            print(f"{norm}, {bs}: {words(own)}; {words(given)}", flush=True)
            if args.csv:
                write_csv(args.csv, rows, machine())


def words(values):
    return f"{', '.join(f'{v:.2f}' for v in values)}, mean {fmean(values):.2f}"


if __name__ == "__main__":
    main()
