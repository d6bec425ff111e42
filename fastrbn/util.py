"""Small helpers for every room: error messages, checks of arguments, nested tensors, files, and frozen norms.

Imports neither torch nor anything else of the package, so that `fastrbn --help` is quick.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import fnmatch
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]  # a module where it exists


def suggestion(name: object, known: Iterable[str], form: str = " Did you mean '{}'?") -> str:
    """A sentence naming the closest of `known`, case ignored; empty if none is close. Ends an error message."""
    near = nearest(name, known)
    return "" if near is None else form.format(near)


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The closest of `known`, case ignored; None if no similarity (0 to 1) reaches `cutoff`."""
    by_lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[near[0]] if near else None


def one_of(what: str, value: Any, allowed: Iterable[str]) -> Any:
    """Return `value` if it is one of `allowed`; otherwise raise a ValueError that suggests the closest."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}; got {value!r}.{suggestion(value, allowed)}")
    return value


def whole(what: str, value: Any, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`, else raise a ValueError. Booleans are no integers."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{what} must be a whole number, {least} or more; got {value!r}")
    return number


def is_number(value: object, kind: type = numbers.Real) -> bool:
    """Whether `value` is a number of that kind. Booleans are not numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def items_of(value: Any, kind: type | tuple[type, ...]) -> Iterator[Any]:
    """Every instance of `kind` in nested lists, tuples, dictionaries and dataclasses, in order.

    >>> list(items_of({"a": 1, "b": [2, (3.0,)]}, int))
    [1, 2]
    """
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from items_of(item, kind)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from items_of(getattr(value, field.name), kind)


def torchvision_parts(tfm: Any) -> list[Any]:
    """torchvision's transforms in `tfm`: itself, or inside what contains it. Empty for other functions."""
    own = any(c.__module__.startswith("torchvision.transforms") for c in type(tfm).__mro__)
    inner = [*getattr(tfm, "transforms", ()), *getattr(tfm, "_modules", {}).values()]
    return [tfm] * own + [part for t in inner for part in torchvision_parts(t)]


def apply_to(value: Any, kind: type | tuple[type, ...], function: Callable[[Any], Any]) -> Any:
    """Copy nested lists, tuples (named ones too), dictionaries and dataclasses with `function` applied to instances of
    `kind`.

    >>> apply_to({"a": 1, "b": [2, ("c",)]}, int, float)
    {'a': 1.0, 'b': [2.0, ('c',)]}
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        items = copy.copy(value)  # a defaultdict, or another class with more than its items
        for k, v in value.items():
            items[k] = apply_to(v, kind, function)
        return items
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(apply_to(v, kind, function) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(apply_to(v, kind, function) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, apply_to(getattr(value, field.name), kind, function))
        return made
    return value


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path` whole or not at all; missing folders are made.

    It is written under a temporary name beside `path` and then renamed, so that readers see the old file or the new
    one.
    """
    with whole_file(path) as f:
        f.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` if the block ends without an error, for what is too large for `write_whole`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # otherwise a power cut may leave an empty file under the new name
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno is not None and e.filename is None:
            e.filename = str(path)  # a full disk does not name the file
        raise


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Lock `folder` until the block or the process ends, even by kill -9. BlockingIOError if another process has it.

    File systems without locks (some network ones) lock nothing.
    """
    fd = None
    try:
        if fcntl is not None:
            fd = os.open(folder, os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        if fd is not None:
            os.close(fd)
        raise BlockingIOError(
            f"another process is at work in {folder}: wait for its end, or take another folder with --out"
        ) from e
    except OSError:
        pass
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name, or something that it lies in, matches a pattern of `fnmatch`.

    >>> matches("body.0.weight", "body"), matches("body.0.weight", "*.weight"), matches("body2.bias", "body")
    (True, True, False)
    """
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def unmatched(what: str, patterns: Iterable[Any], names: Iterable[str]) -> str | None:
    """A message about the first pattern that matches none of the dotted names, with the closest; None if all match."""
    names = list(names)
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(matches(name, pattern) for name in names):
            parts = [name.split(".") for name in names]
            known = list(dict.fromkeys(".".join(part[:n]) for n in (1, 2, 3, 4, 5) for part in parts if n <= len(part)))
            tops = ", ".join(list(dict.fromkeys(part[0] for part in parts))[:8])
            more = suggestion(pattern, [*known, *names]) or f" At the top it has {tops}."
            return f"{what}: {pattern!r} matches no name of a parameter or module of the model.{more}"
    return None


# A running batch norm has a switch. PyTorch's norms have none, and train() would end their evaluation mode, so they
# change to it for each forward pass.


def statistics_are_fixed(norm: Any) -> bool:
    """Whether a norm normalises by its running statistics in training mode too."""
    return getattr(norm, "frozen", False) or _evaluate in norm._forward_pre_hooks.values()


def fix_statistics(norm: Any) -> None:
    """Make a norm normalise by its running statistics in training mode too, and leave them as they are."""
    if hasattr(norm, "unfreeze"):
        norm.freeze()
    elif not statistics_are_fixed(norm):
        norm.register_forward_pre_hook(_evaluate)
        norm.register_forward_hook(_put_back)


def release_statistics(norm: Any) -> None:
    """Undo `fix_statistics`."""
    if hasattr(norm, "unfreeze"):
        norm.unfreeze()
    for table in (norm._forward_pre_hooks, norm._forward_hooks):  # convert_batchnorm takes them to a running batch norm
        for key in [key for key, hook in table.items() if hook in (_evaluate, _put_back)]:
            del table[key]
    if "_trains" in vars(norm):  # its forward pass has raised an error
        _put_back(norm)


def _evaluate(norm: Any, *args: Any) -> None:
    vars(norm).setdefault("_trains", norm.training)
    norm.training = False


def _put_back(norm: Any, *args: Any) -> None:
    norm.training = vars(norm).pop("_trains")
