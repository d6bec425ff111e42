"""The parts of a training step that a callback may take over for a fit: forward, weigh, backward, step."""

from __future__ import annotations

from fastrbn.util import suggestion


def forward(function, *args):
    """Calls the model with the batch, and the loss function with prediction and target."""
    return function(*args)


def weigh(loss):
    """The loss to differentiate; `run.loss` stays what the loss function gave."""
    return loss


def backward(loss):
    """Leaves gradients in the parameters."""
    loss.backward()


def step(opt):
    """Moves the parameters."""
    opt.step()


PLAIN = {"forward": forward, "weigh": weigh, "backward": backward, "step": step}
_JOINED = ("weigh",)  # weights multiply: callbacks of several classes may each have one


class Parts:
    """What the loop calls, and who has taken it over. `claims` has the owner's name for each part that is not plain."""

    __slots__ = ("backward", "claims", "forward", "step", "weigh")

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.claims = {}
        for name, function in PLAIN.items():
            setattr(self, name, function)

    def claim(self, owner: str, functions: dict) -> None:
        """All of `functions` or none. See `Runner.claim`."""
        for name, function in functions.items():
            if name not in PLAIN:
                raise ValueError(
                    f"the parts of a step are {', '.join(PLAIN)}; {owner} claims '{name}'.{suggestion(name, PLAIN)}"
                )
            if not callable(function):
                raise TypeError(f"{owner} claims '{name}' of the step and must give a function; got {function!r}")
            taken = self.claims.get(name)
            if taken and (name not in _JOINED or owner in taken.split(", ")):
                raise RuntimeError(
                    f"each part of a step belongs to one callback; {owner} claims '{name}', which {taken} has "
                    f"already: leave one of the two out"
                )
        for name, function in functions.items():
            taken = self.claims.get(name)
            setattr(self, name, function if taken is None else _both(getattr(self, name), function))
            self.claims[name] = owner if taken is None else f"{taken}, {owner}"


def _both(first, second):
    return lambda loss: second(first(loss))
