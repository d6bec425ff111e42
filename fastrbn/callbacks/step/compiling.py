"""torch.compile for the length of a fit."""

from __future__ import annotations

import inspect
import types

import torch

from fastrbn.learn.callback import Callback


class CompileCallback(Callback):
    """Compiles the model for the fit, and gives it back as it was.

    - `compile_args`: of `torch.compile`, by name: `mode`, `backend`, `dynamic`, `fullgraph`, `options`, `disable`.

    The model stays the same module: names in its state_dict do not change, and events, loss function and optimiser
    run as ever. The first batch of each kind (training, validation, another shape) waits for the compiler: some
    seconds up to a minute. What the compiler cannot do is its own error, in the first batch.

    Forward hooks on modules inside are compiled along where the compiler can follow them; `ActivationStats` works, and
    costs breaks in the graph. `HaltOnNaN` finds faults as ever, but does not look into the model: it names `model`.
    """

    def __init__(self, **compile_args):
        known = [name for name in inspect.signature(torch.compile).parameters if name != "model"]
        wrong = [name for name in compile_args if name not in known]
        if wrong:
            raise TypeError(
                f"CompileCallback takes what torch.compile takes by name: {', '.join(known)}; got {', '.join(wrong)}"
            )
        self.compile_args, self._model = compile_args, None

    def begin_fit(self):
        model = self.run.model
        if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
            raise RuntimeError(
                f"CompileCallback compiles the model for the fit, and this {type(model).__name__} is compiled already: "
                f"give the plain model, or leave CompileCallback out"
            )
        # not model.compile: in torch 2.9 and 2.11 that compiles no module of torch.nn, and does not say so
        model._compiled_call_impl = torch.compile(_entry(model), **self.compile_args)
        self._model = model

    def after_fit(self):
        model, self._model = self._model, None
        if model is not None:
            model._compiled_call_impl = None

    def __getstate__(self):
        return {**super().__getstate__(), "_model": None}

    def __repr__(self):
        return f"CompileCallback({', '.join(f'{k}={v!r}' for k, v in self.compile_args.items())})"


def _entry(model):
    """What calling the model runs, hooks included, as a function with code of its own: the compiler counts what it compiles
    anew by code, and gives up at some number of models that share it."""

    def call(*args, **kwargs):
        return model._call_impl(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
