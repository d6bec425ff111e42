"""Weights computed from parameters before each use: weight standardisation, and centralisation for a peer, MABN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["centralize_weights", "standardize_weights"]


def standardize_weights(model: nn.Module, eps: float = 1e-5) -> nn.Module:
    """Standardise the weights of layers before norms, in place: each output's weights get mean 0 and variance 1.

    The weight W is computed from the parameter V at each use: W = (V − mean V)/√(var V + eps), over all inputs and
    positions of an output. The gradient goes through both. It was made for GroupNorm, and helps running batch norm in
    small batches (docs/evidence.md). Use it before training: it changes the outputs of a trained model.

    Convolutions (also transposed) and Linear layers are changed if a norm follows them in the order of
    `model.modules()`. A norm is any other module whose own parameters are vectors. Layers after the last norm, such as
    the classifier, need their scale. Weights with one number per output are left alone, since they would become 0.

    Parameters
    ----------
    model : nn.Module
        With initialised weights; afterwards `layer.weight` is a computed value, and filling it has no effect.
    eps : float, default 1e-5
        Added to the variance.

    Returns
    -------
    nn.Module
        `model` itself. A second call changes nothing.

    Notes
    -----
    V is the parameter `<layer>.parametrizations.weight.original`, also in `state_dict()`, which therefore loads into a
    model prepared in the same way. `torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")` makes W an
    ordinary parameter again. Like all parametrizations of PyTorch, it prevents pickling the whole model.

    Examples
    --------
    >>> net = standardize_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)))
    >>> net[0].weight[0].mean().abs() < 1e-6
    tensor(True)

    References
    ----------
    S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019.
    """
    return _parametrize(model, lambda layer: _Standardized(layer, eps))


def centralize_weights(model: nn.Module) -> nn.Module:
    """Subtract each output's mean from the weights of layers before norms, in place: W = V − mean V.

    `MABN` needs this, because it does not subtract a mean itself. Layers are chosen as in `standardize_weights`.

    Parameters
    ----------
    model : nn.Module
        With initialised weights.

    Returns
    -------
    nn.Module
        `model` itself. A second call changes nothing, nor does a call after `standardize_weights`.

    Examples
    --------
    >>> net = centralize_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> net[0].weight[0].mean().abs() < 1e-6
    tensor(True)
    """
    return _parametrize(model, _Centralized)


class _Centralized(nn.Module):
    """V − mean V for each output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # (out, in, …) reduces all but the first; transposed convolutions have (groups·in, out, …)
        self.groups: Any = layer.groups if getattr(layer, "transposed", False) else None

    def forward(self, v: Tensor) -> Tensor:
        return self._normalize(v.flatten(1), 1).view_as(v) if self.groups is None else self._transposed(v)

    def _transposed(self, v: Tensor) -> Tensor:
        grouped = v.reshape(self.groups, v.shape[0] // self.groups, v.shape[1], -1)
        return self._normalize(grouped, (1, 3)).view_as(v)

    def _normalize(self, v: Tensor, dims: int | tuple[int, ...]) -> Tensor:
        return v - v.mean(dims, keepdim=True)


class _Standardized(_Centralized):
    """V standardised for each output of a layer."""

    def __init__(self, layer: nn.Module, eps: float) -> None:
        super().__init__(layer)
        self.eps = eps

    def _normalize(self, v: Tensor, dims: int | tuple[int, ...]) -> Tensor:
        var, mean = torch.var_mean(v, dims, correction=0, keepdim=True)
        return (v - mean) * (var + self.eps).rsqrt()


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _parametrize(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Parametrise the weights of all layers that a norm follows."""
    waiting: list[nn.Module] = []
    for module in [m for m in model.modules() if not isinstance(m, parametrize.ParametrizationList)]:
        if isinstance(module, (*_CONVS, nn.Linear)):
            waiting.append(module)
        elif {p.dim() for p in module.parameters(recurse=False)} == {1}:
            for layer in waiting:
                _parametrize_layer(layer, make(layer))
            waiting = []
    return model


def _parametrize_layer(layer: Any, parametrization: nn.Module) -> None:
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    done = [*layer.parametrizations.weight] if parametrize.is_parametrized(layer, "weight") else []
    if layer.weight.numel() > outputs and not any(isinstance(p, type(parametrization)) for p in done):
        parametrize.register_parametrization(layer, "weight", parametrization)
