"""Write a model as ONNX or as a PyTorch export, for batches of any size, and compare the file with the model."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrbn.norm import RunningBatchNorm, to_batchnorm
from fastrbn.util import one_of, write_whole

KINDS = {"onnx": ".onnx", "torch": ".pt2"}  # and how their files' names end
TOLERANCE = 1e-4  # of the largest score; other orders of summation give 1e-6 to 1e-5, a wrong graph about 1
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_model(
    model: nn.Module, shape: Sequence[int], path: str | Path, to: str | None, about: Mapping[str, Any]
) -> float:
    """Write `model` in evaluation mode for inputs (N, *shape), with `about` as JSON.

    Returns the largest difference between the file's output and the model's. Nothing is written if they differ
    (RuntimeError).
    """
    path = Path(path)
    to = _kind(path) if to is None else one_of("to", to, KINDS)
    if path.is_dir():
        raise IsADirectoryError(f"export needs a file; {path} is a folder: add a name, model{KINDS[to]}")
    model = copy.deepcopy(model).cpu().eval()
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    plain = _plain(model, x)
    write, read = (_onnx, _read_onnx) if to == "onnx" else (_torch, _read_torch)
    if to == "onnx":
        _check_packages()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about its own exporter
            content = write(plain, x, json.dumps(about, ensure_ascii=False))
            load = read(content)
    except Exception as e:
        why = " ".join(str(e).split())
        raise RuntimeError(
            f"the model cannot be exported to {to}: {type(e).__name__}: {why[:400]}{'…' if len(why) > 400 else ''}"
        ) from e
    difference = _difference(model, load, x)
    write_whole(path, content)
    return difference


def _plain(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with nn.BatchNorm for running batch norms, which other runtimes know as one operation, if it can."""
    if not any(isinstance(m, RunningBatchNorm) for m in model.modules()):
        return model
    try:
        plain = to_batchnorm(copy.deepcopy(model))
        with torch.no_grad():
            plain(x)
        return plain
    except (ValueError, RuntimeError):  # a pruned layer, or one used with other dimensions
        return model


def _kind(path: Path) -> str:
    found = next((kind for kind, end in KINDS.items() if path.suffix == end), None)
    if found is None:
        raise ValueError(f"the file's name must end in .onnx or .pt2, or `to` say which it is; got {path.name}")
    return found


@torch.no_grad()
def _difference(model: nn.Module, load: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The largest difference on batches of several sizes. RuntimeError if it is more than rounding."""
    worst = 0.0
    for batch in (x, x[:1], torch.cat([x, x[:3]])):
        want, got = model(batch), load(batch)
        difference = float((want - got).abs().max()) if want.shape == got.shape else float("nan")
        if not difference <= TOLERANCE * max(1.0, float(want.abs().max())):
            raise RuntimeError(
                f"what was exported differs from the model by {difference:.3g} on {len(batch)} random inputs (largest "
                f"score {float(want.abs().max()):.3g}), so nothing was written: does the model branch on its input, or "
                f"draw random numbers in evaluation mode?"
            )
        worst = max(worst, difference)
    return worst


def _torch(model: nn.Module, x: Tensor, about: str) -> bytes:
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"fastrbn.json": about})
    return file.getvalue()


def _read_torch(content: bytes) -> Callable[[Tensor], Tensor]:
    return torch.export.load(io.BytesIO(content)).module()


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export to onnx needs {', '.join(PACKAGES)}; missing: {', '.join(missing)}. Install them with "
            f"`pip install 'fastrbn[export]'`, or export to torch"
        )


def _onnx(model: nn.Module, x: Tensor, about: str) -> bytes:
    import onnx

    program = torch.onnx.export(
        model,
        (x,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None  # as always without a file's name
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"fastrbn": about})
    return proto.SerializeToString()


def _read_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
