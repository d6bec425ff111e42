"""The modules RunningBatchNorm and RunningBatchNorm1d, 2d and 3d."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from fastrbn.util import one_of, whole

from .choose import BACKENDS, choose
from .functional import as_leaf, check_input, running_batch_norm
from .groups import merge_over_ranks
from .recipes import Recipe, get_recipe
from .reference import NormState
from .replay import REMEMBERED, Step

ADDITIONS = tuple(
    name for name in NormState._fields if name not in ("running_mean", "running_var", "num_batches_tracked")
)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_OLD_ENOUGH = 20  # samples that a layer with imported statistics counts as having seen at least, so no early clamp


class RunningBatchNorm(_BatchNorm):
    """Batch norm that normalises with running statistics during training too, at every batch size down to one.

    Training and evaluation use the same statistics (except with the recipe `batch`, which trains on the batch's own).
    Input and output have shape (N, C, *), any rank from 2, floating dtype and memory format; N = 0 passes through. A
    batch that contains NaN or Inf leaves the statistics unchanged.

    The buffers are nn.BatchNorm's `running_mean`, `running_var` (biased here) and `num_batches_tracked`, and what the
    running average needs beside them. Checkpoints of nn.BatchNorm load. Statistics stay float32 under any half
    precision and are float64 in a float64 layer.

    The layer is an `nn.modules.batchnorm._BatchNorm`, so code that looks for batch norms, to freeze them, to exclude
    them from weight decay or to keep them in float32 (FSDP), finds it. Functions that replace batch norms, such as
    `nn.SyncBatchNorm.convert_sync_batchnorm`, replace it too; set `process_group` instead.

    Parameters
    ----------
    nf : int
        Number of channels C.
    mom : float, default 0.1
        How fast the statistics move, with PyTorch's meaning: 0.1 gives the *new* values a weight of a tenth (Keras and
        the papers write 0.9 for it). The recipe turns it into a rate for each batch size: `default` uses
        bs/(bs + memory), where the memory is a twentieth of the samples seen, from 2/mom to 30/mom (20 to 300); `batch`
        uses mom itself, like nn.BatchNorm.
    eps : float, default 1e-5
        Added to the variance.
    affine : bool, default True
        Learn a scale `weight` and a shift `bias`, both (C,).
    recipe : str or Recipe, default "default"
        How statistics are averaged; a name from `RECIPES` or a `Recipe`.
    device, dtype : optional
        Of the parameters, as in torch.nn.
    process_group : optional
        Merge the statistics over the ranks of this group. Every rank must run every training forward and backward.
    backend : {"auto", "native", "fused", "reference", "triton"}, default "auto"
        Implementation; `explain(x)` says which one is used.
    momentum : float or None, default None
        Another name for `mom`. None, which is the cumulative average in nn.BatchNorm, means 0.1 here, since statistics
        that reach back to the first batch are too old to train with.
    track_running_stats : bool, default True
        Accepted for compatibility; False raises ValueError.
    bias : bool, default True
        With False, learn only the scale.

    Raises
    ------
    ValueError
        For a setting outside its range, and in `forward` for input of a wrong rank, number of channels or dtype.

    Notes
    -----
    *Gradient accumulation.* Every micro-batch counts as a batch: its forward pass moves the statistics, its backward
    pass the averages of the gradient. The accumulated gradient is the sum over the micro-batches, as if they had been
    stepped one after the other with the weights held.

    *Setting `layer.momentum`.* After `layer.momentum = None` the statistics are the exact ones of all batches since
    `reset_running_stats()`; they also normalise, and the gradient treats them as constants. This is how
    `torch.optim.swa_utils.update_bn` works here (see also `recompute_statistics`). With `layer.momentum = 0` training
    steps leave the statistics unchanged. Setting a statistic to None, as
    `torch.func.replace_all_batch_norm_modules_` does, raises ValueError.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), RunningBatchNorm(8))
    >>> net(torch.randn(1, 1, 28, 28)).shape   # a batch of one trains
    torch.Size([1, 8, 26, 26])
    >>> net[2]
    RunningBatchNorm(8, mom=0.1, eps=1e-05, affine=True, recipe=default)

    References
    ----------
    fast.ai course, part 2 (2019), notebook 07, and the forum thread "Running batch norm tweaks". The averaged backward
    follows Moving Average Batch Normalization (ICLR 2020). The equations are in `norm/reference.py`.
    """

    running_count: Tensor
    num_samples_tracked: Tensor
    running_grad: Tensor
    running_grad_weight: Tensor
    _recent: deque[Step]
    _ranks: tuple[int, ...] = ()
    _momentum: tuple = ()  # (None,) or (0,) after momentum was set to that; `mom` keeps its value

    def __init__(
        self,
        nf: int,
        mom: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        recipe: str | Recipe = "default",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
        backend: str = "auto",
        *,
        momentum: float | None = None,
        track_running_stats: bool = True,
        bias: bool = True,
    ):
        nn.Module.__init__(self)  # not _BatchNorm's, which gives the statistics the parameters' dtype
        mom = mom if momentum is None else momentum
        _check_settings(type(self).__name__, nf, mom, eps, affine, bias, dtype)
        one_of("backend", backend, BACKENDS)
        self.num_features, self.mom, self.eps, self.affine = nf, mom, eps, affine
        self.track_running_stats = track_running_stats
        self.recipe, self.process_group, self.backend = get_recipe(recipe), process_group, backend
        self.frozen, self._recent = False, deque(maxlen=REMEMBERED)
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            param = nn.Parameter(torch.empty(nf, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, param)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for name, value in NormState.new(nf, device=device, dtype=wide)._asdict().items():
            self.register_buffer(name, value)
        self.reset_parameters()

    @property
    def state(self) -> NormState:
        """The buffers as a `NormState`, for `running_batch_norm`."""
        buffers: dict[str, Any] = self._buffers
        return NormState(*[buffers[name] for name in NormState._fields])

    @property
    def momentum(self) -> float | None:  # type: ignore[override]  # an attribute of _BatchNorm
        """`mom`; set it to None for exact cumulative statistics, or to 0 to keep the statistics as they are."""
        return self._momentum[0] if self._momentum else self.mom

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        if value is None or (value == 0 and not isinstance(value, bool)):
            self._momentum = (value,)
            return
        _check_mom(value)
        self.mom, self._momentum = value, ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "track_running_stats" and value is not True or value is None and name in _STATISTICS:
            raise ValueError(
                f"{type(self).__name__} normalises with its running statistics, also in training, and cannot do "
                f"without; got {name}={value!r}: use nn.BatchNorm, or nn.GroupNorm to normalise each sample by itself"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_leaf(self, x)
        check_input(x, self.num_features, self._ranks, type(self).__name__)
        state, training = self.state, self.training and not self.frozen
        if training and self._momentum:
            if self.momentum == 0:
                state = NormState(*(buffer.clone() for buffer in state))
            else:
                self._collect(x)
                training = False
        return running_batch_norm(
            x,
            state,
            self.weight,
            self.bias,
            training=training,
            mom=self.mom,
            eps=self.eps,
            recipe=self.recipe,
            process_group=self.process_group,
            backend=self.backend,
            recent=None if torch.compiler.is_compiling() or self._momentum else self._recent,
        )

    @torch.no_grad()
    def _collect(self, x: Tensor) -> None:
        """Merge x into the exact statistics of all batches since `reset_running_stats`.

        `running_count` is here the mean number of elements of the batches so far. With `num_batches_tracked` 0 there
        were none, whatever the other buffers hold.
        """
        bs: int | Tensor
        n: int | Tensor
        state, bs, n = self.state, x.shape[0], x.numel() // self.num_features
        m, v = batch_moments(x, state.running_mean.dtype)
        if self.process_group is not None:
            m, v, n, bs = merge_over_ranks(m, v, n, bs, self.process_group)
        moves = v.sum().isfinite() & (n > 0)
        mean_n = torch.where(state.running_count < 0, n, state.running_count)
        before = mean_n * state.num_batches_tracked
        share = torch.where(moves, n / (before + n), 0.0)
        off = torch.where(moves, m - state.running_mean, 0.0)
        state.running_var.add_(
            share * torch.where(moves, v - state.running_var, 0.0) + share * (1 - share) * off.square()
        )
        state.running_mean.add_(share * off)
        state.num_samples_tracked.add_((moves * bs).to(torch.int64))
        state.num_batches_tracked.add_(moves)
        moved = (before + n) / state.num_batches_tracked.clamp_min(1)
        state.running_count.copy_(torch.where(moves, moved, state.running_count))

    def freeze(self) -> RunningBatchNorm:
        """Fix the statistics: the layer normalises as in evaluation from now on, also after `train()`.

        Weight and bias stay trainable; use `requires_grad_(False)` to stop them. Returns the layer.
        """
        self.frozen = True
        return self

    def unfreeze(self) -> RunningBatchNorm:
        """Undo `freeze`. Returns the layer."""
        self.frozen = False
        return self

    def explain(self, x: Tensor) -> str:
        """Say in a sentence which backend the layer would use for `x` in its present mode, and why."""
        recipe = self.recipe if self.training and not self.frozen else None
        choice = choose(x, self.state, self.weight, self.bias, recipe, self.process_group, self.backend)
        return f"{choice.name}: {choice.why}"

    def reset_running_stats(self) -> None:
        """Reset the statistics to mean 0, variance 1 and counts of 0. A frozen layer keeps its own."""
        if self.frozen:
            return
        for name, buffer in self.state._asdict().items():
            buffer.fill_(1 if name == "running_var" else 0)

    def reset_parameters(self) -> None:
        """Reset statistics, scale and shift."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        bias = ", bias=False" if self.affine and self.bias is None else ""
        momentum = f", momentum={self.momentum}" if self._momentum else ""
        frozen = ", frozen" if self.frozen else ""
        return (
            f"{self.num_features}, mom={self.mom}, eps={self.eps}, affine={self.affine}{bias}, "
            f"recipe={self.recipe.name}{momentum}{frozen}"
        )

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}; got {self}: script to_batchnorm(model.eval()), "
            "which gives the same output, or use torch.jit.trace or torch.export"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": deque(maxlen=REMEMBERED)}  # a copy has no batches in flight

    def __deepcopy__(self, memo: dict) -> RunningBatchNorm:
        memo[id(self.process_group)] = self.process_group  # a process group cannot be copied, so the copy shares it
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def _apply(self, fn, recurse=True):
        # half() and bfloat16() convert only the parameters: sums in half precision would lose the statistics
        self._recent.clear()  # the steps have the old device and dtype
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype.is_floating_point and new.dtype not in (torch.float32, torch.float64):
                self._buffers[name] = old.to(new.device)
        return self

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._recent = deque(maxlen=REMEMBERED)  # each device has its own batches in flight
        return replica

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        mean, var = (state_dict.get(f"{prefix}{name}") for name in ("running_mean", "running_var"))
        for name, value in (("running_mean", mean), ("running_var", var)):
            if value is not None and value.dtype in (torch.float16, torch.bfloat16):  # load_state_dict(assign=True)
                state_dict[f"{prefix}{name}"] = value.to(self._buffers[name].dtype)
        # A checkpoint of nn.BatchNorm has mean, variance and perhaps a count of batches; the other buffers are reset.
        # A count of −1 keeps the next batch from replacing imported statistics. Without a count of batches, statistics
        # count as imported unless they are 0 and 1 throughout
        if mean is not None and var is not None and not any(f"{prefix}{name}" in state_dict for name in ADDITIONS):
            batches = state_dict.get(f"{prefix}num_batches_tracked")
            seen = 0 if batches is None or mean.is_meta else int(batches)
            fresh = mean.is_meta or (seen == 0 and not mean.any() and bool((var == 1).all()))
            for name in ADDITIONS:
                state_dict[f"{prefix}{name}"] = torch.zeros_like(self._buffers[name], device=mean.device)
            state_dict[f"{prefix}running_count"].fill_(0 if fresh else -1)
            state_dict[f"{prefix}num_samples_tracked"].fill_(0 if fresh else max(_OLD_ENOUGH, seen))
            if batches is None:
                state_dict[f"{prefix}num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=mean.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)


class _Ranked(RunningBatchNorm):
    """RunningBatchNorm with nn.BatchNorm's argument order and rank check."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        mom: float = 0.1,
        **settings: Any,
    ):
        super().__init__(num_features, mom, eps, affine, **settings)


class RunningBatchNorm1d(_Ranked):
    """Drop-in replacement for nn.BatchNorm1d that normalises with running statistics in training too.

    Input and output have shape (N, C) or (N, C, L); any other rank raises ValueError.

    Parameters
    ----------
    num_features, eps, affine, mom, **settings
        As in `RunningBatchNorm`, in nn.BatchNorm1d's order. `momentum` is another name for `mom`.

    Examples
    --------
    >>> RunningBatchNorm1d(3)(torch.randn(1, 3, 16)).shape   # a batch of one trains
    torch.Size([1, 3, 16])
    """

    _ranks = (2, 3)


class RunningBatchNorm2d(_Ranked):
    """Drop-in replacement for nn.BatchNorm2d that normalises with running statistics in training too.

    Input and output have shape (N, C, H, W); any other rank raises ValueError.

    Parameters
    ----------
    num_features, eps, affine, mom, **settings
        As in `RunningBatchNorm`, in nn.BatchNorm2d's order. `momentum` is another name for `mom`.

    Examples
    --------
    >>> RunningBatchNorm2d(3)(torch.randn(1, 3, 8, 8)).shape   # a batch of one trains
    torch.Size([1, 3, 8, 8])
    """

    _ranks = (4,)


class RunningBatchNorm3d(_Ranked):
    """Drop-in replacement for nn.BatchNorm3d that normalises with running statistics in training too.

    Input and output have shape (N, C, D, H, W); any other rank raises ValueError.

    Parameters
    ----------
    num_features, eps, affine, mom, **settings
        As in `RunningBatchNorm`, in nn.BatchNorm3d's order. `momentum` is another name for `mom`.

    Examples
    --------
    >>> RunningBatchNorm3d(3)(torch.randn(1, 3, 4, 8, 8)).shape   # a batch of one trains
    torch.Size([1, 3, 4, 8, 8])
    """

    _ranks = (5,)


def batch_moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel over all of x (N, C, *), in `dtype`; zeros if x is empty."""
    dims = [d for d in range(x.dim()) if d != 1]
    if x.numel() == 0:
        return (zero := torch.zeros(x.shape[1], dtype=dtype, device=x.device)), zero.clone()
    v, m = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dims, correction=0)
    return m.to(dtype), v.to(dtype)


def _check_mom(mom: Any) -> None:
    if isinstance(mom, bool) or not isinstance(mom, (int, float)) or not 0 < mom <= 1:
        raise ValueError(f"mom is the weight of the new batch, above 0 and at most 1; got {mom!r}")


def _check_settings(layer: str, nf: Any, mom: Any, eps: Any, affine: Any, bias: Any, dtype: Any) -> None:
    whole(f"{layer}: the number of channels", nf)
    _check_mom(mom)
    if not eps > 0:
        raise ValueError(f"eps is added to the variance and must be above 0; got {eps!r}: use the usual 1e-5")
    if not isinstance(affine, bool):
        raise ValueError(
            f"affine must be True or False; got {affine!r}: momentum, the third argument of nn.BatchNorm, must be "
            f"given by name here, as momentum={affine!r}"
        )
    if not isinstance(bias, bool):
        raise ValueError(f"bias must be True or False; got {bias!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{layer} needs a floating-point dtype; got {dtype}")
