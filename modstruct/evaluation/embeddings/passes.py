"""One pass over a source's images or texts, by all processes: its batches kept in files, or gathered in memory.

A batch holds the same samples whichever process makes it, and however many processes there are, so its rows are the
same. A batch made is a dictionary of arrays, (b, …) each, and of lists of plain JSON types.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn
from zipfile import BadZipFile

import numpy as np

from modstruct import distributed
from modstruct.distributed.collect import my_batches, on_main, rounds_of, rows_to_main, together
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, TEXT_ARRAYS, RowStream
from modstruct.files import atomic_write

Batch = dict[str, Any]
MakeBatches = Callable[[Sequence[range]], Iterator[Batch]]
"""Numbers of the items of each batch -> the batches; of an empty range one without rows, but with a forward pass."""


class Gathered:
    """A pass kept in memory: embeddings on the main process (elsewhere NaN), all else on every process.

    All processes make equally many forward passes, as ZeRO-3 needs it, also where one of them fails.
    """

    def __init__(self, items: int, batch: int):
        self.items, self.batch = items, batch
        self._made: Batch = {}

    def make(self, make_batches: MakeBatches, title: str) -> Gathered:
        """Make all batches; every process calls it."""
        batches = math.ceil(self.items / self.batch)
        mine = [range(n * self.batch, min((n + 1) * self.batch, self.items)) for n in my_batches(batches)]
        mine += [range(0)] * (rounds_of(batches) - len(mine))
        made: list[Batch] = []

        def work(done: Callable[[int], None]) -> None:
            try:
                for numbers, rows in zip(mine, make_batches(mine), strict=False):
                    made.append(rows)
                    done(len(numbers))
            except Exception:
                for _ in make_batches([range(0)] * (len(mine) - len(made))):
                    pass
                raise

        together(work, title, self.items)
        rows = _joined(made)
        embeddings = {name: rows.pop(name) for name in (*IMAGE_ARRAYS, *TEXT_ARRAYS) if name in rows}
        self._made = _joined(distributed.gather_objects(rows))
        self._made |= {name: rows_to_main(values, distributed.device()) for name, values in embeddings.items()}
        return self

    def pieces(self, array: str) -> Iterator[np.ndarray]:
        """The rows of an array, some after the others, in the order of the items; none where it was not made."""
        return iter([self._made[array]] if array in self._made else [])

    def notes(self, name: str) -> Iterator[Any]:
        """The items of a list, one after the other."""
        return iter(self._made[name])

    def stream(self, array: str, dtype: str) -> RowStream:
        """The rows of an array of a pass whose items all gave one."""
        return RowStream((self.items, *next(self.pieces(array)).shape[1:]), np.dtype(dtype), self.pieces(array))


class Parts(Gathered):
    """A pass kept in files FOLDER/KIND-00000.npz of `part_batches` batches each, from which it is resumed.

    Lists are members NAME.json, of JSON, each to be read alone. Each process makes every so many-th of the missing
    parts, without a collective until the end.
    """

    def __init__(self, items: int, batch: int, folder: Path, kind: str, part_batches: int):
        super().__init__(items, batch)
        self._paths = [folder / f"{kind}-{n:05d}.npz" for n in range(math.ceil(items / (batch * part_batches)))]
        starts = [range(first, min(first + batch, items)) for first in range(0, items, batch)]
        self._batches = [starts[n * part_batches : (n + 1) * part_batches] for n in range(len(self._paths))]

    def make(self, make_batches: MakeBatches, title: str) -> Parts:
        """Make the missing parts, as the main process sees it before any is written."""
        missing = on_main(lambda: [part for part, path in enumerate(self._paths) if not path.exists()])
        mine = missing[distributed.rank() :: distributed.world_size()]

        def work(done: Callable[[int], None]) -> None:
            batches = make_batches(list(chain.from_iterable(self._batches[part] for part in mine)))
            for part in mine:
                made = []
                for numbers, rows in zip(self._batches[part], batches, strict=False):
                    _require_finite(rows)
                    made.append(rows)
                    done(len(numbers))
                with atomic_write(self._paths[part]) as file:
                    np.savez(file, **_members(_joined(made)))  # type: ignore[arg-type]  # for its allow_pickle

        together(work, title, sum(len(numbers) for part in missing for numbers in self._batches[part]))
        return self

    def pieces(self, array: str) -> Iterator[np.ndarray]:
        members = (_member(path, array) for path in self._paths)
        return (rows for rows in members if rows is not None)

    def notes(self, name: str) -> Iterator[Any]:
        for path in self._paths:
            member = _member(path, f"{name}.json")
            if member is None:
                _refuse_part(path, f"has no {name}")
            yield from json.loads(member.tobytes())


def _joined(made: Sequence[Batch]) -> Batch:
    joined: Batch = {}
    for name in sorted({name for rows in made for name in rows}):
        values = [rows[name] for rows in made if name in rows]
        joined[name] = list(chain.from_iterable(values)) if isinstance(values[0], list) else np.concatenate(values)
    return joined


def _require_finite(made: Batch) -> None:
    """A set with other rows could not be finished."""
    for name in made.keys() & {*IMAGE_ARRAYS, *TEXT_ARRAYS}:
        if not np.isfinite(made[name]).all():
            remedy = "it has diverged, or overflows: --embedding.dtype float32 and --embedding.precision fp32"
            refuse("embedding.arrays", name, f"the model makes rows that are not finite: {remedy}")


def _members(made: Batch) -> dict[str, np.ndarray]:
    """Arrays as they are, lists as JSON; metadata may hold numbers of numpy."""
    lists = {name: values for name, values in made.items() if isinstance(values, list)}
    encoded = {name: json.dumps(values, default=np.generic.item).encode() for name, values in lists.items()}
    coded = {f"{name}.json": np.frombuffer(content, dtype=np.uint8) for name, content in encoded.items()}
    return {name: values for name, values in made.items() if name not in lists} | coded


def _member(path: Path, name: str) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as content:
            return content.get(name)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        _refuse_part(path, str(error))


def _refuse_part(path: Path, cause: str) -> NoReturn:
    refuse("part", str(path), f"is damaged ({cause}): remove it and embed again, which replaces it")
