"""How pairs and modalities lie to each other: alignment, gap, orthogonality, uniformity, geometry, the bridge.

Means over rows or pairs are exact at any size, in one pass; those over all pairs of rows are computed without a matrix
of them, and sampled beyond config.exact_rows rows. No collectives: the rows of a set lie on the main process alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modstruct.evaluation.retrieval.rows import as_float32, block_rows, row_blocks
from modstruct.evaluation.structure.sampling import SamplingConfig, mean_interval, metric, random_batches
from modstruct.losses.bridge import SHORTEST_MEAN
from modstruct.pairwise.gaussian import potential_sum
from modstruct.pairwise.geometric import gram_products

UNIFORMITY_T = 2.0
"""t of the Gaussian potential, as Wang & Isola and L_Uni use it."""
GRID = np.linspace(0, 1, 21)
GOLDEN = (5**0.5 - 1) / 2
TOLERANCE = 1e-6
"""Of the best t: a smooth function is flat near its minimum."""


def alignment(image: np.ndarray, text: np.ndarray, pairs: np.ndarray) -> float:
    """Mean |z_V - z_T|^2 over pairs, from 0 to 4 (Wang & Isola 2020, alpha = 2).

    image: (n, D), text: (m, D), unit norm. pairs: (p, 2), (image row, text row).
    """
    return _total((a - b).double().square().sum() for a, b in paired_blocks(pairs, (image, 0), (text, 1))) / len(pairs)


def mean_row(rows: np.ndarray) -> np.ndarray:
    """(D,) float64."""
    total = np.zeros(rows.shape[1])
    for _, block in row_blocks(rows):
        total += block.double().sum(0).numpy()
    return total / len(rows)


def modality_gap(image: np.ndarray, text: np.ndarray) -> float:
    """|mean z_V - mean z_T|, from 0 to 2 (Liang et al. 2022)."""
    return float(np.linalg.norm(mean_row(image) - mean_row(text)))


def orthogonality(shared: np.ndarray, independent: np.ndarray) -> float:
    """Mean <z_j, z^i_j>^2, from 0 to 1: one modality's half of L_Ortho (Jiang et al. 2023, section 4.1).

    shared, independent: (n, D), unit norm, row j of both from the same image or text.
    """
    rows = np.repeat(np.arange(len(shared))[:, None], 2, axis=1)
    blocks = paired_blocks(rows, (shared, 0), (independent, 1))
    return _total((a.double() * b).sum(1).square().sum() for a, b in blocks) / len(shared)


def paired_blocks(pairs: np.ndarray, *columns: tuple[np.ndarray, int]) -> Iterator[list[Tensor]]:
    """Yields float32 blocks of several arrays, (b, D) each, row by row as a column of the pairs names them."""
    at_once = block_rows(columns[0][0].shape[1])
    for start in range(0, len(pairs), at_once):
        part = pairs[start : start + at_once]
        yield [as_float32(rows[part[:, column]]) for rows, column in columns]


def _total(sums: Iterator[Tensor]) -> float:
    return sum(float(s) for s in sums)


def uniformity(z: np.ndarray, config: SamplingConfig, t: float = UNIFORMITY_T) -> dict[str, float] | None:
    """log of the mean of exp(-t |z_j - z_k|^2) over j != k (Wang & Isola 2020, equation 5), from -4 t to 0.

    z: (n, D), unit norm. None for fewer than two rows.
    """

    def mean_potential(rows: np.ndarray) -> list[float]:
        block = as_float32(z[rows])
        total, _, _ = potential_sum(block, None, t, False, "float32")
        n = len(rows)
        return [(float(total) - n) / (n * (n - 1))]

    found = _over_pairs(len(z), config, mean_potential)
    if found is None:
        return None
    lowest = np.exp(-4 * t)  # of unit rows; rounding or an interval may fall below
    return {name: v if name == "rows" else float(np.log(max(v, lowest))) for name, v in found[0].items()}


def geometric_consistency(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, config: SamplingConfig
) -> dict[str, dict[str, float]]:
    """Both terms of L_GC (Jiang et al. 2023, section 4.3) per pair: their means over pairs of pairs j != k.

    image: (n, D), text: (m, D). pairs: (p, 2), (image row, text row). Returns, for p > 1,
      geometry_inter  mean (<zV_j,zT_k> - <zV_k,zT_j>)^2
      geometry_intra  mean (<zV_j,zV_k> - <zT_j,zT_k>)^2
    """

    def means(chosen: np.ndarray) -> list[float]:
        a, b = as_float32(image[pairs[chosen, 0]]), as_float32(text[pairs[chosen, 1]])
        inter, intra = _geometric_sums(a, b)
        n = len(chosen)
        own = float(
            (a.double().square().sum(1) - b.double().square().sum(1)).square().sum()
        )  # j = k, for rounded norms
        return [inter / (n * (n - 1)), max(intra - own, 0.0) / (n * (n - 1))]

    found = _over_pairs(len(pairs), config, means)
    return {} if found is None else dict(zip(("geometry_inter", "geometry_intra"), found, strict=True))


def _geometric_sums(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Sums over all j, k of (<a_j,b_k> - <a_k,b_j>)^2 and of (<a_j,a_k> - <b_j,b_k>)^2, in float64."""
    if len(a) < a.shape[1]:
        a, b = a.double(), b.double()
        cross = a @ b.T
        return float((cross - cross.T).square().sum()), float((a @ a.T - b @ b.T).square().sum())
    plus, minus, mixed = gram_products(a, b)
    both, difference = float((plus * minus).sum()), float((mixed * mixed.T).sum())
    return max((both - difference) / 2, 0.0), max((both + difference) / 2, 0.0)


@torch.no_grad()
def _over_pairs(
    rows: int, config: SamplingConfig, means: Callable[[np.ndarray], list[float]]
) -> list[dict[str, float]] | None:
    """Exact values up to config.exact_rows rows, else means over random batches, with intervals."""
    if rows < 2:
        return None
    if rows <= config.exact_rows:
        return [metric(value) for value in means(np.arange(rows))]
    batches = list(random_batches(rows, config.batch, config.batches, config.seed))
    values = np.array([means(batch) for batch in batches])  # (batches, metrics)
    return [
        metric(column.mean(), mean_interval(column, config.confidence), sum(map(len, batches))) for column in values.T
    ]


@dataclass(frozen=True)
class BridgeDeviation:
    """|zV^a - mu(t)|^2 as a function of t, from six inner products of each pair, (p,) float64."""

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
        """The t in [0, 1] with the least deviation: the best of a grid, then golden section around it."""
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
    """Deviation of the augmented image from the bridge between image and caption, over all pairs.

    image, image_augmented: (n, D), text: (m, D), unit norm. pairs: (p, 2), (image row, text row).
    """
    parts = []
    for blocks in paired_blocks(pairs, (image_augmented, 0), (image, 0), (text, 1)):
        a, v, z = (block.double() for block in blocks)
        parts.append(np.stack([(x * y).sum(1).numpy() for x, y in ((a, a), (a, v), (a, z), (v, v), (z, z), (v, z))]))
    return BridgeDeviation(*np.concatenate(parts, axis=1))
