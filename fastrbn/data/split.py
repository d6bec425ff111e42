"""Splitting one labelled set into training and validation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import BadDataError

__all__ = ["check_valid", "split"]


def check_valid(valid: str | float) -> None:
    """Raise ValueError unless `valid` is "auto", "test" or a share between 0 and 1."""
    if valid in ("auto", "test") or isinstance(valid, float) and 0 < valid < 1:
        return
    raise ValueError(
        f"valid must be 'auto', 'test', or the share of training images to hold out, between 0 and 1; got {valid!r}."
    )


def split(y: Tensor, share: float, seed: int, classes: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    """Row numbers `(train, valid)`, int64 in random order, that hold out `share` of each class.

    At least one sample of each class is held out. `y` are int64 labels (N,); the split depends on `seed` and `y` only.
    `classes` are names for the message of the BadDataError that is raised if a class has one sample only.
    """
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=g)
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique().tolist():
        rows = order[y[order] == label]
        if len(rows) < 2:
            raise BadDataError(
                f"a split needs at least two samples of each class; class "
                f"{label if classes is None else repr(classes[label])} has {len(rows)}. "
                "Add samples, remove the class, or use separate train and valid folders."
            )
        held[rows[: min(max(round(len(rows) * share), 1), len(rows) - 1)]] = True
    return order[~held[order]], order[held[order]]
