"""Images of an evaluation set that are near duplicates of training images, by hash and by embedding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import faiss
import numpy as np
from tqdm import tqdm

from modstruct import distributed
from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.leakage.thumbnails import HASH_BITS, differences, hashes, pixels
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.rows import distinct_rows

ROWS_AT_ONCE = 4096
QUERIES_AT_ONCE = 64
CANDIDATES = 256
"""Of an image, nearest by hash, are compared: bounds the time where a source has many images of one layout."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as a near duplicate; tools/benchmarks/leakage.py measures recall and errors of the defaults."""

    hamming: int = 48
    """Most differing bits, of 192, of two hashes whose images are compared."""
    difference: float = 0.2
    """Largest `differences` of a match: 0 for equal images, about 1 for unrelated ones."""
    cosine: float = 0.95
    """Least cosine of embeddings; what it means depends on the model."""
    mirrored: bool = False
    """Whether a mirror image counts too."""
    listed: int = 5
    """Most training images listed for an image: by hash, by the hash of its mirror image and by embedding, each."""

    def __post_init__(self) -> None:
        require(0 <= self.hamming <= HASH_BITS, "hamming", self.hamming, f"give differing bits, from 0 to {HASH_BITS}")
        for name in ("difference", "cosine"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "give a number above 0, up to 1")
        require(self.listed >= 1, "listed", self.listed, "at least 1")


DEFAULT = Thresholds()


@dataclass(frozen=True)
class Pair:
    """An evaluation image and a training image. difference: None where one alone is of one colour. cosine: None where
    there are no embeddings of both. mirrored: whether the evaluation image was, for hamming and difference."""

    evaluation: int
    train: int
    hamming: int
    difference: float | None
    cosine: float | None
    mirrored: bool
    by: tuple[str, ...]
    """"hash", "embedding" or both."""


def find_duplicates(
    evaluation: EmbeddedSet,
    train: EmbeddedSet,
    limits: Thresholds = DEFAULT,
    embeddings: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Pair]:
    """All evaluation images with a near duplicate in the training source, with the nearest few of each.

    evaluation, train: of `thumbnail_set`. embeddings: (n, D) and (N, D), a row for each thumbnail (see rows_by_key);
    zeros where an image has none. By hash: hashes within limits.hamming and thumbnails within limits.difference, of
    the CANDIDATES nearest hashes. By embedding: cosine of at least limits.cosine. Of equal training thumbnails the
    first is listed. Ascending by evaluation row, nearest hashes first.
    """
    turns = (False, True) if limits.mirrored else (False,)
    found = [pairs for turned in turns for pairs in _by_hash(evaluation, train, limits, turned)]
    if embeddings is not None:
        items = nearest(*embeddings, limits.listed)
        pairs = np.stack((np.repeat(np.arange(len(items)), items.shape[1]), items.ravel()), axis=1)
        found.append(pairs[cosines(*embeddings, pairs) >= limits.cosine])
    pairs = np.unique(np.concatenate([np.empty((0, 2), np.int64), *found]), axis=0)
    scores = np.stack([_scores(evaluation, train, pairs, limits, turned) for turned in turns])  # (turns, 2, p)
    within = (scores[:, 0] <= limits.hamming) & (scores[:, 1] <= limits.difference)
    by_hash, turned = np.logical_or.reduce(within), within.argmax(axis=0)  # 0 where both ways, or none, are near
    hamming, difference = scores[turned, :, np.arange(len(pairs))].T
    cosine = np.full(len(pairs), np.nan) if embeddings is None else cosines(*embeddings, pairs)
    listed = []
    for place in np.lexsort((pairs[:, 1], -np.nan_to_num(cosine), hamming, pairs[:, 0])):
        ways = {"hash": by_hash[place], "embedding": cosine[place] >= limits.cosine}
        by = tuple(way for way, found_so in ways.items() if found_so)
        (one, other), near = pairs[place].tolist(), int(hamming[place])
        apart, alike = (float(of[place]) if np.isfinite(of[place]) else None for of in (difference, cosine))
        listed.append(Pair(one, other, near, apart, alike, bool(turned[place]), by))
    return listed


def _by_hash(evaluation: EmbeddedSet, train: EmbeddedSet, limits: Thresholds, mirrored: bool) -> Iterator[np.ndarray]:
    """Yields (p, 2): of some images the nearest pairs by hash whose thumbnails are alike, `listed` at most of each."""
    distinct, _, _ = distinct_rows(train.rows("image_features"))  # a placeholder may occur a hundred thousand times
    index = faiss.IndexBinaryFlat(HASH_BITS)
    for start in range(0, len(distinct), ROWS_AT_ONCE):
        index.add(_codes(train, distinct[start : start + ROWS_AT_ONCE]))
    starts = range(0, len(evaluation.keys), QUERIES_AT_ONCE)
    for start in tqdm(starts, desc="comparing hashes", disable=not distributed.is_main(), leave=False):
        rows = np.arange(start, min(start + QUERIES_AT_ONCE, len(evaluation.keys)))
        near, items = index.search(_codes(evaluation, rows, mirrored), min(CANDIDATES, len(distinct)))
        query, place = np.nonzero(near <= limits.hamming)
        pairs = np.stack((rows[query], distinct[items[query, place]]), axis=1)
        alike = pairs[_scores(evaluation, train, pairs, limits, mirrored)[1] <= limits.difference]
        yield alike[np.arange(len(alike)) - np.searchsorted(alike[:, 0], alike[:, 0]) < limits.listed]


def _codes(thumbnails: EmbeddedSet, rows: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """Hashes of some rows, (n, HASH_BITS / 8) uint8."""
    plain = thumbnails.rows("image")
    return hashes(pixels(thumbnails, rows, True)) if mirrored else np.packbits(plain[rows] > 0, axis=1)


def _scores(
    evaluation: EmbeddedSet, train: EmbeddedSet, pairs: np.ndarray, limits: Thresholds, mirrored: bool
) -> np.ndarray:
    """Hamming distance and difference of each pair, (2, p)."""
    one, other = pairs.T
    hamming = np.bitwise_count(_codes(evaluation, one, mirrored) ^ _codes(train, other)).sum(axis=1, dtype=np.int64)
    return np.stack((hamming, differences(pixels(evaluation, one, mirrored), pixels(train, other), limits.difference)))


def cosines(first: np.ndarray, second: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows (p, 2) in float64, (p,); 0 of a row of zeros."""
    found = np.empty(len(pairs))
    for start in range(0, len(found), ROWS_AT_ONCE):
        some = pairs[start : start + ROWS_AT_ONCE].T
        one, other = (rows[at].astype(np.float64) for rows, at in zip((first, second), some, strict=True))
        norms = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
        found[start : start + ROWS_AT_ONCE] = (one * other).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return found


def rows_by_key(thumbnails: EmbeddedSet, embedded: EmbeddedSet) -> np.ndarray:
    """Rows (n, D) of an embedded set's images in the order of the thumbnails of its source, zeros where there is none.

    Repeated keys are matched in order. Raises ValueError if no key is shared.
    """
    place = {key: row for row, key in enumerate(_numbered(embedded.keys))}
    found = np.array([place.get(key, -1) for key in _numbered(thumbnails.keys)], dtype=np.int64)
    keys = f"its keys are like {embedded.keys[0]!r}, the source's like {thumbnails.keys[0]!r}"
    require(bool((found >= 0).any()), "embedded set", embedded.name, f"{keys}: embed the same source")
    rows = embedded.rows("image")
    return np.where(found[:, None] >= 0, rows[found], np.zeros((), rows.dtype))


def _numbered(keys: Sequence[str]) -> list[tuple[str, int]]:
    seen: defaultdict[str, Iterator[int]] = defaultdict(count)
    return [(key, next(seen[key])) for key in keys]
