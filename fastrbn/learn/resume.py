"""`Runner.state_dict` and `fit(resume=…)`: collect what a fit depends on, and continue from it.

A resumed fit is bit for bit the uninterrupted one, because everything it reads is restored: parameters, buffers and
switches of the model, the optimiser, the callbacks' state, the random states, and the place in the data.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
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
        "done": run.iter + 1 if phase == "train" else None,
        "n_iter": run.n_iter,
        "n_epochs": run.n_epochs,
        "epochs": run.epochs,
        "iters": length(run.data.train_dl),
    }
    if phase == "train":
        loader = run.data.train_dl
        position["loader"] = loader.state_dict(mid_epoch=True) if _skips(loader) else None
        position["before_pass"] = run._resume.before_pass
    return {
        "position": position,
        **module_state(run.learn.model),
        "loss": module_state(loss) if (loss := loss_module(run.learn)) is not None else {},
        "opt_class": type(opt).__name__,
        "opt": opt.state_dict(),
        "callbacks": {
            name: {"class": type(cb).__name__, "state": cb.state_dict()} for name, cb in _callbacks(run).items()
        },
        "random": _random(run).state_dict(),
    }


def find(path: str | Path, run: Any) -> tuple[Path, dict[str, Any]]:
    """File and state of the checkpoint at `path`; CheckpointError if it does not fit `run.learn`."""

    def check(state: dict[str, Any]) -> None:
        check_module(run.learn.model, state["model"], "model")
        _check_loss(loss_module(run.learn), state.get("loss"))
        check_opt(run.learn.opt, state["opt"], state.get("opt_class"))

    file, state = checkpoint_file.find(path, check)
    place = state["position"]
    if run.epochs < place["epoch"] + 1:
        raise CheckpointError(
            f"the checkpoint {file} was made in epoch {place['epoch']} (the first is 0), beyond the end of a fit of "
            f"{run.epochs}: epochs counts from the very beginning; that fit had {place['epochs']}"
        )
    _warn_of_callbacks(run, state["callbacks"])
    return file, state


class Resume:
    """The place where a fit begins: its start, or that of a checkpoint's `state`."""

    def __init__(self, run: Any, state: dict[str, Any] | None):
        self.run, self.state = run, state
        self.before_pass: dict[str, Any] | None = None  # random states before the current training pass

    def epochs(self) -> Iterable[int]:
        """The epochs to run. Restores everything, now that `begin_fit` has come."""
        first = 0
        if self.state is not None:
            self._restore(self.state)
            place = self.state["position"]
            first = place["epoch"] + (place["phase"] == "end")
        return range(first, self.run.epochs)

    def batches(self, dl: Any) -> Iterable[tuple[int, Any]]:
        """`enumerate(dl)`; in the training pass that the checkpoint was made in, the rest of it."""
        run = self.run
        if not run.in_train:
            return enumerate(dl)
        state, self.state = self.state, None
        if state is None or state["position"]["phase"] == "end":
            self.before_pass = None if _skips(dl) else _random(run).state_dict()
            return enumerate(dl)
        self._restore(state)  # again: begin_epoch came after the first time
        place = state["position"]
        if place["phase"] == "valid":
            return ()
        done, iters = place["done"], length(dl)
        if iters != place["iters"]:
            raise CheckpointError(
                f"to go on within an epoch its batches must be the same; the checkpoint was made with {place['iters']} "
                f"batches an epoch, the training loader has {iters}: use the same data and batch size, or a checkpoint "
                f"from the end of an epoch"
            )
        self.before_pass = place["before_pass"]
        if _skips(dl):
            dl.load_state_dict(place["loader"])
            return enumerate(dl.iter_from(done), done)
        return enumerate(self._skipped(dl, done, state), done)

    def _restore(self, state: dict[str, Any]) -> None:
        run, place = self.run, state["position"]
        load_module_state(run.learn.model, state)
        if state.get("loss"):
            load_module_state(run.learn.loss_func, state["loss"])
        load_opt_state(run.learn.opt, state["opt"])
        for name, cb in _callbacks(run).items():
            saved = state["callbacks"].get(name)
            if saved is not None and saved["class"] == type(cb).__name__:
                cb.load_state_dict(saved["state"])
        run.epoch, run.n_iter, run.n_epochs = place["epoch"], place["n_iter"], place["n_epochs"]
        _random(run, state["random"]).restore()

    def _skipped(self, dl: Any, done: int, state: dict[str, Any]) -> Iterator[Any]:
        """An iterator over `dl` after `done` batches, begun under the random states of the pass: so the order is the
        same, and samplers and workers have used up the same random numbers."""
        run = self.run
        if getattr(dl, "persistent_workers", False) and run.epoch > 0:
            warnings.warn(
                "workers that outlive an epoch (persistent_workers=True) have random states that no checkpoint holds: "
                "if the data set draws random numbers, the resumed fit draws others",
                stacklevel=2,
            )
        if self.before_pass is not None:
            _random(run, self.before_pass).restore()
        batches = iter(dl)
        if batches is dl:
            warnings.warn(
                f"the training loader is an iterator ({type(dl).__name__}), which cannot begin its epoch again: its "
                f"first {done} batches are skipped, which is right only if it starts where the checkpoint's epoch did",
                stacklevel=2,
            )
        skipped = sum(1 for _ in itertools.islice(batches, done))
        if skipped < done:
            raise CheckpointError(
                f"the checkpoint stands after {done} batches of its epoch, and the training loader gave {skipped}: use "
                f"the same data and batch size"
            )
        _random(run, state["random"]).restore(loaders=False)  # the loaders are where they should be
        return batches


def _skips(dl: Any) -> bool:
    """True if the loader can begin in the middle of an epoch, like `BatchLoader`."""
    return hasattr(dl, "iter_from") and hasattr(dl, "load_state_dict")


def _random(run: Any, saved: dict[str, Any] | None = None) -> RandomState:
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
