"""Theorem 3.1 (Jiang et al. 2023): what exactly aligned features cost, on distributions that are known as tables.

If Z_T = f(X_T) and Z_V = g(X_V) are equal, or a bijection of each other, then
  inf_h E CE(h(Z_T, Z_V), Y) - inf_h' E CE(h'(X_T, X_V), Y) >= Delta_p = |I(X_T; Y) - I(X_V; Y)|.
The infimum of E CE(h(X), Y) over all h is H(Y | X), so that the left side is I(X_T, X_V; Y) - I(Z; Y).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modstruct.evaluation.information.discrete import common_part, mutual_information


@dataclass(frozen=True)
class Sides:
    """Both sides of the theorem, in nats. excess: the left one, the cross-entropy that the features cost."""

    excess: float
    gap: float


def exact_sides(joint: np.ndarray, text_features: np.ndarray | None = None) -> Sides:
    """Both sides for one exactly aligned feature, by enumeration.

    joint: (T, V, Y), p(x_T, x_V, y). text_features: (T,) whole numbers, Z_T of each x_T; a feature that x_V tells too.
    None takes the feature that keeps most, the common part of x_T and x_V, of which every exactly aligned one is a
    function. Raises ValueError where x_V does not tell the feature, which is then no exactly aligned one.
    """
    if joint.ndim != 3 or (joint < 0).any() or not np.isclose(joint.sum(), 1):
        raise ValueError(f"joint: shape {joint.shape}, sum {joint.sum():.6g}; give probabilities (T, V, Y) of sum 1")
    pairs = joint.sum(2)
    parts, _ = common_part(pairs)
    text_features = parts if text_features is None else np.asarray(text_features)
    for part in range(parts.max() + 1):
        kinds = np.unique(text_features[parts == part])
        if len(kinds) > 1:
            raise ValueError(
                f"text_features: {kinds[:2].tolist()} occur beside images that cannot tell them apart; "
                "give a function of the common part"
            )
    occurring = parts >= 0
    numbers = np.unique(text_features[occurring], return_inverse=True)[1]
    features = np.zeros((numbers.max() + 1, joint.shape[2]))
    np.add.at(features, numbers, joint.sum(1)[occurring])
    known = mutual_information(joint.reshape(-1, joint.shape[2]))
    gap = abs(mutual_information(joint.sum(1)) - mutual_information(joint.sum(0)))
    return Sides(known - mutual_information(features), gap)
