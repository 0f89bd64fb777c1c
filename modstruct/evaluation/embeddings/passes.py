"""One pass over a source's images or texts, by all processes: its batches kept in files, or gathered in memory.

A batch holds the same samples whichever process makes it, and however many processes there are, so its rows are the
same. A batch made is a dictionary of arrays, (b, …) each, and of lists of plain JSON types.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from modstruct import distributed
from modstruct.config.training import EmbeddingConfig
from modstruct.distributed.collect import my_batches, on_main, rounds_of, rows_to_main, together
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, TEXT_ARRAYS
from modstruct.files import atomic_write

Batch = dict[str, Any]
MakeBatches = Callable[[Sequence[range]], Iterator[Batch]]
"""Numbers of the items of each batch -> the batches; of an empty range one without rows, but with a forward pass."""


class Pass:
    """Without a folder in memory: embeddings on the main process (elsewhere NaN), all else on every process. All
    processes then make equally many forward passes, as ZeRO-3 needs it, also where one of them fails.

    With one in files FOLDER/KIND-00000.npz of `part_batches` batches each, from which it is resumed; lists are members
    NAME.json. Each process makes every so many-th of the missing parts, without a collective until the end.
    """

    def __init__(self, items: int, config: EmbeddingConfig, folder: Path | None, kind: str):
        self.items, self.folder = items, folder
        self._made: Batch = {}
        starts, size = range(0, items, config.batch), config.part_batches
        self._batches = [range(first, min(first + config.batch, items)) for first in starts]
        parts = [self._batches[first : first + size] for first in range(0, len(starts), size)]
        self._parts = {} if folder is None else {folder / f"{kind}-{n:05d}.npz": of for n, of in enumerate(parts)}

    def make(self, make_batches: MakeBatches, title: str) -> Pass:
        """Make all batches, or those missing; every process calls it."""
        (self._gather if self.folder is None else self._write)(make_batches, title)
        return self

    def _gather(self, make_batches: MakeBatches, title: str) -> None:
        mine = [self._batches[n] for n in my_batches(len(self._batches))]
        mine += [range(0)] * (rounds_of(len(self._batches)) - len(mine))
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

    def _write(self, make_batches: MakeBatches, title: str) -> None:
        # As the main process sees it, before any is written.
        missing = on_main(lambda: [path for path in self._parts if not path.exists()])
        mine = missing[distributed.rank() :: distributed.world_size()]

        def work(done: Callable[[int], None]) -> None:
            batches = make_batches(list(chain.from_iterable(self._parts[path] for path in mine)))
            for path in mine:
                made = []
                for numbers, rows in zip(self._parts[path], batches, strict=False):
                    _require_finite(rows)
                    made.append(rows)
                    done(len(numbers))
                with atomic_write(path) as file:
                    np.savez(file, **_members(_joined(made)))  # type: ignore[arg-type]  # for its allow_pickle

        together(work, title, sum(len(numbers) for path in missing for numbers in self._parts[path]))

    def pieces(self, name: str) -> Iterator[Any]:
        """An array or list, some after the others, in the order of the items; none where it was not made."""
        made = map(self._made.get, [name]) if self.folder is None else (_member(path, name) for path in self._parts)
        return (piece for piece in made if piece is not None)

    def in_order(self, name: str, rounds: Sequence[np.ndarray]) -> Iterator[Any]:
        """`pieces` of the items that the first of rounds, (items,) bool each, keeps, then of the next."""
        for kept in rounds:
            start = 0
            for piece in self.pieces(name):
                some = kept[start : start + len(piece)]
                yield list(compress(piece, some)) if isinstance(piece, list) else piece[some]
                start += len(piece)

    def notes(self, name: str, rounds: Sequence[np.ndarray] | None = None) -> Iterator[Any]:
        """The items of a list, one after the other; as in_order, where rounds are given."""
        return chain.from_iterable(self.pieces(name) if rounds is None else self.in_order(name, rounds))


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
    coded = {f"{name}.json": json.dumps(values, default=np.generic.item).encode() for name, values in lists.items()}
    members = {name: np.frombuffer(content, dtype=np.uint8) for name, content in coded.items()}
    return {name: values for name, values in made.items() if name not in lists} | members


def _member(path: Path, name: str) -> Any:
    try:
        with np.load(path, allow_pickle=False) as content:
            if name in content.files:
                return content[name]
            return json.loads(content[f"{name}.json"].tobytes()) if f"{name}.json" in content.files else None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        refuse("part", str(path), f"is damaged ({error}): remove it and embed again, which replaces it")
