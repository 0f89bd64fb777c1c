"""Rows drawn class by class, by a hash of their keys: the same images for every model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from modstruct.errors import require


def drawn_order(labels: np.ndarray, keys: Sequence[str], seed: int, draw: int = 0) -> list[np.ndarray]:
    """The places of each class's rows in random order, one array for each class that occurs, ascending by class.

    labels: (n,) int64. keys: of the n rows. The order is that of a 64-bit hash of seed, draw and key: it is the same
    whatever the model, its row numbers and the rows that could not be read, so that comparisons are paired; the first
    k of a class are among its first k + 1. Rows with the same key follow each other.
    """
    begun = hashlib.blake2b(f"{seed}/{draw}/".encode(), digest_size=8)
    hashes = np.empty(len(labels), dtype=np.uint64)
    for place, key in enumerate(keys):
        hashed = begun.copy()
        hashed.update(key.encode("utf-8", "surrogatepass"))
        hashes[place] = int.from_bytes(hashed.digest(), "little")
    order = np.lexsort((hashes, labels))
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def hold_out(order: Sequence[np.ndarray], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Places to fit on and places held out, both ascending.

    Of each class the share, rounded, is held out, at least one row of a class of two or more, never all of them; a
    class of one row has it to fit on. Raises ValueError where nothing can be held out.
    """
    counts = [min(max(1, round(share * len(places))), len(places) - 1) for places in order]
    require(any(counts), "validation", None, "every class has a single row, none can be held out: fix `strength`")
    held_out = np.concatenate([places[:count] for places, count in zip(order, counts, strict=True)])
    kept = np.concatenate([places[count:] for places, count in zip(order, counts, strict=True)])
    return np.sort(kept), np.sort(held_out)
