"""A model of two inputs: the loader yields `((a, b), y)`, and the model is called as `model(a, b)`."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastrbn import AvgStatsCallback, DataBunch, RunningBatchNorm, accuracy, get_runner


class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), RunningBatchNorm(32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, left, right):
        return self.net(left * right)


torch.manual_seed(0)
a, b = torch.randn(2, 512, 8)  # do they point in the same direction?
pairs = [((left, right), (left @ right > 0).long()) for left, right in zip(a, b)]
data = DataBunch(DataLoader(pairs[:448], 16, shuffle=True), DataLoader(pairs[448:], 64), c=2)
learn, run = get_runner(Same(), data, lr=0.2, cbs=[AvgStatsCallback(accuracy)])
run.fit(3, learn)
