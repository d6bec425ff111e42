"""Callbacks, by purpose. None of them knows another; what they share, they read from the run."""

from .activations import ActivationStats
from .checkpoint import Checkpoint, CheckpointError, SaveBest
from .compiling import CompileCallback
from .device import BatchTransformXCallback, CudaCallback
from .distributed import Distributed
from .ema import EMA
from .graph import GraphHolder, GraphMonitor, GraphReport
from .hooks import Hook, Hooks, ListContainer, append_stats, append_stats_hist, children
from .loggers import CSVLogger, TensorBoardLogger
from .mixup import MixUp
from .nonfinite import HaltOnNaN, NonFiniteError, NonFiniteReport
from .optimise import GradientAccumulation, GradientClip
from .params import ParamMagnitudes
from .precision import MixedPrecision
from .profiling import Profiler
from .progress import ProgressCallback
from .record import AvgStats, AvgStatsCallback, EpochMetric, Recorder, accuracy
from .schedule import (
    LR_Find,
    ParamScheduler,
    annealer,
    combine_scheds,
    cos_1cycle_anneal,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)
from .stopping import EarlyStopping

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
