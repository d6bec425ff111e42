"""The command line: `fastrbn train | predict | eval | export | compare | callbacks`; `python -m fastrbn` is the same.

Exit status: 0 done, 1 error, 2 bad arguments, 3 halted on NaN or Inf, 130 interrupted; each with one sentence that says
what happened and, once training has begun, where the results are.
"""

from __future__ import annotations

import atexit
import signal
import sys
from collections.abc import Sequence

from .options import DONE, INTERRUPTED, CliError, parser
from .output import lasting
from .ranks import is_first

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's arguments) and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with lasting():
            return _run(argv)
    except KeyboardInterrupt:  # while the last lines were flushed, which say how it ended
        return INTERRUPTED
    finally:
        atexit.unregister(_leave_in_peace)
        atexit.register(_leave_in_peace)  # as the last, and so run before torch's


def _leave_in_peace() -> None:
    """Ignore Ctrl-C while the interpreter exits: all is written, and torch would show a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(argv: list[str]) -> int:
    try:
        args = parser().parse_args(argv)
    except SystemExit as e:  # argparse has printed help, or what is wrong
        return e.code if isinstance(e.code, int) else DONE
    try:
        if args.command == "train":  # imported here: --help and wrong arguments need no torch
            from .train import train

            given = {name: value for name, value in vars(args).items() if name != "command"}
            return train(given, argv)
        if args.command == "compare":
            from .compare import compare

            return compare(args)
        if args.command != "callbacks":
            from . import predict

            return getattr(predict, args.command)(args)
        from .plugins import listing

        print("\n".join(listing()))
        return DONE
    except CliError as e:
        if is_first():
            print(f"fastrbn {args.command}: error: {e}", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        print(f"fastrbn {args.command}: interrupted (Ctrl-C)", file=sys.stderr)
        return INTERRUPTED
