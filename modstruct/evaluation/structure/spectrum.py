"""Along how many directions the embeddings of a modality spread."""

from __future__ import annotations

import numpy as np
import torch

from modstruct.evaluation.retrieval.rows import row_blocks
from modstruct.evaluation.structure.means import mean_row

FLOAT64_ROWS = 8192


def spectra(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of Z / root n and of the centred (Z - mean) / root n, (min(n, D),) each, descending, float64.

    rows: Z, (n, D). The centred ones are the standard deviations along the principal axes. Both are roots of
    eigenvalues of D x D products, so values below 1e-8 of the largest are rounding. Memory: O(D^2) and a block.
    """
    mean = torch.from_numpy(mean_row(rows))
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for _, block in row_blocks(rows, FLOAT64_ROWS):
        centred = block.double() - mean
        products.addmm_(centred.T, centred)
    products /= len(rows)
    found = []
    for matrix in (products + torch.outer(mean, mean), products):
        values = torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().flip(0).numpy()
        found.append(values[: min(rows.shape)])
    return tuple(found)


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli 2007, definition 1).

    From 1 to the number of singular values; 1 where all are 0.
    """
    total = singular_values.sum()
    if total == 0:
        return 1.0
    shares = singular_values[singular_values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))
