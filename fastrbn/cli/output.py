"""What the command line prints must never end a training: not for a character, nor for a reader that has gone."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys

_ASCII = {"→": "->", "×": "x", "·": "*", "±": "+/-", "−": "-", "…": "...", "█": "#"}


def _spelt_out(error):
    """An error handler for encodings: what cannot be encoded is written in ASCII."""
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error("fastrbn.spelt_out", _spelt_out)


class _Lasting:
    """A stream that drops what it cannot write, and says so on stderr unless the reader of a pipe has left."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        try:
            return self._stream.write(text)
        except OSError as e:
            self._drop(e)
            return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except OSError as e:
            self._drop(e)

    def _drop(self, error):
        with contextlib.suppress(OSError, ValueError):  # ValueError: a stream without a file descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if not isinstance(error, BrokenPipeError) and sys.stderr is not self:
            print(f"fastrbn: nothing more can be printed ({error}); the command continues", file=sys.stderr)

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting():
    """Within it, printing to stdout and stderr does not fail: characters that their encoding lacks are spelt out in
    ASCII; once a pipe is closed or a disk is full, the output is dropped."""
    streams = {name: stream for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
    before = {name: getattr(stream, "errors", None) for name, stream in streams.items()}
    try:
        for name, stream in streams.items():
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="fastrbn.spelt_out")
            setattr(sys, name, _Lasting(stream))
        yield
    finally:
        for name, stream in streams.items():
            getattr(sys, name).flush()  # a closed pipe shows here, and not when the interpreter exits
            setattr(sys, name, stream)
            if hasattr(stream, "reconfigure"):
                with contextlib.suppress(OSError, ValueError):
                    stream.reconfigure(errors=before[name])
