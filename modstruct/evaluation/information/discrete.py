"""Entropy and mutual information of distributions that are known as tables. All in nats."""

from __future__ import annotations

import numpy as np


def entropy(distribution: np.ndarray) -> float:
    """-sum p log p of a table of probabilities of any shape; 0 log 0 is 0."""
    known = distribution[distribution > 0]
    return float(-(known * np.log(known)).sum()) + 0.0  # no -0.0


def mutual_information(joint: np.ndarray) -> float:
    """I(X; Y) of p(x, y), (X, Y)."""
    return max(0.0, entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint))


def common_part(joint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The finest thing that each of two variables alone tells for sure (Gács & Körner 1973).

    joint: (T, V), p(t, v). Returns the number of the part that each t (T,) and each v (V,) belongs to: the connected
    components of the pairs that occur. Values that never occur have -1.
    """
    text, image = np.full(joint.shape[0], -1), np.full(joint.shape[1], -1)
    occurs = joint > 0
    part = 0
    for first in np.flatnonzero(occurs.any(1)):
        if text[first] >= 0:
            continue
        found = np.array([first])
        while len(found):
            text[found] = part
            reached = np.flatnonzero(occurs[found].any(0) & (image < 0))
            image[reached] = part
            found = np.flatnonzero(occurs[:, reached].any(1) & (text < 0))
        part += 1
    return text, image
