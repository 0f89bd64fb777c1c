"""Where the members of each sample lie in a tar shard, read once from the tar's headers.

A sample is a run of members with one key (their name up to the first dot of its last part): KEY.jpg, KEY.txt, KEY.json,
the layout of img2dataset and webdataset. Only ordinary files count; a link, a device or an absolute name in a tar is
never followed and never used as a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modstruct.data.shards.tar_headers import BLOCK_BYTES, LARGEST_HEADER_BYTES, CutOff, DamagedHeader, next_member
from modstruct.files import atomic_write

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
KINDS = dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image") | {"txt": "text", "json": "metadata"}
COMPRESSIONS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
LARGEST_BLOCK = np.iinfo(np.uint32).max
# No image, caption or description is as large; reading such a member would only cost memory (JSON takes twenty times
# its length).
LARGEST_BYTES = {"image": 1 << 28, "text": 1 << 20, "metadata": 1 << 20}
LARGEST_INDEX_BYTES = 1 << 28  # of one shard, unpacked: nine million samples

# With a large buffer, reading headers in order is sequential reading, the fastest on any disk or network.
BUFFER_BYTES = 1 << 20

INDEX_VERSION = 1
# Below this many shards a pool of processes takes longer to start than the indexing itself.
SHARDS_WORTH_A_POOL = 16


@dataclass
class ShardIndex:
    """The samples of one shard, and its faults."""

    rows: np.ndarray
    """(samples,) of dtype ROW."""
    size_bytes: int
    """Size of the shard when it was indexed."""
    faults: dict[str, int] = field(default_factory=dict)
    """Samples left out, by cause."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first key of each cause."""
    broken: str | None = None
    """What is wrong with the shard as a whole; None if it is a complete tar."""

    def save(self, path: Path) -> None:
        report = {name: value for name, value in asdict(self).items() if name != "rows"}
        with atomic_write(path) as file:
            encoded = np.frombuffer(json.dumps(report).encode(), dtype=np.uint8)
            np.savez_compressed(file, rows=self.rows, report=encoded)

    @staticmethod
    def load(path: Path) -> ShardIndex | None:
        """The saved index; None if there is none, or it is damaged or of another version and must be rebuilt.

        The file is not trusted: an index that is returned points only into a shard of size_bytes.
        """
        try:
            with zipfile.ZipFile(path) as members:
                if any(member.file_size > LARGEST_INDEX_BYTES for member in members.infolist()):
                    return None
            with np.load(path, allow_pickle=False) as saved:
                index = ShardIndex(rows=saved["rows"], **json.loads(saved["report"].tobytes()))
            return index if index._is_sound() else None
        except Exception:  # a damaged file raises nearly anything, from zlib.error to RecursionError
            return None

    def _is_sound(self) -> bool:
        rows = self.rows
        if rows.dtype != ROW or rows.ndim != 1 or type(self.size_bytes) is not int:
            return False
        if not all(type(count) is int for count in self.faults.values()):
            return False
        if not all(type(word) is str for word in (*self.faults, *self.examples, *self.examples.values())):
            return False
        if not isinstance(self.broken, str | None) or (rows["header_blocks"] > rows["image_block"]).any():
            return False
        for kind, most in LARGEST_BYTES.items():
            ends = rows[f"{kind}_block"].astype(np.int64) * BLOCK_BYTES + rows[f"{kind}_bytes"]
            if (rows[f"{kind}_bytes"] > most).any() or (ends > self.size_bytes).any():
                return False
        return bool((rows["header_blocks"] <= LARGEST_HEADER_BYTES // BLOCK_BYTES + 1).all())


class _Cut(Exception):
    """The tar ends before its end mark."""

    def __init__(self, reason: str, key: str | None = None):
        super().__init__(reason)
        self.key = key  # of the sample whose member was cut


class _Rows:
    """Groups members into samples."""

    def __init__(self):
        self.rows: list[tuple[int, ...]] = []
        self.faults: dict[str, int] = {}
        self.examples: dict[str, str] = {}
        self.key = ""  # no member's
        self.found: dict[str, tuple[int, int, int]] = {}

    def add(self, key: str, kind: str, header_blocks: int, block: int, size: int) -> None:
        if key != self.key:
            self.close_sample()
            self.key = key
        self.found.setdefault(kind, (block, size, header_blocks))  # the first of two images counts

    def close_sample(self, cause: str | None = None) -> None:
        """End the current sample; cause: why it cannot be used, if known already."""
        found, key = self.found, self.key
        self.found, self.key = {}, ""
        if not found:
            return
        if cause is None:
            if "image" not in found:
                cause = "no image"
            elif "text" not in found:
                cause = "no caption"
            elif any(block > LARGEST_BLOCK or size > LARGEST_BYTES[kind] for kind, (block, size, _) in found.items()):
                cause = "oversized member"
        if cause is not None:
            self.faults[cause] = self.faults.get(cause, 0) + 1
            self.examples.setdefault(cause, printable(key))
            return
        (image, image_bytes, header), (text, text_bytes, _) = found["image"], found["text"]
        metadata, metadata_bytes, _ = found.get("metadata", (0, 0, 0))
        self.rows.append((image, image_bytes, text, text_bytes, metadata, metadata_bytes, header))

    def close_cut_sample(self, cut_key: str | None) -> None:
        """End the sample in or after which the tar is cut off. cut_key: key of the member that was cut, if known."""
        kinds = {"image", "text"}
        if self.rows and self.rows[-1][5]:  # the sample before has metadata, so this one should
            kinds.add("metadata")
        whole = kinds <= self.found.keys() and cut_key != self.key
        self.close_sample(None if whole else "truncated shard")


def index_tar(path: str | os.PathLike[str] | int) -> ShardIndex:
    """Index one tar file, given by path or by a file descriptor (which is closed).

    A damaged one gives the samples before the damage. Raises OSError if it cannot be read.
    """
    collected = _Rows()
    broken = None
    with open(path, "rb", buffering=BUFFER_BYTES) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        try:
            for name, header, data, size in _regular_members(file, size_bytes):
                key, kind = split_name(name)
                if kind is not None:
                    collected.add(key, kind, (data - header) // BLOCK_BYTES, data // BLOCK_BYTES, size)
        except _Cut as cut:
            broken = str(cut)
            collected.close_cut_sample(cut.key)
    collected.close_sample()
    rows = np.array(collected.rows, dtype=ROW)
    return ShardIndex(rows, size_bytes, collected.faults, collected.examples, broken)


def _regular_members(file: BinaryIO, size_bytes: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, offset of header, offset of data, size) of each ordinary file; raises _Cut where the tar is cut off."""
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
            raise _Cut(f"cut off after {size_bytes} bytes", split_name(member.name)[0])
        if member.ordinary:
            yield member.name, member.header, member.data, member.size
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


def split_name(name: str) -> tuple[str, str | None]:
    """Key and kind ("image", "text", "metadata"; None for what is not read) of a member, by webdataset's rule."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    kind = KINDS.get(extension.lower()) if stem and dot else None
    return f"{folder}{slash}{stem}", kind


def printable(name: str) -> str:
    """A name from a tar, safe for a log: undecodable bytes and control characters escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


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
