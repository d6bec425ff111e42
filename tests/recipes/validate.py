"""Validate without training: loss and metrics of the validation set, or of any other data."""

from fastrbn import AvgStatsCallback, ConfusionMatrix, accuracy, conv_rbn, get_learn_run, glyphs, image_databunch

data = image_databunch(glyphs(n_train=640, n_valid=160), bs=8)
matrix = ConfusionMatrix()
learn, run = get_learn_run([8, 16, 32], data, 0.4, conv_rbn, cbs=[AvgStatsCallback([accuracy, matrix])])
run.fit(1, learn)

print(run.validate())  # the validation set: what the fit has printed last
print(run.validate(data.train_dl))  # the training set, in evaluation mode
run.validate()
matrix.plot(data.classes).savefig("confusion.png")
