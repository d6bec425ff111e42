"""One fit in several processes."""

from __future__ import annotations

import copy
import json
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrbn.learn import ranks
from fastrbn.learn.callback import Callback

from .agreement import Lockstep
from .shards import Part, seed_all, shard, share_order, with_loader

if TYPE_CHECKING:
    from .replica import Replica


class Distributed(Callback):
    """Train in all processes of `torchrun --nproc-per-node N script.py` as one; without torchrun, do nothing.

    Each process runs the same script. N processes with batch size `bs` take the steps of one process with `N * bs`, in
    the same order, if the loss is a mean over samples. Rank 0 prints and writes. A cancel, Ctrl-C or an error on one
    rank ends the others too. During training `run.model` is a DistributedDataParallel with the plain model's names, and
    `run.learn.model` the plain model. `.rank` and `.world` stay after the fit. The guide to several processes in docs/
    has the details.

    Parameters
    ----------
    backend : str, optional
        Of `torch.distributed`; by default gloo on CPUs and NCCL on CUDA (gloo if processes share a device).
    timeout : float or timedelta, default 600
        Seconds that a rank waits for the others; checkpoints and downloads take their time.
    find_unused_parameters : bool, default False
        DistributedDataParallel's, for models that do not use all their parameters in every batch.
    sync_norm : bool, default True
        Merge the statistics of running batch norms over the processes, and warn of nn.BatchNorm, which cannot. If
        False, each process normalises by its own samples.
    shard : bool, default True
        Give each process its part of the loaders' batches. If False, the loaders must do so themselves.

    Raises
    ------
    RuntimeError
        In `fit`, if torchrun's environment is incomplete or the ranks' runs differ.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[Distributed, Recorder])
    >>> run.fit(1, learn)
    >>> run.distributed.world  # started without torchrun
    1
    """

    def __init__(
        self,
        backend: str | None = None,
        timeout: float | timedelta = 600,
        find_unused_parameters: bool = False,
        sync_norm: bool = True,
        shard: bool = True,
    ):
        if backend is not None and not isinstance(backend, str):
            raise TypeError(f"backend is a name such as 'gloo' or 'nccl', or None; got {backend!r}")
        if not isinstance(timeout, timedelta):
            if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
                raise TypeError(f"timeout is a number of seconds; got {timeout!r}")
            timeout = timedelta(seconds=timeout)
        if timeout <= timedelta(0):
            raise ValueError(f"timeout is a number of seconds above 0; got {timeout.total_seconds():g}")
        switches = {"find_unused_parameters": find_unused_parameters, "sync_norm": sync_norm, "shard": shard}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} is True or False; got {value!r}")
        self.backend, self.timeout, self.find_unused_parameters = backend, timeout, find_unused_parameters
        self.sync_norm, self.shard = sync_norm, shard
        self.rank, self.world = 0, 1
        self._clear()

    def _clear(self) -> None:
        self._lockstep: Lockstep | None = None  # stays None in one process
        self._replica: Replica | None = None
        self._seed: int | None = None
        self._trained: tuple[nn.Parameter, ...] = ()  # the parameters that the replica sums gradients of
        self._norms: list[Any] = []  # layers that merge for this fit
        self._sharded: list[tuple[Any, Any]] = []  # loaders, and what stands in their place
        self._joined = False

    # Before the first epoch

    def begin_fit(self) -> None:
        self._clear()
        run = self.run
        self._joined = ranks.join(self.backend, self.timeout)
        self.rank, self.world = ranks.rank(), ranks.world()
        if self.world == 1:
            return
        self._lockstep = Lockstep(run, ranks.Channel(self.timeout))
        self._check_same(self._lockstep)
        run.claim(self, weigh=self._weigh)
        channel, model = self._lockstep.channel, run.learn.model
        channel.spread([*model.parameters(), *model.buffers()])
        if self.shard:
            self._give_parts(channel)
        self._seed_ranks(channel)
        if self.sync_norm:
            self._merge_norms(model)
        if self.rank != 0:
            run.logger = _silent

    def _check_same(self, lockstep: Lockstep) -> None:
        run = self.run
        here = {
            "epochs": run.epochs,
            "max_steps": run.max_steps,
            "parameters": sum(p.numel() for p in run.learn.model.parameters()),
            "buffers": sum(b.numel() for b in run.learn.model.buffers()),
            "callbacks": [type(cb).__name__ for cb in run.cbs],
            "resumed from": run.resumed_from and run.resumed_from.name,
        }
        every = [json.loads(text) for text in lockstep.channel.texts(json.dumps(here))]
        for name in here:
            if any(other[name] != every[0][name] for other in every):
                lockstep.agreement.left = True
                found = "; ".join(f"rank {r}: {other[name]}" for r, other in enumerate(every))
                raise RuntimeError(
                    f"all ranks run the same fit, and they differ in {name} ({found}): make the same model, data and "
                    f"callbacks in each process, and give all of them access to the files that are read"
                )

    def _give_parts(self, channel: ranks.Channel) -> None:
        run, made = self.run, {}
        for name in ("train_dl", "valid_dl"):
            loader = getattr(run.data, name)
            if loader is not None and id(loader) not in made:
                made[id(loader)] = shard(loader, self.rank, self.world, train=name == "train_dl")
                self._sharded.append((loader, made[id(loader)]))
                share_order(loader, channel)
        if any(part is not loader for loader, part in self._sharded):
            data = copy.copy(run.data)
            for name in ("train_dl", "valid_dl"):
                if (loader := getattr(data, name)) is not None:
                    data = with_loader(data, name, made[id(loader)])
            run.data = data
        run._passes.plan()  # callbacks read the length of the fit in begin_fit

    def _seed_ranks(self, channel: ranks.Channel) -> None:
        """Rank 0 keeps its random numbers, the others get different ones."""
        run = self.run
        self._seed = int(channel.texts(str(torch.initial_seed()))[0])
        if self.rank != 0:
            resumed = run.resumed_from and run.resumed_from.name
            seed_all(self._seed, self.rank, ranks.fits(), resumed)

    def _merge_norms(self, model: nn.Module) -> None:
        group, plain = torch.distributed.group.WORLD, []
        for name, m in model.named_modules():
            if isinstance(m, nn.SyncBatchNorm):
                continue  # merges over all ranks already
            if hasattr(m, "process_group"):
                if m.process_group is None:
                    self._norms.append(m)
                    m.process_group = group
            elif isinstance(m, nn.modules.batchnorm._BatchNorm):
                plain.append(name)
        if plain and self.rank == 0:
            more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
            warnings.warn(
                f"nn.BatchNorm normalises by each process's own samples, and rank 0's running statistics are kept "
                f"('{plain[0]}'{more}): convert_batchnorm(model), or "
                f"nn.SyncBatchNorm.convert_sync_batchnorm(model) on CUDA, merges them over the processes; "
                f"Distributed(sync_norm=False) turns this warning off",
                stacklevel=2,
            )

    # Within an epoch

    def begin_epoch(self) -> None:
        if self._lockstep is None:
            return
        run = self.run
        lengths = self._lockstep.begin_epoch(-1 if run.iters is None else run.iters)
        run.iters = None if min(lengths) < 0 else min(lengths)  # schedules and the last batch depend on it
        self._wrap(self._lockstep)
        for _, part in self._sharded:
            if isinstance(batches := getattr(part, "batch_sampler", None), Part):
                batches.seed = self._seed or 0
        self._lockstep.handle_interrupts()

    def _wrap(self, lockstep: Lockstep) -> None:
        """Have `run.model` sum its gradients; wrap again if the trained parameters have changed."""
        run = self.run
        model = run.model if self._replica is None or run.model is not self._replica else self._replica.module
        trained = tuple(p for p in model.parameters() if p.requires_grad)
        if self._replica is not None and (
            model is not self._replica.module
            or len(trained) != len(self._trained)
            or any(p is not q for p, q in zip(trained, self._trained))
        ):
            self._replica.close()
            self._replica = None
        lockstep.waits = any(
            isinstance(m, nn.SyncBatchNorm) or getattr(m, "process_group", None) is not None for m in model.modules()
        )
        if self._replica is None and trained:
            from .replica import Replica

            self._replica, self._trained = Replica(model, self.find_unused_parameters), trained
        if self._replica is not None:
            self._replica.training = model.training
            run.model = self._replica

    def begin_batch(self) -> None:
        if self._lockstep is not None:
            self._lockstep.begin_batch()
        if self._replica is not None:
            self._replica.begin_batch(accumulates=self.run.accumulating)

    def after_loss(self) -> None:
        if self._lockstep is not None:
            self._lockstep.after_loss()

    def _weigh(self, loss: torch.Tensor) -> torch.Tensor:
        assert self._lockstep is not None  # it claims the loss only then
        if self._replica is not None:
            self._replica.begin_backward()
            self.run.apart = self._replica.apart
        return loss * self._lockstep.share

    def after_backward(self) -> None:
        if self._lockstep is not None and self._replica is not None and self._replica.apart:
            self._lockstep.meet_for_step()
            self._replica.exchange(self._lockstep.channel.gather)
            self.run.apart = False

    def after_step(self) -> None:
        if self._lockstep is not None:
            self._lockstep.after_step()

    def after_batch(self) -> None:
        if self._lockstep is not None:
            self._lockstep.after_batch()

    def begin_validate(self) -> None:
        if self._lockstep is None:
            return
        self._lockstep.begin_validate()
        if self._replica is not None and self.run.model is self._replica:
            self.run.model = self._replica.module  # ranks may validate different numbers of batches
        self._lockstep.channel.spread(self.run.learn.model.buffers())

    def after_epoch(self) -> None:
        if self._lockstep is None:
            return
        self._lockstep.after_epoch()
        for cb in self.run.cbs:
            if callable(getattr(type(cb), "merge", None)):
                cb.merge(self._lockstep.channel.gather)

    def after_cancel_batch(self) -> None:
        if self._lockstep is not None:
            self._lockstep.after_cancel_batch()

    def after_cancel_epoch(self) -> None:
        if self._lockstep is not None:
            self._lockstep.after_cancel_epoch()

    def after_cancel_train(self) -> None:
        if self._lockstep is not None:
            self._lockstep.after_cancel_train()

    def after_fit(self) -> None:
        asked = self._lockstep is not None and self._lockstep.asked
        try:
            if self._lockstep is not None:
                self._lockstep.after_fit()
        finally:
            self._undo()
        if asked and self.run.stop_reason is None:
            raise KeyboardInterrupt

    def _undo(self) -> None:
        for m in self._norms:
            m.process_group = None
        for loader, part in self._sharded:
            if part is loader and callable(getattr(loader, "shard", None)):
                loader.shard()
        if self._replica is not None:
            self._replica.close()
        lockstep, joined = self._lockstep, self._joined
        if lockstep is not None:
            lockstep.release_interrupts()
        self._clear()
        if joined:
            ranks.leave()
        elif lockstep is not None:
            lockstep.channel.close()

    def state_dict(self) -> dict[str, Any]:
        """The seed of loaders that have no generator."""
        return {} if self._seed is None else {"seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._seed is not None:
            self._seed = state.get("seed", self._seed)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("backend", "timeout", "find_unused_parameters", "sync_norm", "shard", "rank", "world")
        return {k: vars(self)[k] for k in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._clear()
        super().__setstate__(state)

    def __repr__(self) -> str:
        backend = "" if self.backend is None else f"backend={self.backend!r}, "
        return f"Distributed({backend}timeout={self.timeout.total_seconds():g})"


def _silent(line: object) -> None:
    """The logger of ranks other than 0."""
