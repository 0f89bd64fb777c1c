"""Images of an evaluation set that are near duplicates of training images, by hash and by embedding."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from modstruct.errors import require
from modstruct.evaluation.leakage.perceptual_hash import (
    BITS,
    colour_difference,
    flat,
    image_differences,
    image_hashes,
    least_distances,
    mirrored,
    near_hashes,
)
from modstruct.evaluation.leakage.prints import Prints
from modstruct.evaluation.retrieval.exact import CPU
from modstruct.evaluation.retrieval.rows import as_float32, check_dimensions, check_rows, row_blocks

ROWS_AT_ONCE = 4096
CANDIDATES_AT_ONCE = 2048
QUERIES_AT_ONCE = 2048
MARGIN = 0.005
"""Norms of float16 rows are off by up to 0.0005, float32 products by less: anything nearer is computed in float64."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as a near duplicate; tools/benchmarks/leakage.py measures recall and errors of the defaults."""

    hamming: int = 8
    """Most differing bits of two hashes whose images are compared."""
    difference: float = 0.2
    """Largest `image_differences` of a match: 0 for equal images, about 1 for unrelated ones."""
    cosine: float = 0.95
    """Least cosine of embeddings; what it means depends on the model."""
    mirrored: bool = False
    """Whether a mirror image counts too."""
    listed: int = 5
    """Most training images listed for an image, by hash and by embedding each."""

    def __post_init__(self):
        require(0 <= self.hamming <= BITS, "hamming", self.hamming, f"give a distance of hashes, from 0 to {BITS}")
        require(0 < self.difference <= 1, "difference", self.difference, "give a number above 0, up to 1")
        require(-1 < self.cosine <= 1, "cosine", self.cosine, "give a number above -1, up to 1")
        require(self.listed >= 1, "listed", self.listed, "at least 1")


@dataclass
class Duplicates:
    """The pairs found, ascending by evaluation row, nearest hashes first; each array (p,)."""

    evaluation: np.ndarray
    """Row of the evaluation set's prints."""
    train: np.ndarray
    """Row of the training source's prints."""
    hamming: np.ndarray
    difference: np.ndarray
    """inf where only one of the two images is of one colour."""
    cosine: np.ndarray
    """nan where there are no embeddings of both."""
    mirrored: np.ndarray
    """Whether the evaluation image was mirrored for hamming and difference."""
    by_hash: np.ndarray
    by_embedding: np.ndarray


def find_duplicates(
    evaluation: Prints,
    train: Prints,
    thresholds: Thresholds | None = None,
    embeddings: tuple[np.ndarray, np.ndarray] | None = None,
    device: torch.device = CPU,
    progress: bool = False,
) -> Duplicates:
    """All evaluation images that have a near duplicate in the training source, with the nearest few of each.

    By hash: views within thresholds.hamming and images within thresholds.difference. By embedding: cosine of at least
    thresholds.cosine. embeddings: (n, D) and (N, D), a row for each print (see prints.rows_by_key); zeros where an
    image has none. Exact but for `listed`. Memory: the listed pairs and blocks of candidates.
    """
    thresholds = thresholds or Thresholds()
    pairs = _by_hash(evaluation, train, thresholds, progress)
    if embeddings is not None:
        shapes = tuple(len(rows) for rows in embeddings)
        require(shapes == (len(evaluation), len(train)), "embeddings", shapes, "give a row for each print")
        near = near_embeddings(*embeddings, thresholds.cosine, thresholds.listed, device, progress)
        pairs = np.concatenate((pairs, np.stack(near[:2], axis=1)))
    pairs = np.unique(pairs, axis=0)
    return _scored(evaluation, train, pairs, thresholds, embeddings)


def _by_hash(evaluation: Prints, train: Prints, thresholds: Thresholds, progress: bool) -> np.ndarray:
    """(p, 2): the nearest pairs by hash that the comparison of the images confirms, `listed` for each image."""
    solid, flat_rows, flat_colours = _kinds(train, thresholds.listed)
    hashes = train.hashes[solid] if len(solid) < len(train) else train.hashes
    pairs = []
    starts = range(0, len(evaluation), ROWS_AT_ONCE)
    for start in tqdm(starts, desc="comparing hashes", disable=not progress, leave=False):
        thumbnails = np.asarray(evaluation.thumbnails[start : start + ROWS_AT_ONCE])
        one_colour = flat(thumbnails)
        best = Pairs.none()
        for number in np.flatnonzero(one_colour):
            means = thumbnails[number].reshape(3, -1).mean(axis=1)
            differences = colour_difference(means[None], flat_colours)[0]
            near = np.flatnonzero(differences <= thresholds.difference)
            found = Pairs(np.full(len(near), number), flat_rows[near], differences[near])
            best = best.and_best(found, thresholds.listed)
        numbers = np.flatnonzero(~one_colour)
        for view_of in (thumbnails, mirrored(thumbnails)) if thresholds.mirrored else (thumbnails,):
            queries = image_hashes(view_of[numbers])
            for query, item, distance, view in near_hashes(queries, hashes, thresholds.hamming):
                found = _verified(view_of, train, numbers[query], solid[item], distance, view, thresholds)
                best = _distinct(best.and_best(found, 2 * thresholds.listed)).and_best(Pairs.none(), thresholds.listed)
        pairs.append(np.stack((best.query + start, best.item), axis=1))
    return np.concatenate(pairs)


def _distinct(pairs: Pairs) -> Pairs:
    """Each pair once, by its better score: a symmetric image is found both as it is and mirrored."""
    order = np.lexsort((pairs.score, pairs.item, pairs.query))
    query, item, score = (values[order] for values in pairs)
    first = np.append(True, (query[1:] != query[:-1]) | (item[1:] != item[:-1]))[: len(query)]
    return Pairs(query[first], item[first], score[first])


def _kinds(prints: Prints, repeats: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are not of one colour, rows that are, and the colours of the latter (f, 3).

    Of equal thumbnails only the first `repeats` are kept. More are never listed, since all have the same scores, and a
    placeholder of a hundred thousand missing images would have ten thousand million pairs with itself.
    """
    digests = np.empty((len(prints), 2), dtype=np.uint64)
    one_colour, colours = np.empty(len(prints), dtype=bool), np.empty((len(prints), 3), dtype=np.float32)
    for start in range(0, len(prints), ROWS_AT_ONCE):
        thumbnails = np.ascontiguousarray(prints.thumbnails[start : start + ROWS_AT_ONCE])
        part = slice(start, start + len(thumbnails))
        one_colour[part], colours[part] = flat(thumbnails), thumbnails.mean(axis=(2, 3))
        for row, thumbnail in enumerate(thumbnails, start):
            digests[row] = np.frombuffer(hashlib.blake2b(thumbnail.data, digest_size=16).digest(), dtype=np.uint64)
    order = np.lexsort(digests.T)
    new = np.append(True, (np.diff(digests[order], axis=0) != 0).any(axis=1))[: len(order)]
    place = np.arange(len(order)) - np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    taken = np.sort(order[place < repeats])
    return taken[~one_colour[taken]], taken[one_colour[taken]], colours[taken[one_colour[taken]]]


def _verified(
    thumbnails: np.ndarray,
    train: Prints,
    query: np.ndarray,
    item: np.ndarray,
    near: np.ndarray,
    view: np.ndarray,
    thresholds: Thresholds,
) -> Pairs:
    """Candidates of a block that the comparison of the images confirms, nearest hashes first.

    An image that has its `listed` pairs is not compared further.
    """
    order = np.lexsort((item, near, query))
    query, item, near, view = (values[order] for values in (query, item, near, view))
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    found, have, low = Pairs.none(), np.zeros(len(thumbnails), dtype=np.int64), 0
    while low <= rank.max(initial=-1):
        high = low + max(thresholds.listed, CANDIDATES_AT_ONCE // max(1, len(np.unique(query))))
        turn = np.flatnonzero((rank >= low) & (rank < high) & (have[query] < thresholds.listed))
        low = high
        if not len(turn):
            continue
        differences = image_differences(
            thumbnails[query[turn]], _taken(train.thumbnails, item[turn]), view[turn], thresholds.difference
        )
        good = turn[differences <= thresholds.difference]
        have += np.bincount(query[good], minlength=len(have))
        found = found.and_best(Pairs(query[good], item[good], near[good].astype(np.float64)), thresholds.listed)
    return found


def _taken(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Rows by number, read from the file in ascending order."""
    distinct, place = np.unique(numbers, return_inverse=True)
    return np.asarray(rows[distinct])[place.reshape(-1)]


def _scored(
    evaluation: Prints,
    train: Prints,
    pairs: np.ndarray,
    thresholds: Thresholds,
    embeddings: tuple[np.ndarray, np.ndarray] | None,
) -> Duplicates:
    """All scores of every pair, whether it was found by hash or by embedding."""
    first, second = _taken(evaluation.thumbnails, pairs[:, 0]), _taken(train.thumbnails, pairs[:, 1])
    hamming, difference = _scores(first, second, train.hashes[pairs[:, 1]], thresholds)
    turned = np.zeros(len(pairs), dtype=bool)
    if thresholds.mirrored:
        again = _scores(mirrored(first), second, train.hashes[pairs[:, 1]], thresholds)
        limits = (thresholds.hamming, thresholds.difference)
        turned = _within(again, limits) & ~_within((hamming, difference), limits)
        hamming, difference = np.where(turned, again[0], hamming), np.where(turned, again[1], difference)
    cosine = np.full(len(pairs), np.nan)
    if embeddings is not None:
        cosine = cosines(*embeddings, *pairs.T)
    order = np.lexsort((pairs[:, 1], -np.nan_to_num(cosine), hamming, pairs[:, 0]))
    scored = Duplicates(
        evaluation=pairs[:, 0],
        train=pairs[:, 1],
        hamming=hamming,
        difference=difference,
        cosine=cosine,
        mirrored=turned,
        by_hash=_within((hamming, difference), (thresholds.hamming, thresholds.difference)),
        by_embedding=np.nan_to_num(cosine, nan=-1) >= thresholds.cosine,
    )
    return Duplicates(**{name: values[order] for name, values in vars(scored).items()})


def _within(scores: tuple[np.ndarray, np.ndarray], limits: tuple[float, float]) -> np.ndarray:
    return (scores[0] <= limits[0]) & (scores[1] <= limits[1])


def _scores(
    first: np.ndarray, second: np.ndarray, hashes: np.ndarray, thresholds: Thresholds
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of the nearest views and difference of each pair, two arrays (p,)."""
    hamming, views = least_distances(image_hashes(first), hashes)
    one, other = flat(first), flat(second)
    difference = np.full(len(first), np.inf)
    solid = ~one & ~other
    difference[solid] = image_differences(first[solid], second[solid], views[solid], thresholds.difference)
    for pair in np.flatnonzero(one & other):
        means = (rows[pair].reshape(3, -1).mean(axis=1)[None] for rows in (first, second))
        hamming[pair], difference[pair] = 0, colour_difference(*means)[0, 0]  # their hashes are noise
    return hamming, difference


def near_embeddings(
    queries: np.ndarray,
    gallery: np.ndarray,
    cosine: float,
    keep: int,
    device: torch.device = CPU,
    progress: bool = False,
) -> Pairs:
    """The `keep` items of highest cosine of each query, of those at least at the threshold. Exact.

    queries: (q, D), gallery: (g, D), float16 or float32, of unit norm up to rounding, may be memory-mapped. Whether a
    pair reaches the threshold is decided in float64, independent of blocks. Returns Pairs with -cosine as score. Cost:
    2 q g D operations on `device`. Raises ValueError for a threshold outside (-1, 1] and rows that are not finite.
    """
    if not -1 < cosine <= 1:
        raise ValueError(f"cosine = {cosine}: give a number above -1, up to 1")
    for name, rows in (("evaluation", queries), ("training", gallery)):
        check_rows(name, rows)
    check_dimensions("evaluation", queries, "training", gallery)
    pairs = []
    starts = range(0, len(queries), QUERIES_AT_ONCE)
    with tqdm(total=len(starts) * len(gallery), desc="comparing embeddings", disable=not progress, leave=False) as bar:
        for start in starts:
            some, best = as_float32(queries[start : start + QUERIES_AT_ONCE]), Pairs.none()
            some_there = some.to(device)
            for low, block in row_blocks(gallery):
                query, item = (some_there @ block.to(device).T >= cosine - MARGIN).nonzero().cpu().numpy().T
                exact = cosines(some.numpy(), block.numpy(), query, item)
                near = exact >= cosine
                best = best.and_best(Pairs(query[near], item[near] + low, -exact[near]), keep)
                bar.update(len(block))
            pairs.append(Pairs(best.query + start, best.item, best.score))
    query, item, score = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return Pairs(query, item, score)


def cosines(first: np.ndarray, second: np.ndarray, first_row: np.ndarray, second_row: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows in float64, (p,)."""
    found = np.empty(len(first_row))
    for start in range(0, len(found), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        one, other = first[first_row[part]].astype(np.float64), second[second_row[part]].astype(np.float64)
        norms = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
        found[part] = (one * other).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return found


class Pairs(NamedTuple):
    """Pairs of rows with a score, lower is better; three arrays (p,)."""

    query: np.ndarray
    item: np.ndarray
    score: np.ndarray

    @classmethod
    def none(cls) -> Pairs:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))

    def and_best(self, more: Pairs, keep: int) -> Pairs:
        """Of these and more, the best `keep` of each query; ties by the lower item. Ascending by query, score, item."""
        query, item, score = (np.concatenate(two) for two in zip(self, more, strict=True))
        order = np.lexsort((item, score, query))
        query, item, score = query[order], item[order], score[order]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        return Pairs(query[place < keep], item[place < keep], score[place < keep])
