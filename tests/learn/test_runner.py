"""The loop: which events come when, and what is left after cancels, errors and interrupts."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrbn.learn
from fastrbn.learn import (
    EVENTS,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    Learner,
    Runner,
    TrainEvalCallback,
)

CANCELS = {"batch": CancelBatchException, "epoch": CancelEpochException, "train": CancelTrainException}
BATCH = ["begin_batch", "after_pred", "after_loss", "after_backward", "after_step", "after_batch"]
VALID = ["begin_batch", "after_pred", "after_loss", "after_batch"]


def batches(n):
    return [(torch.randn(5, 4), torch.randint(0, 2, (5,))) for _ in range(n)]


def make_learn(n_train=2, n_valid=1, model=None, loss_func=F.cross_entropy):
    model = nn.Linear(4, 2) if model is None else model
    data = SimpleNamespace(train_dl=batches(n_train), valid_dl=batches(n_valid) if n_valid else None)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss_func, data)


def all_events(**extra):
    """A class whose methods write each event down in `run.trace`."""

    def method(event):
        return lambda self: self.run.trace.append(event)

    return type("Trace", (Callback,), {**{e: method(e) for e in EVENTS}, **extra})


Trace = all_events()


class Raises(Callback):
    """Raises `error` the first time that `event` comes."""

    def __init__(self, event, error, order=1):
        self._order, self.done = order, False

        def handler():
            if not self.done:
                self.done = True
                raise error

        vars(self)[event] = handler


class Keeps(Callback):
    """Counts its after_fit, and hangs a hook on the model for the length of the fit, as hook callbacks do."""

    def __init__(self):
        self.ends = 0

    def begin_fit(self):
        self._handle = self.run.model.register_forward_hook(lambda *a: None)

    def after_fit(self):
        self.ends += 1
        if "_handle" in vars(self):
            self._handle.remove()


def traced(*cbs):
    run = Runner([Trace(), *cbs])
    run.trace = []
    return run


def fit_trace(*cbs, epochs=1, **kwargs):
    run = traced(*cbs)
    run.fit(epochs, make_learn(**kwargs))
    return run.trace


def full(n_train=2, n_valid=1):
    validation = ["begin_validate", *VALID * n_valid] if n_valid else []
    return ["begin_epoch", *BATCH * n_train, *validation, "after_epoch"]


# --- the order of events


def test_a_fit_fires_each_event_in_order():
    assert fit_trace() == ["begin_fit", *full(), "after_fit"]


def test_each_epoch_has_its_events_once():
    assert fit_trace(epochs=3) == ["begin_fit", *full() * 3, "after_fit"]


def test_without_validation_data_there_is_no_validation():
    assert fit_trace(n_valid=0, epochs=2) == ["begin_fit", *full(n_valid=0) * 2, "after_fit"]


def test_zero_epochs_fire_begin_fit_and_after_fit():
    assert fit_trace(epochs=0) == ["begin_fit", "after_fit"]


def test_an_empty_loader_is_an_epoch_without_batches():
    assert fit_trace(n_train=0) == ["begin_fit", *full(n_train=0), "after_fit"]


def test_the_position_that_the_run_holds_at_each_batch():
    class Looks(Callback):
        def begin_fit(self):
            self.rows = []

        def begin_batch(self):
            r = self.run
            self.rows.append((r.in_train, r.model.training, r.epoch, r.iter, r.iters, r.n_iter, round(r.n_epochs, 3)))
            assert torch.is_grad_enabled() is r.in_train

    run = Runner([Looks])
    run.fit(2, make_learn())
    assert run.looks.rows == [
        (True, True, 0, 0, 2, 0, 0.0),
        (True, True, 0, 1, 2, 1, 0.5),
        (False, False, 0, 0, 1, 2, 1.0),
        (True, True, 1, 0, 2, 2, 1.0),
        (True, True, 1, 1, 2, 3, 1.5),
        (False, False, 1, 0, 1, 4, 2.0),
    ]
    assert (run.n_iter, run.n_epochs, run.stop_reason) == (4, 2.0, None)


def test_a_fit_trains_as_a_loop_by_hand_does():
    learn = make_learn(n_train=4)
    by_hand = pickle.loads(pickle.dumps(learn.model))
    opt = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for xb, yb in learn.data.train_dl:
            F.cross_entropy(by_hand(xb), yb).backward()
            opt.step()
            opt.zero_grad()
    Runner().fit(2, learn)
    assert torch.equal(learn.model.weight, by_hand.weight)
    assert torch.equal(learn.model.bias, by_hand.bias)


# --- cancelling


def expected_after_cancel(what, event):
    """The trace of one epoch when `event`'s first coming cancels `what`."""
    if event in BATCH:
        i = BATCH.index(event)
        ending = [] if event == "after_batch" else ["after_batch"]
        begun = ["begin_fit", "begin_epoch", *BATCH[: i + 1]]
        rest = ["begin_validate", *VALID, "after_epoch", "after_fit"]
        return {
            "batch": [*begun, "after_cancel_batch", *ending, *BATCH, *rest],
            "epoch": [*begun, *ending, "after_cancel_epoch", *rest],
            "train": [*begun, *ending, "after_cancel_train", "after_fit"],
        }[what]
    trace = ["begin_fit", *full(), "after_fit"]
    i = trace.index(event)
    begun, rest = [*trace[: i + 1], f"after_cancel_{what}"], trace[i + 1 :]
    if event == "after_fit":
        return begun
    if what == "train":
        return [*begun, "after_fit"]
    if what == "epoch" and event in ("begin_epoch", "begin_validate"):
        rest = rest[rest.index("begin_validate" if event == "begin_epoch" else "after_epoch") :]
    return [*begun, *rest]


@pytest.mark.parametrize("what", CANCELS)
@pytest.mark.parametrize("event", EVENTS[:11])
def test_a_cancel_ends_its_scope_and_nothing_else(what, event):
    run = traced(Raises(event, CANCELS[what]()))
    run.fit(1, make_learn())
    assert run.trace == expected_after_cancel(what, event)
    assert (run.stop_reason is not None) == (what == "train" and event != "after_fit")


@pytest.mark.parametrize("inner", CANCELS)
@pytest.mark.parametrize("outer", CANCELS)
@pytest.mark.parametrize("event", ["after_loss", "begin_epoch", "begin_fit", "after_fit", "begin_validate"])
def test_a_cancel_in_an_after_cancel_event_never_escapes(event, outer, inner):
    run = traced(Raises(event, CANCELS[outer]()), Raises(f"after_cancel_{outer}", CANCELS[inner]()))
    run.fit(1, make_learn())
    trace = run.trace
    assert trace.count("after_fit") == 1
    assert trace.count("begin_batch") == trace.count("after_batch"), "a batch that began has its end"
    assert trace.count(f"after_cancel_{outer}") == 1
    assert trace.count(f"after_cancel_{inner}") == 1
    if "train" in (outer, inner) and event != "after_fit":
        assert "after_epoch" not in trace
        assert run.stop_reason


@pytest.mark.parametrize("second", CANCELS)
@pytest.mark.parametrize("first", CANCELS)
def test_a_cancel_in_the_after_batch_of_a_cancelled_batch_loses_neither(first, second):
    run = traced(Raises("after_loss", CANCELS[first]()), Raises("after_batch", CANCELS[second]()))
    run.fit(1, make_learn())
    trace = run.trace
    assert trace.count("after_fit") == 1
    assert trace.count("after_cancel_train") == ("train" in (first, second))
    assert trace.count("begin_batch") == trace.count("after_batch")
    if "train" in (first, second):
        assert trace.count("begin_batch") == 1, "the fit went on after it was cancelled"
    elif "epoch" in (first, second):
        assert trace.count("begin_batch") == 2
        assert trace.count("after_cancel_epoch") == 1


def test_handlers_after_the_one_that_cancels_do_not_see_the_event():
    first, last = Raises("after_loss", CancelBatchException(), order=-1), Trace()
    run = Runner([last, first])
    run.trace = []
    run.fit(1, make_learn(n_train=1, n_valid=0))
    assert run.trace == [
        *("begin_fit", "begin_epoch", "begin_batch", "after_pred", "after_cancel_batch", "after_batch"),
        *("after_epoch", "after_fit"),
    ]


NONE_TO_CANCEL = [(e, "batch") for e in ("begin_fit", "begin_epoch", "after_batch", "begin_validate", "after_epoch")]


@pytest.mark.parametrize(("event", "what"), [*NONE_TO_CANCEL, ("begin_fit", "epoch"), ("after_epoch", "epoch")])
def test_a_cancel_of_nothing_keeps_no_other_callback_from_its_work(event, what):
    modes = []

    class Looks(Callback):
        def after_pred(self):
            modes.append((self.run.in_train, self.run.model.training))

    run = traced(Looks(), *(Raises(event, CANCELS[what](), order) for order in (-1, -2)))
    run.fit(1, make_learn())
    want = ["begin_fit", *full(), "after_fit"]
    i = want.index(event)
    assert run.trace == [*want[:i], *[f"after_cancel_{what}"] * 2, *want[i:]]
    assert modes == [(True, True), (True, True), (False, False)] and run.n_iter == 2 and run.stop_reason is None


def test_a_subclass_that_overrides_call_sees_each_event_once():
    class Loud(Runner):
        def __call__(self, event):
            heard.append(event)
            super().__call__(event)

    heard, run = [], Loud([Trace(), Trace(), Raises("begin_fit", CancelBatchException())])
    run.trace = []
    run.fit(1, make_learn())
    assert heard == ["begin_fit", "after_cancel_batch", *full()]
    assert run.trace == [e for e in [*heard, "after_fit"] for _ in range(2)]


def test_a_cancel_ends_its_batch_after_an_event_that_a_subclass_keeps_back():
    class Quiet(Runner):
        def __call__(self, event):
            if event != "after_batch":
                super().__call__(event)

    class Skips(Callback):
        def begin_batch(self):
            if self.run.iter == 1:
                raise CancelBatchException

    run = Quiet([Trace(), Skips()])
    run.trace = []
    run.fit(1, make_learn(n_train=3, n_valid=0))
    assert run.trace.count("begin_batch") == 3 and run.trace.count("after_pred") == 2


def test_a_batch_cancelled_before_the_step_takes_no_step():
    learn = make_learn(n_train=1, n_valid=0)
    before = learn.model.weight.detach().clone()
    Runner([Raises("after_backward", CancelBatchException())]).fit(1, learn)
    assert torch.equal(learn.model.weight, before)


def test_gradients_of_a_cancelled_batch_are_kept_for_the_next_step():
    learn = make_learn(n_train=2, n_valid=0)
    by_hand = pickle.loads(pickle.dumps(learn.model))
    for xb, yb in learn.data.train_dl:
        F.cross_entropy(by_hand(xb), yb).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    Runner([Raises("after_backward", CancelBatchException())]).fit(1, learn)
    assert torch.equal(learn.model.weight, by_hand.weight)


def test_the_text_of_a_cancel_is_the_stop_reason():
    run = Runner([Raises("after_step", CancelTrainException("enough is enough"))])
    run.fit(1, make_learn())
    assert run.stop_reason == "enough is enough"
    run.fit(1, make_learn())
    assert run.stop_reason is None, "an old reason stays"


@pytest.mark.parametrize("value", [False, 1])
def test_return_values_of_handlers_are_ignored(value):
    assert fit_trace(type("Says", (Callback,), dict.fromkeys(EVENTS, lambda self: value))) == fit_trace()


# --- errors and interrupts

ERRORS = [ValueError("broken"), KeyboardInterrupt()]


def check_ended(run, learn, keepers, error, grad_enabled=True):
    assert [k.ends for k in keepers] == [1] * len(keepers), "after_fit comes once for each callback, always"
    assert not learn.model._forward_hooks
    assert isinstance(run.stop_reason, str)
    word = "interrupted" if isinstance(error, KeyboardInterrupt) else "broken"
    assert word in run.stop_reason
    assert torch.is_grad_enabled() is grad_enabled
    run.fit(1, make_learn())  # and the run can be used again
    assert run.stop_reason is None


def fit_that_ends(run, learn, error):
    if isinstance(error, KeyboardInterrupt):
        run.fit(2, learn)  # Ctrl-C is no error
    else:
        with pytest.raises(ValueError, match="broken") as caught:
            run.fit(2, learn)
        assert caught.value is error


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("event", EVENTS[:10])
def test_an_error_in_a_callback_ends_the_fit_cleanly(event, error):
    keepers, learn = [Keeps(), Keeps(), Keeps()], make_learn()
    run = Runner([*keepers[:2], Raises(event, error), keepers[2]])
    fit_that_ends(run, learn, error)
    check_ended(run, learn, keepers, error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("what", CANCELS)
def test_an_error_in_an_after_cancel_event_ends_the_fit_cleanly(what, error):
    keepers, learn = [Keeps(), Keeps()], make_learn()
    run = Runner([keepers[0], Raises("after_loss", CANCELS[what]()), Raises(f"after_cancel_{what}", error), keepers[1]])
    fit_that_ends(run, learn, error)
    check_ended(run, learn, keepers, error)


class Breaks(nn.Module):
    def __init__(self, error, at):
        super().__init__()
        self.inner, self.error, self.left = nn.Linear(4, 2), error, at

    def forward(self, x):
        self.left -= 1
        if self.left == -1:
            raise self.error
        return self.inner(x)


class BreaksBackward(torch.autograd.Function):
    error = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise BreaksBackward.error


def breaking_loader(error, at):
    class Loader(list):
        def __iter__(self):
            for i, b in enumerate(super().__iter__()):
                if i == at:
                    raise error
                yield b

    return Loader(batches(3))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("at", [0, 1, 2], ids=["first batch", "second batch", "validation"])
def test_an_error_in_the_model_ends_the_fit_cleanly(error, at):
    keepers, learn = [Keeps(), Keeps()], make_learn(model=Breaks(error, at))
    run = Runner(keepers)
    fit_that_ends(run, learn, error)
    assert ("in validation" if at == 2 else f"epoch 0, batch {at}") in run.stop_reason
    check_ended(run, learn, keepers, error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_an_error_in_the_loss_ends_the_fit_cleanly(error):
    def loss(pred, yb):
        raise error

    keepers, learn = [Keeps()], make_learn(loss_func=loss)
    run = Runner(keepers)
    fit_that_ends(run, learn, error)
    check_ended(run, learn, keepers, error)


def test_an_error_in_the_backward_pass_ends_the_fit_cleanly():
    BreaksBackward.error = error = ValueError("broken")
    keepers, learn = [Keeps()], make_learn(loss_func=lambda p, y: BreaksBackward.apply(F.cross_entropy(p, y)))
    run = Runner(keepers)
    with pytest.raises(ValueError, match="broken"):
        run.fit(1, learn)
    check_ended(run, learn, keepers, error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("which", ["train_dl", "valid_dl"])
@pytest.mark.parametrize("at", [0, 2])
def test_an_error_in_the_loader_ends_the_fit_cleanly(error, which, at):
    keepers, learn = [Keeps()], make_learn()
    setattr(learn.data, which, breaking_loader(error, at))
    run = Runner(keepers)
    fit_that_ends(run, learn, error)
    check_ended(run, learn, keepers, error)


def test_an_error_in_one_after_fit_does_not_skip_the_others(capsys):
    keepers, learn = [Keeps(), Keeps()], make_learn()
    run = Runner([keepers[0], Raises("after_fit", ValueError("one")), Raises("after_fit", OSError("two")), keepers[1]])
    with pytest.raises(ValueError, match="one"):
        run.fit(1, learn)
    assert [k.ends for k in keepers] == [1, 1]
    assert "one" in run.stop_reason
    assert "OSError: two" in capsys.readouterr().err, "the second error was lost"


def test_an_error_in_after_fit_does_not_hide_the_one_that_ended_the_fit(capsys):
    run = Runner([Raises("after_loss", ValueError("first")), Raises("after_fit", OSError("second"))])
    with pytest.raises(ValueError, match="first"):
        run.fit(1, make_learn())
    assert "first" in run.stop_reason
    assert "OSError: second" in capsys.readouterr().err


def test_a_stop_reason_names_callback_event_and_place():
    class Broken(Callback):
        def after_loss(self):
            if self.run.n_iter == 1:
                raise ValueError("no good")

    run = Runner([Broken])
    with pytest.raises(ValueError, match="no good"):
        run.fit(1, make_learn())
    assert run.stop_reason == "ValueError in Broken.after_loss, in training, epoch 0, batch 1: no good"


class Replaces(Callback):
    def begin_fit(self):
        run = self.run
        run.model, run.loss_func, run.logger = nn.Linear(4, 2), F.mse_loss, list
        run.loss_func = lambda p, y: F.cross_entropy(p, y) * 2
        run.opt = torch.optim.SGD(run.model.parameters(), lr=1.0)
        run.data = SimpleNamespace(train_dl=batches(1), valid_dl=None)


@pytest.mark.parametrize("error", [None, *ERRORS, CancelTrainException()], ids=lambda e: type(e).__name__)
def test_attributes_that_callbacks_replace_are_restored(error):
    learn = make_learn()
    weight = learn.model.weight.detach().clone()
    run = Runner([Replaces(), *([Raises("after_step", error)] if error else [])])
    logger = run.logger = lambda line: None
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(1, learn)
    else:
        run.fit(1, learn)
    assert (run.model, run.opt, run.loss_func, run.data) == (learn.model, learn.opt, learn.loss_func, learn.data)
    assert run.logger is logger
    assert torch.equal(learn.model.weight, weight), "the fit did not use what replaced the model"
    assert run.n_iter == (0 if error in ERRORS else 1)  # not 2: the loader was replaced as well


def test_no_graph_is_kept_after_a_fit():
    run = Runner()
    run.fit(1, make_learn(n_valid=0))
    assert run.loss.grad_fn is None
    assert run.pred.grad_fn is None


CTRL_C = """
from itertools import count
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from fastrbn.learn import Callback, Learner, Runner

class Loader:
    def __iter__(self):
        for i in count():
            if i == 3:
                print("ready", flush=True)
            yield torch.randn(5, 4), torch.randint(0, 2, (5,))

class Ends(Callback):
    ends = 0
    def begin_fit(self): self._h = self.run.model.register_forward_hook(lambda *a: None)
    def after_fit(self): type(self).ends += 1; self._h.remove()

model = torch.nn.Linear(4, 2)
learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy,
                SimpleNamespace(train_dl=Loader(), valid_dl=None))
run = Runner([Ends])
run.fit(1, learn)
print(Ends.ends, len(model._forward_hooks), torch.is_grad_enabled(), run.stop_reason)
"""


def test_a_real_ctrl_c_ends_the_fit_cleanly():
    env = {**os.environ, "PYTHONPATH": str(Path(fastrbn.learn.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", CTRL_C], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=600)
    finally:
        child.kill()
        child.communicate()
    assert err == ""
    assert out.startswith("1 0 True interrupted (Ctrl-C) in training, epoch 0, batch ")
    assert child.returncode == 0


# --- callbacks of a run


def test_callbacks_are_reachable_by_name_and_a_second_one_by_number():
    class ParamThing(Callback):
        pass

    class OtherCallback(Callback):
        pass

    first, second, third, other = ParamThing(), ParamThing(), ParamThing(), OtherCallback()
    run = Runner([first, second], cb_funcs=[lambda: third, lambda: other])
    assert (run.param_thing, run.param_thing_2, run.param_thing_3) == (first, second, third)
    assert run.other is other


def test_callbacks_run_by_order_and_equal_orders_in_the_order_given():
    said = []

    def says(word, order=0):
        return type("Says", (Callback,), {"_order": order, "begin_fit": lambda self: said.append(word)})

    Runner([says("c", 5), says("a"), says("b"), says("z", -3), says("d", 5)]).fit(0, make_learn())
    assert said == ["z", "a", "b", "c", "d"]


def test_a_run_has_exactly_one_train_eval_callback():
    class Mine(TrainEvalCallback):
        pass

    assert [type(cb).__name__ for cb in Runner().cbs] == ["TrainEvalCallback"]
    assert [type(cb).__name__ for cb in Runner([Mine]).cbs] == ["Mine"]


def test_callbacks_added_during_a_fit_take_part_from_the_next_one():
    class Adds(Callback):
        def begin_fit(self):
            if not hasattr(self.run, "trace_cb"):
                self.run.trace_cb = Trace()
                self.run.add_cbs(self.run.trace_cb)

    run = Runner([Adds])
    run.trace = []
    run.fit(1, make_learn())
    assert run.trace == []
    run.fit(1, make_learn())
    assert run.trace[0] == "begin_fit"
    assert run.trace[-1] == "after_fit"


def test_a_callback_shared_by_two_runs_belongs_to_the_one_that_fits():
    cb = Trace()
    one, two = Runner([cb]), Runner([cb])
    one.trace, two.trace = [], []
    one.fit(0, make_learn())
    assert (one.trace, two.trace) == (["begin_fit", "after_fit"], [])


@pytest.mark.parametrize(
    "wrong", [3, "Recorder", lambda: 3, dict, object()], ids=["number", "name", "function", "class", "object"]
)
def test_something_that_is_not_a_callback_raises(wrong):
    with pytest.raises(TypeError, match=r"callbacks derive from fastrbn\.Callback; got"):
        Runner([wrong])


def test_a_callback_may_not_take_a_name_of_the_run():
    for name in ("Loss", "FitCallback", "Opt"):
        with pytest.raises(ValueError, match="rename the class"):
            Runner([type(name, (Callback,), {})])


def test_an_event_nobody_overrides_has_no_handlers():
    class Quiet(Callback):
        def after_step(self):
            pass

    run = Runner([Quiet])
    assert len(run._handlers["after_step"]) == 1
    assert run._handlers["after_pred"] == ()


# --- arguments


@pytest.mark.parametrize("epochs", [-1, 1.5, "3", None, True])
def test_epochs_must_be_a_whole_number(epochs):
    with pytest.raises(ValueError, match="epochs must be a whole number"):
        Runner().fit(epochs, make_learn())


def test_epochs_may_be_an_integer_of_numpy():
    run = Runner()
    run.fit(np.int64(1), make_learn())
    assert run.epochs == 1


def test_fit_without_a_learner_names_what_is_missing():
    with pytest.raises(TypeError, match=r"got NoneType without model, opt, loss_func, data: write run\.fit"):
        Runner().fit(1)
    with pytest.raises(TypeError, match="got Linear without opt, loss_func, data"):
        Runner().fit(1, SimpleNamespaceLinear())


def SimpleNamespaceLinear():  # a model in place of a Learner, as one writes in haste
    model = nn.Linear(4, 2)
    model.model = None
    return model


def test_fit_without_a_learner_uses_the_last_one():
    run, learn = Runner(), make_learn()
    run.fit(1, learn)
    before = learn.model.weight.detach().clone()
    run.fit(1)
    assert run.learn is learn
    assert not torch.equal(learn.model.weight, before)


def test_a_nested_fit_raises_and_the_outer_one_ends_normally():
    class Nests(Callback):
        def after_loss(self):
            self.run.fit(1, make_learn())

    keeper = Keeps()
    run = Runner([keeper, Nests])
    with pytest.raises(RuntimeError, match="make a second Runner"):
        run.fit(1, make_learn())
    assert keeper.ends == 1
    with pytest.raises(RuntimeError, match="make a second Runner"):
        run.fit(1, make_learn())
    assert keeper.ends == 2


def test_a_second_run_may_fit_during_a_fit():
    class Nests(Callback):
        def after_epoch(self):
            other = Runner()
            other.fit(1, make_learn())
            self.n = other.n_iter

    run = Runner([Nests])
    run.fit(1, make_learn())
    assert run.nests.n == 2


def test_a_loader_without_a_length_counts_epochs_only():
    class Endless:
        def __iter__(self):
            return iter(batches(3))

    class Looks(Callback):
        def begin_fit(self):
            self.seen = []

        def begin_batch(self):
            self.seen.append((self.run.iters, self.run.n_epochs, self.run.n_iter))

    learn = make_learn(n_valid=0)
    learn.data.train_dl = Endless()
    run = Runner([Looks])
    run.fit(2, learn)
    assert run.looks.seen == [(None, float(i // 3), i) for i in range(6)]


def test_an_unknown_attribute_of_the_run_is_named():
    run = Runner()
    with pytest.raises(AttributeError, match="no attribute 'recoder', and no callback of that name"):
        run.recoder  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean 'n_epochs'"):
        run.n_epoch  # noqa: B018


def test_reprs_are_short_and_correct():
    assert repr(Runner([Trace])) == "Runner([TrainEvalCallback, Trace])"
    assert repr(make_learn()) == "Learner(Linear, SGD, cross_entropy)"


def test_gradients_left_by_an_interrupted_fit_do_not_reach_the_next():
    learn = make_learn(n_valid=0)
    run = Runner([Raises("after_backward", CancelTrainException())])
    run.fit(1, learn)
    by_hand = pickle.loads(pickle.dumps(learn.model))
    by_hand.zero_grad()
    opt = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for xb, yb in learn.data.train_dl:
        F.cross_entropy(by_hand(xb), yb).backward()
        opt.step()
        opt.zero_grad()
    run.fit(1, learn)
    assert torch.equal(learn.model.weight, by_hand.weight)


# --- what users hand over by mistake


def test_a_class_in_place_of_an_instance_raises_at_once():
    learn = make_learn()
    model, opt, loss = learn.model, learn.opt, F.cross_entropy
    with pytest.raises(TypeError, match=r"got the class CrossEntropyLoss: write loss_func=CrossEntropyLoss\(\)"):
        Learner(model, opt, nn.CrossEntropyLoss, learn.data)
    with pytest.raises(TypeError, match=r"got the class SGD: write opt=SGD\(model.parameters\(\), lr=0.1\)"):
        Learner(model, torch.optim.SGD, loss, learn.data)
    learn.loss_func = nn.CrossEntropyLoss
    with pytest.raises(TypeError, match="loss_func must be an instance"):
        Runner().fit(1, learn)


class Returns(Callback):
    def after_step(self):
        return True


class SetsStop(Callback):
    def after_step(self):
        self.run.stop = True


@pytest.mark.parametrize(("cb", "how"), [(Returns, "return True in Returns.after_step"), (SetsStop, "run.stop = True")])
def test_return_true_and_run_stop_warn_once_a_fit(cb, how):
    run = Runner(cb)
    with pytest.warns(UserWarning, match=f"{how} ends nothing: .* raises CancelTrainException") as told:
        run.fit(2, make_learn())
    assert (len(told), run.n_iter) == (1, 4)


def test_a_callback_may_be_called_stop():
    class Stop(Callback):
        def after_step(self):
            raise CancelTrainException("enough")

    run = Runner(Stop)
    run.fit(1, make_learn())
    assert (run.stop_reason, run.n_iter) == ("enough", 1)


class CourseOptimizer:
    """As the course's notebook 09 has it: lists of parameters, and their settings beside them."""

    def __init__(self, params):
        self.param_groups, self.hypers = [list(params)], [{"lr": 0.5}]

    def zero_grad(self):
        for p in self.param_groups[0]:
            p.grad = None

    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]:
                p -= self.hypers[0]["lr"] * p.grad


def test_a_custom_optimiser_trains():
    learn, sgd = make_learn(), make_learn()
    sgd.model.load_state_dict(learn.model.state_dict())
    sgd.data, sgd.opt = learn.data, torch.optim.SGD(sgd.model.parameters(), lr=0.5)
    learn.opt = CourseOptimizer(learn.model.parameters())
    for each in (learn, sgd):
        Runner().fit(1, each)
    assert torch.allclose(learn.model.weight, sgd.model.weight)


def test_an_incomplete_optimiser_is_refused_before_training():
    class Reads(Callback):
        _needs_opt = ("param_groups", "lr")

    learn = make_learn()
    learn.opt = CourseOptimizer(learn.model.parameters())
    with pytest.raises(TypeError, match="^Reads: .*CourseOptimizer lacks param_groups, a list of dictionaries"):
        Runner(Reads).fit(1, learn)
    learn.opt = object()
    with pytest.raises(TypeError, match=r"^the loop: .* object lacks step\(\); zero_grad\(\): derive it from"):
        Runner().fit(1, learn)


# --- training and evaluation mode


class Modes(Callback):
    """The names of the modules in training mode, in each batch."""

    _order = 1

    def begin_fit(self):
        self.seen = []

    def begin_batch(self):
        self.seen.append({name for name, m in self.run.model.named_modules() if m.training})


def nested():
    return nn.Sequential(nn.Linear(4, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), nn.BatchNorm1d(2))


def modes(model, valid=1):
    run = Runner(Modes)
    run.fit(1, make_learn(n_train=1, n_valid=valid, model=model))
    assert all(not seen for seen in run.modes.seen[1:])
    return run.modes.seen[0]


ALL = {"", "0", "1", "1.0", "1.1", "2"}


def test_a_module_put_into_evaluation_mode_stays_there_while_the_model_trains():
    model = nested()
    model[1].eval()
    model[1][1].train()
    before = model[1][0].running_mean.clone()
    for _ in range(2):  # also in the fit after, which finds the model in evaluation mode
        assert modes(model) == ALL - {"1", "1.0"}
    assert torch.equal(model[1][0].running_mean, before) and not torch.equal(model[2].running_mean, before)
    model.train()
    assert modes(model) == ALL


@pytest.mark.parametrize("valid", [0, 1])
def test_a_model_in_evaluation_mode_as_a_whole_trains(valid):
    assert modes(nested().eval(), valid) == ALL
    body = nested()
    assert modes(body, valid) == ALL
    assert modes(nn.Sequential(*body), valid) == ALL, "a new model around the modules of one that was trained"


def test_a_loader_longer_than_it_says_counts_as_one_epoch():
    class Long(list):
        def __len__(self):
            return 2

    class Sees(Callback):
        _order, seen = 5, ()

        def begin_batch(self):
            self.seen = (*self.seen, self.run.n_epochs)

    learn, run = make_learn(n_valid=0), Runner(Sees)
    learn.data.train_dl = Long(batches(5))
    run.fit(2, learn)
    assert run.sees.seen == (0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0)
