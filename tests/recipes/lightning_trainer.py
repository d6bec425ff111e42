"""A Lightning trainer with this package's layer and its diagnosis."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from fastrbn import HaltOnNaN, ParamMagnitudes, RunningBatchNorm
from fastrbn.lightning import Diagnose


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), RunningBatchNorm(16), nn.ReLU(), nn.Linear(16, 2))
        self.configure_optimizers = lambda: torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


halt, magnitudes = HaltOnNaN(), ParamMagnitudes()
trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[Diagnose(halt, magnitudes)])
trainer.fit(Net(), torch.utils.data.DataLoader([(torch.randn(8), torch.randint(2, ())) for _ in range(200)], 4))
print(halt.report, magnitudes.growth())
