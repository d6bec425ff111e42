"""Recipes: the averaging rate of the running statistics, when they move, and how the gradient treats them.

A recipe is a handful of numbers. `norm/README.md` derives what they do; `RECIPES` lists the named ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fastrbn.util import is_number, one_of, whole

# (mom, batch size, samples seen before this batch) -> averaging rate in (0, 1]. The two counts may be tensors of shape
# (), which keeps the host from waiting for the device; a rate is therefore plain arithmetic
Rate = Callable[[float, Any, Any], Any]

_SAMPLES_AT_LEAST = 16  # read even if `elements` asks for fewer: neighbouring positions of a sample are correlated


def at_least_one(n: Any) -> Any:
    """max(n, 1) of a number or a tensor."""
    return n.clamp_min(1) if isinstance(n, torch.Tensor) else max(n, 1)


def rate_fixed(mom: float, bs: Any, samples: Any) -> float:
    """λ = mom at every batch size: nn.BatchNorm's `momentum`."""
    return mom


def rate_course(mom: float, bs: Any, samples: Any) -> Any:
    """λ = 1 − (1−mom)/√(bs−1): the course's rule (part 2, 2019, notebook 07). A batch of one uses √1."""
    return 1 - (1 - mom) / at_least_one(bs - 1) ** 0.5


def rate_per_32_samples(mom: float, bs: Any, samples: Any) -> Any:
    """λ = 1 − (1−mom)^(bs/32): 32 samples together have the weight mom (forum thread "Running batch norm tweaks")."""
    return 1 - (1 - mom) ** (bs / 32)


@dataclass(frozen=True)
class Memory:
    """Averaging rate λ = bs/(bs + memory): the batch size against a memory, in samples, that grows during training.

    The memory is a fixed share of the samples seen so far, kept between two bounds that `mom` scales. With the defaults
    and mom 0.1 it is a twentieth, between 20 samples (up to 400 seen) and 300 samples (from 6,000 seen). Weights move
    fast at the start, where a long memory would lag behind; later, a long memory has less noise. `norm/README.md` has
    the measurements.

    Parameters
    ----------
    least : float, default 2
        Lower bound of the memory times mom.
    most : float, default 30
        Upper bound of the memory times mom; may be infinite.
    share : float, default 0.05
        Share of the samples seen so far; 0 keeps the memory at its lower bound.

    Raises
    ------
    ValueError
        Unless 0 < least <= most and 0 <= share, with `least` and `share` finite.

    Examples
    --------
    >>> from fastrbn.norm import Memory
    >>> Memory()(0.1, 8, 0)   # mom, batch size, samples seen: 8/(8 + 20)
    0.2857142857142857
    >>> recipe = RECIPES["default"].but(rate=Memory(most=100))
    """

    least: float = 2
    most: float = 30
    share: float = 0.05

    def __post_init__(self) -> None:
        inf, numbers = float("inf"), (self.least, self.most, self.share)
        if not all(map(is_number, numbers)) or not (
            0 < self.least <= self.most and self.least < inf and 0 <= self.share < inf
        ):
            raise ValueError(
                f"Memory needs numbers: `least` above 0, `most` at least `least`, `share` 0 or more, and only `most` "
                f"may be infinite; got {self}"
            )

    def bounds(self, mom: float) -> tuple[float, float, float]:
        """Smallest and largest memory in samples at this `mom`, and the share."""
        return self.least / mom, self.most / mom, self.share

    def __call__(self, mom: float, bs: Any, samples: Any) -> Any:
        least, most, share = self.bounds(mom)
        memory = share * samples
        if isinstance(memory, torch.Tensor):
            return bs / (bs + memory.clamp(least, most))
        return bs / (bs + min(max(memory, least), most))


@dataclass(frozen=True)
class Skip:
    """Leave the statistics as they are on every iteration that is a multiple of `every`.

    Parameters
    ----------
    every : int
        1 or more. Iterations count from 1.
    after : int
        Skipping starts once more than this many samples were seen, the present batch included; 0 or more.

    Raises
    ------
    ValueError
        If `every` is not a whole number from 1, or `after` not a number from 0.

    Examples
    --------
    >>> from fastrbn.norm import Skip
    >>> Skip(every=10, after=1000).now(samples=2000, iteration=20)
    True
    """

    every: int
    after: int

    def __post_init__(self) -> None:
        whole("Skip: `every`, the period in iterations,", self.every)
        if not (is_number(self.after) and self.after >= 0):
            raise ValueError(
                f"Skip: `after` is the number of samples seen before the first skip, 0 or more; got {self.after!r}"
            )

    def now(self, samples: Any, iteration: Any) -> Any:
        """Decide whether to skip; both counts include the present batch and may be numbers or tensors."""
        return (samples > self.after) & (iteration % self.every == 0)


@dataclass(frozen=True)
class Clamp:
    """Keep the variance that normalises above a floor while the layer has seen few samples.

    It applies in training only, and not to the state. Where the floor holds, no gradient flows through the variance.

    Parameters
    ----------
    samples : int, default 20
        The floor holds while fewer samples than this were seen, the present batch included; 0 or more.
    variance : float or None, default 0.01
        Floor of the variance V, before ε is added.
    deviation : float or None, default None
        Floor of √(V+ε) instead; set `variance=None` with it.

    Raises
    ------
    ValueError
        If `samples` is not a number from 0, or unless exactly one floor is a number from 0 and the other None.

    Examples
    --------
    >>> from fastrbn.norm import Clamp
    >>> round(Clamp(variance=None, deviation=0.1).floor(eps=1e-5), 5)
    0.00999
    """

    samples: int = 20
    variance: float | None = 0.01
    deviation: float | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.samples) and self.samples >= 0):
            raise ValueError(
                f"Clamp: `samples` is the number of samples up to which the floor holds, 0 or more; "
                f"got {self.samples!r}"
            )
        floors = [floor for floor in (self.variance, self.deviation) if floor is not None]
        if len(floors) != 1 or not (is_number(floors[0]) and floors[0] >= 0):
            raise ValueError(
                f"Clamp needs one floor, 0 or more: `variance`, or `deviation` with variance=None; got "
                f"variance={self.variance!r}, deviation={self.deviation!r}"
            )

    def floor(self, eps: float) -> float:
        """The floor of the variance V, for this `eps`."""
        if self.variance is None:
            return self.deviation**2 - eps  # type: ignore[operator]  # exactly one of the two is None
        return self.variance


@dataclass(frozen=True)
class Recipe:
    """The settings that tell one kind of running batch norm from another.

    `RECIPES` holds the named ones; layers take either a name or a `Recipe`. Use `but` to change a field.

    Parameters
    ----------
    name : str
        Shown in `repr`, summaries and messages.
    rate : callable, default Memory()
        Averaging rate λ in (0, 1] as a function of (mom, batch size, samples seen before).
    statistics : {"running", "batch"}, default "running"
        Statistics that normalise in training. "batch" is nn.BatchNorm's way: the batch's own, with running ones for
        evaluation.
    backward : {"exact", "averaged", "detached"}, default "exact"
        How the gradient treats the statistics. "exact" differentiates through the batch's share a of them. "averaged"
        projects the gradient as a norm over many samples would, partly by this batch's reductions and partly by running
        averages of earlier ones. "detached" treats the statistics as constants.
    elements : int or None, default None
        In a large batch, read whole samples for the statistics until they have this many elements per channel, and at
        least 16 samples. None reads all.
    order : {"first", "strided"}, default "first"
        Samples that `elements` reads: the first ones, which are contiguous in memory and right for shuffled batches, or
        evenly spread ones, for batches sorted by class or time.
    skip : Skip or None, default None
        Iterations on which the statistics stay as they are.
    clamp : Clamp or None, default None
        Floor of the variance early in training.

    Raises
    ------
    ValueError
        If a value breaks its rule; the message names it.

    Examples
    --------
    >>> recipe = RECIPES["default"].but(name="half", elements=2048)
    >>> RunningBatchNorm(8, recipe=recipe)
    RunningBatchNorm(8, mom=0.1, eps=1e-05, affine=True, recipe=half)
    """

    name: str
    rate: Rate = Memory()
    statistics: str = "running"
    backward: str = "exact"
    elements: int | None = None
    order: str = "first"
    skip: Skip | None = None
    clamp: Clamp | None = None

    def __post_init__(self) -> None:
        one_of("statistics", self.statistics, ("running", "batch"))
        one_of("backward", self.backward, ("exact", "averaged", "detached"))
        one_of("order", self.order, ("first", "strided"))
        if not callable(self.rate):
            raise ValueError(
                f"rate must be a function of (mom, batch size, samples seen before) or a Memory; got {self.rate!r}"
            )
        if self.skip is not None and self.statistics == "batch":
            raise ValueError(
                f"a skipped step normalises with the running statistics, which statistics='batch' does not; got both, "
                f"with {self.skip}: leave one of them out"
            )
        if self.elements is not None and not (is_number(self.elements, int) and self.elements >= 1):
            raise ValueError(
                f"elements must be a whole number of elements per channel, 1 or more, or None for all; "
                f"got {self.elements!r}"
            )
        for kind, value in ((Skip, self.skip), (Clamp, self.clamp)):
            if not isinstance(value, (kind, type(None))):
                raise ValueError(f"{kind.__name__.lower()} must be a {kind.__name__} or None; got {value!r}")

    def but(self, **changes: Any) -> Recipe:
        """Return a copy with these fields changed. Its name is this one's with a `*`, unless `name` is given."""
        return replace(self, **{"name": f"{self.name}*", **changes})

    @property
    def plain_only(self) -> bool:
        """True if only `reference.py` implements it: the recipes of the course and the thread, and nn.BatchNorm's."""
        return self.backward != "averaged" or self.statistics == "batch" or self.skip is not None

    def rates(self, mom: float, bs: Any, samples: Any) -> tuple[Any, Any]:
        """λ for this batch, and what it would be before the first sample.

        Raises ValueError unless both are in (0, 1]. Values in tensors are not checked: that would wait for the device.
        """
        rates = self.rate(mom, bs, samples), self.rate(mom, bs, 0)
        if not torch.compiler.is_compiling():
            for rate, seen in zip(rates, (samples, 0), strict=True):
                if not (isinstance(rate, (torch.Tensor, torch.SymFloat)) or (is_number(rate) and 0 < rate <= 1)):
                    raise ValueError(
                        f"a recipe's rate must return a number in (0, 1]; that of '{self.name}' gave {rate!r} at mom "
                        f"{mom}, batch size {bs}, after {seen} samples. To keep the statistics as they are, "
                        f"freeze() the layer"
                    )
        return rates

    def samples_read(self, bs: int, positions: int) -> int:
        """Number of samples the statistics read of a batch of `bs` with `positions` elements per channel each."""
        if self.elements is None:
            return bs
        return min(bs, max(_SAMPLES_AT_LEAST, -(-self.elements // max(positions, 1))))


_COURSE_CLAMP = Clamp()

RECIPES = {
    r.name: r
    for r in (
        Recipe("default", backward="averaged", clamp=_COURSE_CLAMP),
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
    """Settings of one training step: everything a backend needs beside tensors."""

    recipe: Recipe
    mom: float
    eps: float
    process_group: Any = None
    recent: deque | None = None  # the last steps, for activation checkpointing
    twice: bool = False  # whether activation checkpointing may run this forward again


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Return the recipe of that name, or `recipe` itself. ValueError for an unknown name suggests the closest."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        one_of("recipe", recipe, tuple(RECIPES))
    return RECIPES[recipe]
