"""Opens the sources of a run: expanded, checked, indexed, judged, and put into one table on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from modstruct.config import DataConfig, Source
from modstruct.data.faults import NAMED
from modstruct.data.shards.index import (
    INDEX_VERSION,
    REPEATED_KEY,
    ShardIndex,
    UnreadableShard,
    index_file_name,
    index_shards,
    parquet_name,
)
from modstruct.data.shards.members import LAYOUT
from modstruct.data.shards.parquet import Effect, filtered, parsed
from modstruct.data.shards.pool import SHORT_JOBS_WORTH_A_POOL, cores, mapping
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.sample_table import Samples, SourceFaults, renew, write_shards
from modstruct.data.shards.sources import SourceShards, every_nth, expand_sources, is_pipe, names_only, shard_states
from modstruct.data.shards.texts import kept_looks
from modstruct.distributed import first_has_run
from modstruct.errors import refuse
from modstruct.files import atomic_write, locked

log = logging.getLogger(__name__)

TABLE_VERSION = 2  # 1: one JSON file beside the rows
FILTER_VERSION = 2  # 1: NaN is a value, and what has none is `not in` a list


def open_samples(sources: Sequence[Source], config: DataConfig, field: str, progress: bool = False) -> Samples:
    """Expand, check and index the sources; indexes of earlier runs are read from data.cache.

    field: the recipe's field, for errors ("data.train", …). progress: draw a bar and log what is wrong with the shards
    (the main process). Within modstruct.distributed.main_first the first process of a host checks the shards, of a
    pattern of more than 10,000 as many, evenly spaced, and the others take the table that it has found or made.
    Elsewhere several may call it at once, but all but one would only wait. Raises ValueError for what expand_sources
    refuses, for a `pipe:` shard without an index, a source without a usable sample, and a source of which more than
    data.max_bad_share cannot be used.
    """
    opened = _opened(sources, config)
    if first_has_run() and opened.exists():
        samples = Samples(Path(opened.read_text()), sources)
    else:
        expanded = expand_sources(sources, config, field)
        samples = Samples(_table(expanded, config, field, progress), sources)
        _judge_sources(samples, [source.pattern for source in expanded], config.max_bad_share, field, say=progress)
        _tell_others(opened, samples)
    _decide_captions(samples, sources, config, field, say=progress)
    return samples


def _opened(sources: Sequence[Source], config: DataConfig) -> Path:
    """File in which the first process of a host tells the others which table it has opened."""
    # Patterns may be relative.
    named = json.dumps([os.getcwd(), [[source.shards, source.index, source.filter or ""] for source in sources]])
    name = f"{hashlib.blake2b(named.encode(), digest_size=16).hexdigest()}.opened"
    return Path(config.cache).expanduser() / "indexes" / "sets" / name


def _tell_others(opened: Path, samples: Samples) -> None:
    if not first_has_run():
        with suppress(OSError):
            opened.unlink(missing_ok=True)  # an earlier run's, which would mislead them
            with atomic_write(opened) as file:  # without it they find out themselves
                file.write(str(samples.table).encode())


def _table(expanded: Sequence[SourceShards], config: DataConfig, field: str, progress: bool) -> Path:
    """The table of these shards, made if it is not there."""
    cache = Path(config.cache).expanduser() / "indexes"
    table = table_path(expanded, cache, field)
    complete = table.with_suffix(".json")  # written last, so the others are there if it is
    if not complete.exists():
        with locked(table.with_suffix(".lock")):
            if not complete.exists():
                shards = [_found(source.shards, source, cache, field) for source in expanded]
                _write_table(table, shards, [source.filter for source in expanded], field, progress)
    return table


def table_path(expanded: Sequence[SourceShards], cache: Path, field: str) -> Path:
    """Where the table of these shards lies, as they are now. Raises ValueError for a shard that is not there."""
    identity = hashlib.blake2b(json.dumps([TABLE_VERSION, INDEX_VERSION]).encode(), digest_size=16)
    for source in expanded:
        nth = every_nth(len(source.shards))
        for number, checked in enumerate(_found(source.shards[::nth], source, cache, field)):
            identity.update(json.dumps(checked.identity).encode())
            if others := source.shards[number * nth + 1 : (number + 1) * nth]:
                # ["a"]["b"], the lists of one name each that they always were, without a call for each.
                identity.update(json.dumps(others, separators=("][", ":")).encode())
        identity.update(b"/")
        if source.filter is not None:
            parquets = _parquet_states(source, field, source.shards[::nth])
            identity.update(json.dumps([FILTER_VERSION, source.filter, parquets]).encode())
    return cache / "sets" / f"{identity.hexdigest()}.rows"


def _parquet_states(source: SourceShards, field: str, shards: Sequence[str]) -> list[tuple[int, int]]:
    """Of the parquets beside shards. Raises ValueError, as for a filter that cannot be parsed."""
    parsed(source.filter or "")
    lacking = [shard for shard in shards if is_pipe(shard)]
    states = dict(zip(shards, shard_states([parquet_name(shard) for shard in shards]), strict=True))
    lacking += [shard for shard, state in states.items() if isinstance(state, OSError)]
    if lacking:
        beside = (
            f"{len(lacking)} of {len(shards)} shards of {source.pattern} have no parquet beside them that can be read"
        )
        remedy = f"{beside} (first {parquet_name(lacking[0])}); put img2dataset's there, or give the source filter: ''"
        refuse("data.filter", source.filter, remedy)
    return [state for state in states.values() if not isinstance(state, OSError)]


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
            saved = Samples(table, sources)
            if not _stands_for(saved, sources, found, config, field):
                continue
            stale = _stale_shards(saved)
            lost = sum(int(saved.shard_starts[shard + 1] - saved.shard_starts[shard]) for shard in stale)
            if lost <= config.max_bad_share * len(saved):
                names = ", ".join(saved.shards[shard] for shard in stale[:NAMED])
                changed = f"{len(stale)} of {len(saved.shards)} shards are missing or changed since the checkpoint"
                if progress and len(stale):
                    log.warning("%s: %s (%s); other samples replace theirs", field, changed, names)
                elif progress and not isinstance(found, ValueError):  # as indexes of version 1 have no keys with dots
                    log.warning("%s: %d of %d samples, as in the checkpoint", field, len(saved), len(found))
                _decide_captions(saved, sources, config, field, say=progress)
                _tell_others(_opened(sources, config), saved)
                return saved
    if isinstance(found, ValueError):
        raise found
    return found


def _stands_for(
    saved: Samples, sources: Sequence[Source], found: Samples | ValueError, config: DataConfig, field: str
) -> bool:
    """Whether the sources, of which `found` was opened, name none but shards of an earlier table."""
    if len(saved.source_starts) != len(sources) + 1:
        return False
    if isinstance(found, Samples):
        return set(found.shards) <= set(saved.shards)
    of_sources = [list(saved.shards[a:b]) for a, b in pairwise(saved.source_starts.tolist())]
    both = zip(sources, of_sources, strict=True)
    return all(names_only(source.shards, shards, config.allow_pipe, field) for source, shards in both)


def _judge_sources(samples: Samples, patterns: Sequence[str], max_bad_share: float, field: str, say: bool) -> None:
    """Log the faults that indexing found in each source; refuse a source that is empty or too bad.

    patterns: what the user wrote for each source. say: write to the log. Raises ValueError.
    """
    for number, pattern in enumerate(patterns):
        first, stop = samples.source_starts[number : number + 2].tolist()
        kept = usable = int(samples.shard_starts[stop] - samples.shard_starts[first])
        faults, effect = samples.faults[number], samples.filters[number]
        if effect is not None:
            usable = effect["samples"]
        found, left_out = describe_faults(faults), sum(faults.left_out.values())
        if usable == 0:
            layout = [] if any(LAYOUT in text for text in found) else [LAYOUT]
            refuse(field, pattern, "; ".join(["holds no usable sample", *found, *layout]))
        # A shard without any sample hides an unknown number of them, so the fraction of such shards counts as well.
        bad_share = max(left_out / (usable + left_out), faults.empty_shards / (stop - first))
        if bad_share > max_bad_share:
            remedy = "repair the shards or raise the share"
            share = f"{bad_share:.1%} of {field} = {pattern!r} cannot be used"
            refuse("data.max_bad_share", max_bad_share, "; ".join([share, *found, remedy]))
        if effect is not None and kept == 0 < usable:
            refuse("data.filter", samples.sources[number].filter, f"keeps none of the {usable:,} samples of {pattern}")
        if say:
            for line in found:
                log.warning("%s: %s", field, line)
            if effect is not None:
                log.info("data.filter, %s: %s", pattern, Effect(**effect))
    if say and any(samples.filters) and len(patterns) > 1:
        log.info("data.filter: %s samples of all sources are kept", f"{len(samples):,}")
    if say and samples.named_twice:
        twice = samples.named_twice
        log.warning("%s: %d shards are named more than once (first %s)", field, len(twice), twice[0])


def describe_faults(faults: SourceFaults) -> list[str]:
    """What indexing found in a source, a line each."""
    named = {cause: ", ".join(of_cause) for cause, of_cause in faults.examples.items()}
    found = [f"{count} samples left out: {cause} (first {named[cause]})" for cause, count in faults.left_out.items()]
    unused = Counter(faults.unused)
    repeated = unused.pop(REPEATED_KEY, 0)
    ignored = [f"{count} {cause} (first {named[cause]})" for cause, count in unused.most_common()]
    if ignored:
        found.append(f"not used: {'; '.join(ignored)}; {LAYOUT}")
    if repeated:
        found.append(f"{repeated} {REPEATED_KEY}, which are read all the same (first {named[REPEATED_KEY]})")
    found += faults.broken
    if faults.broken_shards > len(faults.broken):
        found.append(f"{faults.broken_shards - len(faults.broken)} more bad shards")
    return found


def _decide_captions(samples: Samples, sources: Sequence[Source], config: DataConfig, field: str, say: bool) -> None:
    """Set samples.caption_lines as the sources or data.caption_lines want it, and log what is not as they may think.

    What a source looks like is kept beside its table, so that it is decided once. say: write to the log.
    """
    wanted = [config.caption_lines if source.caption_lines is None else source.caption_lines for source in sources]
    reader = ShardReader(samples, config)

    def read(numbers: Sequence[int]) -> Iterator[tuple[bytes, bytes]]:
        return (texts for _, texts in reader.each(reader.stored_texts, numbers))

    looks = kept_looks(samples.table.with_suffix(".captions"), samples.source_rows(), wanted, read)
    reader.close()
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

    def __init__(self, name: str, state: tuple[int, int], source: SourceShards, cache: Path, field: str):
        self.name, self.source, self.cache = name, source, cache
        self.size_bytes, self.modified_ns = state
        self.identity = [name, self.size_bytes, self.modified_ns]
        if is_pipe(name):
            if not self.index_file.exists():
                _refuse_pipe(field, name, f"no index of it in {source.index or cache}")
            self.identity.append(self.index_file.stat().st_mtime_ns)

    @property
    def own_file(self) -> Path:
        """Where an index is written that is made anew."""
        return self.cache / index_file_name(self.name, self.size_bytes, self.modified_ns)

    @cached_property
    def index_file(self) -> Path:
        """Looked for when it is needed: a table that is there holds what the files of its shards say."""
        files = [self.own_file.name]
        if is_pipe(self.name):  # its index costs a pass over all of it, so one that an older version made still counts
            files.append(index_file_name(self.name, version=1))
        places = [folder / file for folder in (self.source.index, self.cache) if folder is not None for file in files]
        return next((place for place in places if place.exists()), self.own_file)


def _found(names: Sequence[str], source: SourceShards, cache: Path, field: str) -> list[_Shard]:
    """Of each shard. Raises ValueError for one that is not there."""
    found = []
    for name, state in zip(names, shard_states(names), strict=True):
        if isinstance(state, OSError):
            refuse(field, name, str(state))
        found.append(_Shard(name, state, source, cache, field))
    return found


def _refuse_pipe(field: str, shard: str, trouble: str) -> None:
    command = "python tools/index_shards.py 'pipe:COMMAND' --output FOLDER"
    refuse(field, shard, f"{trouble}; make it with `{command}` and give the source index: FOLDER")


def _write_table(
    table: Path, sources: Sequence[Sequence[_Shard]], filters: Sequence[str | None], field: str, progress: bool
) -> None:
    fingerprint = hashlib.blake2b(digest_size=16)
    shards = [shard for source in sources for shard in source]
    faults = [SourceFaults() for _ in sources]
    effects = [None if text is None else Effect() for text in filters]
    counts, sizes = [], []
    try:
        index_shards([(s.name, s.index_file) for s in shards if not s.index_file.exists()], progress)
        with atomic_write(table) as file:
            for number, source in enumerate(sources):
                # One at a time: the indexes of a large set together would fill the memory.
                for shard, index in _indexes(source, filters[number], effects[number], field, progress):
                    rows = index.rows.tobytes()
                    file.write(rows)
                    fingerprint.update(len(rows).to_bytes(8, "little") + rows)
                    counts.append(len(index.rows))
                    sizes.append(index.size_bytes)
                    faults[number].add(shard.name, len(index.rows), vars(index))
    except UnreadableShard as error:
        refuse(field, error.shard, f"could not be read ({error.reason}); repair it or leave it out of the pattern")
    columns = counts, sizes, [shard.modified_ns for shard in shards]
    source_shards = [len(source) for source in sources]
    described = [None if effect is None else asdict(effect) for effect in effects]
    names = [shard.name for shard in shards]
    write_shards(table, names, columns, source_shards, faults, fingerprint.hexdigest(), described)


def _indexes(
    source: Sequence[_Shard], text: str | None, effect: Effect | None, field: str, progress: bool
) -> Iterator[tuple[_Shard, ShardIndex]]:
    """Each shard with its index, of which a filter keeps a part of the rows. effect: is added to."""
    if text is None or effect is None:
        for shard in source:
            yield shard, _load(shard, field)
        return
    lacking = [shard for shard in source if _load(shard, field).keys is None]
    for shard in lacking:
        shard.index_file = shard.own_file
    index_shards([(shard.name, shard.index_file) for shard in lacking], progress, keys=True)
    jobs = ((text, shard.name, shard.index_file) for shard in source)
    with mapping(cores(), len(source), SHORT_JOBS_WORTH_A_POOL) as run:
        for shard, (kept, of_shard) in zip(source, run(filtered, jobs), strict=True):
            index = _load(shard, field)
            index.rows = index.rows[kept]
            effect.add(of_shard)
            yield shard, index


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


def _tables(config: DataConfig, fingerprint: str) -> list[Path]:
    """Tables in the cache with this fingerprint."""
    folder = Path(config.cache).expanduser() / "indexes" / "sets"
    described = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".rows").exists()]
    tables = [
        path.with_suffix(".rows") for path in described if json.loads(path.read_text())["fingerprint"] == fingerprint
    ]
    for table in tables:
        renew(table)
    return tables


def _stale_shards(samples: Samples) -> np.ndarray:
    """Numbers of the shards whose files changed since they were indexed, or are missing."""

    states = shard_states(samples.shards)
    indexed = zip(samples.size_bytes.tolist(), samples.modified_ns.tolist(), strict=True)
    # What has no time is a pipe.
    return np.flatnonzero([before[1] != -1 and now != before for now, before in zip(states, indexed, strict=True)])
