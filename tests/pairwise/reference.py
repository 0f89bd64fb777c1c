"""The pairwise terms as their formulas are written, all pairs at once, for tests and benchmarks.

They keep the dtype of their inputs; call them in float64 for a reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid


def gaussian_potential_sum(x: Tensor, t: float, y: Tensor | None = None) -> Tensor:
    """Sum over all pairs j, k of exp(-t |x_j - y_k|^2), where y is x unless it is given; j = k is included.

    Inside L_Uni of Jiang et al. 2023, section 4.1. x: (B, D), y: (N, D). Differences are formed before they are
    squared, so close rows lose no digits.
    """
    columns = x if y is None else y
    squares = torch.stack([(row - columns).square().sum(1) for row in x])  # (B, N), without a (B, N, D) array
    return torch.exp(-t * squares).sum()


def gaussian_potential_of_unit_rows(z: Tensor, t: float) -> Tensor:
    """Log of the mean over all pairs of exp(-t |z_j - z_k|^2), for rows of unit norm, by one product."""
    return torch.exp(2 * t * (z @ z.T - 1)).mean().log()  # (N, N)


def contrastive(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss as open_clip writes it: the logits once, and cross entropy along both sides of them."""
    logits = logit_scale * x @ y.T  # (N, N)
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def gaussian_potential(z: Tensor, t: float) -> Tensor:
    """log( 1/N^2 sum_jk exp(-t |z_j - z_k|^2) )."""
    return (gaussian_potential_sum(z, t) / len(z) ** 2).log()


def info_nce(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    """-1/N sum_j log( exp(s <x_j, y_j>) / sum_k exp(s <x_j, y_k>) ), each row of x against all rows of y, (N, D)."""
    logits = logit_scale * x @ y.T  # (N, N)
    return -logits.log_softmax(1).diagonal().mean()


def soft_contrastive(
    x: Tensor, x_momentum: Tensor, columns: Tensor, logit_scale: Tensor, alpha: float, first: int = 0
) -> Tensor:
    """ALBEF's image-text contrast, one way (Li et al. 2021, equation 6), as its code writes it: targets are constants.

    x, x_momentum: (B, D), columns: (N, D), row j's pair being column first + j.
    """
    with torch.no_grad():
        one_hot = torch.zeros(len(x), len(columns), dtype=x.dtype, device=x.device)
        one_hot.diagonal(first)[: len(x)] = 1
        targets = alpha * (logit_scale * x_momentum @ columns.T).softmax(1) + (1 - alpha) * one_hot  # (B, N)
    return -((logit_scale * x @ columns.T).log_softmax(1) * targets).sum(1).mean()


def sigmoid_contrastive(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """-1/N sum_jk log sigmoid(l_jk (s <x_j, y_k> + b)), l = 1 on pairs, -1 elsewhere (Zhai et al. 2023, equation 1)."""
    logits = logit_scale * x @ y.T + logit_bias  # (N, N)
    labels = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -logsigmoid(labels * logits).sum() / len(x)


def geometric_consistency(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all pairs of (<a_j,b_k> - <a_k,b_j>)^2 + (<a_j,a_k> - <b_j,b_k>)^2 (Jiang et al. 2023, section 4.3)."""
    return gram_asymmetry(a, b) + gram_difference(a, b)


def gram_asymmetry(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all pairs of (<a_j,b_k> - <a_k,b_j>)^2, how far a b^T is from symmetric."""
    cross = a @ b.T  # (N, N)
    return (cross - cross.T).square().sum()


def gram_difference(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all pairs of (<a_j,a_k> - <b_j,b_k>)^2, the squared distance of the Gram matrices."""
    return (a @ a.T - b @ b.T).square().sum()


def nearest_counts(queries: Tensor, gallery: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """For each (query, positive), gallery items that score above the positive, and others that score the same.

    NaN scores: all items are above such a positive, and such an item is above any positive.
    """
    scores = (queries @ gallery.T)[positives[:, 0]]  # (p, g)
    own = scores.gather(1, positives[:, 1:])
    others = torch.ones_like(scores, dtype=torch.bool).scatter(1, positives[:, 1:], False)
    return (~(scores <= own)).sum(1), ((scores == own) & others).sum(1)
