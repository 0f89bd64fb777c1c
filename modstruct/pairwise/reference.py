"""The pairwise terms as their formulas are written: all pairs at once, for tests and benchmarks only.

They keep the dtype they are given; call them in float64 for a reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def gaussian_potential_sum(z: Tensor, t: float) -> Tensor:
    """Sum over all pairs j, k of exp(-t |z_j - z_k|^2), j = k included (inside L_Uni, Jiang et al. 2023, section 4.1).

    z: (N, D). Differences are formed before they are squared, so close rows lose no digits.
    """
    squares = torch.stack([(row - z).square().sum(1) for row in z])  # (N, N), without an (N, N, D) array
    return torch.exp(-t * squares).sum()


def gaussian_potential_of_unit_rows(z: Tensor, t: float) -> Tensor:
    """Log of the mean over all pairs of exp(-t |z_j - z_k|^2), for rows of unit norm, by one product."""
    return torch.exp(2 * t * (z @ z.T - 1)).mean().log()  # (N, N)


def contrastive(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss as open_clip writes it: the logits once, and cross entropy along both sides of them."""
    logits = logit_scale * x @ y.T  # (N, N)
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def info_nce(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    """-1/N sum_j log( exp(s <x_j, y_j>) / sum_k exp(s <x_j, y_k>) ), each row of x against all rows of y, (N, D)."""
    logits = logit_scale * x @ y.T  # (N, N)
    return -logits.log_softmax(1).diagonal().mean()


def geometric_consistency(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all pairs of (<a_j,b_k> - <a_k,b_j>)^2 + (<a_j,a_k> - <b_j,b_k>)^2 (Jiang et al. 2023, section 4.3)."""
    cross = a @ b.T  # (N, N)
    return (cross - cross.T).square().sum() + gram_difference(a, b)


def gram_difference(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all pairs of (<a_j,a_k> - <b_j,b_k>)^2, the squared distance of the Gram matrices."""
    return (a @ a.T - b @ b.T).square().sum()


def nearest_counts(queries: Tensor, gallery: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """For each (query, positive), gallery items that score above the positive, and others that score the same."""
    scores = (queries @ gallery.T)[positives[:, 0]]  # (p, g)
    own = scores.gather(1, positives[:, 1:])
    return (scores > own).sum(1), (scores == own).sum(1) - 1
