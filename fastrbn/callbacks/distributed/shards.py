"""Each rank's part of the data, for loaders that do not shard themselves."""

from __future__ import annotations

import itertools
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from fastrbn.learn.passes import set_epoch
from fastrbn.learn.ranks import Channel
from fastrbn.random_state import generators

_SHORT = (
    "a last batch without a sample for each of the {world} processes is left out of training, because all of them must "
    "step together"
)


def shard(loader: Any, rank: int, world: int, train: bool) -> Any:
    """`loader`, or one in its place, that yields the part of `rank` in every `world` batches.

    In training the parts of a step together are one batch of `world` times the size, in the same order; the samples of
    a short last batch are spread evenly. In validation each rank gets whole batches in turn.
    """
    if callable(getattr(loader, "shard", None)):
        return loader.shard(rank, world, even=train)
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return loader  # already sharded
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return Dealt(loader, rank, world, train)
    init = Seeded(rank, loader.worker_init_fn) if loader.num_workers else loader.worker_init_fn
    return DataLoader(
        loader.dataset,
        batch_sampler=Part(loader.batch_sampler, rank, world, train),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=init,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class Part:
    """A batch sampler: this rank's batch of every `world` in `batches`."""

    def __init__(self, batches: Any, rank: int, world: int, train: bool):
        self.batches, self.rank, self.world, self.train = batches, rank, world, train
        self.sampler = getattr(batches, "sampler", None)  # RandomState and set_epoch look here
        self.batch_sampler = batches
        self.seed, self.epoch, self.warned = 0, 0, rank != 0

    def set_epoch(self, number: int) -> None:
        self.epoch = number
        set_epoch(self, number)

    def __iter__(self) -> Iterator[list[Any]]:
        # an order drawn from the global generator must be the same on all ranks, and leave the generator unchanged
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(self.seed + self.epoch)  # not the devices' generators
            every = [list(batch) for batch in self.batches]
        if not self.train:
            yield from every[self.rank :: self.world]
            return
        for first in range(0, len(every), self.world):
            group = every[first : first + self.world]
            uneven = len(group) < self.world or len(group[-1]) < len(group[0])
            if uneven and first + self.world >= len(every):
                group = self._spread(group)
            if group:
                yield group[self.rank]

    def _spread(self, group: list[list[Any]]) -> list[list[Any]]:
        rows = [row for batch in group for row in batch]
        if len(group) < self.world and getattr(self.batches, "drop_last", False):
            return []
        if len(rows) < self.world:
            if rows and not self.warned:
                self.warned = True
                warnings.warn(_SHORT.format(world=self.world), stacklevel=2)
            return []
        least, more = divmod(len(rows), self.world)
        taken = iter(rows)
        return [list(itertools.islice(taken, least + (r < more))) for r in range(self.world)]

    def __len__(self) -> int:
        n = len(self.batches)
        if not self.train:
            return len(range(self.rank, n, self.world))
        left = n % self.world
        if not left or getattr(self.batches, "drop_last", False):
            return n // self.world
        # the number of samples in the last batches decides
        size, samples = getattr(self.batches, "batch_size", None), getattr(self.sampler, "__len__", None)
        short = size is not None and samples is not None and samples() - (n - left) * size < self.world
        return n // self.world + (not short)


class Dealt:
    """This rank's batch of every `world` in an iterable. Each rank iterates over all of them."""

    def __init__(self, loader: Any, rank: int, world: int, train: bool):
        self.loader, self.rank, self.world, self.train = loader, rank, world, train
        self.sampler, self.batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        self.warned = rank != 0

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while group := list(itertools.islice(batches, self.world)):
            if len(group) == self.world or not self.train and self.rank < len(group):
                yield group[self.rank]
            elif self.train and not self.warned:
                self.warned = True
                warnings.warn(
                    f"an epoch's last batches are left out of training ({len(group)}): there is not one for each of "
                    f"the {self.world} processes",
                    stacklevel=2,
                )

    def __len__(self) -> int:
        n = len(self.loader)
        return n // self.world if self.train else len(range(self.rank, n, self.world))

    @property
    def dataset(self) -> Any:
        return self.loader.dataset


class Seeded:
    """A worker_init_fn: workers of different ranks draw different numbers from the loader's shared generator."""

    def __init__(self, rank: int, inner: Callable[[int], Any] | None):
        self.rank, self.inner = rank, inner

    def __call__(self, worker: int) -> None:
        if self.rank:
            seed_all(torch.initial_seed(), self.rank)
        if self.inner is not None:
            self.inner(worker)


def seed_all(*numbers: Any) -> None:
    """Seed PyTorch, Python and, if it is in use, NumPy from `numbers`."""
    made = random.Random(repr(numbers))
    torch.manual_seed(made.getrandbits(63))
    random.seed(made.getrandbits(63))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(made.getrandbits(32))


def share_order(loader: Any, channel: Channel) -> None:
    """Give all ranks rank 0's generator states and loader state, which decide the order of the data."""
    drawn_by = list(generators(loader))
    states = [g.get_state() for g in drawn_by]
    channel.spread(states)
    for g, state in zip(drawn_by, states):
        g.set_state(state)
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        state = loader.state_dict()
        try:
            text = json.dumps(state)
        except TypeError:
            text = ""  # not numbers and strings, so not the state of a sharded loader of ours
        if text := channel.texts(text)[0]:
            loader.load_state_dict(json.loads(text))


def with_loader(data: Any, name: str, value: Any) -> Any:
    """`data` with `value` as its loader `name`."""
    try:
        setattr(data, name, value)
    except AttributeError:  # the class computes its loaders
        parts = {n: getattr(data, n) for n in ("train_dl", "valid_dl")}
        return SimpleNamespace(**{**parts, name: value})
    return data
