"""Running batch norm: the layer, its recipes and its functional form. Knows nothing of training."""

from .convert import convert_batchnorm, fuse_conv_rbn, to_batchnorm
from .functional import running_batch_norm
from .layers import RunningBatchNorm, RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d
from .recipes import RECIPES, Clamp, Memory, Recipe, Skip, get_recipe
from .recompute import recompute_statistics
from .reference import NormState
from .weights import standardize_weights

__all__ = [
    "RECIPES",
    "Clamp",
    "Memory",
    "NormState",
    "Recipe",
    "RunningBatchNorm",
    "RunningBatchNorm1d",
    "RunningBatchNorm2d",
    "RunningBatchNorm3d",
    "Skip",
    "convert_batchnorm",
    "fuse_conv_rbn",
    "get_recipe",
    "recompute_statistics",
    "running_batch_norm",
    "standardize_weights",
    "to_batchnorm",
]
