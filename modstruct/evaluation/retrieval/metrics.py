"""What ranks amount to: recall at K, median rank, mean reciprocal rank and mAP@R, each beside chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modstruct.evaluation.retrieval.chance import (
    chance_of_hit,
    chance_of_median_rank,
    chance_of_precision_at_r,
    chance_of_reciprocal_rank,
)


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


def ranked_queries(pairs: np.ndarray, ahead: np.ndarray, gallery_size: int) -> RankedQueries:
    """The queries of pairs whose ranks are known.

    pairs: (p, 2), (query row, gallery row), each once, ascending by query. ahead: (p,), items ahead of each pair's
    that are no positives of its query, as `pairs_ahead` gives them.
    """
    first = np.flatnonzero(np.append(True, pairs[1:, 0] != pairs[:-1, 0]))
    positives = np.diff(first, append=len(pairs))
    precision = average_precision_at_r(pairs[:, 0], ahead, first, positives)
    best = np.minimum.reduceat(ahead, first)
    return RankedQueries(pairs[first, 0], positives, best + 1, precision, gallery_size)


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
