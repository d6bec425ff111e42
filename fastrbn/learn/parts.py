"""The parts of a training step that a callback may take over for a fit: forward, weigh, backward, step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrbn.util import suggestion


def forward(function: Callable[..., Any], *args: Any) -> Any:
    """Call the model with the batch, or the loss function with prediction and target."""
    return function(*args)


def weigh(loss: Any) -> Any:
    """Return the loss to differentiate; `run.loss` stays what the loss function returned."""
    return loss


def backward(loss: Any) -> None:
    """Leave gradients in the parameters."""
    loss.backward()


def step(opt: Any) -> None:
    """Move the parameters."""
    opt.step()


PLAIN: dict[str, Callable[..., Any]] = {"forward": forward, "weigh": weigh, "backward": backward, "step": step}
_JOINED = ("weigh",)  # weights multiply, so callbacks of several classes may each have one


class Parts:
    """The functions that the loop calls. `claims` has the owner's name for each part that a callback has taken over."""

    __slots__ = ("backward", "claims", "forward", "step", "weigh")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.claims: dict[str, str] = {}
        self.forward: Callable[..., Any] = forward
        self.weigh: Callable[..., Any] = weigh
        self.backward: Callable[..., Any] = backward
        self.step: Callable[..., Any] = step

    def claim(self, owner: str, functions: dict[str, Callable[..., Any]]) -> None:
        """Take over all of `functions` or none; see `Runner.claim`."""
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
                    f"already: remove one of the two"
                )
        for name, function in functions.items():
            taken = self.claims.get(name)
            setattr(self, name, function if taken is None else _both(getattr(self, name), function))
            self.claims[name] = owner if taken is None else f"{taken}, {owner}"

    def wrap(self, functions: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """Put `functions` in the place of parts, claimed or not, and return the functions that were there."""
        inner = {name: getattr(self, name) for name in functions}
        for name, function in functions.items():
            setattr(self, name, function)
        return inner


def _both(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    return lambda loss: second(first(loss))
