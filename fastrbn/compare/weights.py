"""Weights computed from parameters before each use: weight standardisation and centralisation, for norms of `peers`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["centralize_weights", "standardize_weights"]


def standardize_weights(model: nn.Module, eps: float = 1e-5) -> nn.Module:
    """Standardise the weights of the layers before norms, in place: each output's weights get mean 0 and variance 1.

    W is computed from the parameter V at every use: W = (V − mean V)/√(var V + eps), over all inputs and positions of
    an output; the gradient goes through both. Made for GroupNorm.

    Convolutions, transposed ones included, and Linear layers are changed if a norm comes after them in the order of
    `model.modules()`; a norm is any other module whose own parameters are vectors. What comes after the last norm, such as
    the classifier, needs its scale. Weights with one number an output stay as they are: standardised, they would be 0.

    Parameters
    ----------
    model : nn.Module
        With its weights initialised: afterwards `layer.weight` is a computed value, and filling it has no effect.
    eps : float, default 1e-5
        Added to the variance.

    Returns
    -------
    nn.Module
        `model` itself. Another call changes nothing.

    Notes
    -----
    V is the parameter `<layer>.parametrizations.weight.original`, also in `state_dict()`, which therefore loads into a
    model that was prepared likewise. `torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")` makes W an
    ordinary parameter again. As PyTorch's parametrizations do, it keeps the model from being pickled whole.

    Source: S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019.

    Examples
    --------
    >>> net = standardize_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)))
    >>> net[0].weight[0].mean().abs() < 1e-6
    tensor(True)
    """
    return _parametrize(model, lambda layer: _Standardized(layer, eps))


def centralize_weights(model: nn.Module) -> nn.Module:
    """Subtract each output's mean from the weights of the layers before norms, in place: W = V − mean V.

    `MABN`, which subtracts no mean itself, needs this. Which layers, and all else: as in `standardize_weights`.

    Parameters
    ----------
    model : nn.Module
        With its weights initialised.

    Returns
    -------
    nn.Module
        `model` itself. Another call changes nothing, nor does one after `standardize_weights`.
    """
    return _parametrize(model, _Centralized)


class _Centralized(nn.Module):
    """V − mean V for each output of a layer."""

    def __init__(self, layer):
        super().__init__()
        # (out, in, …) reduces all but the first; transposed convolutions have (groups·in, out, …)
        self.groups = layer.groups if getattr(layer, "transposed", False) else None

    def forward(self, v):
        return self._normalize(v.flatten(1), 1).view_as(v) if self.groups is None else self._transposed(v)

    def _transposed(self, v):
        grouped = v.reshape(self.groups, v.shape[0] // self.groups, v.shape[1], -1)
        return self._normalize(grouped, (1, 3)).view_as(v)

    def _normalize(self, v, dims):
        return v - v.mean(dims, keepdim=True)


class _Standardized(_Centralized):
    def __init__(self, layer, eps):
        super().__init__(layer)
        self.eps = eps

    def _normalize(self, v, dims):
        var, mean = torch.var_mean(v, dims, correction=0, keepdim=True)
        return (v - mean) * (var + self.eps).rsqrt()


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _parametrize(model, make):
    waiting = []
    for module in [m for m in model.modules() if not isinstance(m, parametrize.ParametrizationList)]:
        if isinstance(module, (*_CONVS, nn.Linear)):
            waiting.append(module)
        elif {p.dim() for p in module.parameters(recurse=False)} == {1}:
            for layer in waiting:
                _parametrize_layer(layer, make(layer))
            waiting = []
    return model


def _parametrize_layer(layer, parametrization):
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    done = [*layer.parametrizations.weight] if parametrize.is_parametrized(layer, "weight") else []
    if layer.weight.numel() > outputs and not any(isinstance(p, type(parametrization)) for p in done):
        parametrize.register_parametrization(layer, "weight", parametrization)
