"""MNIST with Lightning. TorchMetrics, which it comes with, has the accuracy; its progress bar is on by default."""

import lightning
import torch
from common import BS, LR
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Classifier(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.accuracy = torch.nn.ModuleDict({s: MulticlassAccuracy(10, average="micro") for s in ("train_", "valid_")})
        self.losses, self.lrs = [], []

    def training_step(self, batch, batch_idx):
        loss = self.step(batch, "train_")
        self.losses.append(loss.detach())
        self.lrs.append(self.optimizers().param_groups[0]["lr"])
        return loss

    def validation_step(self, batch, batch_idx):
        self.step(batch, "valid_")

    def step(self, batch, stage):
        xb, yb = batch
        out = self.model(xb)
        loss = cross_entropy(out, yb)
        self.accuracy[stage](out, yb)
        self.log(f"{stage}loss", loss, on_step=False, on_epoch=True)
        self.log(f"{stage}accuracy", self.accuracy[stage], on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LR)


def fit(model, train, valid):
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, num_sanity_val_steps=0
    )
    train_dl = DataLoader(TensorDataset(*train), BS, shuffle=True)
    valid_dl = DataLoader(TensorDataset(*valid), 2 * BS)
    trainer.fit(Classifier(model), train_dl, valid_dl)
    return trainer.callback_metrics["valid_accuracy"].item()
