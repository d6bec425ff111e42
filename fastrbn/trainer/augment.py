"""The transforms that `--augment NAME,…` names: ours, torchvision's, and those that a function of the user makes."""

from __future__ import annotations

from typing import Any

from fastrbn.data import RandomCrop, RandomFlip

from .nets import told, users_function


def transforms(names: str | None, size: tuple[int, int]) -> list[Any] | None:
    """What `image_databunch(augment=)` takes, for images of (height, width) `size`. None: as the data set has it.

    ValueError if a function cannot be found, or fails.
    """
    if names is None:
        return None
    made: list[Any] = []
    for name in names.split(","):
        if ":" in name:
            own = _users(name)
            made += own if isinstance(own, (list, tuple)) else [own]
        elif name != "none":
            made.append(_named(name, size))
    return made


def _named(name: str, size: tuple[int, int]) -> Any:
    if name in ("crop", "flip"):
        return RandomCrop(4) if name == "crop" else RandomFlip()
    from torchvision.transforms import v2

    if name == "color":
        return v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    if name == "resized-crop":
        return v2.RandomResizedCrop(size)
    return v2.TrivialAugmentWide() if name == "trivial" else v2.RandAugment()


def _users(spec: str) -> Any:
    """What the function `package.module:function` returns; modules are looked for in the current folder too."""
    rule = "--augment must name a function that takes no arguments and returns transforms"
    try:
        function = users_function(spec)
    except ValueError as e:
        raise ValueError(f"{rule}; {e}") from e
    try:
        return function()
    except (Exception, SystemExit) as e:
        raise ValueError(f"{rule}; it failed: {told(e)}") from e
