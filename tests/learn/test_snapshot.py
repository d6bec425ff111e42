"""Keep and restore: what a snapshot puts back, and what it leaves alone."""

import random

import pytest
import torch
from torch import nn

from fastrbn.learn.snapshot import RandomState, Snapshot


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.group, model.count, model.cache = object(), 1, torch.zeros(2)
    return model


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_snapshot_restores_values_into_the_same_tensors_and_groups():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, ids, group = values(model), list(map(id, model.parameters())), opt.param_groups[0]
    with Snapshot([model], opt):
        model(torch.randn(8, 3)).sum().backward()
        opt.step()
        opt.param_groups[0]["lr"] = 7.0
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        model[1].running_mean = torch.ones(4)
        model.count, model.fresh, model.cache = 2, object(), None
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert ids == list(map(id, model.parameters())) and not hasattr(model, "fresh")
    assert model.count == 1 and torch.equal(model.cache, torch.zeros(2))
    assert opt.param_groups == [group] and group["lr"] == 0.1 and not opt.state


def test_attributes_that_are_neither_plain_nor_tensors_are_not_restored():
    model = net()
    with Snapshot([model]):
        model.group = None  # by whoever put it there
    assert model.group is None


def test_tensors_that_have_not_changed_are_not_written_to():
    model = net()
    versions = [t._version for t in model.state_dict(keep_vars=True).values()]
    with Snapshot([model]):
        model.eval()(torch.randn(8, 3))
    assert versions == [t._version for t in model.state_dict(keep_vars=True).values()]


def test_without_parameters_only_their_values_are_left_out():
    model = net()
    before = values(model)
    weight = model[0].weight
    with Snapshot([model], parameters=False):
        model(torch.randn(8, 3))
        weight.data.fill_(2.0)
        model[0].weight = nn.Parameter(torch.zeros(4, 3))
    assert model[0].weight is weight and weight.eq(2).all()
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


def test_random_states_are_restored_after_an_error_too():
    loader = torch.utils.data.DataLoader(range(4), shuffle=True, generator=torch.Generator().manual_seed(1))

    def draw():
        return torch.rand(1).item(), random.random(), loader.generator.get_state().tolist()

    states = torch.get_rng_state(), random.getstate(), loader.generator.get_state()
    with pytest.raises(ValueError, match="broken"), RandomState([loader, None]):
        first = draw()
        list(loader)
        raise ValueError("broken")
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert torch.equal(states[2], loader.generator.get_state()) and draw() == first
