"""The files that shard indexes are kept in, and the making of many of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from modstruct.data.shards.index import index_tar

INDEX_VERSION = 1
# Below this many shards a pool of processes takes longer to start than the indexing itself.
SHARDS_WORTH_A_POOL = 16


class UnreadableShard(OSError):
    """A shard whose bytes could not be read."""

    def __init__(self, shard: str, reason: str):
        super().__init__(shard, reason)  # both in args, so that it travels between processes
        self.shard, self.reason = shard, reason

    def __str__(self) -> str:
        return f"{self.shard}: {self.reason}"


def index_file_name(shard: str, size_bytes: int = -1, modified_ns: int = -1) -> str:
    """Name of a shard's index file; a local shard (given with size and time) that changes gets another name."""
    identity = json.dumps([INDEX_VERSION, shard, size_bytes, modified_ns])
    return f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.npz"


def index_shards(shards: Sequence[tuple[str, Path]], progress: bool) -> None:
    """Index each (path of a tar, file to save its index in), over several processes when there are many.

    progress: draw a bar if it takes longer than a second. Raises UnreadableShard.
    """
    from tqdm import tqdm

    workers = min(os.cpu_count() or 1, 16) if len(shards) >= SHARDS_WORTH_A_POOL else 1
    with (
        _mapping(workers) as run,
        tqdm(desc="indexing shards", total=len(shards), unit="shard", delay=1, disable=not progress) as bar,
    ):
        for _ in run(_index_one, shards):
            bar.update()


def _index_one(job: tuple[str, Path]) -> None:
    shard, path = job
    try:
        index = index_tar(shard)
    except OSError as error:
        raise UnreadableShard(shard, error.strerror or str(error)) from None
    index.save(path)


@contextmanager
def _mapping(workers: int) -> Iterator[Callable]:
    if workers == 1:
        yield map
        return
    from concurrent.futures import ProcessPoolExecutor

    # spawn: a fork hangs in a process that has used torch or OpenMP
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool.map
