"""`torchrun -m fastrbn train …`: one run in many processes, of which rank 0 speaks and writes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

from .options import BAD_ARGUMENTS, DONE, ERROR, HALTED, INTERRUPTED, CliError

_GRAVER = (ERROR, HALTED, INTERRUPTED, DONE)  # the first of these that a rank ends with is the run's status
_WAIT = timedelta(minutes=10)  # for rank 0's downloads and files


def is_first() -> bool:
    """Whether this process speaks for the run. Needs no torch."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


class Ranks:
    """The run's processes; a run of one is rank 0 of 1 and waits for nobody."""

    def __init__(self):
        from fastrbn.learn import ranks as _ranks

        try:
            self.joined = _ranks.join(None, _WAIT)
        except RuntimeError as e:
            raise CliError(str(e)) from e
        self.rank, self.world = _ranks.rank(), _ranks.world()
        self._leave = _ranks.leave
        self._channel = _ranks.Channel(_WAIT) if self.world > 1 else None

    @contextlib.contextmanager
    def quiet(self):
        """Nothing is printed but by rank 0 (errors are)."""
        if self.rank == 0:
            yield
            return
        with open(os.devnull, "w", errors="replace") as nowhere, contextlib.redirect_stdout(nowhere):
            yield

    def first(self, make):
        """What `make()` gives on rank 0: text, a number or None. Its CliError is everybody's."""
        if self.world == 1:
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

    def first_then_others(self, make):
        """`make()` of each rank, rank 0's before the others begin: it may download."""
        made = []
        self.first(lambda: made.append(make()))
        return made[0] if made else make()

    def worst(self, status: int, sentence: str) -> tuple[int, str]:
        """The run's status, from those of all ranks, and the sentence of who has it."""
        if self.world == 1:
            return status, sentence
        try:
            every = [json.loads(text) for text in self._channel.texts(json.dumps([status, sentence]))]
        except RuntimeError:  # one of them is gone: each for itself
            return status, sentence
        return next((s, text) for grave in _GRAVER for s, text in every if s == grave)

    def leave(self) -> None:
        """Wait until rank 0 has written everything (torchrun ends all when one ends in error), and part."""
        if self.world > 1:
            with contextlib.suppress(RuntimeError):
                self._channel.texts("")
        if self.joined:
            self._leave()


def launch() -> dict | None:
    """What tells this launch of torchrun from others, and is the same after it has restarted its processes."""
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
            continue  # no run, or not this one
    return None


def check_device(name: str, ranks: Ranks) -> None:
    """CliError for one device that all processes would share."""
    if ranks.world > 1 and ":" in name:
        raise CliError(
            f"--device must leave each of the {ranks.world} processes its own; got '{name}': take "
            f"{name.partition(':')[0]}",
            BAD_ARGUMENTS,
        )
