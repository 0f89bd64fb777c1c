"""Where the time of a step goes: seconds of each phase, and a trace of a few steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from modstruct import distributed
from modstruct.errors import require

PHASES = ("data", "forward", "loss", "backward", "optimizer")
Item = TypeVar("Item")
WARMUP_STEPS = 3  # left out of a trace: the first steps compile, allocate and fill the loader
log = logging.getLogger("modstruct")


class StepClock:
    """Measures phases by name; each also labels its part of a profiler's trace.

    On the CPU by the wall clock. On a GPU by events in its stream, so that nothing waits for the GPU before `read`; the
    seconds are then the GPU's own, and `data` is the time it had nothing to do because the loader was not ready.
    """

    def __init__(self):
        self._now = _gpu_event if distributed.on_gpu() else time.perf_counter
        self._spans: dict[str, list[tuple]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside counts for `name`; one phase may be entered several times a step."""
        with record_function(name):
            start = self._now()
            try:
                yield
            finally:
                self._spans.setdefault(name, []).append((start, self._now()))

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the wait for each is the phase `data`."""
        items = iter(items)
        while True:
            with self.phase("data"):
                item = next(items, None)
            if item is None:
                return
            yield item

    def read(self, steps: int) -> dict[str, float]:
        """Mean seconds a step of each phase over the last `steps` steps, and a fresh start."""
        spans, self._spans = self._spans, {}
        if distributed.on_gpu():
            torch.cuda.synchronize()
        return {name: sum(_seconds(*span) for span in found) / steps for name, found in spans.items()}


def _gpu_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start


@contextmanager
def profiled(folder: Path, steps: int, first_step: int, last_step: int) -> Iterator[Callable[[], None]]:
    """Gives a function to call after every step; `steps` steps after the warm-up are traced on the main process.

    The trace is FOLDER/steps-A-B.pt.trace.json, A and B counted from 1: chrome://tracing, ui.perfetto.dev and
    TensorBoard's profiler read it. steps: 0 traces nothing. first_step, last_step: steps taken at the start and at the
    end of the run. Raises ValueError if the run is too short.
    """
    left = last_step - first_step
    fits = steps == 0 or 0 < steps <= left - WARMUP_STEPS
    most = left - WARMUP_STEPS
    allowed = f"from 1 to {most}" if most > 0 else "leave it out or raise train.steps"
    require(fits, "--profile", steps, f"{allowed}: {left} steps are left, {WARMUP_STEPS} warm up")
    if steps == 0 or not distributed.is_main():
        yield lambda: None
        return
    begin = first_step + WARMUP_STEPS

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"steps-{begin + 1}-{first_step + profiler.step_num}.pt.trace.json"  # fewer after a SIGTERM
        profiler.export_chrome_trace(str(path))
        log.info("Trace: %s", path)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * distributed.on_gpu()
    plan = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
