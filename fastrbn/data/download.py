"""Torchvision's data sets on disk: found, checked, and downloaded completely or not at all."""

from __future__ import annotations

import contextlib
import io
import math
import os
import queue
import shutil
import socket
import sys
import tarfile
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from .errors import BadDataError, DataNotFoundError, DownloadError

__all__ = ["data_root", "torchvision_set"]

PROBE_SECONDS = 10  # without an answer by then, the network counts as unavailable
STALL_SECONDS = 30  # a download that receives nothing for this long fails


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the data sets, in torchvision's layout.

    Parameters
    ----------
    root : str or Path, optional
        The folder; by default $FASTRBN_DATA, else ~/.cache/fastrbn/data.

    Returns
    -------
    Path
        It need not exist.

    Raises
    ------
    BadDataError
        If it is a file.
    DataNotFoundError
        If the default needs a home directory and there is none.

    Examples
    --------
    >>> data_root("my-data").name
    'my-data'
    """
    path = Path(root or os.environ.get("FASTRBN_DATA") or "~/.cache/fastrbn/data")
    try:
        path = path.expanduser()
    except RuntimeError as e:
        raise DataNotFoundError(
            f"there is no home directory for {path} (HOME is not set, and the user has no entry in "
            "the password file). Give the folder of the data sets with root, --data-dir or "
            "FASTRBN_DATA."
        ) from e
    if path.exists() and not path.is_dir():
        raise BadDataError(
            f"the data root must be a folder; {path} is a file. Pass another root (--data-dir, or FASTRBN_DATA)."
        )
    return path


def torchvision_set(cls: Any, root: Path, train: bool, download: bool) -> Any:
    """`cls(root, train=train)` for torchvision's MNIST, FashionMNIST, CIFAR10 or CIFAR100, downloaded if missing.

    Raises DataNotFoundError if it is missing and `download` is False, DownloadError if the download fails, and
    BadDataError if a file is truncated or damaged. A damaged file is not deleted; that is the owner's decision.
    """
    files = _Files.of(cls, root)
    if not all(f.is_file() for f in files.wanted):
        _fetch(cls, files, root, download)
    for path, md5 in files.wanted.items():
        _check_idx(path) if md5 is None else _check_md5(path, md5)
    return cls(root, train=train, download=False)


@dataclass
class _Files:
    """The files of a torchvision data set."""

    wanted: dict[Path, str | None]  # path -> md5, or None for idx files, which contain their own sizes
    archives: dict[Path, str]  # path -> md5
    urls: list[str]

    @classmethod
    def of(cls, tv: Any, root: Path) -> _Files:
        if hasattr(tv, "resources"):
            folder, names = root / tv.__name__ / "raw", dict(tv.resources)
            first = next(iter(names))
            return cls(
                {folder / Path(n).stem: None for n in names},
                {folder / n: m for n, m in names.items()},
                [mirror + first for mirror in tv.mirrors],
            )
        folder = root / tv.base_folder
        wanted = dict(tv.train_list + tv.test_list + [[tv.meta["filename"], tv.meta["md5"]]])
        return cls({folder / n: m for n, m in wanted.items()}, {root / tv.filename: tv.tgz_md5}, [tv.url])


def _fetch(cls: Any, files: _Files, root: Path, download: bool) -> None:
    """Unpack the archives in `root`, or download them first."""
    from torchvision.datasets.utils import check_integrity

    here = [a for a, md5 in files.archives.items() if check_integrity(a, md5)]
    if len(here) < len(files.archives):
        if not download:
            missing = [str(f) for f in files.wanted if not f.is_file()]
            raise DataNotFoundError(
                f"{cls.__name__} was not found in {root}: there is no file {missing[0]}. Allow the "
                "download, or pass the folder that has it (root, --data-dir or FASTRBN_DATA)."
            )
        _probe(cls.__name__, files.urls)
        print(f"downloading {cls.__name__} to {root}", file=sys.stderr)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # download and unpack in a temporary folder, then rename file by file: an interruption leaves nothing that a
        # later run would take for data
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder, _quiet(), _stall_limit():
            tmp = Path(folder)
            for archive in here:
                (tmp / archive.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(archive, tmp / archive.relative_to(root))
            cls(tmp, download=True)
            for path in files.wanted:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(tmp / path.relative_to(root), path)
    except (OSError, RuntimeError, ValueError, EOFError, HTTPException, tarfile.TarError, zlib.error) as e:
        raise DownloadError(
            f"{cls.__name__} could not be downloaded to {root}: {e or type(e).__name__}. Nothing was "
            "kept; run again, or put the files there yourself in torchvision's layout."
        ) from e


def _probe(name: str, urls: list[str]) -> None:
    """Return once any mirror answers; torchvision would try them one after another, without a timeout."""
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask(url: str) -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
                answers.put(None)
        except (OSError, HTTPException, ValueError) as e:
            answers.put(f"{url}: {e}")

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    failures: list[str] = []
    while len(failures) < len(urls):
        try:
            failure = answers.get(timeout=PROBE_SECONDS)
        except queue.Empty:
            failures.append(f"no answer within {PROBE_SECONDS} s")
            break
        if failure is None:
            return
        failures.append(failure)
    raise DownloadError(
        f"{name} could not be downloaded: {'; '.join(failures)}. Check the network, or pass a folder "
        "that has it (root, --data-dir or FASTRBN_DATA)."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars unless stderr is a terminal; in a log file they are thousands of lines."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


@contextlib.contextmanager
def _stall_limit() -> Iterator[None]:
    # torchvision passes no timeout to urlopen, so the process-wide default is the only way
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _check_idx(path: Path) -> None:
    """Check MNIST's file format.

    It is two zero bytes, 8 for unsigned bytes, the rank, and each dimension as a big-endian 32-bit integer.
    """
    rank = 3 if "idx3" in path.name else 1
    with open(path, "rb") as f:
        header = f.read(4 + 4 * rank)
    size, shape = path.stat().st_size, [int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(1, rank + 1)]
    expected = [60000 if path.name.startswith("train") else 10000, 28, 28][:rank]
    if header[:4] != bytes([0, 0, 8, rank]) or shape != expected:
        raise BadDataError(
            f"{path} must be an idx file of unsigned bytes with shape {expected}; it begins "
            f"with {header.hex(' ', 4) or 'nothing'}. Delete it and run again to download it."
        )
    wanted = len(header) + math.prod(shape)
    if size != wanted:
        raise BadDataError(
            f"{path} is {'truncated' if size < wanted else 'too long'}: {size} bytes, but its header "
            f"promises {wanted}. Delete it and run again to download it."
        )


def _check_md5(path: Path, md5: str) -> None:
    from torchvision.datasets.utils import calculate_md5

    came = calculate_md5(path)
    if came != md5:
        raise BadDataError(
            f"{path} is damaged: its md5 sum is {came}, not {md5}. Delete it and run again to download it."
        )
