"""Terms over all pairs of the global batch, exact, in memory O(N D)."""

from modstruct.pairwise.contrast import contrastive, info_nce, sigmoid_contrastive, soft_contrastive
from modstruct.pairwise.gaussian import gaussian_potential
from modstruct.pairwise.geometric import geometric_consistency, gram_asymmetry, gram_difference
from modstruct.pairwise.ranks import nearest_counts

__all__ = [
    "contrastive",
    "gaussian_potential",
    "geometric_consistency",
    "gram_asymmetry",
    "gram_difference",
    "info_nce",
    "nearest_counts",
    "sigmoid_contrastive",
    "soft_contrastive",
]
