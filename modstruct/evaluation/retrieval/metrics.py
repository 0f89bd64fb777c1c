"""The metrics of ranks, recall at K, median and mean log-rank, mean reciprocal rank and mAP@R, each beside chance.

Chance is what a uniformly random ranking reaches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

Metrics = dict[str, dict[str, float]]
"""By name, {"value": …, "chance": …}."""
NEGLIGIBLE = 1e-15
"""Probability at which the mean over random ranks stops adding."""


@dataclass(frozen=True)
class Ranked:
    """The ranks of one direction, query by query, (q,) each; only queries that have a positive, ascending by row.

    query: row of each. positives: how many it has, R. rank: place of the best of them, from 1 on; a tie counts against
    it. average_precision_at_r: from 0 to 1. tied: items that are no positive and score exactly as high as the best one.
    """

    query: np.ndarray
    positives: np.ndarray
    rank: np.ndarray
    average_precision_at_r: np.ndarray
    tied: np.ndarray
    gallery_size: int


def ranked_queries(pairs: np.ndarray, ahead: np.ndarray, tied: np.ndarray, gallery_size: int) -> Ranked:
    """The queries of pairs whose ranks are known; pairs, ahead and tied are as `pairs_ahead` gives them."""
    order = np.lexsort((-tied, ahead, pairs[:, 0]))
    query, first, positives = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    ahead, tied = ahead[order], tied[order]
    # The m-th best positive is at place m + (items ahead of it); average precision is 1/R sum_m [place <= R] m / place.
    m = np.arange(len(pairs)) - np.repeat(first, positives) + 1
    precision = np.where(m + ahead <= np.repeat(positives, positives), m / (m + ahead), 0.0)
    average = np.add.reduceat(precision, first) / positives
    return Ranked(query, positives, ahead[first] + 1, average, tied[first], gallery_size)


def ranking_metrics(ranked: Ranked, recall_at: Sequence[int]) -> Metrics:
    """Metrics of one direction, each as {"value": …, "chance": …}, chance being that of a random ranking.

    recall_at_K           share of queries whose rank is at most K
    median_rank           of the queries; its chance the least rank that a random ranking reaches for half of them
    mean_log_rank         mean of ln rank: all ranks count, and a factor counts alike anywhere
    mean_reciprocal_rank  mean of 1 / rank
    map_at_r              mean average precision at R (Musgrave et al. 2020): with R positives, the mean over the
                          first R places of the precision there, or 0 where no positive is
    """
    positives, size = ranked.positives, ranked.gallery_size
    # 1e-12: what is 1/2 in exact numbers may be rounded down.
    half = bisect_left(range(1, size + 1), 0.5 - 1e-12, key=lambda k: _chance_of_recall(positives, size, k))
    reciprocal, logarithm = (
        _mean(positives, partial(_mean_over_random_ranks, size, of)) for of in (np.reciprocal, np.log)
    )
    precision = _mean(positives, lambda count: _chance_of_precision_at_r(count, size))
    return {
        **recall_metrics(ranked.rank, positives, size, recall_at),
        "median_rank": {"value": float(np.median(ranked.rank)), "chance": 1.0 + half},
        "mean_log_rank": {"value": float(np.mean(np.log(ranked.rank))), "chance": logarithm},
        "mean_reciprocal_rank": {"value": float(np.mean(1 / ranked.rank)), "chance": reciprocal},
        "map_at_r": {"value": float(np.mean(ranked.average_precision_at_r)), "chance": precision},
    }


def recall_metrics(rank: np.ndarray, positives: np.ndarray, gallery_size: int, recall_at: Sequence[int]) -> Metrics:
    """The recall alone. rank, from 1 on, and positives: (q,)."""
    return {
        f"recall_at_{k}": {"value": float(np.mean(rank <= k)), "chance": _chance_of_recall(positives, gallery_size, k)}
        for k in recall_at
    }


def _mean(positives: np.ndarray, chance: Callable[[int], float]) -> float:
    """Mean of chance(P) over queries with so many positives (q,)."""
    distinct, counts = np.unique(positives, return_counts=True)
    return float(np.average([chance(int(count)) for count in distinct], weights=counts))


def _chance_of_recall(positives: np.ndarray, size: int, k: int) -> float:
    """Of P positives among G items one is among the first K with probability 1 - C(G - P, K) / C(G, K)."""
    from scipy.stats import hypergeom  # late, as in statistics.wilson

    return _mean(positives, lambda count: float(hypergeom.sf(0, size, count, min(k, size))))


def _mean_over_random_ranks(size: int, of: Callable[[np.ndarray], np.ndarray], positives: int) -> float:
    """E[of(rank of the first of P positives among G items)]. of: of ranks (r,), float64."""
    # later[r] = probability that the first r places hold no positive; it falls faster than exp(-r P / G).
    r = np.arange(int(min(size - positives, np.ceil(-np.log(NEGLIGIBLE) * size / positives))))
    later = np.append(1.0, np.cumprod((size - positives - r) / (size - r)))
    return float(np.sum(-np.diff(later, append=0.0) * of(np.arange(1.0, len(later) + 1))))


def _chance_of_precision_at_r(positives: int, size: int) -> float:
    """E[average precision at R]: place i holds a positive with probability R/G, each before it then (R-1)/(G-1)."""
    i = np.arange(1, positives + 1)
    return float(np.sum((1 + (i - 1) * (positives - 1) / max(size - 1, 1)) / i) / size)
