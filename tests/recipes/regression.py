"""Regression: a loss for numbers, and a metric of your own, which is any function of prediction and target."""

import torch
from torch import nn
from torch.nn import functional as F

from fastrbn import AvgStatsCallback, DataBunch, Dataset, RunningBatchNorm, get_dls, get_runner


def mean_absolute_error(pred, target):
    return (pred - target).abs().mean()


torch.manual_seed(0)
x = torch.rand(640, 2) * 4 - 2
y = x[:, :1] * x[:, 1:]
data = DataBunch(*get_dls(Dataset(x[:512], y[:512]), Dataset(x[512:], y[512:]), 16))
model = nn.Sequential(nn.Linear(2, 64), RunningBatchNorm(64), nn.ReLU(), nn.Linear(64, 1))
learn, run = get_runner(model, data, lr=0.05, loss_func=F.mse_loss, cbs=[AvgStatsCallback(mean_absolute_error)])
run.fit(4, learn)
