"""Lets every test import the helpers of other folders (processes, tiny_models); spawned children inherit this path.

Counts the faults and surroundings that a session has tried and survived, and tells them at its end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

# Before numpy and torch are imported: workers of xdist that each take all cores wait for each other.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // workers)))

for folder in sorted(path for path in Path(__file__).parent.rglob("*") if path.is_dir() and path.name != "__pycache__"):
    sys.path.insert(0, str(folder))

# No deadlines: a busy machine is slow, not wrong. In CI the same examples every time.
settings.register_profile("modstruct", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("modstruct")

# Ignored in the background of a script and under nohup; the processes that tests start would inherit that.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # a handler ends with the exec, so children have the default

LAUNCHERS_WORDS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
GIVEN = {name: os.environ[name] for name in LAUNCHERS_WORDS if name in os.environ}


@pytest.fixture(autouse=True)
def _no_processes_left():
    """A command that a test calls in this process leaves no process group and no words of a launcher to the next."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    for name in LAUNCHERS_WORDS:
        os.environ.pop(name, None)
    os.environ.update(GIVEN)


TRIED: dict[str, list[int]] = defaultdict(lambda: [0, 0])


@contextmanager
def _tried(kind: str) -> Iterator[None]:
    TRIED[kind][0] += 1
    yield
    TRIED[kind][1] += 1


@pytest.fixture
def tried():
    """`with tried(kind):` holds one fault or surrounding and what must be true in it."""
    return _tried


def pytest_configure(config):
    # xdist begins with the files of most tests; those of several processes have few, take longest, and would come last,
    # one worker waiting for the other. In order of their names they come in the middle.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_terminal_summary(terminalreporter):
    if not TRIED:
        return
    width = max(map(len, TRIED))
    terminalreporter.section("tried and survived")
    terminalreporter.write_line(f"{'':<{width}}  tried  survived")
    for kind, (tried, survived) in TRIED.items():
        terminalreporter.write_line(f"{kind:<{width}}  {tried:>5}  {survived:>8}")
    tried, survived = (sum(column) for column in zip(*TRIED.values(), strict=True))
    terminalreporter.write_line(f"{'all':<{width}}  {tried:>5}  {survived:>8}")
