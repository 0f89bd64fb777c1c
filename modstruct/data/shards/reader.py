"""Reads samples from shards: bytes by position, never by name; text, JSON and images only."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar
from zlib import adler32

import numpy as np

from modstruct.config import DataConfig
from modstruct.data.faults import BadSample
from modstruct.data.shards.members import key_of, printable
from modstruct.data.shards.objects import ObjectFailed, ObjectShard, is_object, several
from modstruct.data.shards.pipes import PipeFailed, pipe_cache
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.sources import is_pipe
from modstruct.data.shards.tar_headers import BLOCK_BYTES, CutOff, DamagedHeader, next_member
from modstruct.data.shards.texts import caption_lines, parse_caption, parse_metadata, texts_of

# Shards a process keeps open; a window of shuffled blocks may reach into a thousand.
OPEN_SHARDS = 256
# Bytes between the members of a sample, mostly a header each, up to which one read fetches all of them.
LARGEST_GAPS = 16 << 10
# Of several samples: bytes between two of them, and of the whole, that one read may fetch.
LARGEST_SKIP, LARGEST_READ = 64 << 10, 4 << 20
# The first of these in an object store, where bytes are paid for: what lies between two neighbours, a tar header.
OBJECT_SKIP = 2 << 10
Found = TypeVar("Found")


@dataclass
class RawSample:
    """One sample as stored in the shard: texts decoded, the image not."""

    key: str
    """Name of its members without the extension."""
    image: bytes
    """JPEG, PNG or WebP."""
    caption: str
    """The whole of KEY.txt, stripped, never empty."""
    metadata: dict
    """Content of KEY.json; empty if there is none."""
    where: str = ""
    """Shard and member, for messages."""
    lines: tuple[str, ...] = ()
    """Lines of KEY.txt where each is a caption; else none."""

    @property
    def captions(self) -> list[str]:
        """All captions of the image: "captions" of the metadata if that is a list of texts, else those of KEY.txt."""
        several = texts_of(self.metadata, "captions") if isinstance(self.metadata.get("captions"), list) else []
        return several or list(self.lines) or [self.caption]

    def drawn_text(self, field: str, seed: int) -> str:
        """The text of a field of KEY.json, drawn by the seed where it is a list of texts. Raises BadSample."""
        texts = texts_of(self.metadata, field)
        if not texts:
            raise BadSample(f"no text in the field {field!r} of KEY.json", self.where)
        return texts[seed % len(texts)]

    def drawn_caption(self, seed: int) -> str:
        """What training takes: a line drawn by the seed, or the whole text."""
        return self.lines[seed % len(self.lines)] if self.lines else self.caption


class ShardReader:
    """Reads any sample of `samples` by number. Shards are opened at first use, in the process that uses them.

    Can be pickled to another process, which opens its own.
    """

    def __init__(self, samples: Samples, config: DataConfig):
        self.samples = samples
        self.pipes = pipe_cache(config)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()  # of _open

    def __getstate__(self) -> dict:
        return {"samples": self.samples, "pipes": self.pipes}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"_open": OrderedDict(), "_lock": threading.Lock()}

    def close(self) -> None:
        """Close the open shards, once no thread reads from them; they are reopened when needed."""
        with self._lock:
            self._open.clear()

    def read(self, sample: int) -> RawSample:
        """The sample of this number. Raises BadSample."""
        shard = self.samples.shard_of(sample)
        header_bytes, spans = _layout(self.samples.rows[sample])
        return self._parse(shard, sample, header_bytes, self._spans(shard, sample, spans))

    def runs(self, samples: np.ndarray) -> list[list[int]]:
        """Which of samples (n,) to read together: places among them, of each run in order of position.

        A run is of one shard, of LARGEST_READ at most, and skips LARGEST_SKIP at most between two samples (OBJECT_SKIP
        in an object store). Runs come in the order in which the first of their samples is needed.
        """
        shards = self.samples.shard_starts.searchsorted(samples, side="right") - 1
        begins, ends, compact = _extents(self.samples.rows[samples])
        places = np.lexsort((begins, shards))
        shards, begins, ends, compact = shards[places], begins[places], ends[places], compact[places]
        sources = self.samples.source_starts.searchsorted(shards[1:], side="right") - 1
        skip = np.where(self.samples.in_objects[sources], OBJECT_SKIP, LARGEST_SKIP)
        near = (np.diff(shards) == 0) & (begins[1:] - ends[:-1] <= skip) & compact[1:] & compact[:-1]
        runs: list[list[int]] = []
        joined, starts, limit = [False, *near.tolist()], begins.tolist(), 0
        for place, join, start, end in zip(places.tolist(), joined, starts, ends.tolist(), strict=True):
            if join and end <= limit:
                runs[-1].append(place)
            else:
                runs.append([place])
                limit = start + LARGEST_READ
        return sorted(runs, key=min)

    def read_run(self, samples: Sequence[int]) -> list[RawSample | BadSample]:
        """The samples of a run, by one read, or what is wrong with each. Several threads may call it at once."""
        shard, layouts = self.samples.shard_of(samples[0]), [_layout(self.samples.rows[sample]) for sample in samples]
        begin = min(start for _, spans in layouts for start, _ in spans)
        size = max(start + length for _, spans in layouts for start, length in spans) - begin
        content = b""
        if len(samples) > 1:
            try:
                content = self._opened(shard, samples[0]).read(size, begin)
            except ObjectFailed as failed:  # asking for each alone would bring the same
                return [BadSample(failed.cause, f"{self._place(shard, sample)}: {failed}") for sample in samples]
            except (BadSample, OSError):
                pass
        found: list[RawSample | BadSample] = []
        for sample, (header_bytes, spans) in zip(samples, layouts, strict=True):
            try:
                if len(content) == size:
                    members = [content[start - begin : start - begin + length] for start, length in spans]
                    found.append(self._parse(shard, sample, header_bytes, members))
                else:  # the run as a whole cannot be read; alone, each is good or has a cause of its own
                    found.append(self.read(sample))
            except BadSample as bad:
                found.append(bad)
        return found

    def _parse(self, shard: int, sample: int, header_bytes: int, members: Sequence[bytes]) -> RawSample:
        """members: the image with its tar header, the text, and the metadata if there are any."""
        both, text, *described = members
        name = _member_name(both[:header_bytes])
        if name is None:  # a pipe: command may deliver other content of equal size
            raise BadSample("shard changed since it was indexed", self._place(shard, sample))
        where = f"{self.samples.shards[shard]}: {printable(name)}"
        caption = parse_caption(text, where)
        metadata = parse_metadata(described[0], where) if described else {}
        lines = self._lines(shard, caption)
        return RawSample(printable(key_of(name)), both[header_bytes:], caption, metadata, where, lines)

    def texts(self, sample: int) -> tuple[str, ...]:
        """The captions of KEY.txt alone, without reading the image. Raises BadSample."""
        shard = self.samples.shard_of(sample)
        row = self.samples.rows[sample]
        span = int(row["text_block"]) * BLOCK_BYTES, int(row["text_bytes"])
        caption = parse_caption(self._spans(shard, sample, [span])[0], self._place(shard, sample))
        return self._lines(shard, caption) or (caption,)

    def each(self, read: Callable[[int], Found], samples: Sequence[int]) -> Iterator[tuple[int, Found]]:
        """(sample, read(sample)) of each in order, without the bad ones; from object stores several at once."""

        def tried(sample: int) -> Found | None:
            with suppress(BadSample):
                return read(sample)
            return None

        found = several(tried, samples) if self.samples.in_objects.any() else map(tried, samples)
        for sample, result in zip(samples, found, strict=True):
            if result is not None:
                yield sample, result

    def stored_texts(self, sample: int) -> tuple[bytes, bytes]:
        """KEY.txt and KEY.json, empty if there is none, as they are stored. Raises BadSample."""
        _, spans = _layout(self.samples.rows[sample])
        text, *described = self._spans(self.samples.shard_of(sample), sample, spans[1:])
        return text, described[0] if described else b""

    def _lines(self, shard: int, caption: str) -> tuple[str, ...]:
        return caption_lines(caption) if self.samples.lines_are_captions(shard) else ()

    def metadata(self, sample: int) -> dict:
        """The content of KEY.json alone, without reading the image; empty if there is none. Raises BadSample."""
        shard = self.samples.shard_of(sample)
        row = self.samples.rows[sample]
        if not row["metadata_bytes"]:
            return {}
        span = int(row["metadata_block"]) * BLOCK_BYTES, int(row["metadata_bytes"])
        return parse_metadata(self._spans(shard, sample, [span])[0], self._place(shard, sample))

    def _spans(self, shard: int, sample: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Content of spans (start, length) of a shard: members of one sample, mostly adjacent."""
        opened = self._opened(shard, sample)
        begin = min(spans)[0]
        size = max([start + length for start, length in spans]) - begin
        try:
            if size <= sum([length for _, length in spans]) + LARGEST_GAPS:
                content = opened.read(size, begin)
                found = [content[start - begin : start - begin + length] for start, length in spans]
            else:
                found = [opened.read(length, start) for start, length in spans]
        except ObjectFailed as failed:
            raise BadSample(failed.cause, f"{self._place(shard, sample)}: {failed}") from None
        except OSError as error:
            raise BadSample("unreadable shard", f"{self._place(shard, sample)}: {error.strerror or error}") from None
        if [len(content) for content in found] != [length for _, length in spans]:
            raise BadSample("truncated shard", self._place(shard, sample))
        return found

    def _opened(self, shard: int, sample: int) -> _OpenShard | ObjectShard:
        name, piped = self.samples.shards[shard], is_pipe(self.samples.shards[shard])
        if is_object(name):
            return ObjectShard(name, int(self.samples.size_bytes[shard]), int(self.samples.modified_ns[shard]))
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
        if opened is not None:
            # Checked at every read: otherwise which samples of a shard that is damaged during the run can be read would
            # depend on what a process happens to have open, and a resumed run would read others.
            status = os.fstat(opened.descriptor)
            if piped or (status.st_nlink > 0 and self._is_as_indexed(shard, status)):
                return opened
        if piped:
            try:
                opened = _OpenShard(self.pipes.open(name, int(self.samples.size_bytes[shard])))
            except PipeFailed as error:
                raise BadSample("failed pipe", f"{self._place(shard, sample)}: {error}") from None
        else:
            opened = self._open_file(shard, sample)
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened

    def _open_file(self, shard: int, sample: int) -> _OpenShard:
        try:
            opened = _OpenShard(os.open(self.samples.shards[shard], os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise BadSample("missing shard", self._place(shard, sample)) from None
        if not self._is_as_indexed(shard, os.fstat(opened.descriptor)):
            # The positions in the index mean nothing in another file.
            raise BadSample("shard changed since it was indexed", self._place(shard, sample))
        return opened

    def _is_as_indexed(self, shard: int, status: os.stat_result) -> bool:
        indexed = (self.samples.size_bytes[shard], self.samples.modified_ns[shard])
        return (status.st_size, status.st_mtime_ns) == indexed

    def _place(self, shard: int, sample: int) -> str:
        return f"{self.samples.shards[shard]}: sample {sample - int(self.samples.shard_starts[shard])}"


class _OpenShard:
    """A file descriptor, closed once nothing reads from it any more."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def read(self, size: int, begin: int) -> bytes:
        return os.pread(self.descriptor, size, begin)

    def __del__(self):
        os.close(self.descriptor)


def _layout(row: np.void) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of the image's tar header, and (start, length) of the image with it, of the text and of metadata."""
    # At once: numpy takes a microsecond for each field.
    image_block, image_bytes, text_block, text_bytes, metadata_block, metadata_bytes, header_blocks = row.item()
    header_bytes = header_blocks * BLOCK_BYTES
    spans = [(image_block * BLOCK_BYTES - header_bytes, header_bytes + image_bytes)]
    spans.append((text_block * BLOCK_BYTES, text_bytes))
    if metadata_bytes:
        spans.append((metadata_block * BLOCK_BYTES, metadata_bytes))
    return header_bytes, spans


def _extents(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of rows (n,): where each sample begins and ends, and whether one read may fetch all of it, each (n,)."""
    kinds = ("image", "text", "metadata")
    starts = np.stack([rows[f"{kind}_block"].astype(np.int64) for kind in kinds]) * BLOCK_BYTES
    lengths = np.stack([rows[f"{kind}_bytes"].astype(np.int64) for kind in kinds])
    header = rows["header_blocks"].astype(np.int64) * BLOCK_BYTES
    starts[0] -= header
    lengths[0] += header
    absent = lengths[2] == 0
    starts[2, absent] = starts[0, absent]
    begins, ends = starts.min(axis=0), (starts + lengths).max(axis=0)
    return begins, ends, ends - begins <= lengths.sum(axis=0) + LARGEST_GAPS


def _member_name(header: bytes) -> str | None:
    """Name of the one member whose tar header, long-name blocks included, this is; None if it is no header."""
    name = _short_name(header)
    if name is not None:
        return name
    try:
        member = next_member(io.BytesIO(header), 0)
    except (CutOff, DamagedHeader):
        return None
    return member.name if member is not None and member.data == len(header) else None


def _short_name(header: bytes) -> str | None:
    """The name in a plain ustar header, in a tenth of the time of the full parser; None for any other header."""
    sum_field = header[148:156]
    stated = sum_field.rstrip(b" \0").lstrip()
    # The checksum counts its own field as eight spaces; byte 345 starts the name's prefix.
    if len(header) != BLOCK_BYTES or not stated.isdigit() or header[345] or header[156:157] not in (b"0", b"\0"):
        return None
    try:
        right = int(stated, 8) == _sum(header) - sum(sum_field) + 8 * ord(" ")
    except ValueError:
        return None
    return header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape") if right else None


def _sum(header: bytes) -> int:
    """Sum of 512 bytes, in a fifth of the time of `sum`."""
    # The lower half of Adler-32 is 1 + the sum modulo 65,521, which 256 bytes do not reach.
    half = BLOCK_BYTES // 2
    return (adler32(header[:half]) & 0xFFFF) + (adler32(header[half:]) & 0xFFFF) - 2
