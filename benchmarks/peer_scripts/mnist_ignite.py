"""MNIST with Ignite."""

import torch
from common import BS, LR
from ignite.contrib.handlers import ProgressBar
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy, Loss
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def fit(model, train, valid):
    train_dl = DataLoader(TensorDataset(*train), BS, shuffle=True)
    valid_dl = DataLoader(TensorDataset(*valid), 2 * BS)
    opt = torch.optim.SGD(model.parameters(), LR)
    trainer = create_supervised_trainer(
        model, opt, cross_entropy, output_transform=lambda x, y, out, loss: (out, y, loss.item())
    )
    evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy(), "loss": Loss(cross_entropy)})
    for name, metric in {"accuracy": Accuracy, "loss": lambda f: Loss(cross_entropy, f)}.items():
        metric(lambda output: output[:2]).attach(trainer, name)
    ProgressBar().attach(trainer, output_transform=lambda output: {"batch loss": output[2]})
    losses, lrs = [], []

    @trainer.on(Events.ITERATION_COMPLETED)
    def record(engine):
        losses.append(engine.state.output[2])
        lrs.append(opt.param_groups[0]["lr"])

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        print("train:", engine.state.metrics)
        print("valid:", evaluator.run(valid_dl).metrics)

    trainer.run(train_dl, max_epochs=1)
    return evaluator.state.metrics["accuracy"]
