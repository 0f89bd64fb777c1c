"""What the coming steps of a process read, fetched before they need it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from modstruct.data.faults import BadSample
from modstruct.data.shards.pipes import PipeCache
from modstruct.data.shards.reader import RawSample, ShardReader

FETCHES = 2  # at once, of each loader process
LOOKED_AT_ONCE = 64  # steps; looking further would hold up the first batch
READS = 32  # at once, of each loader process: at 30 ms each they bring a thousand samples a second
# Threads cost more than they bring while reads are quick, as those of what the system has in memory are. On a busy
# machine some quick ones take long, too, so it is a surplus of slow ones that counts. Once it is reached, threads stay.
SLOW_READ_SECONDS, SLOW_READS = 1e-3, 4
SAMPLE_BYTES = 8 << 10  # that a sample takes in memory beside its image
Results = list[RawSample | BadSample]


class ReadAhead:
    """Reads the samples of items in order, as far ahead as room_bytes hold, several at once if reads take long.

    samples_of: the samples (n,) of an item. Items are asked for in steps of `stride` up to `stop`; after any other one
    it starts anew from there. Half of the room is filled while the other half is used: what lies side by side in a
    shard and is needed within one half is fetched by one read, so where that holds a window of blocks, blocks are read
    whole. beyond_item: whether it reads ahead of the item that is asked for.
    """

    def __init__(
        self,
        reader: ShardReader,
        samples_of: Callable[[int], np.ndarray],
        room_bytes: float,
        stride: int,
        stop: int,
        beyond_item: bool = True,
    ):
        self.reader, self.samples_of, self.beyond_item = reader, samples_of, beyond_item
        self.half_bytes, self.stride, self.stop = room_bytes / 2, stride, stop
        self._threads = ThreadPoolExecutor(READS, "read ahead")
        # Of each sample: the run that it is read in, its place there, its bytes.
        self._coming: deque[tuple[Results | Future[Results], int, int]] = deque()
        self._held_bytes = 0
        self._slow_reads = SLOW_READS * int(reader.samples.in_objects.any())  # more than quick ones
        self._due: int | None = None  # the item of the first of them
        self._unread = 0, 0  # item and row, the first that is not among them

    def read(self, item: int, count: int) -> Iterator[RawSample | BadSample]:
        """Each of the `count` samples of an item, or what is wrong with it."""
        if item != self._due:
            self._coming.clear()
            self._held_bytes, self._unread = 0, (item, 0)
        self._due = None
        self._end = self.stop if self.beyond_item else item + 1
        for _ in range(count):
            if self._held_bytes < self.half_bytes:
                self._start_reading()
            run, place, size = self._coming.popleft()
            self._held_bytes -= size
            yield (run if isinstance(run, list) else run.result())[place]
        self._due = item + self.stride

    def _start_reading(self) -> None:
        """As many samples as half of the room holds, at least one; none after the last."""
        samples, sizes, total = [], [], 0
        item, row = self._unread
        while total < self.half_bytes and item < self._end:
            found = self.samples_of(item)
            left = found[row:]
            taken = self.reader.samples.rows[left]["image_bytes"].astype(np.int64) + SAMPLE_BYTES
            fitting = int(np.cumsum(taken).searchsorted(self.half_bytes - total)) + 1
            samples.append(left[:fitting])
            sizes += taken[:fitting].tolist()
            total += sum(sizes[-len(samples[-1]) :])
            item, row = (item, row + fitting) if row + fitting < len(found) else (item + self.stride, 0)
        self._unread = item, row
        if not samples:
            return
        together = np.concatenate(samples)
        places: list = [None] * len(together)
        for run in self.reader.runs(together):
            results = self._read(together[run].tolist())
            for place, number in enumerate(run):
                places[number] = results, place, sizes[number]
        self._coming.extend(places)
        self._held_bytes += total

    def _read(self, samples: list[int]) -> Results | Future[Results]:
        if self._slow_reads >= SLOW_READS:
            return self._threads.submit(self.reader.read_run, samples)
        start = time.perf_counter()
        results = self.reader.read_run(samples)
        slow = time.perf_counter() - start > SLOW_READ_SECONDS
        self._slow_reads = max(0, self._slow_reads + (1 if slow else -1))
        return results


def read_ahead(reader: ShardReader, samples: np.ndarray, room_bytes: float) -> Iterator[RawSample | BadSample]:
    """Each of samples (n,), or what is wrong with it."""
    return ReadAhead(reader, lambda _: samples, room_bytes, stride=1, stop=1).read(0, len(samples))


class ComingShards:
    """The shards that the coming steps need, as far ahead as they fit in room_bytes.

    shards_of: of a step. size_bytes: (shards,) of all. stop_step: the first step that is not read.
    """

    def __init__(
        self, shards_of: Callable[[int], Iterable[int]], size_bytes: np.ndarray, room_bytes: float, stop_step: int
    ):
        self.shards_of, self.size_bytes = shards_of, size_bytes
        self.room_bytes, self.stop_step = room_bytes, stop_step
        self._next_step = 0
        self._last_need: dict[int, int] = {}  # of the shards between the step at hand and the next to look at
        self._bytes = 0

    @property
    def needed(self) -> list[int]:
        """Those that were returned and are not done with."""
        return list(self._last_need)

    def newly_seen(self, step: int) -> list[int]:
        """Shards of `step` and those after it that no earlier call has returned or that were done with meanwhile.

        step: not below that of the call before.
        """
        for shard in [shard for shard, last in self._last_need.items() if last < step]:
            del self._last_need[shard]
            self._bytes -= int(self.size_bytes[shard])
        self._next_step = max(self._next_step, step)
        found = []
        for ahead in range(self._next_step, min(self.stop_step, self._next_step + LOOKED_AT_ONCE)):
            if ahead > step and self._bytes >= self.room_bytes:
                break
            for shard in self.shards_of(ahead):
                if shard not in self._last_need:
                    found.append(shard)
                    self._bytes += int(self.size_bytes[shard])
                self._last_need[shard] = ahead
            self._next_step = ahead + 1
        return found


class PipesAhead:
    """Fetches the `pipe:` shards of the coming steps in the background."""

    def __init__(self, coming: ComingShards, pipes: PipeCache, shards: Sequence[str]):
        self._coming, self._pipes, self._shards = coming, pipes, shards
        self._wanted: deque[int] = deque()
        self._threads: list[threading.Thread] = []

    def advance(self, step: int) -> None:
        """Called with each step that is about to be read."""
        self._wanted.extend(self._coming.newly_seen(step))
        for shard in self._coming.needed:  # what is done with leaves the cache first
            self._pipes.touch(self._shards[shard])
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        while len(self._threads) < min(FETCHES, len(self._wanted)):
            # A daemon: a run that ends does not wait for what it no longer needs.
            thread = threading.Thread(target=self._fetch, name="pipes ahead", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _fetch(self) -> None:
        with suppress(IndexError):  # all are fetched
            while True:
                shard = self._wanted.popleft()
                if shard in self._coming.needed:
                    self._pipes.fetch(self._shards[shard], int(self._coming.size_bytes[shard]))
