"""Checkpoint files: plain data, written whole, verified when read, and never executed.

A file is what `torch.save` writes, with a checksum in the zip archive's comment:
`torch.load(path, weights_only=True)["model"]` is the model's state_dict, also without this package.
"""

from __future__ import annotations

import collections
import hashlib
import io
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastrbn._version import __version__
from fastrbn.util import write_whole

FORMAT = 1  # raised when older versions can no longer read the files
_NAME = re.compile(r"checkpoint-(\d+)-step-(\d+)\.pt")
_LEAVES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_PARTS = ("model", "opt", "callbacks", "random", "position")
_CHECKSUM = "blake2b"
_MARK = b"fastrbn-blake2b:"  # starts the archive's comment; the hash of all bytes up to here, in hexadecimal, follows
_HASH_BYTES = 32
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9"  # starts files of PyTorch before 1.6, which are no archives
_FOOTER = len(_MARK) + 2 * _HASH_BYTES


class CheckpointError(RuntimeError):
    """Raised if a checkpoint cannot be read, or does not fit the run."""


def file_name(number: int, step: int) -> str:
    """`checkpoint-0007-step-1250.pt`: the 7th file of its folder, after 1250 training steps."""
    return f"checkpoint-{number:04d}-step-{step}.pt"


def files(folder: str | Path) -> list[tuple[int, Path]]:
    """Number and path of the checkpoints in `folder`, ordered by number, the newest last."""
    folder = Path(folder)
    found = ((_NAME.fullmatch(p.name), p) for p in (folder.iterdir() if folder.is_dir() else ()))
    return sorted((int(m[1]), p) for m, p in found if m)


def steps_in(path: str | Path) -> int:
    """The number of training steps, from the name of a checkpoint's file."""
    return int(Path(path).stem.rpartition("-")[2])


def write(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, whole or not at all. A TypeError names the place of what is not plain data."""
    versions = {"format": FORMAT, "checksum": _CHECKSUM, "fastrbn": __version__, "torch": torch.__version__}
    file = io.BytesIO()
    torch.save(plain({**versions, **state}), file)
    file.seek(-2, io.SEEK_END)  # an archive ends with the length of its comment, 0 so far
    file.write(_FOOTER.to_bytes(2, "little") + _MARK)
    # not getbuffer(): in a traceback's cycle its memoryview crashes the garbage collector of Python 3.12.1
    file.write(hashlib.blake2b(file.getvalue(), digest_size=_HASH_BYTES).hexdigest().encode())
    write_whole(path, file.getvalue())


def plain(value: Any, where: str = "") -> Any:
    """`value` with Python's own numbers for NumPy's and for subclasses; a TypeError names what is not plain data.

    Containers are copied, tensors are not.
    """
    kind = type(value)
    if kind in _LEAVES or isinstance(value, torch.Tensor):
        return value
    if kind in (dict, collections.OrderedDict, collections.defaultdict):
        made: Any = collections.OrderedDict() if kind is collections.OrderedDict else {}
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


def read(path: str | Path) -> dict[str, Any]:
    """The state in the file `path`, tensors on the CPU. CheckpointError, with the reason, if it is missing or damaged.

    Files written before checksums were added are checked by the archive's own CRC-32 only, with a warning.
    """
    state, sealed = _opened(path := Path(path))
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(
            f"{path} is not a checkpoint of a run, as Checkpoint writes them; load weights alone with learn.load"
        )
    _check_format(path, state)
    if "position" not in state and "callbacks" not in state:
        raise CheckpointError(
            f"{path} holds weights and no position in a fit, as learn.save writes them: load it with learn.load"
        )
    if missing := [part for part in _PARTS if part not in state]:
        raise CheckpointError(f"the checkpoint {path} lacks {', '.join(missing)}: take an earlier one")
    _check_parts(path, state)
    if not sealed:
        if "checksum" in state:
            raise CheckpointError(f"the checkpoint {path} is not whole (its checksum is missing): take an earlier one")
        warnings.warn(
            f"the checkpoint {path} has no checksum, because an older version wrote it: some damage would go unnoticed",
            stacklevel=2,
        )
    return state


def read_weights(path: str | Path) -> dict[str, Any]:
    """A state with `model`, a state_dict, and perhaps `opt`, tensors on the CPU. CheckpointError as in `read`.

    Reads what `Learner.save` and `Checkpoint` write, and files that hold a state_dict alone or as their `model`.
    """
    state, sealed = _opened(path := Path(path))
    if isinstance(state, dict) and "format" in state:
        _check_format(path, state)
        if not sealed and "checksum" in state:
            raise CheckpointError(f"the checkpoint {path} is not whole (its checksum is missing): take another one")
    elif isinstance(state, dict):
        state = {"model": state["model"] if isinstance(state.get("model"), dict) else state}
    weights = state.get("model") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not any(isinstance(v, torch.Tensor) for v in weights.values()):
        got = ", ".join(map(repr, [*weights][:3])) if isinstance(weights, dict) else type(state).__name__
        raise CheckpointError(
            f"{path} holds no weights; it must be a file of learn.save, Checkpoint or SaveBest, or a state_dict; got "
            f"{got or 'an empty one'}"
        )
    return state


def _check_format(path: Path, state: dict[str, Any]) -> None:
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"the checkpoint {path} has format {state['format']}, of fastrbn {state.get('fastrbn', '(unknown)')}; this "
            f"version reads format {FORMAT}: read it with the version that wrote it"
        )


def _opened(path: Path) -> tuple[Any, bool]:
    """What `torch.load` reads from the file, and whether it has a checksum, which matches."""
    if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
        kind = "a folder: name a file in it" if path.is_dir() else "not a file"
        raise CheckpointError(f"the checkpoint {path} cannot be read: it is {kind}")
    try:
        with open(path, "rb") as file:
            sealed = _is_sealed(file, path)
            return torch.load(file, map_location="cpu", weights_only=True), sealed
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {e.strerror or e}") from e
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"the checkpoint {path} holds more than plain data, so it is not opened: write it with Checkpoint, or with "
            f"learn.save"
        ) from e
    except Exception as e:  # noqa: BLE001 - damaged bytes lead the readers of zip and pickle to any exception
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        raise CheckpointError(f"the checkpoint {path} is not whole ({why}): take an earlier one") from e


def _is_sealed(file: BinaryIO, path: Path) -> bool:
    """True if `file` ends with a checksum. CheckpointError if its content does not match the checksum or, without one,
    the archive's CRC-32 of each entry. Rewinds `file`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _FOOTER))
    footer = file.read()
    file.seek(0)
    if not footer.startswith(_MARK):
        if file.read(len(_OLD)) == _OLD:
            file.seek(0)
            return False
        file.seek(0)
        with zipfile.ZipFile(file) as archive:  # torch.load does not check them
            if (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"the checkpoint {path} is damaged (in {damaged}): take an earlier one")
        file.seek(0)
        return False
    found, left = hashlib.blake2b(digest_size=_HASH_BYTES), size - 2 * _HASH_BYTES
    while left > 0 and (chunk := file.read(min(left, 1 << 20))):
        found.update(chunk)
        left -= len(chunk)
    file.seek(0)
    if found.hexdigest().encode() != footer[len(_MARK) :]:
        raise CheckpointError(f"the checkpoint {path} is damaged (its checksum does not match): take an earlier one")
    return True


def _check_parts(path: Path, state: dict[str, Any]) -> None:
    """CheckpointError for parts that `write` would not have written."""
    for part in _PARTS:
        if not isinstance(state[part], dict):
            raise CheckpointError(f"the checkpoint {path}: '{part}' must be a dict; got {type(state[part]).__name__}")
    place = state["position"]
    for name in ("epoch", "n_iter", "epochs"):
        unknown = name == "epochs" and place.get(name) == math.inf  # of a fit that max_steps ends
        if type(place.get(name)) is not int and not unknown:
            got = repr(place[name]) if name in place else "nothing"
            raise CheckpointError(f"the checkpoint {path}: position.{name} must be a whole number; got {got}")
    if place.get("phase") not in ("train", "valid", "end"):
        raise CheckpointError(
            f"the checkpoint {path}: position.phase must be train, valid or end; got {place.get('phase')!r}"
        )


def find(path: str | Path, check: Callable[[dict[str, Any]], None] = lambda state: None) -> tuple[Path, dict[str, Any]]:
    """File and state to resume from: `path` itself, or the newest whole file in the folder `path` that passes.

    `check(state)` raises CheckpointError for a state that cannot be used. In a folder the file before is tried then,
    with a warning that names both; if none will do, the newest one's error is raised.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"resume needs a checkpoint, or a folder of them; {path} does not exist")
        state = read(path)
        check(state)
        return path, state
    errors: list[CheckpointError] = []
    for _, file in reversed(files(path)):
        try:
            state = read(file)
            check(state)
        except CheckpointError as e:
            errors.append(e)
            continue
        for error in errors:
            warnings.warn(f"{error}; resuming from {file} instead", stacklevel=5)
        return file, state
    if errors:
        raise errors[0]
    raise CheckpointError(f"resume needs a checkpoint, and {path} holds none (checkpoint-….pt): was one written?")
