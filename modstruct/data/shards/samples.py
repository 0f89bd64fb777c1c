"""All samples of a run's sources as one table on disk, shared by every process of a host through the page cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modstruct.config import DataConfig, Source
from modstruct.data.shards.faults import judge_sources
from modstruct.data.shards.index import ROW, ShardIndex
from modstruct.data.shards.index_files import INDEX_VERSION, UnreadableShard, index_file_name, index_shards
from modstruct.data.shards.sources import SourceShards, expand_sources, is_pipe
from modstruct.errors import refuse
from modstruct.files import atomic_write, locked


class Samples:
    """The samples of one or several sources, numbered in order of source, shard and place in the shard.

    The rows lie in a memory-mapped file of 28 bytes a sample; an object of this class itself holds a few bytes a shard
    and can be sent to another process.
    """

    def __init__(self, table: Path, weights: Sequence[float] | None = None):
        self._table = table
        self.weights = weights
        """Weight of each source; None if no source has one."""
        description = json.loads(table.with_suffix(".json").read_text())
        self.shards: list[str] = description["shards"]
        """Path or `pipe:` command of each shard."""
        self.size_bytes = np.array(description["size_bytes"], dtype=np.int64)
        """(shards,) size of each shard when it was indexed."""
        self.modified_ns = np.array(description["modified_ns"], dtype=np.int64)
        """(shards,) time of each shard's last change when it was indexed; -1 for pipes."""
        self.shard_starts = _starts(description["samples"])
        """(shards + 1,) number of the first sample of each shard, and the total."""
        self.source_starts = _starts(description["source_shards"])
        """(sources + 1,) number of the first shard of each source, and the total."""
        self.shard_faults: list[dict] = description["shard_faults"]
        """For each shard: {"faults": samples left out by cause, "examples": a key for each cause, "broken": reason}."""
        self.fingerprint: str = description["fingerprint"]
        """Hash of the places and sizes of all members: equal wherever the same shards lie."""
        self._rows: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_rows": None}  # a memory map would travel as a copy

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def rows(self) -> np.ndarray:
        """(samples,) of modstruct.data.shards.index.ROW, memory-mapped at first use in each process."""
        if self._rows is None:
            self._rows = np.memmap(self._table, dtype=ROW, mode="r")
        return self._rows

    def shard_of(self, sample: int) -> int:
        """Number of the shard that a sample lies in."""
        return int(self.shard_starts.searchsorted(sample, side="right")) - 1

    def shard_sizes(self) -> list[np.ndarray]:
        """For each source, the number of samples in each of its shards."""
        sizes = np.diff(self.shard_starts)
        return [sizes[a:b] for a, b in zip(self.source_starts[:-1], self.source_starts[1:], strict=True)]


def open_samples(sources: Sequence[Source], config: DataConfig, field: str, progress: bool = False) -> Samples:
    """Expand, check and index the sources; what an earlier run has indexed is read from data.cache.

    field: the recipe's field, for errors ("data.train", …). progress: draw a bar and log what is wrong with the shards
    (the main process). Several processes may call it at once, but all but one of a host would only wait: see
    modstruct.distributed.main_first. Raises ValueError for what expand_sources refuses, for a `pipe:` shard without an
    index, a source without a usable sample, and a source of which more than data.max_bad_share cannot be used.
    """
    expanded = expand_sources(sources, config, field)
    cache = Path(config.cache).expanduser() / "indexes"
    shards = [_Shard(name, source, cache, field) for source in expanded for name in source.shards]
    layout = [INDEX_VERSION, [len(source.shards) for source in expanded], [shard.identity for shard in shards]]
    table = cache / "sets" / f"{hashlib.blake2b(json.dumps(layout).encode(), digest_size=16).hexdigest()}.rows"
    complete = table.with_suffix(".json")  # written last, so the rows are there if it is
    if not complete.exists():
        with locked(table.with_suffix(".lock")):
            if not complete.exists():
                _write_table(table, shards, expanded, field, progress)
    weights = [source.weight for source in expanded]
    samples = Samples(table, None if weights[0] is None else weights)
    judge_sources(samples, [source.pattern for source in expanded], config.max_bad_share, field, say=progress)
    return samples


class _Shard:
    """One shard and the file that its index lies in, or will lie in."""

    def __init__(self, name: str, source: SourceShards, cache: Path, field: str):
        self.name = name
        self.size_bytes = self.modified_ns = -1
        if not is_pipe(name):
            status = os.stat(name)
            self.size_bytes, self.modified_ns = status.st_size, status.st_mtime_ns
        file = index_file_name(name, self.size_bytes, self.modified_ns)
        places = [folder / file for folder in (source.index, cache) if folder is not None]
        self.index_file = next((place for place in places if place.exists()), cache / file)
        self.identity = [name, self.size_bytes, self.modified_ns]
        if is_pipe(name):
            if not self.index_file.exists():
                _refuse_pipe(field, name, f"no index of it in {places[0].parent}")
            self.identity.append(self.index_file.stat().st_mtime_ns)


def _refuse_pipe(field: str, shard: str, trouble: str) -> None:
    command = "python tools/index_shards.py 'pipe:COMMAND' --output FOLDER"
    refuse(field, shard, f"{trouble}; make it with `{command}` and give the source index: FOLDER")


def _write_table(
    table: Path, shards: Sequence[_Shard], sources: Sequence[SourceShards], field: str, progress: bool
) -> None:
    fingerprint = hashlib.blake2b(digest_size=16)
    shard_faults, counts, sizes = [], [], []
    try:
        index_shards([(s.name, s.index_file) for s in shards if not s.index_file.exists()], progress)
        with atomic_write(table) as file:
            for shard in shards:  # one at a time: the indexes of a large set together would fill the memory
                index = _load(shard, field)
                rows = index.rows.tobytes()
                file.write(rows)
                fingerprint.update(len(rows).to_bytes(8, "little") + rows)
                counts.append(len(index.rows))
                sizes.append(index.size_bytes)
                shard_faults.append({"faults": index.faults, "examples": index.examples, "broken": index.broken})
    except UnreadableShard as error:
        refuse(field, error.shard, f"could not be read ({error.reason}); repair it or leave it out of the pattern")
    description = {
        "shards": [shard.name for shard in shards],
        "size_bytes": sizes,
        "modified_ns": [shard.modified_ns for shard in shards],
        "samples": counts,
        "source_shards": [len(source.shards) for source in sources],
        "shard_faults": shard_faults,
        "fingerprint": fingerprint.hexdigest(),
    }
    with atomic_write(table.with_suffix(".json")) as file:
        file.write(json.dumps(description).encode())


def _load(shard: _Shard, field: str) -> ShardIndex:
    index = ShardIndex.load(shard.index_file)
    if index is None and is_pipe(shard.name):
        _refuse_pipe(field, shard.name, f"its index {shard.index_file} is damaged")
    if index is None:  # damaged in the cache
        index_shards([(shard.name, shard.index_file)], progress=False)
        index = ShardIndex.load(shard.index_file)
    return index


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))]).astype(np.int64)
