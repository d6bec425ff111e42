"""Recipes: how fast the running statistics move, when, and how much of the gradient goes through them.

A recipe is a handful of numbers; `norm/README.md` derives what they do. `RECIPES` has them by name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import NamedTuple

import torch

from fastrbn.util import one_of

# (mom, batch size, samples seen before) -> averaging rate in (0, 1]. The two counts may be tensors of shape (), so that
# nobody waits for them: rates are plain arithmetic
Rate = Callable[[float, int, int], float]

_SAMPLES_AT_LEAST = 16  # that `elements` reads: the positions of one sample tell much the same


def _is_number(value, kind=Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def at_least_one(n):
    """max(n, 1) of a number or a tensor."""
    return n.clamp_min(1) if isinstance(n, torch.Tensor) else max(n, 1)


def rate_fixed(mom: float, bs: int, samples: int) -> float:
    """λ = mom at every batch size: nn.BatchNorm's `momentum`."""
    return mom


def rate_course(mom: float, bs: int, samples: int) -> float:
    """λ = 1 − (1−mom)/√(bs−1): the course's rule (part 2, 2019, notebook 07). Batches of one take √1."""
    return 1 - (1 - mom) / at_least_one(bs - 1) ** 0.5


def rate_per_32_samples(mom: float, bs: int, samples: int) -> float:
    """λ = 1 − (1−mom)^(bs/32): mom is the share that 32 samples take (forum thread "Running batch norm tweaks")."""
    return 1 - (1 - mom) ** (bs / 32)


@dataclass(frozen=True)
class Memory:
    """λ = bs/(bs + memory): a batch weighs as many samples as it has, against a memory that grows.

    The memory is the share `share` of the samples seen so far, at least `least`/mom and at most `most`/mom of them: at mom
    0.1 a twentieth, from 20 to 300 samples, which 400 and 6,000 seen samples make of it. Weights move fast at the
    start, and a long memory would lag behind them; later a long one has less noise. Numbers: norm/README.md.
    """

    least: float = 2
    most: float = 30
    share: float = 0.05

    def __post_init__(self):
        inf, numbers = float("inf"), (self.least, self.most, self.share)
        if not all(map(_is_number, numbers)) or not (0 < self.least <= self.most and self.least < inf and 0 <= self.share < inf):
            raise ValueError(
                f"a memory is numbers: more than 0, `most` at least `least`, and `share` not negative, all but `most` "
                f"finite; got {self}"
            )

    def bounds(self, mom: float) -> tuple[float, float, float]:
        """The least and the most samples at a mom, and the share."""
        return self.least / mom, self.most / mom, self.share

    def __call__(self, mom: float, bs, samples):
        least, most, share = self.bounds(mom)
        memory = share * samples
        if isinstance(memory, torch.Tensor):
            return bs / (bs + memory.clamp(least, most))
        return bs / (bs + min(max(memory, least), most))


@dataclass(frozen=True)
class Skip:
    """Leave the statistics alone on the iterations that are multiples of `every`.

    Iterations count from 1; nothing is skipped until more than `after` samples (this batch's included) were seen.
    """

    every: int
    after: int

    def now(self, samples, iteration):
        """Whether to skip, given both counts with this batch's; numbers or tensors."""
        return (samples > self.after) & (iteration % self.every == 0)


@dataclass(frozen=True)
class Clamp:
    """Floor under what normalises in training while fewer than `samples` samples (this batch's included) were seen.

    `variance` is a floor of V before ε is added, `deviation` one of √(V+ε); the other is None. No gradient goes
    through a variance at its floor, and the state is not clamped.
    """

    samples: int = 20
    variance: float | None = 0.01
    deviation: float | None = None

    def floor(self, eps: float) -> float:
        """The floor as one of V."""
        return self.deviation**2 - eps if self.variance is None else self.variance


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one running batch norm from another.

    - `rate`: the averaging rate λ from (mom, batch size, samples seen before): a function such as `rate_course`, or a
      `Memory`.
    - `statistics`: `"running"` normalises with the running statistics in training too; `"batch"` with the batch's own,
      as nn.BatchNorm does, and keeps running ones for evaluation.
    - `backward`: `"exact"` differentiates through this batch's share a of the statistics; `"averaged"` projects as norms
      over many samples do, with this batch's reductions of dy (a share a of them, at least λ as it is before the first
      sample) and running averages of past ones, which move at λ too; `"detached"` treats the statistics as constants.
    - `elements`: the statistics read whole samples until they have this many elements a channel, and 16 samples at
      least; None reads all.
    - `order`: which samples those are: `"first"` (contiguous memory; right for shuffled batches) or `"strided"` (spread
      evenly over the batch; for batches sorted by class or time).
    - `skip`, `clamp`: see `Skip`, `Clamp`; None for never.

    Make variants with `recipe.but(rate=Memory(most=100))`. Raises ValueError for a value outside its rule.
    """

    name: str
    rate: Rate = Memory()
    statistics: str = "running"
    backward: str = "exact"
    elements: int | None = None
    order: str = "first"
    skip: Skip | None = None
    clamp: Clamp | None = None

    def __post_init__(self):
        one_of("statistics", self.statistics, ("running", "batch"))
        one_of("backward", self.backward, ("exact", "averaged", "detached"))
        one_of("order", self.order, ("first", "strided"))
        if not callable(self.rate):
            raise ValueError(
                f"a recipe's rate is a function of (mom, batch size, samples seen before) or a Memory; got {self.rate!r}"
            )
        if self.skip is not None and self.statistics == "batch":
            raise ValueError(
                f"a skipped step normalises with running statistics, statistics='batch' never does; got both, with "
                f"{self.skip}: leave one out"
            )
        if self.elements is not None and not (_is_number(self.elements, int) and self.elements >= 1):
            raise ValueError(
                f"a recipe reads a whole number of elements a channel, at least 1, or elements=None for all; got {self.elements!r}"
            )
        for kind, value in ((Skip, self.skip), (Clamp, self.clamp)):
            if not isinstance(value, (kind, type(None))):
                raise ValueError(f"a recipe's {kind.__name__.lower()} is a {kind.__name__} or None; got {value!r}")

    def but(self, **changes) -> Recipe:
        """A copy with some fields changed, named after this one unless `name` is given."""
        return replace(self, **{"name": f"{self.name}*", **changes})

    @property
    def plain_only(self) -> bool:
        """Whether it has only the plain formulas: those of the course and the thread, and nn.BatchNorm's way."""
        return self.backward != "averaged" or self.statistics == "batch" or self.skip is not None

    def rates(self, mom: float, bs, samples) -> tuple:
        """λ after so many samples, and what it is before the first. Raises ValueError unless they are in (0, 1]; what
        tensors hold is not looked at, since that waits for the device."""
        rates = self.rate(mom, bs, samples), self.rate(mom, bs, 0)
        if not torch.compiler.is_compiling():
            for rate, seen in zip(rates, (samples, 0), strict=True):
                if not (isinstance(rate, (torch.Tensor, torch.SymFloat)) or (_is_number(rate) and 0 < rate <= 1)):
                    raise ValueError(
                        f"a recipe's rate must give a number in (0, 1]; that of '{self.name}' gave {rate!r} at mom {mom}, "
                        f"batch size {bs}, after {seen} samples: for statistics that stay, freeze the layer"
                    )
        return rates

    def samples_read(self, bs: int, positions: int) -> int:
        """How many of a batch's `bs` samples, of `positions` elements a channel each, the statistics read."""
        if self.elements is None:
            return bs
        return min(bs, max(_SAMPLES_AT_LEAST, -(-self.elements // max(positions, 1))))


_COURSE_CLAMP = Clamp()

RECIPES = {
    r.name: r
    for r in (
        Recipe("default", backward="averaged", elements=4096, clamp=_COURSE_CLAMP),
        Recipe("course", rate_course, clamp=_COURSE_CLAMP),
        Recipe(
            "skip-alternate",
            rate_per_32_samples,
            skip=Skip(every=2, after=1000),
            clamp=Clamp(variance=None, deviation=0.1),
        ),
        Recipe("skip-tenth", rate_course, skip=Skip(every=10, after=10_000), clamp=_COURSE_CLAMP),
        Recipe("detached", rate_course, backward="detached"),
        Recipe("batch", rate_fixed, statistics="batch"),
    )
}


class Plan(NamedTuple):
    """How one step is taken: what a backend needs beside tensors."""

    recipe: Recipe
    mom: float
    eps: float
    process_group: object = None
    recent: deque | None = None  # the last steps, for activation checkpointing
    twice: bool = False  # whether this forward may be run again by it


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or `recipe` itself. Raises ValueError with the nearest name for an unknown one."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        one_of("recipe", recipe, tuple(RECIPES))
    return RECIPES[recipe]
