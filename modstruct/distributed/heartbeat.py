"""Ends a run whose processes wait for each other for ever, and names the process that did not arrive.

A collective waits for hours, since it must outlast what the main process does alone (indexing, searching). So a thread
of every process tells a store every few seconds how far training has come. The main process compares; the others watch
the main process. The training thread itself only counts: a step costs nothing, and no collective is added, so it serves
gloo and NCCL alike.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from modstruct import distributed
from modstruct.cli import speaks_for_its_host

log = logging.getLogger("modstruct")
MOST_SECONDS_BETWEEN_BEATS = 10.0
BEATS_IN_A_TIMEOUT = 8


@dataclass
class Sign:
    """What a process says of itself."""

    beat: int
    """Counts up as long as the process runs at all."""
    position: int
    """Counts up with every batch that comes and every step that is done."""
    hurried: bool
    """Whether the position has to move: not while the main process measures and the others wait for it."""
    in_collective: bool
    """Whether the training thread waits for other processes."""
    doing: str

    def encode(self) -> str:
        return json.dumps(vars(self))


class Watch:
    """Tells from the signs of all processes who has not moved for a time. It reads no clock: callers bring theirs."""

    def __init__(self, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds
        self.signs: dict[int, Sign] = {}
        self._beaten: dict[int, float] = {}
        self._moved: dict[int, float] = {}
        self._looked: float | None = None

    def look(self, signs: dict[int, Sign | None], now: float) -> str | None:
        """Who holds the run up, in words; None while all is well. signs: by rank, None before the first one came."""
        if self._looked is not None and now - self._looked > self.timeout_seconds / 2:
            # This process itself has slept (a suspended job): what it has missed meanwhile says nothing of the others.
            self._beaten, self._moved = {}, {}
        self._looked = now
        for rank, sign in signs.items():
            before = self.signs.get(rank)
            if rank not in self._beaten or (sign and (before is None or before.beat != sign.beat)):
                self._beaten[rank] = now
            moved = sign is None or before is None or before.position != sign.position or not sign.hurried
            if rank not in self._moved or moved:
                self._moved[rank] = now
            if sign is not None:
                self.signs[rank] = sign
        silent = [rank for rank in signs if now - self._beaten[rank] > self.timeout_seconds]
        if silent:
            return "; ".join(self._silent(rank) for rank in silent)
        if all(now - self._moved[rank] <= self.timeout_seconds for rank in signs):
            return None
        # Signs come late by a beat or two: the one that others wait for may seem to have moved after them.
        return self._stuck([rank for rank in signs if now - self._moved[rank] > self.timeout_seconds / 2])

    def _silent(self, rank: int) -> str:
        last = f", last seen as it {self.signs[rank].doing}" if rank in self.signs else ""
        return f"process {rank} gives no sign of life (stopped, or its host is lost){last}"

    def _stuck(self, waiting: list[int]) -> str:
        """When one process hangs, all come to wait; the one to name is behind, or is the one that waits for nobody."""
        furthest_back = min(self.signs[rank].position for rank in waiting)
        behind = [rank for rank in waiting if self.signs[rank].position == furthest_back]
        named = [rank for rank in behind if not self.signs[rank].in_collective] or behind
        return "; ".join(f"process {rank} does not go on: it {self.signs[rank].doing}" for rank in named)


class Heartbeat:
    """Context in which a run is watched. Outside of it, and on one process alone, it only counts.

    timeout_minutes: train.hang_timeout_minutes; 0 watches nothing.
    """

    def __init__(self, timeout_minutes: float):
        self.timeout_minutes, self.timeout_seconds = timeout_minutes, timeout_minutes * 60
        self.interval = min(MOST_SECONDS_BETWEEN_BEATS, self.timeout_seconds / BEATS_IN_A_TIMEOUT)
        self.position, self.hurried, self.doing = 0, False, "starts"
        self._ended = threading.Event()
        self._training = threading.get_ident()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self.timeout_minutes > 0 and distributed.world_size() > 1:
            self._store = distributed.own_store("heartbeat", self.interval * 2)
            self._answered = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
            # A call to a store whose host has stopped never returns, whatever its timeout.
            threading.Thread(target=self._await_answers, name="heartbeat answers", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=1)

    def following(self, batches: Iterable, first_step: int) -> Iterator:
        """The same batches; the time to the next one, and the time until it is requested, are watched."""
        step, iterator = first_step, iter(batches)
        self.hurried = True
        try:
            while True:
                step += 1
                self._reach(f"waits for the data of step {step}")
                batch = next(iterator, None)
                if batch is None:
                    return
                self._reach(f"takes step {step}")
                yield batch
        finally:
            self.hurried = False

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Checkpoints and measurements: they last as long as they last, but every process must stay alive."""
        hurried, self.hurried = self.hurried, False
        try:
            yield
        finally:
            self._reach(self.doing)
            self.hurried = hurried

    def _reach(self, doing: str) -> None:
        self.doing = doing
        self.position += 1

    def _run(self) -> None:
        rank = distributed.rank()
        watched = range(1, distributed.world_size()) if rank == 0 else (0,)
        watch, beat = Watch(self.timeout_seconds), 0
        while not self._ended.wait(self.interval):
            beat += 1
            try:
                self._store.set(str(rank), self._sign(beat).encode())
                signs = {other: self._read(other) for other in watched}
                # The main process judges itself too, or it would name the one that waits for it.
                signs |= {0: self._sign(beat)} if rank == 0 else {}
                verdict = self._store.get("verdict").decode() if self._store.check(["verdict"]) else None
            except Exception:  # the connection is lost; `_await_answers` gives it some time
                log.debug("the processes' store does not answer", exc_info=beat == 1)
                continue
            self._answered = time.monotonic()
            if verdict:
                self._end()
            # Rank 0 compares everybody; the others look for its life only, since it may lie behind without being late.
            if rank != 0 and signs[0] is not None:
                signs[0].hurried = False
            found = watch.look(signs, self._answered)
            if found:
                with suppress(Exception):  # without the store the others find out by themselves
                    self._store.set("verdict", found)
                self._end(found)

    def _await_answers(self) -> None:
        """End this process when the store, which lies in the main process, has long been silent."""
        looked = time.monotonic()
        while not self._ended.wait(self.interval):
            slept, looked = time.monotonic() - looked, time.monotonic()
            if slept > self.timeout_seconds / 2:  # a suspended job continues
                self._answered = looked
            if looked - self._answered > self.timeout_seconds + self.interval:
                self._end("process 0 gives no sign of life (stopped, or its host is lost): the store does not answer")

    def _read(self, rank: int) -> Sign | None:
        key = str(rank)
        return Sign(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _sign(self, beat: int) -> Sign:
        where, in_collective = _place(sys._current_frames().get(self._training))
        return Sign(beat, self.position, self.hurried, in_collective, f"{self.doing}{where}")

    def _end(self, found: str | None = None) -> None:
        """End this process; the training thread cannot, it waits. found: None if another process says it."""
        if found and speaks_for_its_host():  # without the main process all others find the same
            message = (
                f"train.hang_timeout_minutes = {self.timeout_minutes:g}: {found}; every process ends here, "
                "`--resume latest` resumes from the last checkpoint"
            )
            print(f"\nerror (process {distributed.rank()}): {message}", file=sys.stderr, flush=True)
            log.debug(message)  # into the log file
        # Nobody leaves before all have read the verdict: a lost connection would be an error of its own.
        time.sleep(2 * self.interval)
        os._exit(1)


def _place(frame) -> tuple[str, bool]:
    """Innermost line of modstruct that a thread is at, in words, and whether it is inside a collective."""
    if frame is None:
        return "", False
    stack = traceback.extract_stack(frame, limit=None)
    ours = [entry for entry in stack if f"{os.sep}modstruct{os.sep}" in entry.filename]
    in_collective = any(entry.filename.endswith("distributed_c10d.py") for entry in stack)
    if not ours:
        return "", in_collective
    file = ours[-1].filename.rpartition(f"{os.sep}modstruct{os.sep}")[2]
    return f" (modstruct/{file}:{ours[-1].lineno}, {ours[-1].name})", in_collective
