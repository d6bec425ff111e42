"""From a batch to the model's arguments and the target, and to the calls of model and loss function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

_TARGETS = ("y", "target", "targets", "label", "labels")  # keys of dictionaries that hold the target
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Unpack:
    """How a learner's batches become `xb`, `yb`, prediction and loss.

    `xb` is the model's one argument, a tuple of several positional ones, or a dictionary of keyword arguments. With
    both kinds it is a tuple of these two. `form` says which, for the last batch.

    Parameters
    ----------
    model : nn.Module
        The names and number of the arguments of its `forward` decide how a batch is understood.
    function : callable, optional
        The learner's `unpack`, which then decides instead.
    own_loss : bool, default False
        True if there is no loss function: the model returns its loss, and may take the target as an argument.
    """

    def __init__(self, model: nn.Module, function: Callable[[Any], Any] | None = None, own_loss: bool = False):
        if function is not None and not callable(function):
            raise TypeError(f"unpack must be a function of the batch, or None; got {function!r}")
        self.function, self.own_loss, self.form = function, own_loss, "one"
        self.required, self.most, self.first, self.names, self.any_name = _arguments(model)
        self._plain = function is None and self.required < 2 and not (own_loss and self.most > 1)

    @classmethod
    def of(cls, learn: Any) -> Unpack:
        """For the batches of a learner."""
        return cls(learn.model, getattr(learn, "unpack", None), learn.loss_func is None)

    def __call__(self, batch: Any) -> tuple[Any, Any]:
        """`xb` and `yb`; `yb` is None if the batch has no target. TypeError if the batch cannot be understood."""
        if self._plain and isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], torch.Tensor):
            self.form = "one"
            return batch[0], batch[1]
        if self.function is not None:
            return self._by_function(batch)
        if isinstance(batch, Mapping):
            return self._by_name(dict(batch))
        if isinstance(batch, (tuple, list)) and batch:
            return self._by_place(batch)
        if isinstance(batch, torch.Tensor):
            self.form = "one"
            return batch, None
        raise self._not_understood(batch)

    def inputs(self, xb: Any) -> Any:
        """`xb` with its form set, for inputs that come without a target."""
        if isinstance(xb, Mapping) and self._takes_names(xb):
            self.form = "kwargs"
            return dict(xb)
        several = isinstance(xb, (tuple, list)) and len(xb) > 1 and self.required <= len(xb) <= self.most
        self.form = "args" if several else "one"
        return tuple(xb) if several else xb

    def call_model(self, model: Any, xb: Any, forward: Callable[..., Any] | None = None) -> Any:
        """The prediction. `forward(function, *args)` makes the call."""
        if isinstance(xb, torch.Tensor):  # the usual case; or a callback has joined several inputs
            return model(xb) if forward is None else forward(model, xb)
        if self.form == "one" or not isinstance(xb, (tuple, list, dict)):
            args, kwargs = (xb,), {}
        else:
            args, kwargs = {"args": (xb, {}), "kwargs": ((), xb), "both": xb}[self.form]
        function = functools.partial(model, **kwargs) if kwargs else model
        return function(*args) if forward is None else forward(function, *args)

    def call_loss(self, loss_func: Any, pred: Any, yb: Any, forward: Callable[..., Any]) -> Any:
        """The loss of a batch; the model's own if there is no loss function, or no target to call it with."""
        if loss_func is not None and yb is not None:
            loss = forward(loss_func, pred, yb)
            if not isinstance(loss, torch.Tensor):
                raise TypeError(f"loss_func must return a scalar tensor; {loss_name(loss_func)} returned {_kind(loss)}")
            return loss
        cause = None
        if loss_func is not None:
            try:  # it may do without a target
                return forward(loss_func, pred, None)
            except (TypeError, AttributeError) as e:
                cause = e
        loss = _carried_loss(pred)
        if loss is None:
            raise TypeError(_no_loss(loss_func, pred)) from cause
        return loss

    def _by_function(self, batch: Any) -> tuple[Any, Any]:
        assert self.function is not None
        made = self.function(batch)
        fits = isinstance(made, (tuple, list)) and len(made) == 3
        if not fits or not isinstance(made[0], (tuple, list)) or not isinstance(made[1], Mapping):
            got = f"({', '.join(type(v).__name__ for v in made)})" if isinstance(made, (tuple, list)) else _kind(made)
            raise TypeError(
                f"unpack must return (args, kwargs, target): a tuple of the model's positional arguments, a dictionary "
                f"of its keyword arguments, and the target or None; got {got}: write, for example, "
                f"unpack=lambda batch: ((batch[0],), {{}}, batch[1])"
            )
        args, kwargs, yb = tuple(made[0]), dict(made[1]), made[2]
        if not args and not kwargs:
            raise TypeError("unpack must give the model at least one argument; got no args and no kwargs")
        if args and kwargs:
            self.form = "both"
            return (args, kwargs), yb
        self.form = "kwargs" if kwargs else "one" if len(args) == 1 else "args"
        return (kwargs if kwargs else args[0] if len(args) == 1 else args), yb

    def _by_place(self, batch: Any) -> tuple[Any, Any]:
        *inputs, last = batch
        n = len(inputs)
        if n == 0:
            return self.inputs(last), None
        nested = n == 1 and isinstance(inputs[0], (tuple, list, Mapping))
        # the model asks for all of it: several inputs without a target, or, with a loss of its own, the target too
        if not nested and (self.required == n + 1 or (self.own_loss and self.required <= n + 1 <= self.most)):
            self.form = "args"
            return tuple(batch), None
        if n == 1:
            return self.inputs(inputs[0]), last
        if self.required == n:
            self.form = "args"
            return tuple(inputs), last
        raise self._not_understood(batch)

    def _by_name(self, batch: dict[Any, Any]) -> tuple[Any, Any]:
        left = [k for k in batch if not self._takes_names((k,)) or (k in _TARGETS and k not in self.names)]
        target = next((k for k in left if k in _TARGETS), None)
        inputs = {k: v for k, v in batch.items() if k != target}
        name = next(iter(inputs), None)
        alone = len(inputs) == 1 and self.most > 0 and self.required < 2
        if alone and (name == self.first or (target and name not in self.names)):
            return self.inputs(inputs[name]), batch.get(target)  # one input, which may have any name beside a target
        if inputs and set(left) <= {target}:
            self.form = "kwargs"
            return inputs, batch.get(target)
        raise self._not_understood(batch)

    def _takes_names(self, names: Any) -> bool:
        return all(isinstance(name, str) and (self.any_name or name in self.names) for name in names)

    def _not_understood(self, batch: Any) -> TypeError:
        known = f"forward takes {', '.join(sorted(self.names))}" if self.names else "forward names no arguments"
        if isinstance(batch, dict) and batch:
            keys = list(batch)
            example = f"((batch[{keys[0]!r}],), {{}}, batch[{keys[-1]!r}])"
        elif isinstance(batch, (tuple, list)) and len(batch) > 2:
            example = "((batch[0], batch[1]), {}, batch[2])"
        else:
            example = "((batch[0],), {}, batch[1])"
        return TypeError(
            f"a loader must yield pairs (xb, yb), ((a, b), yb) for a model of several inputs, or a dictionary with the "
            f"names of the model's arguments and a target ({', '.join(_TARGETS)}); got {_kind(batch)}, and the model's "
            f"{known}: give the learner unpack=, a function of the batch that returns (args, kwargs, target), for "
            f"example Learner(…, unpack=lambda batch: {example})"
        )


def _arguments(model: Any) -> tuple[int, float, str | None, set[str], bool]:
    """Of the model's `forward`: how many arguments it requires, and takes by position; the first one's name; all names;
    whether it takes any name."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    try:
        parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters.values()
    except (TypeError, ValueError):  # scripted and other modules without a signature
        return 1, 1, None, set(), False
    empty, kinds = inspect.Parameter.empty, {p.kind for p in parameters}
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    most = float("inf") if inspect.Parameter.VAR_POSITIONAL in kinds else len(positional)
    names = {p.name for p in parameters if p.kind in _NAMED}
    first = positional[0].name if positional else None
    return sum(p.default is empty for p in positional), most, first, names, inspect.Parameter.VAR_KEYWORD in kinds


def _carried_loss(pred: Any) -> torch.Tensor | None:
    """The loss that a model returns: a scalar, `.loss`, `["loss"]`, or the one scalar of a tuple."""
    if isinstance(pred, Mapping):
        found = [pred["loss"]] if "loss" in pred else []
    elif hasattr(pred, "loss"):
        found = [pred.loss]
    else:
        found = list(pred) if isinstance(pred, (tuple, list)) else [pred]
    scalars = [v for v in found if isinstance(v, torch.Tensor) and v.dim() == 0 and v.is_floating_point()]
    return scalars[0] if len(scalars) == 1 else None


def loss_name(loss_func: Any) -> str:
    """A loss function's name in words."""
    if loss_func is None:
        return "the model's own"
    return getattr(loss_func, "__name__", type(loss_func).__name__)


def _no_loss(loss_func: Any, pred: Any) -> str:
    if loss_func is None:
        name = "there is no loss function (loss_func=None)"
    else:
        name = f"the batch has no target, which {loss_name(loss_func)} cannot do without"
    return (
        f"{name}, so the model must return its loss, as a scalar tensor, in `.loss` or in ['loss']; its output is "
        f"{_kind(pred)}: give the learner a loss_func, let the loader yield pairs (xb, yb), or name the target with "
        f"Learner(…, unpack=lambda batch: (args, kwargs, target))"
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dictionary with {', '.join(map(repr, value))}"
    return f"{type(value).__name__}{f' of {len(value)}' if isinstance(value, (tuple, list)) else ''}"
