"""Compiles C sources of this package with the machine's C compiler, once a machine, and loads them.

A library lies in `$XDG_CACHE_HOME/fastrbn` (`~/.cache/fastrbn`) under a name made of everything it depends on: the source, the
compiler, its options and the processor. A home directory shared by unlike machines therefore holds one for each. The name ends
with a checksum of the file: one that was cut or changed on the disk would crash every process that loads it, and is built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache, lru_cache
from pathlib import Path

_HEADERS = Path(__file__).parent  # *.h for all sources
# sums may be taken in any order, so that they are vectorised (the simd pragmas); NaN and Inf keep their meaning
_OPTIONS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_LINK = ("-shared", "-fPIC", "-pthread")
_SECONDS = 60  # a compiler that takes longer hangs
_broken: dict[str, str] = {}  # compilers that have failed in this process, and how: they are not asked again


@cache
def load(source: Path, *options: str) -> tuple[ctypes.CDLL | None, str]:
    """The library of a C `source` compiled with further `options` (such as -DREAL=float), or None; and why not, in
    words. A compiler that fails is warned of once; whoever asks has another way to do the work."""
    if os.environ.get("FASTRBN_NATIVE") == "0":
        return None, "FASTRBN_NATIVE=0 turns the C kernels off"
    if os.name != "posix":
        return None, f"the C kernels need POSIX threads, which {platform.system()} lacks"
    compiler = _compiler()
    if compiler is None:
        return None, "there is no C compiler (cc, gcc or clang) to build the C kernels with"
    if compiler in _broken:
        return None, _broken[compiler]
    try:
        path = _built(compiler, source, options)
    except (OSError, subprocess.SubprocessError) as error:
        why = f"the C kernels could not be built with {compiler}: {_said(error)}"
    else:
        try:
            return ctypes.CDLL(str(path)), ""
        except OSError as error:
            said = str(error)
            if os.statvfs(path.parent).f_flag & getattr(os, "ST_NOEXEC", 0):
                said = f"{path.parent} is on a file system mounted noexec; set XDG_CACHE_HOME to a folder that is not"
            why = f"the C kernels were built with {compiler}, and cannot be loaded: {said}"
    _broken[compiler] = why
    warnings.warn(f"{why}. Slower operators do the work; FASTRBN_NATIVE=0 says so for good", RuntimeWarning, 2)
    return None, why


def _said(error) -> str:
    """What the compiler printed, or else what the error says."""
    printed = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it timed out after {error.timeout} s. {printed}".strip()
    return printed or str(error)


def _compiler() -> str | None:
    names = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    return next(filter(None, map(shutil.which, names)), None)


def _built(compiler: str, source: Path, options: tuple[str, ...]) -> Path:
    """The library, compiled unless it is there."""
    command = [compiler, *_OPTIONS, *options, *_LINK]
    tool, texts = os.stat(compiler), [p.read_bytes() for p in (source, *sorted(_HEADERS.glob("*.h")))]
    parts = (*texts, command, os.path.realpath(compiler), tool.st_size, tool.st_mtime_ns, _processor())
    stem = f"{source.stem}_{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}"
    folder = _cache()
    for path in sorted(folder.glob(f"{stem}-*.so")):
        with contextlib.suppress(OSError):
            if path.name == f"{stem}-{_checksum(path)}.so":
                return path
            path.unlink()
    # another process may be at it: each writes a file of its own, and equal ones get the same name
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own, f"{stem}.so")
        subprocess.run(
            [*command, f"-I{_HEADERS}", str(source), "-o", str(made), "-lm"],
            check=True, capture_output=True, timeout=_SECONDS,
        )  # fmt: skip
        path = folder / f"{stem}-{_checksum(made, sync=True)}.so"
        os.replace(made, path)
    return path


def _checksum(path: Path, sync: bool = False) -> str:
    """Of the file's content; with `sync` that content is on the disk before its name can be."""
    with open(path, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        return hashlib.sha256(f.read()).hexdigest()[:32]


def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return f"{platform.machine()} {sorted(found)}"


def _cache() -> Path:
    """A folder that is the user's own: what lies there is run."""
    try:  # RuntimeError: there is no HOME, and the user has no entry in the password file
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastrbn")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    except (OSError, RuntimeError):
        pass
    return _of_this_process()


@lru_cache(maxsize=1)
def _of_this_process() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="fastrbn-", ignore_cleanup_errors=True)
    _kept.append(folder)  # removed at the end of the process
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory] = []
