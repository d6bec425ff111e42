"""The batches to validate or predict: a loader of whatever the caller has given."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset

from fastrbn.util import apply_to

from .batch import batch_size
from .unpack import Unpack

_SIZE = 64  # samples of a batch, if the learner's data do not say


@runtime_checkable
class _Array(Protocol):
    """NumPy's arrays, and what can be made one."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


def batches(data: Any, learn: Any, unpack: Unpack) -> Any:
    """The loader of `data`. For inputs alone, `unpack` then takes them as they are."""
    if data is None or hasattr(data, "valid_dl"):
        dl = getattr(learn.data if data is None else data, "valid_dl", None)
        if dl is None:
            raise ValueError(
                "the data have no validation loader (valid_dl is None): pass a loader, a Dataset or a batch"
            )
        return dl
    loaders = (getattr(learn.data, name, None) for name in ("valid_dl", "train_dl"))
    like = next((dl for dl in loaders if dl is not None), None)
    size = getattr(like, "batch_size", None) or _SIZE
    if isinstance(data, TorchDataset):
        same = {name: getattr(like, name) for name in ("collate_fn", "num_workers") if isinstance(like, DataLoader)}
        return _Converted(DataLoader(data, size, **same), like)
    if isinstance(data, (tuple, dict, _Array)):
        data = apply_to(data, _Array, functools.partial(_tensor, model=learn.model))
    if isinstance(data, Tensor):
        stored = getattr(like, "x", None)
        if data.dim() == 0 or (isinstance(stored, Tensor) and data.dim() == stored.dim() - 1):
            raise ValueError(
                f"predict takes samples along dimension 0; got shape {tuple(data.shape)}: for a single sample x pass "
                f"x[None]"
            )
        unpack.function = None  # it is for whole batches
        parts = data.split(size)
        return _Converted(parts, like) if data.dtype is torch.uint8 else parts
    if isinstance(data, list):  # of batches, which are of one kind; or a batch of a DataLoader, [x, y]
        kinds = {(item.dim(), item.dtype) if isinstance(item, Tensor) else type(item) for item in data}
        data = tuple(data) if len(kinds) > 1 else data
    if isinstance(data, (tuple, Mapping)):
        return _cut(data, size)
    if not hasattr(data, "__iter__") or isinstance(data, (str, bytes)):
        raise TypeError(
            f"the data must be a loader, a DataBunch, a Dataset, a tensor or array of samples, or a batch (a tuple or "
            f"dictionary); got {data!r}"
        )
    return data


def _tensor(array: Any, model: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    import numpy as np

    data = torch.from_numpy(np.ascontiguousarray(array))
    dtype = next((p.dtype for p in model.parameters()), data.dtype)
    return data.to(dtype) if data.is_floating_point() and dtype.is_floating_point else data  # NumPy's is float64


def _cut(batch: Any, size: int) -> list[Any]:
    return [
        apply_to(batch, Tensor, lambda t: t[i : i + size] if t.dim() else t)  # noqa: B023 - called at once
        for i in range(0, batch_size(batch), size)
    ]


class _Converted:
    """Raw batches as the loader `like` converts its own data, if it does: bytes to floats, normalised, transformed."""

    def __init__(self, dl: Any, like: Any):
        self.dl, self.convert = dl, getattr(like, "convert", None)
        self.dtype = getattr(getattr(like, "x", None), "dtype", None)

    def __len__(self) -> int:
        return len(self.dl)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.dl:
            if isinstance(batch, Tensor):
                yield self._of(batch)
            elif isinstance(batch, (tuple, list)):
                yield (self._of(batch[0]), *batch[1:])
            else:
                yield batch

    def _of(self, xb: Any) -> Any:
        return self.convert(xb) if self.convert and isinstance(xb, Tensor) and xb.dtype is self.dtype else xb


def warn_of_order(dl: Any) -> None:
    """Warn if the loader shuffles."""
    if getattr(dl, "shuffle", False) is True or isinstance(getattr(dl, "sampler", None), RandomSampler):
        warnings.warn(
            "this loader shuffles: the predictions, and the targets beside them, are in its order, not the data set's",
            stacklevel=4,
        )
