"""Fine-tuning: the body is frozen in the first epoch, and then trains at a tenth of the head's rate."""

from collections import OrderedDict

import torch
from torch import nn

from fastrbn import AvgStatsCallback, Freeze, Learner, Runner, accuracy, conv_rbn, get_runner, glyphs
from fastrbn import image_databunch, param_groups

torch.manual_seed(0)
data = image_databunch(glyphs(n_train=640, n_valid=160), bs=8)
make_head = lambda: nn.Sequential(nn.Flatten(), nn.Linear(16 * 7 * 7, data.c))
model = nn.Sequential(OrderedDict(body=nn.Sequential(conv_rbn(1, 8), conv_rbn(8, 16)), head=make_head()))
learn, run = get_runner(model, data, lr=0.2)
run.fit(2, learn)  # stands for the training of the model that you have

model.head = make_head()
opt = torch.optim.SGD(param_groups(model, lr={"body": 0.02, "head": 0.2}), lr=0.2)
learn = Learner(model, opt, nn.CrossEntropyLoss(), data)
run = Runner([Freeze("body", until=1), AvgStatsCallback(accuracy)])
run.fit(2, learn)
