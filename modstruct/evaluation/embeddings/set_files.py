"""The files of an embedded set (see embedded_set.py): arrays piece by piece, lists of one JSON value a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from modstruct.errors import refuse, require
from modstruct.files import atomic_write

IMAGE_ARRAYS = ("image", "image_features", "image_projected", "image_independent", "image_augmented")
TEXT_ARRAYS = ("text", "text_features", "text_projected", "text_independent")
FEATURE_ARRAYS = frozenset({"image_features", "image_projected", "text_features", "text_projected"})
MODEL_FILE = "model.json"  # beside the sets of an evaluation: of what model they are
ROWS_AT_ONCE = 1 << 14
UNIT_TOLERANCE = 2e-3
"""Of the norm: rounding to float16 moves it by 5e-4 at most."""


def is_set_name(name: object) -> bool:
    """Whether folders may be called by it: letters, digits, - _ . and +, and no way out of the evaluation's folder."""
    return isinstance(name, str) and name not in (".", "..") and bool(re.fullmatch(r"[\w.+-]+", name))


def damaged(path: Path, cause: str) -> NoReturn:
    """Refuse a file of a set that cannot be what its writer wrote."""
    remedy = "embed the set again with --embedding.overwrite true"
    refuse("embedded set", str(path), f"is damaged ({' '.join(cause.split())[:200]}): {remedy}")


@dataclass
class RowStream:
    """An array that is made piece by piece: (r, …) each, of this dtype; together all rows, in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Iterable[np.ndarray]


def write_array(path: Path, rows: np.ndarray | RowStream, unit: bool = False) -> None:
    """Write an array as a .npy file, whole or not at all.

    Raises ValueError, naming the row, for one that is not finite or, where unit is set, not of unit norm, and where the
    pieces are not of the stream's shape or dtype.
    """
    starts = range(0, rows.shape[0], ROWS_AT_ONCE)
    pieces = rows.pieces if isinstance(rows, RowStream) else (rows[a : a + ROWS_AT_ONCE] for a in starts)
    header = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": rows.shape}
    written = 0
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            fits = piece.shape[1:] == rows.shape[1:] and piece.dtype == rows.dtype
            require(fits, path.name, (piece.shape, piece.dtype.name), f"must be {rows.dtype.name} {rows.shape}")
            if piece.dtype.kind == "f" and piece.size:
                _check_rows(piece.reshape(len(piece), -1), path.name, written, unit)
            file.write(np.ascontiguousarray(piece).data)
            written += len(piece)
        require(written == rows.shape[0], path.name, f"{written} rows", f"must have {rows.shape[0]}")


def _check_rows(rows: np.ndarray, name: str, first: int, unit: bool) -> None:
    norms = np.linalg.norm(rows.astype(np.float32), axis=1)
    if len(bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
        remedy = "the model has diverged, or overflows float16: use float32"
        raise ValueError(f"{name}: row {first + bad[0]} is not finite; {remedy}")
    row = int(np.argmax(np.abs(norms - 1)))
    if unit and abs(norms[row] - 1) > UNIT_TOLERANCE:
        raise ValueError(f"{name}: row {first + row} has norm {norms[row]:.4g}; it must have unit norm")


def open_array(path: Path, shape: Sequence[int]) -> np.ndarray:
    """A .npy file as a read-only memory map. Raises ValueError where it is not whole or not of this shape."""
    try:
        array = np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        damaged(path, str(error))
    if array.shape != tuple(shape):
        damaged(path, f"has shape {array.shape}, not {shape}")
    array.flags.writeable = False
    return array


def read_json(path: Path) -> dict:
    """An object from a JSON file."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        damaged(path, str(error))


def write_lines(path: Path, values: Iterable, expected: int | None = None) -> None:
    """Values, one a line, whole or not at all. expected: how many there must be; None for any number."""
    with atomic_write(path) as file:
        count = sum(file.write((json.dumps(value) + "\n").encode()) > 0 for value in values)
        require(expected in (None, count), path.stem, f"{count} of them", f"give {expected}, one for each row")


class Lines(Sequence):
    """The list in a file of one JSON value a line, which is read when a value is used.

    expected, kind: number and kind of its values; ValueError names the file where they are others.
    """

    def __init__(self, path: Path, expected: int, kind: type):
        self.path, self.expected, self.kind = path, expected, kind

    @cached_property
    def _values(self) -> list:
        try:
            values = [json.loads(line) for line in self.path.read_bytes().splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            damaged(self.path, str(error))
        self._check_count(len(values))
        if not all(isinstance(value, self.kind) for value in values):
            damaged(self.path, f"its lines are not all of kind {self.kind.__name__}")
        return values

    def _check_count(self, count: int) -> None:
        if count != self.expected:
            damaged(self.path, f"{count} lines where there are {self.expected} rows")

    def __len__(self) -> int:
        return self.expected

    def __getitem__(self, place):
        return self._values[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Iterable) and list(self) == list(other)

    def check(self) -> None:
        """Count the values, without decoding them."""
        try:
            self._check_count(self.path.read_bytes().count(b"\n"))
        except OSError as error:
            damaged(self.path, str(error))


def merged_pairs(pairs: np.ndarray, image_row: np.ndarray) -> np.ndarray:
    """(p', 2): pairs (p, 2), sorted and without repetition, of images whose row is now image_row (n,)."""
    return np.unique(np.stack([image_row[pairs[:, 0]], pairs[:, 1]], axis=1), axis=0)
