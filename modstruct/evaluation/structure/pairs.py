"""How pairs and modalities lie to each other: alignment, gap, orthogonality, geometry, the bridge.

Means over rows or pairs, in one pass and float64; over all pairs of rows, without a matrix of them. No collectives.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from modstruct.evaluation.retrieval.rows import as_float32, block_rows, row_blocks
from modstruct.losses.bridge import SHORTEST_MEAN
from modstruct.pairwise.geometric import gram_products

GRID = np.linspace(0, 1, 21)


def alignment(image: np.ndarray, text: np.ndarray, pairs: np.ndarray) -> float:
    """Mean |z_V - z_T|^2 over pairs, from 0 to 4 (Wang & Isola 2020, alpha = 2).

    image: (n, D), text: (m, D), unit norm. pairs: (p, 2), (image row, text row).
    """
    blocks = _paired_blocks((image, pairs[:, 0]), (text, pairs[:, 1]))
    return sum(float((a - b).square().sum()) for a, b in blocks) / len(pairs)


def mean_row(rows: np.ndarray) -> Tensor:
    """(D,) float64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for _, block in row_blocks(rows):
        total += block.double().sum(0)
    return total / len(rows)


def modality_gap(image: np.ndarray, text: np.ndarray) -> float:
    """|mean z_V - mean z_T|, from 0 to 2 (Liang et al. 2022)."""
    return float((mean_row(image) - mean_row(text)).norm())


def orthogonality(shared: np.ndarray, independent: np.ndarray) -> float:
    """Mean <z_j, z^i_j>^2, from 0 to 1: one modality's half of L_Ortho (Jiang et al. 2023, section 4.1).

    shared, independent: (n, D), unit norm, row j of both from the same image or text.
    """
    rows = np.arange(len(shared))
    blocks = _paired_blocks((shared, rows), (independent, rows))
    return sum(float((a * b).sum(1).square().sum()) for a, b in blocks) / len(shared)


def geometric_consistency(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, chosen: np.ndarray
) -> tuple[float, float]:
    """Both terms of L_GC (Jiang et al. 2023, section 4.3) per pair, over pairs of chosen pairs j != k.

    image: (n, D), text: (m, D). pairs: (p, 2), (image row, text row). chosen: (c,) of the pairs, c > 1. Returns the
    means of (<zV_j,zT_k> - <zV_k,zT_j>)^2, inter-modality, and of (<zV_j,zV_k> - <zT_j,zT_k>)^2, intra-modality.
    """
    a, b = as_float32(image[pairs[chosen, 0]]), as_float32(text[pairs[chosen, 1]])
    n = len(chosen)
    own = (a.double().square().sum(1) - b.double().square().sum(1)).square().sum()  # j = k, for rounded norms
    if n < a.shape[1]:
        a, b = a.double(), b.double()
        cross = a @ b.T
        inter, intra = (cross - cross.T).square().sum(), (a @ a.T - b @ b.T).square().sum()
    else:
        plus, minus, mixed = gram_products(a, b)
        both, difference = (plus * minus).sum(), (mixed * mixed.T).sum()
        inter, intra = (both - difference) / 2, (both + difference) / 2
    return max(float(inter), 0.0) / (n * (n - 1)), max(float(intra - own), 0.0) / (n * (n - 1))


def bridge(
    image: np.ndarray, text: np.ndarray, image_augmented: np.ndarray, pairs: np.ndarray
) -> tuple[float, list[float]]:
    """The t in [0, 1] with the least deviation, and the deviations at each t of GRID and at that t.

    The deviation is the mean over pairs of |zV^a - mu|^2, mu = (t zV + (1-t) zT) / |t zV + (1-t) zT| (Jiang et al.
    2023, section 4.2), from six inner products of each pair. image, image_augmented: (n, D), text: (m, D), unit norm.
    pairs: (p, 2), (image row, text row).
    """
    parts = []
    for a, v, z in _paired_blocks((image_augmented, pairs[:, 0]), (image, pairs[:, 0]), (text, pairs[:, 1])):
        products = ((a, a), (a, v), (a, z), (v, v), (z, z), (v, z))
        parts.append(np.stack([(x * y).sum(1).numpy() for x, y in products]))
    own, to_image, to_text, of_image, of_text, between = np.concatenate(parts, axis=1)

    def deviation(t: float) -> float:
        s = 1 - t
        length = np.sqrt(np.maximum(t * t * of_image + s * s * of_text + 2 * t * s * between, 0))
        divisor = np.maximum(length, SHORTEST_MEAN)
        return float(np.mean(own - 2 * (t * to_image + s * to_text) / divisor + (length / divisor) ** 2))

    on_grid = [deviation(t) for t in GRID]
    best = int(np.argmin(on_grid))
    around = GRID[max(best - 1, 0)], GRID[min(best + 1, len(GRID) - 1)]
    found = minimize_scalar(deviation, bounds=around, method="bounded", options={"xatol": 1e-8})
    best_t = min((float(GRID[best]), float(found.x)), key=deviation)
    return best_t, [*on_grid, deviation(best_t)]


def _paired_blocks(*columns: tuple[np.ndarray, np.ndarray]) -> Iterator[list[Tensor]]:
    """Yields float64 blocks (b, D) of several arrays, each by its own row numbers (p,)."""
    at_once = block_rows(columns[0][0].shape[1])
    for start in range(0, len(columns[0][1]), at_once):
        yield [as_float32(array[rows[start : start + at_once]]).double() for array, rows in columns]
