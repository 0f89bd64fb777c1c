"""One pass over a source's images or texts, by all processes: its batches kept in files, or gathered in memory.

    FOLDER/parts/
        begun.json          model, source and settings: a restart with others is refused
        image-00003.npz     rows of the batches of part 3, and what else was read with them
        text-…, prompts-…   alike, of captions and class prompts
        captions.jsonl      the distinct captions, once all images are there

A batch holds the same samples whichever process makes it, and however many processes there are, so its rows are the
same. A batch made is a dictionary of arrays, (b, …) each, and of lists of plain JSON types.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from modstruct import distributed
from modstruct.distributed import FailedElsewhere
from modstruct.distributed.collect import my_batches, on_main, rounds_of, rows_to_main
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, TEXT_ARRAYS, RowStream
from modstruct.files import atomic_write

NOTES = "{}.json"
"""Members of a part that hold lists in JSON beside the arrays, each of its own, to be read alone."""
STORE_TIMEOUT_SECONDS = 60.0
_number = itertools.count()

Batch = dict[str, Any]
MakeBatches = Callable[[Sequence[range]], Iterator[Batch]]
"""Numbers of the items of each batch -> the batches; of an empty range one without rows, but with a forward pass."""


class Made(Protocol):
    """What a pass made, in the order of its items."""

    def pieces(self, array: str) -> Iterator[np.ndarray]:
        """The rows of an array, some after the others; none where it was not made."""

    def notes(self, name: str) -> Iterator[Any]:
        """The items of a list, one after the other."""


def stream_of(made: Made, array: str, rows: int, dtype: str) -> RowStream:
    """All rows of an array, `rows` in number."""
    return RowStream((rows, *next(made.pieces(array)).shape[1:]), np.dtype(dtype), made.pieces(array))


class Parts:
    """A pass whose rows are kept in files of `part_batches` batches each, from which it is resumed.

    Each process makes every so many-th of the missing parts, without a collective until the end.
    """

    def __init__(self, folder: Path, kind: str, items: int, batch: int, part_batches: int):
        self.folder, self.kind, self.items = folder, kind, items
        self.batch, self.size = batch, batch * part_batches

    def __len__(self) -> int:
        return math.ceil(self.items / self.size)

    def make(self, make_batches: MakeBatches, title: str) -> Parts:
        """Make the missing parts, as the main process sees it before any is written; every process calls it."""
        missing = on_main(lambda: [number for number in range(len(self)) if not self._path(number).exists()])
        mine = missing[distributed.rank() :: distributed.world_size()]

        def work(progress: Progress) -> None:
            batches = make_batches([numbers for part in mine for numbers in self._batches(part)])
            for part in mine:
                made = []
                for numbers, rows in zip(self._batches(part), batches, strict=False):
                    made.append(rows)
                    _require_finite(rows)
                    progress.add(len(numbers))
                self._write(part, _joined(made))

        total = sum(len(numbers) for part in missing for numbers in self._batches(part))
        together(work, title, total)
        return self

    def pieces(self, array: str) -> Iterator[np.ndarray]:
        members = (self._member(part, array) for part in range(len(self)))
        return (rows for rows in members if rows is not None)

    def notes(self, name: str) -> Iterator[Any]:
        for part in range(len(self)):
            member = self._member(part, NOTES.format(name))
            if member is None:
                self._refuse(part, f"has no {name}")
            yield from json.loads(member.tobytes())

    def _batches(self, part: int) -> list[range]:
        numbers = range(part * self.size, min((part + 1) * self.size, self.items))
        return [numbers[first : first + self.batch] for first in range(0, len(numbers), self.batch)]

    def _write(self, part: int, made: Batch) -> None:
        members = {}
        for name, values in made.items():
            if isinstance(values, list):
                content = json.dumps(values, default=_plain).encode()
                name, values = NOTES.format(name), np.frombuffer(content, dtype=np.uint8)
            members[name] = values
        with atomic_write(self._path(part)) as file:
            np.savez(file, **members)

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


class Gathered:
    """A pass kept in memory: embeddings on the main process, all else on every process.

    All processes make equally many forward passes, as ZeRO-3 needs it, also where one of them fails.
    """

    def __init__(self, items: int, batch: int):
        self.items, self.batch = items, batch
        self._made: Batch = {}

    def make(self, make_batches: MakeBatches, title: str) -> Gathered:
        """Every process calls it."""
        batches = math.ceil(self.items / self.batch)
        mine = [range(n * self.batch, min((n + 1) * self.batch, self.items)) for n in my_batches(batches)]
        mine += [range(0)] * (rounds_of(batches) - len(mine))
        made: list[Batch] = []

        def work(progress: Progress) -> None:
            try:
                for numbers, rows in zip(mine, make_batches(mine), strict=False):
                    made.append(rows)
                    progress.add(len(numbers))
            except Exception:
                for _ in make_batches([range(0)] * (len(mine) - len(made))):
                    pass
                raise

        together(work, title, self.items)
        of_this_process = _joined(made)
        embeddings = {
            name: of_this_process.pop(name) for name in (*IMAGE_ARRAYS, *TEXT_ARRAYS) if name in of_this_process
        }
        self._made = _joined(distributed.gather_objects(of_this_process))
        self._made |= {name: rows_to_main(rows, distributed.device()) for name, rows in embeddings.items()}
        return self

    def pieces(self, array: str) -> Iterator[np.ndarray]:
        return iter([self._made[array]] if array in self._made else [])

    def notes(self, name: str) -> Iterator[Any]:
        return iter(self._made[name])


def _joined(made: Sequence[Batch]) -> Batch:
    joined: Batch = {}
    for name in sorted({name for rows in made for name in rows}):
        values = [rows[name] for rows in made if name in rows]
        joined[name] = list(itertools.chain(*values)) if isinstance(values[0], list) else np.concatenate(values)
    return joined


def _require_finite(made: Batch) -> None:
    """A set with other rows could not be finished."""
    for name in made.keys() & {*IMAGE_ARRAYS, *TEXT_ARRAYS}:
        if not np.isfinite(made[name]).all():
            remedy = "it has diverged, or overflows: --embedding.dtype float32 and --embedding.precision fp32"
            refuse("embedding.arrays", name, f"the model makes rows that are not finite: {remedy}")


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"metadata hold {value!r}, which JSON has no kind for")


class Progress:
    """Counts what all processes have done, and shows it on the main one. Every process makes one alike."""

    def __init__(self, title: str, total: int):
        alone = distributed.world_size() == 1
        self._store = None if alone else distributed.own_store(f"apart {next(_number)}", STORE_TIMEOUT_SECONDS)
        self._done = 0
        self._bar = tqdm(total=total, desc=title, leave=False, disable=not distributed.is_main())

    def add(self, count: int) -> None:
        """Note that this process has done so many more. Raises FailedElsewhere if another process has failed."""
        self._done += count
        if self._store is not None:
            self._done = self._store.add("done", count)
            if self._store.check(["failed"]):
                raise FailedElsewhere(f"another process failed first: {self._store.get('failed').decode()}")
        self._bar.update(self._done - self._bar.n)


def together(work: Callable[[Progress], None], title: str, total: int) -> None:
    """Do this process's share of the work; returns when all have done theirs. Every process calls it.

    An error of one process ends the work of all, at their next `add`: there it is raised as it is, and elsewhere
    FailedElsewhere.
    """
    progress, error = Progress(title, total), None
    try:
        work(progress)
    except Exception as caught:  # reported to the others first
        error = caught
        if progress._store is not None and not isinstance(error, FailedElsewhere):
            progress._store.set("failed", f"{type(error).__name__}: {error}")
    progress._bar.close()
    distributed.fail_together(error, f"{type(error).__name__}: {error}")
