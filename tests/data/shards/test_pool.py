"""Jobs over processes come back in order, a few at a time; a process that is killed is said."""

from __future__ import annotations

import os

import pytest

from modstruct.data.shards.pool import mapping
from modstruct.errors import RunError


def test_results_come_in_order_while_few_jobs_are_held():
    taken = []
    jobs = (taken.append(n) or -n for n in range(50))
    with mapping(2, 50) as run:
        results = run(abs, jobs)
        assert [next(results) for _ in range(5)] == [*range(5)]
        assert len(taken) <= 10
        assert [*results] == [*range(5, 50)]
    with mapping(8, 3, worth=4) as run:
        assert run is map


def test_a_process_that_is_killed_is_said():
    with (
        pytest.raises(RunError, match=r"^one of 2 processes has ended, as the kernel .*: give fewer"),
        mapping(3, 2) as run,
    ):
        list(run(os._exit, [9, 9]))
