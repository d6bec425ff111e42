"""MNIST with skorch. Its history keeps each batch's loss; training accuracy is that of the batches' outputs."""

import torch
from common import BS, LR
from skorch import NeuralNetClassifier
from skorch.callbacks import EpochScoring, ProgressBar
from skorch.dataset import Dataset
from skorch.helper import predefined_split


def fit(model, train, valid):
    net = NeuralNetClassifier(
        model,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        lr=LR,
        max_epochs=1,
        batch_size=BS,
        iterator_train__shuffle=True,
        iterator_valid__batch_size=2 * BS,
        train_split=predefined_split(Dataset(*valid)),
        callbacks=[EpochScoring("accuracy", name="train_acc", on_train=True, lower_is_better=False), ProgressBar()],
    )
    net.fit(*train)
    return net.history[-1, "valid_acc"]
