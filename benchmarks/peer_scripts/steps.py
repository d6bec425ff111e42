"""The same tiny training in each framework: `EPOCHS` epochs over ready batches, SGD, one validation batch an epoch.

A function a framework, `f(model, train, valid, full)`. Bare: what the framework does by itself, its own bookkeeping off
where it has a switch for that. Full: loss and rate of every step kept, average loss and accuracy of the training epoch,
a progress bar.
"""

import torch
from torch.nn.functional import cross_entropy

LR = 0.1
EPOCHS = 3


def raw(model, train, valid, full):
    opt = torch.optim.SGD(model.parameters(), LR)
    for _ in range(EPOCHS):
        model.train()
        for xb, yb in train:
            loss = cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        with torch.no_grad():
            for xb, yb in valid:
                cross_entropy(model(xb), yb)


def fastrbn(model, train, valid, full):
    from functools import partial

    from fastrbn import AvgStatsCallback, DataBunch, Learner, ProgressCallback, Recorder, Runner, accuracy

    learn = Learner(model, torch.optim.SGD(model.parameters(), LR), cross_entropy, DataBunch(train, valid))
    cbs = [Recorder, partial(AvgStatsCallback, accuracy), ProgressCallback] if full else []
    Runner(cb_funcs=cbs).fit(EPOCHS, learn)


def fastai(model, train, valid, full):
    from functools import partial

    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner, Recorder
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper

    opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    learn = Learner(DataLoaders(train, valid), model, cross_entropy, opt_func, LR, metrics=accuracy if full else None)
    if full:
        learn.recorder.train_metrics = True
    else:
        learn.remove_cbs([ProgressCallback, Recorder])
    learn.fit(EPOCHS)


def lightning(model, train, valid, full):
    import lightning
    from torchmetrics.classification import MulticlassAccuracy

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses, self.lrs = model, [], []
            self.accuracy = MulticlassAccuracy(10, average="micro")

        def training_step(self, batch, batch_idx):
            xb, yb = batch
            out = self.model(xb)
            loss = cross_entropy(out, yb)
            if full:
                self.losses.append(loss.detach())
                self.lrs.append(self.optimizers().param_groups[0]["lr"])
                self.accuracy(out, yb)
                self.log("loss", loss, on_step=False, on_epoch=True)
                self.log("accuracy", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)
            return loss

        def validation_step(self, batch, batch_idx):
            cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), LR)

    # barebones turns logging and the bar off; it also skips validation unless it is asked for
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False} if full else {}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, barebones=not full, limit_val_batches=1, num_sanity_val_steps=0, **options
    )
    trainer.fit(Classifier(), train, valid)


def ignite(model, train, valid, full):
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import ProgressBar
    from ignite.metrics import Accuracy, Loss

    opt = torch.optim.SGD(model.parameters(), LR)
    outputs = {"output_transform": lambda x, y, out, loss: (out, y, loss.item())} if full else {}
    trainer = create_supervised_trainer(model, opt, cross_entropy, **outputs)
    evaluator = create_supervised_evaluator(model)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(valid))
    if full:
        losses, lrs = [], []
        Accuracy(lambda output: output[:2]).attach(trainer, "accuracy")
        Loss(cross_entropy, lambda output: output[:2]).attach(trainer, "loss")
        ProgressBar().attach(trainer, output_transform=lambda output: {"batch loss": output[2]})

        @trainer.on(Events.ITERATION_COMPLETED)
        def record(engine):
            losses.append(engine.state.output[2])
            lrs.append(opt.param_groups[0]["lr"])

    trainer.run(train, max_epochs=EPOCHS)


def skorch(model, train, valid, full):
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EpochScoring, ProgressBar

    cbs = [EpochScoring("accuracy", name="train_acc", on_train=True, lower_is_better=False), ProgressBar()]
    net = NeuralNetClassifier(
        model,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        lr=LR,
        max_epochs=EPOCHS,
        iterator_train=lambda dataset, **kwargs: train,
        iterator_valid=lambda dataset, **kwargs: valid,
        train_split=_Same(),
        callbacks=cbs if full else None,
        verbose=int(full),
        # its own scores of an epoch, of which validation accuracy is one
        **({} if full else {"callbacks__valid_acc": None, "callbacks__print_log": None}),
    )
    net.fit(*train.dataset)


class _Same:
    """skorch wants a split even where the iterators are given: validation on the same data."""

    def __call__(self, dataset, y=None, **kwargs):
        return dataset, dataset
