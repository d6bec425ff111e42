"""What augmentation costs: CPU time per image, in the loader and in a DataLoader with worker processes.

    python benchmarks/augmentation.py [--csv results/augmentation_cpu.csv] [--rounds 5] [--batches 10] [--workers 2]

Images of 32×32×3 and 28×28×1 at random, batches of 64, one thread a process. `BatchLoader` applies torchvision's v2
transforms to each image in the training process; RandomCrop and RandomFlip of this package work on the whole batch. The
DataLoader applies the same v2 transforms in its workers, and the training process receives the batches. Time is that of
the CPU, so that other work on the machine hardly matters; the median round is reported. Before anything is timed, both
must give what a transform makes of each image, converted to 0-1, and draw for each image.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from about import in_words, machine, write_csv
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from fastrbn.data import BatchLoader, RandomCrop, RandomFlip

BS = 64


class Items(TensorDataset):
    """Images with transforms that are applied when an image is read."""

    def __init__(self, x, y, tfms):
        super().__init__(x, y)
        self.tfm = v2.Compose([*tfms, v2.ToDtype(torch.float32, scale=True)])

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return self.tfm(x), y


def policies(side):
    """By name: transforms of the loader, and the same of torchvision."""
    own, theirs = [RandomCrop(4), RandomFlip()], [v2.RandomCrop(side, padding=4), v2.RandomHorizontalFlip()]
    cut, jitter = v2.RandomResizedCrop(side), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    trivial, rand = v2.TrivialAugmentWide(), v2.RandAugment()
    return {
        "none": ([], []),
        "RandomCrop, RandomFlip": (own, theirs),
        "v2.RandomCrop, v2.RandomHorizontalFlip": (theirs, theirs),
        "v2.RandomResizedCrop": ([cut], [cut]),
        "v2.ColorJitter": ([jitter], [jitter]),
        "v2.TrivialAugmentWide": ([trivial], [trivial]),
        "v2.RandAugment": ([rand], [rand]),
    }


def loaders(x, y, tfms, items, workers):
    batches = BatchLoader(x, y, BS, shuffle=True, seed=0, tfms=tfms)
    return batches, DataLoader(Items(x, y, items), BS, shuffle=True, num_workers=workers)


def check(x, y, workers):
    """Both apply a transform to each image, with its own draws, or there is nothing to time."""
    turn, jitter = v2.Compose([v2.RandomInvert(1.0), v2.RandomVerticalFlip(1.0)]), v2.ColorJitter(0.5)
    for loader in loaders(x[: 2 * BS], y[: 2 * BS], [turn], [turn], workers):
        for xb, yb in loader:
            if not torch.allclose(xb, (255 - x[yb].flip(-2)).float() / 255):
                raise SystemExit(f"{type(loader).__name__} does not give the transformed images; nothing was timed")
    for loader in loaders(x[:1].expand(BS, -1, -1, -1), y[:BS], [jitter], [jitter], workers):
        if len(next(iter(loader))[0].flatten(1).unique(dim=0)) < BS // 2:
            raise SystemExit(f"{type(loader).__name__} gives equal images equal draws; nothing was timed")


def seconds(loader):
    """CPU seconds of an epoch in this process, and in those that it starts and ends."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time()
    for _ in loader:
        pass
    own, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return own, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(x, y, tfms, items, rounds, workers):
    """Microseconds an image: of the BatchLoader, and of the DataLoader here and in its workers."""
    pair, times = loaders(x, y, tfms, items, workers), []
    for _ in range(rounds + 1):
        (own, _), (here, there) = map(seconds, pair)
        times.append((own, here, there))
    return [statistics.median(column) / len(x) * 1e6 for column in zip(*times[1:])]  # the first one warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each loader (default 5)")
    parser.add_argument("--batches", type=int, default=10, help="batches in an epoch (default 10)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the DataLoader (default 2)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    rows, about = [], machine()
    print(in_words(about))
    names = ("batchloader_us", "dataloader_us", "its_workers_us")
    print(f"{'images':<10}{'transforms':<40}" + "".join(f"{name:>16}" for name in names) + "   CPU time an image")
    for c, side in ((3, 32), (1, 28)):
        n, g = BS * args.batches, torch.Generator().manual_seed(0)
        x, y = torch.randint(256, (n, c, side, side), generator=g, dtype=torch.uint8), torch.arange(n)
        check(x, y, args.workers)
        for name, (tfms, items) in policies(side).items():
            row = dict(zip(names, measure(x, y, tfms, items, args.rounds, args.workers)))
            print(f"{side}x{side}x{c:<5}{name:<40}" + "".join(f"{us:>16.1f}" for us in row.values()))
            rows.append({"images": f"{side}x{side}x{c}", "transforms": name} | {k: round(v, 1) for k, v in row.items()})
    if args.csv:
        write_csv(args.csv, rows, about)


if __name__ == "__main__":
    main()
