"""Packs images and captions into shards, over several processes; a packing that was killed is resumed.

Entry n belongs to shard n // samples_per_shard, and an entry that no run could use leaves its shard shorter: a shard is
a function of its entries, so any number of processes writes the same bytes.

FOLDER/packing.jsonl    while packing: a report a line of each shard that is whole, of its entries and of its bytes
FOLDER/manifest.json    at the end: all of these, and their sums
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from modstruct.config import DataConfig
from modstruct.data.faults import BadSample
from modstruct.data.shards.members import Tally
from modstruct.data.shards.pool import mapping
from modstruct.data.shards.writer import AtomicShardWriter
from modstruct.data.transforms.decoding import FORMATS, decode_image
from modstruct.errors import refuse
from modstruct.files import naming, write_json

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
# Of others than FORMATS, those that Pillow reads by itself: no EPS, which runs Ghostscript, and no films.
CONVERTED = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA", "TIFF")
EXTRA_CELLS = None  # csv's key of the cells beyond the header
JOURNAL, MANIFEST = "packing.jsonl", "manifest.json"
TALLIES = ("left_out", "changed")
Entry = tuple[Path, str | None, dict]
"""Image, caption or None, metadata."""
Report = dict[str, Any]
"""Of one shard: its name, samples, bytes and sha256 (0 and null where no entry was usable), `entries`, a hash of what
it was packed from, and left_out and changed, each {"counts": by cause, "examples": up to three of each}."""


@dataclass(frozen=True)
class _Job:
    folder: Path
    number: int
    entries: Sequence[Entry]
    digest: str
    done: Report | None
    """Of an earlier packing that was interrupted."""
    samples_per_shard: int


def pack_shards(
    entries: Iterable[Entry], count: int, folder: Path, samples_per_shard: int, workers: int
) -> Iterator[Report]:
    """Pack what is not packed yet into `folder`, whose lock is held; yields the report of each shard, in order.

    count: of the entries.

    Raises ValueError, naming --output, where the folder holds shards of other entries.
    """
    done = _done(folder)
    for part in folder.glob("*.tar.part"):  # of a process that was killed
        part.unlink()

    def changed(shard: str) -> NoReturn:
        other = f"{shard} was packed from other entries: the input or --samples_per_shard has changed"
        refuse("--output", str(folder), f"{other}; choose another folder, or remove what is there")

    def jobs() -> Iterator[_Job]:
        rest, more = iter(entries), set(done)
        for number, of_shard in enumerate(iter(lambda: [*islice(rest, samples_per_shard)], [])):
            report, digest = done.get(_name(number)), _digest(of_shard)
            if report is not None and report["entries"] != digest:
                changed(_name(number))
            more.discard(_name(number))
            whole = report is not None and _bytes(folder / _name(number)) == report["bytes"]
            yield _Job(folder, number, () if whole else of_shard, digest, report if whole else None, samples_per_shard)
        if more:
            changed(min(more))

    journal = folder / JOURNAL
    with mapping(workers, -(-count // samples_per_shard)) as run, naming(journal):
        for report in run(_pack_shard, jobs()):
            if done.get(report["shard"]) != report:
                with open(journal, "ab") as file:
                    file.write(json.dumps(report).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            yield report


def write_manifest(folder: Path, reports: Sequence[Report], passed_over: Tally) -> None:
    """The last file of a packing, unless no entry was usable. passed_over: files that are no part of an entry."""
    tallies = {name: Tally() for name in TALLIES}
    for report in reports:
        for name, tally in tallies.items():
            tally.merge(report[name]["counts"], report[name]["examples"])
    sums = {name: sum(report[name] for report in reports) for name in ("samples", "bytes")}
    causes = {name: tally.described() for name, tally in (tallies | {"passed_over": passed_over}).items()}
    if sums["samples"]:
        write_json(folder / MANIFEST, sums | causes | {"shards": [*reports]})
    (folder / JOURNAL).unlink(missing_ok=True)


def _done(folder: Path) -> dict[str, Report]:
    """Reports of the shards that are whole, by name."""
    manifest, journal = folder / MANIFEST, folder / JOURNAL
    reports: list[Report] = []
    try:
        if manifest.exists():
            reports = json.loads(manifest.read_bytes())["shards"]
        if journal.exists():
            whole = 0
            for line in journal.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # the process was killed while it wrote
                    os.truncate(journal, whole)
                    break
                reports.append(json.loads(line))
                whole += len(line)
        elif not manifest.exists() and any(folder.glob("*.tar")):
            refuse("--output", str(folder), "holds shards already; choose another folder")
        return {report["shard"]: report for report in reports}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        refuse("--output", str(folder), f"its {MANIFEST} or {JOURNAL} is damaged; choose another folder")


def _name(number: int) -> str:
    return f"{number:05d}.tar"


def _bytes(path: Path) -> int:
    """0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _digest(entries: Sequence[Entry]) -> str:
    described = json.dumps([(str(image), caption, metadata) for image, caption, metadata in entries])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _pack_shard(job: _Job) -> Report:
    if job.done is not None:
        return job.done
    left_out, changed, samples = Tally(), Tally(), 0
    with AtomicShardWriter(job.folder, job.samples_per_shard, changed, job.number) as shard:
        for entry in job.entries:
            try:
                shard.write(*_checked(*entry, changed))
                samples += 1
            except BadSample as error:
                left_out.add(error.cause, error.where)
    path, sha256 = job.folder / _name(job.number), None
    if samples:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    report = {"shard": path.name, "samples": samples, "bytes": _bytes(path), "sha256": sha256, "entries": job.digest}
    return report | {"left_out": left_out.described(), "changed": changed.described()}


def _checked(image: Path, caption: str | None, metadata: dict, changed: Tally) -> tuple[str, bytes, bytes, dict]:
    """Extension, image, caption and metadata, all of which a run can read. Raises BadSample."""
    where = str(image)
    if EXTRA_CELLS in metadata:
        raise BadSample("a row of more cells than columns: put a caption that holds the separator in quotes", where)
    if caption is None:
        raise BadSample("no caption: it stands in the table's column, or in a folder of images in KEY.txt", where)
    try:
        text = caption.strip().encode()
    except UnicodeEncodeError:  # bytes that were no UTF-8
        raise BadSample("a text that is no UTF-8: save the table, or KEY.txt, as UTF-8", where) from None
    if not text:
        raise BadSample("empty caption", where)
    try:
        content = image.read_bytes()
    except OSError as error:
        raise BadSample("unreadable file", f"{where}: {error.strerror}") from None
    content, extension = _as_read_by_runs(content, image, changed)
    own = {"file": where, "caption": text.decode()}
    for name, value in own.items():
        if metadata.get(name, value) != value:
            changed.add(f"metadata field `{name}` replaced", where)
    return extension, content, text, metadata | own


def _as_read_by_runs(content: bytes, image: Path, changed: Tally) -> tuple[bytes, str]:
    """The image as it is, or as PNG where runs do not read its kind, and its extension. Raises BadSample."""
    most, where, ending = DataConfig().max_image_pixels, str(image), image.suffix.lower()
    try:
        decode_image(content, most, where)
        return content, (ending if ending in EXTENSIONS else ".jpg").lstrip(".")
    except BadSample as error:
        if error.cause != "undecodable image":
            raise
    decoded, made = decode_image(content, most, where, CONVERTED), io.BytesIO()
    decoded.save(made, "PNG")
    changed.add(f"{ending} stored as PNG", where)
    return made.getvalue(), "png"


def image_endings() -> frozenset[str]:
    """Of the files that are packed as images, in lower case with the dot."""
    kinds = (*FORMATS, *CONVERTED)
    return frozenset({*EXTENSIONS, *(end for end, kind in Image.registered_extensions().items() if kind in kinds)})
