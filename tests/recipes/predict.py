"""Predictions, targets and the loss of each sample; and the average over an image and shifted copies of it."""

import torch

from fastrbn import accuracy, conv_rbn, get_learn_run, glyphs, image_databunch, show_worst

data = image_databunch(glyphs(n_train=640, n_valid=160), bs=8)
learn, run = get_learn_run([8, 16, 32], data, 0.4, conv_rbn)
run.fit(1, learn)

preds, targets, losses = run.predict(losses=True)  # of the validation set
print(accuracy(preds, targets), losses.topk(3).indices)
shifted = run.predict(tta=[lambda xb: xb.roll(1, dims=3), lambda xb: xb.roll(-1, dims=3)])
print(accuracy(shifted.preds, targets))
print(run.predict(torch.randn(5, 1, 28, 28)).preds.argmax(1))  # a tensor as the loaders yield it
show_worst(run).savefig("worst.png")
