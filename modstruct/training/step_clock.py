"""Where the time of a step goes: seconds of each phase, averaged over the steps since the last reading."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.profiler import record_function

from modstruct import distributed

PHASES = ("data", "forward", "loss", "backward", "optimizer")
Item = TypeVar("Item")


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
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
