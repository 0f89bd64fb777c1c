"""The samples that a checkpoint was made with, found again although a few shards have gone or changed meanwhile."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modstruct.config import DataConfig, Source
from modstruct.data.shards.samples import Samples, open_samples
from modstruct.data.shards.sources import is_pipe

log = logging.getLogger(__name__)
NAMED = 3


def open_saved_samples(
    sources: Sequence[Source], config: DataConfig, field: str, fingerprint: str, progress: bool = False
) -> Samples:
    """As `open_samples`, but of shards that were hurt since, the earlier table in data.cache is taken.

    fingerprint: of the samples wanted. The order of data then stays as it was, and the reader finds the samples of the
    hurt shards to be bad: other samples take their place and are counted, as they are in a run that goes on. Where that
    would be more than data.max_bad_share, or other shards were named, the samples are those found now.
    """
    error = found = None
    try:
        found = open_samples(sources, config, field, progress)
    except ValueError as refused:  # a shard that the pattern names is missing
        error = refused
    if found is None or found.fingerprint != fingerprint:
        weights = [source.weight for source in sources]
        for table in _tables(config, fingerprint):
            saved = Samples(table, None if weights[0] is None else weights)
            hurt = _hurt(saved)
            named = found is None or set(found.shards) <= set(saved.shards)
            lost = sum(int(saved.shard_starts[shard + 1] - saved.shard_starts[shard]) for shard in hurt)
            if named and len(saved.source_starts) == len(sources) + 1 and lost <= config.max_bad_share * len(saved):
                if progress:
                    names = ", ".join(saved.shards[shard] for shard in hurt[:NAMED])
                    changed = f"{len(hurt)} of {len(saved.shards)} shards are missing or changed since the checkpoint"
                    log.warning("%s: %s (%s); other samples take the place of theirs", field, changed, names)
                return saved
    if error is not None:
        raise error
    return found


def _tables(config: DataConfig, fingerprint: str) -> list[Path]:
    """Tables in the cache that hold these samples."""
    folder = Path(config.cache).expanduser() / "indexes" / "sets"
    described = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".rows").exists()]
    return [
        path.with_suffix(".rows") for path in described if json.loads(path.read_text())["fingerprint"] == fingerprint
    ]


def _hurt(samples: Samples) -> np.ndarray:
    """Numbers of the shards that are not the files that were indexed."""

    def intact(shard: int) -> bool:
        if is_pipe(samples.shards[shard]):
            return True
        try:
            status = os.stat(samples.shards[shard])
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (samples.size_bytes[shard], samples.modified_ns[shard])

    return np.array([shard for shard in range(len(samples.shards)) if not intact(shard)], dtype=np.int64)
