"""What a uniformly random ranking would reach: the figure beside every figure of retrieval."""

from __future__ import annotations

import numpy as np

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
