"""What ranks amount to: recall at K, median rank, mean reciprocal rank and mAP@R, each beside chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modstruct.evaluation.retrieval import chance_of_hit

NEGLIGIBLE = 1e-15
"""Probability at which the chance of a mean reciprocal rank stops adding."""


def ranking_figures(
    pairs: np.ndarray, ahead: np.ndarray, gallery_size: int, recall_at: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Figures of one direction, each as {"value": …, "chance": …}, chance being that of a random ranking.

    pairs: (p, 2), (query row, gallery row), each once, ascending by query. ahead: (p,), items ahead of each pair's
    that are no positives of its query, as `pairs_ahead` gives them. A query's rank is that of its best positive.
      recall_at_K           share of queries whose rank is at most K, from 1 on
      median_rank           of the queries
      mean_reciprocal_rank  mean of 1 / rank
      map_at_r              mean average precision at R (Musgrave et al. 2020): with R positives, the mean over the
                            first R places of the precision there, or 0 where no positive is
    Queries without a positive have no pair and are left out.
    """
    first = np.flatnonzero(np.append(True, pairs[1:, 0] != pairs[:-1, 0]))
    positives = np.diff(first, append=len(pairs))  # R of each query
    best = np.minimum.reduceat(ahead, first)
    figures = {
        f"recall_at_{k}": {
            "value": float(np.mean(best < k)),
            "chance": float(np.mean(chance_of_hit(positives, gallery_size, k))),
        }
        for k in recall_at
    }
    figures["median_rank"] = {"value": float(np.median(best + 1)), "chance": _chance_median(positives, gallery_size)}
    figures["mean_reciprocal_rank"] = {
        "value": float(np.mean(1 / (best + 1))),
        "chance": _chance_reciprocal(positives, gallery_size),
    }
    figures["map_at_r"] = {
        "value": float(np.mean(average_precision_at_r(pairs[:, 0], ahead, first, positives))),
        "chance": float(np.mean(_chance_precision(positives, gallery_size))),
    }
    return figures


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


def _chance_median(positives: np.ndarray, gallery_size: int) -> float:
    """The least rank that a random ranking reaches for half of the queries."""
    low, high = 1, gallery_size
    while low < high:
        middle = (low + high) // 2
        if np.mean(chance_of_hit(positives, gallery_size, middle)) >= 0.5:
            high = middle
        else:
            low = middle + 1
    return float(low)


def _chance_reciprocal(positives: np.ndarray, gallery_size: int) -> float:
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


def _chance_precision(positives: np.ndarray, gallery_size: int) -> np.ndarray:
    """E[average precision at R] of a random ranking of G items.

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
