"""`Profiler`: operators and their times in some training steps."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import profiler

from fastrbn.learn.callback import Callback
from fastrbn.util import whole

_SUFFIXES = (".json", ".gz")


class Profiler(Callback):
    """Profile some training steps with `torch.profiler`: a table of operators, and a trace to look at.

    `.table` is the table, a string, which is also printed through `run.logger` after the epoch. `.recorded` is the
    number of steps in it, smaller than `steps` if the fit ends early. Other callbacks' work is included, and a window
    that reaches past the end of an epoch includes the validation. The fit is slower only while it records.

    Parameters
    ----------
    path : str or Path, optional
        File for the trace, `….json` or `….json.gz`; https://ui.perfetto.dev and chrome://tracing show it. By default no
        file is written.
    steps : int, default 5
        Training steps to record.
    wait : int, default 2
        Steps to skip first: they allocate memory and choose algorithms.
    warmup : int, default 2
        Steps after those in which the profiler runs without recording, at least 1.
    rows : int, default 15
        Operators in the table, the slowest first.
    memory : bool, default False
        Record allocations, which takes time.
    shapes : bool, default False
        Record the operators' input shapes, which takes time.
    stacks : bool, default False
        Record source lines, which takes time.

    Raises
    ------
    ValueError
        For numbers that are too small, or a `path` that does not end in .json or .json.gz.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(Profiler, steps=2)])
    >>> run.logger = lambda line: None
    >>> run.fit(1, learn)
    >>> run.profiler.recorded, "aten::convolution" in run.profiler.table
    (2, True)
    """

    def __init__(
        self,
        path: str | Path | None = None,
        steps: int = 5,
        wait: int = 2,
        warmup: int = 2,
        rows: int = 15,
        memory: bool = False,
        shapes: bool = False,
        stacks: bool = False,
    ):
        self.path = None if path is None else Path(path).absolute()  # also after a chdir
        if self.path is not None and (self.path.suffix not in _SUFFIXES or self.path.is_dir()):
            raise ValueError(f"path must be a file whose name ends in .json or .json.gz; got {str(path)!r}")
        self.steps, self.wait = whole("steps", steps), whole("wait", wait, 0)
        self.warmup, self.rows = whole("warmup", warmup), whole("rows", rows)
        self.memory, self.shapes, self.stacks = memory, shapes, stacks
        self._clear()

    def _clear(self):
        self.table, self.recorded, self._averages, self._failure = None, 0, None, None
        self._profile, self._seen, self._told = None, 0, False

    def begin_fit(self):
        self._clear()

    def begin_batch(self):
        if self.run.in_train and self._seen == 0 and self._profile is None:
            self._profile = profiler.profile(
                schedule=profiler.schedule(wait=self.wait, warmup=self.warmup, active=self.steps, repeat=1),
                on_trace_ready=self._take,
                profile_memory=self.memory,
                record_shapes=self.shapes,
                with_stack=self.stacks,
                acc_events=True,
            )
            self._profile.start()

    def after_batch(self):
        if self._profile is not None and self.run.in_train:
            self._seen += 1
            self._profile.step()
            if self._seen == self.wait + self.warmup + self.steps:
                self._end()

    def after_epoch(self):
        self._tell()

    def after_fit(self):
        self._end()
        self._tell()
        if self._seen and self.table is None and self.run.stop_reason is None:
            warnings.warn(
                f"Profiler recorded nothing: it starts after {self.wait + self.warmup} steps (wait={self.wait}, "
                f"warmup={self.warmup}), and the fit had {self._seen}: choose smaller ones",
                stacklevel=2,
            )

    def averages(self) -> Any:
        """Return the operators with their times (`torch.profiler`'s key averages). ValueError before a recording."""
        if self._averages is None:
            raise ValueError("Profiler has recorded nothing: run a fit of more than wait + warmup steps first")
        return self._averages

    def _end(self):
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()

    def _take(self, profile):
        self.recorded = max(0, self._seen - self.wait - self.warmup)
        self._averages = profile.key_averages(group_by_input_shape=self.shapes)
        on_device = any(a.self_device_time_total for a in self._averages)
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        self.table = self._averages.table(sort_by=order, row_limit=self.rows)
        if self.path is not None:
            try:
                self._write(profile)
            except (OSError, RuntimeError) as e:  # a full disk must not end the fit
                warnings.warn(f"Profiler: the trace could not be written to {self.path}: {e}", stacklevel=2)

    def _write(self, profile):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{os.getpid()}.tmp.{self.path.name}")  # the suffix decides about compression
        try:
            profile.export_chrome_trace(str(temporary))
            if not temporary.is_file() or not temporary.stat().st_size:
                raise OSError("torch.profiler left no file")
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _tell(self):
        if self.table is not None and not self._told:
            self._told = True
            where = "" if self.path is None else f"; trace in {self.path}"
            self.run.logger(f"Profiler: {self.recorded} training steps{where}\n{self.table}")

    def __getstate__(self):
        return {**super().__getstate__(), "_profile": None, "_averages": None}

    def __repr__(self):
        path = "" if self.path is None else f"{str(self.path)!r}, "
        return f"Profiler({path}steps={self.steps}, wait={self.wait}, warmup={self.warmup})"
