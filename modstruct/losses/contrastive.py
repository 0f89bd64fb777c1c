"""The contrastive base: image against text, and in-modal contrast of each view against its augmented one."""

from __future__ import annotations

from torch import Tensor

from modstruct.config import ContrastiveConfig, Precision
from modstruct.embeddings import Embeddings
from modstruct.pairwise import contrastive, info_nce


class Contrastive:
    """L_Con of Jiang et al. 2023, section 3; the cross-modal half of it is CLIP's loss (Radford et al. 2021).

    clip:          1/2 (L_V2T + L_T2V)
    clip_inmodal:  1/4 (L_V2T + L_T2V + L_V2V + L_T2T)
    """

    def __init__(self, config: ContrastiveConfig, precision: Precision = "float32"):
        self.precision = precision
        self.in_modal = config.in_modal
        self.needs = frozenset({"image", "text"})
        if self.in_modal:
            self.needs |= {"image_augmented", "text_augmented"}

    def __call__(self, embeddings: Embeddings, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the global batch, a scalar, and its two or four terms."""
        scale = embeddings.logit_scale
        image_to_text, text_to_image = contrastive(embeddings.image, embeddings.text, scale, self.precision)
        terms = {"image_to_text": image_to_text, "text_to_image": text_to_image}
        if self.in_modal:
            terms |= in_modal_contrast(
                embeddings.image,
                embeddings.image_augmented,
                embeddings.text,
                embeddings.text_augmented,
                scale,
                self.precision,
            )
        return sum(terms.values()) / len(terms), terms


def in_modal_contrast(
    image: Tensor,
    image_augmented: Tensor,
    text: Tensor,
    text_augmented: Tensor,
    logit_scale: Tensor,
    precision: Precision = "float32",
) -> dict[str, Tensor]:
    """L_V2V and L_T2T: each embedding against the augmented views' embeddings of its own modality.

    All (B, D), unit norm; logit_scale (1,). The print has the plain embeddings in the denominator; as in CyCLIP's
    in-modal option (Goel et al. 2022) it is the augmented ones here, so that the positive is one of its own candidates.
    """
    return {
        "image_to_image": info_nce(image, image_augmented, logit_scale, precision),
        "text_to_text": info_nce(text, text_augmented, logit_scale, precision),
    }
