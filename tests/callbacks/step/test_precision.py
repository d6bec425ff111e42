"""MixedPrecision against loops by hand with autocast and GradScaler, on the CPU and, if available, on CUDA."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.callbacks import GradientAccumulation, GradientClip, HaltOnNaN, MixedPrecision, ParamMagnitudes
from fastrbn.learn import Callback, CancelBatchException, CancelEpochException, Learner, Runner
from fastrbn.norm import RunningBatchNorm

SCALE = 2.0**10


def make_learn(n_train=6, n_valid=2, norm=nn.BatchNorm1d, opt=torch.optim.SGD, device="cpu", lr=0.1, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    batches = [(torch.randn(6, 4, device=device), torch.randint(0, 3, (6,), device=device)) for _ in range(n_train)]
    data = SimpleNamespace(train_dl=batches, valid_dl=batches[:n_valid])
    return Learner(model, opt(model.parameters(), lr=lr, **kwargs), F.cross_entropy, data)


def check_same(a, b):
    for name, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[name]), name


def by_hand(learn, dtype, scaler=None, epochs=2, n=1, clip=None, device="cpu"):
    scaler = torch.amp.GradScaler(device, enabled=False) if scaler is None else scaler
    for _ in range(epochs):
        for i, (xb, yb) in enumerate(learn.data.train_dl):
            with torch.autocast(device, dtype):
                loss = F.cross_entropy(learn.model(xb), yb)
            scaler.scale(loss / n).backward()
            if (i + 1) % n == 0:
                scaler.unscale_(learn.opt)
                if clip is not None:
                    nn.utils.clip_grad_norm_(learn.model.parameters(), clip)
                scaler.step(learn.opt)
                scaler.update()
                learn.opt.zero_grad()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RunningBatchNorm])
def test_bf16_equals_a_loop_by_hand_bit_for_bit(norm):
    learn, hand = make_learn(norm=norm), make_learn(norm=norm)
    Runner([MixedPrecision()]).fit(2, learn)
    by_hand(hand, torch.bfloat16)
    check_same(learn, hand)
    plain = make_learn(norm=norm)
    Runner().fit(2, plain)
    assert not torch.equal(plain.model[0].weight, learn.model[0].weight), "nothing ran in bf16"
    assert all(v.dtype in (torch.float32, torch.int64) for v in learn.model.state_dict().values())


@pytest.mark.parametrize("opt", [torch.optim.SGD, torch.optim.Adam])
def test_fp16_equals_a_loop_with_a_grad_scaler_bit_for_bit(opt):
    learn, hand = make_learn(opt=opt), make_learn(opt=opt)
    run = Runner([MixedPrecision("fp16", init_scale=SCALE, growth_interval=3)])
    run.fit(2, learn)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    by_hand(hand, torch.float16, scaler)
    check_same(learn, hand)
    assert run.mixed_precision.scale == scaler.get_scale() == SCALE * 2**4
    assert run.mixed_precision.skipped == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_clipping_accumulation_and_scaling_together_equal_a_loop_by_hand(dtype):
    learn, hand = make_learn(), make_learn()
    Runner([MixedPrecision(dtype, init_scale=SCALE), GradientClip(0.2), GradientAccumulation(2)]).fit(2, learn)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE) if dtype == "fp16" else None
    by_hand(hand, torch.float16 if dtype == "fp16" else torch.bfloat16, scaler, n=2, clip=0.2)
    check_same(learn, hand)


def test_a_smaller_last_group_works_with_a_scaler():
    learn, hand = make_learn(5), make_learn(5)
    Runner([MixedPrecision("fp16", init_scale=SCALE), GradientAccumulation(2)]).fit(1, learn)
    last = hand.data.train_dl[4:]
    hand.data.train_dl = hand.data.train_dl[:4]
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    by_hand(hand, torch.float16, scaler, n=2, epochs=1)
    hand.data.train_dl = last
    by_hand(hand, torch.float16, scaler, n=1, epochs=1)
    for p, q in zip(learn.model.parameters(), hand.model.parameters()):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)


class Sees(Callback):
    """Records the dtypes and the autocast state that the loop and the events see."""

    def __init__(self):
        self.found = set()

    def after_loss(self):
        self.found.add((self.run.pred.dtype, self.run.loss.dtype, torch.is_autocast_enabled("cpu")))

    def after_backward(self):
        self.grads = [p.grad.clone() for p in self.run.model.parameters()]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_events_see_float32_and_unscaled_gradients(dtype):
    sees, plain = Sees(), Sees()
    Runner([MixedPrecision(dtype), sees]).fit(1, make_learn(1))
    Runner([plain]).fit(1, make_learn(1))
    assert sees.found == {(torch.float32, torch.float32, False)}
    for a, b in zip(sees.grads, plain.grads):
        assert torch.allclose(a, b, atol=0.05), "the gradients are not unscaled"


def test_outputs_in_containers_become_float32():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            y = self.layer(x)
            return {"a": (y, [y]), "n": 3}

    class Looks(Callback):
        def after_pred(self):
            pred = self.run.pred
            self.run.seen = pred["a"][0].dtype, pred["a"][1][0].dtype, pred["n"]

    learn = make_learn()
    learn.model, learn.loss_func = Many(), lambda pred, yb: F.cross_entropy(pred["a"][0], yb)
    run = Runner([MixedPrecision(), Looks()])
    run.fit(1, learn)
    assert run.seen == (torch.float32, torch.float32, 3)


class Overflows(Callback):
    """Makes the gradients of one step overflow, as a scale that is too large does."""

    def begin_batch(self):
        if self.run.in_train and self.run.n_iter == 2:
            self.handle = self.run.model[0].weight.register_hook(lambda g: g * math.inf)

    def after_batch(self):
        if hasattr(self, "handle"):
            self.handle.remove()


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflowing_step_is_skipped_and_counted_without_a_halt(fused):
    opt = {"opt": torch.optim.Adam, "fused": fused}
    learn, hand = make_learn(**opt), make_learn(**opt)
    run = Runner([MixedPrecision("fp16", init_scale=SCALE), Overflows(), HaltOnNaN()])
    run.fit(1, learn)
    assert run.mixed_precision.skipped == 1 and run.mixed_precision.scale == SCALE / 2
    assert run.stop_reason is None

    class SkipsStep(Callback):
        def after_backward(self):
            if self.run.n_iter == 2:
                self.run.opt.zero_grad()
                raise CancelBatchException

    Runner([MixedPrecision("fp16", init_scale=SCALE), SkipsStep()]).fit(1, hand)
    for p, q in zip(learn.model.parameters(), hand.model.parameters()):
        assert torch.allclose(p, q, atol=1e-3)  # the scale differs from there on


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_real_fault_is_found_and_the_replay_runs_under_autocast_too(dtype):
    class Breaks(nn.Module):
        seen = None

        def forward(self, x):
            type(self).seen = torch.is_autocast_enabled("cpu")
            return x * (math.nan if self.bad else 1.0)

    breaks = Breaks()
    breaks.bad = False

    class Turns(Callback):
        def begin_batch(self):
            breaks.bad = self.run.n_iter == 3

    learn = make_learn()
    learn.model.append(breaks)
    run = Runner([MixedPrecision(dtype, init_scale=SCALE), Turns(), HaltOnNaN()])
    run.fit(1, learn)
    report = run.halt_on_nan.report
    assert (report.step, report.phase, report.where) == (3, "forward", "4")
    assert Breaks.seen is True


@pytest.mark.parametrize("error", [CancelBatchException, CancelEpochException])
def test_gradients_of_a_batch_cancelled_after_unscaling_add_to_the_next(error):
    """Accumulation as the course writes it: a cancel in after_backward."""

    class Cancels(Callback):
        def after_backward(self):
            if self.run.n_iter == 2:
                raise error

    learn, hand = make_learn(4, 0), make_learn(4, 0)
    learn.data.valid_dl = hand.data.valid_dl = None
    Runner([MixedPrecision("fp16", init_scale=SCALE), Cancels()]).fit(2, learn)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    order = hand.data.train_dl * 2 if error is CancelBatchException else hand.data.train_dl[:3] + hand.data.train_dl
    for i, (xb, yb) in enumerate(order):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(hand.model(xb), yb)
        scaler.scale(loss).backward()
        if i != 2:
            scaler.step(hand.opt)
            scaler.update()
            hand.opt.zero_grad()
    check_same(learn, hand)


def test_magnitudes_are_those_of_unscaled_gradients():
    found = []
    for cbs in ([MixedPrecision("fp16", init_scale=SCALE)], []):
        run = Runner([ParamMagnitudes(grads=True), *cbs])
        run.fit(1, make_learn())
        found.append(run.param_magnitudes.values["grad_max"])
    assert torch.allclose(*found, rtol=0.1, atol=0.01)


def test_a_resumed_scaler_continues():
    cb = MixedPrecision("fp16", init_scale=SCALE, growth_interval=4)
    Runner([cb, Overflows()]).fit(1, make_learn())
    state = cb.state_dict()
    assert state["skipped"] == 1 and state["scaler"]["scale"] == SCALE / 2 and state["scaler"]["_growth_tracker"] == 3

    class Loads(Callback):
        def begin_fit(self):
            other.load_state_dict(state)

    other = MixedPrecision("fp16")
    Runner([other, Loads()]).fit(1, make_learn(1))
    assert other.scale == SCALE and other.skipped == 1  # the fourth good step doubled the scale


def test_a_state_of_the_other_dtype_is_an_error():
    class Loads(Callback):
        def begin_fit(self):
            self.run.mixed_precision.load_state_dict({})

    with pytest.raises(ValueError, match="has no scale, which only fp16 uses, and dtype is torch.float16"):
        Runner([MixedPrecision("fp16"), Loads()]).fit(1, make_learn())


def test_two_in_one_run_are_an_error_and_the_model_still_trains():
    learn = make_learn()
    with pytest.raises(RuntimeError, match="MixedPrecision claims 'forward', which MixedPrecision has already"):
        Runner([MixedPrecision(), MixedPrecision("fp16")]).fit(1, learn)
    Runner().fit(1, learn)


def test_float16_weights_are_an_error_for_fp16():
    learn = make_learn()
    learn.model.half()
    with pytest.raises(ValueError, match=r"needs weights in float32, .* '0.weight' is float16: remove model.half"):
        Runner([MixedPrecision("fp16")]).fit(1, learn)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("bf61",), "dtype must be 'bf16' or 'fp16'; got 'bf61'. Did you mean 'bf16'?"),
        ((torch.float32,), "dtype must be 'bf16' or 'fp16'; got torch.float32"),
        (("fp16", 0), "init_scale must be a number above 0; got 0"),
        (("fp16", 8.0, 0.5), "growth_interval must be a whole number, 1 or more; got 0.5"),
    ],
    ids=str,
)
def test_invalid_arguments_are_errors(args, words):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        MixedPrecision(*args)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_on_cuda_it_equals_a_loop_by_hand(dtype):
    learn, hand = make_learn(device="cuda"), make_learn(device="cuda")
    Runner([MixedPrecision(dtype, init_scale=SCALE), GradientClip(0.2), GradientAccumulation(2)]).fit(2, learn)
    scaler = torch.amp.GradScaler("cuda", init_scale=SCALE) if dtype == "fp16" else None
    by_hand(hand, torch.float16 if dtype == "fp16" else torch.bfloat16, scaler, n=2, clip=0.2, device="cuda")
    check_same(learn, hand)
