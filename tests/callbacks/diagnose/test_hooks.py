"""Hooks that go when they should."""

import gc

import pytest
import torch
from torch import nn

from fastrbn.callbacks import Hook, Hooks, ListContainer, append_stats, append_stats_hist, children


def hooks_on(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


# --- ListContainer


def test_a_list_container_takes_every_kind_of_index():
    c = ListContainer(range(10, 20))
    assert (c[0], c[-1], c[2:4], c[[1, 3]], len(c)) == (10, 19, [12, 13], [11, 13], 10)
    assert c[[True] + [False] * 8 + [True]] == [10, 19]
    assert c[[]] == []
    c[0] = 7
    del c[1]
    assert list(c)[:2] == [7, 12]
    assert ListContainer(3).items == [3]
    assert ListContainer("ab").items == ["ab"]


def test_a_mask_of_another_length_is_an_error():
    with pytest.raises(IndexError, match="a bool for each of 3 items; got 2"):
        ListContainer([1, 2, 3])[[True, False]]


def test_a_list_container_prints_its_length_and_first_ten():
    assert repr(ListContainer(range(3))) == "ListContainer (3 items)\n[0, 1, 2]"
    assert repr(ListContainer(range(12))) == "ListContainer (12 items)\n[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …]"


def test_children_are_the_direct_ones():
    model = nn.Sequential(net(), nn.ReLU())
    assert children(model) == [model[0], model[1]]


# --- Hook, Hooks


def test_a_hook_calls_with_itself_module_input_and_output():
    seen = []
    m, x = nn.Linear(4, 2), torch.randn(3, 4)
    hook = Hook(m, lambda *args: seen.append(args))
    out = m(x)
    ((h, module, inp, outp),) = seen
    assert h is hook
    assert module is m
    assert inp[0] is x
    assert outp is out
    hook.remove()
    hook.remove()
    m(x)
    assert len(seen) == 1
    assert hooks_on(m) == 0


def test_a_hook_is_a_context_manager_and_goes_on_an_error():
    m = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="inside"), Hook(m, lambda *a: None):
        assert hooks_on(m) == 1
        raise ValueError("inside")
    assert hooks_on(m) == 0


@pytest.mark.parametrize("cls", [Hook, Hooks])
def test_a_hook_that_is_deleted_is_gone(cls):
    model = net()
    hook = cls(model, lambda *a: None)
    assert hooks_on(model) > 0
    del hook
    gc.collect()
    assert hooks_on(model) == 0


@pytest.mark.parametrize("cls", [Hook, Hooks])
def test_what_failed_to_be_made_can_be_deleted(cls):
    broken = cls.__new__(cls)
    broken.remove()
    del broken
    with pytest.raises((AttributeError, TypeError)):
        cls(3, lambda *a: None)


def test_hooks_of_a_model_are_its_childrens_as_in_the_course():
    model = net()
    with Hooks(model, append_stats) as hooks:
        model(torch.randn(5, 4))
        assert hooks_on(model) == len(hooks) == 3
        means, stds = hooks[0].stats
        model.eval()
        model(torch.randn(5, 4))
        assert (len(means), len(stds)) == (1, 1), "evaluation was counted"
    assert hooks_on(model) == 0


def test_append_stats_keeps_mean_and_deviation_and_append_stats_hist_a_histogram_too():
    model = nn.Sequential(nn.Identity())
    x = torch.rand(6, 4) * 10
    for keep, expected in (
        (append_stats, [x.mean(), x.std()]),
        (append_stats_hist, [x.mean(), x.std(), x.histc(40, 0, 10)]),
    ):
        with Hooks(children(model), keep) as hooks:
            model(x)
            model(2 * x)
            torch.testing.assert_close([values[0] for values in hooks[0].stats], expected)
            assert all(len(values) == 2 for values in hooks[0].stats)


def test_deleting_an_item_removes_its_hook():
    model = net()
    hooks = Hooks(model, append_stats)
    del hooks[0]
    assert (hooks_on(model), len(hooks)) == (2, 2)
    del hooks[:]
    assert hooks_on(model) == 0
