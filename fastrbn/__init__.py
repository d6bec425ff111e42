"""fastrbn: training with callbacks, built around running batch norm, a batch norm for every batch size down to one."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .util import suggestion

__all__ = [  # noqa: RUF022 - grouped by subject
    # the loop
    "EVENTS",
    "Callback",
    "CancelBatchException",
    "CancelEpochException",
    "CancelTrainException",
    "Learner",
    "Runner",
    "TrainEvalCallback",
    "camel2snake",
    # the layer
    "RECIPES",
    "NormState",
    "Recipe",
    "RunningBatchNorm",
    "RunningBatchNorm1d",
    "RunningBatchNorm2d",
    "RunningBatchNorm3d",
    "convert_batchnorm",
    "fuse_conv_rbn",
    "recompute_statistics",
    "running_batch_norm",
    "to_batchnorm",
    # models
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
    # making a learner and a run
    "get_learn_run",
    "get_runner",
    "listify",
    "param_groups",
    # around a fit
    "LabelSmoothingCrossEntropy",
    "fit_one_cycle",
    "seed_everything",
    # data
    "BadDataError",
    "BatchLoader",
    "Cutout",
    "DataBunch",
    "DataError",
    "DataNotFoundError",
    "Dataset",
    "DownloadError",
    "ImageData",
    "RandomCrop",
    "RandomFlip",
    "data_root",
    "get_data",
    "get_dls",
    "glyphs",
    "image_databunch",
    "load_dataset",
    "load_folder",
    "normalize_to",
    "to_channels_last",
    "view_tfm",
    # callbacks
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
    # diagnosis in other loops
    "Watch",
    "watch",
    # the autograd graph
    "AutogradGraph",
    "GraphNode",
    "LeafTable",
    "autograd_graph",
    "leaf_table",
    "record_modules",
    # a table of the model
    "Summary",
    "model_summary",
]

# Names are imported on first use (PEP 562), and torch with them, so that `fastrbn --help` is quick. The imports below
# are for editors and type checkers; tests/test_architecture.py checks that they agree with __all__.
_HOMES = ("learn", "norm", "models", "build", "data", "callbacks", "graph", "summary", "watching")

if TYPE_CHECKING:
    from .build import (
        LabelSmoothingCrossEntropy,
        fit_one_cycle,
        get_learn_run,
        get_runner,
        listify,
        param_groups,
        seed_everything,
    )
    from .callbacks import (
        EMA,
        ActivationStats,
        AvgStats,
        AvgStatsCallback,
        BatchTransformXCallback,
        Checkpoint,
        CheckpointError,
        CompileCallback,
        CSVLogger,
        CudaCallback,
        Distributed,
        EarlyStopping,
        EpochMetric,
        GradientAccumulation,
        GradientClip,
        GraphHolder,
        GraphMonitor,
        GraphReport,
        HaltOnNaN,
        Hook,
        Hooks,
        ListContainer,
        LR_Find,
        MixedPrecision,
        MixUp,
        NonFiniteError,
        NonFiniteReport,
        ParamMagnitudes,
        ParamScheduler,
        Profiler,
        ProgressCallback,
        Recorder,
        SaveBest,
        TensorBoardLogger,
        accuracy,
        annealer,
        append_stats,
        append_stats_hist,
        children,
        combine_scheds,
        cos_1cycle_anneal,
        sched_cos,
        sched_exp,
        sched_lin,
        sched_no,
    )
    from .data import (
        BadDataError,
        BatchLoader,
        Cutout,
        DataBunch,
        DataError,
        DataNotFoundError,
        Dataset,
        DownloadError,
        ImageData,
        RandomCrop,
        RandomFlip,
        data_root,
        get_data,
        get_dls,
        glyphs,
        image_databunch,
        load_dataset,
        load_folder,
        normalize_to,
        to_channels_last,
        view_tfm,
    )
    from .graph import AutogradGraph, GraphNode, LeafTable, autograd_graph, leaf_table, record_modules
    from .learn import (
        EVENTS,
        Callback,
        CancelBatchException,
        CancelEpochException,
        CancelTrainException,
        Learner,
        Runner,
        TrainEvalCallback,
        camel2snake,
    )
    from .models import (
        GeneralRelu,
        Lambda,
        Residual,
        conv_bn,
        conv_gn,
        conv_layer,
        conv_rbn,
        flatten,
        get_cnn_layers,
        get_cnn_model,
        init_cnn,
        make_norm,
        resnet9,
    )
    from .norm import (
        RECIPES,
        NormState,
        Recipe,
        RunningBatchNorm,
        RunningBatchNorm1d,
        RunningBatchNorm2d,
        RunningBatchNorm3d,
        convert_batchnorm,
        fuse_conv_rbn,
        recompute_statistics,
        running_batch_norm,
        to_batchnorm,
    )
    from .summary import Summary, model_summary
    from .watching import Watch, watch


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if name in module.__all__:
                value = globals()[name] = getattr(module, name)
                return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):  # a submodule, such as fastrbn.norm
        return import_module(f".{name}", __name__)
    raise AttributeError(f"fastrbn has no public name '{name}'.{suggestion(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})
