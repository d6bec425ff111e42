"""Data in memory: a pair of tensors, and a loader that cuts batches from it by index.

Samples are not collated one by one. The order of an epoch is one permutation; a batch is an index_select (or a slice,
if unshuffled), then converted and transformed on the device. All randomness is a function of (seed, epoch, batch), so
an epoch can be resumed in the middle, bit for bit.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrbn.util import torchvision_parts, whole

from .per_image import PerImage, check_storage

__all__ = ["BatchLoader", "Dataset"]

Transforms = Callable[..., Tensor] | Sequence[Callable[..., Tensor]] | None


class Dataset(torch.utils.data.Dataset):
    """Pairs `(x[i], y[i])` of two sequences of equal length.

    Parameters
    ----------
    x, y : Tensor or sequence
        Inputs and targets. `get_dls` cuts batches directly from tensors.

    Raises
    ------
    ValueError
        If the lengths differ.

    Examples
    --------
    >>> ds = Dataset(torch.zeros(6, 784), torch.arange(6))
    >>> len(ds), ds[2][1]
    (6, tensor(2))

    References
    ----------
    fast.ai course notebook 03_minibatch_training.
    """

    def __init__(self, x: Any, y: Any) -> None:
        if len(x) != len(y):
            raise ValueError(
                f"Dataset needs as many targets as inputs; got {len(x)} inputs and {len(y)} targets. "
                "Slice both in the same way."
            )
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: Any) -> tuple[Any, Any]:
        return self.x[i], self.y[i]

    def __repr__(self) -> str:
        if isinstance(self.x, torch.Tensor) and isinstance(self.y, torch.Tensor):
            return f"Dataset(x={tuple(self.x.shape)} {self.x.dtype}, y={tuple(self.y.shape)} {self.y.dtype})"
        return f"Dataset({len(self)} samples)"


class BatchLoader:
    """Batches `(xb, yb)` cut by index from two tensors in memory.

    Nothing is copied sample by sample. The order of an epoch is copied to the device once; batches do not wait for it.
    Without shuffling, conversion and transforms a batch is a view of `x`: do not change it in place.

    Parameters
    ----------
    x : Tensor, shape (N, *)
        Inputs. uint8 is treated as images: each batch becomes float32 divided by 255.
    y : Tensor, shape (N, *)
        Targets.
    bs : int
        Samples per batch. The last batch may be smaller, see `drop_last`.
    shuffle : bool, default False
        Use a new order in every epoch; it depends on `seed` and the epoch only.
    seed : int, optional
        Seed of shuffling and random transforms. By default one is drawn from torch's global generator when the loader
        is made, so that `torch.manual_seed` repeats the run. With a seed, or with nothing random to do, the global
        generator is not used.
    drop_last : bool, default False
        Drop the last batch if it is smaller than `bs`.
    device : torch.device or str, optional
        Device to keep `x` and `y` on; by default where `x` is.
    normalize : (mean, std), optional
        Numbers, or sequences of one number per channel (dimension 1), on the 0-1 scale for uint8.
    tfms : callable or sequence of callables, optional
        Run on each batch, on the device and in this order. A transform of `torchvision.transforms.v2` is applied to
        each image, with draws of its own, before conversion and normalisation: to bytes, or to floats in 0-1. Functions
        after the last of them, or all if there is none, get the normalised batch; those before it get what it gets.

    Attributes
    ----------
    epoch : int
        Number, from 0, of the epoch that the next iteration runs. Starting an iteration adds one.

    Raises
    ------
    TypeError
        If `x` or `y` is not a tensor, or a transform is not callable.
    ValueError
        If the tensors do not fit together, no batch would result, or an option is invalid. Torchvision's transforms are
        tried on the first image.

    Examples
    --------
    >>> loader = BatchLoader(torch.arange(6.0).view(6, 1), torch.arange(6), bs=4)
    >>> [len(xb) for xb, yb in loader]
    [4, 2]
    >>> images = torch.full((8, 3, 4, 4), 255, dtype=torch.uint8)
    >>> xb, yb = next(iter(BatchLoader(images, torch.zeros(8), bs=8, normalize=(0.5, 0.5))))
    >>> xb.dtype, xb.max()
    (torch.float32, tensor(1.))
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        bs: int,
        shuffle: bool = False,
        seed: int | None = None,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        normalize: Any = None,
        tfms: Transforms = None,
    ) -> None:
        _check_pair(x, y)
        self.x, self.y, self.bs = x, y, whole("the batch size", bs)
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        if self.drop_last and len(x) < bs:
            raise ValueError(
                f"drop_last leaves no batch: there are {len(x)} samples and bs={bs}. "
                "Use a smaller bs or drop_last=False."
            )
        self.normalize = None if normalize is None else _check_normalize(x, *normalize)
        self.tfms = tfms
        if seed is None:
            seed = int(torch.randint(2**62, ())) if self.shuffle or self._random else 0
        self.seed, self.epoch = operator.index(seed), 0
        self.shard()
        self.to(x.device if device is None else device)

    @property
    def batch_size(self) -> int:
        """`bs`, under torch's name."""
        return self.bs

    @property
    def tfms(self) -> tuple[Callable[..., Tensor], ...]:
        """The transforms, in their order."""
        return self._tfms

    @tfms.setter
    def tfms(self, tfms: Transforms) -> None:
        self._tfms = _check_tfms(tfms)
        self._before, self._after = _split(self._tfms, self.x, self.normalize)
        self._random = any(getattr(t, "takes_generator", False) for t in (*self._before, *self._after))

    @property
    def dataset(self) -> Dataset:
        """The stored tensors, before conversion, on the loader's device."""
        return Dataset(self.x, self.y)

    @property
    def device(self) -> torch.device:
        """Device of the tensors and of the batches."""
        return self.x.device

    def to(self, device: torch.device | str) -> BatchLoader:
        """Move the tensors to `device` and return the loader.

        Random transforms draw different numbers on a different kind of device.
        """
        self.x, self.y = self.x.to(device), self.y.to(device)
        self._scale, self._shift = _affine(self.x, self.normalize)
        return self

    def shard(self, rank: int = 0, world: int = 1, even: bool = True) -> BatchLoader:
        """Restrict the loader to one process's part of each batch; without arguments, undo that.

        Together the parts of a step are the samples that one loader with batch size `world * bs` would give, in its
        order. Each part has `bs` samples; a short last batch is divided as evenly as possible. Random transforms draw
        different numbers in each part.

        Parameters
        ----------
        rank : int, default 0
            Which part, from 0.
        world : int, default 1
            Number of parts.
        even : bool, default True
            Give all parts equally many batches: a last batch with fewer samples than parts is left out, with a warning.
            False, for validation, leaves nothing out; some parts may then have one batch less.

        Returns
        -------
        BatchLoader
            The loader itself.

        Raises
        ------
        ValueError
            If `rank` is not in 0 to `world - 1`, or no batch is left.
        """
        rank, world = operator.index(rank), operator.index(world)
        if not 0 <= rank < world:
            raise ValueError(f"shard needs a rank from 0 to world - 1; got rank {rank} with world {world}.")
        least, left = self.bs * world if self.drop_last else world, len(self.x) % (self.bs * world)
        if even and len(self.x) < least:
            raise ValueError(
                f"a batch for {world} processes needs {least} samples; there are {len(self.x)}. "
                "Start fewer processes or use a smaller bs."
            )
        if even and 0 < left < world and not self.drop_last and rank == 0:
            warnings.warn(
                f"the last {left} samples of each epoch are not trained on: there are fewer of them than the "
                f"{world} processes, which step together",
                stacklevel=2,
            )
        self.rank, self.world, self._even = rank, world, bool(even)
        return self

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        full, left = divmod(len(self.x), self.bs * self.world)
        if self.drop_last or not left:
            return full
        return full + (left >= self.world if self._even else left > self.rank)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iter_from(0)

    def iter_from(self, batch_index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over epoch `self.epoch` from a given batch on; exactly the rest of the full epoch.

        The call adds one to `epoch`, as `iter(loader)` does. Skipped batches are not computed.

        Parameters
        ----------
        batch_index : int
            First batch, from 0. `len(loader)` gives an empty iterator.

        Returns
        -------
        Iterator of (Tensor, Tensor)

        Raises
        ------
        ValueError
            If the epoch has no such batch.
        """
        if not 0 <= batch_index <= len(self):
            raise ValueError(
                f"iter_from needs a batch number from 0 to {len(self)}, the number of batches; "
                f"got {batch_index}. Was the checkpoint made with another batch size?"
            )
        epoch, self.epoch = self.epoch, self.epoch + 1
        batches = self._cut(epoch, batch_index)
        if self._scale is None and not self.tfms:
            return batches
        return self._converted(batches, epoch, batch_index)

    def convert(self, x: Tensor) -> Tensor:
        """Other inputs as this loader's batches have them: on its device, converted, normalised and transformed.

        A loader that shuffles is for training, so its transforms are left out.

        Parameters
        ----------
        x : Tensor, shape (N, *)
            Inputs as they are stored, such as bytes.

        Returns
        -------
        Tensor
        """
        tfms = () if self.shuffle else self.tfms
        like = BatchLoader(x, x, max(len(x), 1), device=self.device, normalize=self.normalize, tfms=tfms)
        return next(iter(like))[0]

    def set_epoch(self, n: int) -> None:
        """Make the next iteration run epoch `n`, counted from 0."""
        if operator.index(n) < 0:
            raise ValueError(f"set_epoch needs an epoch number, 0 or more; got {n}.")
        self.epoch = operator.index(n)

    def state_dict(self, mid_epoch: bool = False) -> dict[str, int]:
        """`{"seed", "epoch"}`: everything that the order and the transforms depend on.

        Parameters
        ----------
        mid_epoch : bool, default False
            Return the epoch that was started last instead of the next one. Save it with the number of finished batches;
            `load_state_dict` and `iter_from(finished)` then continue at the same place.

        Returns
        -------
        dict of str to int
        """
        return {"seed": self.seed, "epoch": max(self.epoch - 1, 0) if mid_epoch else self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the seed and epoch from `state_dict()`. Raises ValueError if they are missing."""
        try:
            seed, epoch = operator.index(state["seed"]), operator.index(state["epoch"])
        except (KeyError, TypeError) as e:
            raise ValueError(
                f"a BatchLoader's state must hold the integers 'seed' and 'epoch'; got {state!r}. "
                "Pass what state_dict() returned."
            ) from e
        self.set_epoch(epoch)
        self.seed = seed

    def _cut(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches as stored, from batch `first` on."""
        x, y, cut = self.x, self.y, self._parts if self.world > 1 else self._wholes
        if first >= len(self):
            return
        if not self.shuffle:
            yield from zip(cut(x, first), cut(y, first))
            return
        # drawn on the CPU, so that the order does not depend on the device
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(mix(self.seed, epoch))).to(x.device)
        for rows in cut(order, first):
            yield x.index_select(0, rows), y.index_select(0, rows)

    def _wholes(self, t: Tensor, first: int) -> Iterable[Tensor]:
        """The rows of `t` in batches of `bs`."""
        return t[first * self.bs : min(len(self) * self.bs, len(t))].split(self.bs)

    def _parts(self, t: Tensor, first: int) -> Iterator[Tensor]:
        """This rank's part of each batch of `world * bs` rows of `t`."""
        size, n, count = self.bs * self.world, len(t), len(self)
        for start in range(first * size, count * size, size):
            least, more = divmod(min(size, n - start), self.world)
            begin = start + self.rank * least + min(self.rank, more)
            yield t[begin : begin + least + (self.rank < more)]

    def _converted(
        self, batches: Iterable[tuple[Tensor, Tensor]], epoch: int, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches converted to float, normalised and transformed."""
        scale, shift = self._scale, self._shift
        generator = torch.Generator(self.device) if self._random else None
        for i, (xb, yb) in enumerate(batches, first):
            if generator is not None:
                generator.manual_seed(mix(self.seed, epoch, i, *([self.rank] if self.rank else [])))
            for tfm in self._before:
                xb = _apply(tfm, xb, generator)
            if scale is not None:
                xb = xb.mul(scale)
                if shift is not None:
                    xb = xb.add_(shift)
            for tfm in self._after:
                xb = _apply(tfm, xb, generator)
            yield xb, yb

    def __repr__(self) -> str:
        extra = "" if self.world == 1 else f", part {self.rank} of {self.world}"
        if self.tfms:
            shown = (getattr(t, "__name__", None) or " ".join(repr(t).split()) for t in self.tfms)
            extra += f", tfms=({', '.join(shown)})"
        if self.normalize:
            extra += ", normalize=({}, {})".format(*([round(n, 4) for n in v] for v in self.normalize))
        return (
            f"BatchLoader({self.dataset}, bs={self.bs}, shuffle={self.shuffle}, seed={self.seed}, "
            f"drop_last={self.drop_last}, device={str(self.device)!r}{extra})"
        )


def mix(*numbers: int) -> int:
    """Hash several integers into one 64-bit seed, with the steps of the splitmix64 generator.

    Neighbouring inputs give unrelated seeds, also in the low 32 bits, which are all that torch's CPU generator uses.
    """
    mask, h = 2**64 - 1, 0
    for n in numbers:
        h = (h + n + 0x9E3779B97F4A7C15) & mask
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask
        h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
        h ^= h >> 31
    return h


def _affine(x: Tensor, normalize: Any) -> tuple[Tensor | None, Tensor | None]:
    """`(scale, shift)` such that x * scale + shift converts and normalises; None where not needed."""
    unit = 255.0 if x.dtype == torch.uint8 else 1.0
    if normalize is None:
        return (torch.tensor(1 / unit, dtype=torch.float32, device=x.device), None) if unit != 1 else (None, None)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in normalize)
    dtype = x.dtype if x.is_floating_point() else torch.float32
    shape = (-1,) + (1,) * (x.dim() - 2) if len(mean) > 1 else ()
    scale, shift = (v.to(x.device, dtype).reshape(shape) for v in (1 / (unit * std), -mean / std))
    return scale, shift


def _check_pair(x: Tensor, y: Tensor) -> None:
    for name, t in (("x", x), ("y", y)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(
                f"BatchLoader cuts batches from tensors; {name} is a {type(t).__name__}. "
                f"Pass torch.as_tensor({name}), or use torch's DataLoader for other data."
            )
        if t.dim() == 0:
            raise ValueError(f"BatchLoader needs one row per sample; {name} is a tensor without dimensions.")
    if len(x) != len(y):
        raise ValueError(
            f"BatchLoader needs as many targets as inputs; x has {len(x)} rows and y has {len(y)}. "
            "Slice both in the same way."
        )
    if len(x) == 0:
        raise ValueError(f"BatchLoader needs at least one sample; got x of shape {tuple(x.shape)}.")


def _check_tfms(tfms: Transforms) -> tuple[Callable[..., Tensor], ...]:
    tfms = () if tfms is None else (tfms,) if callable(tfms) else tuple(tfms)
    for t in tfms:
        if not callable(t):
            raise TypeError(f"tfms must be functions of a batch; got {t!r}.")
        if isinstance(t, type):
            raise TypeError(f"tfms must be functions of a batch; got the class {t.__name__}. Write {t.__name__}(…).")
    return tfms


def _split(
    tfms: tuple[Callable[..., Tensor], ...], x: Tensor, normalize: Any
) -> tuple[list[Callable[..., Tensor]], list[Callable[..., Tensor]]]:
    """The transforms that run before and after conversion and normalisation; torchvision's are tried on an image."""
    found = [torchvision_parts(t) for t in tfms]
    steps = [PerImage(t, i) if parts else t for i, (t, parts) in enumerate(zip(tfms, found), 1)]
    last = max((i for i, parts in enumerate(found, 1) if parts), default=0)
    if last:
        check_storage(x)
    if normalize is not None and any(type(part).__name__ == "Normalize" for parts in found for part in parts):
        raise ValueError(
            "images are normalised once; tfms contain v2.Normalize, and the loader normalises after them. Leave out "
            "v2.Normalize."
        )
    for step in steps:
        if isinstance(step, PerImage):
            step(x[:1], torch.Generator())
    return steps[:last], steps[last:]


def _apply(tfm: Callable[..., Tensor], xb: Tensor, generator: torch.Generator | None) -> Tensor:
    return tfm(xb, generator) if getattr(tfm, "takes_generator", False) else tfm(xb)


def _check_normalize(x: Tensor, mean: Any, std: Any) -> tuple[list[float], list[float]]:
    mean, std = (torch.as_tensor(v, dtype=torch.float64).reshape(-1).tolist() for v in (mean, std))
    channels = x.shape[1] if x.dim() > 1 else 1
    if len(mean) != len(std) or len(mean) not in (1, channels):
        raise ValueError(
            f"normalize needs (mean, std) with 1 or {channels} numbers each for x of shape "
            f"{tuple(x.shape)}; got {len(mean)} and {len(std)}."
        )
    if not all(abs(m) < float("inf") for m in mean) or not all(0 < s < float("inf") for s in std):
        raise ValueError(
            f"normalize needs finite means and positive, finite standard deviations; got mean={mean}, "
            f"std={std}. A constant channel cannot be normalised: drop it."
        )
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"normalize needs uint8 or floating-point x; got {x.dtype}. Convert it with x.float().")
    return mean, std
