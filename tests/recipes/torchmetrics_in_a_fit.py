"""Metrics of torchmetrics as they are, beside plain functions."""

from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from fastrbn import AvgStatsCallback, accuracy, conv_rbn, get_learn_run, glyphs, image_databunch

data = image_databunch(glyphs(n_train=640, n_valid=160), bs=8)
metrics = [accuracy, MulticlassF1Score(num_classes=data.c), MulticlassCalibrationError(num_classes=data.c)]
learn, run = get_learn_run([8, 16], data, 0.2, conv_rbn, cbs=[AvgStatsCallback(metrics)])
run.fit(1, learn)
print(run.avg_stats.history[-1])
