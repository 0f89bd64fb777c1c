"""The contrastive base: image against text, and in-modal contrast of each view against its augmented one."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from modstruct.config import ContrastiveConfig, Precision
from modstruct.embeddings import Outputs
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, Sums
from modstruct.pairwise.contrast import contrastive_statistics, row_contrast_sum
from modstruct.pairwise.global_batch import softplus

SHIFT = 700.0  # of exponents; float64 holds exp(-708) to exp(709)


class Contrastive(Loss):
    """L_Con of Jiang et al. 2023, section 3; the cross-modal half of it is CLIP's loss (Radford et al. 2021).

    clip:          1/2 (L_V2T + L_T2V)
    clip_inmodal:  1/4 (L_V2T + L_T2V + L_V2V + L_T2T)
    """

    compares = True

    def __init__(self, config: ContrastiveConfig, settings: LossSettings):
        self.precision = settings.precision
        self.in_modal = config.in_modal
        self.needs = frozenset({"image", "text", "logit_scale"})
        if self.in_modal:
            self.needs |= {"image_augmented", "text_augmented"}

    def columns(self, pairs: int, dimension: int) -> frozenset[str]:
        return frozenset({"text", "image_augmented", "text_augmented"} if self.in_modal else {"text"})

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        """row_lse and positive: (N,), zeros where other processes have their rows; column_sums: (2, N)."""
        row_lse, column_lse, positive = contrastive_statistics(
            rows["image"], batch.columns["text"], rows["logit_scale"], batch.first, self.precision
        )
        place = (batch.first, batch.pairs - batch.first - len(row_lse))
        sums = {"row_lse": F.pad(row_lse, place), "positive": F.pad(positive, place)}
        # Exponentials of logits to plus and minus 1400, in float64 without a maximum over processes first: those above
        # 0 apart from those below. Unit vectors' lie within the scale, at most 1000 at fusion's lowest temperature.
        lse = column_lse.double()
        above = lse >= 0
        sums["column_sums"] = torch.stack([(lse - SHIFT).exp() * above, (lse.clamp(max=0) + SHIFT).exp() * ~above])
        return sums | in_modal_sums(rows, batch, "", self.precision) if self.in_modal else sums

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its two or four terms."""
        above, below = sums["column_sums"]
        none = above == 0
        high = above.masked_fill(none, 1.0).log().masked_fill(none, -torch.inf) + SHIFT
        low = below.clamp(min=torch.finfo(torch.float64).tiny).log() - SHIFT  # a batch of one has no negatives
        column_lse = torch.logaddexp(high, low).to(batch.dtype)
        losses = softplus(torch.stack((sums["row_lse"], column_lse)) - sums["positive"]).sum(1) / batch.pairs
        terms = {"image_to_text": losses[0], "text_to_image": losses[1]}
        if self.in_modal:
            terms |= in_modal_terms(sums, batch)
        return sum_of(terms) / len(terms), terms


def in_modal_sums(rows: Outputs, batch: GlobalBatch, kind: str, precision: Precision) -> Sums:
    """What `in_modal_terms` takes: L_V2V and L_T2T, each embedding against the augmented views' of its own modality.

    kind: "" or "_independent". The print has the plain embeddings in the denominator; as in CyCLIP's in-modal option
    (Goel et al. 2022) it is the augmented ones here, so that the positive is one of its own candidates.
    """
    return {
        f"{modality}_to_{modality}": row_contrast_sum(
            rows[f"{modality}{kind}"],
            None,
            batch.columns[f"{modality}{kind}_augmented"],
            rows["logit_scale"],
            batch.first,
            0.0,
            precision,
        )
        for modality in ("image", "text")
    }


def in_modal_terms(sums: Sums, batch: GlobalBatch) -> dict[str, Tensor]:
    return {name: sums[name] / batch.pairs for name in ("image_to_image", "text_to_text")}


def sum_of(terms: dict[str, Tensor]) -> Tensor:
    return reduce(torch.add, terms.values())
