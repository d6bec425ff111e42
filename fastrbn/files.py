"""Files that are written whole or not at all, and folders that one process writes to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def write_whole(path, content) -> Path:
    """Write `content` (str or bytes) to `path` under a temporary name beside it, then rename: whoever reads `path`
    sees the old file or the new one, never half of one. Folders that are missing are made."""
    with whole_file(path) as f:
        f.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write into, which is `path` once the block has ended well: `write_whole` for what is too large to
    hold in memory a second time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # else a power cut may leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno is not None and e.filename is None:
            e.filename = str(path)  # a full disk does not say which file it was
        raise


@contextlib.contextmanager
def locked(folder):
    """Keep `folder` for this process until the block ends, or the process does, even by kill -9. BlockingIOError if
    another process has it. Where the file system has no locks (some network ones), nothing is kept."""
    fd = None
    try:
        if fcntl is not None:
            fd = os.open(folder, os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(fd)
        raise BlockingIOError(
            f"another process is at work in {folder}: wait for its end, or take another folder with --out"
        ) from e
    except OSError:
        pass
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)
