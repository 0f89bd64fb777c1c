"""How far the augmented image lies from the bridge between image and caption, and where on it it is nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modstruct.evaluation.structure.means import paired_blocks
from modstruct.losses.bridge import SHORTEST_MEAN

GRID = np.linspace(0, 1, 21)
GOLDEN = (5**0.5 - 1) / 2
TOLERANCE = 1e-6
"""Of the best t: near its minimum a smooth function of t is flat."""


@dataclass(frozen=True)
class BridgeDeviation:
    """|zV^a - mu(t)|^2 as a function of t. All that it needs of each pair are six inner products, (p,) float64."""

    augmented: np.ndarray
    """<a, a> of a = zV^a."""
    augmented_image: np.ndarray
    augmented_text: np.ndarray
    image: np.ndarray
    text: np.ndarray
    image_text: np.ndarray

    def at(self, t: float) -> float:
        """Mean over pairs of |zV^a - mu|^2, mu = (t zV + (1-t) zT) / |t zV + (1-t) zT| (Jiang et al. 2023, 4.2)."""
        s = 1 - t
        length = np.sqrt(np.maximum(t * t * self.image + s * s * self.text + 2 * t * s * self.image_text, 0))
        divisor = np.maximum(length, SHORTEST_MEAN)
        along = (t * self.augmented_image + s * self.augmented_text) / divisor
        return float(np.mean(self.augmented - 2 * along + (length / divisor) ** 2))

    def best_t(self) -> float:
        """The t in [0, 1] of the least deviation: the best of a grid, then golden section around it."""
        best = int(np.argmin([self.at(t) for t in GRID]))
        low, high = GRID[max(best - 1, 0)], GRID[min(best + 1, len(GRID) - 1)]
        while high - low > TOLERANCE:
            left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
            if self.at(left) <= self.at(right):
                high = right
            else:
                low = left
        return min((GRID[best], (low + high) / 2), key=self.at)


def bridge_deviation(
    image: np.ndarray, text: np.ndarray, image_augmented: np.ndarray, pairs: np.ndarray
) -> BridgeDeviation:
    """Of all pairs (p, 2), (image row, text row). image, image_augmented: (n, D), text: (m, D), unit norm."""
    parts = []
    for blocks in paired_blocks(pairs, (image_augmented, 0), (image, 0), (text, 1)):
        a, v, z = (block.double() for block in blocks)
        parts.append(np.stack([(x * y).sum(1).numpy() for x, y in ((a, a), (a, v), (a, z), (v, v), (z, z), (v, z))]))
    return BridgeDeviation(*np.concatenate(parts, axis=1))
