"""A trace of a few steps: where each operator's time goes, for Chrome's or TensorBoard's viewer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from modstruct import distributed
from modstruct.errors import require

WARMUP_STEPS = 3  # left out: the first steps compile, allocate and fill the loader
log = logging.getLogger("modstruct")


@contextmanager
def profiled(folder: Path, steps: int, first_step: int, last_step: int) -> Iterator[Callable[[], None]]:
    """Gives a function to call after every step; `steps` steps after the warm-up are traced on the main process.

    The trace is FOLDER/steps-A-B.pt.trace.json, A and B counted from 1: chrome://tracing, ui.perfetto.dev and
    TensorBoard's profiler read it. steps: 0 traces nothing. first_step, last_step: steps taken at the start and at the
    end of the run. Raises ValueError if the run is too short.
    """
    left = last_step - first_step
    fits = steps == 0 or 0 < steps <= left - WARMUP_STEPS
    require(fits, "--profile", steps, f"from 1 to {left - WARMUP_STEPS}: {left} steps are left, {WARMUP_STEPS} warm up")
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
