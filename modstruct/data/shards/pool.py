"""Jobs over several processes, in order and within bounds of memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from modstruct import stopping
from modstruct.errors import RunError

# Below this many short jobs, such as indexing a shard, processes take longer to start than the work itself.
SHORT_JOBS_WORTH_A_POOL = 16


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def mapping(workers: int, jobs: int, worth: int = 2) -> Iterator[Callable]:
    """As `map`, over at most so many processes; no more than a few jobs and results are held at a time.

    jobs: how many there are; below `worth` of them this process does them. Raises RunError where a process is killed.
    """
    if workers == 1 or jobs < worth:
        yield map
        return
    workers = min(workers, jobs)
    # spawn: a fork hangs in a process that has used torch or OpenMP
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=stopping.outlive_signals)

    def run(function: Callable, jobs: Iterable) -> Iterator:
        ahead: deque[Future] = deque()
        try:
            for job in jobs:
                with stopping.children_inherit_block():  # they start here
                    ahead.append(pool.submit(function, job))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            lost = f"one of {workers} processes has ended, as the kernel kills one where memory runs out"
            raise RunError(f"{lost}: give fewer; what is done by now stays done") from None

    try:
        yield run
    except BaseException:  # an interruption, say: what is under way is not waited for
        for process in (pool._processes or {}).values():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
