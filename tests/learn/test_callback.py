"""Callback: what reading and writing attributes mean, which names it takes, and that it can be copied."""

import copy
import functools
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.learn import Callback, CancelBatchException, CancelTrainException, Learner, Runner, camel2snake


def make_learn(n_train=3, n_valid=2):
    model = nn.Linear(4, 2)
    batches = [(torch.randn(5, 4), torch.randint(0, 2, (5,))) for _ in range(n_train + n_valid)]
    data = SimpleNamespace(train_dl=batches[:n_train], valid_dl=batches[n_train:])
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, data)


class Keeper(Callback):
    """Module level, for pickle."""

    def __init__(self, size=3):
        self.size, self.seen = size, []

    def after_loss(self):
        self.seen.append(self.run.loss.item())


@pytest.mark.parametrize(
    ("wrong", "right"), [("begin_bacth", "begin_batch"), ("after_losss", "after_loss"), ("before_epoch", "begin_epoch")]
)
def test_a_misspelt_event_is_an_error_when_the_class_is_made(wrong, right):
    with pytest.raises(TypeError, match=f"Oops.{wrong}.*Did you mean '{right}'"):
        type("Oops", (Callback,), {wrong: lambda self: None})


def test_a_misspelt_event_in_a_subclass_of_a_callback_is_an_error_too():
    with pytest.raises(TypeError, match="Did you mean 'after_batch'"):
        type("Oops", (Keeper,), {"after_bach": lambda self: None})


@pytest.mark.parametrize("order", ["3", None])
def test_an_order_that_is_not_a_number_is_an_error_and_nothing_is_attached(order):
    run = Runner()
    with pytest.raises(TypeError, match=f"_order must be a number: .*; Oops has _order = {order!r}"):
        run.add_cbs([Keeper(), type("Oops", (Callback,), {"_order": order})])
    assert len(run.cbs) == 1 and "keeper" not in vars(run)


def test_private_helpers_and_other_methods_may_have_any_name():
    cls = type("Fine", (Callback,), {"_begin_bacth": lambda self: 1, "plot": lambda self: 2, "after_note": "text"})
    assert cls()._begin_bacth() == 1


def test_attributes_that_the_callback_lacks_are_read_from_the_run():
    class Reader(Callback):
        def after_loss(self):
            self.read = (self.loss, self.xb, self.in_train, self.opt)
            self.same = self.loss is self.run.loss

    reader = Reader()
    run = Runner([reader])
    learn = make_learn()
    run.fit(1, learn)
    assert reader.same
    assert reader.read[3] is learn.opt
    assert reader.read[2] is False  # the last batch is one of validation


@pytest.mark.parametrize(
    "name", ["loss", "xb", "yb", "pred", "model", "n_iter", "stop_reason", "logger", "accumulating", "averaged"]
)
def test_assigning_an_attribute_of_the_run_raises_and_shows_the_right_form(name):
    with pytest.raises(AttributeError, match=rf"Keeper may not set self\.{name}.*self\.run\.{name} = "):
        setattr(Keeper(), name, 1)


def test_assigning_an_attribute_of_the_run_fails_during_a_fit():
    class Sets(Callback):
        def after_loss(self):
            self.loss = self.run.loss * 2

    with pytest.raises(AttributeError, match=r"self\.run\.loss"):
        Runner([Sets]).fit(1, make_learn())


def test_an_unknown_attribute_error_names_callback_attribute_and_the_closest():
    cb = Keeper()
    Runner([cb])
    with pytest.raises(AttributeError, match="neither Keeper nor its run has an attribute 'sise'.*Did you mean 'size'"):
        cb.sise  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean 'n_epochs'"):
        cb.n_epoch  # noqa: B018


def test_a_detached_callback_says_so():
    with pytest.raises(AttributeError, match="Keeper has no attribute 'loss', and it is not attached to a run"):
        Keeper().loss  # noqa: B018


def test_a_property_that_fails_inside_is_not_blamed_on_the_run():
    class Broken(Callback):
        @property
        def ratio(self):
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        Broken().ratio  # noqa: B018


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda cb: pickle.loads(pickle.dumps(cb))])
def test_copies_keep_their_state_and_leave_the_run_behind(how, attached):
    cb = Keeper(size=7)
    if attached:
        Runner([cb]).fit(1, make_learn())
    other = how(cb)
    assert type(other) is Keeper
    assert (other.size, other.seen) == (7, cb.seen)
    assert "run" not in vars(other)
    run = Runner([other])
    run.fit(1, make_learn())
    assert len(other.seen) > 0
    assert other.run is run


def test_a_copy_made_during_a_fit_works():
    class Copies(Callback):
        def after_batch(self):
            self.run.copied = copy.deepcopy(self)

    run = Runner([Copies])
    run.fit(1, make_learn())
    assert isinstance(run.copied, Copies)
    assert "run" not in vars(run.copied)


@pytest.mark.parametrize(
    ("name", "snake"),
    [
        ("AvgStatsCallback", "avg_stats_callback"),
        ("LR_Find", "lr_find"),
        ("CSVLogger", "csv_logger"),
        ("Recorder", "recorder"),
        ("BatchTransformXCallback", "batch_transform_x_callback"),
        ("Level2Test", "level2_test"),
    ],
)
def test_class_names_become_snake_case(name, snake):
    assert camel2snake(name) == snake


@pytest.mark.parametrize(
    ("name", "expected"), [("AvgStatsCallback", "avg_stats"), ("Recorder", "recorder"), ("Callback", "callback")]
)
def test_a_callbacks_name_has_no_final_callback(name, expected):
    assert (Callback() if name == "Callback" else type(name, (Callback,), {})()).name == expected


def test_repr_works_detached_and_attached():
    cb = Keeper()
    assert repr(cb) == "Keeper()"
    Runner([cb])
    assert repr(cb) == "Keeper()"


# A callback as the course writes them: no arguments, `_order`, events as methods, reads from self, writes to self.run.


class CourseCallback(Callback):
    _order = 3

    def begin_fit(self):
        self.losses, self.sizes, self.stopped = [], [], False

    def begin_batch(self):
        self.run.xb = self.xb * 0 + 1
        if self.in_train and self.n_iter == 1:
            raise CancelBatchException()

    def after_loss(self):
        if not self.in_train:
            return
        self.losses.append(self.loss.detach().cpu())
        self.sizes.append(self.xb.sum().item())

    def after_step(self):
        if self.n_iter >= 4:
            raise CancelTrainException()

    def after_cancel_train(self):
        self.stopped = True
        self.why = self.run.stop_reason

    def after_fit(self):
        self.done = self.epoch, self.n_iter


@pytest.mark.parametrize("given", [CourseCallback, functools.partial(CourseCallback)])
def test_a_callback_of_the_course_runs_unmodified(given):
    run = Runner(cb_funcs=[given])
    run.fit(3, make_learn())
    cb = run.course
    assert len(cb.losses) == 4  # iterations 0, 2, 3, 4: the second batch was cancelled
    assert cb.sizes == [20.0] * 4
    assert cb.stopped
    assert cb.done == (1, 5)
    assert "CourseCallback" in cb.why
    assert run.stop_reason == cb.why
