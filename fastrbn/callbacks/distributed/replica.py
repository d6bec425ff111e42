"""The model as each process trains it: PyTorch's DistributedDataParallel with the plain model's names."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Replica(DistributedDataParallel):
    """Sums gradients over the ranks; their losses are weighted by their shares of the batch.

    Parameters, buffers and modules have the plain model's names, and other attributes are read from it.
    """

    def __init__(self, model: nn.Module, find_unused_parameters: bool):
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # since torch 2.13
        keep: dict[str, Any] = {
            "forward_sync_buffers" if new else "broadcast_buffers": False
        }  # buffers are sent once an epoch
        super().__init__(model, find_unused_parameters=find_unused_parameters, **keep)
        self._pending: dict[int, Tensor] = {}  # gradients of earlier batches, by id of their parameter
        self.apart = False
        self.register_comm_hook(self._pending, summed)

    def begin_batch(self, accumulates: bool) -> None:
        """Call before each forward pass.

        With `accumulates`, gradients may add up on this rank alone; `apart` is true until a batch without it, or
        `exchange`, sums them over the ranks.
        """
        # gradients that have been summed already must not be summed again
        may = self.apart or all(p.grad is None for p in self.module.parameters())
        self.require_backward_grad_sync = not (accumulates and may)  # what no_sync() does

    def begin_backward(self) -> None:
        """Call before each backward pass."""
        self._pending.clear()
        summed_before = not self.apart
        self.apart = not self.require_backward_grad_sync
        if summed_before and torch.distributed.get_rank() != 0:
            waiting = (p for p in self.module.parameters() if p.grad is not None)
            self._pending.update((id(p), p.grad.detach().clone()) for p in waiting)

    @torch.no_grad()
    def exchange(self, gather: Callable[[list[bool]], list[list[float]]]) -> None:
        """Sum the gradients that are `apart`, if no backward pass is left to do it. `gather(numbers)` returns the
        numbers of each rank."""
        params = [p for p in self.module.parameters() if p.requires_grad]
        used = map(any, zip(*gather([p.grad is not None for p in params])))
        params = [p for p, by_any in zip(params, used) if by_any]
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for kind in {(p.device, p.dtype): None for p in params}:
            grads = [p.grad for p in params if (p.device, p.dtype) == kind]
            flat = torch.cat([g.reshape(-1) for g in grads])
            torch.distributed.all_reduce(flat, group=self.process_group)
            for g, total in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(total.view(g.shape))
        self.apart = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[nn.Module]:
        """The plain model, with no layer waiting for other ranks, to try something on this rank only."""
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
        """Remove its hooks from the parameters."""
        self._remove_autograd_hooks()

    def train(self, mode: bool = True) -> Replica:
        self.training = mode
        self.module.train(mode)
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_modules(*args, **kwargs)

    def named_children(self) -> Any:
        return self.module.named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not set yet
                raise
            return getattr(self.module, name)


def summed(pending, bucket):  # DistributedDataParallel rejects annotations that are strings
    """DistributedDataParallel's hook: sum over the ranks, in place of the mean. Gradients from earlier batches have
    been summed already, so only rank 0 contributes them."""
    if pending:
        for p, grad in zip(bucket.parameters(), bucket.gradients()):
            if (before := pending.get(id(p))) is not None:
                grad.sub_(before)
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
