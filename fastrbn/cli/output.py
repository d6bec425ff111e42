"""Printing must never end a training: neither an unknown character nor a reader that has gone."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_ASCII = {"→": "->", "×": "x", "·": "*", "±": "+/-", "−": "-", "…": "...", "█": "#"}


def _spelt_out(error: Any) -> tuple[str, int]:
    """An error handler for encodings that writes unknown characters in ASCII."""
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error("fastrbn.spelt_out", _spelt_out)


class _Lasting:
    """A stream that drops what it cannot write, and says so on stderr unless the reader of a pipe has left."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as e:
            self._drop(e)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as e:
            self._drop(e)

    def _drop(self, error: OSError) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a stream without a file descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if not isinstance(error, BrokenPipeError) and sys.stderr is not self:
            print(f"fastrbn: nothing more can be printed ({error}); the command continues", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Within this context, printing to stdout and stderr cannot fail.

    Characters that the encoding lacks are spelt out in ASCII. Output to a closed pipe or a full disk is dropped.
    """
    streams = {name: stream for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
    before = {name: getattr(stream, "errors", None) for name, stream in streams.items()}
    try:
        for name, stream in streams.items():
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="fastrbn.spelt_out")
            setattr(sys, name, _Lasting(stream))
        yield
    finally:
        try:
            for name in streams:
                getattr(sys, name).flush()  # a closed pipe shows here, and not when the interpreter exits
        finally:
            for name, stream in streams.items():
                setattr(sys, name, stream)
                if hasattr(stream, "reconfigure"):
                    with contextlib.suppress(OSError, ValueError):
                        stream.reconfigure(errors=before[name])
