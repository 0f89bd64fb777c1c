"""Figures that are means over rows or pairs: exact at any size, in one reading."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from modstruct.evaluation.retrieval.rows import as_float32, block_rows, row_blocks


def alignment(image: np.ndarray, text: np.ndarray, pairs: np.ndarray) -> float:
    """Mean |z_V - z_T|^2 over pairs, from 0 to 4 (Wang & Isola 2020, alpha = 2).

    image: (n, D), text: (m, D), unit norm. pairs: (p, 2), (image row, text row).
    """
    return _total((a - b).double().square().sum() for a, b in paired_blocks(pairs, (image, 0), (text, 1))) / len(pairs)


def mean_row(rows: np.ndarray) -> np.ndarray:
    """(D,) float64."""
    return sum(block.double().sum(0).numpy() for _, block in row_blocks(rows)) / len(rows)


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
