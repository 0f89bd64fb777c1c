"""Parts: files of a fixed number of batches each, from which an interrupted embedding is resumed.

    FOLDER/parts/
        begun.json          model, source and settings: a restart with others is refused
        image-00003.npz     rows of the batches of part 3, and what else was read with them
        text-…, prompts-…   alike, of captions and class prompts
        captions.jsonl      the distinct captions, once all images are there

A part holds the same samples in the same batches whichever process makes it, and however many processes there are.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from zipfile import BadZipFile

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from modstruct.data.shards.workers import WorkerLoader
from modstruct.distributed import FailedElsewhere, fail_together, is_main, own_store, world_size
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.set_files import RowStream
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
        """Write a part, whole or not at all. notes: lists of plain JSON types, numbers of numpy among them."""
        encoded = {name: json.dumps(values, default=_plain).encode() for name, values in (notes or {}).items()}
        members = {NOTES.format(name): np.frombuffer(content, dtype=np.uint8) for name, content in encoded.items()}
        with atomic_write(self._path(part)) as file:
            np.savez(file, **arrays, **members)  # type: ignore[arg-type]  # numpy's types take it for allow_pickle

    def notes(self, name: str) -> Iterator[list]:
        """The notes of this name, of one part after the other."""
        for part in range(len(self)):
            member = self._member(part, NOTES.format(name))
            if member is None:
                self._refuse(part, f"has no {name}")
            yield json.loads(member.tobytes())

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
        try:
            with np.load(self._path(part), allow_pickle=False) as content:
                return content.get(name)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            self._refuse(part, str(error))

    def _refuse(self, part: int, cause: str) -> NoReturn:
        refuse("part", str(self._path(part)), f"is damaged ({cause}): remove it and embed again, which replaces it")

    def _path(self, part: int) -> Path:
        return self.folder / f"{self.kind}-{part:05d}.npz"


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"metadata hold {value!r}, which JSON has no kind for")


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file of one JSON text a line, one after the other."""
    with open(path, "rb") as file:
        yield from map(json.loads, file)


class TextLines:
    """A file of one JSON text a line, read on demand; pickles to loader workers."""

    def __init__(self, path: Path):
        self.path = path
        self._starts: np.ndarray | None = None

    def texts(self, numbers: range) -> list[str]:
        """The texts of some consecutive lines."""
        if self._starts is None:  # 8 bytes a line, found once in each process
            with open(self.path, "rb") as file:
                self._starts = np.cumsum([0, *map(len, file)], dtype=np.int64)
        with open(self.path, "rb") as file:
            file.seek(self._starts[numbers.start])
            return [json.loads(file.readline()) for _ in numbers]


class TextList:
    """Texts in memory, with the interface of TextLines."""

    def __init__(self, texts: Sequence[str]):
        self._texts = texts

    def texts(self, numbers: range) -> list[str]:
        return list(self._texts[numbers.start : numbers.stop])


class _TokenBatches(Dataset):
    """Map from consecutive places to ids (B, L)."""

    def __init__(self, texts: TextLines | TextList, tokenize: Callable[[Sequence[str]], Tensor]):
        self._texts, self._tokenize = texts, tokenize

    def __getitem__(self, numbers: range) -> Tensor:
        return self._tokenize(self._texts.texts(numbers))


def token_loader(
    texts: TextLines | TextList,
    tokenize: Callable[[Sequence[str]], Tensor],
    batches: Sequence[range],
    workers: int,
) -> WorkerLoader:
    """Loader of the ids (B, L) of each batch of consecutive places."""
    workers = min(workers, len(batches))
    return WorkerLoader(_TokenBatches(texts, tokenize), batches, workers, pin_memory=False)


STORE_TIMEOUT_SECONDS = 60.0
_number = itertools.count()


class Progress:
    """Counts what all processes have done, and shows it on the main one. Every process makes one alike."""

    def __init__(self, title: str, total: int, unit: str):
        self._store = own_store(f"apart {next(_number)}", STORE_TIMEOUT_SECONDS) if world_size() > 1 else None
        self._done = 0
        self._bar = tqdm(total=total, desc=title, unit=unit, leave=False, disable=not is_main())

    def add(self, count: int) -> None:
        """Note that this process has done so many more. Raises FailedElsewhere if another process has failed."""
        self._done += count
        if self._store is not None:
            self._done = self._store.add("done", count)
            if self._store.check(["failed"]):
                raise FailedElsewhere(f"another process failed first: {self._store.get('failed').decode()}")
        self._bar.update(self._done - self._bar.n)

    def failed(self, error: Exception) -> None:
        """Tell the others, at their next `add`."""
        if self._store is not None and not isinstance(error, FailedElsewhere):
            self._store.set("failed", _described(error))

    def close(self) -> None:
        self._bar.close()


def apart(work: Callable[[Progress], None], title: str, total: int, unit: str) -> None:
    """Do this process's share of the work; returns when all have done theirs. Every process calls it.

    total: of all processes, in `unit`. An error of one process ends the work of all: there it is raised as it is, and
    elsewhere FailedElsewhere.
    """
    progress, error = Progress(title, total, unit), None
    try:
        work(progress)
    except Exception as caught:  # reported to the others first
        error = caught
        progress.failed(error)
    finally:
        progress.close()
    fail_together(error, _described(error))


def _described(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}"
