"""One fit in many processes."""

from __future__ import annotations

import copy
import json
import signal
import warnings
from datetime import timedelta

import torch
from torch import nn
from torch.utils.data import DistributedSampler

from fastrbn.learn import ranks

from .agreement import EPOCH_BEGINS, EPOCH_OVER, VALIDATION_BEGINS, Agreement
from .lockstep import Lockstep
from .shards import Part, seed_all, shard, share_order, with_loader


class Distributed(Lockstep):
    """Trains in all processes of `torchrun --nproc-per-node N script.py` as one; without torchrun it does nothing.

    - `backend`: of `torch.distributed`; None: gloo on CPUs and NCCL on CUDA (gloo where processes share a device).
    - `timeout`: seconds that a rank waits for the others (or a timedelta); default 600, for checkpoints and downloads
      take their time.
    - `find_unused_parameters`: DistributedDataParallel's, for models of which a batch does not use all parameters.
    - `sync_norm`: merge the statistics of running batch norms over the processes, and warn of nn.BatchNorm, which
      cannot; False: each process normalises by its own samples.
    - `shard`: give each process its part of the loaders' batches; False: the loaders do that themselves.

    The script is the same in each process: model, optimiser, data and callbacks. All begin with rank 0's parameters and
    buffers. A loader's batch size is that of one process: N processes with `bs` take the steps of one with `N * bs`, in
    the same order, for a loss that is a mean over the samples; shares may be uneven, as at the end of an epoch. Where
    N processes are more than the samples left, those are left out. `BatchLoader`s and torch DataLoaders are cut by
    sample, other iterables by batch (each process runs through all of them). Random numbers in training (dropout,
    transforms, workers) are other ones on each rank.

    What a rank prints through `run.logger`, progress, CSV files and checkpoints are rank 0's. Averages are of all
    processes: before a callback's `after_epoch` its method `merge(gather)` is called, if it has one, where
    `gather(numbers)` gives the numbers of each rank. `run.loss` is each rank's own.

    What one rank cancels (batch, epoch, training), all cancel; where one has ended training, all take over its model
    and its optimiser's state (`HaltOnNaN` may have taken back steps there). Ctrl-C ends all after the same batch, a
    second one at once. Where the loaders are not equally long, epochs end with the shortest. An error on one rank ends
    the others with an error that names it: at once as a rule; where it has come up within the forward or backward pass,
    when its process ends, or after `timeout` at the latest. A rank that is killed is named by the others on its machine;
    those elsewhere name all that do not answer. For this the ranks meet before the backward pass, and where
    norms merge before the forward pass too: a small exchange between the hosts each time.

    During training `run.model` is a DistributedDataParallel under the plain model's names, and `run.learn.model` the
    plain model. On CUDA each process takes the device of its local rank as its current one, which `CudaCallback()`
    moves model and data to. A process group that is there is used; one that had to be made is destroyed after the fit.
    `.rank` and `.world` stay; `run.samples` is the number of samples of the batch over all ranks.

    Gradients are exchanged in the backward pass; while `run.accumulating` is true, which a callback may set in
    `begin_batch` as GradientAccumulation does, they add up on each rank by itself. `run.apart` says that they have;
    they are exchanged before the step, and checkpoints wait for it.

    RuntimeError for an incomplete environment, and where the ranks' runs are not the same.
    """

    def __init__(self, backend=None, timeout=600, find_unused_parameters=False, sync_norm=True, shard=True):
        if backend is not None and not isinstance(backend, str):
            raise TypeError(f"backend is a name such as 'gloo' or 'nccl', or None; got {backend!r}")
        if not isinstance(timeout, timedelta):
            if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
                raise TypeError(f"timeout is a number of seconds; got {timeout!r}")
            timeout = timedelta(seconds=timeout)
        if timeout <= timedelta(0):
            raise ValueError(f"timeout is a number of seconds above 0; got {timeout.total_seconds():g}")
        for name, value in (
            ("find_unused_parameters", find_unused_parameters),
            ("sync_norm", sync_norm),
            ("shard", shard),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is True or False; got {value!r}")
        self.backend, self.timeout, self.find_unused_parameters = backend, timeout, find_unused_parameters
        self.sync_norm, self.shard = sync_norm, shard
        self.rank, self.world = 0, 1
        self._clear()

    def _clear(self):
        self._begin()
        self._replica = self._seed = None
        self._joined, self._trained, self._norms, self._sharded = False, (), [], []

    # Before the first epoch

    def begin_fit(self):
        self._clear()
        run = self.run
        self._joined = ranks.join(self.backend, self.timeout)
        self.rank, self.world = ranks.rank(), ranks.world()
        if self.world == 1:
            return
        self._agreement = Agreement(ranks.Channel(self.timeout))
        self._check_same()
        run.claim(self, weigh=self._weigh)
        channel, model = self._agreement.channel, run.learn.model
        channel.spread([*model.parameters(), *model.buffers()])
        self._give_parts()
        self._seed_ranks()
        if self.sync_norm:
            self._merge_norms(model)
        if self.rank != 0:
            run.logger = _silent

    def _check_same(self):
        run = self.run
        here = {
            "epochs": run.epochs,
            "parameters": sum(p.numel() for p in run.learn.model.parameters()),
            "buffers": sum(b.numel() for b in run.learn.model.buffers()),
            "callbacks": [type(cb).__name__ for cb in run.cbs],
            "resumed from": run.resumed_from and run.resumed_from.name,
        }
        every = [json.loads(text) for text in self._agreement.channel.texts(json.dumps(here))]
        for name in here:
            if any(other[name] != every[0][name] for other in every):
                self._agreement.left = True
                found = "; ".join(f"rank {r}: {other[name]}" for r, other in enumerate(every))
                raise RuntimeError(
                    f"all ranks run the same fit, and they differ in {name} ({found}): make model, data and callbacks "
                    f"alike in each process, and files that are read visible to all"
                )

    def _give_parts(self):
        if not self.shard:
            return
        run, channel, made = self.run, self._agreement.channel, {}
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

    def _seed_ranks(self):
        """Rank 0 goes on with its random numbers, the others with some of their own."""
        run = self.run
        self._seed = int(self._agreement.channel.texts(str(torch.initial_seed()))[0])
        if self.rank != 0:
            resumed = run.resumed_from and run.resumed_from.name
            seed_all(self._seed, self.rank, ranks.fits(), resumed)

    def _merge_norms(self, model):
        group, plain = torch.distributed.group.WORLD, []
        for name, m in model.named_modules():
            if isinstance(m, nn.SyncBatchNorm):
                continue  # merges over all ranks of itself
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
                f"Distributed(sync_norm=False) says that it is meant so",
                stacklevel=2,
            )

    # Within an epoch

    def begin_epoch(self):
        if self._agreement is None:
            return
        run = self.run
        lengths = self._go(EPOCH_BEGINS, -1 if run.iters is None else run.iters)
        run.iters = None if min(lengths) < 0 else min(lengths)  # which batch is the last, and schedules, depend on it
        self._wrap()
        for loader, part in self._sharded:
            if isinstance(batches := getattr(part, "batch_sampler", None), Part):
                batches.seed = self._seed + run.epoch
            if isinstance(sampler := getattr(loader, "sampler", None), DistributedSampler):
                sampler.set_epoch(run.epoch)
        if self._handler is None:
            self._handler = self._handle_interrupts()

    def _wrap(self):
        """Have `run.model` sum its gradients; anew when other parameters are trained than before."""
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
        self._waiting = any(
            isinstance(m, nn.SyncBatchNorm) or getattr(m, "process_group", None) is not None for m in model.modules()
        )
        if self._replica is None and trained:
            from .replica import Replica

            self._replica, self._trained = Replica(model, self.find_unused_parameters), trained
        if self._replica is not None:
            self._replica.training = model.training
            run.model = self._replica

    def begin_batch(self):
        super().begin_batch()
        if self._replica is not None:
            self._replica.begin_batch(accumulates=self.run.accumulating)

    def _weigh(self, loss):
        if self._replica is not None:
            self._replica.begin_backward()
            self.run.apart = self._replica.apart
        return loss * self._share

    def after_backward(self):
        if self._replica is not None and self._replica.apart:
            self._meet_for_step()
            self._replica.exchange(self._agreement.channel.gather)
            self.run.apart = False

    def begin_validate(self):
        if self._agreement is None:
            return
        self._end_pass(VALIDATION_BEGINS)
        if self._replica is not None and self.run.model is self._replica:
            self.run.model = self._replica.module  # ranks need not validate equally many batches
        self._agreement.channel.spread(self.run.learn.model.buffers())

    def after_epoch(self):
        if self._agreement is None:
            return
        self._end_pass(EPOCH_OVER)
        for cb in self.run.cbs:
            if callable(getattr(type(cb), "merge", None)):
                cb.merge(self._agreement.channel.gather)

    def after_fit(self):
        asked, agreement = self._asked, self._agreement
        try:
            if agreement is not None:
                self._take_leave()
        finally:
            self._undo()
        if asked and self.run.stop_reason is None:
            raise KeyboardInterrupt

    def _undo(self):
        for m in self._norms:
            m.process_group = None
        for loader, part in self._sharded:
            if part is loader and callable(getattr(loader, "shard", None)):
                loader.shard()
        if self._replica is not None:
            self._replica.close()
        if self._handler is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        channel = self._agreement and self._agreement.channel
        joined = self._joined
        self._clear()
        if joined:
            ranks.leave()
        elif channel is not None:
            channel.close()

    def state_dict(self):
        """What the order of loaders without a generator depends on."""
        return {} if self._seed is None else {"seed": self._seed}

    def load_state_dict(self, state):
        if self._seed is not None:
            self._seed = state.get("seed", self._seed)

    def __getstate__(self):
        kept = ("backend", "timeout", "find_unused_parameters", "sync_norm", "shard", "rank", "world")
        return {k: vars(self)[k] for k in kept}

    def __setstate__(self, state):
        self._clear()
        super().__setstate__(state)

    def __repr__(self):
        backend = "" if self.backend is None else f"backend={self.backend!r}, "
        return f"Distributed({backend}timeout={self.timeout.total_seconds():g})"


def _silent(line):
    """The logger of ranks other than 0."""
