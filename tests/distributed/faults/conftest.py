"""Counts the faults that a session has tried and survived, and tells them at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

TRIED: dict[str, list[int]] = defaultdict(lambda: [0, 0])


@contextmanager
def _tried(kind: str) -> Iterator[None]:
    TRIED[kind][0] += 1
    yield
    TRIED[kind][1] += 1


@pytest.fixture
def tried():
    """`with tried(kind):` holds one fault and what must be true after it."""
    return _tried


def pytest_terminal_summary(terminalreporter):
    if not TRIED:
        return
    width = max(map(len, TRIED))
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':<{width}}  tried  survived")
    for kind, (tried, survived) in TRIED.items():
        terminalreporter.write_line(f"{kind:<{width}}  {tried:>5}  {survived:>8}")
    tried, survived = (sum(column) for column in zip(*TRIED.values(), strict=True))
    terminalreporter.write_line(f"{'all':<{width}}  {tried:>5}  {survived:>8}")
