"""Terms over all pairs of the global batch, exact, in memory O(N D)."""

from modstruct.pairwise.gaussian import gaussian_potential
from modstruct.pairwise.geometric import geometric_consistency, gram_asymmetry, gram_difference
from modstruct.pairwise.ranks import nearest_counts
from modstruct.pairwise.row_contrast import info_nce, sigmoid_contrastive, soft_contrastive
from modstruct.pairwise.symmetric_contrast import contrastive

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
