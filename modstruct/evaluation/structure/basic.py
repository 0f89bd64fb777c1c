"""Alignment, uniformity and modality gap of tensors at hand, for the curves of training; `measure.py` has the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modstruct.pairwise.gaussian import potential_sum

UNIFORMITY_T = 2.0
"""t of the Gaussian potential, as Wang & Isola and L_Uni use it."""
UNIFORMITY_ROWS = 16_384
"""Most rows that uniformity is computed on, evenly spaced ones, since its cost grows with the square."""


@torch.no_grad()
def structure(image: Tensor, text: Tensor, pairs: Tensor | None = None) -> dict[str, float]:
    """Alignment, uniformity of each modality and modality gap, of gathered rows; definitions as in `metrics.py`.

    image: (n, D), text: (m, D), unit norm, any floating type; measured in float32. pairs: (p, 2) rows of image and
    text that belong together; None pairs row j with row j. Uniformity is left out where there are fewer than two rows.
    """
    image, text = image.detach().float(), text.detach().float()
    if pairs is None and len(image) != len(text):
        raise ValueError(f"{len(image)} image and {len(text)} text rows: without pairs they must be as many")
    a, b = (image, text) if pairs is None else (image[pairs[:, 0]], text[pairs[:, 1]])
    metrics = {
        "alignment": float((a - b).square().sum(1).mean()),
        "uniformity_image": uniformity(image),
        "uniformity_text": uniformity(text),
        "modality_gap": float((image.mean(0) - text.mean(0)).norm()),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def uniformity(z: Tensor) -> float | None:
    """log of `mean_potential`; None for fewer than two rows. Beyond UNIFORMITY_ROWS rows that of evenly spaced ones."""
    if len(z) > UNIFORMITY_ROWS:
        z = z[torch.linspace(0, len(z) - 1, UNIFORMITY_ROWS, dtype=torch.float64, device=z.device).round().long()]
    return log_potential(mean_potential(z)) if len(z) > 1 else None


@torch.no_grad()
def mean_potential(z: Tensor) -> float:
    """Mean of exp(-t |z_j - z_k|^2) over j != k (Wang & Isola 2020, equation 5). z: (N, D), float32, N > 1."""
    total, _, _ = potential_sum(z.contiguous(), None, UNIFORMITY_T, False, "float32")
    return (float(total) - len(z)) / (len(z) * (len(z) - 1))  # without each row's potential with itself


def log_potential(mean: float) -> float:
    """Uniformity; of unit rows at least -4 t, below which rounding, or the end of an interval, may fall."""
    return math.log(max(mean, math.exp(-4 * UNIFORMITY_T)))
