"""Arrays as .npy files: written row by row in bounded memory, opened as read-only memory maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from modstruct.errors import refuse, require
from modstruct.files import atomic_write

ROWS_AT_ONCE = 1 << 14
UNIT_TOLERANCE = 2e-3
"""Of the norm: rounding to float16 moves it by 5e-4 at most."""


@dataclass
class RowStream:
    """An array that is made piece by piece."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Iterable[np.ndarray]
    """(r, …) each, of this dtype; together all rows, in order."""


def as_stream(rows: np.ndarray | RowStream) -> RowStream:
    """An array in pieces. Real numbers of other kinds than float16 and float32 become float32, integers stay."""
    if isinstance(rows, RowStream):
        return rows
    rows = np.asarray(rows)
    if rows.dtype.kind == "f" and rows.dtype not in (np.float16, np.float32):
        rows = rows.astype(np.float32)
    pieces = (rows[first : first + ROWS_AT_ONCE] for first in range(0, len(rows), ROWS_AT_ONCE))
    return RowStream(rows.shape, rows.dtype, pieces)


def write_array(path: Path, stream: RowStream, unit: bool = False) -> None:
    """Write an array as a .npy file, whole or not at all.

    unit: refuse rows that are not of unit norm. Raises ValueError, naming the row, for one that is not finite or not
    of unit norm, and where the pieces are not of the stream's shape or dtype.
    """
    written = 0
    with atomic_write(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(stream.dtype), "fortran_order": False, "shape": stream.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in stream.pieces:
            fits = piece.shape[1:] == tuple(stream.shape[1:]) and piece.dtype == stream.dtype
            require(fits, path.name, (piece.shape, piece.dtype.name), f"must be {stream.dtype.name} {stream.shape}")
            if piece.dtype.kind == "f":
                _check_rows(piece, path.name, written, unit)
            file.write(np.ascontiguousarray(piece).data)
            written += len(piece)
        require(written == stream.shape[0], path.name, f"{written} rows", f"must have {stream.shape[0]}")


def _check_rows(piece: np.ndarray, name: str, first: int, unit: bool) -> None:
    rows = piece.reshape(len(piece), math.prod(piece.shape[1:]))
    for start, some in _in_blocks(rows):
        finite = np.isfinite(some).all(axis=1)
        if not finite.all():
            _refuse_row(
                name,
                first + start + int(np.argmin(finite)),
                "is not finite; the model has diverged, or overflows float16: use float32",
            )
        if unit:
            norms = np.linalg.norm(some.astype(np.float32), axis=1)
            wrong = np.abs(norms - 1) > UNIT_TOLERANCE
            if wrong.any():
                row = int(np.argmax(wrong))
                _refuse_row(name, first + start + row, f"has norm {norms[row]:.4g}; it must have unit norm")


def _in_blocks(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield start, rows[start : start + ROWS_AT_ONCE]


def _refuse_row(name: str, row: int, trouble: str) -> NoReturn:
    raise ValueError(f"{name}: row {row} {trouble}")


def open_array(path: Path, shape: Sequence[int], remedy: str) -> np.ndarray:
    """A .npy file as a read-only memory map. Raises ValueError where it is not whole or not of this shape."""
    try:
        array = np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        refuse("embedded set", str(path), f"is damaged ({' '.join(str(error).split())[:200]}): {remedy}")
    require(array.shape == tuple(shape), "embedded set", str(path), f"has shape {array.shape}, not {shape}: {remedy}")
    array.flags.writeable = False
    return array
