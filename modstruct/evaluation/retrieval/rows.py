"""Rows of embeddings, in memory or in a file: checked once, then read block by block as float32."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from modstruct.errors import require

Storage = Literal["float32", "float16"]
BLOCK_BYTES = 32 << 20
"""Of float32 rows that are read at once."""
UNIT_NORM_TOLERANCE = 0.02
"""bfloat16 rounds a norm by less."""


def block_rows(dimension: int) -> int:
    """How many float32 rows make a block."""
    return max(1, BLOCK_BYTES // (4 * dimension))


def check_rows(name: str, rows: np.ndarray) -> None:
    """Raise ValueError unless rows is (n, D), floating point, not empty and finite as float32; reads it in blocks."""
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name} embeddings have shape {rows.shape}: give at least one row, as (rows, dimension)")
    if not np.issubdtype(rows.dtype, np.floating):
        raise ValueError(f"{name} embeddings are {rows.dtype}: give float16 or float32")
    bad = np.concatenate([(~block.isfinite()).any(1).numpy() for _, block in row_blocks(rows)])
    if bad.any():
        raise ValueError(
            f"{bad.sum()} of {len(rows)} {name} embeddings are not finite, the first is row {bad.argmax()}: "
            "the weights or the precision of the forward pass are broken"
        )


def check_unit_rows(name: str, rows: np.ndarray) -> None:
    """As check_rows, and refuse rows that have no unit norm, as those of a damaged file."""
    check_rows(name, rows)
    norms = np.concatenate([block.norm(dim=1).numpy() for _, block in row_blocks(rows)])
    off = np.abs(norms - 1) > UNIT_NORM_TOLERANCE
    first = f"row {off.argmax()} has norm {norms[off.argmax()]:.3g}"
    remedy = "divide each row by its norm, or embed the set again, if the file is damaged"
    require(not off.any(), name, rows.shape, f"unit norm is needed, and {first}: {remedy}")


def check_dimensions(first_name: str, first: np.ndarray, name: str, rows: np.ndarray) -> None:
    if first.shape[1] != rows.shape[1]:
        found = f"{first_name} embeddings have dimension {first.shape[1]}, {name} embeddings {rows.shape[1]}"
        raise ValueError(f"{found}: they must agree; are both of one model?")


def checked_pairs(
    pairs: np.ndarray, queries: int, gallery: int, names: tuple[str, str] = ("queries", "gallery items")
) -> np.ndarray:
    """Each pair once, (p, 2) int64, ascending by query row. Raises ValueError where none is, or one lies outside."""
    pairs = np.asarray(pairs)
    if not pairs.size:
        raise ValueError("there is no image-text pair: give at least one")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"pairs are {pairs.dtype} of shape {pairs.shape}: give integers, (p, 2)")
    outside = ((pairs < 0) | (pairs >= (queries, gallery))).any(axis=1)
    if outside.any():
        pair, sizes = tuple(pairs[outside][0].tolist()), f"{queries} {names[0]} and {gallery} {names[1]}"
        raise ValueError(f"the pair {pair} names a row outside the {sizes}")
    return np.unique(pairs.astype(np.int64), axis=0)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


def as_float32(rows: np.ndarray) -> Tensor:
    """A float32 copy of rows; -0.0 becomes 0.0, so that equal rows have equal bytes."""
    return torch.from_numpy(np.array(rows, order="C")).float().add_(0.0)


def row_blocks(rows: np.ndarray, at_once: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, float32 rows (b, D)) from the first to the last."""
    at_once = at_once or block_rows(rows.shape[1])
    for start in range(0, len(rows), at_once):
        yield start, as_float32(rows[start : start + at_once])


def distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that differ, by a 128-bit hash of their float32 bytes.

    rows: (g, D). Returns the first row of each kind (u,), ascending, the place of each row among them (g,), and how
    often each occurs (u,). Memory: 16 bytes a row and a block.
    """
    digests = (hashlib.blake2b(row.data, digest_size=16).digest() for _, b in row_blocks(rows) for row in b.numpy())
    hashes = np.fromiter(digests, dtype="V16", count=len(rows))
    _, first, place, occurrences = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[place], occurrences[order]
