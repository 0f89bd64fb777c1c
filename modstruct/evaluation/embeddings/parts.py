"""Parts: files of a fixed number of batches each, from which a stopped embedding goes on.

    FOLDER/parts/
        begun.json          what is embedded, of what, and how: a restart with anything else is refused
        image-00003.npz     rows of the batches of part 3, and what else was read with them
        text-…, prompts-…   alike, of captions and class prompts
        captions.jsonl      the distinct captions, once all images are there

A part holds the same samples in the same batches whichever process makes it, and of however many.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from modstruct.errors import refuse
from modstruct.evaluation.embeddings.array_files import RowStream
from modstruct.files import atomic_write

FOLDER = "parts"
NOTES = "{}.json"
"""Members of a part that hold lists in JSON beside the arrays, each of its own, to be read alone."""


@dataclass(frozen=True)
class Parts:
    """The parts of one kind, of `items` images or texts in batches of `batch`."""

    folder: Path
    kind: str
    items: int
    batch: int
    part_batches: int

    def __len__(self) -> int:
        return math.ceil(self.items / (self.batch * self.part_batches))

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there."""
        return [number for number in range(len(self)) if not self._path(number).exists()]

    def numbers(self, part: int) -> range:
        """The items of a part."""
        size = self.batch * self.part_batches
        return range(part * size, min((part + 1) * size, self.items))

    def batches(self, part: int) -> list[range]:
        """The items of each batch of a part."""
        numbers = self.numbers(part)
        return [numbers[first : first + self.batch] for first in range(0, len(numbers), self.batch)]

    def write(self, part: int, arrays: dict[str, np.ndarray], notes: dict[str, list] | None = None) -> None:
        """Write a part, whole or not at all. notes: lists of plain JSON kinds, numbers of numpy among them."""
        encoded = {name: json.dumps(values, default=_plain).encode() for name, values in (notes or {}).items()}
        members = {NOTES.format(name): np.frombuffer(content, dtype=np.uint8) for name, content in encoded.items()}
        with atomic_write(self._path(part)) as file:
            np.savez(file, **arrays, **members)

    def notes(self, name: str) -> Iterator[list]:
        """The notes of this name, of one part after the other."""
        for part in range(len(self)):
            yield json.loads(self._member(part, NOTES.format(name)).tobytes())

    def pieces(self, array: str) -> Iterator[np.ndarray]:
        """The rows of one part after the other; a part of which nothing could be read has none."""
        for part in range(len(self)):
            rows = self._member(part, array)
            if rows is not None:
                yield rows

    def stream(self, array: str, rows: int, dtype: np.dtype) -> RowStream:
        """All rows of an array, `rows` in number."""
        first = next(self.pieces(array))
        return RowStream((rows, *first.shape[1:]), dtype, self.pieces(array))

    def _member(self, part: int, name: str) -> np.ndarray | None:
        path = self._path(part)
        try:
            with np.load(path, allow_pickle=False) as content:
                return content.get(name)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            refuse("part", str(path), f"is damaged ({error}): remove it and embed again, which makes it anew")

    def _path(self, part: int) -> Path:
        return self.folder / f"{self.kind}-{part:05d}.npz"


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"metadata hold {value!r}, which JSON has no kind for")
