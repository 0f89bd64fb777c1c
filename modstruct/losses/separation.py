"""Deep feature separation (intra-modality): independent embeddings that hold what is specific to a modality."""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct.config import Precision, SeparationConfig
from modstruct.embeddings import Embeddings
from modstruct.losses.contrastive import in_modal_contrast
from modstruct.pairwise import gaussian_potential
from modstruct.pairwise.global_batch import global_mean


class Separation:
    """L_Sep = L_Ortho + L_Con^i + L_Uni^i (Jiang et al. 2023, section 4.1).

    L_Con^i is the in-modal contrast of the independent embeddings against those of the augmented views, both modalities
    added, with the same logit scale. (The print pairs an embedding with itself, which is degenerate.)
    """

    needs = frozenset(
        {
            "image",
            "text",
            "image_independent",
            "text_independent",
            "image_independent_augmented",
            "text_independent_augmented",
        }
    )

    def __init__(self, config: SeparationConfig, precision: Precision = "float32"):
        self.precision = precision
        self.uniformity_t = config.uniformity_t

    def __call__(self, embeddings: Embeddings, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the global batch, a scalar, and its terms."""
        e = embeddings
        terms = {
            "orthogonality": orthogonality(e.image, e.text, e.image_independent, e.text_independent),
            **in_modal_contrast(
                e.image_independent,
                e.image_independent_augmented,
                e.text_independent,
                e.text_independent_augmented,
                e.logit_scale,
                self.precision,
            ),
            "uniformity": uniformity(e.image_independent, e.text_independent, self.uniformity_t, self.precision),
        }
        return sum(terms.values()), terms


def orthogonality(image: Tensor, text: Tensor, image_independent: Tensor, text_independent: Tensor) -> Tensor:
    """L_Ortho = 1/N sum_j ( <zV_j, zV^i_j>^2 + <zT_j, zT^i_j>^2 ). All (B, D), unit norm. Returns a scalar."""
    image_overlap = (image * image_independent).sum(1)
    text_overlap = (text * text_independent).sum(1)
    return global_mean(image_overlap.square() + text_overlap.square())


def uniformity(
    image_independent: Tensor, text_independent: Tensor, t: float, precision: Precision = "float32"
) -> Tensor:
    """L_Uni^i = log 1/N^2 sum_jk [ G(zV^i_j, zV^i_k) + G(zT^i_j, zT^i_k) ],  G(u, v) = exp(-t |u - v|^2).

    Both (B, D), unit norm. Returns a scalar, at most log 2. Pairs with j = k are in the sum, and one logarithm is taken
    of both modalities. The print divides by N: the same gradient, and a value that moves with the batch size.
    """
    potentials = [gaussian_potential(z, t, precision) for z in (image_independent, text_independent)]
    return torch.logaddexp(*potentials)
