"""Signals in one dimension: the layer takes any input (N, C, *), so the same one serves (N, C, length)."""

import torch
from torch import nn

from fastrbn import AvgStatsCallback, DataBunch, Dataset, RunningBatchNorm1d, accuracy, get_dls, get_runner


def block(ni, nf):
    return nn.Sequential(nn.Conv1d(ni, nf, 5, stride=2, bias=False), RunningBatchNorm1d(nf), nn.ReLU())


torch.manual_seed(0)
time, y = torch.arange(64) / 64, torch.arange(320) % 2
phase = torch.rand(320, 1) * 6.3
tone = torch.sin(6.3 * (3 + y[:, None]) * time + phase)  # three or four waves
x = (tone + 0.5 * torch.randn(320, 64))[:, None]
data = DataBunch(*get_dls(Dataset(x[:256], y[:256]), Dataset(x[256:], y[256:]), 8), c=2)
model = nn.Sequential(block(1, 16), block(16, 16), nn.Flatten(), nn.Linear(16 * 13, 2))
learn, run = get_runner(model, data, lr=0.1, cbs=[AvgStatsCallback(accuracy)])
run.fit(4, learn)
