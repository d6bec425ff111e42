"""A fastai learner with this package's layer, and the halt at the first NaN."""

import torch
from fastai.basics import DataLoaders, Learner, accuracy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastrbn import HaltOnNaN, convert_batchnorm
from fastrbn.fastai import Diagnose

torch.manual_seed(0)
x = torch.randn(640, 8)
y = (x.sum(1) > 0).long()
dls = DataLoaders.from_dsets(TensorDataset(x[:512], y[:512]), TensorDataset(x[512:], y[512:]), bs=4, device="cpu")
model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
halt = HaltOnNaN()
learn = Learner(dls, convert_batchnorm(model), loss_func=F.cross_entropy, metrics=accuracy, cbs=Diagnose(halt))
learn.fit(2, 0.01)
print(halt.report)
