"""What CUDA graphs do, on the CPU: operators recorded with their tensors and numbers, and repeated without Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map


class Tape:
    """In place of `recording.Recorder`. As there, a recording computes nothing, and values come with a replay."""

    def __init__(self, device):
        self.device = device

    def warm_up(self, function):
        with _Operators():
            function()

    @torch.no_grad()
    def record(self, function):
        with _Operators() as seen:
            out = function()
        for t, value in seen.before.values():
            t.data.copy_(value)  # unseen by the autograd graph that a second recording goes through
        for t in (t for call in seen.calls for t in call[-1] if t.is_floating_point()):
            t.data.fill_(torch.nan)  # as good as what CUDA has there before a replay
        return out, seen.replay


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:  # .item() and the like
            raise RuntimeError("operation not permitted when stream is capturing")
        live, (args, kwargs) = (args, kwargs or {}), _plain((args, kwargs or {}))
        given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        written = [*_tensors([given[a.name] for a in func._schema.arguments if a.is_write and a.name in given])]
        for t in written:
            self.before.setdefault((t.data_ptr(), t.shape), (t, t.clone()))
        out = func(*live[0], **live[1])  # some change shapes in place, such as transpose_ in an LSTM
        known = {_memory(t) for t in _tensors((args, kwargs))}
        made = {i: t for i, t in enumerate(_tensors(_plain(out))) if _memory(t) not in known}
        if made or written:
            self.calls.append((func, args, kwargs, list(made), list(made.values())))
        return out

    @torch.enable_grad()  # a kernel of an LSTM returns less without
    def replay(self):
        for func, args, kwargs, places, made in self.calls:
            new = [*_tensors(func(*args, **kwargs))]
            for place, old in zip(places, made, strict=True):
                old.copy_(new[place])


def _plain(value):
    """The same tensors without their autograd graphs, which a recording must not keep."""
    return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, value)


def _tensors(value):
    return (t for t in tree_iter(value) if isinstance(t, torch.Tensor) and t.layout is torch.strided)


def _memory(t):
    return t.untyped_storage().data_ptr()
