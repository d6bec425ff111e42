"""Exported files give the model's scores for any batch size, and none is left that does not."""

import importlib.util
import json

import pytest
import torch
from torch import nn

from fastrbn import RunningBatchNorm, export
from fastrbn.export import export_model


def small_net():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), RunningBatchNorm(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3))
    net(torch.randn(8, 1, 4, 4))  # statistics that are not the initial ones
    return net


ABOUT = {"classes": ["Bär", "fox"]}


def test_a_pt2_gives_the_scores_for_any_batch_size_without_fastrbn(tmp_path):
    net, x = small_net(), torch.randn(7, 1, 4, 4)
    assert export_model(net, (1, 4, 4), tmp_path / "net.pt2", None, ABOUT) < 1e-5
    assert net.training, "a copy was exported"
    files = {"fastrbn.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=files)
    assert json.loads(files["fastrbn.json"]) == ABOUT
    assert not [node for node in program.graph.nodes if "fastrbn" in str(node.target)]
    torch.testing.assert_close(program.module()(x), net.eval()(x))


def test_onnx_gives_the_scores_for_any_batch_size(tmp_path):
    for package in export.PACKAGES:
        pytest.importorskip(package, reason=f"needs {package}")
    import onnx
    import onnxruntime

    net, x, path = small_net(), torch.randn(7, 1, 4, 4), str(tmp_path / "net.onnx")
    assert export_model(net, (1, 4, 4), path, "onnx", ABOUT) < 1e-5
    proto = onnx.load(path)
    assert json.loads({p.key: p.value for p in proto.metadata_props}["fastrbn"]) == ABOUT
    assert {node.op_type for node in proto.graph.node} <= {"Conv", "BatchNormalization", "Reshape", "Flatten", "Gemm"}
    (scores,) = onnxruntime.InferenceSession(path).run(["scores"], {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), net.eval()(x).detach())


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"missing: onnx, onnxscript, onnxruntime. .*pip install 'fastrbn\[export\]'"):
        export_model(small_net(), (1, 4, 4), tmp_path / "net.onnx", None, {})


def as_torch(monkeypatch, load):
    """Replace what exports to torch: the file is empty, and loading it gives `load`."""
    monkeypatch.setattr(export, "_torch", lambda *_: b"")
    monkeypatch.setattr(export, "_read_torch", lambda _: load)


@pytest.mark.parametrize(
    "load, words",
    [
        (lambda x: x.flatten(1)[:, :3] + 0.01, "differs from the model by 0.01 on 4 random inputs"),
        (lambda x: x.flatten(1)[:, :2], "differs from the model by nan on 4"),
        (lambda x: x.flatten(1)[:, :3] + (len(x) == 1), "differs from the model by 1 on 1 random inputs"),
    ],
)
def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch, load, words):
    as_torch(monkeypatch, load)
    (tmp_path / "net.pt2").write_bytes(b"before")
    with pytest.raises(RuntimeError, match=words):
        export_model(nn.Sequential(nn.Flatten(), Three()), (1, 4, 4), tmp_path / "net.pt2", None, {})
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("net.pt2", b"before")]


class Three(nn.Module):
    def forward(self, x):
        return x[:, :3]


def test_a_layer_that_no_batch_norm_can_replace_stays(monkeypatch):
    net = small_net()
    net[1].register_buffer("more", torch.ones(1))
    assert export._plain(net.eval(), torch.randn(4, 1, 4, 4)) is net
    assert type(export._plain(small_net().eval(), torch.randn(4, 1, 4, 4))[1]) is nn.BatchNorm2d


def test_a_model_that_cannot_be_exported_is_an_error_that_says_why(tmp_path):
    class Counts(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(RuntimeError, match="the model cannot be exported to torch: "):
        export_model(Counts(), (1,), tmp_path / "net.pt2", None, {})
    with pytest.raises(ValueError, match=r"name must end in .onnx or .pt2, or `to` say which it is; got net.pth"):
        export_model(small_net(), (1, 4, 4), tmp_path / "net.pth", None, {})
    with pytest.raises(ValueError, match="to must be one of onnx, torch; got 'onx'. Did you mean 'onnx'?"):
        export_model(small_net(), (1, 4, 4), tmp_path / "net", "onx", {})
    with pytest.raises(IsADirectoryError, match="export needs a file; .* is a folder: add a name, model.pt2"):
        export_model(small_net(), (1, 4, 4), tmp_path, "torch", {})
    assert not list(tmp_path.iterdir())
