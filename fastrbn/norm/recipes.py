"""Recipes: how fast the running statistics move, when, and how much of the gradient goes through them.

A recipe is a handful of numbers; `norm/README.md` derives what they do. `RECIPES` has them by name.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

# (mom, batch size, elements a channel) -> averaging rate in (0, 1]. Over many processes the two counts are tensors of
# shape (), so that nobody waits for them: rates are plain arithmetic.
Rate = Callable[[float, int, int], float]


# Positions of a sample that count as elements: neighbours in an image tell the same. With all counted 4,096 elements are 4
# images of 32×32, and resnet9 trained worse for it on CIFAR-10 at batch 32; so they are 16. Up to 16×16 it changes nothing
_POSITIONS_THAT_COUNT = 256


def at_least_one(n):
    """max(n, 1) of a number or a tensor."""
    return n.clamp_min(1) if isinstance(n, torch.Tensor) else max(n, 1)


def smaller(a, b):
    """min(a, b) of numbers or tensors."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.minimum(a, b)
    if isinstance(a, torch.Tensor):
        return a.clamp_max(b)
    return b.clamp_max(a) if isinstance(b, torch.Tensor) else min(a, b)


def between(a, least: float, most: float):
    """a, or the bound it is beyond; a number or a tensor."""
    return a.clamp(least, most) if isinstance(a, torch.Tensor) else min(max(a, least), most)


def rate_fixed(mom: float, bs: int, n: int) -> float:
    """λ = mom at every batch size: nn.BatchNorm's `momentum`."""
    return mom


def rate_course(mom: float, bs: int, n: int) -> float:
    """λ = 1 − (1−mom)/√(bs−1): the course's rule (part 2, 2019, notebook 07). Batches of one take √1."""
    return 1 - (1 - mom) / at_least_one(bs - 1) ** 0.5


def rate_per_32_samples(mom: float, bs: int, n: int) -> float:
    """λ = 1 − (1−mom)^(bs/32): mom is the share that 32 samples take (forum thread "Running batch norm tweaks")."""
    return 1 - (1 - mom) ** (bs / 32)


def rate_per_sample(mom: float, bs: int, n: int) -> float:
    """λ = bs/(bs + 4/mom): a batch weighs as many samples as it has against a memory of 4/mom (40 at mom 0.1)."""
    return bs / (bs + 4 / mom)


def rate_leading(mom: float, bs: int, n: int) -> float:
    """λ = bs/(bs + 1/mom): a batch of 1/mom samples (10 at mom 0.1) weighs as much as all before it."""
    return bs / (bs + 1 / mom)


def rate_at_first(mom: float, bs: int, n: int) -> float:
    """λ = bs/(bs + memory), the memory a third of the batch, at least 2/mom and at most 4/mom samples (20 and 40 at mom
    0.1): a batch weighs three quarters at most, up to 120 samples. Where a memory that grows starts."""
    return bs / (bs + between(bs / 3, 2 / mom, 4 / mom))


def rate_backward(mom: float, bs: int, n: int) -> float:
    """λ_b = bs/(bs + 10/mom): a memory of 100 samples at mom 0.1, since the reductions of a
    batch's gradient are noisier than its statistics."""
    return bs / (bs + 10 / mom)


def one_of(what: str, value, allowed: tuple) -> None:
    """Raise ValueError unless `value` is `allowed`, with the nearest one that is."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"{what} must be one of {', '.join(allowed)}; got {value!r}.{hint}")


@dataclass(frozen=True)
class Skip:
    """Leave the statistics alone on the iterations that are multiples of `every`.

    Iterations count from 1; nothing is skipped until more than `after` samples (this batch's included) were seen. A
    skipped step does not look at its batch at all.
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


@dataclass(frozen=True)
class Steady:
    """A long memory for statistics whose means stand still: λ = min(rate, n/memory · max(1, drift)²).

    - n: elements a channel of this batch; drift: n·mean((m−M)²/(V+ε)) over the channels, about 1 for means that stand
      still. One that is a deviation off makes 3 of it at n = 2 and 9 at n = 8, so λ is there within a few steps.
    - memory, in elements a channel: `share` of the samples seen so far, at least `least` and at most `most`. Weights move
      fast at first, when little is known anyway.

    The numbers are the best of those measured (norm/README.md). The first batch takes the rate.
    """

    least: float = 320
    most: float = 3000
    share: float = 0.05

    def __post_init__(self):
        if not (1 <= self.least <= self.most and 0 <= self.share):
            raise ValueError(
                f"a memory is at least 1 element a channel, `most` at least `least`, and `share` not negative; got {self}"
            )

    def rate(self, rate, n, drift, samples):
        """λ from the recipe's rate, n, the drift and the number of samples seen before; numbers or tensors."""
        memory, drift = between(self.share * samples, self.least, self.most), at_least_one(drift)
        return smaller(rate, n / memory * drift * drift)  # drift**2 would raise where this is inf


@dataclass(frozen=True)
class Memory:
    """A memory in samples that grows while weights move less and less: λ is at most bs/(bs + memory).

    The memory is `share` of the samples seen so far, at least `least`/mom and at most `most`/mom: 20 and 100 at mom 0.1,
    which 4,000 and 20,000 samples make of it. A short one follows weights that move fast, and a step trains better for
    more of its own batch; an average over many samples evaluates better. Numbers from norm/README.md.
    """

    least: float = 2
    most: float = 10
    share: float = 0.005

    def __post_init__(self):
        if not (0 < self.least <= self.most and 0 <= self.share):
            raise ValueError(f"a memory is more than 0, `most` at least `least`, and `share` not negative; got {self}")

    def bounds(self, mom: float) -> tuple[float, float, float]:
        """The least and the most samples at a mom, and the share."""
        return self.least / mom, self.most / mom, self.share

    def rate(self, mom: float, bs, samples):
        """bs/(bs + memory) from the number of samples seen before; numbers or tensors."""
        least, most, share = self.bounds(mom)
        return bs / (bs + between(share * samples, least, most))


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one running batch norm from another.

    - `rate`: the averaging rate λ of the statistics from (mom, batch size, elements a channel that they read).
    - `memory`: λ is no more than a memory in samples allows, which grows with those seen, see `Memory`. None: the rate.
    - `leaning`: only the state, which evaluation uses, moves with that memory; a training step normalises with what `rate`
      makes of the state and its batch. False: with the state, as evaluation does.
    - `statistics`: `"running"` normalises with the running statistics in training too; `"batch"` with the batch's own,
      as nn.BatchNorm does, and keeps running ones for evaluation.
    - `steady`: a longer memory while the means stand still, see `Steady`; a number for one of that many elements a
      channel throughout. None: λ is the rate.
    - `backward`: `"exact"` differentiates through this batch's share a of the statistics; `"averaged"` adds the share
      `kappa` of the running averages of mean(dy) and mean(dy·x̂) for the rest 1−a; `"detached"` treats the statistics
      as constants.
    - `backward_rate`: the rate of those two averages (`averaged` only).
    - `elements`: the statistics read whole samples until they have this many elements a channel; None reads all.
      Of a sample's positions 256 count, since neighbours tell the same: 4,096 elements are 16 images or more.
    - `order`: which samples those are: `"first"` (contiguous memory; right for shuffled batches) or `"strided"` (spread
      evenly over the batch; for batches sorted by class or time).
    - `skip`, `clamp`: see `Skip`, `Clamp`; None for never.

    Make variants with `recipe.but(kappa=0.5)`. Raises ValueError for a value outside its rule.
    """

    name: str
    rate: Rate = rate_per_sample
    statistics: str = "running"
    memory: Memory | None = None
    leaning: bool = False
    steady: Steady | float | None = None
    backward: str = "exact"
    kappa: float = 0.0
    backward_rate: Rate = rate_backward
    elements: int | None = None
    order: str = "first"
    skip: Skip | None = None
    clamp: Clamp | None = None

    def __post_init__(self):
        one_of("statistics", self.statistics, ("running", "batch"))
        one_of("backward", self.backward, ("exact", "averaged", "detached"))
        one_of("order", self.order, ("first", "strided"))
        if not 0 <= self.kappa <= 1:
            raise ValueError(f"a recipe's kappa is a share from 0 to 1; got {self.kappa}")
        if self.skip is not None and self.statistics == "batch":
            raise ValueError(
                f"a skipped step normalises with running statistics, statistics='batch' never does; got both, with "
                f"{self.skip}: leave one out"
            )
        if self.elements is not None and self.elements < 1:
            raise ValueError(f"a recipe reads at least 1 element a channel, or elements=None; got {self.elements}")
        if isinstance(self.steady, (int, float)):
            object.__setattr__(self, "steady", Steady(self.steady, self.steady))
        if not isinstance(self.steady, (Steady, type(None))):
            raise ValueError(f"steady is a Steady, a number of elements, or None; got {self.steady!r}")
        if not isinstance(self.memory, (Memory, type(None))):
            raise ValueError(f"memory is a Memory or None; got {self.memory!r}")
        if self.memory is not None and self.statistics == "batch":
            raise ValueError(
                f"statistics='batch' keeps running ones of its own, at `rate`; got memory={self.memory} too: leave one out"
            )
        if self.leaning and self.memory is None:
            raise ValueError("leaning=True lets the state alone move with a `memory`, and there is none; give it one")

    def but(self, **changes) -> Recipe:
        """A copy with some fields changed, named after this one unless `name` is given."""
        return replace(self, **{"name": f"{self.name}*", **changes})

    def samples_read(self, bs: int, positions: int) -> int:
        """How many of a batch's `bs` samples, of `positions` elements a channel each, the statistics read."""
        if self.elements is None:
            return bs
        return min(bs, -(-self.elements // min(max(positions, 1), _POSITIONS_THAT_COUNT)))


_COURSE_CLAMP = Clamp()
# each number: the best of the cells measured so far at batch 1 to 512 (norm/README.md)
_DEFAULT = Recipe(
    "default",
    rate=rate_at_first,
    memory=Memory(),
    steady=Steady(),
    backward="averaged",
    kappa=0.25,
    elements=4096,
    clamp=_COURSE_CLAMP,
)

RECIPES = {
    r.name: r
    for r in (
        _DEFAULT,
        _DEFAULT.but(name="leaning", rate=rate_leading, memory=Memory(least=4, most=40, share=0.02), leaning=True),
        Recipe("course", rate=rate_course, clamp=_COURSE_CLAMP),
        Recipe(
            "skip-alternate",
            rate=rate_per_32_samples,
            skip=Skip(every=2, after=1000),
            clamp=Clamp(variance=None, deviation=0.1),
        ),
        Recipe("skip-tenth", rate=rate_course, skip=Skip(every=10, after=10_000), clamp=_COURSE_CLAMP),
        Recipe("detached", rate=rate_course, backward="detached"),
        Recipe("batch", rate=rate_fixed, statistics="batch"),
    )
}


class Plan(NamedTuple):
    """How one step is taken: what a backend needs beside tensors."""

    recipe: Recipe
    mom: float
    eps: float
    process_group: object = None
    recent: deque | None = None  # moments of the last forwards, for activation checkpointing
    twice: bool = False  # whether this forward may be run again by it


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or `recipe` itself. Raises ValueError with the nearest name for an unknown one."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        one_of("recipe", recipe, tuple(RECIPES))
    return RECIPES[recipe]
