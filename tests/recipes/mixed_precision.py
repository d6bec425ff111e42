"""Mixed precision, gradient clipping and accumulation: three callbacks, in any order."""

import torch

from fastrbn import AvgStatsCallback, GradientAccumulation, GradientClip, MixedPrecision, accuracy
from fastrbn import conv_rbn, get_learn_run, image_databunch, glyphs

data = image_databunch(glyphs(n_train=640, n_valid=160), bs=8)
cbs = [
    MixedPrecision(torch.bfloat16),  # forward and loss under autocast; statistics stay in float32
    GradientAccumulation(2),  # a step for every two batches
    GradientClip(max_norm=5.0),
    AvgStatsCallback(accuracy),
]
learn, run = get_learn_run([8, 16, 32], data, 0.4, conv_rbn, cbs=cbs)
run.fit(2, learn)
