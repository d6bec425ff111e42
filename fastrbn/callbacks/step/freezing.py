"""Freeze parts of a model, by name, until they should be trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastrbn.learn.callback import Callback
from fastrbn.learn.snapshot import plain_name
from fastrbn.util import fix_statistics, matches, release_statistics, statistics_are_fixed, unmatched, whole


def freeze(model: nn.Module, *patterns: str) -> nn.Module:
    """Stop the training of parameters by name, in place, and fix the running statistics of norms among them.

    Frozen parameters get no gradient, and neither steps nor weight decay move them. A norm with running statistics
    whose parameters and buffers all match normalises by these statistics from then on, also after `model.train()`:
    statistics that keep moving would change the output of the frozen part. To train the norms of a frozen part, as
    fastai does, unfreeze them again.

    Parameters
    ----------
    model : nn.Module
        Any model. An optimiser may be made before or after.
    *patterns : str
        Names of parameters or modules (`body` covers all that is in it), with the wildcards of `fnmatch`: `*` stands
        for anything, dots included. By default the whole model.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    TypeError, ValueError
        If `model` is not a module, or a pattern matches nothing; then nothing is changed.

    Examples
    --------
    >>> model = freeze(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), "[01]")
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['2.weight', '2.bias']
    >>> model = unfreeze(model, "1")   # train the norm of the frozen part
    """
    _set_frozen(True, *_find("freeze", model, patterns))
    return model


def unfreeze(model: nn.Module, *patterns: str) -> nn.Module:
    """Undo `freeze`, in place.

    Parameters
    ----------
    model : nn.Module
        Any model.
    *patterns : str
        As in `freeze`; by default the whole model.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    TypeError, ValueError
        If `model` is not a module, or a pattern matches nothing; then nothing is changed.

    Examples
    --------
    >>> model = freeze(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    >>> [p.requires_grad for p in unfreeze(model, "1").parameters()]
    [False, False, True, True]
    """
    _set_frozen(False, *_find("unfreeze", model, patterns))
    return model


class Freeze(Callback):
    """Freeze parts of the model for the first epochs of each fit, as `freeze` does, and train them from then on.

    Afterwards, also after an error, whatever this callback has frozen can be trained again. Parts that were frozen
    before the fit stay so. Several of these callbacks can unfreeze a model part by part.

    Parameters
    ----------
    *patterns : str
        Names of parameters or modules, as in `freeze`; at least one.
    until : int, optional
        Number of the first epoch, from 0, in which they are trained, 1 or more. By default they stay frozen for the
        whole fit.

    Raises
    ------
    ValueError
        If an argument is out of range; in the fit, if a pattern matches nothing, nothing is left to train, or the
        optimiser has nothing of what is to be trained later.

    Examples
    --------
    >>> frozen = partial(Freeze, "0", "1", until=1)
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[frozen])
    >>> run.fit(2, learn)   # the first epoch without, the second with the layers 0 and 1
    """

    def __init__(self, *patterns: str, until: int | None = None):
        if not patterns or not all(isinstance(p, str) for p in patterns):
            raise ValueError(
                f"Freeze needs names of parameters or modules, such as Freeze('body', until=3); got {patterns!r}"
            )
        self.patterns = patterns
        self.until = None if until is None else whole("Freeze: until, the first epoch in which they train,", until)
        self._params: list[nn.Parameter] = []
        self._norms: list[nn.Module] = []

    def begin_fit(self) -> None:
        params, norms = _find("Freeze", self.run.learn.model, self.patterns)
        self._params = [p for p in params if p.requires_grad]
        self._norms = [m for m in norms if not statistics_are_fixed(m)]
        trained = {p for group in getattr(self.run.opt, "param_groups", ()) for p in group["params"]}
        if self.until is not None and self._params and trained and trained.isdisjoint(self._params):
            raise ValueError(
                f"{self!r}: the optimiser has none of these parameters and would not train them then: make it with all "
                f"of the model's"
            )

    def begin_epoch(self) -> None:
        _set_frozen(self.until is None or self.run.epoch < self.until, self._params, self._norms)
        if not any(p.requires_grad for p in self.run.learn.model.parameters()):
            raise ValueError(f"{self!r} leaves no parameter to train: name a part of the model only")

    def after_fit(self) -> None:
        _set_frozen(False, self._params, self._norms)
        self._params, self._norms = [], []

    def state_dict(self) -> dict:
        """What is frozen, so that a fit resumed without this callback warns: there it would stay frozen."""
        return {"patterns": list(self.patterns), "until": self.until}

    def load_state_dict(self, state: dict) -> None:
        """The arguments of this callback count."""

    def __getstate__(self):
        return {**super().__getstate__(), "_params": [], "_norms": []}

    def __repr__(self):
        until = "" if self.until is None else f", until={self.until}"
        return f"Freeze({', '.join(map(repr, self.patterns))}{until})"


def _set_frozen(frozen: bool, params: list[nn.Parameter], norms: list[nn.Module]) -> None:
    for p in params:
        p.requires_grad_(not frozen)
        if frozen:
            p.grad = None  # a gradient that has been kept would still move it
    for m in norms:
        fix_statistics(m) if frozen else release_statistics(m)


def _find(what: str, model: Any, patterns: tuple[str, ...]) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """The parameters that match, and the norms with statistics of which all parameters and buffers match."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} needs an nn.Module; got {model!r} of type {type(model).__name__}")
    params = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    names = [*params, *(plain_name(name) for name, _ in model.named_buffers(remove_duplicate=False))]
    if message := unmatched(what, patterns, names):
        raise ValueError(message)
    chosen = {name for name in names if not patterns or any(matches(name, p) for p in patterns)}
    norms: list[nn.Module] = []
    for prefix, m in model.named_modules():
        own = [name for name, t in (*m._parameters.items(), *m._buffers.items()) if t is not None]
        inside = all(plain_name(f"{prefix}.{name}".lstrip(".")) in chosen for name in own)
        if inside and isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None:
            norms.append(m)
    return list({id(p): p for name, p in params.items() if name in chosen}.values()), norms
