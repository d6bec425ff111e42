"""`Learner.save` and `Learner.load`: weights and optimiser state, in the form of a checkpoint's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint_file, ranks
from .checkpoint_file import CheckpointError
from .resume import check_module, check_opt, loss_module
from .snapshot import Snapshot, load_opt_state, load_plain_state_dict, plain_state_dict


def save(learn: Any, path: str | Path, opt: bool) -> Path:
    """See `Learner.save`."""
    state: dict[str, Any] = {"model": plain_state_dict(learn.model)}
    if (loss := loss_module(learn)) is not None:
        state["loss"] = {"model": plain_state_dict(loss)}
    if opt:
        state |= {"opt_class": type(learn.opt).__name__, "opt": learn.opt.state_dict()}
    if Path(path).is_dir():
        raise IsADirectoryError(f"learn.save needs a file; got the folder {path}: add a name, such as weights.pt")
    ranks.in_rank_0(lambda: checkpoint_file.write(path, state), f"learn.save({str(path)!r})")
    return Path(path)


def load(learn: Any, path: str | Path, opt: bool) -> None:
    """See `Learner.load`."""
    state = checkpoint_file.read_weights(path)
    opt = opt and "opt" in state
    if opt:
        try:
            check_opt(learn.opt, state["opt"], state.get("opt_class"))
        except CheckpointError as e:
            raise CheckpointError(f"{e}, or load the weights alone: learn.load({str(path)!r}, opt=False)") from None
    modules = [(learn.model, state["model"], "model")]
    if (loss := loss_module(learn)) is not None and state.get("loss"):
        modules.append((loss, state["loss"]["model"], "loss function"))
    kept = Snapshot([module for module, _, _ in modules])
    try:
        for module, saved, what in modules:
            _load_module(module, saved, what, path)
    except BaseException:
        kept.restore()  # a state_dict that does not fit may be loaded in part
        raise
    if opt:
        load_opt_state(learn.opt, state["opt"])


def _load_module(module: nn.Module, saved: dict[str, Any], what: str, path: str | Path) -> None:
    """Load as strictly as the layers do; CheckpointError with the first differences."""
    try:
        load_plain_state_dict(module, saved)
    except (RuntimeError, TypeError) as e:
        try:
            check_module(module, saved, what)
        except CheckpointError as differences:
            raise CheckpointError(f"{path} cannot be loaded: {differences}") from e
        raise CheckpointError(f"{path} does not fit the {what}: {e}") from e
