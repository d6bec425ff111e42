"""The processes of a run: which one this is, and what they tell one another besides gradients."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch

_MADE = {"store": None, "groups": 0, "fits": 0}  # of this process: a store serves one group after another


def rank() -> int:
    """This process's number among those of the run, 0 where there is one alone."""
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> int:
    """The number of processes that torchrun's environment tells of, 1 without it. RuntimeError when it is half there."""
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


def join(backend, timeout: timedelta) -> bool:
    """Make the default process group from torchrun's environment, and choose this process's CUDA device. False where
    there is a group already, or no need of one. `backend`: None for gloo on CPUs and NCCL on CUDA."""
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
    if _MADE["store"] is None:
        _MADE["store"] = next(dist.rendezvous("env://", timeout=timeout))[0]
    _MADE["groups"] += 1
    # what an earlier group left in the store, also one of processes that torchrun has replaced, is not this one's
    prefix = f"fastrbn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_MADE['groups']}"
    dist.init_process_group(
        _usual_backend() if backend is None else backend,
        store=dist.PrefixStore(prefix, _MADE["store"]),
        rank=int(os.environ["RANK"]),
        world_size=launched(),
        timeout=timeout,
    )
    return True


def leave() -> None:
    """Take down what `join` made."""
    torch.distributed.destroy_process_group()


def fits() -> int:
    """The number of fits in many processes that this one has taken part in."""
    return _MADE["fits"]


def _usual_backend() -> str:
    dist = torch.distributed
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    # NCCL refuses two processes on one device
    nccl = torch.cuda.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= here
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"


class Channel:
    """Small messages between the ranks of the default group, on CPUs and apart from the gradients.

    Every rank must make one, and take part in each `gather`, `texts` and `spread`, in the same order.
    """

    def __init__(self, timeout: timedelta):
        dist = torch.distributed
        if not dist.is_gloo_available():
            raise RuntimeError("the processes of Distributed talk over gloo, which this PyTorch lacks: install another")
        _MADE["fits"] += 1
        self.rank, self.world, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self._store = _default_store()
        if self._store is not None:
            self._store = dist.PrefixStore(f"fastrbn/fit/{_MADE['fits']}", self._store)
        self._here, pid = _machine(), os.getpid()
        self._processes = [json.loads(text) for text in self.texts(json.dumps([self._here, pid]))]

    def close(self) -> None:
        """Take it down, where the default group stays."""
        torch.distributed.destroy_process_group(self.group)

    def gather(self, numbers, wait: timedelta | None = None) -> list[list[float]]:
        """The numbers of each rank, which all have equally many."""
        # the sum of rows that are 0 but for one's own takes half the time of an all_gather
        rows = [[0.0] * len(numbers) for _ in range(self.world)]
        rows[self.rank] = numbers
        table = torch.tensor(rows, dtype=torch.float64)
        if wait is None:
            torch.distributed.all_reduce(table, group=self.group)
        else:
            torch.distributed.all_reduce(table, group=self.group, async_op=True).wait(wait)
        return table.tolist()

    def texts(self, text: str) -> list[str]:
        """The text of each rank."""
        found = [""] * self.world
        torch.distributed.all_gather_object(found, text, group=self.group)
        return found

    @torch.no_grad()
    def spread(self, tensors, source=0) -> None:
        """Overwrite `tensors` with those of rank `source`, bit for bit."""
        tensors = [t for t in tensors if t.numel()]
        if not tensors:
            return
        flat = torch.cat([t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors])
        torch.distributed.broadcast(flat, source, group=self.group)
        for t, data in zip(tensors, flat.split([t.nbytes for t in tensors])):
            # a copy of its own: views of the common buffer begin where their dtype cannot
            t.copy_(data.clone().view(t.dtype).reshape(t.shape))

    def share(self, value, source):
        """The `value` of rank `source`, tensors in it on the CPU."""
        file = io.BytesIO()
        torch.save(value if self.rank == source else None, file)
        found = [file.getvalue()]
        torch.distributed.broadcast_object_list(found, source, group=self.group)
        return torch.load(io.BytesIO(found[0]), map_location="cpu", weights_only=False)  # of a process of our own

    # What a rank that leaves says can be read without it

    def post(self, reason: str, caused: bool) -> None:
        """Say why this rank leaves; `caused`: because of another."""
        if self._store is not None:
            try:
                number = self._store.add("left", 1)
                self._store.set(f"left/{number}", f"{self.rank} {'~' if caused else '='}{reason}")
                if not caused:  # then it need not read what others say
                    self._store.set(f"read/{self.rank}", "")
            except RuntimeError:
                self._store = None  # it was in a process that is gone

    def is_alive(self, rank: int) -> bool | None:
        """Whether the process of `rank` is there, None where that cannot be told: on another machine."""
        machine, pid = self._processes[rank]
        return _is_running(pid) if machine == self._here and os.name == "posix" else None

    def posts(self, wait: float) -> dict[int, tuple[str, bool]]:
        """Reason, and whether it was caused by another rank, of the ranks that have left, the first one first; waits
        for one that was not, for all, or for a process that has ended without a word, `wait` seconds at most."""
        found, until = {}, time.monotonic() + wait
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
        """This rank has read them. Rank 0, in whose process the store may be, waits until all that live have, `wait`
        seconds at most."""
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
            self._store = None  # it was in a process that is gone


def _machine() -> str:
    """Where process numbers mean the same."""
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
    try:  # one that has ended stays until its parent asks for its exit status
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return True


def _default_store():
    get = getattr(torch.distributed.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()
