"""A Lightning trainer with this package's layer and its diagnosis."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F

from fastrbn import HaltOnNaN, ParamMagnitudes, RunningBatchNorm
from fastrbn.lightning import Diagnose


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), RunningBatchNorm(16), nn.ReLU(), nn.Linear(16, 2))
        self.training_step = lambda batch, i: F.cross_entropy(self.net(batch[0]), batch[1])
        self.configure_optimizers = lambda: torch.optim.SGD(self.parameters(), lr=0.1)


batches = [(torch.randn(4, 8), torch.randint(2, (4,))) for _ in range(50)]
halt, magnitudes = HaltOnNaN(), ParamMagnitudes()
trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[Diagnose(halt, magnitudes)])
trainer.fit(Net(), batches)
print(halt.report, magnitudes.growth())
