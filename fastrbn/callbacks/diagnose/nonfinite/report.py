"""What `HaltOnNaN` found: the report, its files, and the error that carries it."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
from pathlib import Path

import torch

from fastrbn.util import write_whole

FILES = ("nan_report.txt", "nan_report.json", "nan_batch.pt")
_PHASES = {"forward": "the forward pass", "backward": "the backward pass", "step": "the optimiser's step"}
BUFFER = "a buffer, which no output has shown yet"
SPOILT = "a buffer that was changed outside of the batch: going through the batch again did not show it"
_KEPT = 50  # losses, rates and norms in a report
_SHOWN = 10  # losses and rates in the text; the report itself has more


@dataclasses.dataclass
class NonFiniteReport:
    """Where the first value came up that is not finite.

    - `step`: `run.n_iter` of the batch, from 0; `epoch`, `batch`: the batch's place; `in_train`: in which pass.
    - `phase`: "forward", "backward" or "step"; `where`: "input", "loss", or the qualified name of the first module
      (forward), parameter (backward, step) or buffer to go; "model" is the whole model's own output.
    - `losses`, `lrs`: of the last training steps, at most 50, this one's at the end; of several param groups the
      largest rate. `norms`: the L2 norm of all parameters together after each of the last steps that were finite.
    - `magnitudes`: the largest absolute value of each parameter in the state that was kept.
    - `note`: what else there is to know, such as a replay that did not show the fault again; mostly empty.
    """

    step: int
    epoch: int
    batch: int
    phase: str
    where: str
    losses: list[float]
    lrs: list[float]
    magnitudes: dict[str, float]
    in_train: bool = True
    norms: list[float] = dataclasses.field(default_factory=list)
    note: str = ""

    @property
    def sentence(self) -> str:
        place = "" if self.in_train else " of validation"
        return (
            f"NaN or Inf in {_PHASES[self.phase]} of step {self.step} (epoch {self.epoch}, batch {self.batch}{place}), "
            f"first in {self._described()}"
        )

    def _described(self):
        if self.where in ("input", "loss"):
            return f"the {self.where}"
        if self.note in (BUFFER, SPOILT):
            return f"buffer '{self.where}'"
        return f"{'module' if self.phase == 'forward' else 'parameter'} '{self.where}'"

    def __str__(self):
        largest = sorted(self.magnitudes.items(), key=lambda kv: -kv[1])[:3]
        lines = [
            self.sentence,
            f"  last losses: {_numbers(self.losses)}",
            f"  last rates:  {_numbers(self.lrs)}",
            *([f"  last norms of all parameters: {_numbers(self.norms)}"] if self.norms else []),
            f"  largest parameters in the model as it was kept: {', '.join(f'{n} {v:.3g}' for n, v in largest)}",
            *([f"  note: {self.note}"] if self.note else []),
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The fields as a JSON object; NaN and Inf, which JSON does not have, are the strings "nan", "inf", "-inf"."""
        return json.dumps({"sentence": self.sentence, **_plain(dataclasses.asdict(self))}, indent=2, ensure_ascii=False)

    def save(self, folder, batch=None) -> list[Path]:
        """Write `nan_report.txt` and `nan_report.json` to `folder`, and `nan_batch.pt` when there is a `batch`: a
        dictionary of tensors that `torch.load` reads. Each file whole or not at all."""
        folder = Path(folder)
        contents = {FILES[0]: f"{self}\n", FILES[1]: self.to_json() + "\n"}
        if batch is not None:
            file = io.BytesIO()
            torch.save(_on_host(batch), file)
            contents[FILES[2]] = file.getvalue()
        return [write_whole(folder / name, content) for name, content in contents.items()]


class NonFiniteError(ArithmeticError):
    """Raised by `HaltOnNaN(raise_error=True)`; `.report` is the `NonFiniteReport`."""

    def __init__(self, report):
        super().__init__(report)
        self.report = report

    def __str__(self):
        return self.report.sentence


class History:
    """Losses, rates and norms of the last steps, as they came: tensors stay where they are until they are read."""

    def __init__(self):
        self.losses, self.norms = (collections.deque(maxlen=_KEPT + 16) for _ in range(2))  # 16: a late halt's delay

    def add_loss(self, step, loss, lrs) -> None:
        self.losses.append((step, loss, lrs))

    def add_norm(self, step, norm) -> None:
        """`norm`: a float, or tensors whose sum is its square."""
        self.norms.append((step, norm))

    def upto(self, step) -> dict:
        """The report's `losses`, `lrs` and `norms`."""
        state = self.state_dict()
        losses = [(loss, max(lrs)) for s, loss, lrs in state["losses"] if s <= step][-_KEPT:]
        norms = [norm for s, norm in state["norms"] if s < step][-_KEPT:]
        return {"losses": [loss for loss, _ in losses], "lrs": [lr for _, lr in losses], "norms": norms}

    def state_dict(self) -> dict:
        """All in numbers. Waits for the device."""
        losses = [(step, float(loss), [float(lr) for lr in lrs]) for step, loss, lrs in self.losses]
        norms = [(step, n if isinstance(n, float) else math.sqrt(sum(map(float, n)))) for step, n in self.norms]
        return {"losses": losses, "norms": norms}

    def load_state_dict(self, state) -> None:
        self.__init__()
        self.losses.extend(map(tuple, state["losses"]))
        self.norms.extend(map(tuple, state["norms"]))

    def __getstate__(self):
        return self.state_dict()

    def __setstate__(self, state):
        self.load_state_dict(state)


def _numbers(values):
    return " ".join(f"{v:.4g}" for v in values[-_SHOWN:])


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _on_host(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()  # a slice would bring the whole data set along
    if isinstance(value, dict):
        return {k: _on_host(v) for k, v in value.items()}
    return type(value)(map(_on_host, value)) if type(value) in (list, tuple) else value
