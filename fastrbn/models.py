"""Layer builders and small nets: the course's CNN and a residual net for CIFAR, with any norm.

Names and meanings follow the fast.ai course (part 2, 2019, notebooks 06 and 07). Docstrings say where we differ.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init

from fastrbn.util import suggestion, whole

from .norm import RunningBatchNorm

__all__ = [
    "GeneralRelu",
    "Lambda",
    "Residual",
    "conv_bn",
    "conv_gn",
    "conv_layer",
    "conv_rbn",
    "flatten",
    "get_cnn_layers",
    "get_cnn_model",
    "init_cnn",
    "make_norm",
    "resnet9",
]


Norm = str | Callable[..., nn.Module | None]  # see make_norm


def flatten(x: Tensor) -> Tensor:
    """Flatten all dimensions but the first.

    Unlike the course's `view`, it also works for an empty batch and for channels_last memory.

    Parameters
    ----------
    x : Tensor
        Shape (N, …).

    Returns
    -------
    Tensor
        Shape (N, product of the others).

    Examples
    --------
    >>> flatten(torch.randn(2, 8, 3, 3)).shape
    torch.Size([2, 72])
    """
    return x.flatten(1)


class Lambda(nn.Module):
    """A module that applies a function to its input.

    A lambda trains and deep-copies, but cannot be pickled: pickle stores functions by name, so pickling it raises
    `pickle.PicklingError`, which says what to do instead.

    Parameters
    ----------
    func : callable
        Function of the input.

    Raises
    ------
    TypeError
        If `func` is not callable.

    Examples
    --------
    >>> nn.Sequential(nn.Conv2d(1, 4, 3), Lambda(flatten))(torch.randn(2, 1, 5, 5)).shape
    torch.Size([2, 36])

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.
    """

    def __init__(self, func: Callable[[Any], Any]):
        super().__init__()
        if not callable(func):
            raise TypeError(f"Lambda needs a function of the input; got {func!r} of type {type(func).__name__}")
        self.func = func

    def forward(self, x: Any) -> Any:
        return self.func(x)

    def extra_repr(self) -> str:
        return getattr(self.func, "__name__", repr(self.func))

    def __deepcopy__(self, memo: dict) -> Lambda:  # the default goes through __reduce_ex__
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = getattr(self.func, "__qualname__", "")
        if "<" in name:  # <lambda> or f.<locals>.g, which cannot be found by name
            raise pickle.PicklingError(
                f"Lambda: pickle looks a function up by its name in a module, and cannot find '{name}'. Define it with "
                f"def at the top level of a module, or save model.state_dict() instead of the model."
            )
        return super().__reduce_ex__(protocol)


class GeneralRelu(nn.Module):
    """ReLU with an optional leak, offset and upper bound.

    It works out of place, unlike in the course, where `sub` without `leak` failed: `F.relu` keeps its output for the
    backward pass.

    Parameters
    ----------
    leak : float or None, default None
        Slope below zero; None means 0.
    sub : float or None, default None
        Subtracted from the result. 0.4 to 0.5 centres the output of a ReLU on unit normal input.
    maxv : float or None, default None
        Upper bound, applied last.

    Examples
    --------
    >>> GeneralRelu(leak=0.1, sub=0.5, maxv=1.0)(torch.tensor([-1.0, 1.0, 3.0]))
    tensor([-0.6000,  0.5000,  1.0000])

    References
    ----------
    fast.ai course, part 2 (2019), notebook 06.
    """

    def __init__(self, leak: float | None = None, sub: float | None = None, maxv: float | None = None):
        super().__init__()
        self.leak, self.sub, self.maxv = leak, sub, maxv

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x) if self.leak is None else F.leaky_relu(x, self.leak)
        if self.sub is not None:
            x = x - self.sub
        if self.maxv is not None:
            x = x.clamp_max(self.maxv)
        return x

    def extra_repr(self) -> str:
        knobs = {"leak": self.leak, "sub": self.sub, "maxv": self.maxv}
        return ", ".join(f"{k}={v}" for k, v in knobs.items() if v is not None)


def _group_norm(nf: int, groups: int = 8, eps: float = 1e-5, affine: bool = True) -> nn.GroupNorm:
    groups = whole("groups", groups)
    return nn.GroupNorm(max(g for g in range(1, groups + 1) if nf % g == 0), nf, eps=eps, affine=affine)


_NORMS: dict[str, Callable[..., nn.Module] | None] = {
    "batch": nn.BatchNorm2d,
    "running": RunningBatchNorm,
    "group": _group_norm,
    "none": None,
}
_RELU = ("leak", "sub", "maxv")


def make_norm(norm: Norm, nf: int, **kwargs: Any) -> nn.Module | None:
    """Make a norm layer for `nf` channels.

    Parameters
    ----------
    norm : {"batch", "running", "group", "none"} or callable
        nn.BatchNorm2d, RunningBatchNorm, nn.GroupNorm or nothing, or a callable that takes `nf` and returns a module.
    nf : int
        Number of channels.
    **kwargs
        Passed to the norm, such as `recipe="course"` for "running" or `momentum=0.2` for "batch". "group" takes
        `groups` (default 8); if `nf` is not divisible by it, the largest divisor below it is used.

    Returns
    -------
    nn.Module or None
        None for "none".

    Raises
    ------
    ValueError
        For an unknown name.
    TypeError
        For a keyword that the norm does not take, a module in place of a callable, or a callable that returns none.

    Examples
    --------
    >>> make_norm("group", 12)
    GroupNorm(6, 12, eps=1e-05, affine=True...)
    """
    if isinstance(norm, nn.Module):
        raise TypeError(
            f"norm must be a name or a callable that makes a norm for a number of channels; got a "
            f"{type(norm).__name__} instance, which cannot serve several layers: pass the class, or lambda nf: …"
        )
    if callable(norm):
        made = norm(nf, **kwargs)
        if made is not None and not isinstance(made, nn.Module):
            raise TypeError(f"norm={norm!r} must return an nn.Module (or None); for nf={nf} it returned {made!r}")
        return made
    if norm not in _NORMS:
        hint = suggestion(norm, _NORMS)
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, or a callable nf → nn.Module; got {norm!r}.{hint}")
    make = _NORMS[norm]
    taken = [] if make is None else list(inspect.signature(make).parameters)[1:]
    for name in kwargs:
        if name not in taken:
            hint = suggestion(name, [*taken, *_RELU])
            takes = f"takes {', '.join(taken)}" if taken else "takes no arguments"
            raise TypeError(f"norm '{norm}' {takes} (and GeneralRelu {', '.join(_RELU)}); got '{name}'.{hint}")
    return None if make is None else make(nf, **kwargs)


def _activates(made: nn.Module | None) -> bool:
    """True if the norm is an activation too, like filter response norm, so that it needs no ReLU."""
    return getattr(made, "activates", False)


def conv_layer(
    ni: int, nf: int, ks: int = 3, stride: int = 2, bn: bool = True, norm: Norm | None = None, **kwargs: Any
) -> nn.Sequential:
    """Make a convolution, a ReLU and a norm, in this order.

    The convolution has a bias only if no norm follows. A norm with an attribute `activates = True`, such as filter
    response norm, replaces the ReLU.

    Parameters
    ----------
    ni, nf : int
        Input and output channels.
    ks : int, default 3
        Kernel size; padded by ks // 2, so for odd sizes only the stride shrinks the image.
    stride : int, default 2
        Stride.
    bn : bool, default True
        With False, no norm.
    norm : str, callable or None, default None
        See `make_norm`; None means "batch", the course's.
    **kwargs
        `leak`, `sub` and `maxv` go to `GeneralRelu`, all others to the norm.

    Returns
    -------
    nn.Sequential
        Maps (N, ni, H, W) to (N, nf, ⌈H/stride⌉, ⌈W/stride⌉) for odd `ks`.

    Raises
    ------
    ValueError
        For `bn=False` together with a norm, and for settings of a ReLU that the norm replaces.

    Examples
    --------
    >>> conv_layer(1, 8, norm="group", leak=0.1)(torch.randn(2, 1, 28, 28)).shape
    torch.Size([2, 8, 14, 14])

    References
    ----------
    fast.ai course, part 2 (2019), notebook 07.
    """
    if not bn and norm not in (None, "none"):
        raise ValueError(f"bn=False means no norm; got norm={norm!r} with it: give one of the two")
    relu = GeneralRelu(**{k: kwargs.pop(k) for k in _RELU if k in kwargs})
    made = make_norm("none" if not bn else "batch" if norm is None else norm, nf, **(kwargs if bn else {}))
    conv = nn.Conv2d(ni, nf, ks, stride=stride, padding=ks // 2, bias=made is None)
    if _activates(made) and relu.extra_repr():
        raise ValueError(
            f"{type(made).__name__} is the activation too and replaces GeneralRelu; got {relu}: leave it out"
        )
    layers: list[nn.Module] = [conv] if _activates(made) else [conv, relu]
    return nn.Sequential(*layers) if made is None else nn.Sequential(*layers, made)


def conv_rbn(ni: int, nf: int, ks: int = 3, stride: int = 2, bn: bool = True, **kwargs: Any) -> nn.Sequential:
    """Make a `conv_layer` with RunningBatchNorm.

    Parameters
    ----------
    ni, nf, ks, stride, bn : as in `conv_layer`
    **kwargs
        `leak`, `sub` and `maxv` go to `GeneralRelu`; `recipe`, `mom`, `eps` and others to RunningBatchNorm.

    Returns
    -------
    nn.Sequential

    Examples
    --------
    >>> conv_rbn(1, 8, recipe="course")(torch.randn(1, 1, 28, 28)).shape   # a batch of one trains
    torch.Size([1, 8, 14, 14])
    """
    return conv_layer(ni, nf, ks, stride, bn, norm="running" if bn else None, **kwargs)


def conv_bn(ni: int, nf: int, ks: int = 3, stride: int = 2, bn: bool = True, **kwargs: Any) -> nn.Sequential:
    """Make a `conv_layer` with nn.BatchNorm2d.

    Parameters
    ----------
    ni, nf, ks, stride, bn : as in `conv_layer`
    **kwargs
        `leak`, `sub` and `maxv` go to `GeneralRelu`; `eps`, `momentum` and others to nn.BatchNorm2d.

    Returns
    -------
    nn.Sequential

    Examples
    --------
    >>> conv_bn(1, 8, momentum=0.2)(torch.randn(2, 1, 28, 28)).shape
    torch.Size([2, 8, 14, 14])
    """
    return conv_layer(ni, nf, ks, stride, bn, norm="batch" if bn else None, **kwargs)


def conv_gn(ni: int, nf: int, ks: int = 3, stride: int = 2, bn: bool = True, **kwargs: Any) -> nn.Sequential:
    """Make a `conv_layer` with nn.GroupNorm.

    Parameters
    ----------
    ni, nf, ks, stride, bn : as in `conv_layer`
    **kwargs
        `leak`, `sub` and `maxv` go to `GeneralRelu`; `groups` (default 8, see `make_norm`), `eps` and `affine` to
        nn.GroupNorm.

    Returns
    -------
    nn.Sequential

    Examples
    --------
    >>> conv_gn(1, 8, groups=4)(torch.randn(1, 1, 28, 28)).shape
    torch.Size([1, 8, 14, 14])
    """
    return conv_layer(ni, nf, ks, stride, bn, norm="group" if bn else None, **kwargs)


def get_cnn_layers(data: Any, nfs: Iterable[int], layer: Callable[..., nn.Module], **kwargs: Any) -> list[nn.Module]:
    """Make the layers of the course's CNN.

    These are one stride-2 layer per entry of `nfs` (kernel size 5 in the first, 3 in the others), average pooling and a
    linear layer.

    Parameters
    ----------
    data : DataBunch or similar
        `data.c` is the number of classes, `data.c_in` the number of input channels (1 if missing).
    nfs : iterable of int
        Output channels of each stride-2 layer.
    layer : callable
        `layer(ni, nf, ks, **kwargs)` makes one layer: `conv_rbn`, `conv_layer` or your own.
    **kwargs
        Passed to `layer`.

    Returns
    -------
    list of nn.Module
        They map (N, c_in, H, W) to (N, c).

    Raises
    ------
    TypeError, ValueError
        For invalid channel counts, a `layer` that is not callable, and data without a number of classes.

    Examples
    --------
    >>> len(get_cnn_layers(data, [8, 16], conv_rbn))
    5

    References
    ----------
    fast.ai course, part 2 (2019), notebook 07.
    """
    sizes = _check_sizes(nfs)
    if isinstance(layer, nn.Module) or not callable(layer):
        raise TypeError(
            f"layer must be a function (ni, nf, ks, …) → nn.Module, such as conv_rbn; got "
            f"{f'one {type(layer).__name__}' if isinstance(layer, nn.Module) else repr(layer)}: pass the function "
            f"itself, unquoted and not called"
        )
    classes = whole(
        "data.c, the number of classes, as in DataBunch(train_dl, valid_dl, c=10),", getattr(data, "c", None)
    )
    c_in = getattr(data, "c_in", None)
    ins = [1 if c_in is None else whole("data.c_in, the number of input channels,", c_in), *sizes]
    convs = [layer(ni, nf, 3 if i else 5, **kwargs) for i, (ni, nf) in enumerate(zip(ins, sizes))]
    return [*convs, nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Linear(sizes[-1], classes)]


def get_cnn_model(data: Any, nfs: Iterable[int], layer: Callable[..., nn.Module], **kwargs: Any) -> nn.Sequential:
    """Make the course's CNN: `get_cnn_layers` in an nn.Sequential.

    Parameters
    ----------
    data, nfs, layer : as in `get_cnn_layers`
    **kwargs
        Passed to `layer`.

    Returns
    -------
    nn.Sequential
        Maps (N, data.c_in, H, W) to (N, data.c).

    Examples
    --------
    >>> get_cnn_model(data, [8, 16], conv_rbn)(torch.randn(4, 1, 28, 28)).shape
    torch.Size([4, 10])
    """
    return nn.Sequential(*get_cnn_layers(data, nfs, layer, **kwargs))


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def init_cnn(model: nn.Module, uniform: bool = False) -> None:
    """Initialise every convolution in `model`: Kaiming weights with a = 0.1, as in the course, and zero biases.

    Parameters
    ----------
    model : nn.Module
        Any model; layers other than convolutions are left as they are.
    uniform : bool, default False
        Draw from a uniform instead of a normal distribution.

    Examples
    --------
    >>> model = get_cnn_model(data, [8, 16], conv_rbn)
    >>> init_cnn(model)
    """
    fill = init.kaiming_uniform_ if uniform else init.kaiming_normal_
    for module in model.modules():
        if isinstance(module, _CONVS):
            fill(module.weight, a=0.1)
            if module.bias is not None:
                init.zeros_(module.bias)


class Residual(nn.Sequential):
    """An nn.Sequential whose input is added to its output: x + layers(x).

    The layers must keep the shape.

    Examples
    --------
    >>> Residual(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def resnet9(
    c_in: int = 3, c_out: int = 10, norm: Norm = "running", width: int = 64, **norm_kwargs: Any
) -> nn.Sequential:
    """Make the nine-layer residual net that is common on CIFAR, initialised by `init_cnn`.

    It consists of prep, layer1 and a residual block, layer2, layer3 and a residual block, max pooling and a linear
    layer. Each convolution is followed by a norm and a ReLU.

    Parameters
    ----------
    c_in, c_out : int, default 3 and 10
        Input channels and classes.
    norm : str or callable, default "running"
        See `make_norm`.
    width : int, default 64
        Channels in prep, doubled by each layer. 64 is the usual size, with 6.6 million parameters.
    **norm_kwargs
        Passed to the norm.

    Returns
    -------
    nn.Sequential
        Maps (N, c_in, H, W) to (N, c_out), for H and W from 8.

    Examples
    --------
    >>> resnet9(width=4, recipe="course")(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])

    References
    ----------
    D. Page, "How to train your ResNet" (2018), without his output scaling.
    """

    def conv(ni: int, nf: int, *pool: nn.Module) -> nn.Sequential:
        made = make_norm(norm, nf, **norm_kwargs)
        relu = None if _activates(made) else nn.ReLU()
        layers = [nn.Conv2d(ni, nf, 3, padding=1, bias=made is None), made, relu, *pool]
        return nn.Sequential(*(layer for layer in layers if layer is not None))

    def halved() -> nn.Module:
        return nn.MaxPool2d(2)

    def residual(nf: int) -> nn.Module:
        return Residual(conv(nf, nf), conv(nf, nf))

    w = whole("width", width)
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        prep=conv(c_in, w),
        layer1=nn.Sequential(conv(w, 2 * w, halved()), residual(2 * w)),
        layer2=conv(2 * w, 4 * w, halved()),
        layer3=nn.Sequential(conv(4 * w, 8 * w, halved()), residual(8 * w)),
        pool=nn.AdaptiveMaxPool2d(1),
        flatten=Lambda(flatten),
        linear=nn.Linear(8 * w, c_out),
    )
    model = nn.Sequential(parts)
    init_cnn(model)
    return model


def _check_sizes(nfs: Any) -> list[int]:
    if isinstance(nfs, (str, bytes)) or not hasattr(nfs, "__iter__"):
        raise TypeError(f"nfs must be a list of channel counts, such as [8, 16, 32]; got {nfs!r}")
    sizes = [whole("each channel count in nfs", n) for n in nfs]
    if not sizes:
        raise ValueError("nfs must hold a channel count for each layer, at least one; got none: nfs=[8, 16, 32]")
    return sizes
