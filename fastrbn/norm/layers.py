"""RunningBatchNorm and its 1d, 2d, 3d forms: the state, and what users do to a layer around its forward pass."""

from __future__ import annotations

import copy
from collections import deque

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from fastrbn.util import one_of

from .choose import BACKENDS, choose
from .functional import as_leaf, check_input, running_batch_norm
from .groups import merge_over_ranks
from .recipes import Recipe, get_recipe
from .reference import NormState
from .replay import REMEMBERED

ADDITIONS = tuple(
    name for name in NormState._fields if name not in ("running_mean", "running_var", "num_batches_tracked")
)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_OLD_ENOUGH = 20  # samples a layer with a past is taken to have seen at least: no early clamp


class RunningBatchNorm(_BatchNorm):
    """Batch norm that normalises with running statistics while it trains: right at every batch size, one included.

    Input and output: (N, C, *), any rank from 2, any floating dtype and memory format; N = 0 passes through.

    - `nf`: C, the number of channels.
    - `mom` (0.1): how fast the statistics move, in PyTorch's sense: 0.1 means that the *new* values weigh a tenth
      (Keras and the papers write 0.9 for it). How a batch size turns it into a rate is the recipe's: `default` takes
      λ = bs/(bs + memory) with a memory of a twentieth of the samples seen, from 2/mom to 30/mom (20 to 300): 0.29 at
      batch 8 at first, 0.026 after 6,000 samples (see `Memory`); `batch` takes mom itself, like nn.BatchNorm.
    - `eps` (1e-5): added to the variance.
    - `affine` (True): learn a scale `weight` and a shift `bias`, both (C,); with `bias=False` the scale alone.
    - `recipe` ("default"): a name of `RECIPES` or a `Recipe`.
    - `device`, `dtype`: of the parameters. Statistics are float32 under any half precision, float64 in a float64 layer.
    - `process_group`: merge statistics over its ranks.
    - `backend` ("auto"): "native" (C, compiled on first use), "fused", "reference" or "triton" to force one;
      `explain(x)` says which is used.
    - `momentum`: another name of `mom`. None, nn.BatchNorm's cumulative average, means the default here: statistics
      that reach back to the first batch are too old to train with. `track_running_stats` must be True.

    Buffers are nn.BatchNorm's `running_mean`, `running_var` (biased, unlike there), `num_batches_tracked`, and what
    the running average needs beside them. nn.BatchNorm checkpoints load. A batch with NaN or Inf leaves all of them as
    they were. Training and evaluation normalise alike, with the running statistics; not so in the recipe `batch`, where
    training uses the batch's own.

    Under gradient accumulation every micro-batch is a batch: its forward pass moves the statistics, its backward pass
    the averages of the gradient, and the gradients add up as if the micro-batches had been stepped one after the other
    with the weights held.

    The layer is an `nn.modules.batchnorm._BatchNorm`, so code that freezes batch norms, spares them weight decay or keeps
    them in float32 (FSDP) finds it. After `layer.momentum = None` the statistics are the exact ones of all batches since
    `reset_running_stats()`; these also normalise, and the gradient treats them as constants. That is how
    `torch.optim.swa_utils.update_bn` works here (see also `recompute_statistics`). With `layer.momentum = 0` training
    steps leave the statistics as they are. Functions that replace batch norms, like
    `nn.SyncBatchNorm.convert_sync_batchnorm`, replace this layer too: set `process_group` instead. Setting its
    statistics to None, as `torch.func.replace_all_batch_norm_modules_` does, raises ValueError.

    Source: fast.ai course, part 2 (2019), notebook 07, and the forum thread "Running batch norm tweaks"; the averaged
    backward after Moving Average Batch Normalization (ICLR 2020). Equations in `norm/reference.py`.
    """

    _ranks: tuple[int, ...] = ()
    _momentum: tuple = ()  # (None,) or (0,) when momentum was set to that; `mom` stays what it was

    def __init__(
        self,
        nf: int,
        mom: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        recipe: str | Recipe = "default",
        device=None,
        dtype=None,
        process_group=None,
        backend: str = "auto",
        *,
        momentum: float | None = None,
        track_running_stats: bool = True,
        bias: bool = True,
    ):
        nn.Module.__init__(self)  # not _BatchNorm's, whose statistics have the parameters' dtype
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
        """The buffers, as the functional form takes them."""
        buffers = self._buffers
        return NormState(*[buffers[name] for name in NormState._fields])

    @property
    def momentum(self) -> float | None:
        """`mom`, or what was set in its place: None, the cumulative average; 0, statistics that stay."""
        return self._momentum[0] if self._momentum else self.mom

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        if value is None or (value == 0 and not isinstance(value, bool)):
            self._momentum = (value,)
            return
        _check_mom(value)
        self.mom, self._momentum = value, ()

    def __setattr__(self, name, value):
        if name == "track_running_stats" and value is not True or value is None and name in _STATISTICS:
            raise ValueError(
                f"{type(self).__name__} normalises with its running statistics, in training too, and cannot be without; "
                f"got {name}={value!r}: use nn.BatchNorm or, for samples that must not meet, nn.GroupNorm"
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
        """Merge all of x into the statistics, by counts. `running_count` is the mean count of the batches so far: at
        `num_batches_tracked` 0 nothing was, whatever else the buffers hold."""
        state, bs, n = self.state, x.shape[0], x.numel() // self.num_features
        m, v = batch_moments(x, state.running_mean.dtype)
        if self.process_group is not None:
            m, v, n, bs = merge_over_ranks(m, v, n, bs, self.process_group)
        moves = v.sum().isfinite() & (n > 0)
        mean_n = torch.where(state.running_count < 0, n, state.running_count)
        before = mean_n * state.num_batches_tracked
        share = torch.where(moves, n / (before + n), 0.0)
        off = torch.where(moves, m - state.running_mean, 0.0)
        state.running_var.add_(share * torch.where(moves, v - state.running_var, 0.0) + share * (1 - share) * off.square())
        state.running_mean.add_(share * off)
        state.num_samples_tracked.add_((moves * bs).to(torch.int64))
        state.num_batches_tracked.add_(moves)
        moved = (before + n) / state.num_batches_tracked.clamp_min(1)
        state.running_count.copy_(torch.where(moves, moved, state.running_count))

    def freeze(self) -> RunningBatchNorm:
        """Fix the statistics: from now on the layer normalises as in evaluation and learns none, whatever `train()`
        says. Its weight and bias stay trainable; stop them with `requires_grad_(False)`. Returns the layer."""
        self.frozen = True
        return self

    def unfreeze(self) -> RunningBatchNorm:
        """Undo `freeze`. Returns the layer."""
        self.frozen = False
        return self

    def explain(self, x: Tensor) -> str:
        """Which backend works on `x` in the layer's present mode, and why, in a sentence."""
        recipe = self.recipe if self.training and not self.frozen else None
        choice = choose(x, self.state, self.weight, self.bias, recipe, self.process_group, self.backend)
        return f"{choice.name}: {choice.why}"

    def reset_running_stats(self) -> None:
        """Forget all statistics: mean 0, variance 1, nothing counted. Those of a frozen layer stay."""
        if self.frozen:
            return
        for name, buffer in self.state._asdict().items():
            buffer.fill_(1 if name == "running_var" else 0)

    def reset_parameters(self) -> None:
        """Forget statistics, scale and shift."""
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

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}; got {self}: script to_batchnorm(model.eval()), which "
            "evaluates alike, or use torch.jit.trace or torch.export"
        )

    def __getstate__(self):
        return {**self.__dict__, "_recent": deque(maxlen=REMEMBERED)}  # what is in flight stays with this layer

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group  # processes are not copied: the copy shares the group
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def _apply(self, fn, recurse=True):
        # half() and bfloat16() are for the parameters: statistics summed in half precision would be lost
        self._recent.clear()  # of another device or dtype from now on
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
        # nn.BatchNorm's checkpoints have mean, variance and perhaps a count of batches: the rest starts anew, and
        # statistics that come with a past are not thrown away by the next batch (count −1). Files without a count, and
        # models whose statistics were filled in by hand, have a past too: those that are not 0 and 1 throughout
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
    """nn.BatchNorm's argument order and rank check around RunningBatchNorm."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        mom: float = 0.1,
        **settings,
    ):
        super().__init__(num_features, mom, eps, affine, **settings)


_RANKED_DOC = """Running batch norm over {shapes} input: a drop-in for nn.BatchNorm{d}d.

    `num_features`, `eps`, `affine`, `momentum` (another name of `mom`, in the same sense) as there; everything else as
    in `RunningBatchNorm`. Raises ValueError for input of another rank.
    """


class RunningBatchNorm1d(_Ranked):
    __doc__ = _RANKED_DOC.format(d=1, shapes="(N, C) or (N, C, L)")
    _ranks = (2, 3)


class RunningBatchNorm2d(_Ranked):
    __doc__ = _RANKED_DOC.format(d=2, shapes="(N, C, H, W)")
    _ranks = (4,)


class RunningBatchNorm3d(_Ranked):
    __doc__ = _RANKED_DOC.format(d=3, shapes="(N, C, D, H, W)")
    _ranks = (5,)


def batch_moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance a channel over all of x (N, C, *), in `dtype`; 0 of no elements."""
    dims = [d for d in range(x.dim()) if d != 1]
    if x.numel() == 0:
        return (zero := torch.zeros(x.shape[1], dtype=dtype, device=x.device)), zero.clone()
    v, m = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dims, correction=0)
    return m.to(dtype), v.to(dtype)


def _check_mom(mom) -> None:
    if isinstance(mom, bool) or not isinstance(mom, (int, float)) or not 0 < mom <= 1:
        raise ValueError(f"mom is the weight of the new batch, above 0 and at most 1; got {mom!r}")


def _check_settings(layer: str, nf, mom, eps, affine, bias, dtype) -> None:
    if isinstance(nf, bool) or not isinstance(nf, int) or nf < 1:
        raise ValueError(f"{layer} needs a number of channels, 1 or more; got {nf!r}")
    _check_mom(mom)
    if not eps > 0:
        raise ValueError(f"eps is added to the variance and must be above 0; got {eps!r}: the usual value is 1e-5")
    if not isinstance(affine, bool):
        raise ValueError(
            f"affine must be True or False; got {affine!r}: nn.BatchNorm's third argument, momentum, is given by name "
            f"here, as momentum={affine!r}"
        )
    if not isinstance(bias, bool):
        raise ValueError(f"bias is True or False; got {bias!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{layer} needs a floating-point dtype; got {dtype}")
