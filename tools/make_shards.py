#!/usr/bin/env python
"""Pack images and captions into tar shards in img2dataset's layout: KEY.jpg (png, webp), KEY.txt, KEY.json.

From a folder, searched with its subfolders, in which NAME.jpg goes with NAME.txt (and NAME.json, if there is one):

    python tools/make_shards.py images/ --output shards/

From a table (CSV, or TSV by its ending) with a column of image files, relative to the table's folder, and one of
captions; every other column goes into KEY.json:

    python tools/make_shards.py captions.tsv --image_column file --caption_column title --output shards/

An image or caption that no run could use is left out, counted and named. The shards are read with
--data.train 'shards/*.tar'.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import webdataset
from tqdm import tqdm

from modstruct.config import DataConfig
from modstruct.data.faults import BadSample
from modstruct.data.transforms.decoding import decode_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
NAMED = 10  # bad samples, in the log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder, or CSV or TSV table with a header line")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards; made if missing")
    parser.add_argument("--samples_per_shard", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--image_column", default="image", help="of a table (default: %(default)s)")
    parser.add_argument("--caption_column", default="caption", help="of a table (default: %(default)s)")
    parser.add_argument(
        "--join_captions",
        action="store_true",
        help="rows of one image become one sample with several captions, for evaluation; the first is the caption",
    )
    options = parser.parse_args()
    if options.samples_per_shard < 1:
        parser.error(f"--samples_per_shard = {options.samples_per_shard}: at least 1")
    try:
        if options.input.is_dir():
            found = list(from_folder(options.input))
        else:
            found = list(from_table(options.input, options.image_column, options.caption_column))
    except (OSError, ValueError, csv.Error) as error:
        parser.error(str(error))
    if not found:
        parser.error(f"{options.input}: no image ({', '.join(EXTENSIONS)}) in it")
    if options.join_captions:
        found = joined(found)
    options.output.mkdir(parents=True, exist_ok=True)
    if any(options.output.glob("*.tar")):
        parser.error(f"--output = {options.output}: holds shards already; choose another folder")

    bad: Counter[str] = Counter()
    with AtomicShardWriter(options.output, options.samples_per_shard) as shards:
        for image, caption, metadata in tqdm(found, "packing", unit="sample"):
            try:
                shards.write(*checked(image, caption, metadata))
            except BadSample as error:
                bad[error.cause] += 1
                if bad.total() <= NAMED:
                    tqdm.write(f"left out: {error}", file=sys.stderr)
    print(f"{len(found) - bad.total()} samples in {options.output}")
    for cause, count in bad.most_common():
        print(f"{count} left out: {cause}")
    return 0 if bad.total() < len(found) else 1


def from_folder(folder: Path) -> Iterator[tuple[Path, str | None, dict]]:
    """(image, caption, metadata) of each image in the folder, in order of path; caption None without a text."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            text, about = path.with_suffix(".txt"), path.with_suffix(".json")
            caption = text.read_text("utf-8-sig", errors="surrogateescape") if text.is_file() else None
            try:
                metadata = dict(json.loads(about.read_bytes())) if about.is_file() else {}
            except (ValueError, TypeError) as error:
                raise ValueError(f"{about}: must hold a JSON object, {{...}}: {error}") from None
            yield path, caption, metadata


def from_table(table: Path, image_column: str, caption_column: str) -> Iterator[tuple[Path, str | None, dict]]:
    """(image, caption, other columns) of each row."""
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if table.suffix.lower() in (".tsv", ".tab") else ",")
        for option, column in (("--image_column", image_column), ("--caption_column", caption_column)):
            if column not in (rows.fieldnames or ()):
                raise ValueError(
                    f"{option} = {column!r}: the columns of {table} are {', '.join(rows.fieldnames or ())}"
                )
        for row in rows:
            metadata = {name: value for name, value in row.items() if name not in (None, image_column, caption_column)}
            yield table.parent / (row[image_column] or ""), row[caption_column], metadata


def joined(found: list[tuple[Path, str | None, dict]]) -> list[tuple[Path, str | None, dict]]:
    """One entry an image, with all its captions under "captions" in the metadata of its first row."""
    captions: dict[Path, list[str]] = {}
    first: dict[Path, dict] = {}
    for image, caption, metadata in found:
        captions.setdefault(image, []).extend([caption] if caption and caption.strip() else [])
        first.setdefault(image, metadata)
    return [
        (image, texts[0] if texts else None, first[image] | {"captions": texts}) for image, texts in captions.items()
    ]


def checked(image: Path, caption: str | None, metadata: dict) -> tuple[str, bytes, bytes, dict]:
    """Extension, image, caption and metadata, all of which a run can read. Raises BadSample."""
    where = str(image)
    if image.suffix.lower() not in EXTENSIONS:
        raise BadSample(f"an image must be one of {', '.join(EXTENSIONS)}", where)
    if caption is None:
        raise BadSample("no caption", where)
    try:
        text = caption.strip().encode()
    except UnicodeEncodeError:  # bytes that were no UTF-8
        raise BadSample("undecodable text", where) from None
    if not text:
        raise BadSample("empty caption", where)
    try:
        content = image.read_bytes()
    except OSError as error:
        raise BadSample("unreadable file", f"{where}: {error.strerror}") from None
    decode_image(content, DataConfig().max_image_pixels, where)
    return image.suffix.lower().lstrip("."), content, text, {**metadata, "file": where, "caption": text.decode()}


class AtomicShardWriter:
    """webdataset's writer; a shard gets its final name when it is complete."""

    def __init__(self, folder: Path, samples_per_shard: int):
        self._samples_per_shard = samples_per_shard
        self._count = 0
        self._file: BinaryIO | None = None
        self._writer = webdataset.ShardWriter(
            str(folder / "%05d.tar"),
            maxcount=samples_per_shard,
            maxsize=float("inf"),
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
            if self._count == 0:
                os.unlink(self._file.name.removesuffix(".part"))  # the writer opens a first shard at once

    def write(self, extension: str, image: bytes, text: bytes, metadata: dict) -> None:
        shard, place = divmod(self._count, self._samples_per_shard)
        key = f"{shard:05d}{place:06d}"
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


if __name__ == "__main__":
    sys.exit(main())
