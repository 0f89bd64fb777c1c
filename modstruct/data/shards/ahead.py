"""What the coming steps of a process read, fetched before they need it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import numpy as np

from modstruct.data.shards.pipes import PipeCache

FETCHES = 2  # at once, of each loader process
LOOKED_AT_ONCE = 64  # steps; looking further would hold up the first batch


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

    def __contains__(self, shard: int) -> bool:
        """Whether a shard that was returned is still needed, as far as is known."""
        return shard in self._last_need

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
                if shard in self._coming:
                    self._pipes.fetch(self._shards[shard], int(self._coming.size_bytes[shard]))
