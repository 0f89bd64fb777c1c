"""All samples of a run's sources as one table on disk, which the processes of a host share through the page cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from modstruct.config import DataConfig, Source
from modstruct.data.faults import NAMED
from modstruct.data.shards.index import (
    INDEX_VERSION,
    REPEATED_KEY,
    ROW,
    ShardIndex,
    UnreadableShard,
    index_file_name,
    index_shards,
)
from modstruct.data.shards.members import LAYOUT
from modstruct.data.shards.pipes import pipe_cache
from modstruct.data.shards.sources import SourceShards, expand_sources, is_pipe
from modstruct.data.shards.texts import SourceRows, kept_looks
from modstruct.errors import refuse
from modstruct.files import atomic_write, locked

log = logging.getLogger(__name__)


class Samples:
    """The samples of one or several sources, numbered in order of source, shard and place in the shard.

    The rows are a memory-mapped file of 28 bytes a sample; the object itself holds a few bytes a shard and can be
    pickled to another process.
    """

    def __init__(self, table: Path, weights: Sequence[float] | None = None):
        self.table = table
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
        """For each shard: {"faults": samples left out by cause, "unused": members likewise, "examples": up to three of
        each cause, "broken": reason}."""
        self.fingerprint: str = description["fingerprint"]
        """Hash of the places and sizes of all members: equal for equal shards in any folder."""
        self.caption_lines: list[bool] = [False] * (len(self.source_starts) - 1)
        """For each source, whether the lines of KEY.txt are captions of their own."""
        self._rows: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_rows": None}  # a memory map would be pickled as a copy

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def content(self) -> str:
        """The fingerprint, and of which sources lines are captions: equal for equal samples and captions."""
        lines = "".join(str(int(of_source)) for of_source in self.caption_lines)
        return f"{self.fingerprint} lines {lines}" if any(self.caption_lines) else self.fingerprint

    def lines_are_captions(self, shard: int) -> bool:
        """Whether the lines of KEY.txt are captions of their own in a shard."""
        if not any(self.caption_lines):
            return False
        return self.caption_lines[int(self.source_starts.searchsorted(shard, side="right")) - 1]

    @property
    def rows(self) -> np.ndarray:
        """(samples,) of modstruct.data.shards.index.ROW, memory-mapped at first use in each process."""
        if self._rows is None:
            self._rows = np.memmap(self.table, dtype=ROW, mode="r")
        return self._rows

    def shard_of(self, sample: int) -> int:
        """Number of a sample's shard."""
        return int(self.shard_starts.searchsorted(sample, side="right")) - 1

    def place(self, sample: int) -> str:
        """Shard and number of a sample, for messages."""
        shard = self.shard_of(sample)
        return f"{self.shards[shard]}: sample {sample - int(self.shard_starts[shard])}"

    def shard_sizes(self) -> list[np.ndarray]:
        """For each source, the number of samples in each of its shards."""
        sizes = np.diff(self.shard_starts)
        return [sizes[a:b] for a, b in zip(self.source_starts[:-1], self.source_starts[1:], strict=True)]


def open_samples(sources: Sequence[Source], config: DataConfig, field: str, progress: bool = False) -> Samples:
    """Expand, check and index the sources; indexes of earlier runs are read from data.cache.

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
    samples = Samples(table, _weights(sources))
    _judge_sources(samples, [source.pattern for source in expanded], config.max_bad_share, field, say=progress)
    _decide_captions(samples, sources, config, field, say=progress)
    return samples


def open_saved_samples(
    sources: Sequence[Source], config: DataConfig, field: str, fingerprint: str | None, progress: bool = False
) -> Samples:
    """As `open_samples`, but where shards were lost or changed since, the earlier table in data.cache is used.

    fingerprint: of the samples of a checkpoint; None for a new run. The order of data then stays as it was, and
    the reader reports the samples of damaged shards as bad: they are substituted and counted, as in a run that was not
    interrupted. If they exceed data.max_bad_share, or the source names other shards, the samples are those found now.
    """
    found: Samples | ValueError
    try:
        found = open_samples(sources, config, field, progress)
    except ValueError as refused:  # a shard that the pattern names is missing
        found = refused
    if fingerprint is not None and (isinstance(found, ValueError) or found.fingerprint != fingerprint):
        for table in _tables(config, fingerprint):
            saved = Samples(table, _weights(sources))
            stale = _stale_shards(saved)
            named = isinstance(found, ValueError) or set(found.shards) <= set(saved.shards)
            lost = sum(int(saved.shard_starts[shard + 1] - saved.shard_starts[shard]) for shard in stale)
            if named and len(saved.source_starts) == len(sources) + 1 and lost <= config.max_bad_share * len(saved):
                names = ", ".join(saved.shards[shard] for shard in stale[:NAMED])
                changed = f"{len(stale)} of {len(saved.shards)} shards are missing or changed since the checkpoint"
                if progress and len(stale):
                    log.warning("%s: %s (%s); other samples replace theirs", field, changed, names)
                elif progress and not isinstance(found, ValueError):  # as indexes of version 1 have no keys with dots
                    log.warning("%s: %d of %d samples, as in the checkpoint", field, len(saved), len(found))
                _decide_captions(saved, sources, config, field, say=progress)
                return saved
    if isinstance(found, ValueError):
        raise found
    return found


def _weights(sources: Sequence[Source]) -> list[float] | None:
    """Of all sources, or of none."""
    return [source.weight for source in sources if source.weight is not None] or None


def _judge_sources(samples: Samples, patterns: Sequence[str], max_bad_share: float, field: str, say: bool) -> None:
    """Log the faults that indexing found in each source; refuse a source that is empty or too bad.

    patterns: what the user wrote for each source. say: write to the log. Raises ValueError.
    """
    for number, pattern in enumerate(patterns):
        shards = range(*samples.source_starts[number : number + 2])
        usable = int(samples.shard_starts[shards.stop] - samples.shard_starts[shards.start])
        left_out: Counter[str] = Counter()
        unused: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        broken = []
        empty = 0
        for shard in shards:
            faults, name = samples.shard_faults[shard], samples.shards[shard]
            left_out.update(faults["faults"])
            unused.update(faults.get("unused", {}))  # an older table has none
            for cause, found_there in faults["examples"].items():
                keys = [found_there] if isinstance(found_there, str) else found_there  # an older table has one
                if len(of_cause := examples.setdefault(cause, [])) < NAMED:
                    of_cause += [f"{name}: {keys[0]}", *keys[1:]]
            if faults["broken"]:
                broken.append(f"bad shard {name}: {faults['broken']}")
                empty += samples.shard_starts[shard] == samples.shard_starts[shard + 1]
        named = {cause: ", ".join(of_cause[:NAMED]) for cause, of_cause in examples.items()}
        found = [f"{count} samples left out: {cause} (first {named[cause]})" for cause, count in left_out.items()]
        repeated = unused.pop(REPEATED_KEY, 0)
        ignored = [f"{count} {cause} (first {named[cause]})" for cause, count in unused.most_common()]
        if ignored:
            found.append(f"not used: {'; '.join(ignored)}; {LAYOUT}")
        if repeated:
            found.append(f"{repeated} {REPEATED_KEY}, which are read all the same (first {named[REPEATED_KEY]})")
        found += broken[:NAMED]
        if len(broken) > NAMED:
            found.append(f"{len(broken) - NAMED} more bad shards")
        if usable == 0:
            refuse(field, pattern, "; ".join(["holds no usable sample", *found, *([] if ignored else [LAYOUT])]))
        # A shard without any sample hides an unknown number of them, so the fraction of such shards counts as well.
        bad_share = max(left_out.total() / (usable + left_out.total()), empty / len(shards))
        if bad_share > max_bad_share:
            remedy = "repair the shards or raise the share"
            share = f"{bad_share:.1%} of {field} = {pattern!r} cannot be used"
            refuse("data.max_bad_share", max_bad_share, "; ".join([share, *found, remedy]))
        if say:
            for line in found:
                log.warning("%s: %s", field, line)
    twice = [name for name, times in Counter(samples.shards).items() if times > 1]
    if say and twice:
        log.warning("%s: %d shards are named more than once (first %s)", field, len(twice), twice[0])


def _decide_captions(samples: Samples, sources: Sequence[Source], config: DataConfig, field: str, say: bool) -> None:
    """Set samples.caption_lines as the sources or data.caption_lines want it, and log what is not as they may think.

    What a source looks like is kept beside its table, so that it is decided once. say: write to the log.
    """
    wanted = [config.caption_lines if source.caption_lines is None else source.caption_lines for source in sources]
    shards = [slice(*edge) for edge in pairwise(samples.source_starts)]
    starts = [samples.shard_starts[of.start : of.stop + 1] for of in shards]
    contents = [
        SourceRows(samples.shards[of], np.diff(edges), samples.rows[edges[0] : edges[-1]])
        for of, edges in zip(shards, starts, strict=True)
    ]
    looks = kept_looks(samples.table.with_suffix(".captions"), contents, wanted, pipe_cache(config))
    for number, (want, found) in enumerate(zip(wanted, looks, strict=True)):
        lines = samples.caption_lines[number] = found.lines_are_captions if want == "auto" else want
        if not say or found.several == 0 or found.several == found.whole:
            continue
        log.warning(
            "%s: %d of %d KEY.txt looked at in %s hold several lines: each %s is a caption; data.caption_lines: %s",
            field,
            found.several,
            found.texts,
            sources[number].shards,
            "line" if lines else "whole text",
            "false takes each text for one" if lines else "true takes each line for one",
        )


class _Shard:
    """One shard and its index file, which may not exist yet."""

    def __init__(self, name: str, source: SourceShards, cache: Path, field: str):
        self.name = name
        self.size_bytes = self.modified_ns = -1
        if not is_pipe(name):
            status = os.stat(name)
            self.size_bytes, self.modified_ns = status.st_size, status.st_mtime_ns
        file = index_file_name(name, self.size_bytes, self.modified_ns)
        # The index of a pipe costs a pass over all of it, so one that an older version made still counts.
        files = [file, index_file_name(name, version=1)] if is_pipe(name) else [file]
        places = [folder / file for folder in (source.index, cache) if folder is not None for file in files]
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
                report = {"faults": index.faults, "unused": index.unused, "examples": index.examples}
                shard_faults.append(report | {"broken": index.broken})
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
    if index is None:
        refuse("data.cache", str(shard.index_file), f"the index of {shard.name} cannot be read back; use another disk")
    return index


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))]).astype(np.int64)


def _tables(config: DataConfig, fingerprint: str) -> list[Path]:
    """Tables in the cache with this fingerprint."""
    folder = Path(config.cache).expanduser() / "indexes" / "sets"
    described = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".rows").exists()]
    return [
        path.with_suffix(".rows") for path in described if json.loads(path.read_text())["fingerprint"] == fingerprint
    ]


def _stale_shards(samples: Samples) -> np.ndarray:
    """Numbers of the shards whose files changed since they were indexed, or are missing."""

    def intact(shard: int) -> bool:
        if is_pipe(samples.shards[shard]):
            return True
        try:
            status = os.stat(samples.shards[shard])
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (samples.size_bytes[shard], samples.modified_ns[shard])

    return np.array([shard for shard in range(len(samples.shards)) if not intact(shard)], dtype=np.int64)
