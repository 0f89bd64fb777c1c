"""Geometric consistency (intra- and inter-modality): similarities agree between modalities and between views."""

from __future__ import annotations

from torch import Tensor

from modstruct.config import GeometryConfig
from modstruct.embeddings import Outputs
from modstruct.losses.contrastive import sum_of
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, Sums
from modstruct.pairwise.geometric import (
    consistency_sums,
    consistency_value,
    difference_sums,
    difference_value,
    fits_pairs,
)


class Geometry(Loss):
    """L_GC, and L_GC + L_GC^a when augmented (Jiang et al. 2023, section 4.3; L_GC is CyCLIP's, Goel et al. 2022).

      L_GC^a = 1/N sum_jk [ (<zV_j,zV_k> - <zV^a_j,zV^a_k>)^2 + (<zT_j,zT_k> - <zT^a_j,zT^a_k>)^2 ]
               + 1/N sum_j ( <zV_j,zT_j> - <zV^a_j,zT^a_j> )^2

    The sums run over N^2 pairs and are divided by N, so the value grows with the batch. `normalize: pairs` divides the
    whole of it by N once more. That quotient is always among the terms, as per_pair.
    """

    compares = True

    def __init__(self, config: GeometryConfig, settings: LossSettings):
        self.precision = settings.precision
        self.augmented = config.augmented
        self.normalize = config.normalize
        self.needs = frozenset({"image", "text"})
        if self.augmented:
            self.needs |= {"image_augmented", "text_augmented"}

    def columns(self, pairs: int, dimension: int) -> frozenset[str]:
        return self.needs if fits_pairs(pairs, dimension) else frozenset()

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        def gathered(a: str, b: str) -> tuple[Tensor, Tensor] | None:
            wanted = fits_pairs(batch.pairs, rows["image"].shape[1])
            return (batch.columns[a], batch.columns[b]) if wanted else None

        image, text = rows["image"], rows["text"]
        consistency = consistency_sums(image, text, gathered("image", "text"), self.precision)
        sums = {f"consistency/{name}": value for name, value in consistency.items()}
        if not self.augmented:
            return sums
        views = {"image": (image, rows["image_augmented"]), "text": (text, rows["text_augmented"])}
        for modality, (plain, augmented) in views.items():
            difference = difference_sums(plain, augmented, gathered(modality, f"{modality}_augmented"))
            sums |= {f"{modality}/{name}": value for name, value in difference.items()}
        across = (image * text).sum(1) - (rows["image_augmented"] * rows["text_augmented"]).sum(1)
        return sums | {"across": across.square().sum()}

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, its terms under the same normalisation, and per_pair."""

        def part(name: str) -> Sums:
            return {key.removeprefix(f"{name}/"): value for key, value in sums.items() if key.startswith(f"{name}/")}

        count = batch.pairs
        terms = {"consistency": consistency_value(part("consistency"), count).to(batch.dtype) / count}
        if self.augmented:
            within = [difference_value(part(modality)).to(batch.dtype) for modality in ("image", "text")]
            terms["view_consistency"] = (within[0] + within[1]) / count + sums["across"] / count
        if self.normalize == "pairs":
            terms = {name: term / count for name, term in terms.items()}
        loss = sum_of(terms)
        return loss, {**terms, "per_pair": loss if self.normalize == "pairs" else loss / count}
