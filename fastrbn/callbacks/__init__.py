"""Callbacks, by purpose. None of them knows another; what they share, they read from the run."""

from .diagnose.activations import ActivationStats
from .diagnose.graph import GraphHolder, GraphMonitor, GraphReport
from .diagnose.hooks import Hook, Hooks, ListContainer, append_stats, append_stats_hist, children
from .diagnose.magnitudes import ParamMagnitudes
from .diagnose.nonfinite.halt import HaltOnNaN, NonFiniteError, NonFiniteReport
from .diagnose.profiling import Profiler
from .distributed.callback import Distributed
from .step.compiling import CompileCallback
from .step.device import BatchTransformXCallback, CudaCallback
from .step.ema import EMA
from .step.gradients import GradientAccumulation, GradientClip
from .step.lr_find import LR_Find
from .step.mixup import MixUp
from .step.precision import MixedPrecision
from .step.schedule import (
    ParamScheduler,
    annealer,
    combine_scheds,
    cos_1cycle_anneal,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)
from .track.avg_stats import AvgStats, AvgStatsCallback
from .track.checkpoint import Checkpoint, CheckpointError
from .track.loggers import CSVLogger, TensorBoardLogger
from .track.metrics import EpochMetric, accuracy
from .track.progress import ProgressCallback
from .track.recorder import Recorder
from .track.save_best import SaveBest
from .track.stopping import EarlyStopping

__all__ = [
    "ActivationStats",
    "AvgStats",
    "AvgStatsCallback",
    "BatchTransformXCallback",
    "CSVLogger",
    "Checkpoint",
    "CheckpointError",
    "CompileCallback",
    "CudaCallback",
    "Distributed",
    "EMA",
    "EarlyStopping",
    "EpochMetric",
    "GradientAccumulation",
    "GradientClip",
    "GraphHolder",
    "GraphMonitor",
    "GraphReport",
    "HaltOnNaN",
    "Hook",
    "Hooks",
    "LR_Find",
    "ListContainer",
    "MixUp",
    "MixedPrecision",
    "NonFiniteError",
    "NonFiniteReport",
    "ParamMagnitudes",
    "ParamScheduler",
    "Profiler",
    "ProgressCallback",
    "Recorder",
    "SaveBest",
    "TensorBoardLogger",
    "accuracy",
    "annealer",
    "append_stats",
    "append_stats_hist",
    "children",
    "combine_scheds",
    "cos_1cycle_anneal",
    "sched_cos",
    "sched_exp",
    "sched_lin",
    "sched_no",
]
