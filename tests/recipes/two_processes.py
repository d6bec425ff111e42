"""Two processes, a share of the data each: `torchrun --nproc-per-node 2 two_processes.py`. One process runs it too."""

import torch

from fastrbn import AvgStatsCallback, CudaCallback, Distributed, accuracy, conv_rbn, get_learn_run, glyphs
from fastrbn import image_databunch, seed_everything

seed_everything(0)
data = image_databunch(glyphs(n_train=640, n_valid=160), bs=8)  # of each process: two take steps of 16
cbs = [Distributed, CudaCallback, AvgStatsCallback(accuracy)]
learn, run = get_learn_run([8, 16], data, 0.2, conv_rbn, cbs=cbs)
run.fit(2, learn)  # rank 0 prints
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
