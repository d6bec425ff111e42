"""The fused optimisers that the package makes step as plain ones do, also where PyTorch's own start is unset."""

import copy
import math

import torch
from torch import nn, optim

from fastrbn.learn.optimiser import start_momentum

SETTINGS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


def two():
    """The same model twice, with an SGD of momentum: fused and started, and plain."""
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    b = copy.deepcopy(a)
    fused, plain = optim.SGD(a.parameters(), fused=True, **SETTINGS), optim.SGD(b.parameters(), **SETTINGS)
    start_momentum(fused)
    return (a, fused), (b, plain)


def check_same(pairs):
    (a, fused), (b, plain) = pairs
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(fused.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])


def test_a_parameter_may_get_its_first_gradient_later_than_others():
    pairs, x = two(), torch.randn(5, 3)
    for model, opt in pairs:
        model[0].requires_grad_(False)
        for i in range(4):
            model[0].requires_grad_(i > 1)
            model(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
    check_same(pairs)


def test_a_first_step_that_a_grad_scaler_skips_leaves_no_trace(monkeypatch):
    pairs, x = two(), torch.randn(5, 3)
    monkeypatch.setattr(torch, "empty_like", lambda t, **kwargs: torch.full_like(t, math.nan, **kwargs))
    for model, opt in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (math.inf, 1, 1):
            scaler.scale(model(x).square().sum() * factor).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    check_same(pairs)


def test_only_a_fused_sgd_with_momentum_is_started():
    model = nn.Linear(2, 2)
    for opt in (
        optim.SGD(model.parameters(), **SETTINGS),
        optim.SGD(model.parameters(), fused=True),
        optim.Adam(model.parameters(), fused=True),
        optim.RMSprop(model.parameters(), momentum=0.9),
    ):
        start_momentum(opt)
        assert not opt.state
