"""Learner: what is trained. It outlives the run, and is what you save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import saving
from .unpack import Unpack, loss_name

if TYPE_CHECKING:
    from fastrbn.summary import Summary


class Learner:
    """Model, optimiser, loss and data, together.

    Parameters
    ----------
    model : nn.Module
    opt : torch.optim.Optimizer
        Over the model's parameters.
    loss_func : callable or None
        `loss_func(pred, yb)` returns a scalar tensor. None: the model returns its loss, as a scalar tensor, in `.loss`
        or in `["loss"]`; batches `(x, y)` then go to the model whole if its `forward` takes two arguments.
    data : object
        Has `train_dl` and `valid_dl` (None: no validation): `BatchLoader`s, torch `DataLoader`s, or any iterable of
        batches that can be iterated once per epoch.
    unpack : callable, optional
        `unpack(batch)` returns `(args, kwargs, target)`: the model is called as `model(*args, **kwargs)`, the loss as
        `loss_func(pred, target)`; the target may be None. `run.xb` is the one argument, a tuple of several, or a
        dictionary. By default a batch is understood from the arguments of the model's `forward`:

        - `(x, y)`: `model(x)` and the target y.
        - `((a, b), y)`, or `(a, b, y)` if forward requires two arguments: `model(a, b)`.
        - `({"a": a, "b": b}, y)`, or a dictionary with one more key (y, target, targets, label or labels):
          `model(a=a, b=b)`. A dictionary of one input and a target may name the input as it likes.
        - A tensor, `[x]`, or a dictionary of arguments alone: no target.

    Raises
    ------
    TypeError
        If a class is given in place of an instance; in the fit, if a batch cannot be understood.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    >>> learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, data)
    >>> Runner().fit(1, learn)

    A model of two inputs, with batches that are dictionaries:

    >>> class Pair(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.lin = nn.Linear(6, 2)
    ...     def forward(self, left, right):
    ...         return self.lin(torch.cat([left, right], 1))
    >>> batches = [{"left": torch.randn(4, 3), "right": torch.randn(4, 3), "label": torch.arange(4) % 2}] * 8
    >>> model = Pair()
    >>> learn = Learner(model, optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, DataBunch(batches, None, 2))
    >>> Runner().fit(1, learn)

    References
    ----------
    fast.ai course, part 2 (2019), notebook 04.
    """

    def __init__(
        self,
        model: nn.Module,
        opt: torch.optim.Optimizer,
        loss_func: Callable[..., torch.Tensor] | None,
        data: Any,
        unpack: Callable[[Any], tuple[Any, Any, Any]] | None = None,
    ):
        check_instances(model, opt, loss_func)
        self.model, self.opt, self.loss_func, self.data, self.unpack = model, opt, loss_func, data, unpack
        self.passes = 0  # over the training data, begun by all fits
        Unpack.of(self)  # raises now, and not in the fit, if `unpack` is not a function

    def summary(self, xb: Any = None) -> Summary:
        """Return a table of the model's modules, output shapes, parameters and norms, with totals.

        The model and all random states are left unchanged; see `fastrbn.model_summary`.

        Parameters
        ----------
        xb : optional
            A batch as the model takes it; by default the first of the training data, as it comes from the loader.

        Returns
        -------
        Summary
        """
        return summary(self, xb)

    def save(self, path: str | Path, opt: bool = True) -> Path:
        """Write the weights and the optimiser's state to a file.

        `torch.load(path, weights_only=True)["model"]` is the model's state_dict, also without this package. A loss
        function with parameters or buffers is saved, too. The file is written whole. In several processes rank 0
        writes it, and the others wait until it is there; rank 0 may also save alone. To resume a fit, use `Checkpoint`.

        Parameters
        ----------
        path : str or Path
            Missing folders are created; a file that exists is replaced.
        opt : bool, default True
            False leaves out the optimiser's state, which for Adam is twice the size of the weights.

        Returns
        -------
        Path

        Examples
        --------
        >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn)
        >>> run.fit(1, learn)
        >>> path = learn.save("digits.pt")
        >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn)
        >>> learn.load(path)
        Learner(Sequential, SGD, cross_entropy)

        References
        ----------
        fastai's `Learner.save`.
        """
        return saving.save(self, path, opt)

    def load(self, path: str | Path, opt: bool = True) -> Learner:
        """Load weights, and the optimiser's state if the file has it, into this learner.

        Parameters
        ----------
        path : str or Path
            A file that `save`, `Checkpoint` or `SaveBest` wrote, or another with a state_dict alone or as its `model`.
            Model and optimiser must be made as they were then; tensors go to the devices of those here.
        opt : bool, default True
            False loads the weights alone, for another optimiser. Learning rates belong to its state.

        Returns
        -------
        Learner
            This one.

        Raises
        ------
        CheckpointError
            If the file cannot be read, or is of another model or optimiser; the message names the first differences.
            Nothing is changed then.

        References
        ----------
        fastai's `Learner.load`.
        """
        saving.load(self, path, opt)
        return self

    def __repr__(self) -> str:
        return f"Learner({type(self.model).__name__}, {type(self.opt).__name__}, {loss_name(self.loss_func)})"


def summary(learn: Any, xb: Any = None, cbs: Sequence[Any] = ()) -> Summary:
    """`fastrbn.summary.of_learner`. It is above this room, so it is imported only when called."""
    from fastrbn.summary import of_learner

    return of_learner(learn, xb, cbs)


def check_instances(model: Any, opt: Any, loss_func: Any) -> None:
    """TypeError for a class in place of an instance: calling a loss class would return a module, not a loss."""
    examples = {"model": "{}(…)", "opt": "{}(model.parameters(), lr=0.1)", "loss_func": "{}()"}
    for (name, example), value in zip(examples.items(), (model, opt, loss_func)):
        if isinstance(value, type):
            raise TypeError(
                f"{name} must be an instance; got the class {value.__name__}: write "
                f"{name}={example.format(value.__name__)}"
            )
