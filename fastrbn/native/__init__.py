"""Compile the C sources of this package with the machine's C compiler, once per machine, and load them.

Libraries are cached in `$XDG_CACHE_HOME/fastrbn` (default `~/.cache/fastrbn`). A file name hashes everything the
library depends on: source, compiler, options and processor, so a home directory shared by different machines holds one
for each.
The name ends with a checksum of the file, since loading a truncated or damaged library would crash the process; such a
file is built again.
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

_HEADERS = Path(__file__).parent  # *.h used by all sources
# the simd pragmas allow sums in any order, so that they are vectorised; NaN and Inf keep their meaning
_OPTIONS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_LINK = ("-shared", "-fPIC", "-pthread")
_SECONDS = 60  # timeout of the compiler
_broken: dict[str, str] = {}  # why compilers failed in this process; they are not tried again


@cache
def load(source: Path, *options: str) -> tuple[ctypes.CDLL | None, str]:
    """Compile a C `source` with further `options` (such as -DREAL=float) and load it.

    Returns the library and "", or None and the reason in words. Warns once about a compiler that fails; callers must
    have another way to do the work.
    """
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
            why = f"the C kernels were built with {compiler} but cannot be loaded: {said}"
    _broken[compiler] = why
    warnings.warn(f"{why}. Slower operators are used instead; set FASTRBN_NATIVE=0 to silence this", RuntimeWarning, 2)
    return None, why


def _said(error: Exception) -> str:
    """The compiler's output, or else the text of the error."""
    printed = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it timed out after {error.timeout} s. {printed}".strip()
    return printed or str(error)


def _compiler() -> str | None:
    """Path of the C compiler: `$CC`, cc, gcc or clang."""
    names = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    return next(filter(None, map(shutil.which, names)), None)


def _built(compiler: str, source: Path, options: tuple[str, ...]) -> Path:
    """Path of the library, which is compiled unless the cache has it."""
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
    # another process may compile it at the same time: each writes its own file, and equal files get the same name
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
    """Checksum of a file; `sync` flushes its content to the disk first, before the file is renamed."""
    with open(path, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        return hashlib.sha256(f.read()).hexdigest()[:32]


def _processor() -> str:
    """A description of the processor, on which the effect of -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return f"{platform.machine()} {sorted(found)}"


def _cache() -> Path:
    """A folder that only the user can write to, since code in it is executed."""
    try:  # RuntimeError: HOME is not set and the user has no entry in the password file
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
    """A temporary folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="fastrbn-", ignore_cleanup_errors=True)
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory] = []
