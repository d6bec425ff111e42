"""Callbacks, by purpose, and the order in which they run.

Callbacks do not import one another; what they share they read from the run (`fastrbn.learn.callback.RUN_STATE`).
"""

from __future__ import annotations

from fastrbn.learn.callback import Callback, TrainEvalCallback

from .diagnose.activations import ActivationStats
from .diagnose.graph import GraphHolder, GraphMonitor, GraphReport
from .diagnose.hooks import Hook, Hooks, ListContainer, append_stats, append_stats_hist, children
from .diagnose.magnitudes import ParamMagnitudes
from .diagnose.nonfinite.halt import HaltOnNaN, NonFiniteError, NonFiniteReport
from .diagnose.profiling import Profiler
from .distributed.callback import Distributed
from .step.closure import Closure
from .step.compiling import CompileCallback
from .step.cuda_graph import CUDAGraph
from .step.device import BatchTransformXCallback, CudaCallback
from .step.ema import EMA
from .step.freezing import Freeze, freeze, unfreeze
from .step.gradients import GradientAccumulation, GradientClip
from .step.lr_find import LR_Find
from .step.mixup import CutMix, MixUp
from .step.precision import MixedPrecision
from .step.schedule import (
    ParamScheduler,
    Warmup,
    annealer,
    combine_scheds,
    cos_1cycle_anneal,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)
from .step.torch_scheduler import TorchScheduler
from .track.avg_stats import AvgStats, AvgStatsCallback
from .track.checkpoint import Checkpoint, CheckpointError
from .track.class_metrics import F1, ConfusionMatrix, IoU, PerClassAccuracy, TopK
from .track.loggers import CSVLogger, JSONLLogger, Log, TensorBoardLogger
from .track.metrics import EpochMetric, accuracy
from .track.progress import ProgressCallback
from .track.recorder import Recorder
from .track.save_best import SaveBest
from .track.stopping import EarlyStopping

# Callbacks run in ascending order in every event; equal ones in the order in which they were given to the Runner.
# Your own callback sets `_order` in its class; without it, it runs at 0.
ORDER: tuple[tuple[type[Callback], int, str], ...] = (
    (GradientAccumulation, -5, "cancels incomplete steps before anyone unscales or reads their gradients"),
    (Freeze, -4, "settles what is trained before others look at it"),
    (Distributed, -3, "assigns ranks before anyone moves the model, prints or writes"),
    (CudaCallback, -2, "moves the model before anyone reads its parameters"),
    (MixedPrecision, -1, "needs the model on its device; unscales gradients before others read them"),
    (ProgressCallback, -1, "starts the table before others write to it"),
    (TrainEvalCallback, 0, "sets the mode and counts batches; the Runner puts it first among those at 0"),
    (ActivationStats, 0, "only reads"),
    (AvgStatsCallback, 0, "its averages are complete before loggers read them"),
    (ParamMagnitudes, 0, "only reads"),
    (Recorder, 0, "only reads"),
    (LR_Find, 1, "sets the rate once the position is counted"),
    (ParamScheduler, 1, "sets the rate once the position is counted"),
    (Warmup, 2, "scales the rate that schedules have set"),
    (BatchTransformXCallback, 2, "transforms the batch on its device"),
    (TorchScheduler, 3, "needs the epoch's averages, and the rate that Warmup puts back after the step"),
    (CSVLogger, 10, "needs the epoch's averages"),
    (GradientClip, 10, "needs unscaled gradients, complete"),
    (JSONLLogger, 10, "needs the epoch's averages"),
    (Log, 10, "needs the epoch's averages"),
    (TensorBoardLogger, 10, "needs the epoch's averages"),
    (SaveBest, 20, "needs the epoch's averages"),
    (EMA, 50, "lends the averaged weights until SaveBest is done; later callbacks see the trained ones"),
    (CutMix, 60, "mixes batches that are transformed, before HaltOnNaN keeps them"),
    (MixUp, 60, "mixes batches that are transformed, before HaltOnNaN keeps them"),
    (HaltOnNaN, 90, "checks loss and gradients once everyone has changed them"),
    (GraphMonitor, 95, "sees the loss that is differentiated, and what other callbacks store"),
    (Closure, 96, "evaluates the batch again as others have left it, and learns who else has a part in the step"),
    (CUDAGraph, 97, "records the step once all others have claimed their parts of it"),
    (CompileCallback, 100, "compiles the model once others have wrapped it or hooked into it"),
    (Checkpoint, 1000, "saves when everyone is done with the step"),
    (EarlyStopping, 2000, "stops once everyone, Checkpoint included, has had the epoch"),
    (Profiler, 3000, "a step ends when everyone is done with the batch"),
)
# Events in which a callback runs after all others, whatever its order.
LAST: tuple[tuple[type[Callback], str, str], ...] = (
    (LR_Find, "after_fit", "restores what others leave in the model, too"),
    (Distributed, "begin_epoch begin_validate after_fit", "others see the plain model there"),
    (
        Distributed,
        "begin_batch after_loss after_cancel_batch after_cancel_epoch after_cancel_train",
        "ranks agree on what all other callbacks have let through",
    ),
)
# The callbacks that take part in run.validate and run.predict, in these events; the others of ORDER do not.
OUTSIDE_FIT: tuple[tuple[type[Callback], str, str], ...] = (
    (CudaCallback, "begin_fit begin_batch", "model and batches must be on one device"),
    (MixedPrecision, "begin_fit after_fit", "the model computes as in the fit's validation"),
    (BatchTransformXCallback, "begin_batch", "the model expects transformed batches"),
)
for _cls, _order, _ in ORDER:
    _cls._order, _cls._outside_fit = _order, frozenset()
for _cls, _events, _ in OUTSIDE_FIT:
    _cls._outside_fit = frozenset(_events.split())
for _cls, _events, _ in LAST:
    _cls._last = _cls._last | set(_events.split())

__all__ = [
    "ActivationStats",
    "AvgStats",
    "AvgStatsCallback",
    "BatchTransformXCallback",
    "CSVLogger",
    "CUDAGraph",
    "Checkpoint",
    "CheckpointError",
    "Closure",
    "CompileCallback",
    "ConfusionMatrix",
    "CudaCallback",
    "CutMix",
    "Distributed",
    "EMA",
    "EarlyStopping",
    "EpochMetric",
    "F1",
    "Freeze",
    "GradientAccumulation",
    "GradientClip",
    "GraphHolder",
    "GraphMonitor",
    "GraphReport",
    "HaltOnNaN",
    "Hook",
    "Hooks",
    "IoU",
    "JSONLLogger",
    "LR_Find",
    "ListContainer",
    "Log",
    "MixUp",
    "MixedPrecision",
    "NonFiniteError",
    "NonFiniteReport",
    "ParamMagnitudes",
    "ParamScheduler",
    "PerClassAccuracy",
    "Profiler",
    "ProgressCallback",
    "Recorder",
    "SaveBest",
    "TensorBoardLogger",
    "TopK",
    "TorchScheduler",
    "Warmup",
    "accuracy",
    "annealer",
    "append_stats",
    "append_stats_hist",
    "children",
    "combine_scheds",
    "cos_1cycle_anneal",
    "freeze",
    "sched_cos",
    "sched_exp",
    "sched_lin",
    "sched_no",
    "unfreeze",
]
