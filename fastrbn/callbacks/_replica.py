"""The model as each process trains it: PyTorch's DistributedDataParallel, under the plain model's names."""

from __future__ import annotations

import contextlib
import inspect

import torch
from torch.nn.parallel import DistributedDataParallel


class Replica(DistributedDataParallel):
    """Sums gradients over the ranks: their losses weigh as their shares of the batch. Parameters, buffers and modules
    have the names that they have in the plain model, and other attributes are its own."""

    def __init__(self, model, find_unused_parameters):
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # since torch 2.13
        keep = {"forward_sync_buffers" if new else "broadcast_buffers": False}  # they go over once an epoch
        super().__init__(model, find_unused_parameters=find_unused_parameters, **keep)
        self._pending = {}
        self.register_comm_hook(self._pending, summed)

    def begin_backward(self) -> None:
        """To be called before each backward pass."""
        self._pending.clear()
        if torch.distributed.get_rank() != 0:
            waiting = (p for p in self.module.parameters() if p.grad is not None)
            self._pending.update((id(p), p.grad.detach().clone()) for p in waiting)

    @contextlib.contextmanager
    def alone(self):
        """The plain model, and no layer of it waiting for other ranks: to try something on this one."""
        merging = [m for m in self.module.modules() if getattr(m, "process_group", None) is not None]
        groups = [m.process_group for m in merging]
        try:
            for m in merging:
                m.process_group = None
            yield self.module
        finally:
            for m, group in zip(merging, groups):
                m.process_group = group

    def close(self) -> None:
        """Take its hooks off the parameters."""
        self._remove_autograd_hooks()

    def train(self, mode=True):
        self.training = mode
        self.module.train(mode)
        return self

    def named_parameters(self, *args, **kwargs):
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args, **kwargs):
        return self.module.named_buffers(*args, **kwargs)

    def named_modules(self, *args, **kwargs):
        return self.module.named_modules(*args, **kwargs)

    def named_children(self):
        return self.module.named_children()

    def state_dict(self, *args, **kwargs):
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.module.load_state_dict(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # it is not there yet
                raise
            return getattr(self.module, name)


def summed(pending, bucket):
    """DistributedDataParallel's hook: the sum over the ranks, where it would have the mean. What waits in the gradients
    from earlier batches is summed already: it comes from rank 0 alone."""
    if pending:
        for p, grad in zip(bucket.parameters(), bucket.gradients()):
            if (before := pending.get(id(p))) is not None:
                grad.sub_(before)
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
