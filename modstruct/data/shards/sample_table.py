"""All samples of a run's sources as one table on disk, mapped into memory: the processes of a host share its pages.

NAME.rows holds 28 bytes a sample, NAME.shards 32 bytes a shard and the names of the shards, NAME.json what there is to
say of the sources.
"""

from __future__ import annotations

import json
import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from modstruct.config import Source
from modstruct.data.faults import NAMED
from modstruct.data.shards.index import ROW
from modstruct.data.shards.objects import is_object
from modstruct.data.shards.sources import is_pipe, names_of
from modstruct.files import atomic_write


@dataclass
class SourceFaults:
    """What indexing found wrong with the shards of one source."""

    left_out: dict[str, int] = field(default_factory=dict)
    """Samples by cause."""
    unused: dict[str, int] = field(default_factory=dict)
    """Members that are no part of a sample, and samples of a repeated key, by cause."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Up to three of each cause."""
    broken: list[str] = field(default_factory=list)
    """What is wrong with the first three shards that are no complete tars."""
    broken_shards: int = 0
    empty_shards: int = 0
    """Of these, shards without any sample."""

    def add(self, shard: str, samples: int, report: Mapping) -> None:
        """report: faults, unused, examples and broken of the shard, as ShardIndex has them."""
        for counts, more in ((self.left_out, report["faults"]), (self.unused, report.get("unused", {}))):
            counts |= {cause: counts.get(cause, 0) + count for cause, count in more.items()}
        for cause, found in report["examples"].items():
            keys = [found] if isinstance(found, str) else found  # an older table has one
            if len(of_cause := self.examples.setdefault(cause, [])) < NAMED:
                of_cause += [f"{shard}: {keys[0]}", *keys[1:]][: NAMED - len(of_cause)]
        if report["broken"]:
            self.broken_shards += 1
            self.empty_shards += samples == 0
            if len(self.broken) < NAMED:
                self.broken.append(f"bad shard {shard}: {report['broken']}")


class ShardNames(Sequence[str]):
    """Names of shards, decoded from the table when they are asked for."""

    def __init__(self, encoded: np.ndarray, ends: np.ndarray):
        """encoded: bytes, uint8. ends: (shards + 1,) where each name begins, and the end of the last."""
        self._encoded, self._ends = encoded, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[shard] for shard in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(f"shard {place} of {len(self)}")
        return self._encoded[self._ends[place] : self._ends[place + 1]].tobytes().decode("utf-8", "surrogateescape")

    def part(self, first: int, stop: int) -> ShardNames:
        """The names of some neighbours."""
        return ShardNames(self._encoded, self._ends[first : stop + 1])


LOOKED_AT, LOOKED_AT_OBJECTS = 1000, 100
"""Samples of a source, evenly spaced, by which it is judged; of pipes those of the first shard alone."""


@dataclass(frozen=True)
class SourceRows:
    """The samples of one source."""

    shards: ShardNames
    starts: np.ndarray
    """(shards + 1,) number of the first sample of each, and of the first of the next source."""

    def looked_at(self) -> np.ndarray:
        """Numbers of the samples by which the source is judged."""
        first, shard = int(self.starts[0]), self.shards[0]
        total = int(self.starts[1] if is_pipe(shard) else self.starts[-1]) - first
        count = min(LOOKED_AT_OBJECTS if is_object(shard) else LOOKED_AT, total)
        return first + np.arange(count) * total // max(1, count)


class Samples:
    """The samples of one or several sources, numbered in order of source, shard and place in the shard.

    All that grows with their number lies in mapped files; the object can be pickled to another process.
    """

    def __init__(self, table: Path, sources: Sequence[Source] = ()):
        self.table, self.sources = table, sources
        self._map()
        self.caption_lines: list[bool] = [False] * (len(self.source_starts) - 1)
        """For each source, whether the lines of KEY.txt are captions of their own."""

    def __getstate__(self) -> dict:
        return {"table": self.table, "sources": self.sources, "caption_lines": self.caption_lines}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._map()

    def _map(self) -> None:
        description = json.loads(self.table.with_suffix(".json").read_text())
        self.source_starts = _starts(description["source_shards"])
        """(sources + 1,) number of the first shard of each source, and the total."""
        self.faults = [SourceFaults(**found) for found in description["faults"]]
        """Of each source."""
        self.filters: list[dict[str, int] | None] = description.get("filters") or [None] * len(self.faults)
        """What a filter has done to each source, as parquet.Effect has it; None where none was given."""
        self.named_twice: list[str] = description["named_twice"]
        """Shards that the sources name more than once."""
        self.fingerprint: str = description["fingerprint"]
        """Hash of the places and sizes of all members: equal for equal shards in any folder."""
        shards = int(self.source_starts[-1])
        mapped = np.memmap(self.table.with_suffix(".shards"), dtype=np.uint8, mode="r").view(np.ndarray)
        columns = mapped[: 4 * (shards + 1) * 8].view("<i8").reshape(4, shards + 1)
        self.shard_starts = columns[0]
        """(shards + 1,) number of the first sample of each shard, and the total."""
        self.size_bytes = columns[1, :shards]
        """(shards,) size of each shard when it was indexed."""
        self.modified_ns = columns[2, :shards]
        """(shards,) time of each shard's last change when it was indexed, or an object's version; -1 for pipes."""
        self.shards = ShardNames(mapped[columns.nbytes :], columns[3])
        """Path, address or `pipe:` command of each shard."""
        self.in_objects = np.array([is_object(self.shards[first]) for first in self.source_starts[:-1].tolist()])
        """(sources,) whether the shards of each are objects, as all or none are."""
        self._rows: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def content(self) -> str:
        """The fingerprint, and of which sources lines are captions: equal for equal samples and captions."""
        lines = "".join(str(int(of_source)) for of_source in self.caption_lines)
        return f"{self.fingerprint} lines {lines}" if any(self.caption_lines) else self.fingerprint

    @property
    def weights(self) -> list[float | list[float]] | None:
        """Weight of each source; None if no source has one."""
        return [source.weight for source in self.sources if source.weight is not None] or None

    @property
    def max_repeats(self) -> list[float | None] | None:
        """Of each source; None if no source has one."""
        found = [source.max_repeats for source in self.sources]
        return found if any(found) else None

    @property
    def names(self) -> list[str]:
        """Of the sources."""
        return names_of([source.name for source in self.sources] or [None] * len(self.faults))

    @property
    def drawn(self) -> str:
        """What tells the samples, and how they are drawn, from others."""
        repeats = f" repeats {self.max_repeats}" if self.max_repeats else ""
        return f"{self.content} {self.weights}{repeats}"

    @property
    def left_out(self) -> Counter[str]:
        """Samples, by cause, that indexing found unusable; they have no number."""
        return sum((Counter(of_source.left_out) for of_source in self.faults), Counter())

    def lines_are_captions(self, shard: int) -> bool:
        """Whether the lines of KEY.txt are captions of their own in a shard."""
        return any(self.caption_lines) and self.caption_lines[self.source_of(shard)]

    def source_of(self, shard: int) -> int:
        """Number of a shard's source."""
        return int(self.source_starts.searchsorted(shard, side="right")) - 1

    @property
    def rows(self) -> np.ndarray:
        """(samples,) of modstruct.data.shards.index.ROW, memory-mapped at first use in each process."""
        if self._rows is None:
            with open(self.table, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_RANDOM)  # else each row costs the disk's read-ahead, which may be megabytes
            self._rows = np.frombuffer(mapped, dtype=ROW)
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
        return np.split(np.diff(self.shard_starts), self.source_starts[1:-1])

    def source_rows(self) -> list[SourceRows]:
        """Of each source."""
        return [
            SourceRows(self.shards.part(first, stop), self.shard_starts[first : stop + 1])
            for first, stop in pairwise(self.source_starts.tolist())
        ]

    def piped(self) -> np.ndarray:
        """(shards,) whether each is a `pipe:`, as all or none of a source are."""
        of_sources = [is_pipe(self.shards[first]) for first in self.source_starts[:-1].tolist()]
        return np.repeat(of_sources, np.diff(self.source_starts))


def write_shards(
    table: Path,
    shards: Sequence[str],
    columns: Sequence[Sequence[int]],
    source_shards: Sequence[int],
    faults: Sequence[SourceFaults],
    fingerprint: str,
    filters: Sequence[dict[str, int] | None] = (),
) -> None:
    """Write what a table says of its shards and sources; its rows are there.

    columns: of each shard the samples, the size and the time of the last change, each (shards,).
    source_shards: of each source the number of shards.
    """
    names = [name.encode("utf-8", "surrogateescape") for name in shards]
    counts, *others = columns
    with atomic_write(table.with_suffix(".shards")) as file:
        for column in (_starts(counts), *([*other, 0] for other in others), _starts([len(name) for name in names])):
            file.write(np.array(column, dtype="<i8").tobytes())
        file.write(b"".join(names))
    description = {
        "source_shards": list(source_shards),
        "faults": [asdict(of_source) for of_source in faults],
        "named_twice": [name for name, times in Counter(shards).items() if times > 1],
        "fingerprint": fingerprint,
        "filters": list(filters),
    }
    with atomic_write(table.with_suffix(".json")) as file:  # last: where it is, the others are
        file.write(json.dumps(description).encode())


def renew(table: Path) -> None:
    """Give a table of an earlier version the files of this one."""
    old = json.loads(table.with_suffix(".json").read_text())
    if "shard_faults" not in old:
        return
    faults = [SourceFaults() for _ in old["source_shards"]]
    sources = np.repeat(np.arange(len(faults)), old["source_shards"]).tolist()
    for source, *shard in zip(sources, old["shards"], old["samples"], old["shard_faults"], strict=True):
        faults[source].add(*shard)
    columns = [old[name] for name in ("samples", "size_bytes", "modified_ns")]
    write_shards(table, old["shards"], columns, old["source_shards"], faults, old["fingerprint"])


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))]).astype(np.int64)
