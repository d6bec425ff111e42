"""Exact statistics over several processes: unequal and empty batches are allowed, and the host never waits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _MergeOverRanks(torch.autograd.Function):
    """Mean and variance over the elements of all ranks (Chan's formula); gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, m, v, n, bs, group):
        mine = torch.cat([m, v, m.new_full((1,), n), m.new_full((1,), bs)])  # filled on the device, without a sync
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine, group=group)
        every, c = torch.stack(every), m.numel()
        ms, vs, ns = every[:, :c], every[:, c : 2 * c], every[:, 2 * c, None]
        total = ns.sum()
        shares = ns / total  # NaN if all ranks are empty, which leaves the state unchanged
        mean = (shares * ms).sum(0)
        var = (shares * (vs + (ms - mean).square())).sum(0)
        ctx.save_for_backward(n / total, m - mean)
        ctx.group = group
        total_bs = every[:, 2 * c + 1].sum()
        ctx.mark_non_differentiable(total, total_bs)
        return mean, var, total, total_bs

    @staticmethod
    @once_differentiable  # a second derivative would silently treat the sum over ranks as a constant
    def backward(ctx, d_mean, d_var, _total, _bs):
        share, off = ctx.saved_tensors
        grads = torch.stack([d_mean, d_var])
        dist.all_reduce(grads, group=ctx.group)
        d_mean, d_var = grads
        return share * (d_mean + 2 * off * d_var), share * d_var, None, None, None


def merge_over_ranks(
    m: Tensor, v: Tensor, n: int | Tensor, bs: int | Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge each rank's mean (C,), biased variance (C,), elements per channel and number of samples over all ranks.

    The two numbers come back as tensors of shape () on the device. Differentiable in m and v. Every rank must call.
    """
    return _MergeOverRanks.apply(m, v, n, bs, group)


def sum_over_ranks(sums: Tensor, n: int, group: Any) -> tuple[Tensor, Tensor]:
    """Sums (k, C) and the number of elements per channel, added up over all ranks; the latter has shape ()."""
    flat = torch.cat([sums.flatten(), sums.new_full((1,), n)])
    dist.all_reduce(flat, group=group)
    return flat[:-1].view_as(sums), flat[-1].clamp_min(1)
