"""What pulls at the weights before a norm? Dense prediction and an MLP with Adam, the default beside its peers.

    python benchmarks/forces.py                                      # about five minutes on a CPU thread
    python benchmarks/forces.py --tasks dense --bs 2 --norms default,batchnorm

If the norms of a net do not see the scale of the weights w before them, ⟨w, ∂L/∂w⟩ = 0. If it is not 0, descent grows
or shrinks ‖w‖ to no purpose. One row per norm, batch size and task, over all weights but the last layer's:

- size: ‖w‖ at the end over ‖w‖ at the start;
- pull: the mean over the steps of ⟨w, ∂L/∂w⟩/(‖w‖·‖∂L/∂w‖), negative where descent grows w;
- step: the mean of ‖Δw‖/‖w‖ in thousandths, the effective learning rate;
- x̂²: the mean over steps and layers of the mean square of what a norm gives before γ and β; 1 for nn.BatchNorm;
- score: the task's, in percent.
"""

from __future__ import annotations

import argparse
from statistics import fmean

import torch

from fastrbn.compare.cell import load_task
from fastrbn.compare.norms import get_norm, prepare_model
from fastrbn.compare.task_nets import weights
from fastrbn.compare.tasks import OPTIMISERS, SCHEDULES, Batches, build, get_task, score_of


def measure(name: str, norm: str, bs: int, seed: int) -> dict[str, float]:
    """Train a task's net and look at its weights at every step."""
    task, data = get_task(name), load_task(name)
    steps = task.n_steps(bs)
    model = prepare_model(norm, build(task, data, get_norm(norm, steps), seed))
    watched = list(weights(model).values())[:-1]
    optimiser = OPTIMISERS[task.optimiser](model.parameters(), lr=task.lr(bs))
    schedule, squares, pulls, moves = SCHEDULES[task.schedule](task.lr(bs)), [], [], []

    def square(module, _, y):
        shape = (1, -1) + (1,) * (y.dim() - 2)
        w, b = module.weight.detach().view(shape), module.bias.detach().view(shape)
        off = (y.detach() - b).square().mean((0, *range(2, y.dim()))) / w.flatten().square().clamp_min(1e-12)
        squares.append(off.mean().item())

    for module in model.modules():
        if getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            module.register_forward_hook(square)
    start = [p.detach().norm().item() for _, p in watched]
    model.train()
    for i, (x, y) in enumerate(Batches(task, data, bs, seed)):
        for group in optimiser.param_groups:
            group["lr"] = schedule(i / steps)
        task.goal.loss(model(x), y).backward()
        before = [p.detach().clone() for _, p in watched]
        pulls += [torch.cosine_similarity(p.detach().flatten(), p.grad.flatten(), 0).item() for _, p in watched]
        optimiser.step()
        optimiser.zero_grad()
        moves += [((p.detach() - old).norm() / old.norm()).item() for (_, p), old in zip(watched, before, strict=True)]
    end = [p.detach().norm().item() for _, p in watched]
    size = fmean(b / a for a, b in zip(start, end, strict=True))
    return {
        "size": size,
        "pull": fmean(pulls),
        "step": 1000 * fmean(moves),
        "x̂²": fmean(squares),
        "score": score_of(task, data, model),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--tasks", type=names, default=["dense", "mlp-adam"], help="default: dense,mlp-adam")
    parser.add_argument("--norms", type=names, default=["default", "course", "batchnorm", "groupnorm"])
    parser.add_argument("--bs", type=lambda text: [int(n) for n in text.split(",")], default=[2, 8, 32])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| task | batch size | norm | size | pull | step | x̂² | score |\n" + "| --- " * 8 + "|")
    for task in args.tasks:
        for bs in args.bs:
            for norm in args.norms:
                found = measure(task, norm, bs, args.seed)
                words = " | ".join(f"{value:.3g}" for value in found.values())
                print(f"| {task} | {bs} | {norm} | {words} |", flush=True)


if __name__ == "__main__":
    main()
