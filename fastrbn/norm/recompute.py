"""Exact statistics for the present weights of a model, after they were averaged, loaded or changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from fastrbn.random_state import RandomState
from fastrbn.util import apply_to, statistics_are_fixed, whole

from .groups import merge_over_ranks
from .layers import RunningBatchNorm, batch_moments


def recompute_statistics(
    model: nn.Module,
    loader: Iterable,
    device: torch.device | str | int | None = None,
    batches: int | None = None,
    unpack: Callable[[Any], tuple[Any, Any, Any]] | None = None,
) -> nn.Module:
    """Recompute the statistics of every batch norm in `model`, ours or PyTorch's, from the data in `loader`.

    Use it for averaged weights (SWA, EMA), which no training step has gathered statistics for. The statistics are those
    of all samples together, however they are batched. One pass is made in evaluation mode, without dropout, so every
    layer sees the input that it will see in evaluation. A layer behind other norms sees their output under the
    statistics gathered so far: in an MLP of four norms after SWA, accuracy was within 0.1 % of the exact fixed point
    from 500 samples on, at batch sizes 2 to 256.

    Training modes, `momentum`, random states and the statistics of frozen layers (`freeze`) and of layers that
    evaluation does not reach are kept. Running variances are biased in our layers and unbiased in nn.BatchNorm, as in
    training. For layers with a process group and for nn.SyncBatchNorm, statistics are merged over the ranks; every rank
    must call.

    Parameters
    ----------
    model : nn.Module
        Any model, also one wrapped by `AveragedModel` or `torch.compile`.
    loader : iterable
        Yields what a `Learner` understands: tensors, `(x, y)`, `((a, b), y)`, dictionaries by the names of forward's
        arguments. Targets are left out, and so is whatever follows them.
    device : torch.device, str or int, optional
        Device to move inputs to; by default the model's.
    batches : int, optional
        Number of batches to use; by default all.
    unpack : callable, optional
        `unpack(batch)` returns `(args, kwargs, target)` for other batches, as `Learner`'s; the target may be None.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        If the loader yields no batch, or the input of a layer contains NaN or Inf. After any error the model has its
        old statistics.
    TypeError
        If a batch cannot be understood.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn)
    >>> averaged = torch.optim.swa_utils.AveragedModel(learn.model)
    >>> averaged = recompute_statistics(averaged, data.train_dl, batches=4)
    """
    if batches is not None:
        whole("batches, the number of batches to use (None for all),", batches)
    gathered = [_Gathered(name, m) for name, m in model.named_modules() if _has_statistics(name, m)]
    if not gathered:
        warnings.warn(
            f"recompute_statistics found no batch norm with running statistics that is not frozen in "
            f"{type(model).__name__}; nothing was changed",
            stacklevel=2,
        )
        return model
    call = _caller(model, unpack, gathered[0].layer.running_mean.device if device is None else device)
    modes = [(m, m.training) for m in model.modules()]
    before, seen, random = [g.copy() for g in gathered], 0, RandomState([loader])
    hooks = [g.layer.register_forward_pre_hook(g.look, with_kwargs=True) for g in gathered]
    try:
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in islice(loader, batches):
                call(batch)
                seen += 1
            if not seen:
                raise ValueError(
                    "recompute_statistics needs at least one batch; the loader gave none: if it is an iterator that is "
                    "used up, create it again"
                )
            for g in gathered:
                g.finish()
    except BaseException:
        for g, old in zip(gathered, before, strict=True):
            g.put_back(old)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
        random.restore()
    return model


def _has_statistics(name: str, module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or module.running_mean is None or statistics_are_fixed(module):
        return False
    if is_lazy(module.running_mean):
        raise ValueError(
            f"a layer must know its number of channels before its statistics are recomputed; got "
            f"{type(module).__name__} at '{name}', which has seen no batch: send one through the model first"
        )
    return True


def _caller(model: nn.Module, function: Callable[..., Any] | None, device: Any) -> Callable[[Any], Any]:
    """A function that calls the model with the inputs in a batch."""
    from fastrbn.learn.unpack import Unpack

    unpack = Unpack(model.module if isinstance(model, AveragedModel) else model, function)

    def call(batch: Any) -> Any:
        if function is None and isinstance(batch, (tuple, list)):
            batch = batch[: max(unpack.required, 1) + 1]  # loaders may yield more than input and target
        return unpack.call_model(model, apply_to(unpack(batch)[0], Tensor, lambda t: t.to(device)))

    return call


class _Gathered:
    """Mean and variance of all input of one layer so far; the layer normalises with them during the pass."""

    def __init__(self, name: str, layer: Any):
        self.name, self.layer, self.n, self.samples, self.batches = name, layer, 0, 0, 0
        mean = layer.running_mean
        self.mean = torch.zeros_like(mean, dtype=torch.float32 if mean.device.type == "mps" else torch.float64)
        self.var = torch.zeros_like(self.mean)

    def look(self, layer: Any, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.numel() == 0:
            return
        m, v = batch_moments(x, self.mean.dtype)
        n = x.numel() // x.shape[1]
        self.n, self.samples, self.batches = self.n + n, self.samples + x.shape[0], self.batches + 1
        share, off = n / self.n, m - self.mean
        self.var += share * (v - self.var) + share * (1 - share) * off.square()
        self.mean += share * off
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.var)

    def finish(self) -> None:
        """Merge over ranks and write the layer's buffers."""
        layer, group = self.layer, getattr(self.layer, "process_group", None)
        if isinstance(layer, nn.SyncBatchNorm) and group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is not None:
            one = self.mean.new_zeros(1)
            batches = merge_over_ranks(one, one, self.batches, 0, group)[2]
            self.batches = int(batches) // dist.get_world_size(group)
            self.mean, self.var, n, samples = merge_over_ranks(self.mean, self.var, self.n, self.samples, group)
            self.n, self.samples = int(n), int(samples)
        if self.n == 0:
            return
        if not (self.mean.isfinite().all() and self.var.isfinite().all()):
            raise ValueError(
                f"statistics need finite values; the input of '{self.name}' contained NaN or Inf: check the data and "
                f"the weights before that layer"
            )
        ours = isinstance(layer, RunningBatchNorm)
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.var if ours else self.var * (self.n / max(self.n - 1, 1)))
        layer.num_batches_tracked.fill_(self.batches)
        if ours:
            layer.running_count.fill_(self.n / max(self.batches, 1))
            layer.num_samples_tracked.clamp_(min=self.samples)

    def copy(self) -> dict[str, Tensor]:
        return {name: b.clone() for name, b in self.layer.named_buffers(recurse=False)}

    def put_back(self, old: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in old.items():
                getattr(self.layer, name).copy_(value)
