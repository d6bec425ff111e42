"""The processes of a run: the rank of this one, and small messages between them."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class _Made:
    """Counts and the store of this process. The store serves one process group after another."""

    store: Any = None
    groups = 0
    fits = 0


def rank() -> int:
    """This process's number, 0 if it is the only one."""
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> int:
    """The number of processes in torchrun's environment, 1 without it. RuntimeError if variables are missing."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or int(size) < 1:
        raise RuntimeError(f"WORLD_SIZE in the environment is the number of processes; got {size!r}: unset it")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(size) > 1 and missing:
        raise RuntimeError(
            f"the environment has WORLD_SIZE={size} but not {', '.join(missing)}: start the processes with torchrun, "
            f"which sets them all, or unset WORLD_SIZE"
        )
    return int(size)


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join(backend: str | None, timeout: timedelta) -> bool:
    """Make the default process group from torchrun's environment, and choose this process's CUDA device.

    Returns False if a group exists already, or none is needed. `backend`: None for gloo on CPUs and NCCL on CUDA.
    """
    dist = torch.distributed
    if launched() == 1 or dist.is_available() and dist.is_initialized():
        return False
    if not dist.is_available():
        raise RuntimeError(
            f"training in {launched()} processes needs torch.distributed, and this PyTorch was built without it: "
            f"install another, or start one process"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    if _Made.store is None:
        _Made.store = next(dist.rendezvous("env://", timeout=timeout))[0]
    _Made.groups += 1
    # a prefix of its own: the store may hold entries of an earlier group, or of processes that torchrun has replaced
    prefix = f"fastrbn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_Made.groups}"
    dist.init_process_group(
        _usual_backend() if backend is None else backend,
        store=dist.PrefixStore(prefix, _Made.store),
        rank=int(os.environ["RANK"]),
        world_size=launched(),
        timeout=timeout,
    )
    return True


def leave() -> None:
    """Destroy the group that `join` made."""
    torch.distributed.destroy_process_group()


def fits() -> int:
    """The number of fits with several processes that this process has taken part in."""
    return _Made.fits


def _usual_backend() -> str:
    dist = torch.distributed
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    # NCCL refuses two processes on one device
    nccl = torch.cuda.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= here
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"


def in_rank_0(call: Callable[[], object], what: str) -> None:
    """`call()` in rank 0 alone; the other ranks wait for its end. Rank 0 does not wait, so it may come here alone.

    RuntimeError in the others if the call fails, or rank 0 does not come within the store's timeout.
    """
    store = _default_store() if world() > 1 else None
    if store is None:
        if rank() == 0:
            call()
        return
    key = f"fastrbn/called/{store.add(f'fastrbn/calls/{rank()}', 1)}"  # all ranks call equally often
    if rank() == 0:
        try:
            call()
        except BaseException as e:
            store.set(key, f"{type(e).__name__}: {e}")
            raise
        store.set(key, "")
        return
    try:
        failure = store.get(key).decode()
    except RuntimeError as e:
        failure = f"it did not come here ({e}): call it in all processes, or in rank 0 alone"
    if failure:
        raise RuntimeError(f"rank 0 has not done {what}: {failure}")


class Channel:
    """Small messages between the ranks of the default group, over gloo and separate from the gradients.

    Every rank must make one, and call `gather`, `texts`, `spread` and `share` in the same order.
    """

    def __init__(self, timeout: timedelta):
        dist = torch.distributed
        if not dist.is_gloo_available():
            raise RuntimeError("the processes of Distributed talk over gloo, which this PyTorch lacks: install another")
        _Made.fits += 1
        self.rank, self.world, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self._store = _default_store()
        if self._store is not None:
            self._store = dist.PrefixStore(f"fastrbn/fit/{_Made.fits}", self._store)
        self._here, pid = _machine(), os.getpid()
        self._processes = [json.loads(text) for text in self.texts(json.dumps([self._here, pid]))]

    def close(self) -> None:
        """Destroy this channel's group; the default group stays."""
        torch.distributed.destroy_process_group(self.group)

    def gather(self, numbers: Any, wait: timedelta | None = None) -> list[Any]:
        """What each rank gives: a list of numbers, of the same length on all ranks, or a tensor on the CPU or None."""
        if not isinstance(numbers, (list, tuple)):
            found: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(found, numbers, group=self.group)
            return found
        # summing a table in which each rank fills its row takes half the time of an all_gather
        rows = [[0.0] * len(numbers) for _ in range(self.world)]
        rows[self.rank] = list(numbers)
        table = torch.tensor(rows, dtype=torch.float64)
        if wait is None:
            torch.distributed.all_reduce(table, group=self.group)
        else:
            work: Any = torch.distributed.all_reduce(table, group=self.group, async_op=True)
            work.wait(wait)
        return table.tolist()

    def texts(self, text: str) -> list[str]:
        """The text of each rank."""
        found = [""] * self.world
        torch.distributed.all_gather_object(found, text, group=self.group)
        return found

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Overwrite `tensors` with those of rank `source`, bit for bit."""
        tensors = [t for t in tensors if t.numel()]
        if not tensors:
            return
        flat = torch.cat([t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors])
        torch.distributed.broadcast(flat, source, group=self.group)
        for t, data in zip(tensors, flat.split([t.nbytes for t in tensors])):
            # cloned, because a view of the common buffer may not be aligned for its dtype
            t.copy_(data.clone().view(t.dtype).reshape(t.shape))

    def share(self, value: Any, source: int) -> Any:
        """The `value` of rank `source`, tensors in it on the CPU."""
        file = io.BytesIO()
        torch.save(value if self.rank == source else None, file)
        found: list[Any] = [file.getvalue()]
        torch.distributed.broadcast_object_list(found, source, group=self.group)
        return torch.load(io.BytesIO(found[0]), map_location="cpu", weights_only=False)  # it comes from this run

    # What a rank posts when it leaves can be read when it is gone

    def post(self, reason: str, caused: bool) -> None:
        """Post why this rank leaves; `caused`: because of another."""
        if self._store is not None:
            try:
                number = self._store.add("left", 1)
                self._store.set(f"left/{number}", f"{self.rank} {'~' if caused else '='}{reason}")
                if not caused:  # it does not need to read what others posted
                    self._store.set(f"read/{self.rank}", "")
            except RuntimeError:
                self._store = None  # the process that held it is gone

    def is_alive(self, rank: int) -> bool | None:
        """True if the process of `rank` exists; None if unknown, because it is on another machine."""
        machine, pid = self._processes[rank]
        return _is_running(pid) if machine == self._here and os.name == "posix" else None

    def posts(self, wait: float) -> dict[int, tuple[str, bool]]:
        """Reasons of the ranks that have left, in that order, and whether another rank caused them.

        Waits up to `wait` seconds for a reason that no other rank caused, for all reasons, or for a process that has
        ended without one.
        """
        found: dict[int, tuple[str, bool]] = {}
        until = time.monotonic() + wait
        while self._store is not None:
            try:
                texts = [self._store.get(f"left/{i}") for i in range(1, self._store.add("left", 0) + 1)]
            except RuntimeError:
                break
            for text in texts:
                who, _, reason = text.decode().partition(" ")
                found.setdefault(int(who), (reason[1:], reason.startswith("~")))
            known = len(found) == self.world or not all(caused for _, caused in found.values())
            known = known or any(self.is_alive(r) is False for r in range(self.world) if r not in found)
            if known or time.monotonic() >= until:
                break
            time.sleep(0.05)
        return found

    def leave_posts(self, wait: float) -> None:
        """Say that this rank has read the posts. Rank 0, whose process may hold the store, waits up to `wait` seconds
        until all living ranks have."""
        if self._store is None:
            return
        try:
            self._store.set(f"read/{self.rank}", "")
            until = time.monotonic() + wait
            others = range(1, self.world) if self.rank == 0 else ()
            while time.monotonic() < until and any(
                self.is_alive(r) is not False and not self._store.check([f"read/{r}"]) for r in others
            ):
                time.sleep(0.05)
        except RuntimeError:
            self._store = None  # the process that held it is gone


def _machine() -> str:
    """Identifies a set of processes that share process numbers."""
    try:
        space = os.readlink("/proc/self/ns/pid")  # containers of one host have their own
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # an ended process stays in the table until its parent asks for its exit status
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
            not in "ZX"
        )
    except OSError:
        return True


def _default_store() -> Any:
    get = getattr(torch.distributed.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()
