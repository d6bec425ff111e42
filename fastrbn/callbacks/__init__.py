"""Callbacks, by purpose. None of them knows another; what they share, they read from the run."""

from .checkpoint import Checkpoint, CheckpointError, SaveBest
from .device import BatchTransformXCallback, CudaCallback
from .graph import GraphHolder, GraphMonitor, GraphReport
from .hooks import ActivationStats, Hook, Hooks, ListContainer, append_stats, children
from .loggers import CSVLogger
from .nonfinite import HaltOnNaN, NonFiniteError, NonFiniteReport
from .params import ParamMagnitudes
from .progress import ProgressCallback
from .record import AvgStats, AvgStatsCallback, Recorder, accuracy
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

__all__ = [
    "ActivationStats",
    "AvgStats",
    "AvgStatsCallback",
    "BatchTransformXCallback",
    "CSVLogger",
    "Checkpoint",
    "CheckpointError",
    "CudaCallback",
    "GraphHolder",
    "GraphMonitor",
    "GraphReport",
    "HaltOnNaN",
    "Hook",
    "Hooks",
    "LR_Find",
    "ListContainer",
    "NonFiniteError",
    "NonFiniteReport",
    "ParamMagnitudes",
    "ParamScheduler",
    "ProgressCallback",
    "Recorder",
    "SaveBest",
    "accuracy",
    "annealer",
    "append_stats",
    "children",
    "combine_scheds",
    "cos_1cycle_anneal",
    "sched_cos",
    "sched_exp",
    "sched_lin",
    "sched_no",
]
