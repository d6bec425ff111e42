"""All callbacks of the step together, on a net with running batch norm: exact resume, and interrupts anywhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.callbacks import (
    EMA,
    AvgStatsCallback,
    Checkpoint,
    EarlyStopping,
    GradientAccumulation,
    GradientClip,
    HaltOnNaN,
    MixedPrecision,
    MixUp,
    Recorder,
    SaveBest,
)
from fastrbn.data import BatchLoader, DataBunch
from fastrbn.learn import Callback, CancelTrainException, Learner, Runner
from fastrbn.norm import RunningBatchNorm

STEPS = 7  # an epoch: groups of 2, the last one smaller


def make_learn():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), RunningBatchNorm(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    x, y = torch.randn(6 * STEPS - 2, 4), torch.randint(0, 3, (6 * STEPS - 2,))
    data = DataBunch(BatchLoader(x, y, 6, shuffle=True), BatchLoader(x[:12], y[:12], 12), c=3, c_in=1)
    return Learner(model, torch.optim.Adam(model.parameters(), lr=0.01), F.cross_entropy, data)


def make_run(folder, *cbs, dtype="fp16"):
    precision = MixedPrecision(dtype, init_scale=2.0**8, growth_interval=3)
    own = [GradientAccumulation(2), precision, GradientClip(0.5), EMA(0.9), MixUp(), HaltOnNaN()]
    seen = [Recorder(), AvgStatsCallback(), EarlyStopping(patience=9), SaveBest(folder / "best.pt")]
    run = Runner([*own, *seen, Checkpoint(folder / "c", every=1, keep=None), *cbs])
    run.logger = lambda line: None
    return run


def everything(learn, run):
    opt = {f"{i} {k}": v for i, s in learn.opt.state_dict()["state"].items() for k, v in s.items()}
    return {
        **learn.model.state_dict(),
        **opt,
        **{f"average {n}": v for n, v in run.ema.weights.items()},
        "losses": torch.tensor(run.recorder.losses),
        "valid": torch.tensor([row["valid_loss"] for row in run.avg_stats.history]),
        "counts": torch.tensor([run.ema.updates, run.mixed_precision.scale, run.mixed_precision.skipped, run.n_iter]),
        "random": torch.get_rng_state(),
    }


def check_same(a, b, where=""):
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), f"{name} {where}"


def test_a_fit_with_all_callbacks_resumes_exactly_from_any_step(tmp_path):
    run, learn = make_run(tmp_path), make_learn()
    run.fit(2, learn)
    assert run.stop_reason is None and run.mixed_precision.scale > 2.0**8
    assert run.ema.updates == 8, "groups of 2, 2, 2 and 1 in each epoch"
    expected = everything(learn, run)
    files = sorted((tmp_path / "c").iterdir())
    for file in [f for f in files if f.name.partition("step-")[2].rstrip(".pt") in ("1", "2", "6", "7", "8", "13")]:
        again, fresh = make_run(tmp_path / file.stem), make_learn()
        torch.manual_seed(99)
        again.fit(2, fresh, resume=file)
        check_same(expected, everything(fresh, again), file.name)


class Ends(Callback):
    _order = 55

    def __init__(self, event, error, at):
        self.at = at
        vars(self)[event] = lambda: self._raise(error)

    def _raise(self, error):
        if self.run.n_iter == self.at:
            raise error

    def state_dict(self):
        return {}


@pytest.mark.parametrize("event", ["begin_batch", "after_loss", "after_backward", "after_step"])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), CancelTrainException("enough")], ids=repr)
def test_an_interrupted_fit_with_all_callbacks_cleans_up(event, error, tmp_path):
    learn = make_learn()
    run = make_run(tmp_path, Ends(event, error, 10 if event == "begin_batch" else 8))
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(2, learn)
    else:
        run.fit(2, learn)
    assert run.stop_reason is not None
    assert run.loss_func is learn.loss_func and run._parts.claims == {}
    assert not learn.opt._optimizer_step_pre_hooks and not torch.is_autocast_enabled("cpu")
    assert not any(m._forward_hooks for m in learn.model.modules())
    if isinstance(error, CancelTrainException):
        return  # the fit ended on purpose in the middle of a step, which counts; nothing is left to resume
    again, fresh = make_run(tmp_path), make_learn()
    again.fit(2, fresh, resume=tmp_path / "c")
    whole, other = make_run(tmp_path / "whole"), make_learn()
    whole.fit(2, other)
    check_same(everything(other, whole), everything(fresh, again))


def test_a_fault_is_found_with_all_callbacks_and_the_averages_are_finite(tmp_path):
    class Spoils(Callback):
        def after_pred(self):
            if self.run.in_train and self.run.n_iter == 9:
                self.run.pred = self.run.pred * torch.nan

        def state_dict(self):
            return {}

    learn = make_learn()
    run = make_run(tmp_path, Spoils())
    run.fit(2, learn)
    assert run.halt_on_nan.report.step == 9
    assert all(v.isfinite().all() for v in (*learn.model.state_dict().values(), *run.ema.weights.values()))
