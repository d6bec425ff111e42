"""Several labels per sample: scores (N, labels), targets of 0 and 1, and the F1 score of the whole pass."""

import torch
from torch import nn
from torch.nn import functional as F

from fastrbn import F1, AvgStatsCallback, DataBunch, Dataset, RunningBatchNorm, get_dls, get_runner

torch.manual_seed(0)
x = torch.randn(640, 8)
y = torch.stack([x[:, 0] > 0, x[:, 1] + x[:, 2] > 0, x.sum(1) > 2], 1).float()
data = DataBunch(*get_dls(Dataset(x[:512], y[:512]), Dataset(x[512:], y[512:]), 8))
model = nn.Sequential(nn.Linear(8, 32), RunningBatchNorm(32), nn.ReLU(), nn.Linear(32, 3))
loss = F.binary_cross_entropy_with_logits
learn, run = get_runner(model, data, lr=0.2, loss_func=loss, cbs=[AvgStatsCallback(F1())])
run.fit(3, learn)
