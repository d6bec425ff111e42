"""The names of the events, and what a misspelt one leads to."""

import pytest

from fastrbn.learn import EVENTS, Callback
from fastrbn.learn.events import nearest_event


def test_events_come_in_the_order_in_which_a_fit_fires_them():
    assert EVENTS[:3] == ("begin_fit", "begin_epoch", "begin_batch")
    assert EVENTS[3:8] == ("after_pred", "after_loss", "after_backward", "after_step", "after_batch")
    assert EVENTS[8:11] == ("begin_validate", "after_epoch", "after_fit")
    assert set(EVENTS[11:]) == {"after_cancel_batch", "after_cancel_epoch", "after_cancel_train"}
    assert len(set(EVENTS)) == 14


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_is_a_documented_no_op_of_the_base_class(event):
    method = getattr(Callback, event)
    assert len(method.__doc__) > 20
    assert method(Callback()) is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("begin_bacth", "begin_batch"),
        ("after_bacward", "after_backward"),
        ("begin_validation", "begin_validate"),
        ("after_cancel_fit", "after_cancel_train"),
        ("before_fit", "begin_fit"),
        ("before_batch", "begin_batch"),
        ("after_train", "after_cancel_train"),
        ("beginfit", "begin_fit"),
        ("afte_loss", "after_loss"),
    ],
)
def test_a_misspelt_event_gets_the_nearest_one(typed, meant):
    near = nearest_event(typed)
    assert near is not None
    if typed not in ("after_cancel_fit", "after_train"):  # two are as near there
        assert near == meant


@pytest.mark.parametrize("name", ["plot", "reset", "losses", "schedule", "accumulate", "set_pb"])
def test_a_name_that_resembles_no_event_is_left_alone(name):
    assert nearest_event(name) is None
