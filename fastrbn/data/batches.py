"""Data in memory: a pair of tensors, and a loader that cuts batches from it by index.

Nothing is collated sample by sample. An epoch's order is one permutation; a batch is an index_select (or, unshuffled, a
slice), then conversion and transforms on the device. All randomness is a function of (seed, epoch, batch), so an epoch
can be taken up again in the middle, bit for bit.
"""

import operator
import warnings

import torch

__all__ = ["BatchLoader", "Dataset"]


class Dataset(torch.utils.data.Dataset):
    """Pairs `(x[i], y[i])`. (course: 03_minibatch_training)

    x, y: anything of equal length that can be indexed; with tensors, `get_dls` cuts batches in memory.
    ValueError when the lengths differ.
    """

    def __init__(self, x, y):
        if len(x) != len(y):
            raise ValueError(f"Dataset needs as many targets as inputs; got {len(x)} inputs and {len(y)} targets. "
                             "Cut both in the same way.")
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]

    def __repr__(self):
        if isinstance(self.x, torch.Tensor) and isinstance(self.y, torch.Tensor):
            return f"Dataset(x={tuple(self.x.shape)} {self.x.dtype}, y={tuple(self.y.shape)} {self.y.dtype})"
        return f"Dataset({len(self)} samples)"


class BatchLoader:
    """Batches `(xb, yb)` cut by index from two tensors of equal length that stay in memory, on the training device.

    x: (N, *), any dtype; uint8 is taken for images and becomes float32 / 255 batch by batch. y: (N, *).
    bs: samples a batch; the last batch may be smaller unless drop_last.
    shuffle: a new order every epoch, a function of (seed, epoch) alone.
    seed: an integer; None draws one from torch's global generator, now and once, so that `torch.manual_seed` repeats the
        run. With a seed, or with nothing random to do, the global generator is left alone.
    device: where x and y are moved; None leaves them where they are.
    normalize: (mean, std), numbers or one number per channel (dimension 1), on the scale of 0-1 for uint8;
        None leaves values as they are.
    tfms: callables run on each batch after that, on the device (see `fastrbn.data.transforms`).

    Without shuffle, conversion and tfms, batches are views of x: do not change them in place.

    `epoch` is the number, from 0, of the epoch that the next iteration will run; beginning one counts it.
    `shard` cuts each batch for one of several processes.
    ValueError or TypeError, saying what came, for tensors that do not fit together, nothing to iterate, or a bad option.
    """

    def __init__(self, x, y, bs, shuffle=False, seed=None, drop_last=False, device=None, normalize=None, tfms=None):
        _check_pair(x, y)
        self.x, self.y, self.bs = x, y, _check_bs(bs)
        self.shuffle, self.drop_last, self.tfms = bool(shuffle), bool(drop_last), _check_tfms(tfms)
        if self.drop_last and len(x) < bs:
            raise ValueError(f"drop_last leaves no batch of {len(x)} samples at bs={bs}. "
                             "Take a smaller bs, or drop_last=False.")
        self.normalize = None if normalize is None else _check_normalize(x, *normalize)
        self._random = any(getattr(t, "takes_generator", False) for t in self.tfms)
        if seed is None:
            seed = int(torch.randint(2**62, ())) if self.shuffle or self._random else 0
        self.seed, self.epoch = operator.index(seed), 0
        self.shard()
        self.to(x.device if device is None else device)

    batch_size = property(lambda self: self.bs, doc="The same as `bs`, under torch's name.")

    @property
    def dataset(self):
        """The stored tensors as a `Dataset`: before conversion, on the loader's device."""
        return Dataset(self.x, self.y)

    @property
    def device(self):
        """The device of the tensors, and so of the batches."""
        return self.x.device

    def to(self, device):
        """Move the tensors to `device`; returns the loader. Transforms draw other numbers on another kind of device."""
        self.x, self.y = self.x.to(device), self.y.to(device)
        self._scale, self._shift = _affine(self.x, self.normalize)
        return self

    def shard(self, rank=0, world=1, even=True):
        """Give part `rank` of `world` from now on; without arguments the whole again. Returns the loader.

        A step's samples are those that one loader with `world * bs` would give, in its order; each part has `bs` of
        them, in a short last batch as even a share as there is. Transforms draw other numbers for each part.
        even: True, all parts have equally many batches, and a last batch with fewer samples than parts is left out,
            with a warning; False (validation), none is left out, and some parts may have a batch less.
        ValueError for a rank that is not one of 0 to world - 1, and where no batch is left.
        """
        rank, world = operator.index(rank), operator.index(world)
        if not 0 <= rank < world:
            raise ValueError(f"shard takes a rank from 0 to world - 1; got rank {rank} of world {world}.")
        least, left = self.bs * world if self.drop_last else world, len(self.x) % (self.bs * world)
        if even and len(self.x) < least:
            raise ValueError(f"a batch for {world} processes needs {least} samples; there are {len(self.x)}. "
                             "Start fewer processes, or take a smaller bs.")
        if even and 0 < left < world and not self.drop_last and rank == 0:
            warnings.warn(f"an epoch's last {left} samples are left out of training: they are fewer than the {world} "
                          "processes, which step together", stacklevel=2)
        self.rank, self.world, self._even = rank, world, bool(even)
        return self

    def __len__(self):
        """The number of batches in an epoch."""
        full, left = divmod(len(self.x), self.bs * self.world)
        if self.drop_last or not left:
            return full
        return full + (left >= self.world if self._even else left > self.rank)

    def __iter__(self):
        return self.iter_from(0)

    def iter_from(self, batch_index):
        """Iterate over epoch `self.epoch` from batch `batch_index` (0-based) on: exactly the tail of the whole epoch.

        Like `iter(loader)` it counts the epoch as begun, at the call. Skipped batches cost nothing.
        ValueError when the epoch has no such batch; `len(loader)` is allowed and gives nothing.
        """
        if not 0 <= batch_index <= len(self):
            raise ValueError(f"iter_from takes a batch number from 0 to {len(self)}, the number of batches; "
                             f"got {batch_index}. Was the checkpoint made with another batch size?")
        epoch, self.epoch = self.epoch, self.epoch + 1
        batches = self._cut(epoch, batch_index)
        if self._scale is None and not self.tfms:
            return batches
        return self._converted(batches, epoch, batch_index)

    def set_epoch(self, n):
        """Let the next iteration be epoch `n`, counted from 0."""
        if operator.index(n) < 0:
            raise ValueError(f"set_epoch takes an epoch number from 0 on; got {n}.")
        self.epoch = operator.index(n)

    def state_dict(self, mid_epoch=False):
        """`{"seed", "epoch"}`, plain integers: all that the order and the transforms depend on.

        mid_epoch: False, the state for the next epoch; True, the epoch last begun: save it with the number of batches
        done, and `load_state_dict` followed by `iter_from(done)` continues where it was.
        """
        return {"seed": self.seed, "epoch": max(self.epoch - 1, 0) if mid_epoch else self.epoch}

    def load_state_dict(self, state):
        """Take over the seed and epoch of `state_dict`. ValueError when they are missing."""
        try:
            seed, epoch = operator.index(state["seed"]), operator.index(state["epoch"])
        except (KeyError, TypeError) as e:
            raise ValueError(f"a BatchLoader's state holds the integers 'seed' and 'epoch'; got {state!r}. "
                             "Pass what state_dict() returned.") from e
        self.set_epoch(epoch)
        self.seed = seed

    def _cut(self, epoch, first):
        """The epoch's batches as stored, from batch number `first` on."""
        x, y, cut = self.x, self.y, self._parts if self.world > 1 else self._wholes
        if first >= len(self):
            return
        if not self.shuffle:
            yield from zip(cut(x, first), cut(y, first))
            return
        # drawn on the CPU: the same order whatever the device
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(mix(self.seed, epoch))).to(x.device)
        for rows in cut(order, first):
            yield x.index_select(0, rows), y.index_select(0, rows)

    def _wholes(self, t, first):
        return t[first * self.bs : min(len(self) * self.bs, len(t))].split(self.bs)

    def _parts(self, t, first):
        """This rank's part of each batch of `world * bs` rows of `t`."""
        size, n, count = self.bs * self.world, len(t), len(self)
        for start in range(first * size, count * size, size):
            least, more = divmod(min(size, n - start), self.world)
            begin = start + self.rank * least + min(self.rank, more)
            yield t[begin : begin + least + (self.rank < more)]

    def _converted(self, batches, epoch, first):
        scale, shift = self._scale, self._shift
        generator = torch.Generator(self.device) if self._random else None
        for i, (xb, yb) in enumerate(batches, first):
            if scale is not None:
                xb = xb.mul(scale)
                if shift is not None:
                    xb = xb.add_(shift)
            if generator is not None:
                generator.manual_seed(mix(self.seed, epoch, i, *([self.rank] if self.rank else [])))
            for tfm in self.tfms:
                xb = tfm(xb, generator) if getattr(tfm, "takes_generator", False) else tfm(xb)
            yield xb, yb

    def __repr__(self):
        extra = "" if self.world == 1 else f", part {self.rank} of {self.world}"
        extra += "" if not self.tfms else f", tfms=({', '.join(getattr(t, '__name__', None) or repr(t) for t in self.tfms)})"
        if self.normalize:
            extra += ", normalize=({}, {})".format(*([round(n, 4) for n in v] for v in self.normalize))
        return (f"BatchLoader({self.dataset}, bs={self.bs}, shuffle={self.shuffle}, seed={self.seed}, "
                f"drop_last={self.drop_last}, device={str(self.device)!r}{extra})")


def mix(*numbers):
    """One 64-bit seed from several integers. Neighbours give unrelated seeds, also in their low 32 bits, which are all
    that torch's CPU generator uses. The steps are those of the splitmix64 generator."""
    mask, h = 2**64 - 1, 0
    for n in numbers:
        h = (h + n + 0x9E3779B97F4A7C15) & mask
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask
        h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
        h ^= h >> 31
    return h


def _affine(x, normalize):
    """`(scale, shift)` tensors such that x * scale + shift is the conversion asked for; None for what is not needed."""
    unit = 255.0 if x.dtype == torch.uint8 else 1.0
    if normalize is None:
        return (torch.tensor(1 / unit, dtype=torch.float32, device=x.device), None) if unit != 1 else (None, None)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in normalize)
    dtype = x.dtype if x.is_floating_point() else torch.float32
    shape = (-1,) + (1,) * (x.dim() - 2) if len(mean) > 1 else ()
    return tuple(v.to(x.device, dtype).reshape(shape) for v in (1 / (unit * std), -mean / std))


def _check_pair(x, y):
    for name, t in (("x", x), ("y", y)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"BatchLoader cuts batches from tensors; {name} is a {type(t).__name__}. "
                            f"Pass torch.as_tensor({name}), or use torch's DataLoader for other data.")
        if t.dim() == 0:
            raise ValueError(f"BatchLoader needs one row a sample; {name} is a tensor without dimensions.")
    if len(x) != len(y):
        raise ValueError(f"BatchLoader needs as many targets as inputs; got x of {len(x)} and y of {len(y)} rows. "
                         "Cut both in the same way.")
    if len(x) == 0:
        raise ValueError(f"BatchLoader needs at least one sample; got x of shape {tuple(x.shape)}.")


def _check_bs(bs):
    if isinstance(bs, bool) or not hasattr(bs, "__index__") or bs < 1:
        raise ValueError(f"the batch size must be an integer of at least 1; got {bs!r}.")
    return operator.index(bs)


def _check_tfms(tfms):
    tfms = () if tfms is None else (tfms,) if callable(tfms) else tuple(tfms)
    for t in tfms:
        if not callable(t):
            raise TypeError(f"tfms are functions of a batch; got {t!r}.")
    return tfms


def _check_normalize(x, mean, std):
    mean, std = (torch.as_tensor(v, dtype=torch.float64).reshape(-1).tolist() for v in (mean, std))
    channels = x.shape[1] if x.dim() > 1 else 1
    if len(mean) != len(std) or len(mean) not in (1, channels):
        raise ValueError(f"normalize takes (mean, std) of 1 or {channels} numbers each, for x of shape "
                         f"{tuple(x.shape)}; got {len(mean)} and {len(std)}.")
    if not all(abs(m) < float("inf") for m in mean) or not all(0 < s < float("inf") for s in std):
        raise ValueError(f"normalize needs finite means and positive, finite standard deviations; got mean={mean}, "
                         f"std={std}. A channel that is constant cannot be normalised: drop it.")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"normalize takes uint8 or floating x; got {x.dtype}. Convert it: x.float().")
    return mean, std
