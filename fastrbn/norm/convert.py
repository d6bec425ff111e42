"""Model surgery: replace nn.BatchNorm by running batch norm and back, and fold the layer away for inference."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from fastrbn.util import fix_statistics

from .layers import RunningBatchNorm, RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d
from .recipes import Recipe, get_recipe
from .reference import NormState

_RUNNING = {
    nn.BatchNorm1d: RunningBatchNorm1d,
    nn.BatchNorm2d: RunningBatchNorm2d,
    nn.BatchNorm3d: RunningBatchNorm3d,
    nn.SyncBatchNorm: RunningBatchNorm,
}
_BATCH: dict[type, type] = {
    RunningBatchNorm1d: nn.BatchNorm1d,
    RunningBatchNorm2d: nn.BatchNorm2d,
    RunningBatchNorm3d: nn.BatchNorm3d,
}
_ANY_RANK = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def convert_batchnorm(model: nn.Module, recipe: str | Recipe = "default") -> nn.Module:
    """Replace every nn.BatchNorm1d/2d/3d and nn.SyncBatchNorm in `model` by a running batch norm, in place.

    Statistics, eps, training mode, device and hooks are kept, so evaluation gives the same output. Parameters stay the
    same objects, so an optimiser made before keeps working. `momentum` becomes `mom` (None becomes 0.1). A
    SyncBatchNorm keeps its process group. A batch norm with dropout and activation inside, like timm's
    `BatchNormAct2d`, keeps both. Any other subclass with its own forward pass is left alone, with everything inside it.

    Warns if there was nothing to convert, if a layer had no running statistics, and about subclasses left alone.

    Parameters
    ----------
    model : nn.Module
        Any model. A layer used in several places is converted once.
    recipe : str or Recipe, default "default"
        How statistics are averaged; see `Recipe`.

    Returns
    -------
    nn.Module
        `model` itself, or the new layer if `model` is a batch norm.

    Raises
    ------
    ValueError
        For a lazy layer that has seen no batch, for momentum 0, and for layers with parameters or buffers that a batch
        norm does not have (pruned or parametrised ones). `model` is then unchanged.

    Examples
    --------
    >>> model = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    >>> model(torch.randn(1, 3, 16, 16)).shape   # a batch of one trains
    torch.Size([1, 8, 14, 14])
    """
    recipe = get_recipe(recipe)
    found: list[nn.Module] = []
    left: dict[str, str] = {}  # subclasses left alone, by name
    without: list[str] = []  # layers without statistics

    def running(old: Any, name: str) -> nn.Module | None:
        if isinstance(old, _LAZY):
            raise ValueError(
                f"a layer must know its number of channels before it is converted; got {type(old).__name__} at "
                f"'{name}', which has seen no batch: send one through the model first"
            )
        base: Any = next((base for base in _RUNNING if isinstance(old, base)), None)
        if base is None or any(not outer or name.startswith(f"{outer}.") for outer in left):
            return None
        kind = _RUNNING[base]
        if type(old).forward is not base.forward and not is_parametrized(old):
            if not _acts(old, base):
                left[name] = type(old).__name__
                return None
            kind = RunningBatchNormAct2d
        _refuse_additions(old, name, "convert_batchnorm")
        if old.momentum == 0:
            raise ValueError(
                f"momentum is the weight of the new batch and must be above 0; got 0 in {type(old).__name__} at "
                f"'{name}': set another, and freeze() the converted layer to keep its statistics"
            )
        found.append(old)
        mom = 0.1 if old.momentum is None else old.momentum
        like = old.weight if old.affine else old.running_mean
        where: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        group = getattr(old, "process_group", None)
        if isinstance(old, nn.SyncBatchNorm) and group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        bias = not old.affine or old.bias is not None
        settings: dict[str, Any] = {
            "mom": mom,
            "affine": old.affine,
            "bias": bias,
            "recipe": recipe,
            "process_group": group,
        }
        new = kind(old.num_features, eps=old.eps, **settings, **where)
        if old.running_mean is not None:
            tensors = {**old._parameters, **old._buffers}
            new.load_state_dict({name: t for name, t in tensors.items() if t is not None})
        else:
            without.append(name)
        return _finished(new, old)

    model = _replace(model, running)
    if without:
        warnings.warn(
            f"{_some(without)} had no running statistics (track_running_stats=False): the replacements start without "
            f"any and must be trained before evaluation",
            stacklevel=2,
        )
    if left:
        kinds = ", ".join(sorted(set(left.values())))
        warnings.warn(
            f"convert_batchnorm left {_some(list(left))} unchanged: {kinds} has its own forward pass, which running "
            f"batch norm would not run",
            stacklevel=2,
        )
    elif not found:
        _warn_nothing("convert_batchnorm", "nn.BatchNorm or SyncBatchNorm", model)
    return model


def to_batchnorm(model: nn.Module, dims: int = 2) -> nn.Module:
    """Replace every running batch norm in `model` by nn.BatchNorm, in place.

    Evaluation gives the same output. Training then normalises with each batch's own statistics; the recipe is lost.
    Parameters stay the same objects, and hooks are kept. Layers that are frozen and in training mode stay frozen, until
    `unfreeze`. Warns if there was nothing to replace.

    Parameters
    ----------
    model : nn.Module
        Any model. RunningBatchNorm1d/2d/3d become nn.BatchNorm1d/2d/3d.
    dims : {1, 2, 3}, default 2
        Number of spatial dimensions that RunningBatchNorm layers are used with, since they accept any.

    Returns
    -------
    nn.Module
        `model` itself, or the new layer if `model` is a running batch norm.

    Raises
    ------
    ValueError
        For layers with parameters or buffers that a batch norm does not have (pruned or parametrised ones). `model` is
        then unchanged.

    Examples
    --------
    >>> model = to_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), RunningBatchNorm2d(8)))
    >>> type(model[1]).__name__
    'BatchNorm2d'
    """
    if dims not in _ANY_RANK:
        raise ValueError(f"dims is the number of spatial dimensions, 1, 2 or 3; got {dims!r}")
    found: list[nn.Module] = []
    frozen: list[nn.Module] = []

    def batch(old: Any, name: str) -> nn.Module | None:
        if not isinstance(old, RunningBatchNorm):
            return None
        _refuse_additions(old, name, "to_batchnorm")
        found.append(old)
        kind = next((new for base, new in _BATCH.items() if isinstance(old, base)), _ANY_RANK[dims])
        like: Any = old.weight if old.affine else old.running_mean
        where = {"device": like.device, "dtype": like.dtype}
        new = kind(old.num_features, eps=old.eps, momentum=old.mom, affine=old.affine, **where)
        with torch.no_grad():
            for name, buffer in new._buffers.items():
                buffer.copy_(old._buffers[name])
        if old.frozen and old.training:  # torch.jit.script takes no hooks, and to_batchnorm(model.eval()) is for it
            frozen.append(new)
        return _finished(new, old)

    model = _replace(model, batch)
    for m in frozen:
        fix_statistics(m)
    if not found:
        _warn_nothing("to_batchnorm", "running batch norm", model)
    return model


class RunningBatchNormAct2d(RunningBatchNorm2d):
    """RunningBatchNorm2d, then dropout and activation; timm's BatchNormAct2d is converted to this."""

    if TYPE_CHECKING:
        drop: nn.Module
        act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class BatchNormAct2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, then dropout and activation; `to_batchnorm` makes it from RunningBatchNormAct2d."""

    if TYPE_CHECKING:
        drop: nn.Module
        act: nn.Module
        num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:  # written out, because torch.jit.script cannot call super().forward
        rate = 0.0 if self.momentum is None else self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                rate = 1.0 / float(self.num_batches_tracked)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, rate, self.eps)
        return self.act(self.drop(x))


_BATCH = {RunningBatchNormAct2d: BatchNormAct2d, **_BATCH}


def _acts(old: nn.Module, base: type) -> bool:
    """True if a subclass holds exactly a dropout and an activation after the norm, like timm's BatchNormAct2d."""
    return base in (nn.BatchNorm2d, nn.SyncBatchNorm) and set(old._modules) == {"drop", "act"}


def _finished(new: Any, old: Any) -> nn.Module:
    """Give `new` the parameters, inner modules and mode of `old`."""
    new.weight, new.bias = old.weight, old.bias
    new._modules.update(old._modules)  # drop and act
    new.training = old.training
    return new


def _refuse_additions(old: Any, name: str, function: str) -> None:
    """Raise ValueError if `old` has parameters or buffers that a batch norm does not have."""
    more = [n for n in (*old._parameters, *old._buffers) if n not in NormState._fields and n not in ("weight", "bias")]
    if more or is_parametrized(old):
        what = ", ".join(more) or f"a parametrised {next(iter(old.parametrizations))}"
        raise ValueError(
            f"{function} takes batch norms without further parameters or buffers; got {type(old).__name__} with "
            f"{what} at '{name}': make it permanent first, with torch.nn.utils.prune.remove or "
            f"torch.nn.utils.parametrize.remove_parametrizations"
        )


def _some(names: list[str]) -> str:
    """A list of names for a message, such as "'a', 'b' and 7 more layers"."""
    shown = ", ".join(f"'{name}'" for name in names[:2])
    return f"{shown} and {len(names) - 2} more layers" if len(names) > 2 else shown


def fuse_conv_rbn(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with running batch norms folded into the convolution or linear layer before them.

    A norm is folded if it is the only reader of the output of a convolution (also transposed) or linear layer. It is
    replaced by `nn.Identity`, or by the activation inside it. Norms after anything else, such as the ReLU of
    `conv_rbn`, stay. `torch.fx` finds out which layer follows which; in a model that it cannot trace, only neighbours
    within an `nn.Sequential` are folded. Outputs agree up to rounding. Warns if nothing could be folded.

    Parameters
    ----------
    model : nn.Module
        A model in evaluation mode. It is not changed.

    Returns
    -------
    nn.Module
        The folded copy.

    Raises
    ------
    ValueError
        If a running batch norm is in training mode, where its statistics still move.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), RunningBatchNorm(8), nn.ReLU()).eval()
    >>> fuse_conv_rbn(model)[1]
    Identity()
    """
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    moving = [name for name, m in modules.items() if isinstance(m, RunningBatchNorm) and m.training and not m.frozen]
    if moving:
        raise ValueError(
            f"only layers in evaluation mode can be folded; '{moving[0]}' is in training mode: call model.eval() first"
        )
    pairs = _pairs(model)
    for before, after in pairs:
        _fold(modules[before], modules[after])
        parent, _, name = after.rpartition(".")
        norm: Any = modules[after]
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, RunningBatchNormAct2d) else nn.Identity()
        setattr(modules[parent], name, rest)
    if not pairs:
        _warn_nothing("fuse_conv_rbn", "running batch norm directly after a convolution or linear", model)
    return model


def _fold(layer: Any, norm: Any) -> None:
    """Multiply the norm's scale into the layer's weight and put its shift into the bias."""
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
        w, flat = layer.weight, (1,) * (layer.weight.dim() - 2)
        if getattr(layer, "transposed", False):  # weight of shape (in, out of one group, *kernel)
            grouped = w.unflatten(0, (layer.groups, -1))
            new = (grouped * scale.view(layer.groups, 1, -1, *flat)).flatten(0, 1)
        else:
            new = w * scale.view(-1, 1, *flat)
        bias = shift if layer.bias is None else layer.bias * scale + shift
    layer.weight = nn.Parameter(new.to(w.dtype), w.requires_grad)
    layer.bias = nn.Parameter(bias.to(w.dtype), w.requires_grad)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (RunningBatchNorm, *_CONVS, nn.Linear))
        return known or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution or linear layer and of the running batch norm that is the only reader of its output."""
    modules = dict(model.named_modules())
    try:
        graph = _Tracer().trace(model)
    except Exception as e:  # a model's Python may raise anything under tracing
        warnings.warn(
            f"fuse_conv_rbn could not trace {type(model).__name__} ({type(e).__name__}: {e}) and only looks for "
            f"neighbours within each nn.Sequential",
            stacklevel=3,
        )
        return _neighbours(model)
    calls = [n for n in graph.nodes if n.op == "call_module"]
    times = {n.target: sum(c.target == n.target for c in calls) for n in calls}
    return [
        (n.args[0].target, n.target)
        for n in calls
        if isinstance(modules[n.target], RunningBatchNorm)
        and isinstance(before := n.args[0], fx.Node)
        and before.op == "call_module"
        and _foldable(modules[before.target], modules[n.target])
        and len(before.users) == 1
        and times[n.target] == times[before.target] == 1
    ]


def _neighbours(model: nn.Module) -> list[tuple[str, str]]:
    """Same as `_pairs`, for neighbours within an nn.Sequential, without tracing."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [
        (names[a][0], names[b][0])
        for seq in model.modules()
        if isinstance(seq, nn.Sequential)
        for a, b in zip(seq, list(seq)[1:], strict=False)
        if _foldable(a, b) and len(names[a]) == len(names[b]) == 1
    ]


def _foldable(before: Any, after: nn.Module) -> bool:
    """True if `after` can be folded into `before`, which must compute exactly what its base class computes."""
    base = next((base for base in (*_CONVS, nn.Linear) if isinstance(before, base)), None)
    if base is None or not isinstance(after, RunningBatchNorm) or is_parametrized(before):
        return False
    if type(after).forward not in (RunningBatchNorm.forward, RunningBatchNormAct2d.forward):
        return False
    if any(getattr(type(before), f, None) is not getattr(base, f, None) for f in ("forward", "_conv_forward")):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in (before, after)):
        return False
    return after.num_features == (before.out_features if isinstance(before, nn.Linear) else before.out_channels)


def _replace(model: nn.Module, make: Callable[[Any, str], nn.Module | None]) -> nn.Module:
    """Replace every module for which `make(module, name)` returns another, everywhere it occurs.

    All replacements are made before the first is put in place, so that an error leaves the model unchanged.
    """
    made = {}
    for name, module in model.named_modules():
        made[module] = make(module, name)
    for old, new in made.items():
        if new is not None:
            _move_hooks(old, new)
    if (replaced := made[model]) is not None:
        return replaced
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and made[child] is not None:
                module._modules[name] = made[child]
    return model


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the hooks of `old` to `new`; handles that users hold then remove them from `new`."""
    for name, value in vars(old).items():
        if "_hook" in name and name in vars(new):
            vars(new)[name] = value
    hook: Any
    for hook in old._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # it is called with the module it was registered on
            hook.module = weakref.ref(new)


def _warn_nothing(function: str, what: str, model: nn.Module) -> None:
    warnings.warn(f"{function} found no {what} in {type(model).__name__}; nothing was changed", stacklevel=3)
