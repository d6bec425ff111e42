"""Oracles that share no code with the package: float64, written from the formulas."""

from __future__ import annotations

import math

import torch
from torch import nn


def course_rate(mom, bs):
    return 1 - (1 - mom) / math.sqrt(max(bs - 1, 1))


def per_32_rate(mom, bs):
    return 1 - (1 - mom) ** (bs / 32)


class SumsOracle(nn.Module):
    """The course's and the thread's layer: running sums, squares and count, each moved towards the batch's by its rate.

    `skip(samples, iteration)` says that this iteration leaves them alone; `floor(var, eps)` gives the variance that
    normalises while fewer than 20 samples were seen. float64 throughout; gradients come from autograd.
    """

    def __init__(self, nf, rate, mom=0.1, eps=1e-5, skip=None, floor=None, detached=False):
        super().__init__()
        self.rate, self.mom, self.eps, self.skip, self.floor, self.detached = rate, mom, eps, skip, floor, detached
        self.weight = nn.Parameter(torch.ones(nf, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(nf, dtype=torch.float64))
        self.sums, self.sqrs = torch.zeros(nf, dtype=torch.float64), torch.zeros(nf, dtype=torch.float64)
        self.count, self.samples, self.iteration = 0.0, 0, 0

    def forward(self, x):
        shape = (1, -1) + (1,) * (x.dim() - 2)
        dims = [d for d in range(x.dim()) if d != 1]
        self.sums, self.sqrs = self.sums.detach(), self.sqrs.detach()
        self.samples += len(x)
        self.iteration += 1
        if not (self.skip and self.skip(self.samples, self.iteration)):
            lam = self.rate(self.mom, len(x))
            s, ss = x.sum(dims), (x * x).sum(dims)
            if self.detached:
                s, ss = s.detach(), ss.detach()
            self.sums = (1 - lam) * self.sums + lam * s
            self.sqrs = (1 - lam) * self.sqrs + lam * ss
            self.count = (1 - lam) * self.count + lam * x.numel() / x.shape[1]
        mean, var = self.stats()
        if self.floor and self.samples < 20:
            var = self.floor(var, self.eps)
        factor = self.weight / (var + self.eps).sqrt()
        offset = self.bias - mean * factor
        return x * factor.view(shape) + offset.view(shape)

    def stats(self):
        mean = self.sums / self.count
        return mean, self.sqrs / self.count - mean * mean


def variance_floor(var, eps):
    return var.clamp_min(0.01)


def deviation_floor(var, eps):
    return (var + eps).sqrt().clamp_min(0.1) ** 2 - eps


PUBLISHED = {
    "course": {"rate": course_rate, "floor": variance_floor},
    "skip-alternate": {
        "rate": per_32_rate,
        "floor": deviation_floor,
        "skip": lambda samples, iteration: samples > 1000 and iteration % 2 == 0,
    },
    "skip-tenth": {
        "rate": course_rate,
        "floor": variance_floor,
        "skip": lambda samples, iteration: samples > 10_000 and iteration % 10 == 0,
    },
    "detached": {"rate": course_rate, "detached": True},
}


class ClosedForm:
    """NORM's closed form with hand-written gradients and the averaged backward, in float64 with plain Python scalars.

    `step(x, dy)` returns y, dx, dγ, dβ and moves the state: mean, var, count; A, B (sums) and their weight w.
    """

    def __init__(self, nf, weight, bias, eps=1e-5, averaged=False):
        self.mean, self.var = torch.zeros(nf, dtype=torch.float64), torch.ones(nf, dtype=torch.float64)
        self.count, self.samples = 0.0, 0
        self.a_sum, self.b_sum, self.w = torch.zeros_like(self.mean), torch.zeros_like(self.mean), 0.0
        self.weight, self.bias, self.eps, self.averaged = weight.double(), bias.double(), eps, averaged

    def default_rate(self, bs):
        """λ of the default recipe for a batch of bs, before `step` moves the state."""
        return bs / (bs + min(max(self.samples / 20, 20), 300))

    def step(self, x, dy, rate, read=None, start=None, floor_samples=20, floor=0.01):
        x, dy = x.detach().double(), dy.double()
        shape, dims = (1, -1) + (1,) * (x.dim() - 2), [d for d in range(x.dim()) if d != 1]
        ch = lambda t: t.view(shape)  # noqa: E731
        xr = x if read is None else x[read]
        n, n_all = xr.numel() / x.shape[1], x.numel() / x.shape[1]
        m, v = xr.mean(dims), xr.var(dims, unbiased=False)
        self.samples += len(x)
        self.count = (1 - rate) * self.count + rate * n
        a = rate * n / self.count
        self.var = (1 - a) * self.var + a * v + a * (1 - a) * (m - self.mean) ** 2
        self.mean = self.mean + a * (m - self.mean)
        used, free = self.var, torch.ones_like(self.var)
        if self.samples < floor_samples:
            free = (self.var > floor).double()  # no gradient through a clamped variance
            used = self.var.clamp_min(floor)
        inv = 1 / (used + self.eps).sqrt()
        x_hat = (x - ch(self.mean)) * ch(inv)
        y = ch(self.weight) * x_hat + ch(self.bias)
        d_gamma, d_beta = (dy * x_hat).sum(dims), dy.sum(dims)
        d_mean, d_proj = dy.mean(dims), (dy * x_hat).mean(dims)
        g = ch(self.weight * inv)
        # this batch's share, carried by the elements that were read alone: n_all/n spreads the sums over them
        part = torch.zeros_like(x)
        part[slice(None) if read is None else read] = a * n_all / n
        dx = g * (dy - part * (ch(d_mean) + ch(free) * x_hat * ch(d_proj)))
        if self.averaged:
            self.w += rate * (1 - self.w)
            self.a_sum += rate * (d_mean - self.a_sum)
            self.b_sum += rate * (d_proj - self.b_sum)
            b = max(a, len(x) / (len(x) + 20) if start is None else start)
            c = (x - ch(m)) * ch(inv)
            z = (dy * c).mean(dims) / (v * inv**2).clamp_min(1)
            past = (ch(self.a_sum) + x_hat * ch(self.b_sum)) / self.w
            dx = g * (dy - b * (ch(d_mean) + c * ch(z)) - (1 - b) * past)
        return y, dx, d_gamma, d_beta


def relative_error(got, want):
    """‖got − want‖/‖want‖ in float64; the absolute error where want is zero."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item() if want.norm() > 0 else got.norm().item()
