"""Geometric consistency (intra- and inter-modality): similarities agree between modalities and between views."""

from __future__ import annotations

from torch import Tensor

from modstruct.config import GeometryConfig, Precision
from modstruct.embeddings import Embeddings
from modstruct.pairwise import geometric_consistency, gram_difference
from modstruct.pairwise.global_batch import global_mean, global_rows


class Geometry:
    """L_GC, and L_GC + L_GC^a when augmented (Jiang et al. 2023, section 4.3; L_GC is CyCLIP's, Goel et al. 2022).

    The sums run over N^2 pairs and are divided by N, so the value grows with the batch. `normalize: pairs` divides the
    whole of it by N once more. That quotient is always among the terms, as per_pair.
    """

    def __init__(self, config: GeometryConfig, precision: Precision = "float32"):
        self.precision = precision
        self.augmented = config.augmented
        self.normalize = config.normalize
        self.needs = frozenset({"image", "text"})
        if self.augmented:
            self.needs |= {"image_augmented", "text_augmented"}

    def __call__(self, embeddings: Embeddings, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the global batch, a scalar, its terms under the same normalisation, and per_pair."""
        image, text = embeddings.image, embeddings.text
        count = global_rows(image)
        terms = {"consistency": geometric_consistency(image, text, self.precision) / count}
        if self.augmented:
            views = view_consistency(image, text, embeddings.image_augmented, embeddings.text_augmented)
            terms["view_consistency"] = views
        if self.normalize == "pairs":
            terms = {name: term / count for name, term in terms.items()}
        loss = sum(terms.values())
        return loss, {**terms, "per_pair": loss if self.normalize == "pairs" else loss / count}


def view_consistency(image: Tensor, text: Tensor, image_augmented: Tensor, text_augmented: Tensor) -> Tensor:
    """L_GC^a: similarities within a modality, and of each pair, are the same among plain and among augmented views.

      1/N sum_jk [ (<zV_j,zV_k> - <zV^a_j,zV^a_k>)^2 + (<zT_j,zT_k> - <zT^a_j,zT^a_k>)^2 ]
      + 1/N sum_j ( <zV_j,zT_j> - <zV^a_j,zT^a_j> )^2

    All (B, D), unit norm. Returns a scalar.
    """
    within = gram_difference(image, image_augmented) + gram_difference(text, text_augmented)
    across = (image * text).sum(1) - (image_augmented * text_augmented).sum(1)
    return within / global_rows(image) + global_mean(across.square())
