"""The loop: events, callbacks, learner and runner."""

from .callback import Callback, TrainEvalCallback, camel2snake
from .events import EVENTS, CancelBatchException, CancelEpochException, CancelTrainException
from .learner import Learner
from .predict import Predictions
from .runner import Runner

__all__ = [
    "EVENTS",
    "Callback",
    "CancelBatchException",
    "CancelEpochException",
    "CancelTrainException",
    "Learner",
    "Predictions",
    "Runner",
    "TrainEvalCallback",
    "camel2snake",
]
