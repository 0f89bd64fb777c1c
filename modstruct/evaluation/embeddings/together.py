"""Work that processes do apart from each other: shared progress, and an error that reaches all of them soon."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tqdm import tqdm

from modstruct.distributed import FailedElsewhere, fail_together, is_main, own_store, world_size

STORE_TIMEOUT_SECONDS = 60.0
_number = itertools.count()


class Progress:
    """Counts what all processes have done, and shows it on the main one. Every process makes one alike."""

    def __init__(self, title: str, total: int, unit: str):
        self._store = own_store(f"apart {next(_number)}", STORE_TIMEOUT_SECONDS) if world_size() > 1 else None
        self._done = 0
        self._bar = tqdm(total=total, desc=title, unit=unit, leave=False, disable=not is_main())

    def add(self, count: int) -> None:
        """Note that this process has done so many more. Raises FailedElsewhere if another process has failed."""
        self._done += count
        if self._store is not None:
            self._done = self._store.add("done", count)
            if self._store.check(["failed"]):
                raise FailedElsewhere(f"another process failed first: {self._store.get('failed').decode()}")
        self._bar.update(self._done - self._bar.n)

    def failed(self, error: Exception) -> None:
        """Tell the others, at their next `add`."""
        if self._store is not None and not isinstance(error, FailedElsewhere):
            self._store.set("failed", _told(error))

    def close(self) -> None:
        self._bar.close()


def apart(work: Callable[[Progress], None], title: str, total: int, unit: str) -> None:
    """Do this process's share of the work; returns when all have done theirs. Every process calls it.

    total: of all processes, in `unit`. An error of one process ends the work of all: there it is raised as it is, and
    elsewhere FailedElsewhere.
    """
    progress, error = Progress(title, total, unit), None
    try:
        work(progress)
    except Exception as caught:  # told to the others first
        error = caught
        progress.failed(error)
    finally:
        progress.close()
    fail_together(error, _told(error))


def _told(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}"
