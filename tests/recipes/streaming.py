"""Streaming data: an iterable data set without a length. An epoch is what the stream yields."""

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fastrbn import AvgStatsCallback, DataBunch, RunningBatchNorm, accuracy, get_runner


class Stream(IterableDataset):
    def __init__(self, n, seed):
        self.n, self.seed = n, seed

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.n):
            x = torch.randn(6, generator=generator)
            yield x, (x[:3].sum() > x[3:].sum()).long()


data = DataBunch(DataLoader(Stream(400, 0), 8), DataLoader(Stream(100, 1), 50), c=2)
model = nn.Sequential(nn.Linear(6, 32), RunningBatchNorm(32), nn.ReLU(), nn.Linear(32, 2))
learn, run = get_runner(model, data, lr=0.2, cbs=[AvgStatsCallback(accuracy)])
run.fit(3, learn)
