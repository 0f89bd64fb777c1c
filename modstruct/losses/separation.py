"""Deep feature separation (intra-modality): independent embeddings that hold what is specific to a modality."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modstruct.config import SeparationConfig
from modstruct.embeddings import Outputs
from modstruct.losses.contrastive import in_modal_sums, in_modal_terms, sum_of
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, Sums
from modstruct.pairwise.gaussian import gaussian_potential_sum


class Separation(Loss):
    """L_Sep = L_Ortho + L_Con^i + L_Uni^i (Jiang et al. 2023, section 4.1).

      L_Ortho = 1/N sum_j ( <zV_j, zV^i_j>^2 + <zT_j, zT^i_j>^2 )
      L_Uni^i = log 1/N^2 sum_jk [ G(zV^i_j, zV^i_k) + G(zT^i_j, zT^i_k) ],  G(u, v) = exp(-t |u - v|^2)

    L_Con^i is the in-modal contrast of the independent embeddings against those of the augmented views, both modalities
    added, with the same logit scale. (The print pairs an embedding with itself, which is degenerate.) In L_Uni^i pairs
    with j = k are in the sum, and one logarithm is taken of both modalities, so it is at most log 2. The print divides
    by N: the same gradient, and a value that moves with the batch size. L_Ortho counts config.orthogonality_weight
    times (once in the paper); its term is without that weight.
    """

    needs = frozenset(
        {
            "image",
            "text",
            "logit_scale",
            "image_independent",
            "text_independent",
            "image_independent_augmented",
            "text_independent_augmented",
        }
    )
    compares = True

    def __init__(self, config: SeparationConfig, settings: LossSettings):
        self.precision = settings.precision
        self.uniformity_t = float(config.uniformity_t)
        self.orthogonality_weight = config.orthogonality_weight

    def columns(self, pairs: int, dimension: int) -> frozenset[str]:
        return frozenset(name for name in self.needs if "independent" in name)

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        own = {"image": rows["image_independent"], "text": rows["text_independent"]}
        overlap = orthogonality(rows["image"], own["image"]) + orthogonality(rows["text"], own["text"])
        potentials = {
            f"{modality}_potential": gaussian_potential_sum(
                z, batch.columns[f"{modality}_independent"], self.uniformity_t, self.precision
            )
            for modality, z in own.items()
        }
        in_modal = in_modal_sums(rows, batch, "_independent", self.precision)
        return {"orthogonality": overlap.sum(), **in_modal, **potentials}

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        potentials = [
            (sums[f"{modality}_potential"].log() - 2 * math.log(batch.pairs)).to(batch.dtype)
            for modality in ("image", "text")
        ]
        terms = {
            "orthogonality": sums["orthogonality"] / batch.pairs,
            **in_modal_terms(sums, batch),
            "uniformity": torch.logaddexp(*potentials),
        }
        return sum_of(terms | {"orthogonality": self.orthogonality_weight * terms["orthogonality"]}), terms


def orthogonality(z: Tensor, z_independent: Tensor) -> Tensor:
    """Squared inner product of each shared embedding with its independent one, (B,). Both (B, D), unit norm."""
    return (z * z_independent).sum(1).square()
