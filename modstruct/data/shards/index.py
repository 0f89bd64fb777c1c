"""Where the members of each sample lie in a tar shard, read once from the tar's headers.

A sample is a run of members with one key (modstruct.data.shards.members): KEY.jpg, KEY.txt, KEY.json, the layout of
img2dataset and webdataset. Only ordinary files count; a link, a device or an absolute name in a tar is never followed
and never used as a path.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modstruct.data.shards.members import KINDS, MemberGroups, SampleMembers, Tally, may_be_of
from modstruct.data.shards.objects import ObjectFailed, ObjectFile, is_object, read_range, unsigned
from modstruct.data.shards.pool import SHORT_JOBS_WORTH_A_POOL, cores, mapping
from modstruct.data.shards.tar_headers import (
    BLOCK_BYTES,
    LARGEST_HEADER_BYTES,
    CutOff,
    DamagedHeader,
    Member,
    next_member,
)
from modstruct.errors import without_credentials
from modstruct.files import atomic_write

log = logging.getLogger(__name__)

# One row a sample, 28 bytes. Offsets count tar blocks of 512 bytes, so that 4 bytes reach 2 TiB into a shard.
ROW = np.dtype(
    [
        ("image_block", "<u4"),
        ("image_bytes", "<u4"),
        ("text_block", "<u4"),
        ("text_bytes", "<u4"),
        ("metadata_block", "<u4"),
        ("metadata_bytes", "<u4"),  # 0: the sample has no metadata
        ("header_blocks", "<u4"),  # length of the image's tar header, which ends where the image begins
    ]
)
COMPRESSIONS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
LARGEST_BLOCK = np.iinfo(np.uint32).max
# No image, caption or description is as large; reading such a member would only cost memory (JSON takes twenty times
# its length).
LARGEST_BYTES = {"image": 1 << 28, "text": 1 << 20, "metadata": 1 << 20}
LARGEST_INDEX_BYTES = 1 << 28  # of one shard, unpacked: nine million samples

REPEATED_KEY = "samples with the key of an earlier one"
NO_FILE = "links and other members that are no plain files"

# With a large buffer, reading headers in order is sequential reading, the fastest on any disk or network.
BUFFER_BYTES, OBJECT_BUFFER_BYTES = 1 << 20, 8 << 20

INDEX_VERSION = 2  # 1: without dots in keys, and without what is not used


@dataclass
class ShardIndex:
    """The samples of one shard, and its faults."""

    rows: np.ndarray
    """(samples,) of dtype ROW."""
    size_bytes: int
    """Size of the shard when it was indexed."""
    faults: dict[str, int] = field(default_factory=dict)
    """Samples left out, by cause."""
    unused: dict[str, int] = field(default_factory=dict)
    """Members that are no part of a sample, and samples of a repeated key, by cause."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Up to three keys or members of each cause."""
    broken: str | None = None
    """What is wrong with the shard as a whole; None if it is a complete tar."""
    sha256: str | None = None
    """Of the shard's bytes; None where it was not asked for."""
    keys: np.ndarray | None = None
    """(samples,) `key_hashes`; None where neither was asked for nor a parquet lies beside the shard."""
    version: int | None = None
    """Of an object that was indexed, as objects.Piece has it."""

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in ("rows", "keys") if getattr(self, name) is not None}
        report = {
            name: value for name, value in vars(self).items() if name not in ("rows", "keys") and value is not None
        }
        with atomic_write(path) as file:
            encoded = np.frombuffer(json.dumps(report).encode(), dtype=np.uint8)
            np.savez_compressed(file, **arrays, report=encoded)

    @staticmethod
    def load(source: Path | BinaryIO) -> ShardIndex | None:
        """The saved index; None if there is none, or it is damaged or of another version and must be rebuilt.

        The file is not trusted: an index that is returned points only into a shard of size_bytes.
        """
        try:
            with source.open("rb") if isinstance(source, Path) else source as file:
                if any(member.file_size > LARGEST_INDEX_BYTES for member in zipfile.ZipFile(file).infolist()):
                    return None
                file.seek(0)
                saved = np.load(file, allow_pickle=False)
                arrays = {name: saved[name] for name in ("rows", "keys") if name in saved}
                index = ShardIndex(**arrays, **json.loads(saved["report"].tobytes()))
            if all(type(example) is str for example in index.examples.values()):  # version 1, of a pipe
                index.examples = {cause: [str(example)] for cause, example in index.examples.items()}
            return index if index._is_sound() else None
        except Exception:  # a damaged file raises nearly anything, from zlib.error to RecursionError
            return None

    def _is_sound(self) -> bool:
        rows = self.rows
        if rows.dtype != ROW or rows.ndim != 1 or type(self.size_bytes) is not int:
            return False
        if self.keys is not None and (self.keys.dtype != np.uint64 or self.keys.shape != rows.shape):
            return False
        if type(self.version) not in (int, type(None)):
            return False
        if not all(type(count) is int for count in (*self.faults.values(), *self.unused.values())):
            return False
        examples = [example for of_cause in self.examples.values() for example in of_cause]
        if not all(type(word) is str for word in (*self.faults, *self.unused, *self.examples, *examples)):
            return False
        if (
            not all(isinstance(text, str | None) for text in (self.broken, self.sha256))
            or (rows["header_blocks"] > rows["image_block"]).any()
        ):
            return False
        for kind, most in LARGEST_BYTES.items():
            ends = rows[f"{kind}_block"].astype(np.int64) * BLOCK_BYTES + rows[f"{kind}_bytes"]
            if (rows[f"{kind}_bytes"] > most).any() or (ends > self.size_bytes).any():
                return False
        return bool((rows["header_blocks"] <= LARGEST_HEADER_BYTES // BLOCK_BYTES + 1).all())


class _Cut(Exception):
    """The tar ends before its end mark."""

    def __init__(self, reason: str, name: str = ""):
        super().__init__(reason)
        self.name = name  # of the member that was cut, if known


class _Rows:
    """Rows of the samples that can be used, and a tally of the others."""

    def __init__(self, text: str, keys: list[str] | None):
        self.text, self.keys = text, keys
        self.rows: list[tuple[int, ...]] = []
        self.faults, self.unused = Tally(), Tally()
        self._keys: set[int] = set()  # hashes of the keys, a third of their memory

    def add(self, sample: SampleMembers, cause: str | None = None) -> None:
        """cause: why the sample cannot be used, if known already."""
        found = sample.found
        if cause is None:
            if "image" not in found:
                cause = "no image"
            elif "text" not in found:
                cause = f"no {self.text}"
            elif any(_is_oversized(kind, member) for kind, member in found.items()):
                cause = "oversized member"
        if cause is not None:
            self.faults.add(cause, sample.key)
            return
        image, text, metadata = found["image"], found["text"], found.get("metadata")
        described = (0, 0) if metadata is None else (metadata.data // BLOCK_BYTES, metadata.size)
        header_blocks = (image.data - image.header) // BLOCK_BYTES
        places = (image.data // BLOCK_BYTES, image.size, text.data // BLOCK_BYTES, text.size)
        self.rows.append((*places, *described, header_blocks))
        if self.keys is not None:
            self.keys.append(sample.key)
        number = hash(sample.key)
        if number in self._keys:
            self.unused.add(REPEATED_KEY, sample.key)
        self._keys.add(number)

    def add_cut(self, samples: list[SampleMembers], cut_name: str) -> None:
        """Add the samples in or after the last of which the tar is cut off. cut_name: of the member that was cut."""
        for sample in samples[:-1]:
            self.add(sample)
        kinds = {"image", "text"}
        if self.rows and self.rows[-1][5]:  # the sample before has metadata, so this one should
            kinds.add("metadata")
        for sample in samples[-1:]:
            whole = kinds <= sample.found.keys() and not may_be_of(cut_name, sample.key)
            self.add(sample, None if whole else "truncated shard")


def _is_oversized(kind: str, member: Member) -> bool:
    return member.data // BLOCK_BYTES > LARGEST_BLOCK or member.size > LARGEST_BYTES[kind]


def index_tar(
    path: str | os.PathLike[str] | int | ObjectFile,
    kinds: Mapping[str, str] = KINDS,
    text: str = "caption",
    keys: list[str] | None = None,
    checksum: bool = False,
) -> ShardIndex:
    """Index one tar file, given by path, by a file descriptor or as an object (which are closed).

    kinds: image, text or metadata, by extension. text: what a text is, in words. keys: takes the key of each row.
    checksum: read all of it for its SHA-256. A damaged tar gives the samples before the damage. Raises OSError if it
    cannot be read.
    """
    collected = _Rows(text, keys)
    groups = MemberGroups(kinds, ("image", "text"), collected.unused)
    broken = None
    with _opened(path) as file:
        size_bytes = path.size_bytes if isinstance(path, ObjectFile) else os.fstat(file.fileno()).st_size
        try:
            for member in _members(file, size_bytes):
                if member.ordinary:
                    for sample in groups.add(member):
                        collected.add(sample)
                elif not member.name.endswith("/"):  # a folder
                    collected.unused.add(NO_FILE, member.name)
        except _Cut as cut:
            broken = str(cut)
            collected.add_cut(groups.end(), cut.name)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if checksum else None  # type: ignore[arg-type]
    for sample in groups.end():
        collected.add(sample)
    rows = np.array(collected.rows, dtype=ROW)
    faults, unused = collected.faults, collected.unused
    counts, examples = (dict(faults.counts), dict(unused.counts)), faults.examples | unused.examples
    return ShardIndex(rows, size_bytes, *counts, examples, broken, sha256)


def _opened(path: str | os.PathLike[str] | int | ObjectFile) -> BinaryIO:
    if isinstance(path, ObjectFile):
        return io.BufferedReader(path, OBJECT_BUFFER_BYTES)
    return open(path, "rb", buffering=BUFFER_BYTES)


def _members(file: BinaryIO, size_bytes: int) -> Iterator[Member]:
    """Each member in order; raises _Cut where the tar is cut off."""
    start = 0
    while True:
        try:
            member = next_member(file, start)
        except CutOff:
            raise _Cut(f"cut off after {size_bytes} bytes" if start else _other_kind(file, size_bytes)) from None
        except DamagedHeader:
            raise _Cut(f"damaged header at byte {start}" if start else _other_kind(file, size_bytes)) from None
        if member is None:
            return
        if member.data + member.size > size_bytes:
            raise _Cut(f"cut off after {size_bytes} bytes", member.name)
        yield member
        start = member.end


def _other_kind(file: BinaryIO, size_bytes: int) -> str:
    if size_bytes == 0:
        return "an empty file"
    file.seek(0)
    start = file.read(6)
    for magic, tool in COMPRESSIONS.items():
        if start.startswith(magic):
            return f"a compressed tar, which cannot be read at random places; unpack it with {tool} first"
    return "not a tar"


class UnreadableShard(OSError):
    """A shard whose bytes could not be read."""

    def __init__(self, shard: str, reason: str):
        super().__init__(shard, reason)  # both in args, so that it travels between processes
        self.shard, self.reason = shard, reason

    def __str__(self) -> str:
        return f"{self.shard}: {self.reason}"


def index_file_name(shard: str, size_bytes: int = -1, modified_ns: int = -1, version: int = INDEX_VERSION) -> str:
    """Name of a shard's index file; one given with size and time (a local one) or version (an object) that changes gets
    another name. An address that is signed anew keeps its name."""
    identity = json.dumps([version, unsigned(shard) if is_object(shard) else shard, size_bytes, modified_ns])
    return f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.npz"


def key_hashes(keys: Sequence[str]) -> np.ndarray:
    """Of the keys of samples, without the folder, 64 bits each: (n,) uint64."""
    encoded = [key.rpartition("/")[2].encode("utf-8", "surrogateescape") for key in keys]
    return np.frombuffer(b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in encoded), dtype="<u8")


def parquet_name(shard: str) -> str:
    """Path or address of img2dataset's parquet that belongs to a shard."""
    address, mark, query = shard.partition("?") if is_object(shard) else (shard, "", "")
    return f"{address.removesuffix('.tar')}.parquet{mark}{query}"


def index_shards(
    shards: Sequence[tuple[str, Path]],
    progress: bool,
    workers: int | None = None,
    checksums: bool = False,
    keys: bool = False,
) -> None:
    """Index each (path of a tar, file to save its index in), over several processes when there are many.

    progress: draw a bar if it takes longer than a second. workers: processes; None for one a core. checksums: as
    index_tar has it. keys: note them even where no parquet lies beside the shard. Raises UnreadableShard.
    """
    from tqdm import tqdm

    with (
        mapping(workers or cores(), len(shards), SHORT_JOBS_WORTH_A_POOL) as run,
        tqdm(desc="indexing shards", total=len(shards), unit="shard", delay=1, disable=not progress) as bar,
    ):
        for _ in run(partial(_index_one, checksums, keys), shards):
            bar.update()


def _index_one(checksums: bool, keys: bool, job: tuple[str, Path]) -> None:
    shard, path = job
    try:
        file = ObjectFile(shard) if is_object(shard) else None
        index = before = ShardIndex.load(path)
        if file is not None and (before is None or before.version != file.version):
            index = before = _index_beside(file)
        if index is None or (keys and index.keys is None) or (checksums and index.sha256 is None):
            found = list[str]()
            index = index_tar(file or shard, keys=found, checksum=checksums)
            index.version = None if file is None else file.version
            known = before is not None and before.keys is not None
            if keys or known or (file is None and os.path.exists(parquet_name(shard))):
                index.keys = key_hashes(found)
            if before is not None and index.sha256 is None:
                index.sha256 = before.sha256
    except OSError as error:
        raise UnreadableShard(shard, error.strerror or str(error)) from None
    index.save(path)


def name_beside(shard: str) -> str:
    """Where the index of an object may lie, so that none of the hosts that use it reads all of it for that."""
    address, mark, query = shard.partition("?")
    return f"{address}.npz{mark}{query}"


def _index_beside(shard: ObjectFile) -> ShardIndex | None:
    try:
        content = read_range(name_beside(shard.url), 0, LARGEST_INDEX_BYTES).content
    except ObjectFailed:
        return None
    index = ShardIndex.load(io.BytesIO(content))
    if index is not None and (index.size_bytes, index.version) == (shard.size_bytes, shard.version):
        return index
    told = (
        "%s is damaged or of another version of the shard, which is indexed anew; renew it by `index_shards --beside`"
    )
    log.warning(told, without_credentials(name_beside(shard.url)))
    return None
