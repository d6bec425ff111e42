"""Class weights: a rare class counts more in the loss. The loss is a module, and follows the model to its device."""

import torch
from torch import nn

from fastrbn import AvgStatsCallback, CudaCallback, DataBunch, Dataset, PerClassAccuracy, RunningBatchNorm, accuracy
from fastrbn import get_dls, get_runner

torch.manual_seed(0)
x = torch.randn(800, 4)
y = (x.sum(1) + torch.randn(800) > 3.5).long()  # one in eighteen
weights = len(y) / (2 * torch.bincount(y))
data = DataBunch(*get_dls(Dataset(x[:640], y[:640]), Dataset(x[640:], y[640:]), 16), c=2)
model = nn.Sequential(nn.Linear(4, 32), RunningBatchNorm(32), nn.ReLU(), nn.Linear(32, 2))
loss, per_class = nn.CrossEntropyLoss(weight=weights), PerClassAccuracy()
cbs = [CudaCallback, AvgStatsCallback([accuracy, per_class])]
learn, run = get_runner(model, data, lr=0.1, loss_func=loss, cbs=cbs)
run.fit(4, learn)
print(per_class.compute())  # without the weights: [1.00, 0.17]
