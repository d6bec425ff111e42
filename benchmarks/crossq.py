"""Reinforcement learning without target networks: which norm carries CrossQ?

    python benchmarks/crossq.py                            # the grid, about ten minutes on two cores
    python benchmarks/crossq.py --norms default,batchrenorm --rates 1e-3 --seeds 0
    python benchmarks/crossq.py --full                     # five times as long, wider nets, ten seeds

CrossQ (Bhatt et al., "CrossQ: Batch Normalization in Deep Reinforcement Learning for Greater Sample Efficiency and
Simplicity", ICLR 2024) is soft actor-critic (SAC) without target networks. Its critics have batch renormalisation, and
see the current and the next state-action pairs as one batch, so that both are normalised with the same statistics. Here
the norm is exchanged. `sac` is SAC with target networks and no norm.

At a seed all norms have the same initial weights, first actions and evaluation episodes. All settings are those of
batch renormalisation. Each norm is trained at every rate with the first seed, then at the best of them with the other
seeds. The rows of a run go to results/evidence/crossq.csv when it ends; the same command goes on after an interrupt.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import about
import torch
import torch.nn.functional as F
from about import rewrite
from small_batch import numbers
from torch import Tensor, nn

from fastrbn import plots
from fastrbn.compare import get_norm, split_norms
from fastrbn.compare.grid import machine
from fastrbn.compare.study_report import COLORS as PEER_COLORS
from fastrbn.plots.figure import COLORS, GREY, axes, label_ends, new_figure
from fastrbn.util import one_of, write_whole

RESULTS = Path(__file__).parent / "results" / "evidence" / "crossq.csv"
QUESTION = "Which norm carries CrossQ, where the paper uses batch renorm?"
TASK, TITLE = "pendulum", "pendulum, batches of 256"
KINDS: dict[str, Callable[[str], Any]] = {
    "task": lambda text: one_of("task", text, [TASK]),
    **{"norm": str, "lr": float, "seed": int, "step": int, "return": float, "seconds": float},
    **dict.fromkeys(("machine", "torch", "date"), str),
}
"""The columns of the CSV, and how they are read."""
COLUMNS = tuple(KINDS)
NORMS = {
    "default": "RunningBatchNorm",
    "batchrenorm": "batch renorm",
    "batchnorm": "nn.BatchNorm",
    "batchnorm:momentum=0.01": "nn.BatchNorm, momentum 0.01",  # that of CrossQ, in longer runs
    "layernorm": "LayerNorm",
    "none": "no norm",
    "sac": "SAC, target networks",
}
RATES = (3e-4, 1e-3, 3e-3)
RANDOM, SOLVED, SHOWN = -1200.0, -300.0, (-1700.0, 0.0)  # returns: of random actions, of a good policy, the axis


class Pendulum:
    """Swing a pendulum up and hold it, with a motor too weak to lift it: the equations of gymnasium's Pendulum-v1.

    A state is (θ, θ̇), θ = 0 upright; an action is the torque as a share of the largest, 2.
    """

    observations = 3

    @staticmethod
    def start(n: int) -> Tensor:
        return (2 * torch.rand(n, 2) - 1) * torch.tensor([math.pi, 1.0])

    @staticmethod
    def observe(state: Tensor) -> Tensor:
        angle, speed = state.unbind(1)
        return torch.stack([angle.cos(), angle.sin(), speed], 1)

    @staticmethod
    def step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The states 0.05 s later, and the rewards."""
        (angle, speed), torque = state.unbind(1), 2 * action[:, 0]
        off = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        reward = -(off.square() + 0.1 * speed.square() + 0.001 * torque.square())
        speed = (speed + 0.05 * (15 * angle.sin() + 3 * torque)).clamp(-8, 8)  # g = 10, m = l = 1: 3g/2l, 3/ml²
        return torch.stack([angle + 0.05 * speed, speed], 1), reward


@dataclass(frozen=True)
class Lengths:
    """Of a training and its parts, in steps, samples and channels."""

    steps: int = 2500
    bs: int = 256
    episode: int = 200
    width: int = 64
    points: int = 10  # evaluations
    first: int = 500  # steps with random actions


LENGTHS = Lengths()


@dataclass(frozen=True)
class Run:
    """One training run."""

    norm: str
    lr: float
    seed: int
    full: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that identify it."""
        return TASK, self.norm, f"{self.lr:g}", str(self.seed)

    @property
    def lengths(self) -> Lengths:
        """At full length five times the steps and nets of 256."""
        return replace(LENGTHS, steps=5 * LENGTHS.steps, width=256) if self.full else LENGTHS


def mlp(sizes: list[int], norm: str, steps: int) -> nn.Sequential:
    """Linear layers, a norm before each and ReLU between them.

    LayerNorm is left out before the first: across the few inputs it would remove what they tell.
    """
    make = get_norm("none" if norm == "sac" else norm, steps)
    layers: list[nn.Module | None] = []
    for i, (ni, no) in enumerate(zip(sizes, sizes[1:])):
        layers += [make(ni, dims=0) if i or norm != "layernorm" else None, nn.Linear(ni, no), nn.ReLU()]
    return nn.Sequential(*(layer for layer in layers[:-1] if layer is not None))


class Agent:
    """CrossQ with a norm, or SAC.

    Two critics Q(s, a) and a policy, a normal distribution squashed by tanh. Norms are in training mode where their net
    is trained, and use running statistics elsewhere, as published.
    """

    gamma, tau = 0.99, 0.005

    def __init__(self, observations: int, width: int, norm: str, lr: float, steps: int) -> None:
        self.cross = norm != "sac"
        self.delay = 3 if self.cross else 1  # critic updates for one of the policy
        betas = (0.5 if self.cross else 0.9, 0.999)
        self.critics = nn.ModuleList(mlp([observations + 1, width, width, 1], norm, steps) for _ in range(2))
        self.actor = mlp([observations, width, width, 2], norm, steps // self.delay)
        self.targets = None if self.cross else copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.opts = [
            torch.optim.Adam(ps, lr, betas, fused=True)
            for ps in (self.critics.parameters(), self.actor.parameters(), [self.log_alpha])
        ]
        self.updates = 0

    def policy(self, obs: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation before tanh."""
        mean, log_std = self.actor.train(train)(obs).chunk(2, 1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, obs: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
        """Random actions and their log-probabilities."""
        mean, log_std = self.policy(obs, train)
        noise = torch.randn_like(mean)
        raw = mean + log_std.exp() * noise
        log_p = -log_std - 0.5 * noise.square() - 0.5 * math.log(2 * math.pi)
        return raw.tanh(), log_p - 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # the last: tanh's derivative

    def update(self, obs: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> None:
        """One step of the critics; of policy and temperature too if it is their turn."""
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            action_after, log_p = self.sample(after)
        now, then = torch.cat([obs, action], 1), torch.cat([after, action_after], 1)
        if self.targets is None:
            q, q_after = zip(*(critic(torch.cat([now, then])).chunk(2) for critic in self.critics.train()))
        else:
            q, q_after = [c(now) for c in self.critics], [t(then) for t in self.targets]
        goal = reward[:, None] + self.gamma * (torch.min(*q_after).detach() - alpha * log_p)
        self._descend(0, F.mse_loss(q[0], goal) + F.mse_loss(q[1], goal))
        if self.targets is not None:
            for t, c in zip(self.targets.parameters(), self.critics.parameters()):
                t.lerp_(c.detach(), self.tau)
        if self.updates % self.delay == 0:
            self.critics.eval().requires_grad_(False)
            act, log_p = self.sample(obs, train=True)
            pair = torch.cat([obs, act], 1)
            self._descend(1, (alpha * log_p - torch.min(*(c(pair) for c in self.critics))).mean())
            self.critics.requires_grad_(True)
            self._descend(2, -self.log_alpha * (log_p.detach().mean() - 1))  # wanted entropy: minus one per action
        self.updates += 1

    def _descend(self, which: int, loss: Tensor) -> None:
        self.opts[which].zero_grad()
        loss.backward()
        self.opts[which].step()


@torch.no_grad()
def evaluate(agent: Agent, episode: int, n: int = 20) -> float:
    """Mean return of `n` episodes without exploration. They start from the same states each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        state = Pendulum.start(n)
    total = torch.zeros(n)
    for _ in range(episode):
        state, reward = Pendulum.step(state, agent.policy(Pendulum.observe(state))[0].tanh())
        total += reward
    return total.mean().item()


def train(run: Run) -> list[dict[str, Any]]:
    """Train an agent, one update a step. Returns the rows of its learning curve; `seconds` are of the processor."""
    its, began, where = run.lengths, time.process_time(), machine("cpu")
    seen = Pendulum.observations
    torch.manual_seed(run.seed)
    agent = Agent(seen, its.width, run.norm, run.lr, its.steps - its.first)
    torch.manual_seed(run.seed)  # the same random numbers for all norms
    memory = torch.empty(its.steps, 2 * seen + 2)  # observation, action, reward, next observation
    points, rows = [round(its.steps * i / its.points) for i in range(1, its.points + 1)], []
    for step in range(its.steps):
        if step % its.episode == 0:
            state = Pendulum.start(1)
            obs = Pendulum.observe(state)
        with torch.no_grad():
            action = 2 * torch.rand(1, 1) - 1 if step < its.first else agent.sample(obs)[0]
            state, reward = Pendulum.step(state, action)
            after = Pendulum.observe(state)
            memory[step] = torch.cat([obs, action, reward[:, None], after], 1)
        obs = after
        if step >= its.first:
            o, a, r, n = memory[torch.randint(step + 1, (its.bs,))].split([seen, 1, 1, seen], 1)
            agent.update(o, a, r[:, 0], n)
        if step + 1 in points:
            score, seconds = evaluate(agent, its.episode), time.process_time() - began
            values = (*run.key, step + 1, f"{score:.2f}", f"{seconds:.1f}", *(where[c] for c in COLUMNS[-3:]))
            rows.append(dict(zip(COLUMNS, map(str, values))))
    return rows


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV, without those of a run that lost some."""
    rows = about.rows_of(path, KINDS)
    found = Counter(map(_key, rows))
    return [row for row in rows if found[_key(row)] >= LENGTHS.points]


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in COLUMNS[:4])


def train_all(runs: list[Run], path: Path, jobs: int, log: Callable[[str], object] = print) -> None:
    """Train the runs that the CSV at `path` does not have, and add the rows of each as soon as it ends."""
    done = set(map(_key, rows_of(path)))
    todo = [run for run in runs if run.key not in done]
    for i, new in enumerate(_results(todo, jobs), 1):
        rewrite(path, [*rows_of(path), *new])  # another process may have added rows
        log(f"[{i}/{len(todo)}] {' '.join(_key(new[0]))}: return {new[-1]['return']}, {new[-1]['seconds']} s")


def _results(runs: list[Run], jobs: int) -> Iterator[list[dict[str, str]]]:
    if jobs == 1 or len(runs) < 2:
        yield from map(train, runs)
        return
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(runs)), _begin) as pool:  # ended with the block
        yield from pool.imap_unordered(train, runs)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    torch.set_num_threads(1)


def run(
    path: Path,
    norms: Sequence[str] = tuple(NORMS),
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    full: bool = False,
    log: Callable[[str], object] = partial(print, flush=True),
) -> bool:
    """Train every norm at every rate with the first seed, then at its best rate with the others. False on Ctrl-C."""
    seeds = seeds or range(10 if full else 3)
    jobs = jobs or os.cpu_count() or 1
    try:
        train_all([Run(norm, lr, seeds[0], full) for norm in norms for lr in rates], path, jobs, log)
        best = {norm: curve.lr for norm, curve in curves(rows_of(path)).items()}
        train_all([Run(norm, best[norm], seed, full) for seed in seeds[1:] for norm in norms], path, jobs, log)
    except KeyboardInterrupt:
        return False
    return True


@dataclass(frozen=True)
class Curve:
    """The learning curves of a norm at its best rate: `returns[seed][i]` at `steps[i]`."""

    lr: float
    steps: list[int]
    returns: list[list[float]]

    @property
    def final(self) -> list[float]:
        """The return of each seed over the last quarter of the evaluations."""
        return [statistics.fmean(r[-max(1, len(r) // 4) :]) for r in self.returns]

    def steps_to(self, goal: float) -> list[int | None]:
        """The first evaluated step of each seed with a return of at least `goal`."""
        return [next((s for s, r in zip(self.steps, seed) if r >= goal), None) for seed in self.returns]


def curves(rows: Iterable[dict[str, str]]) -> dict[str, Curve]:
    """{norm: curve}, in the order of `NORMS`, others at the end.

    The best rate has the highest mean return over the whole curve with the first seed. A return of NaN counts as that
    of random actions.
    """
    found: dict[str, dict[float, dict[int, dict[int, float]]]] = {}
    for row in rows:
        value = float(row["return"])
        value = RANDOM if math.isnan(value) else value
        rates = found.setdefault(row["norm"], {})
        rates.setdefault(float(row["lr"]), {}).setdefault(int(row["seed"]), {})[int(row["step"])] = value
    best = {}
    for norm in sorted(found, key=lambda norm: list(NORMS).index(norm) if norm in NORMS else len(NORMS)):
        rates = found[norm]
        first = min(seed for seeds in rates.values() for seed in seeds)
        lr = max((lr for lr in rates if first in rates[lr]), key=lambda lr: statistics.fmean(rates[lr][first].values()))
        runs = [rates[lr][seed] for seed in sorted(rates[lr])]
        best[norm] = Curve(lr, sorted(runs[0]), [[run[step] for step in sorted(run)] for run in runs])
    return best


def table(rows: Iterable[dict[str, str]]) -> str:
    """Final returns, and how soon a good policy is found, as Markdown."""
    found = curves(rows)
    best = max(statistics.fmean(curve.final) for curve in found.values())
    lines = [f"| {TITLE} | rate | final return | steps to {SOLVED:g} | seeds |", "| --- |" + " --- |" * 4]
    for norm, curve in found.items():
        mean, reached = statistics.fmean(curve.final), curve.steps_to(SOLVED)
        spread = f" ± {statistics.stdev(curve.final):.0f}" if len(curve.final) > 1 else ""
        text, there = f"{mean:.0f}{spread}", [s for s in reached if s is not None]
        soon = f"{statistics.fmean(there):,.0f}" if there else "never"
        lost = f" ({len(there)} of {len(reached)} seeds)" if there and len(there) < len(reached) else ""
        text = f"**{text}**" if mean == best else text
        lines.append(f"| {NORMS.get(norm, norm)} | {curve.lr:g} | {text} | {soon}{lost} | {len(reached)} |")
    return "\n".join(lines)


def figure(rows: Iterable[dict[str, str]]) -> Any:
    """Learning curves: the mean over the seeds, and a band of a standard deviation each way."""
    fig = new_figure(8.0, 3.6)
    fig.suptitle(QUESTION, x=0.01, ha="left", fontsize=11, fontweight="bold")
    ax = axes(fig, fig.add_gridspec(1, 1)[0, 0], TITLE, "environment steps", "mean return of 20 episodes")
    ax.axhline(SOLVED, color=GREY, lw=0.8, ls=":")
    colors = PEER_COLORS | {"batchnorm:momentum=0.01": "#E69F00", "sac": "#44AA99"}
    ends = []
    for norm, curve in curves(rows).items():
        ours, color = norm.startswith("default"), colors.get(norm, COLORS[0])
        mean = [statistics.fmean(at) for at in zip(*curve.returns)]
        ax.plot(curve.steps, mean, color=color, lw=2.8 if ours else 1.3, zorder=3 if ours else 2)
        if len(curve.returns) > 1:
            std = [statistics.stdev(at) for at in zip(*curve.returns)]
            low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
            ax.fill_between(curve.steps, low, high, color=color, alpha=0.2 if ours else 0.08, lw=0)
        ends.append((curve.steps[-1], mean[-1], NORMS.get(norm, norm), color))
    ax.set_ylim(*SHOWN)
    label_ends(ax, ends, [NORMS["default"]])
    return fig


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", type=split_norms, default=list(NORMS), help=f"default: {','.join(NORMS)}")
    parser.add_argument("--rates", type=numbers(float), default=RATES, help="default: 3e-4,1e-3,3e-3")
    parser.add_argument("--seeds", type=numbers(int), help="default: 0,1,2; with --full 0 to 9")
    parser.add_argument("--jobs", type=int, help="processes (default: a core each)")
    parser.add_argument("--full", action="store_true", help="five times the steps, nets of 256, ten seeds")
    parser.add_argument("--csv", type=Path, help="default: results/evidence/crossq.csv, with --full crossq-full.csv")
    args = parser.parse_args()
    path = args.csv or RESULTS.with_stem("crossq-full" if args.full else "crossq")
    torch.set_num_threads(1)
    whole = run(path, args.norms, args.rates, args.seeds, args.jobs, args.full)
    if rows := rows_of(path):
        print(f"\n{table(rows)}\n\n{write_whole(path.with_suffix('.png'), plots.png(figure(rows)))}")
    if not whole:
        print("interrupted: the same command goes on", file=sys.stderr)
    return 0 if whole else 130


if __name__ == "__main__":
    sys.exit(main())
