"""Learner: what is trained. It outlives the run, and is what you save."""

from __future__ import annotations


class Learner:
    """Model, optimiser, loss and data, together.

    - `model`: an `nn.Module`.
    - `opt`: a `torch.optim.Optimizer` over its parameters.
    - `loss_func(pred, yb)`: returns a scalar tensor.
    - `data`: has `train_dl` and `valid_dl` (None: no validation), loaders that yield `(xb, yb)`: `BatchLoader`s, torch
      `DataLoader`s, or any iterable of pairs that can be iterated once an epoch.

    Source: fast.ai course, part 2 (2019), notebook 04.
    """

    def __init__(self, model, opt, loss_func, data):
        check_instances(model, opt, loss_func)
        self.model, self.opt, self.loss_func, self.data = model, opt, loss_func, data

    def summary(self, xb=None):
        """A table of the model's modules, output shapes, parameters and norms, and totals: a `Summary`, to print.

        `xb`: a batch as the model takes it; None: the first of the training data, as it comes from the loader. The
        model and all random states are afterwards what they were. See `fastrbn.model_summary`.
        """
        return summary(self, xb)

    def __repr__(self):
        loss = getattr(self.loss_func, "__name__", type(self.loss_func).__name__)
        return f"Learner({type(self.model).__name__}, {type(self.opt).__name__}, {loss})"


def summary(learn, xb=None, cbs=()):
    """`fastrbn.summary.of_learner`, which stands above this room and is imported only when called."""
    from fastrbn.summary import of_learner

    return of_learner(learn, xb, cbs)


def check_instances(model, opt, loss_func) -> None:
    """TypeError for a class in place of what it makes: calling it would give a module and not a loss."""
    examples = {"model": "{}(…)", "opt": "{}(model.parameters(), lr=0.1)", "loss_func": "{}()"}
    for (name, example), value in zip(examples.items(), (model, opt, loss_func)):
        if isinstance(value, type):
            raise TypeError(
                f"{name} must be an instance; got the class {value.__name__}: write "
                f"{name}={example.format(value.__name__)}"
            )
