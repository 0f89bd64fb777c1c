"""What shards hold: sizes, lengths of captions, duplicates, and what no run could use; over several processes.

Memory stays bounded, whatever the number of samples: distributions are counted in bins of three significant digits, and
hashes lie on the disk, 24 bytes a sample, and are compared a part of them at a time.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from modstruct.data.faults import BadSample
from modstruct.data.shards.ahead import read_ahead
from modstruct.data.shards.members import Tally
from modstruct.data.shards.pool import mapping
from modstruct.data.shards.reader import ShardReader
from modstruct.data.transforms.decoding import decode_image

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
SAMPLES_AT_ONCE = 1000  # of a job
ROWS_AT_ONCE = 1 << 24  # hashes that are compared in memory
ROOM_BYTES = 64 << 20  # of a job, for what is read ahead
LARGEST_GROUPS = 12
REPEATED = {"image": "the same bytes", "caption": "the same caption", "near": "nearly the same image"}
"""Kinds of Repeated, in words; the last one by modstruct.evaluation.leakage."""
HASHES = np.dtype([("sample", "<u8"), ("image", "<u8"), ("caption", "<u8")])


@dataclass
class Repeated:
    """Samples that repeat an earlier one."""

    samples: int = 0
    """Beyond the first of each group."""
    groups: int = 0
    largest: list[tuple[int, list[int]]] = field(default_factory=list)
    """Of the largest groups: how many samples, and the numbers of the first three."""


@dataclass
class Inspection:
    """Of all samples that can be read and decoded."""

    samples: int = 0
    numbers: dict[str, Counter[int]] = field(default_factory=dict)
    """Distribution of each quantity, in three significant digits."""
    left_out: Tally = field(default_factory=Tally)
    """What is found bad when it is read; what indexing left out, Samples.faults has."""
    repeated: dict[str, Repeated] = field(default_factory=dict)
    """By kind, of REPEATED."""

    def percentiles(self, name: str) -> list[int]:
        """Of a quantity, at PERCENTILES."""
        values, counts = zip(*sorted(self.numbers[name].items()), strict=True)
        ends = np.cumsum(counts)
        return [values[int(ends.searchsorted(max(1, share / 100 * ends[-1])))] for share in PERCENTILES]


def inspect(
    reader: ShardReader, max_image_pixels: int, workers: int, advance: Callable[[int], object] = lambda _: None
) -> Inspection:
    """Read and decode every sample as a run would. advance: told how many samples are done."""
    found, edges = Inspection(), [*range(0, len(reader.samples), SAMPLES_AT_ONCE), len(reader.samples)]
    with tempfile.TemporaryDirectory() as folder, mapping(workers, len(edges) - 1) as run:
        path = Path(folder) / "hashes"
        with path.open("wb") as file:
            for part, hashes in run(partial(_inspect_some, reader, max_image_pixels), pairwise(edges)):
                file.write(hashes.tobytes())
                found.samples += part.samples
                found.left_out.merge(**part.left_out.described())
                for name, counts in part.numbers.items():
                    found.numbers.setdefault(name, Counter()).update(counts)
                advance(part.samples + part.left_out.counts.total())
        rows = np.memmap(path, dtype=HASHES, mode="r") if found.samples else np.empty(0, dtype=HASHES)
        found.repeated = {column: _repeated(rows, column) for column in ("image", "caption")}
    return found


def _inspect_some(reader: ShardReader, max_image_pixels: int, span: tuple[int, int]) -> tuple[Inspection, np.ndarray]:
    found, hashes = Inspection(), []
    for sample, raw in zip(range(*span), read_ahead(reader, np.arange(*span), ROOM_BYTES), strict=True):
        try:
            if isinstance(raw, BadSample):
                raise raw
            image = decode_image(raw.image, max_image_pixels, raw.where)
        except BadSample as bad:
            found.left_out.add(bad.cause, bad.where)
            continue
        found.samples += 1
        quantities = {
            "image width": [image.width],
            "image height": [image.height],
            "image bytes": [len(raw.image)],
            "captions of an image": [len(raw.captions)],
            "caption characters": [len(caption) for caption in raw.captions],
            "caption words": [len(caption.split()) for caption in raw.captions],
        }
        for name, values in quantities.items():
            found.numbers.setdefault(name, Counter()).update(map(_three_digits, values))
        caption = raw.caption.encode(errors="surrogatepass")
        hashes.append((sample, *(_hash(content) for content in (raw.image, caption))))
    return found, np.array(hashes, dtype=HASHES)


def _three_digits(number: int) -> int:
    unit = 10 ** max(0, len(str(number)) - 3)
    return number // unit * unit


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _repeated(rows: np.ndarray, column: str) -> Repeated:
    """rows: (samples,) of HASHES."""
    found, largest = Repeated(), list[tuple[int, int]]()
    blocks = range(0, len(rows), ROWS_AT_ONCE)
    for part in range(len(blocks)):
        values = [rows[column][first : first + ROWS_AT_ONCE] for first in blocks]
        mine = np.concatenate([block[block % len(blocks) == part] for block in values])
        distinct, counts = np.unique(mine, return_counts=True)
        several = counts > 1
        found.groups += int(several.sum())
        found.samples += int((counts[several] - 1).sum())
        order = np.flatnonzero(several)[np.argsort(-counts[several], kind="stable")[:LARGEST_GROUPS]]
        largest += zip(counts[order].tolist(), distinct[order].tolist(), strict=True)
    for count, value in sorted(largest, key=lambda group: -group[0])[:LARGEST_GROUPS]:
        where: list[int] = []
        for first in blocks:
            block = rows[first : first + ROWS_AT_ONCE]
            where += block["sample"][block[column] == value][: 3 - len(where)].tolist()
        found.largest.append((count, where))
    return found
