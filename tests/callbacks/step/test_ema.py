"""EMA against torch.optim.swa_utils, and which weights the model holds at each event."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastrbn.callbacks import EMA, AvgStatsCallback, Checkpoint, HaltOnNaN, SaveBest
from fastrbn.learn import Callback, CancelEpochException, CancelTrainException, Learner, Runner
from fastrbn.norm import convert_batchnorm


def small_model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def make_learn(n_train=5, n_valid=2, model=small_model):
    torch.manual_seed(0)
    model = model()
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(n_train + n_valid)]
    data = SimpleNamespace(train_dl=batches[:n_train], valid_dl=batches[n_train:] or None)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), F.cross_entropy, data)


def quiet(*cbs):
    run = Runner(list(cbs))
    run.logger = lambda line: None
    return run


def weights(model):
    """Parameters and statistics."""
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def with_running_norm():
    return convert_batchnorm(small_model())


@pytest.mark.parametrize("model", [small_model, with_running_norm])
@pytest.mark.parametrize("decay", [0.9, 0.999, 0.0])
def test_it_is_pytorchs_averaged_model_bit_for_bit_with_the_statistics(decay, model):
    learn, hand = make_learn(model=model), make_learn(model=model)
    run = quiet(EMA(decay, warmup=False))
    run.fit(2, learn)
    averaged = AveragedModel(hand.model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(2):
        for xb, yb in hand.data.train_dl:
            F.cross_entropy(hand.model(xb), yb).backward()
            hand.opt.step()
            hand.opt.zero_grad()
            averaged.update_parameters(hand.model)
    assert equal(weights(learn.model), weights(hand.model)), "averaging must not change the training"
    assert run.ema.updates == int(averaged.n_averaged) == 10
    for name, value in averaged.module.state_dict().items():
        if name.startswith("1.") and name[2:] not in ("weight", "bias", "running_mean", "running_var"):
            value = hand.model.state_dict()[name]
        assert torch.equal(run.ema.weights[name], value), name


def test_the_warm_up_forgets_the_first_weights():
    learn, hand = make_learn(), make_learn()
    run = quiet(EMA(0.9))
    run.fit(1, learn)
    average = None
    for t, (xb, yb) in enumerate(hand.data.train_dl):
        F.cross_entropy(hand.model(xb), yb).backward()
        hand.opt.step()
        hand.opt.zero_grad()
        keep = min(0.9, (1 + t) / (10 + t))
        now = [p.detach().clone() for p in hand.model.parameters()]
        average = now if average is None else [torch.lerp(a, p, 1 - keep) for a, p in zip(average, now)]
    assert equal([run.ema.weights[n] for n, _ in learn.model.named_parameters()], average)


class Looks(Callback):
    """Records at the given events whether the model holds the trained weights."""

    def __init__(self, order, *events):
        self._order, self.seen, self.trained = order, {}, None
        for event in events:
            vars(self)[event] = lambda event=event: self._look(event)

    def after_step(self):
        self.trained = weights(self.run.model)

    def _look(self, event):
        if not (event == "begin_batch" and self.run.in_train):
            self.seen.setdefault(event, []).append(equal(weights(self.run.model), self.trained))


def test_validation_has_the_averages_and_training_the_trained_weights():
    early, late = Looks(0, "begin_validate", "after_epoch"), Looks(99, "begin_batch", "begin_validate", "after_epoch")
    learn = make_learn()
    run = quiet(EMA(0.9), early, late)
    run.fit(2, learn)
    assert early.seen == {"begin_validate": [True] * 2, "after_epoch": [False] * 2}
    assert late.seen == {"begin_validate": [True] * 2, "begin_batch": [False] * 4, "after_epoch": [True] * 2}
    assert equal(weights(learn.model), late.trained)


def test_the_validation_loss_is_that_of_the_averages():
    learn = make_learn()
    run = quiet(EMA(0.9), AvgStatsCallback())
    run.fit(1, learn)
    learn.model.load_state_dict(run.ema.weights)
    learn.model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(learn.model(xb), yb).item() for xb, yb in learn.data.valid_dl]
    assert run.avg_stats.history[0]["valid_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_averages_from_a_file_without_statistics_gain_them_in_the_next_step():
    learn = make_learn(n_valid=0)

    class Loads(Callback):
        _order = 60

        def begin_fit(self):
            averages = {n: p.detach() + 1 for n, p in self.run.learn.model.named_parameters()}
            self.run.ema.load_state_dict({"averages": averages, "updates": 1})

        def after_fit(self):
            self.mean = self.run.learn.model[1].running_mean.clone()

    learn.data.train_dl = learn.data.train_dl[:1]
    run = quiet(EMA(0.9), Loads())
    run.fit(1, learn)
    assert torch.equal(run.ema.weights["1.running_mean"], run.loads.mean) and run.loads.mean.any()


class Ends(Callback):
    def __init__(self, error, event="after_pred"):
        self.error = error
        vars(self)[event] = self._raise

    def _raise(self):
        if not self.run.in_train:
            self.trained = self.run.ema._trained
            raise self.error


ERRORS = [ValueError("broken"), KeyboardInterrupt(), CancelTrainException("enough"), CancelEpochException()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_an_interrupted_validation_restores_the_trained_weights(error):
    learn, plain = make_learn(), make_learn()
    run = quiet(EMA(0.9), Ends(error))
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(1, learn)
    else:
        run.fit(1, learn)
    assert run.ends.trained is not None, "the averages were not in the model"
    Runner().fit(1, plain)
    assert equal(weights(learn.model), weights(plain.model))


def test_trained_weights_are_restored_even_if_after_epoch_is_cancelled():
    class Cancels(Callback):
        def after_epoch(self):
            raise CancelEpochException

    learn, plain = make_learn(), make_learn()
    quiet(EMA(0.9), Cancels()).fit(2, learn)
    Runner().fit(2, plain)
    assert equal(weights(learn.model), weights(plain.model))


# --- keeping the averages


def test_keep_leaves_the_averages_in_the_model_and_put_loads_them_later():
    kept, later = make_learn(), make_learn()
    quiet(EMA(0.9, keep=True)).fit(2, kept)
    run = quiet(EMA(0.9))
    run.fit(2, later)
    assert not equal(weights(kept.model), weights(later.model))
    run.ema.put()
    assert equal(weights(kept.model), weights(later.model))


@pytest.mark.parametrize("error", ERRORS[:3], ids=lambda e: type(e).__name__)
def test_after_an_error_or_an_interrupt_they_are_not_kept(error):
    learn, plain = make_learn(), make_learn()
    run = quiet(EMA(0.9, keep=True), Ends(error))
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(1, learn)
    else:
        run.fit(1, learn)
    Runner().fit(1, plain)
    assert equal(weights(learn.model), weights(plain.model)) == (not isinstance(error, CancelTrainException))


def test_weights_are_a_copy_with_shared_parameters_averaged_under_each_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.norm(self.b(self.a(x))))

    learn = make_learn(model=Tied)
    run = quiet(EMA(0.5, warmup=False))
    run.fit(1, learn)
    found = run.ema.weights
    assert list(found) == list(learn.model.state_dict())
    assert torch.equal(found["a.weight"], found["b.weight"])
    assert not torch.equal(found["a.weight"], learn.model.a.weight)
    found["a.bias"].fill_(9)
    found["norm.running_mean"].fill_(9)
    assert not (run.ema.weights["a.bias"] == 9).any() and not (learn.model.norm.running_mean == 9).any()


def test_half_precision_weights_are_averaged_in_float32():
    learn = make_learn(model=lambda: nn.Linear(4, 3, dtype=torch.bfloat16))
    learn.data.train_dl = [(x.bfloat16(), y) for x, y in learn.data.train_dl]
    learn.data.valid_dl = None
    run = quiet(EMA(0.999, warmup=False))
    run.fit(3, learn)
    assert run.ema._averages["weight"].dtype is torch.float32
    assert run.ema.weights["weight"].dtype is torch.bfloat16


def test_save_best_saves_the_averages_and_checkpoint_both(tmp_path):
    learn = make_learn()
    cbs = [AvgStatsCallback(), SaveBest(tmp_path / "best.pt", "train_loss"), Checkpoint(tmp_path / "c")]
    run = quiet(EMA(0.9), *cbs)
    run.fit(1, learn)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    for name, value in run.ema.weights.items():
        assert torch.equal(best[name], value), name
    (file,) = (tmp_path / "c").glob("*.pt")
    again, fresh = quiet(EMA(0.9), *cbs[:2], Checkpoint(tmp_path / "c")), make_learn()
    again.fit(1, fresh, resume=file)
    assert equal(weights(fresh.model), weights(learn.model))
    assert all(torch.equal(v, again.ema.weights[n]) for n, v in run.ema.weights.items())


def test_a_checkpoint_of_an_interrupted_validation_has_the_trained_weights(tmp_path):
    learn, plain = make_learn(), make_learn()
    run = quiet(EMA(0.9), Ends(KeyboardInterrupt()), Checkpoint(tmp_path / "c"))
    run.fit(2, learn)
    Runner().fit(1, plain)
    assert equal(weights(learn.model), weights(plain.model))
    averages = run.ema.weights
    again, fresh = quiet(EMA(0.9), Checkpoint(tmp_path / "c")), make_learn()
    again.fit(1, fresh, resume=tmp_path / "c")
    assert equal(weights(fresh.model), weights(plain.model))
    assert all(torch.equal(v, again.ema.weights[n]) for n, v in averages.items())


class Plants(Callback):
    """NaN in a weight after step 2."""

    def after_step(self):
        if self.run.n_iter == 2:
            with torch.no_grad():
                self.run.model[0].weight[0, 0] = torch.nan


def test_a_step_that_halt_on_nan_undoes_is_not_averaged():
    learn = make_learn()
    run = quiet(EMA(0.9, keep=True), Plants(), HaltOnNaN())
    run.fit(1, learn)
    assert run.halt_on_nan.report.step == 2
    assert all(v.isfinite().all() for v in run.ema.weights.values())
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_averages_with_nan_are_not_kept():
    learn = make_learn(n_valid=0)

    class Repairs(Callback):
        _order = 99

        def after_fit(self):
            self.run.learn.model.load_state_dict(good)

    good = {name: v.clone() for name, v in learn.model.state_dict().items()}
    with pytest.warns(UserWarning, match="the averages contain NaN or Inf; the model keeps the trained weights"):
        quiet(EMA(0.9, keep=True), Plants(), Repairs()).fit(1, learn)
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_use_at_the_wrong_time_is_an_error():
    run = quiet(EMA())
    with pytest.raises(ValueError, match="no averages before the first step of a fit"):
        run.ema.weights  # noqa: B018

    class Puts(Callback):
        def after_epoch(self):
            self.run.ema.put()

    with pytest.raises(RuntimeError, match="EMA.put is for use after the fit"):
        quiet(EMA(), Puts()).fit(1, make_learn())


@pytest.mark.parametrize("kwargs", [{"decay": 1.0}, {"decay": -0.1}, {"decay": "0.9"}, {"decay": True}], ids=str)
def test_a_decay_out_of_range_is_an_error(kwargs):
    with pytest.raises(ValueError, match="decay must be a share of the old average, 0 or more and below 1; got"):
        EMA(**kwargs)


@pytest.mark.parametrize("kwargs", [{"warmup": 10}, {"keep": "yes"}], ids=str)
def test_switches_must_be_bools(kwargs):
    with pytest.raises(ValueError, match="must be True or False; got"):
        EMA(**kwargs)
