"""A net from timm with running batch norm in place of its batch norms; it then trains at batch size 2."""

import timm
import torch

from fastrbn import AvgStatsCallback, GradientClip, RunningBatchNorm2d, accuracy, convert_batchnorm
from fastrbn import get_runner, glyphs, image_databunch, param_groups

torch.manual_seed(0)
data = image_databunch(glyphs(n_train=400, n_valid=100), bs=2)
model = timm.create_model("resnet10t", pretrained=False, in_chans=1, num_classes=data.c)
convert_batchnorm(model)
print(sum(isinstance(m, RunningBatchNorm2d) for m in model.modules()), "norms converted")
opt = lambda params, lr: torch.optim.AdamW(param_groups(model, 0.01), lr=lr)
learn, run = get_runner(model, data, lr=1e-3, opt_func=opt, cbs=[GradientClip(1.0), AvgStatsCallback(accuracy)])
run.fit(1, learn)
