"""The metrics of ranks, recall at K, median rank, mean reciprocal rank and mAP@R, each beside chance.

Chance is what a uniformly random ranking reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RankedQueries:
    """The ranks of one direction, query by query; only queries that have a positive, ascending by row."""

    query: np.ndarray
    """(q,) int64, row of each query."""
    positives: np.ndarray
    """(q,) int64, R: how many positives each has."""
    rank: np.ndarray
    """(q,) int64, from 1 on: the place of the best positive. A tie counts against it."""
    average_precision_at_r: np.ndarray
    """(q,), from 0 to 1."""
    gallery_size: int
    tied: np.ndarray
    """(q,) int64, items that are no positive and score exactly as high as the best positive."""


def ranked_queries(pairs: np.ndarray, ahead: np.ndarray, tied: np.ndarray, gallery_size: int) -> RankedQueries:
    """The queries of pairs whose ranks are known.

    pairs: (p, 2), (query row, gallery row), each once, ascending by query. ahead, tied: (p,), items ahead of each
    pair's that are no positives of its query, and those that tie with it, as `pairs_ahead` gives them.
    """
    first = np.flatnonzero(np.append(True, pairs[1:, 0] != pairs[:-1, 0]))
    positives = np.diff(first, append=len(pairs))
    precision = average_precision_at_r(pairs[:, 0], ahead, first, positives)
    best = np.minimum.reduceat(ahead, first)
    of_best = np.maximum.reduceat(np.where(ahead == np.repeat(best, positives), tied, 0), first)
    return RankedQueries(pairs[first, 0], positives, best + 1, precision, gallery_size, of_best)


def ranking_metrics(ranked: RankedQueries, recall_at: Sequence[int]) -> dict[str, dict[str, float]]:
    """Figures of one direction, each as {"value": …, "chance": …}, chance being that of a random ranking.

    recall_at_K           share of queries whose rank is at most K
    median_rank           of the queries
    mean_reciprocal_rank  mean of 1 / rank
    map_at_r              mean average precision at R (Musgrave et al. 2020): with R positives, the mean over the
                          first R places of the precision there, or 0 where no positive is
    """
    positives, size = ranked.positives, ranked.gallery_size
    return {
        **recall_metrics(ranked.rank, positives, size, recall_at),
        "median_rank": {"value": float(np.median(ranked.rank)), "chance": chance_of_median_rank(positives, size)},
        "mean_reciprocal_rank": {
            "value": float(np.mean(1 / ranked.rank)),
            "chance": chance_of_reciprocal_rank(positives, size),
        },
        "map_at_r": {
            "value": float(np.mean(ranked.average_precision_at_r)),
            "chance": float(np.mean(chance_of_precision_at_r(positives, size))),
        },
    }


def recall_metrics(
    rank: np.ndarray, positives: np.ndarray, gallery_size: int, recall_at: Sequence[int]
) -> dict[str, dict[str, float]]:
    """{"recall_at_1": {"value": …, "chance": …}, …} of queries, (q,) their ranks from 1 on and numbers of positives."""
    return {
        f"recall_at_{k}": {
            "value": float(np.mean(rank <= k)),
            "chance": float(np.mean(chance_of_hit(positives, gallery_size, k))),
        }
        for k in recall_at
    }


def average_precision_at_r(
    query: np.ndarray, ahead: np.ndarray, first: np.ndarray, positives: np.ndarray
) -> np.ndarray:
    """(q,): 1/R sum_m [place_m <= R] m / place_m, the m-th best positive being at place m + (items ahead of it).

    query, ahead: (p,), ascending by query. first, positives: (q,), where each query's pairs start, and how many.
    """
    ahead = ahead[np.lexsort((ahead, query))]
    m = np.arange(len(ahead)) - np.repeat(first, positives) + 1
    place = m + ahead
    precision = np.where(place <= np.repeat(positives, positives), m / place, 0.0)
    return np.add.reduceat(precision, first) / positives


NEGLIGIBLE = 1e-15
"""Probability at which the chance of a mean reciprocal rank stops adding."""


def chance_of_hit(positives: np.ndarray, gallery_size: int, k: int) -> np.ndarray:
    """Probability that a uniformly random ranking has a positive among its first k, for each query.

    positives: (q,), number P of positives of each query among the G = gallery_size items.
    Returns (q,): 1 - C(G - P, K) / C(G, K), as a product of min(P, K) factors, which no factorial overflows.
    """
    k = min(k, gallery_size)
    distinct, place = np.unique(positives, return_inverse=True)
    few, many = np.minimum(distinct, k), np.maximum(distinct, k)  # C(G-P,K) / C(G,K) is symmetric in P and K
    misses = np.array(
        [
            np.prod(np.clip((gallery_size - m - np.arange(f)) / (gallery_size - np.arange(f)), 0, 1))
            for f, m in zip(few, many, strict=True)
        ]
    )
    return 1 - misses[place]


def chance_of_median_rank(positives: np.ndarray, gallery_size: int) -> float:
    """The least rank that a random ranking reaches for half of the queries."""
    low, high = 1, gallery_size
    while low < high:
        middle = (low + high) // 2
        if np.mean(chance_of_hit(positives, gallery_size, middle)) >= 0.5:
            high = middle
        else:
            low = middle + 1
    return float(low)


def chance_of_reciprocal_rank(positives: np.ndarray, gallery_size: int) -> float:
    """Mean over the queries of E[1 / rank of the first of P positives among G items in random order]."""
    distinct, counts = np.unique(positives, return_counts=True)
    expected = []
    for p in distinct:
        # later[r] = probability that the first r places hold no positive; it falls faster than exp(-r P / G).
        places = int(min(gallery_size - p, np.ceil(-np.log(NEGLIGIBLE) * gallery_size / p)))
        r = np.arange(places)
        later = np.append(1.0, np.cumprod((gallery_size - p - r) / (gallery_size - r)))
        expected.append(np.sum(-np.diff(np.append(later, 0.0)) / np.arange(1, places + 2)))
    return float(np.sum(np.array(expected) * counts) / counts.sum())


def chance_of_precision_at_r(positives: np.ndarray, gallery_size: int) -> np.ndarray:
    """E[average precision at R] of a random ranking of G items, (q,).

    Place i holds a positive with probability R/G, each place before it then with (R-1)/(G-1): the sum over i = 1..R
    of R/G (1 + (i-1) (R-1)/(G-1)) / i, over R.
    """
    distinct, place = np.unique(positives, return_inverse=True)
    expected = []
    for r in distinct:
        i = np.arange(1, r + 1)
        before = (i - 1) * (r - 1) / max(gallery_size - 1, 1)
        expected.append(np.sum((1 + before) / i) / gallery_size)
    return np.array(expected)[place.reshape(-1)]
