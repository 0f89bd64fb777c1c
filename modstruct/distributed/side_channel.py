"""Small values between the processes for a thread beside training, whose collectives it must not mix with."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

from modstruct.distributed.processes import is_main, own_store, rank, world_size

TIMEOUT_SECONDS = 60.0
"""In which the store must answer."""
POLL_SECONDS = 0.01
_number = itertools.count()


class SideChannel:
    """For one thread of every process, which all call its methods in the same order. Values are of JSON's kinds.

    Every process makes one at the same time. A process that has ended is not noticed: the training thread does that.
    Raises RuntimeError where the process that holds the store does not answer.
    """

    def __init__(self) -> None:
        name = f"side channel {next(_number)}"
        self._store = own_store(name, TIMEOUT_SECONDS) if world_size() > 1 else None
        self._round = 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank, on the main process; nothing on the others."""
        if self._store is None:
            return [value]
        self._round += 1
        if not is_main():
            self._store.set(f"{self._round} {rank()}", json.dumps(value))
            return []
        return [value, *(self._take(f"{self._round} {process}") for process in range(1, world_size()))]

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self._store is None:
            return value
        self._round += 1
        if is_main():
            self._store.set(f"{self._round}", json.dumps(value))
            return value
        return self._wait_for(f"{self._round}")

    def _take(self, key: str) -> Any:
        value = self._wait_for(key)
        assert self._store is not None
        self._store.delete_key(key)  # an index of a large model's pieces is no small value to keep
        return value

    def _wait_for(self, key: str) -> Any:
        assert self._store is not None
        while not self._store.check([key]):
            time.sleep(POLL_SECONDS)
        return json.loads(self._store.get(key))
