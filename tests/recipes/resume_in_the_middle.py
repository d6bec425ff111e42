"""Resume in the middle of an epoch: the resumed fit ends with the same weights, bit for bit."""

from fastrbn import Callback, Checkpoint, conv_rbn, get_learn_run, glyphs, image_databunch, seed_everything


class PowerCut(Callback):
    def after_step(self):
        if self.n_iter == 50:
            raise KeyboardInterrupt


def fit(*cbs, resume=None):
    seed_everything(0)
    data = image_databunch(glyphs(n_train=320, n_valid=80), bs=8)
    learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=list(cbs))
    run.fit(2, learn, resume=resume)  # 80 steps
    return list(learn.model.parameters())


whole = fit()
fit(Checkpoint("checkpoints", every=20), PowerCut())
resumed = fit(Checkpoint("checkpoints", every=20), resume="checkpoints")
print(all(a.equal(b) for a, b in zip(whole, resumed)))
