"""Optimisers whose step evaluates the batch again: LBFGS, and one like SAM."""

import pytest
import torch
from torch import nn

from fastrbn.callbacks import (
    Checkpoint,
    Closure,
    Distributed,
    GradientAccumulation,
    HaltOnNaN,
    MixedPrecision,
    Recorder,
    TorchScheduler,
)
from fastrbn.learn import Callback, Runner
from fastrbn.norm import RunningBatchNorm


def lbfgs(params, **kwargs):
    return torch.optim.LBFGS(params, **{"lr": 0.5, "max_iter": 5, **kwargs})


class Sam(torch.optim.SGD):
    """A step with the gradient at the place that the first gradient leads to."""

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "SAM requires a closure"
        params = [p for g in self.param_groups for p in g["params"]]
        moves = [0.05 * p.grad for p in params]
        for p, move in zip(params, moves):
            p.data.add_(move)
        loss = closure()
        for p, move in zip(params, moves):
            p.data.sub_(move)
        super().step()
        return loss


def drops_out():
    return nn.Sequential(nn.Linear(4, 16), RunningBatchNorm(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


class Counts(Callback):
    def begin_fit(self):
        self.events, self.forwards = [], 0
        self.handle = self.run.model.register_forward_hook(self._count)

    def _count(self, *args):
        self.forwards += self.run.in_train

    def after_loss(self):
        self.events += ["loss"] * self.run.in_train

    def after_step(self):
        self.events.append("step")

    def after_fit(self):
        self.handle.remove()


def test_lbfgs_minimises_and_each_event_comes_once_a_step(make_learn):
    torch.manual_seed(0)
    learn = make_learn(n_train=1, n_valid=0, model=nn.Linear(4, 3), opt=lbfgs)
    run = Runner([Closure(), Counts(), Recorder()])
    run.fit(10, learn)
    assert run.recorder.losses[-1] < 0.01 * run.recorder.losses[0]
    assert run.counts.events == ["loss", "step"] * 10
    assert run.counts.forwards > 30
    learn.opt = lbfgs(learn.model.parameters(), max_iter=1)
    run.fit(10, learn)
    assert run.counts.forwards == 10, "the first evaluation is the loop's"


def test_lbfgs_takes_the_steps_of_a_loop_of_its_own(make_learn):
    ends = []
    for own in (False, True):
        torch.manual_seed(0)
        learn = make_learn(n_valid=0, model=nn.Linear(4, 3), opt=lambda p: lbfgs(p, line_search_fn="strong_wolfe"))
        if not own:
            Runner([Closure()]).fit(2, learn)
        for xb, yb in learn.data.train_dl * 2 if own else ():

            def closure():
                learn.opt.zero_grad()
                loss = learn.loss_func(learn.model(xb), yb)  # noqa: B023
                loss.backward()
                return loss

            learn.opt.step(closure)
        ends.append(learn.model.weight.detach())
    assert torch.equal(*ends)


def test_a_step_like_sams_uses_the_second_gradient(make_learn):
    ends = []
    for own in (False, True):
        torch.manual_seed(0)
        learn = make_learn(n_train=1, n_valid=0, model=nn.Linear(4, 3), opt=lambda p: Sam(p, lr=0.1))
        if not own:
            run = Runner([Closure(), Counts()])
            run.fit(1, learn)
            assert run.counts.forwards == 2
        else:
            (xb, yb), model = learn.data.train_dl[0], learn.model
            learn.loss_func(model(xb), yb).backward()
            there = {n: (p + 0.05 * p.grad).detach().requires_grad_() for n, p in model.named_parameters()}
            learn.loss_func(torch.func.functional_call(model, there, (xb,)), yb).backward()
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p -= 0.1 * there[n].grad
        ends.append(learn.model.weight.detach())
    assert torch.allclose(*ends, atol=1e-6)


def test_every_evaluation_drops_the_same_units_and_statistics_move_once(make_learn):
    class Same(Callback):
        """The parameters do not move, so every evaluation must give the loss of the first."""

        def begin_fit(self):
            self.run.opt.step = self._look

        def _look(self, closure):
            norm = self.run.model[1]
            self.tracked = norm.num_batches_tracked.item()
            first = self.run.loss.item()
            self.losses = {closure().item() for _ in range(3)} | {first}
            assert norm.num_batches_tracked == self.tracked

    learn = make_learn(model=drops_out(), opt=lambda p: Sam(p, lr=0.1))
    run = Runner([Closure(), Same()])
    torch.manual_seed(3)
    run.fit(1, learn)
    state = torch.get_rng_state()
    assert len(run.same.losses) == 1 and run.same.tracked == 4
    torch.manual_seed(3)
    learn = make_learn(model=learn.model)
    torch.manual_seed(3)
    Runner().fit(1, learn)
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of one evaluation are used up"


def test_it_resumes(make_learn, tmp_path):
    def start(folder):
        torch.manual_seed(0)
        scheduler = TorchScheduler(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.5), per="step")
        cbs = [Closure(), scheduler, MixedPrecision("bf16"), HaltOnNaN(), Checkpoint(tmp_path / folder, every=3)]
        return Runner([*cbs, Recorder()]), make_learn(model=drops_out(), opt=lbfgs)

    run, learn = start("whole")
    run.fit(1, learn)
    again, fresh = start("again")
    again.fit(1, fresh, resume=min((tmp_path / "whole").iterdir()))
    assert again.recorder.losses == run.recorder.losses and again.recorder.lrs == run.recorder.lrs
    assert torch.equal(fresh.model[0].weight, learn.model[0].weight)


def test_without_it_an_optimiser_that_needs_a_closure_is_refused(make_learn):
    with pytest.raises(TypeError, match="LBFGS.step needs a closure.* add the callback Closure to the run"):
        Runner().fit(1, make_learn(opt=lbfgs))

    class Own(Callback):
        def begin_fit(self):
            self.run.claim(self, step=lambda opt: opt.step(lambda: self.run.loss))

    Runner([Own()]).fit(1, make_learn(opt=lbfgs))


@pytest.mark.parametrize("other", [GradientAccumulation(2), MixedPrecision("fp16")], ids=lambda cb: type(cb).__name__)
def test_others_with_a_part_in_the_step_are_refused(other, make_learn):
    with pytest.raises(RuntimeError, match=f"several times in a step, which {type(other).__name__} .it claims"):
        Runner([Closure(), other]).fit(1, make_learn(opt=lbfgs))
    Runner([Closure(), Distributed()]).fit(1, make_learn(opt=lbfgs))  # one process


def test_the_batch_is_evaluated_again_as_the_learner_unpacks_it(make_learn):
    class Two(nn.Linear):
        def forward(self, a, b, labels):
            return nn.functional.cross_entropy(super().forward(a - b), labels)

    learn = make_learn(n_train=1, n_valid=0, model=Two(4, 3), opt=lbfgs, loss_func=None)
    xb, yb = learn.data.train_dl[0]
    learn.data.train_dl = [{"a": xb, "b": torch.ones(6, 4), "labels": yb}]
    run = Runner([Closure(), Recorder()])
    run.fit(3, learn)
    assert run.recorder.losses[-1] < 0.5 * run.recorder.losses[0]
