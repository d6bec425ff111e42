"""Your own loop with `HaltOnNaN`: the loop stays as it is, and the report says where the first NaN began."""

import torch
from torch import nn
from torch.nn import functional as F

from fastrbn import RunningBatchNorm, watch

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), RunningBatchNorm(16), nn.ReLU(), nn.Linear(16, 2))
opt = torch.optim.SGD(model.parameters(), lr=0.1)
batches = [(torch.randn(4, 8), torch.randint(2, (4,))) for _ in range(50)]
batches[30][0][0, 0] = 1e38  # a broken sample

with watch(model, opt) as w:
    for xb, yb in batches:
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
        opt.step()
        opt.zero_grad()
print(all(p.isfinite().all() for p in model.parameters()))  # the model holds the last finite state; training can go on
