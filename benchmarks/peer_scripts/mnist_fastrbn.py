"""MNIST with fastrbn."""

from functools import partial

import torch
from common import BS, LR
from torch.nn.functional import cross_entropy

from fastrbn import (
    AvgStatsCallback,
    DataBunch,
    Dataset,
    Learner,
    ProgressCallback,
    Recorder,
    Runner,
    accuracy,
    get_dls,
)


def fit(model, train, valid):
    data = DataBunch(*get_dls(Dataset(*train), Dataset(*valid), BS))
    learn = Learner(model, torch.optim.SGD(model.parameters(), LR), cross_entropy, data)
    run = Runner(cb_funcs=[Recorder, partial(AvgStatsCallback, accuracy), ProgressCallback])
    run.fit(1, learn)
    return run.avg_stats.valid_stats.avg_stats[1]
