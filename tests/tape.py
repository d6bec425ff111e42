"""What CUDA graphs do, on the CPU: operators recorded with their tensors and numbers, and repeated without Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Tape:
    """In place of `recording.Recorder`. As there, a recording computes nothing, and values come with a replay."""

    def __init__(self, device):
        self.device = device

    def warm_up(self, function):
        with _Operators():
            function()

    def record(self, function):
        with _Operators() as seen:
            out = function()
        for t, value in seen.before.values():
            t.copy_(value)
        for new in seen.made:
            if new.is_floating_point():
                new.fill_(torch.nan)  # as good as what CUDA has there before a replay
        return out, seen.replay


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:  # .item() and the like
            raise RuntimeError("operation not permitted when stream is capturing")
        schema = func._schema
        given = dict(zip((a.name for a in schema.arguments), args)) | kwargs
        written = [given[a.name] for a in schema.arguments if a.is_write and given.get(a.name) is not None]
        for t in _tensors(written):
            self.before.setdefault(id(t), (t, t.clone()))
        out = func(*args, **kwargs)
        made = [t for t in _tensors(out) if not any(_same_memory(t, other) for other in _tensors((args, kwargs)))]
        if made or written:
            self.calls.append((func, args, kwargs, made, [*_tensors(out)]))
            self.made += made
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, made, outs in self.calls:
            new = [*_tensors(func(*args, **kwargs))]
            for old, value in zip(outs, new, strict=True):
                if any(old is t for t in made):
                    old.copy_(value)


def _tensors(value):
    return (t for t in tree_iter(value) if isinstance(t, torch.Tensor) and t.layout is torch.strided)


def _same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0
