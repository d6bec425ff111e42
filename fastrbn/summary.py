"""A table of a model's modules: output shapes, parameters, and the settings of its norms."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .learn.snapshot import RandomState, Snapshot
from .learn.unpack import Unpack, loss_name
from .util import apply_to

__all__ = ["Summary", "model_summary"]

_HEADS = ("module", "type", "output", "parameters", "trainable", "norm")
_WIDEST = 32  # characters of an output's shape


@dataclasses.dataclass
class Row:
    """One module of a `Summary`.

    Parameters
    ----------
    name, kind : str
        Qualified name and class.
    output : str
        Shape of the output in words; "" if the module was not called.
    calls : int
        Number of calls in the forward pass.
    params, trainable : int
        Elements of the module's own parameters, without those of inner modules and those that an earlier row has.
    shared : list of str
        Names of parameters that an earlier row has.
    norm : str
        Settings of a norm in words, such as its recipe.
    """

    name: str
    kind: str
    output: str
    calls: int
    params: int
    trainable: int
    shared: list[str]
    norm: str


@dataclasses.dataclass
class Summary:
    """The result of `model_summary`; print it for the table.

    Parameters
    ----------
    rows : list of Row
        One per module.
    input : str
        Shape of the input in words.
    params, trainable, buffers : int
        Elements of all parameters, of the trainable ones, and of all buffers.
    bytes : int
        Size of parameters and buffers.
    notes : list of str
        Further lines below the table.
    """

    rows: list[Row]
    input: str
    params: int
    trainable: int
    buffers: int
    bytes: int
    notes: list[str]

    def __str__(self) -> str:
        cells = [_HEADS, *(_cells(row) for row in self.rows)]
        used = [i for i, head in enumerate(_HEADS) if head != "norm" or any(row.norm for row in self.rows)]
        widths = {i: max(len(row[i]) for row in cells) for i in used}
        right = {_HEADS.index("parameters")}

        def line(row: Sequence[str]) -> str:
            return "  ".join(row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in used).rstrip()

        rule = "-" * (sum(widths.values()) + 2 * (len(used) - 1))
        totals = [
            f"parameters: {self.params:,}, trainable {self.trainable:,}, frozen {self.params - self.trainable:,}",
            f"buffers: {self.buffers:,}; together {_bytes(self.bytes)}",
        ]
        body = map(line, cells[1:])
        return "\n".join([f"input: {self.input}", line(cells[0]), rule, *body, rule, *totals, *self.notes])

    __repr__ = __str__


def model_summary(model: nn.Module, xb: Any) -> Summary:
    """Summarise the modules of a model in a table, from one forward pass in evaluation mode without gradients.

    The model is unchanged afterwards: modes, buffers (bit for bit, the same tensors), plain attributes, hooks and
    random states. Hooks on the model see the pass. A model with lazy modules is copied first, and the summary
    describes the copy as this batch initialises it.

    Parameters
    ----------
    model : nn.Module
        Any model.
    xb : Tensor or nested tensors
        A batch as the model takes it: a tuple for a model of several inputs, a dictionary for one that takes them by
        name. It is moved to the device of the model's first parameter.

    Returns
    -------
    Summary

    Raises
    ------
    RuntimeError
        If the forward pass fails, or writes to the parameters, which are not copied.
    ValueError
        If the pass does not reach a lazy module.

    Examples
    --------
    >>> print(model_summary(conv_rbn(1, 4), torch.randn(2, 1, 28, 28)))
    input: 2 × 1 × 28 × 28
    module  type              output           parameters  trainable  norm
    -----------------------------------------------------------------------------------------
    0       Conv2d            2 × 4 × 14 × 14          36  yes
    1       GeneralRelu       2 × 4 × 14 × 14
    2       RunningBatchNorm  2 × 4 × 14 × 14           8  yes        recipe default, mom 0.1
    -----------------------------------------------------------------------------------------
    parameters: 44, trainable 44, frozen 0
    buffers: 20; together 264 bytes
    """
    unpack = Unpack(model)
    return _summarise(model, unpack.inputs(xb), unpack)


def _summarise(model: nn.Module, xb: Any, unpack: Unpack) -> Summary:
    xb = _to(xb, next((p.device for p in model.parameters()), None))
    lazy = list(dict.fromkeys(name.rpartition(".")[0] for name in _lazy(model)))
    if lazy:
        model = _initialised_copy(model, xb, unpack)
    shapes: dict[nn.Module, list[str]] = {}
    with _parameters_unchanged(model), Snapshot([model], parameters=False), _watched(model, shapes):
        _forward(model, xb, unpack)
    params, buffers = list(model.parameters()), list(model.buffers())
    return Summary(
        rows=_rows(model, shapes),
        input=_shape(xb),
        params=sum(p.numel() for p in params),
        trainable=sum(p.numel() for p in params if p.requires_grad),
        buffers=sum(b.numel() for b in buffers),
        bytes=sum(t.numel() * t.element_size() for t in (*params, *buffers)),
        notes=[f"lazy, as this batch would initialise them: {', '.join(n or 'the model' for n in lazy)}"]
        if lazy
        else [],
    )


def _lazy(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers that are not initialised, by name."""
    return {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)}


def _initialised_copy(model: nn.Module, xb: Any, unpack: Unpack) -> nn.Module:
    # torch cannot copy lazy buffers, so the copy gets new ones
    fresh = {
        id(t): type(t)(requires_grad=t.requires_grad, device=t.device, dtype=t.dtype) for t in _lazy(model).values()
    }
    model = copy.deepcopy(model, fresh)
    with RandomState():
        _forward(model, xb, unpack)
    if left := list(_lazy(model)):
        raise ValueError(
            f"a summary needs the size of every parameter; the batch does not reach the lazy modules of "
            f"{', '.join(left[:3])}: call the model so that they run, then summarise it"
        )
    return model


def _forward(model: nn.Module, xb: Any, unpack: Unpack) -> None:
    model.eval()
    try:
        with torch.no_grad():
            unpack.call_model(model, xb)
    except Exception as e:
        raise RuntimeError(
            f"the model failed on a batch of shape {_shape(xb)}, {type(e).__name__}: {e}. Pass a batch as the model "
            f"takes it: summary(xb)"
        ) from e


def of_learner(learn: Any, xb: Any = None, cbs: Sequence[Any] = ()) -> Summary:
    """Summarise `learn.model`, with optimiser and loss in the notes.

    Parameters
    ----------
    learn : Learner
        Its model is left unchanged, see `model_summary`.
    xb : optional
        A batch, used as it is. By default the first batch of the training loader, whose random state and epoch count
        are restored.
    cbs : sequence of Callback, default ()
        Callbacks that change the default batch without needing a fit (those with a `begin_batch` and no `begin_fit`,
        such as BatchTransformXCallback) are applied to it.

    Returns
    -------
    Summary
    """
    with RandomState((learn.data.train_dl, learn.data.valid_dl)):
        unpack = Unpack.of(learn)
        xb = _prepared(unpack(_first_batch(learn.data)), cbs) if xb is None else unpack.inputs(xb)
        found = _summarise(learn.model, xb, unpack)
    stepped = {p for g in learn.opt.param_groups for p in g["params"]}
    missing = [n for n, p in learn.model.named_parameters() if p.requires_grad and p not in stepped]
    found.notes.append(
        f"optimiser: {type(learn.opt).__name__}, {_groups(learn.opt)}; loss: {loss_name(learn.loss_func)}"
    )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        found.notes.append(f"trainable, but not in the optimiser: {', '.join(missing[:3])}{more}")
    if cbs:
        found.notes.append(f"callbacks: {', '.join(type(cb).__name__ for cb in cbs)}")
    return found


def _groups(opt: Any) -> str:
    rates = dict.fromkeys(f"{float(g['lr']):.3g}" for g in opt.param_groups if "lr" in g)
    return f"{len(opt.param_groups)} param group{'s' * (len(opt.param_groups) > 1)}, lr {', '.join(rates)}"


def _first_batch(data: Any) -> Any:
    loader = data.train_dl if data.train_dl is not None else data.valid_dl
    batches = iter(loader)
    if batches is loader:
        raise ValueError(
            f"the training loader is an iterator ({type(loader).__name__}): a batch taken from it would be missing in "
            f"the fit. Pass a batch: summary(xb)"
        )
    try:
        return next(batches)
    except StopIteration:
        raise ValueError("the training loader has no batch to try: pass one, summary(xb)") from None


def _prepared(batch: tuple[Any, Any], cbs: Iterable[object]) -> Any:
    """The inputs of `batch` after the callbacks that change batches, which see a stand-in for the run."""
    stand_in = _Batch(*batch)
    for cb in cbs:
        if _overrides(cb, "begin_batch") and not _overrides(cb, "begin_fit"):
            mine: Any = type(cb).__new__(type(cb))
            vars(mine).update({**vars(cb), "run": stand_in})
            mine.begin_batch()
    return stand_in.xb


class _Batch:
    """The part of a run that a callback sees in `begin_batch`."""

    def __init__(self, xb: Any, yb: Any):
        self.xb, self.yb, self.in_train, self.iter, self.n_iter, self.epoch = xb, yb, False, 0, 0, 0


def _overrides(cb: Any, event: str) -> bool:
    base = next((c for c in reversed(type(cb).__mro__) if hasattr(c, event)), None)  # Callback, where it does nothing
    return event in vars(cb) or getattr(type(cb), event, None) is not getattr(base, event, None)


@contextlib.contextmanager
def _parameters_unchanged(model: nn.Module) -> Iterator[None]:
    versions = {name: _version(p) for name, p in model.named_parameters()}
    yield
    changed = [name for name, p in model.named_parameters() if _version(p) != versions[name]]
    if changed:
        raise RuntimeError(
            f"the model's forward pass writes to its parameters ({', '.join(changed[:3])}) even in evaluation mode, so "
            f"the summary has changed them: load them again"
        )


def _version(t: torch.Tensor) -> int | None:
    return None if t.is_inference() else t._version


@contextlib.contextmanager
def _watched(model: nn.Module, shapes: dict[nn.Module, list[str]]) -> Iterator[None]:
    """Record the output shapes of all modules in `shapes`."""

    def look(module: nn.Module, args: Any, output: Any) -> None:
        shapes.setdefault(module, []).append(_shape(output))

    handles = [m.register_forward_hook(look) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(model: nn.Module, shapes: dict[nn.Module, list[str]]) -> list[Row]:
    rows: list[Row] = []
    seen: dict[nn.Parameter, str] = {}
    named = [(name, m) for name, m in model.named_modules() if name] or [(type(model).__name__, model)]
    if model._parameters and named[0][1] is not model:
        named.insert(0, ("", model))
    for name, module in named:
        own = {f"{name}.{n}".lstrip("."): p for n, p in module._parameters.items() if p is not None}
        fresh = {n: p for n, p in own.items() if p not in seen}
        seen.update({p: n for n, p in fresh.items()})
        calls = shapes.get(module, [])
        rows.append(
            Row(
                name=name or "(itself)",
                kind=type(module).__name__,
                output=calls[-1] if calls else "",
                calls=len(calls),
                params=sum(p.numel() for p in fresh.values()),
                trainable=sum(p.numel() for p in fresh.values() if p.requires_grad),
                shared=[seen[p] for n, p in own.items() if n not in fresh],
                norm=_norm(module),
            )
        )
    return rows


def _norm(module: Any) -> str:
    """Settings of a layer with a recipe, or of one of PyTorch's norms with running statistics."""
    recipe = getattr(getattr(module, "recipe", None), "name", None)
    if recipe is not None:
        frozen = ", frozen" if getattr(module, "frozen", False) else ""
        return f"recipe {recipe}, mom {module.mom:g}{frozen}" if hasattr(module, "mom") else f"recipe {recipe}{frozen}"
    if hasattr(module, "track_running_stats"):
        return f"momentum {module.momentum}" if module.track_running_stats else "batch statistics"
    return ""


def _cells(row: Row) -> tuple[str, ...]:
    depth, name = row.name.count("."), row.name.rpartition(".")[2]
    output = row.output if len(row.output) <= _WIDEST else row.output[: _WIDEST - 1] + "…"
    calls = f" ({row.calls} calls)" if row.calls > 1 else ""
    trainable = "" if not row.params else {0: "no", row.params: "yes"}.get(row.trainable, f"{row.trainable:,}")
    params = f"{row.params:,}" if row.params else ""
    params += f" + {', '.join(row.shared)}" if row.shared else ""
    return ("  " * depth + name, row.kind, (output or "not called") + calls, params, trainable, row.norm)


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return " × ".join(map(str, value.shape)) or "number"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shape(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_shape, value)) + ")"
    return type(value).__name__


def _to(value: Any, device: torch.device | None) -> Any:
    return value if device is None else apply_to(value, torch.Tensor, lambda t: t.to(device))


def _bytes(n: int) -> str:
    size, units = float(n), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" or size >= 100 else f"{size:.1f} {units[0]}"
