"""Where the time of a training step goes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from torch import profiler

from fastrbn.learn.callback import Callback

_SUFFIXES = (".json", ".gz")


class Profiler(Callback):
    """Profiles some training steps with `torch.profiler`: a table of operators, and a trace to look at.

    - `path`: file for the trace, `….json` or `….json.gz`, written whole; https://ui.perfetto.dev and chrome://tracing
      show it. None (default): no file.
    - `steps`: training steps to record (default 5), after
    - `wait`: steps that are let pass (default 2: the first ones allocate and choose algorithms), and
    - `warmup`: steps in which the profiler runs and records nothing, 1 or more (default 2).
    - `rows`: operators in the table, those that take longest (default 15).
    - `memory`, `shapes`, `stacks`: record allocations, the operators' input shapes, source lines; each costs time.

    `.table` is the table, a string, also printed through `run.logger` after the epoch; `.recorded` the number of steps
    in it, which is smaller than `steps` when the fit ends before. `.averages()` gives its rows as data
    (`torch.profiler`'s key averages). Other callbacks' work is in it; a window that reaches over the end of an epoch
    has the validation in it too. The fit is slower while it records, and as fast as ever after it.
    """

    def __init__(self, path=None, steps=5, wait=2, warmup=2, rows=15, memory=False, shapes=False, stacks=False):
        for name, value, least in (("steps", steps, 1), ("wait", wait, 0), ("warmup", warmup, 1), ("rows", rows, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Profiler: {name} is a whole number, {least} or more; got {value!r}")
        self.path = None if path is None else Path(path).absolute()  # also after a chdir
        if self.path is not None and (self.path.suffix not in _SUFFIXES or self.path.is_dir()):
            raise ValueError(f"Profiler writes a file whose name ends in .json or .json.gz; got {str(path)!r}")
        self.steps, self.wait, self.warmup, self.rows = steps, wait, warmup, rows
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
                f"Profiler recorded nothing: it begins after {self.wait + self.warmup} steps (wait={self.wait}, "
                f"warmup={self.warmup}), and the fit had {self._seen}: give smaller ones",
                stacklevel=2,
            )

    def averages(self):
        """The operators with their times, as `torch.profiler` gives them. ValueError before anything was recorded."""
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
            except (OSError, RuntimeError) as e:  # a full disk is no reason to end the fit
                warnings.warn(f"Profiler: the trace could not be written to {self.path}: {e}", stacklevel=2)

    def _write(self, profile):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{os.getpid()}.tmp.{self.path.name}")  # the end tells whether to compress
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
