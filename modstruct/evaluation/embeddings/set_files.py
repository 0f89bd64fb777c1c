"""The files of an embedded set (see embedded_set.py): arrays row by row in bounded memory, lists, the manifest."""

from __future__ import annotations

import json
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


FORMAT = 2
READABLE = (1, 2)
"""Format 1 knew no equal images: each sample of such a set is an image of its own."""
MANIFEST = "manifest.json"
IMAGE_ARRAYS = ("image", "image_features", "image_projected", "image_independent", "image_augmented")
TEXT_ARRAYS = ("text", "text_features", "text_projected", "text_independent")
FEATURE_ARRAYS = frozenset({"image_features", "image_projected", "text_features", "text_projected"})
TABLES = ("pairs", "indices", "labels", "class_prompts", "copies")
LISTS = {"keys": "image", "metadata": "image", "captions": "text"}
"""Files of one JSON value a line, and the modality whose rows they follow."""
CLASSES_FILE = "classes.json"
MODEL_FILE = "model.json"  # beside the sets of an evaluation: of what model they are


def is_set_name(name: object) -> bool:
    """Whether folders may be called by it: letters, digits, - _ . and +, and no way out of the evaluation's folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and all(letter.isalnum() or letter in "-_.+" for letter in name)
    )


def check_manifest(manifest: dict, path: Path) -> None:
    """Refuse a manifest that `write_embedded_set` cannot have written."""

    def shapes(of: str, known: Sequence[str]) -> bool:
        found = manifest.get(of)
        return isinstance(found, dict) and all(
            name in known and isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)
            for name, shape in found.items()
        )

    rows = manifest.get("rows")
    sound = (
        is_set_name(manifest.get("name"))
        and isinstance(manifest.get("model"), dict)
        and isinstance(manifest.get("source"), (dict, type(None)))
        and isinstance(rows, dict)
        and all(type(rows.get(modality)) is int for modality in ("image", "text"))
        and shapes("arrays", (*IMAGE_ARRAYS, *TEXT_ARRAYS))
        and shapes("tables", TABLES)
        and "image" in manifest["arrays"]
    )
    if not sound:
        damaged(path, "name, model, rows, arrays or tables are missing or of another kind")


def damaged(path: Path, cause: str) -> NoReturn:
    """Refuse a file of a set that cannot be what its writer wrote."""
    refuse(
        "embedded set",
        str(path),
        f"is damaged ({' '.join(cause.split())[:200]}): embed the set again with --embedding.overwrite true",
    )


def counted(streams: dict[str, RowStream]) -> dict[str, int]:
    """Images and texts of arrays that fit each other."""
    require("image" in streams, "arrays", sorted(streams), "must have image")
    unknown = sorted(streams.keys() - {*IMAGE_ARRAYS, *TEXT_ARRAYS})
    require(not unknown, "arrays", unknown, f"may be {', '.join((*IMAGE_ARRAYS, *TEXT_ARRAYS))}")
    counts = {"image": streams["image"].shape[0], "text": streams["text"].shape[0] if "text" in streams else 0}
    for array, stream in streams.items():
        modality = "image" if array in IMAGE_ARRAYS else "text"
        fits = len(stream.shape) == 2 and stream.shape[0] == counts[modality]
        require(
            fits, array, stream.shape, f"must be of shape ({counts[modality]}, dimension), one row for each {modality}"
        )
    dimensions = {a: s.shape[1] for a, s in streams.items() if a in ("image", "text", "image_augmented")}
    require(len(set(dimensions.values())) == 1, "arrays", dimensions, "must have one dimension")
    return counts


def within(pairs: np.ndarray, rows: dict[str, int]) -> np.ndarray:
    """Pairs (p, 2) that lie among the rows there are."""
    limits = np.array([rows["image"], rows["text"]])
    fits = bool(np.all((pairs >= 0) & (pairs < limits)))
    require(
        fits, "pairs", pairs.max(axis=0, initial=0).tolist(), f"must be below {limits.tolist()}, the rows there are"
    )
    return pairs


def merged_pairs(pairs: np.ndarray, image_row: np.ndarray) -> np.ndarray:
    """(p', 2): pairs (p, 2), sorted and without repetition, of images whose row is now image_row (n,)."""
    return np.unique(np.stack([image_row[pairs[:, 0]], pairs[:, 1]], axis=1), axis=0)


def copies_within(copies: np.ndarray, images: int) -> np.ndarray:
    """Copies (c,): the last c of the images equal earlier ones, which are no copies themselves."""
    fits = copies.ndim == 1 and copies.dtype.kind == "i" and len(copies) < images
    fits = fits and bool(np.all((copies >= 0) & (copies < images - len(copies))))
    require(fits, "copies", copies.shape, f"must be rows of the {images} images before the copies")
    return copies


def write_json(path: Path, value: object) -> None:
    """A value as a JSON file, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def write_lines(folder: Path, name: str, values: Iterable, expected: int | None = None) -> None:
    """Values, one a line, whole or not at all. expected: how many there must be; None for any number."""
    count = 0
    with atomic_write(folder / f"{name}.jsonl") as file:
        for value in values:
            file.write((json.dumps(value) + "\n").encode())
            count += 1
        fits = expected is None or count == expected
        require(fits, name, f"{count} of them", f"give {expected}, one for each {LISTS.get(name)}")


def check_line_count(path: Path, expected: int) -> None:
    """Refuse a file of one value a line that has another number of them, without parsing it."""
    try:
        with open(path, "rb") as file:
            count = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError as error:
        damaged(path, str(error))
    if count != expected:
        damaged(path, f"{count} lines where there are {expected} rows")
