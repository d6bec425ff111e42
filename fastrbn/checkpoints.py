"""Checkpoint files: plain data, written whole, told from broken ones when they are read, and never run as code.

A file is what `torch.save` writes: `torch.load(path, weights_only=True)["model"]` is the model's state_dict, with or
without this package.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from ._version import __version__
from .files import write_whole

FORMAT = 1  # counts up when files can no longer be read by what was there before
_NAME = re.compile(r"checkpoint-(\d+)-step-(\d+)\.pt")
_LEAVES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_PARTS = ("model", "opt", "callbacks", "random", "position")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or not be used for this run."""


def file_name(number: int, step: int) -> str:
    """`checkpoint-0007-step-1250.pt`: the 7th file of its folder, after 1250 training steps."""
    return f"checkpoint-{number:04d}-step-{step}.pt"


def files(folder) -> list[tuple[int, Path]]:
    """Number and path of the checkpoints in `folder`, the newest last; their numbers say so, not the file times."""
    folder = Path(folder)
    found = ((_NAME.fullmatch(p.name), p) for p in (folder.iterdir() if folder.is_dir() else ()))
    return sorted((int(m[1]), p) for m, p in found if m)


def write(path, state: dict) -> None:
    """Write `state` to `path`, whole or not at all. TypeError, with the place, for what is not plain data."""
    file, checked = io.BytesIO(), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # `read` counts on them
    try:
        torch.save(plain({"format": FORMAT, "fastrbn": __version__, "torch": torch.__version__, **state}), file)
    finally:
        torch.serialization.set_crc32_options(checked)
    # not getbuffer(): in a traceback's cycle its memoryview crashes the garbage collector of Python 3.12.1
    write_whole(path, file.getvalue())


def plain(value, where: str = ""):
    """`value` with numbers of NumPy and of other classes as Python's own, or a TypeError that says what in it is more
    than data. Containers are copied, tensors are not."""
    kind = type(value)
    if kind in _LEAVES or isinstance(value, torch.Tensor):
        return value
    if kind in (dict, collections.OrderedDict, collections.defaultdict):
        made = collections.OrderedDict() if kind is collections.OrderedDict else {}
        for k, v in value.items():
            made[plain(k, f"a key of {where}")] = plain(v, f"{where}.{k}" if where else str(k))
        if hasattr(value, "_metadata"):  # versions of the modules in a state_dict
            made._metadata = value._metadata
        return made
    if kind in (list, tuple):
        return kind(plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    for base in (bool, int, float, str):
        if isinstance(value, base):
            return base(value)
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(
        f"a checkpoint holds tensors, numbers, strings, lists, tuples and dictionaries only, so that reading it runs "
        f"no code; {where} is a {kind.__module__}.{kind.__qualname__}: have its state_dict return plain values"
    )


def read(path) -> dict:
    """The state in the file `path`, tensors on the CPU. CheckpointError, with the reason, when there is none whole."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load reads on over bytes that a disk has changed
            if (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"the checkpoint {path} is damaged (in {damaged}): take an earlier one")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError, pickle.UnpicklingError) as e:
        if isinstance(e, CheckpointError):
            raise
        if isinstance(e, pickle.UnpicklingError):
            why = "holds more than plain data, and is not opened: it was not written by Checkpoint"
        else:
            why = f"is not whole ({str(e).splitlines()[0] if str(e) else type(e).__name__}): take an earlier one"
        raise CheckpointError(f"the checkpoint {path} {why}") from e
    except OSError as e:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {e.strerror or e}") from e
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(
            f"{path} is no checkpoint of a run: Checkpoint writes those; weights alone are for model.load_state_dict"
        )
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"the checkpoint {path} has format {state['format']}, of fastrbn {state.get('fastrbn', '(unknown)')}; this "
            f"version reads format {FORMAT}: resume with the version that wrote it"
        )
    if missing := [part for part in _PARTS if part not in state]:
        raise CheckpointError(f"the checkpoint {path} lacks {', '.join(missing)}: take an earlier one")
    return state


def find(path, check=lambda state: None) -> tuple[Path, dict]:
    """File and state to resume from: `path` itself, or the newest in the folder `path` that is whole and passes.

    `check(state)` raises CheckpointError for a state that cannot be used. In a folder the one before is then tried,
    with a warning that names both; when none will do, the newest one's error is raised.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"resume needs a checkpoint, or a folder of them; there is no {path}")
        state = read(path)
        check(state)
        return path, state
    errors = []
    for _, file in reversed(files(path)):
        try:
            state = read(file)
            check(state)
        except CheckpointError as e:
            errors.append(e)
            continue
        for e in errors:
            warnings.warn(f"{e}; resuming from {file} instead", stacklevel=5)
        return file, state
    if errors:
        raise errors[0]
    raise CheckpointError(f"resume needs a checkpoint, and {path} holds none (checkpoint-….pt): was one written?")
