"""What modules put out, kept from the forward pass until the loss is there."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # their output is that of a module inside
_PLAIN = (bool, int, float)


class Outputs:
    """Forward hooks that keep what modules put out, in the order in which it came.

    Always hooked are modules whose code is not known here. PyTorch's own layers and this package's turn finite inputs
    and weights into finite outputs unless they overflow, and a hook on each of them costs more than all other looks
    together: they are hooked for a full look only. Modules inside compiled ones are left alone.
    """

    def __init__(self, model, stay=True):
        self._stay = stay  # hooks that fire once in a while cost each forward pass that they are not wanted in
        named = [(n or "model", m) for n, m in reachable(model) if not isinstance(m, CONTAINERS)]
        strange = {m for _, m in named if not _well_known(m)}
        hooks = [(m, _OutputHook(self, n)) for n, m in named]
        self._always = [(m, h) for m, h in hooks if m in strange and m is not model]  # the model's own is run.pred
        self._others = [(m, h) for m, h in hooks if m not in strange or m is model]
        self._counting = [m for m in dict.fromkeys(model.modules()) if not _well_known(m)]
        self._key = RemovableHandle(OrderedDict()).id  # a number that no other hook has
        self._hooked, self._extra, self._seen, self._open = False, False, [], False

    def counters(self) -> list:
        """Plain attributes of modules whose code is not known: a replay puts them back."""
        return [(m, {k: v for k, v in vars(m).items() if type(v) in _PLAIN}) for m in self._counting]

    def begin(self, full=False) -> None:
        """Keep the outputs of the coming forward pass, of all modules when `full`."""
        if self._extra:
            self._extra = self._drop(self._others)
        self._seen.clear()
        self._open = True
        if not self._hooked:
            self._hooked = self._hook(self._always)
        if full:
            self._extra = self._hook(self._others)

    def take(self) -> list:
        """(name, output) in the order in which they came; keeps them no longer."""
        self._open, seen, self._seen = False, self._seen, []
        if self._extra:
            self._extra = self._drop(self._others)
        if not self._stay:
            self._hooked = self._drop(self._always)
        return seen

    def remove(self) -> None:
        """Take all hooks off."""
        self.take()
        self._hooked = self._drop(self._always)

    # without a handle for each, which costs more than what the hooks do

    def _hook(self, hooks) -> bool:
        for module, hook in hooks:
            module._forward_hooks[self._key] = hook
        return True

    def _drop(self, hooks) -> bool:
        for module, _ in hooks:
            module._forward_hooks.pop(self._key, None)
        return False


class _OutputHook:
    """A copy of the model takes copies of its hooks; those do nothing."""

    def __init__(self, outputs=None, name=""):
        self.outputs, self.name = outputs, name

    def __call__(self, module, args, output):
        if self.outputs is not None and self.outputs._open and not torch.compiler.is_compiling():
            self.outputs._seen.append((self.name, output))

    def __reduce__(self):
        return _OutputHook, ()


def _well_known(module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    homes = [type(module).__module__]
    if callable(func := vars(module).get("func")):  # a module around a function of someone's
        homes.append(getattr(func, "__module__", None) or "")
    return all(home.startswith(("torch.nn.", "fastrbn.")) for home in homes)


def reachable(module, prefix=""):
    """`named_modules`, without what is compiled."""
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return
    yield prefix, module
    seen = {module}
    for name, child in module.named_children():
        for found in reachable(child, f"{prefix}.{name}".lstrip(".")):
            if found[1] not in seen:
                seen.add(found[1])
                yield found
