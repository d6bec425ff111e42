"""A cache file of decoded images, so that a folder is decoded once and not at every start."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL
import torch
from torch import Tensor

from fastrbn.util import whole_file

__all__ = ["decode_once"]

FORMAT = 2  # increase it to invalidate every existing cache file
MANY = 5000  # from this many images on, a line explains the wait


def decode_once(
    path: str | Path, files: Sequence[str], size: tuple[int, int] | None, decode: Callable[[], Tensor]
) -> Tensor:
    """Return `decode()`, a uint8 tensor (N, C, H, W) of `files`, or read it from the cache file `path`.

    The cache is valid for the same files (names, sizes in bytes, modification times), the same `size` and the same
    version of Pillow; otherwise it is replaced. It is written completely or not at all. If it cannot be read or
    written, a UserWarning says so and the decoded images are returned.
    """
    path = Path(path)
    key = _key(path, files, size)
    x = _kept(path, key, len(files))
    if x is not None:
        return x
    if len(files) >= MANY:
        print(f"decoding {len(files)} images once; the result is cached in {path}", file=sys.stderr)
    x = decode()
    try:
        with whole_file(path) as f:
            torch.save({"key": key, "x": x, "crc32": zlib.crc32(x.numpy().data)}, f)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as RuntimeError
        warnings.warn(
            f"the decoded images cannot be cached in {path}, so every run decodes them again: {e}", stacklevel=3
        )
    return x


def _key(path: Path, files: Sequence[str], size: tuple[int, int] | None) -> str:
    digest = hashlib.sha1(f"{FORMAT} {PIL.__version__} {size}".encode(), usedforsecurity=False)
    for file in files:
        stat = os.stat(file)
        digest.update(f"\0{os.path.relpath(file, path.parent)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _kept(path: Path, key: str, n: int) -> Tensor | None:
    """The cached images; None if there are none or they are out of date."""
    try:
        kept = torch.load(path, weights_only=True)
        if kept["key"] != key:
            return None
        x = kept["x"]
        if x.dtype != torch.uint8 or x.dim() != 4 or len(x) != n:
            raise ValueError(f"it has shape {tuple(x.shape)} {x.dtype} for {n} images")
        if zlib.crc32(x.numpy().data) != kept["crc32"]:
            raise ValueError("its checksum does not match")
        return x
    except FileNotFoundError:
        return None
    except Exception as e:  # noqa: BLE001 - on damaged bytes the zip and pickle readers raise all kinds of exceptions
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        warnings.warn(f"{path} is not a valid cache of decoded images and is rewritten: {why}", stacklevel=4)
        return None
