"""Callbacks by name, built-in ones and plug-ins, for `--cb NAME[:ARG=VALUE,…]` and `fastrbn callbacks`."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrbn import callbacks as built_in_package
from fastrbn.callbacks import JSONLLogger, SaveBest
from fastrbn.learn import Callback
from fastrbn.util import suggestion

from .options import BAD_ARGUMENTS, CliError

GROUP = "fastrbn.callbacks"
IN_THE_FOLDER = {SaveBest: "best.pt", JSONLLogger: "history.jsonl"}  # where they write in a run's, unless path is given


def built_in() -> dict[str, type[Callback]]:
    """The built-in callbacks by class name."""
    public = (getattr(built_in_package, name) for name in built_in_package.__all__)
    return {c.__name__: c for c in public if inspect.isclass(c) and issubclass(c, Callback) and c is not Callback}


def plug_ins() -> dict[str, importlib.metadata.EntryPoint]:
    """The installed plug-ins' entry points by name, not loaded, so that a broken one harms only its users.

    This package registers its own callbacks in the same group; they are left out.
    """
    points = importlib.metadata.entry_points(group=GROUP)
    return {point.name: point for point in points if point.value.partition(":")[0] != "fastrbn.callbacks"}


def make_callback(spec: str) -> Callback:
    """The callback that `NAME[:ARG=VALUE,…]` describes. CliError for an unknown name or wrong arguments."""
    name, _, rest = spec.partition(":")
    factory = _find(name.strip(), spec)
    kwargs, several = _arguments(rest, spec), ()
    signature = _signature(factory)
    for p in signature.parameters.values():
        if p.kind is p.VAR_POSITIONAL and p.name in kwargs:  # patterns=('stem', 'body') of Freeze
            value = kwargs.pop(p.name)
            several = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    try:
        signature.bind(*several, **kwargs)
    except TypeError as e:
        unknown = [k for k in kwargs if k not in signature.parameters]
        hint = suggestion(unknown[0], signature.parameters) if unknown else ""
        raise CliError(f"--cb {spec}: {e}; {name} takes {_takes(signature)}.{hint}", BAD_ARGUMENTS) from None
    try:
        made = factory(*several, **kwargs)
    except (TypeError, ValueError, OSError) as e:
        raise CliError(f"--cb {spec}: {e}", BAD_ARGUMENTS) from e
    except (Exception, SystemExit) as e:
        raise CliError(f"--cb {spec}: {name} cannot be made: {_describe(e)}") from e
    if not isinstance(made, Callback):
        raise CliError(f"--cb {spec}: a callback derives from fastrbn.Callback; {name} made a {type(made).__name__}")
    return made


def outside(spec: str, folder: Path) -> str | None:
    """The reason why the callback of `spec` may reach outside `folder`, or None if it cannot.

    A built-in callback cannot if its files lie there; a plug-in cannot if no argument is text, which could be a path.
    """
    name, _, rest = spec.partition(":")
    factory, kwargs = _built_in(name.strip()), _arguments(rest, spec)
    if factory is None:
        return "gives text to a plug-in" if _text_in([*kwargs.values()]) else None
    default = None if factory in IN_THE_FOLDER else inspect.signature(factory).parameters.get("path")
    path = kwargs.get("path", None if default is None else default.default)
    if path in (None, inspect.Parameter.empty):
        return None
    inside = isinstance(path, str) and "\0" not in path and Path(path).resolve().is_relative_to(folder.resolve())
    return None if inside else f"writes to {path}, which is outside {folder}"


def gives(spec: str, name: str) -> bool:
    """Whether `spec` gives the argument `name` a value."""
    return name in _arguments(spec.partition(":")[2], spec)


def listing() -> list[str]:
    """The lines of `fastrbn callbacks`: every callback, its arguments and the first line of its docstring."""
    lines = ["Built in:"]
    for name, cls in sorted(built_in().items()):
        lines += _entry(name, cls)
    points = plug_ins()
    lines += ["", f"Plug-ins (entry points of the group {GROUP}):"] if points else ["", "Plug-ins: none installed"]
    for name, point in sorted(points.items()):
        try:
            lines += _entry(name, _load(point))
        except CliError as e:
            lines.append(f"  {e}")
    return lines


def _find(name: str, spec: str) -> Callable[..., Any]:
    if (cls := _built_in(name)) is not None:
        return cls
    known, points = built_in(), plug_ins()
    if name in points:
        return _load(points[name])
    names = [*sorted(known), *sorted(points)]
    raise CliError(
        f"--cb {spec}: there is no callback '{name}'.{suggestion(name, names)} There are: {', '.join(names)}",
        BAD_ARGUMENTS,
    )


def _built_in(name: str) -> type[Callback] | None:
    return {form: cls for cls_name, cls in built_in().items() for form in _forms(cls_name)}.get(_plain(name))


def _text_in(value: Any) -> bool:
    """Whether a literal contains text: in a container, or as bytes."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple, set)):
        return any(map(_text_in, value))
    return isinstance(value, (str, bytes))


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _forms(cls_name: str) -> tuple[str, str]:
    """AvgStatsCallback goes by that name, avg_stats_callback, AvgStats and avg_stats."""
    return _plain(cls_name), _plain(cls_name.removesuffix("Callback"))


def _load(point: Any) -> Callable[..., Any]:
    """Load an entry point. A plug-in may raise anything: the error names it."""
    dist = f" of {point.dist.name} {point.dist.version}" if getattr(point, "dist", None) else ""
    try:
        loaded = point.load()
    except (Exception, SystemExit) as e:
        raise CliError(f"the plug-in '{point.name}' ({point.value}{dist}) cannot be loaded: {_describe(e)}") from e
    if not callable(loaded):
        raise CliError(f"the plug-in '{point.name}' ({point.value}{dist}) must be a callback class; it is {loaded!r}")
    return loaded


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    """Names and defaults of what `factory` takes; its annotations are not for a terminal."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some callables have none; they check their arguments themselves
        signature = inspect.signature(lambda **kwargs: None)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=bare, return_annotation=signature.empty)


def _arguments(text: str, spec: str) -> dict[str, Any]:
    """`every=5,stats=('max','rms')` as a dictionary. Values that are not Python literals are text."""
    kwargs: dict[str, Any] = {}
    for part in _split(text):
        name, equals, value = (s.strip() for s in part.partition("="))
        if not equals or not name.isidentifier():
            raise CliError(
                f"--cb {spec}: arguments are written ARG=VALUE, separated by commas; got '{part}'", BAD_ARGUMENTS
            )
        if name in kwargs:
            raise CliError(f"--cb {spec}: '{name}' is given twice", BAD_ARGUMENTS)
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = value
    return kwargs


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for ch in text:
        if quote:
            quote = "" if ch == quote else quote
        elif ch in "'\"":
            quote = ch
        depth += 0 if quote else (ch in "([{") - (ch in ")]}")
        if ch == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += ch
    return [part for part in parts if part.strip()]


def _takes(signature: inspect.Signature) -> str:
    return ", ".join(str(p) for p in signature.parameters.values()) or "no arguments"


def _entry(name: str, factory: Callable[..., Any]) -> list[str]:
    """A line with name and arguments, and one with the start of the docstring."""
    takes = ", ".join(map(str, _signature(factory).parameters.values()))
    doc = (inspect.getdoc(factory) or "").strip()
    return [f"  {name}({takes})", *([f"      {doc.splitlines()[0]}"] if doc else [])]
