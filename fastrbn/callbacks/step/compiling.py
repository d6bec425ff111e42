"""`torch.compile` for the length of a fit."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastrbn.learn.callback import Callback


class CompileCallback(Callback):
    """Compile the model with `torch.compile` for the fit, and restore it afterwards.

    The model stays the same module: names in its state_dict do not change; callbacks, loss function and optimiser run
    uncompiled. The first batch of each kind (training, validation, another shape) waits for the compiler, from some
    seconds to a minute. If the compiler fails, its own error is raised in that batch.

    The compiler includes forward hooks on inner modules where it can follow them. `ActivationStats` works, but breaks
    the graph into parts. `HaltOnNaN` finds faults, but names only `model`, since it cannot look inside.

    Parameters
    ----------
    **compile_args
        Keyword arguments of `torch.compile`: `mode`, `backend`, `dynamic`, `fullgraph`, `options`, `disable`.

    Raises
    ------
    TypeError
        If `torch.compile` does not take one of `compile_args`.
    RuntimeError
        In `begin_fit`, if the model is compiled already.

    Examples
    --------
    >>> compiled = partial(CompileCallback, backend="eager")   # "eager" needs no C compiler
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[compiled])
    >>> run.fit(1, learn)
    >>> any("_orig_mod" in name for name in learn.model.state_dict())
    False
    """

    def __init__(self, **compile_args: Any):
        known = [name for name in inspect.signature(torch.compile).parameters if name != "model"]
        wrong = [name for name in compile_args if name not in known]
        if wrong:
            raise TypeError(
                f"CompileCallback takes the keyword arguments of torch.compile: {', '.join(known)}; got "
                f"{', '.join(wrong)}"
            )
        self.compile_args = compile_args
        self._model: nn.Module | None = None

    def begin_fit(self) -> None:
        model = self.run.model
        if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
            raise RuntimeError(
                f"CompileCallback compiles the model itself, but this {type(model).__name__} is compiled already: pass "
                f"the plain model, or remove CompileCallback"
            )
        # not model.compile(): in torch 2.9 and 2.11 it silently skips modules of torch.nn
        model._compiled_call_impl = torch.compile(_entry(model), **self.compile_args)
        self._model = model

    def after_fit(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            model._compiled_call_impl = None

    def __getstate__(self):
        return {**super().__getstate__(), "_model": None}

    def __repr__(self):
        return f"CompileCallback({', '.join(f'{k}={v!r}' for k, v in self.compile_args.items())})"


def _entry(model: nn.Module) -> Callable:
    """A function that calls `model` with its hooks, and has a code object of its own.

    The compiler counts recompilations per code object, and gives up when too many models share one.
    """

    def call(*args, **kwargs):
        return model._call_impl(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
