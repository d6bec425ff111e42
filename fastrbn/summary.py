"""What a model is made of, as a table: modules, output shapes, parameters, and what its norms do."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import torch
from torch.nn.parameter import is_lazy

from .learn.snapshot import RandomState, Snapshot
from .util import apply_to

__all__ = ["Summary", "model_summary"]

_HEADS = ("module", "type", "output", "parameters", "trainable", "norm")
_WIDEST = 32  # characters of an output's shape


@dataclasses.dataclass
class Row:
    """A module: `name` (qualified), `kind` (its class), `output` (shape in words, "" when it was not called), `calls`,
    `params` and `trainable` (elements of its own parameters, without those of modules inside it and those that an
    earlier row has), `shared` (names of those), `norm` (a running norm's recipe in words)."""

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
    """What `model_summary` found: `rows`, the shape of the `input` in words, elements of `params`, `trainable` ones,
    and `buffers`, the `bytes` of both, and `notes`, further lines. `print` it."""

    rows: list[Row]
    input: str
    params: int
    trainable: int
    buffers: int
    bytes: int
    notes: list[str]

    def __str__(self):
        cells = [_HEADS, *(_cells(row) for row in self.rows)]
        used = [i for i, head in enumerate(_HEADS) if head != "norm" or any(row.norm for row in self.rows)]
        widths = {i: max(len(row[i]) for row in cells) for i in used}
        right = {_HEADS.index("parameters")}

        def line(row):
            return "  ".join(row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in used).rstrip()

        rule = "-" * (sum(widths.values()) + 2 * (len(used) - 1))
        totals = [
            f"parameters: {self.params:,}, trainable {self.trainable:,}, frozen {self.params - self.trainable:,}",
            f"buffers: {self.buffers:,}; together {_bytes(self.bytes)}",
        ]
        body = map(line, cells[1:])
        return "\n".join([f"input: {self.input}", line(cells[0]), rule, *body, rule, *totals, *self.notes])

    __repr__ = __str__


def model_summary(model, xb) -> Summary:
    """Table of the `model`'s modules, from one forward pass of the batch `xb` in evaluation mode, without gradients.

    - `xb`: what the model takes: a tensor, or whatever else it is called with. It is brought to the device of the
      model's first parameter.

    The model is afterwards as it was: modes, buffers (bit for bit, the same tensors), plain attributes, hooks and
    random states. Hooks that are on the model see the pass. A model with lazy modules is copied, the batch initialises
    the copy, and the summary is that of the copy. Raises RuntimeError for a forward pass that writes to parameters,
    which are not copied, and ValueError for lazy modules that the pass does not reach.
    """
    xb = _to(xb, next((p.device for p in model.parameters()), None))
    lazy = list(dict.fromkeys(name.rpartition(".")[0] for name in _lazy(model)))
    if lazy:
        model = _initialised_copy(model, xb)
    shapes = {}
    with _parameters_unchanged(model), Snapshot([model], parameters=False), _watched(model, shapes):
        _forward(model, xb)
    params, buffers = list(model.parameters()), list(model.buffers())
    return Summary(
        rows=_rows(model, shapes),
        input=_shape(xb),
        params=sum(p.numel() for p in params),
        trainable=sum(p.numel() for p in params if p.requires_grad),
        buffers=sum(b.numel() for b in buffers),
        bytes=sum(t.numel() * t.element_size() for t in (*params, *buffers)),
        notes=[f"lazy, as this batch would make them: {', '.join(n or 'the model' for n in lazy)}"] if lazy else [],
    )


def _lazy(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers that are not initialised, by name."""
    return {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)}


def _initialised_copy(model, xb):
    # torch cannot copy lazy buffers
    fresh = {
        id(t): type(t)(requires_grad=t.requires_grad, device=t.device, dtype=t.dtype) for t in _lazy(model).values()
    }
    model = copy.deepcopy(model, fresh)
    with RandomState():
        _forward(model, xb)
    if left := list(_lazy(model)):
        raise ValueError(
            f"a summary needs the size of every parameter; the batch does not reach the lazy modules of "
            f"{', '.join(left[:3])}: call the model so that they run, then ask again"
        )
    return model


def _forward(model, xb):
    model.eval()
    try:
        with torch.no_grad():
            model(xb)
    except Exception as e:
        raise RuntimeError(
            f"the model failed on a batch of shape {_shape(xb)}, {type(e).__name__}: {e}. Give the summary a "
            f"batch as the model takes it: summary(xb)"
        ) from e


def of_learner(learn, xb=None, cbs=()) -> Summary:
    """`model_summary` of `learn.model`, with optimiser and loss in the notes.

    - `xb`: a batch; None: the first of `learn.data`'s training loader, whose random state and count of epochs are put
      back. Callbacks in `cbs` that change batches and need no fit for it (those with a `begin_batch` and without a
      `begin_fit`, such as BatchTransformXCallback) are asked to; a batch that is given is taken as it is.
    """
    with RandomState((learn.data.train_dl, learn.data.valid_dl)):
        xb = _prepared(_first_batch(learn.data), cbs) if xb is None else xb
        found = model_summary(learn.model, xb)
    loss = getattr(learn.loss_func, "__name__", type(learn.loss_func).__name__)
    stepped = {p for g in learn.opt.param_groups for p in g["params"]}
    missing = [n for n, p in learn.model.named_parameters() if p.requires_grad and p not in stepped]
    found.notes.append(f"optimiser: {type(learn.opt).__name__}, {_groups(learn.opt)}; loss: {loss}")
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        found.notes.append(f"trainable, but the optimiser does not have them: {', '.join(missing[:3])}{more}")
    if cbs:
        found.notes.append(f"callbacks: {', '.join(type(cb).__name__ for cb in cbs)}")
    return found


def _groups(opt) -> str:
    rates = dict.fromkeys(f"{float(g['lr']):.3g}" for g in opt.param_groups if "lr" in g)
    return f"{len(opt.param_groups)} param group{'s' * (len(opt.param_groups) > 1)}, lr {', '.join(rates)}"


def _first_batch(data):
    loader = data.train_dl if data.train_dl is not None else data.valid_dl
    batches = iter(loader)
    if batches is loader:
        raise ValueError(
            f"the training loader is an iterator ({type(loader).__name__}): a batch taken from it would be missing in "
            f"the fit. Give one: summary(xb)"
        )
    try:
        return next(batches)
    except StopIteration:
        raise ValueError("the training loader has no batch to try: give one, summary(xb)") from None


def _prepared(batch, cbs):
    """The inputs of `batch` after the callbacks that change them, each on a stand-in for the run."""
    xb, yb = batch
    stand_in = _Batch(xb, yb)
    for cb in cbs:
        if _overrides(cb, "begin_batch") and not _overrides(cb, "begin_fit"):
            mine = type(cb).__new__(type(cb))
            vars(mine).update({**vars(cb), "run": stand_in})
            mine.begin_batch()
    return stand_in.xb


class _Batch:
    """What a callback sees of a run in `begin_batch`."""

    def __init__(self, xb, yb):
        self.xb, self.yb, self.in_train, self.iter, self.n_iter, self.epoch = xb, yb, False, 0, 0, 0


def _overrides(cb, event) -> bool:
    base = next((c for c in reversed(type(cb).__mro__) if hasattr(c, event)), None)  # Callback, with its no-ops
    return event in vars(cb) or getattr(type(cb), event, None) is not getattr(base, event, None)


@contextlib.contextmanager
def _parameters_unchanged(model):
    versions = {name: _version(p) for name, p in model.named_parameters()}
    yield
    changed = [name for name, p in model.named_parameters() if _version(p) != versions[name]]
    if changed:
        raise RuntimeError(
            f"the model's forward pass writes to its parameters ({', '.join(changed[:3])}), also in evaluation mode: "
            f"they are not what they were before the summary"
        )


def _version(t):
    return None if t.is_inference() else t._version


@contextlib.contextmanager
def _watched(model, shapes):
    def look(module, args, output):
        shapes.setdefault(module, []).append(_shape(output))

    handles = [m.register_forward_hook(look) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(model, shapes):
    rows, seen = [], {}
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


def _norm(module) -> str:
    """Of a layer with a recipe, and of PyTorch's norms with running statistics."""
    recipe = getattr(getattr(module, "recipe", None), "name", None)
    if recipe is not None:
        frozen = ", frozen" if getattr(module, "frozen", False) else ""
        return f"recipe {recipe}, mom {module.mom:g}{frozen}" if hasattr(module, "mom") else f"recipe {recipe}{frozen}"
    if hasattr(module, "track_running_stats"):
        return f"momentum {module.momentum}" if module.track_running_stats else "batch statistics"
    return ""


def _cells(row) -> tuple[str, ...]:
    depth, name = row.name.count("."), row.name.rpartition(".")[2]
    output = row.output if len(row.output) <= _WIDEST else row.output[: _WIDEST - 1] + "…"
    calls = f" ({row.calls} calls)" if row.calls > 1 else ""
    trainable = "" if not row.params else {0: "no", row.params: "yes"}.get(row.trainable, f"{row.trainable:,}")
    params = f"{row.params:,}" if row.params else ""
    params += f" + {', '.join(row.shared)}" if row.shared else ""
    return ("  " * depth + name, row.kind, (output or "not called") + calls, params, trainable, row.norm)


def _shape(value) -> str:
    if isinstance(value, torch.Tensor):
        return " × ".join(map(str, value.shape)) or "number"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shape(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_shape, value)) + ")"
    return type(value).__name__


def _to(value, device):
    return value if device is None else apply_to(value, torch.Tensor, lambda t: t.to(device))


def _bytes(n) -> str:
    size = float(n)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
