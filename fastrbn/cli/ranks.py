"""`torchrun -m fastrbn train …`: one run in many processes, of which rank 0 prints and writes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from .options import BAD_ARGUMENTS, DONE, ERROR, HALTED, INTERRUPTED, CliError

_GRAVER = (ERROR, HALTED, INTERRUPTED, DONE)  # worst first: the run's status is the worst of its ranks'
_WAIT = timedelta(minutes=10)  # for rank 0's downloads and files
T = TypeVar("T")


def is_first() -> bool:
    """Whether this process prints for the run. Needs no torch."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


class Ranks:
    """The run's processes. A run without torchrun is rank 0 of 1 and never waits."""

    def __init__(self) -> None:
        from fastrbn.learn import ranks as _ranks

        try:
            self.joined = _ranks.join(None, _WAIT)
        except RuntimeError as e:
            raise CliError(str(e)) from e
        self.rank, self.world = _ranks.rank(), _ranks.world()
        self._leave = _ranks.leave
        self._channel = _ranks.Channel(_WAIT) if self.world > 1 else None

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within this context only rank 0 prints to stdout; every rank prints errors."""
        if self.rank == 0:
            yield
            return
        with open(os.devnull, "w", errors="replace") as nowhere, contextlib.redirect_stdout(nowhere):
            yield

    def first(self, make: Callable[[], Any]) -> Any:
        """Call `make()` on rank 0 and return its text, number or None on every rank, or raise its CliError there."""
        if self._channel is None:
            return make()
        told, error = "", None
        if self.rank == 0:
            try:
                told = json.dumps({"value": make()})
            except CliError as e:
                told, error = json.dumps({"error": str(e), "status": e.status}), e
        told = json.loads(self._channel.texts(told)[0])
        if "error" in told:
            raise error or CliError(told["error"], told["status"])
        return told["value"]

    def first_then_others(self, make: Callable[[], T]) -> T:
        """Call `make()` on rank 0, which may download, and then on the other ranks."""
        made: list[T] = []
        self.first(lambda: made.append(make()))
        return made[0] if made else make()

    def worst(self, status: int, sentence: str) -> tuple[int, str]:
        """The worst status of all ranks, and the sentence of the first rank that has it."""
        if self._channel is None:
            return status, sentence
        try:
            every = [json.loads(text) for text in self._channel.texts(json.dumps([status, sentence]))]
        except RuntimeError:  # one of them is gone
            return status, sentence
        return next((s, text) for grave in _GRAVER for s, text in every if s == grave)

    def leave(self) -> None:
        """Leave after rank 0 has written everything, since torchrun ends all ranks when one ends in error."""
        if self._channel is not None:
            with contextlib.suppress(RuntimeError):
                self._channel.texts("")
        if self.joined:
            self._leave()


def launch() -> dict[str, Any] | None:
    """Identify this launch of torchrun; it stays the same when torchrun restarts its processes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return {"run_id": os.environ["TORCHELASTIC_RUN_ID"], "agent": os.getppid()}


def restarted(out: Path | None) -> str | None:
    """The folder of the run that torchrun (--max-restarts) has started again; None the first time."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    folders = [out] if out is not None else sorted(Path("runs").glob("*"), reverse=True)
    for folder in folders:
        try:
            if json.loads((folder / "config.json").read_text(encoding="utf-8"))["launch"] == launch():
                print(f"torchrun has started the processes again: going on with {folder}", file=sys.stderr)
                return str(folder)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def check_device(name: str, ranks: Ranks) -> None:
    """CliError for a numbered device, which all processes would share."""
    if ranks.world > 1 and ":" in name:
        raise CliError(
            f"--device must leave each of the {ranks.world} processes its own; got '{name}': take "
            f"{name.partition(':')[0]}",
            BAD_ARGUMENTS,
        )
