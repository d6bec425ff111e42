"""`Runner.state_dict` and `fit(resume=…)`: collect what a fit depends on, and continue from it.

A resumed fit is bit for bit the uninterrupted one, because everything it reads is restored: parameters, buffers and
switches of the model, the optimiser, the callbacks' state, the random states, and the place in the data.
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint_file, ranks
from .batch import length
from .callback import Callback
from .checkpoint_file import CheckpointError
from .snapshot import RandomState, load_module_state, load_opt_state, module_state, plain_name, plain_state_dict

PHASES = ("train", "valid", "end")


def collect(run: Any, phase: str) -> dict[str, Any]:
    """See `Runner.state_dict`."""
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}; got {phase!r}")
    opt = run.learn.opt
    position = {
        "phase": phase,
        "epoch": run.epoch,
        "n_iter": run.n_iter,
        "n_epochs": run.n_epochs,
        "epochs": run.epochs,
        "iters": length(run.data.train_dl),
        **run._passes.place(phase),
    }
    return {
        "position": position,
        **module_state(run.learn.model),
        "loss": module_state(loss) if (loss := loss_module(run.learn)) is not None else {},
        "opt_class": type(opt).__name__,
        "opt": opt.state_dict(),
        "callbacks": {
            name: {"class": type(cb).__name__, "state": cb.state_dict()} for name, cb in _callbacks(run).items()
        },
        "random": random_of(run).state_dict(),
    }


def find(path: str | Path, run: Any) -> tuple[Path, dict[str, Any]]:
    """File and state of the checkpoint at `path`; CheckpointError if it does not fit `run.learn`."""

    def check(state: dict[str, Any]) -> None:
        check_module(run.learn.model, state["model"], "model")
        _check_loss(loss_module(run.learn), state.get("loss"))
        check_opt(run.learn.opt, state["opt"], state.get("opt_class"))

    file, state = checkpoint_file.find(path, check)
    place = state["position"]
    if (every := place.get("every")) != run._passes.every:
        raise CheckpointError(
            f"the checkpoint {file} was made with validate_every={every}, which decides what an epoch is; now it is "
            f"{run._passes.every}: pass the same"
        )
    if run._passes.limit < place["epoch"] + 1:
        raise CheckpointError(
            f"the checkpoint {file} was made in epoch {place['epoch']} (the first is 0), beyond the end of a fit of "
            f"{run.epochs}: epochs counts from the very beginning; that fit had {place['epochs']}"
        )
    if run.max_steps is not None and run.max_steps < place["n_iter"]:
        raise CheckpointError(
            f"the checkpoint {file} was made after {place['n_iter']} training batches, beyond the end of a fit of "
            f"max_steps={run.max_steps}: max_steps counts from the very beginning"
        )
    _warn_of_callbacks(run, state["callbacks"])
    return file, state


def restore(run: Any, state: dict[str, Any]) -> None:
    """Put back everything that `collect` has taken, except the place in the data."""
    place = state["position"]
    load_module_state(run.learn.model, state)
    if state.get("loss"):
        load_module_state(run.learn.loss_func, state["loss"])
    load_opt_state(run.learn.opt, state["opt"])
    for name, cb in _callbacks(run).items():
        saved = state["callbacks"].get(name)
        if saved is not None and saved["class"] == type(cb).__name__:
            cb.load_state_dict(saved["state"])
    run.epoch, run.n_iter, run.n_epochs = place["epoch"], place["n_iter"], place["n_epochs"]
    random_of(run, state["random"]).restore()


def random_of(run: Any, saved: dict[str, Any] | None = None) -> RandomState:
    """The random states of the run as they are, or as they were `saved`."""
    state = RandomState((run.data.train_dl, run.data.valid_dl))
    if saved is None:
        return state
    if ranks.rank() != 0:
        own = state.state_dict()  # rank 0 saved: with its random numbers all ranks would drop the same units
        saved = {**own, "loaders": saved["loaders"], "generators": saved["generators"]}  # the data's order is shared
    state.load_state_dict(saved)
    return state


def _callbacks(run: Any) -> dict[str, Callback]:
    return {name: cb for name, cb in vars(run).items() if any(cb is known for known in run.cbs)}


def _warn_of_callbacks(run: Any, saved: dict[str, Any]) -> None:
    """Warn of saved state without a callback, and of callbacks with state that the checkpoint does not have."""
    here = {name: type(cb).__name__ for name, cb in _callbacks(run).items()}
    lost = [n for n, entry in saved.items() if entry["state"] and here.get(n) != entry["class"]]
    known = {n for n, entry in saved.items() if here.get(n) == entry["class"]}
    fresh = [n for n, cb in _callbacks(run).items() if n not in known and has_state(cb)]
    if lost:
        warnings.warn(
            f"the checkpoint has state of callbacks that this run does not have: {', '.join(lost)}", stacklevel=5
        )
    if fresh:
        warnings.warn(
            f"the checkpoint has no state for these callbacks, which start fresh: {', '.join(fresh)}", stacklevel=5
        )


def has_state(cb: Callback) -> bool:
    """True if the callback's class defines `state_dict`, or the default one finds something to keep."""
    return type(cb).state_dict is not Callback.state_dict or bool(cb.state_dict())


def loss_module(learn: Any) -> nn.Module | None:
    """The loss function if it has parameters or buffers, such as class weights or a learned temperature."""
    loss = learn.loss_func
    if isinstance(loss, nn.Module) and next(itertools.chain(loss.parameters(), loss.buffers()), None) is not None:
        return loss
    return None


def _check_loss(loss: nn.Module | None, saved: dict[str, Any] | None) -> None:
    if saved is None:  # a file from before loss functions were saved
        if loss is not None and next(loss.parameters(), None) is not None:
            warnings.warn(
                f"the checkpoint has no parameters of the loss function {type(loss).__name__}: they start fresh",
                stacklevel=6,
            )
        return
    check_module(nn.Module() if loss is None else loss, saved.get("model", {}), "loss function")


def check_module(module: nn.Module, saved: dict[str, Any], what: str) -> None:
    """CheckpointError that names the first differences between the module and the state_dict `saved`."""
    here, saved = plain_state_dict(module), {plain_name(name): value for name, value in saved.items()}
    wrong = []
    for name in {**saved, **here}:
        a, b = (_shape(state[name]) if name in state else "nothing" for state in (saved, here))
        if a != b:
            wrong.append(f"{name} ({a} there, {b} here)")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the checkpoint is of another {what}: {', '.join(wrong[:3])}{more}; make the {what} as it was made then"
        )


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def check_opt(opt: torch.optim.Optimizer, saved: dict[str, Any], saved_class: str | None) -> None:
    sizes = [[len(g["params"]) for g in groups] for groups in (opt.param_groups, saved["param_groups"])]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the checkpoint is of another optimiser: it has param groups of {sizes[1]} parameters, "
            f"{type(opt).__name__} has {sizes[0]}; make the optimiser as it was made then"
        )
    # Groups may have more settings than the optimiser's own (labels, a scheduler's initial_lr), and torch's versions
    # differ in them. A file that does not name its optimiser has another one if each side lacks settings of the other.
    why = saved_class if saved_class != type(opt).__name__ else None
    if saved_class is None:
        there, here = ({k for g in groups for k in g} for groups in (saved["param_groups"], opt.param_groups))
        missing = set(getattr(opt, "defaults", {})) - there
        if missing and there - here:
            why = f"these settings exist on one side only: {', '.join(sorted(missing | there - here))}"
    if why is not None:
        raise CheckpointError(
            f"the checkpoint is of another optimiser than {type(opt).__name__}: {why}; make the optimiser as it was "
            f"made then"
        )
