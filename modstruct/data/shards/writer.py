"""Writes tar shards in img2dataset's layout: KEY.jpg (png, webp), KEY.txt, KEY.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import webdataset

from modstruct.data.shards.members import Tally
from modstruct.errors import require
from modstruct.files import require_writable


class AtomicShardWriter:
    """Numbered shards in a folder, equal byte by byte for equal samples; each gets its final name when it is complete.

    changed: counts the metadata that had another `key`, which is replaced. first_shard: number of the first shard.
    """

    def __init__(self, folder: Path, samples_per_shard: int, changed: Tally, first_shard: int = 0):
        self._changed = changed
        self._samples_per_shard = samples_per_shard
        self._count = self._first = first_shard * samples_per_shard
        self._file: BinaryIO
        self._writer = webdataset.ShardWriter(
            str(folder / "%05d.tar"),
            maxcount=samples_per_shard,
            maxsize=float("inf"),
            start_shard=first_shard,
            opener=self._open,
            post=self._finish,
            verbose=0,
            encoder=False,
            mtime=0,
        )

    def __enter__(self) -> AtomicShardWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._writer.close()
            if self._count == self._first:
                os.unlink(self._file.name.removesuffix(".part"))  # the writer opens a first shard at once

    def write(self, extension: str, image: bytes, text: bytes, metadata: dict) -> None:
        """extension: of the image, without a dot. text: UTF-8."""
        shard, place = divmod(self._count, self._samples_per_shard)
        key = f"{shard:05d}{place:06d}"
        if metadata.get("key", key) != key:
            self._changed.add("metadata field `key` replaced", metadata.get("file", key))
        about = json.dumps({**metadata, "key": key}, ensure_ascii=True).encode()
        self._writer.write({"__key__": key, extension: image, "txt": text, "json": about})
        self._count += 1

    def _open(self, name: str) -> BinaryIO:
        self._file = open(f"{name}.part", "wb")  # noqa: SIM115  closed by _finish
        return self._file

    def _finish(self, name: str) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(f"{name}.part", name)


@contextmanager
def new_folder(field: str, folder: Path) -> Iterator[Path]:
    """An empty folder to fill that takes the name `folder` when the block ends well, and is removed when it does not.

    field: the option that names it, for the ValueError where it exists already or cannot be written.
    """
    require(not folder.exists(), field, str(folder), "is there already; choose another folder")
    require_writable(field, folder)
    part = folder.with_name(f"{folder.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
