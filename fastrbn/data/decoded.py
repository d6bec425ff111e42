"""Decoded images kept in a file, so that a folder of them is decoded once and not at each start."""

import hashlib
import os
import sys
import warnings
import zlib
from pathlib import Path

import PIL
import torch

from fastrbn.util import whole_file

__all__ = ["decode_once"]

FORMAT = 2  # another number makes every file of the old one be written anew
MANY = 5000  # from so many images a line says what the wait is for


def decode_once(path, files, size, decode):
    """`decode()`, a uint8 tensor (N, C, H, W) of `files` (N) at `size`, from the file `path` if it was kept there.

    What is kept is good for the same files (names, sizes in bytes, times of change), the same `size` and version of
    Pillow; else it is replaced. It is written whole or not at all. Where it cannot be read or written, a UserWarning
    says so, and the images are there all the same.
    """
    path = Path(path)
    key = _key(path, files, size)
    x = _kept(path, key, len(files))
    if x is not None:
        return x
    if len(files) >= MANY:
        print(f"decoding {len(files)} images, once: they are kept in {path}", file=sys.stderr)
    x = decode()
    try:
        with whole_file(path) as f:
            torch.save({"key": key, "x": x, "crc32": zlib.crc32(x.numpy())}, f)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as RuntimeError
        warnings.warn(f"the decoded images cannot be kept in {path}, so each start decodes them again: {e}",
                      stacklevel=3)
    return x


def _key(path, files, size):
    digest = hashlib.sha1(f"{FORMAT} {PIL.__version__} {size}".encode(), usedforsecurity=False)
    for file in files:
        stat = os.stat(file)
        digest.update(f"\0{os.path.relpath(file, path.parent)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _kept(path, key, n):
    try:
        kept = torch.load(path, weights_only=True)
        if kept["key"] != key:
            return None
        x = kept["x"]
        if x.dtype != torch.uint8 or x.dim() != 4 or len(x) != n:
            raise ValueError(f"it holds {tuple(x.shape)} {x.dtype} for {n} images")
        if zlib.crc32(x.numpy()) != kept["crc32"]:
            raise ValueError("the images in it have changed since they were written")
        return x
    except FileNotFoundError:
        return None
    except Exception as e:  # noqa: BLE001 - damaged bytes lead the readers of zip and pickle to any exception
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        warnings.warn(f"{path} is no file of decoded images and is written anew: {why}", stacklevel=4)
        return None
