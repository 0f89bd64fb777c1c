"""Figures over all pairs of rows, without a matrix of them: uniformity and geometric consistency.

Nothing here asks other processes: the rows of a source lie on the main process alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from modstruct.evaluation.retrieval.rows import as_float32
from modstruct.evaluation.structure.sampling import SamplingConfig, figure, mean_interval, random_batches
from modstruct.pairwise.gaussian import potential_sum
from modstruct.pairwise.geometric import gram_products

UNIFORMITY_T = 2.0
"""t of the Gaussian potential, as Wang & Isola and L_Uni use it."""


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
    """Figures of all rows where they are few enough, else means over random batches, with intervals."""
    if rows < 2:
        return None
    if rows <= config.exact_rows:
        return [figure(value) for value in means(np.arange(rows))]
    batches = list(random_batches(rows, config.batch, config.batches, config.seed))
    values = np.array([means(batch) for batch in batches])  # (batches, figures)
    return [
        figure(column.mean(), mean_interval(column, config.confidence), sum(map(len, batches))) for column in values.T
    ]
