"""The table of parameters and buffers."""

import pytest
import torch
from torch import nn

from fastrbn import RunningBatchNorm, leaf_table


def test_each_parameter_and_buffer_has_a_row():
    model = nn.Sequential(nn.Linear(3, 4), RunningBatchNorm(4))
    model[0].weight.requires_grad_(False)
    table = leaf_table(model)
    assert [r.name for r in table] == [*dict(model.named_parameters()), *dict(model.named_buffers())]
    row = table["0.weight"]
    assert (row.kind, row.requires_grad, row.is_leaf, row.grad_fn) == ("parameter", False, True, None)
    assert (row.shape, row.dtype, row.device, row.note) == ((4, 3), torch.float32, torch.device("cpu"), "")
    before = table["1.running_mean"].version
    model[1].running_mean.add_(1)
    assert leaf_table(model)["1.running_mean"].version == before + 1
    assert table["1.num_batches_tracked"].dtype == torch.int64 and table["1.bias"].requires_grad
    assert len(table) == 4 + 7 and table[0] is table.rows[0]


def test_a_buffer_that_holds_a_graph_stands_out():
    layer = nn.Module()
    layer.register_buffer("sums", torch.zeros(2))
    layer.sums.lerp_(torch.ones(2, requires_grad=True) * 2, 0.1)
    row = leaf_table(layer)["sums"]
    assert (row.is_leaf, row.grad_fn, row.requires_grad) == (False, "LerpBackward0", True)
    assert "holds a graph: detach what is written to it" in repr(leaf_table(layer))
    layer.sums.detach_()
    assert leaf_table(layer)["sums"].note == ""


def test_the_table_prints_with_aligned_columns():
    lines = repr(leaf_table(nn.Linear(2, 3))).splitlines()
    assert lines[0].split() == "name kind requires_grad is_leaf grad_fn shape dtype device version".split()
    assert lines[1].split() == ["weight", "parameter", "yes", "yes", "-", "3×2", "float32", "cpu", "1"], "filled once"
    assert lines[1].index("parameter") == lines[0].index("kind")


def test_tied_lazy_and_inference_tensors_have_rows_too():
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert [r.name for r in leaf_table(tied) if "weight" in r.name] == ["0.weight", "1.weight"]
    lazy = leaf_table(nn.LazyLinear(3))["weight"]
    assert (lazy.shape, lazy.version, lazy.note) == (None, None, "not made yet")
    with torch.inference_mode():
        assert leaf_table(nn.Linear(1, 1))["weight"].version is None


def test_wrong_input_is_refused():
    with pytest.raises(TypeError, match="needs an nn.Module; got list"):
        leaf_table([])
    with pytest.raises(KeyError, match="no parameter or buffer is named 'x'; there are: weight, bias"):
        leaf_table(nn.Linear(1, 1))["x"]
