"""Splitting one labelled set into training and validation."""

import torch

from .errors import BadDataError

__all__ = ["check_valid", "split"]


def check_valid(valid):
    """ValueError unless `valid` is "auto", "test" or a share between 0 and 1."""
    if valid in ("auto", "test") or isinstance(valid, float) and 0 < valid < 1:
        return
    raise ValueError(f"valid is 'auto', 'test', or the share of training images to hold out, between 0 and 1; got "
                     f"{valid!r}.")


def split(y, share, seed, classes=None):
    """Row numbers `(train, valid)`, both int64 in random order, that hold out `share` of each class, at least one of
    it.

    y: int64 labels (N,). seed: the split is a function of it and of y. BadDataError when a class has one sample only;
    `classes`, their names, makes the message clearer.
    """
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=g)
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique().tolist():
        rows = order[y[order] == label]
        if len(rows) < 2:
            raise BadDataError(f"a split needs two samples of each class; class "
                               f"{label if classes is None else repr(classes[label])} has {len(rows)}. Add some, remove "
                               "the class, or lay out train and valid folders.")
        held[rows[:min(max(round(len(rows) * share), 1), len(rows) - 1)]] = True
    return order[~held[order]], order[held[order]]
