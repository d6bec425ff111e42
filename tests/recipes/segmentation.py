"""Segmentation: a class for each pixel. Losses and metrics take scores (N, classes, H, W) and targets (N, H, W)."""

import torch
from torch import nn

from fastrbn import AvgStatsCallback, DataBunch, Dataset, RunningBatchNorm, accuracy, get_dls, get_runner


def block(ni, nf):
    return nn.Sequential(nn.Conv2d(ni, nf, 3, padding=1, bias=False), RunningBatchNorm(nf), nn.ReLU())


torch.manual_seed(0)
masks = torch.zeros(160, 24, 24, dtype=torch.long)
for mask, (top, left) in zip(masks, torch.randint(14, (160, 2))):
    mask[top : top + 10, left : left + 10] = 1  # a square
images = (masks + torch.randn(160, 24, 24))[:, None]
data = DataBunch(*get_dls(Dataset(images[:128], masks[:128]), Dataset(images[128:], masks[128:]), 4), c=2)
model = nn.Sequential(block(1, 8), block(8, 8), nn.Conv2d(8, 2, 1))
learn, run = get_runner(model, data, lr=0.2, cbs=[AvgStatsCallback(accuracy)])
run.fit(2, learn)
