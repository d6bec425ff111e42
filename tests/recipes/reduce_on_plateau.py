"""Any scheduler of `torch.optim.lr_scheduler`, here the one that lowers the rate when a metric no longer improves."""

from functools import partial

from torch.optim.lr_scheduler import ReduceLROnPlateau

from fastrbn import AvgStatsCallback, Recorder, TorchScheduler, accuracy, conv_rbn, get_learn_run, glyphs
from fastrbn import image_databunch, seed_everything

seed_everything(0)
data = image_databunch(glyphs(n_train=320, n_valid=80), bs=8)
plateau = TorchScheduler(partial(ReduceLROnPlateau, mode="max", factor=0.5, patience=0), monitor="accuracy")
cbs = [AvgStatsCallback(accuracy), plateau, Recorder]  # after an epoch without a new best, half the rate
learn, run = get_learn_run([8, 16], data, 2.0, conv_rbn, cbs=cbs)
run.fit(5, learn)
print(run.recorder.lrs[0][::40])  # one for each epoch
