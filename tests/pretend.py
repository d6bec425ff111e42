"""A CUDA device for machines that have none: its tensors lie in the host's memory, and waiting for it is an error.

`Tensor.device` says cuda:0, so the code under test takes the way it takes on a GPU. While `Pretend.watching` is True,
whatever would make the host wait raises `Waits`: reading a value, a shape that depends on values, copies between host
and device that are not asynchronous. `torch.cuda.set_sync_debug_mode` does the same on a real device.
"""

import contextlib

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA, NAMES = torch.device("cuda", 0), ("cpu", "cuda", "cuda:0")
aten = torch.ops.aten
READS = {  # each needs a value on the host, its own or that of a shape
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount),
    *(aten.unique_consecutive, aten.unique_dim, aten._unique, aten._unique2, aten.repeat_interleave, aten.is_nonzero),
}
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.to, torch.Tensor.cuda}


class Waits(AssertionError):
    """The host waits for the device in a place that must not."""


class OnDevice(torch.Tensor):
    """A tensor of the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = CUDA, True, False

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, op = kwargs or {}, func.overloadpacket
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        host = [t for t in tensors if not isinstance(t, OnDevice) and t.dim()]
        if op in READS:
            waits(f"{func} needs a value")
        elif op in INDEXED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            waits(f"{func} with a mask needs the number of values")
        elif host and op is aten.copy_:
            if not (args[2:] or (kwargs.get("non_blocking"),))[0]:
                waits(f"{func} between host and device")
        elif host:
            raise RuntimeError(f"{func} on tensors of the device and the host")
        with no_dispatch():
            out = func(*args, **kwargs)
            given = {id(t) for t in tensors}
            return out if op is aten.copy_ else on_device(out, given)


def on_device(value, given=()):
    """The tensors in `value` on the pretended device, in the same memory; those in `given` as they are."""

    def move(t):
        if isinstance(t, OnDevice) or id(t) in given:
            return t
        with no_dispatch():
            return torch.Tensor._make_subclass(OnDevice, t, t.requires_grad)

    return tree_map_only(torch.Tensor, move, value)


def move(model):
    """Move a model to the pretended device, in place."""
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(on_device(p.detach().clone()), p.requires_grad)
        for name, b in m._buffers.items():
            m._buffers[name] = None if b is None else on_device(b.clone())
    return model


def waits(why):
    if Pretend.watching:
        raise Waits(why)


class Pretend(TorchFunctionMode):
    """Within it `device="cuda"` is the pretended device."""

    watching = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        of_device = bool(args) and isinstance(args[0], OnDevice)
        if func in TO_HOST and of_device:
            waits(f"{func.__name__} reads a tensor")
            with no_dispatch():
                return func(args[0].as_subclass(torch.Tensor), *args[1:], **kwargs)
        places = [i for i, a in enumerate(args) if isinstance(a, torch.device) or isinstance(a, str) and a in NAMES]
        named = [torch.device(args[i]) for i in places]
        if kwargs.get("device") is not None:
            named.append(torch.device(kwargs["device"]))
        if not named:
            return func(*args, **kwargs)
        if named[0].type == "cpu":
            if of_device:
                waits(f"{func.__name__} copies to the host")
                return args[0].detach().cpu()
            return func(*args, **kwargs)
        if func in FROM_HOST and not of_device and not kwargs.get("non_blocking"):
            waits(f"{func.__name__} copies from the host")
        args = [torch.device("cpu") if i in places else a for i, a in enumerate(args)]
        kwargs.update({"device": "cpu"} if "device" in kwargs else {})
        return on_device(func(*args, **kwargs))


class Event:
    """Done when it is asked for the second time."""

    def __init__(self, *args, **kwargs):
        self.asked = 0

    def record(self, stream=None): ...

    def query(self):
        self.asked += 1
        return self.asked > 1

    def synchronize(self):
        if self.asked < 2:
            waits("an event is waited for")


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def _renamed(groups):
    return {(group[0][0][0].device, dtype): group for (_, dtype), group in groups.items()}


@contextlib.contextmanager
def pretended(monkeypatch):
    """The device, for the length of a `with` block."""
    autocast, empty = torch.autocast, torch.empty
    monkeypatch.setattr(torch, "autocast", lambda kind, **kwargs: autocast("cpu", **kwargs))
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)  # GradScaler asks
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    grouped = torch._C._group_tensors_by_device_and_dtype  # in C, where the device is the host
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", lambda *args: _renamed(grouped(*args)))
    # seed and counter of CUDA's generator are kept on the host
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    monkeypatch.setattr(Pretend, "watching", False)
    with Pretend():
        yield
