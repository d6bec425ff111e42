"""Layer builders and small nets: the course's CNN and a residual net for CIFAR, each with any norm.

The names and what they mean are the fast.ai course's (part 2, 2019, notebooks 06 and 07); where the course would fail,
it is said at the place.
"""

from __future__ import annotations

import copy
import inspect
import operator
import pickle
from collections import OrderedDict

import torch.nn.functional as F
from torch import nn
from torch.nn import init

from fastrbn.util import suggestion

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


def flatten(x):
    """(N, C, …) → (N, C·…). Unlike the course's `view`, also for an empty batch and for channels-last memory."""
    return x.flatten(1)


class Lambda(nn.Module):
    """A module that calls `func` on its input, any shape: `Lambda(flatten)`.

    Pickled only with a function that can be found by name. A lambda trains and deep-copies, but pickling it raises
    `pickle.PicklingError`, which says what to do instead.
    """

    def __init__(self, func):
        super().__init__()
        if not callable(func):
            raise TypeError(f"Lambda wraps a function of the input; got {func!r} of type {type(func).__name__}")
        self.func = func

    def forward(self, x):
        return self.func(x)

    def extra_repr(self):
        return getattr(self.func, "__name__", repr(self.func))

    def __deepcopy__(self, memo):  # by itself, because the default way goes through __reduce_ex__
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol):
        name = getattr(self.func, "__qualname__", "")
        if "<" in name:  # <lambda>, or f.<locals>.g: pickle stores functions by name, and these have none
            raise pickle.PicklingError(
                f"Lambda: pickle finds a function by its name in a module, and '{name}' is not to be found there. "
                f"Define it with def at the top level of a module, or save model.state_dict() instead of the model."
            )
        return super().__reduce_ex__(protocol)


class GeneralRelu(nn.Module):
    """ReLU with three knobs, off by default, any shape.

    - `leak`: slope below zero; None: 0.
    - `sub`: subtracted afterwards (0.4 to 0.5 centres the output of a ReLU on unit normal input).
    - `maxv`: upper bound, applied last.

    Source: course notebook 06. Out of place, unlike there: `F.relu` keeps its output for the backward pass, so
    `sub` without `leak` failed in the course.
    """

    def __init__(self, leak=None, sub=None, maxv=None):
        super().__init__()
        self.leak, self.sub, self.maxv = leak, sub, maxv

    def forward(self, x):
        x = F.relu(x) if self.leak is None else F.leaky_relu(x, self.leak)
        if self.sub is not None:
            x = x - self.sub
        if self.maxv is not None:
            x = x.clamp_max(self.maxv)
        return x

    def extra_repr(self):
        knobs = {"leak": self.leak, "sub": self.sub, "maxv": self.maxv}
        return ", ".join(f"{k}={v}" for k, v in knobs.items() if v is not None)


def _group_norm(nf, groups=8, eps=1e-5, affine=True):
    groups = _whole(groups, "groups")
    return nn.GroupNorm(max(g for g in range(1, groups + 1) if nf % g == 0), nf, eps=eps, affine=affine)


_NORMS = {"batch": nn.BatchNorm2d, "running": RunningBatchNorm, "group": _group_norm, "none": None}
_RELU = ("leak", "sub", "maxv")


def make_norm(norm, nf, **kwargs):
    """A norm for `nf` channels, or None for `"none"`.

    - `norm`: `"batch"` (nn.BatchNorm2d), `"running"` (RunningBatchNorm), `"group"` (nn.GroupNorm with `groups`, default
      8, or where `nf` is not divisible by that, its largest divisor below), `"none"`; or any callable that takes `nf`
      and returns a module.
    - `kwargs` go to it: `recipe="course"` for running, `momentum=` for batch, `groups=` for group.

    ValueError for an unknown name, TypeError for a keyword the norm does not take.
    """
    if isinstance(norm, nn.Module):
        raise TypeError(
            f"norm= takes a name or something that makes a norm for a number of channels; got one "
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


def _activates(made):
    """Whether the norm is an activation too, as filter response norm is: then no ReLU stands beside it."""
    return getattr(made, "activates", False)


def conv_layer(ni, nf, ks=3, stride=2, bn=True, norm=None, **kwargs):
    """Convolution, ReLU, norm: (N, ni, H, W) → (N, nf, ⌈H/stride⌉, ⌈W/stride⌉) for odd `ks`.

    - `bn=False`: no norm, as in the course. `norm`: see `make_norm`; None is `"batch"`, the course's.
    - `kwargs`: `leak`, `sub`, `maxv` go to `GeneralRelu`, all others to the norm.

    The convolution has a bias only where no norm follows. ReLU comes before the norm, as in course notebook 07; a norm
    with an attribute `activates = True` (filter response norm) is the activation too, and takes its place.
    """
    if not bn and norm not in (None, "none"):
        raise ValueError(f"bn=False asks for no norm and norm={norm!r} for one: give one of the two")
    relu = GeneralRelu(**{k: kwargs.pop(k) for k in _RELU if k in kwargs})
    made = make_norm("none" if not bn else "batch" if norm is None else norm, nf, **(kwargs if bn else {}))
    conv = nn.Conv2d(ni, nf, ks, stride=stride, padding=ks // 2, bias=made is None)
    if _activates(made) and relu.extra_repr():
        raise ValueError(f"{type(made).__name__} is the activation too, so there is no GeneralRelu; got {relu} for it")
    layers = [conv] if _activates(made) else [conv, relu]
    return nn.Sequential(*layers) if made is None else nn.Sequential(*layers, made)


def conv_rbn(ni, nf, ks=3, stride=2, bn=True, **kwargs):
    """`conv_layer` with RunningBatchNorm; `recipe=`, `mom=`, `eps=` … go to it, `bn=False` leaves it out."""
    return conv_layer(ni, nf, ks, stride, bn, norm="running" if bn else None, **kwargs)


def conv_bn(ni, nf, ks=3, stride=2, bn=True, **kwargs):
    """`conv_layer` with nn.BatchNorm2d, said in the name; `bn=False` leaves it out."""
    return conv_layer(ni, nf, ks, stride, bn, norm="batch" if bn else None, **kwargs)


def conv_gn(ni, nf, ks=3, stride=2, bn=True, **kwargs):
    """`conv_layer` with nn.GroupNorm; `groups=` (default 8, see `make_norm`) goes to it, `bn=False` leaves it out."""
    return conv_layer(ni, nf, ks, stride, bn, norm="group" if bn else None, **kwargs)


def get_cnn_layers(data, nfs, layer, **kwargs):
    """The layers of the course's CNN, as a list.

    - `data`: `data.c` classes come out, `data.c_in` channels go in (1 where there is no `c_in`).
    - `nfs`: channels of each stride-2 layer, the first of kernel size 5, the others 3. Left as it is.
    - `layer(ni, nf, ks, **kwargs)`: `conv_layer`, `conv_rbn`, or your own.

    TypeError or ValueError for sizes that are none, a `layer` that cannot be called, data without `c`.
    """
    sizes = _check_sizes(nfs)
    if isinstance(layer, nn.Module) or not callable(layer):
        raise TypeError(
            f"layer must be a function (ni, nf, ks, …) → nn.Module, such as conv_rbn; got "
            f"{f'one {type(layer).__name__}' if isinstance(layer, nn.Module) else repr(layer)}: pass the function "
            f"itself, unquoted and not called"
        )
    classes = _whole(
        getattr(data, "c", None), "data.c, the number of classes,", ": DataBunch(train_dl, valid_dl, c=10)"
    )
    c_in = getattr(data, "c_in", None)
    ins = [1 if c_in is None else _whole(c_in, "data.c_in, the number of input channels,"), *sizes]
    convs = [layer(ni, nf, 3 if i else 5, **kwargs) for i, (ni, nf) in enumerate(zip(ins, sizes))]
    return [*convs, nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Linear(sizes[-1], classes)]


def get_cnn_model(data, nfs, layer, **kwargs):
    """`nn.Sequential` of `get_cnn_layers`: (N, data.c_in, H, W) → (N, data.c)."""
    return nn.Sequential(*get_cnn_layers(data, nfs, layer, **kwargs))


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def init_cnn(model, uniform=False):
    """Kaiming normal (or `uniform`) weights for every convolution in `model`, a = 0.1 as in the course; biases zero."""
    fill = init.kaiming_uniform_ if uniform else init.kaiming_normal_
    for module in model.modules():
        if isinstance(module, _CONVS):
            fill(module.weight, a=0.1)
            if module.bias is not None:
                init.zeros_(module.bias)


class Residual(nn.Sequential):
    """x → x + layers(x); the layers keep the shape."""

    def forward(self, x):
        return x + super().forward(x)


def resnet9(c_in=3, c_out=10, norm="running", width=64, **norm_kwargs):
    """The nine-layer residual net in common use on CIFAR: (N, c_in, H, W) → (N, c_out), H and W from 8.

    prep, layer1 and a residual, layer2, layer3 and a residual, max pool, linear, each step convolution, norm, ReLU;
    `width` channels in prep (default 64: 6.6 million parameters, the field's size), doubled by each layer.
    `norm` and its `norm_kwargs`: see `make_norm`. Initialised by `init_cnn`.

    Source: D. Page, "How to train your ResNet" (2018); the form without his output scaling.
    """

    def conv(ni, nf, *pool):
        made = make_norm(norm, nf, **norm_kwargs)
        relu = None if _activates(made) else nn.ReLU()
        layers = [nn.Conv2d(ni, nf, 3, padding=1, bias=made is None), made, relu, *pool]
        return nn.Sequential(*(layer for layer in layers if layer is not None))

    def halved():
        return nn.MaxPool2d(2)

    def residual(nf):
        return Residual(conv(nf, nf), conv(nf, nf))

    w = _whole(width, "width")
    parts = OrderedDict(
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


def _whole(value, name, repair=""):
    """`value` as an int from 1: anything that is one (NumPy's, a tensor of one), but no bool and no float."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number from 1; got {value!r}{repair}")
    return number


def _check_sizes(nfs):
    if isinstance(nfs, (str, bytes)) or not hasattr(nfs, "__iter__"):
        raise TypeError(f"nfs must be a list of channel counts, such as [8, 16, 32]; got {nfs!r}")
    sizes = [_whole(n, "each channel count in nfs") for n in nfs]
    if not sizes:
        raise ValueError("nfs must hold one channel count per layer, at least one; got none: nfs=[8, 16, 32]")
    return sizes
