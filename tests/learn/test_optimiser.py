"""Which parameters PyTorch's fused steps train as the plain ones do."""

import copy

import pytest
import torch
from torch import nn, optim

from fastrbn.learn.optimiser import can_be_fused


class Subclassed(nn.Parameter):
    """Stands for parameters that are more than tensors, such as FSDP's."""


@pytest.mark.parametrize(
    "make, can",
    [
        (lambda: nn.Parameter(torch.rand(2, 4)), True),
        (lambda: nn.Parameter(torch.rand(2, 4).double()), True),
        (lambda: nn.Parameter(torch.rand(2, 4, 3, 3).to(memory_format=torch.channels_last)), True),
        (lambda: nn.Parameter(torch.rand(())), True),
        (lambda: nn.Parameter(torch.rand(2, 4)[:, ::2]), False),
        (lambda: nn.Parameter(torch.rand(2, 4).bfloat16()), False),
        (lambda: nn.Parameter(torch.rand(2, 4).to(torch.complex64)), False),
        (lambda: nn.LazyLinear(2).weight, False),
        (lambda: Subclassed(torch.rand(2, 4)), False),
    ],
)
def test_parameters_without_gaps_can_be_fused_and_are_then_trained_as_plainly(make, can):
    torch.manual_seed(0)
    p = make()
    assert can_be_fused([nn.Parameter(torch.ones(2)), p]) == can
    if not can:
        return
    q = copy.deepcopy(p)
    for t, fused in ((p, True), (q, False)):
        opt = optim.AdamW([t], lr=0.1, fused=fused)
        for _ in range(3):
            (t * t.detach()).sum().backward()
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(p, q)
