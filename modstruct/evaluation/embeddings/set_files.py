"""The files of an embedded set (see embedded_set.py): arrays piece by piece, lists of one JSON value a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from modstruct.errors import refuse, require
from modstruct.files import atomic_write

FORMAT = 2
READABLE = (1, 2)
"""Format 1 knew no equal images: each sample of such a set is an image of its own."""
MANIFEST = "manifest.json"
IMAGE_ARRAYS = ("image", "image_features", "image_projected", "image_independent", "image_augmented")
TEXT_ARRAYS = ("text", "text_features", "text_projected", "text_independent")
FEATURE_ARRAYS = frozenset({"image_features", "image_projected", "text_features", "text_projected"})
TABLES = ("pairs", "indices", "labels", "class_prompts", "copies")
LISTS = {"keys": ("image", str), "metadata": ("image", dict), "captions": ("text", str)}
"""Files of one JSON value a line: the modality whose rows they follow, and the kind of value."""
CLASSES_FILE = "classes.json"
MODEL_FILE = "model.json"  # beside the sets of an evaluation: of what model they are
ROWS_AT_ONCE = 1 << 14
UNIT_TOLERANCE = 2e-3
"""Of the norm: rounding to float16 moves it by 5e-4 at most."""


def is_set_name(name: object) -> bool:
    """Whether folders may be called by it: letters, digits, - _ . and +, and no way out of the evaluation's folder."""
    sound = isinstance(name, str) and name not in ("", ".", "..")
    return sound and all(letter.isalnum() or letter in "-_.+" for letter in str(name))


def damaged(path: Path, cause: str) -> NoReturn:
    """Refuse a file of a set that cannot be what its writer wrote."""
    remedy = "embed the set again with --embedding.overwrite true"
    refuse("embedded set", str(path), f"is damaged ({' '.join(cause.split())[:200]}): {remedy}")


@dataclass
class RowStream:
    """An array that is made piece by piece."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Iterable[np.ndarray]
    """(r, …) each, of this dtype; together all rows, in order."""

    @classmethod
    def of(cls, rows: np.ndarray | RowStream) -> RowStream:
        """An array in pieces. Real numbers of other kinds than float16 and float32 become float32, integers stay."""
        if isinstance(rows, RowStream):
            return rows
        wide = rows.dtype.kind == "f" and rows.dtype not in (np.float16, np.float32)
        dtype = np.dtype(np.float32) if wide else rows.dtype
        starts = range(0, len(rows), ROWS_AT_ONCE)
        return cls(rows.shape, dtype, (rows[a : a + ROWS_AT_ONCE].astype(dtype, copy=False) for a in starts))


def write_array(path: Path, rows: np.ndarray | RowStream, unit: bool = False) -> None:
    """Write an array as a .npy file, whole or not at all.

    unit: refuse rows that are not of unit norm. Raises ValueError, naming the row, for one that is not finite or not
    of unit norm, and where the pieces are not of the stream's shape or dtype.
    """
    stream, written = RowStream.of(rows), 0
    with atomic_write(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(stream.dtype), "fortran_order": False, "shape": stream.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in stream.pieces:
            fits = piece.shape[1:] == tuple(stream.shape[1:]) and piece.dtype == stream.dtype
            require(fits, path.name, (piece.shape, piece.dtype.name), f"must be {stream.dtype.name} {stream.shape}")
            if piece.dtype.kind == "f":
                _check_rows(piece.reshape(len(piece), -1 if piece.size else 0), path.name, written, unit)
            file.write(np.ascontiguousarray(piece).data)
            written += len(piece)
        require(written == stream.shape[0], path.name, f"{written} rows", f"must have {stream.shape[0]}")


def _check_rows(rows: np.ndarray, name: str, first: int, unit: bool) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        row = first + int(np.argmin(finite))
        raise ValueError(f"{name}: row {row} is not finite; the model has diverged, or overflows float16: use float32")
    norms = np.linalg.norm(rows.astype(np.float32), axis=1) if unit else np.ones(1)
    wrong = np.abs(norms - 1) > UNIT_TOLERANCE
    if wrong.any():
        row = int(np.argmax(wrong))
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


def write_json(path: Path, value: object) -> None:
    """A value as a JSON file, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, sound: Callable[[dict], bool]) -> dict:
    """An object from a JSON file; damaged unless it is sound."""
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict) and sound(value):
            return value
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        damaged(path, f"{type(error).__name__}: {error}")
    damaged(path, "entries are missing or of another kind")


def write_lines(path: Path, values: Iterable) -> int:
    """Values, one a line, whole or not at all. Returns how many there were."""
    count = 0
    with atomic_write(path) as file:
        for count, value in enumerate(values, 1):  # noqa: B007  # counted for the caller
            file.write((json.dumps(value) + "\n").encode())
    return count


def read_lines(path: Path) -> Iterator:
    """The values of a file of one JSON value a line, one after the other."""
    with open(path, "rb") as file:
        yield from map(json.loads, file)


def merged_pairs(pairs: np.ndarray, image_row: np.ndarray) -> np.ndarray:
    """(p', 2): pairs (p, 2), sorted and without repetition, of images whose row is now image_row (n,)."""
    return np.unique(np.stack([image_row[pairs[:, 0]], pairs[:, 1]], axis=1), axis=0)
