"""`NonFiniteReport`: what `HaltOnNaN` found, its files, and the error that carries it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import torch

from fastrbn.util import apply_to, write_whole

_PHASES = {"forward": "the forward pass", "backward": "the backward pass", "step": "the optimiser's step"}
BUFFER = "a buffer, which no output has shown yet"
UNSEEN = "the gradient of the model's output was not finite already; the loss itself was not shown"
SPOILT = "a buffer that was changed outside of the batch: going through the batch again did not show it"
_SHOWN = 10  # losses and rates in the text; the report itself has more


@dataclasses.dataclass
class NonFiniteReport:
    """The first value that was not finite, and the state of the fit around it. `print(report)` reads well.

    Parameters
    ----------
    step, epoch, batch : int
        `run.n_iter` of the batch, from 0, and its place. `epoch` is None in a loop that does not tell it.
    phase : str
        "forward", "backward" or "step".
    where : str
        "input", "loss", or the qualified name of the first module (forward), parameter (backward, step) or buffer to
        go. "model" is the whole model's own output.
    losses, lrs : list of float
        Of the last training steps, at most 50, the failing one included; of several param groups the largest rate.
    magnitudes : dict of str to float
        The largest absolute value of each parameter in the state that was kept.
    in_train : bool, default True
        False: it was a validation batch.
    norms : list of float
        The L2 norm of all parameters together after each of the last finite steps.
    note : str
        More about it, such as a replay that did not show the fault again; usually empty.
    """

    step: int
    epoch: int | None
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
        """The finding in a sentence, which is also the run's `stop_reason`."""
        place = f" (epoch {self.epoch}, batch {self.batch}{'' if self.in_train else ' of validation'})"
        place = "" if self.epoch is None else place
        kind = "buffer" if self.note in (BUFFER, SPOILT) else "module" if self.phase == "forward" else "parameter"
        what = f"the {self.where}" if self.where in ("input", "loss") else f"{kind} '{self.where}'"
        return f"NaN or Inf in {_PHASES[self.phase]} of step {self.step}{place}, first in {what}"

    def __str__(self):
        largest = sorted(self.magnitudes.items(), key=lambda kv: -kv[1])[:3]
        lines = [
            self.sentence,
            *([f"  last losses: {_numbers(self.losses)}"] if self.losses else []),
            f"  last rates:  {_numbers(self.lrs)}",
            *([f"  last norms of all parameters: {_numbers(self.norms)}"] if self.norms else []),
            f"  largest parameters in the model as it was kept: {', '.join(f'{n} {v:.3g}' for n, v in largest)}",
            *([f"  note: {self.note}"] if self.note else []),
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The fields as a JSON object. NaN and Inf, which JSON does not have, are the strings "nan", "inf", "-inf"."""
        fields = apply_to(dataclasses.asdict(self), float, lambda v: v if math.isfinite(v) else str(v))
        return json.dumps({"sentence": self.sentence, **fields}, indent=2, ensure_ascii=False)

    def save(self, folder: str | Path, batch: dict | None = None) -> list[Path]:
        """Write `nan_report.txt` and `nan_report.json` to `folder`, and `batch` to `nan_batch.pt` if there is one.

        Each file is written whole or not at all. `torch.load` reads the batch, a dictionary of tensors.
        """
        contents: dict[str, str | bytes] = {"nan_report.txt": f"{self}\n", "nan_report.json": self.to_json() + "\n"}
        if batch is not None:
            file = io.BytesIO()
            # a clone, for a slice would bring the whole data set along
            torch.save(apply_to(batch, torch.Tensor, lambda t: t.detach().cpu().clone()), file)
            contents["nan_batch.pt"] = file.getvalue()
        return [write_whole(Path(folder, name), content) for name, content in contents.items()]


class NonFiniteError(ArithmeticError):
    """Raised by `HaltOnNaN(raise_error=True)`; `.report` is the `NonFiniteReport`."""

    def __init__(self, report: NonFiniteReport):
        super().__init__(report)
        self.report = report

    def __str__(self):
        return self.report.sentence


def _numbers(values):
    return " ".join(f"{v:.4g}" for v in values[-_SHOWN:])
