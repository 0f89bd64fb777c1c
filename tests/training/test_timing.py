"""Seconds of the phases of a step: they add up, and on a GPU nothing waits for them between two readings."""

from __future__ import annotations

import itertools

import pytest
import torch

from modstruct import distributed
from modstruct.training import timing
from modstruct.training.timing import PHASES, StepClock


@pytest.fixture
def ticking(monkeypatch) -> StepClock:
    """A clock that goes on by one second whenever somebody looks at it."""
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    return StepClock()


def test_a_phase_is_the_mean_over_the_steps_since_the_last_reading(ticking):
    for _ in range(4):
        with ticking.phase("forward"):
            pass
        with ticking.phase("loss"), ticking.phase("inside"):
            pass
    assert ticking.read(steps=4) == {"forward": 1.0, "loss": 3.0, "inside": 1.0}
    assert ticking.read(steps=1) == {}


def test_a_phase_entered_twice_a_step_counts_both_times(ticking):
    for _ in range(2):
        with ticking.phase("backward"):
            pass
    assert ticking.read(steps=1) == {"backward": 2.0}


def test_waiting_hands_on_every_item_and_counts_each_wait(ticking):
    assert list(ticking.waiting([[1], [2], [3]])) == [[1], [2], [3]]
    assert ticking.read(steps=4) == {"data": 1.0}  # the fourth wait finds the end


def test_a_phase_that_fails_is_counted_and_the_error_goes_on(ticking):
    with pytest.raises(ValueError, match="no"), ticking.phase("loss"):
        raise ValueError("no")
    assert ticking.read(steps=1) == {"loss": 1.0}


def test_phases_are_labels_in_a_profile():
    clock = StepClock()
    with torch.profiler.profile() as profile:
        for name in PHASES:
            with clock.phase(name):
                torch.ones(1)
    assert set(PHASES) <= {event.key for event in profile.key_averages()}


def test_on_a_gpu_nothing_is_waited_for_until_the_reading(monkeypatch):
    seen = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            seen.append("record")

        def elapsed_time(self, _: Event) -> float:
            assert seen[-1] == "synchronize"
            return 250.0  # milliseconds

    monkeypatch.setattr(distributed, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    clock = StepClock()
    for _ in range(3):
        with clock.phase("forward"):
            pass
    assert seen == ["record"] * 6
    assert clock.read(steps=3) == {"forward": 0.25}
    assert seen.count("synchronize") == 1
