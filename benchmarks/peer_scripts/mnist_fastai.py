"""MNIST with fastai. Its Recorder keeps losses and rates; accuracy of training batches is off by default."""

from functools import partial

import torch
from common import BS, LR
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


def fit(model, train, valid):
    dls = DataLoaders.from_dsets(TensorDataset(*train), TensorDataset(*valid), bs=BS, num_workers=0, device="cpu")
    learn = Learner(
        dls, model, cross_entropy, partial(OptimWrapper, opt=torch.optim.SGD), LR, metrics=accuracy, train_bn=True
    )
    learn.recorder.train_metrics = True
    learn.fit(1)
    return learn.recorder.values[-1][-1]
