"""Statistics over many processes: merged exactly, with unequal or empty batches, and without a wait on the host."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _MergeOverRanks(torch.autograd.Function):
    """Mean and variance of the union of all ranks' elements (Chan's formula); gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, m, v, n, bs, group):
        mine = torch.cat([m, v, m.new_full((1,), n), m.new_full((1,), bs)])  # filled on the device: nobody waits
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine, group=group)
        every, c = torch.stack(every), m.numel()
        ms, vs, ns = every[:, :c], every[:, c : 2 * c], every[:, 2 * c, None]
        total = ns.sum()
        shares = ns / total.clamp_min(1)
        mean = (shares * ms).sum(0)
        var = (shares * (vs + (ms - mean).square())).sum(0)
        ctx.save_for_backward(n / total.clamp_min(1), m - mean)
        ctx.group = group
        total_bs = every[:, 2 * c + 1].sum()
        ctx.mark_non_differentiable(total, total_bs)
        return mean, var, total, total_bs

    @staticmethod
    @once_differentiable  # the sum over ranks would be a constant of a second derivative, without a word
    def backward(ctx, d_mean, d_var, _total, _bs):
        share, off = ctx.saved_tensors
        grads = torch.stack([d_mean, d_var])
        dist.all_reduce(grads, group=ctx.group)
        d_mean, d_var = grads
        return share * (d_mean + 2 * off * d_var), share * d_var, None, None, None


def merge_over_ranks(m: Tensor, v: Tensor, n: int, bs: int, group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rank's mean (C,), biased variance (C,), number of elements a channel and of samples -> those of all ranks, the
    numbers as tensors of shape () on the device. Differentiable in m and v; every rank of `group` must take part."""
    return _MergeOverRanks.apply(m, v, n, bs, group)


def sum_over_ranks(sums: Tensor, n: int, group) -> tuple[Tensor, Tensor]:
    """Sums (k, C) over this rank's n elements a channel -> those over all ranks, and the total n of shape ()."""
    flat = torch.cat([sums.flatten(), sums.new_full((1,), n)])
    dist.all_reduce(flat, group=group)
    return flat[:-1].view_as(sums), flat[-1].clamp_min(1)
