"""The contrastive base: image against text, and in-modal contrast of each view against its augmented one."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from modstruct import distributed
from modstruct.config import ContrastiveConfig, Precision
from modstruct.embeddings import Outputs
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, Sums
from modstruct.pairwise.contrast import row_and_column_lse, row_contrast_sum
from modstruct.pairwise.global_batch import softplus

SHIFT = 700.0  # of exponents; float64 holds exp(-708) to exp(709)


class Contrastive(Loss):
    """L_Con of Jiang et al. 2023, section 3; the cross-modal half of it is CLIP's loss (Radford et al. 2021).

    clip:          1/2 (L_V2T + L_T2V)
    clip_inmodal:  1/4 (L_V2T + L_T2V + L_V2V + L_T2T)
    clip_2v:       1/2 [ clip of (zV, zT) + clip of (zV^a, zT^a) ], with one logit scale
    """

    compares = True

    def __init__(self, config: ContrastiveConfig, settings: LossSettings):
        self.precision = settings.precision
        self.in_modal = config.in_modal
        self.views = ("", "_augmented") if config.second_view else ("",)
        both = ("", "_augmented") if self.in_modal else self.views
        self.needs = frozenset({f"{modality}{view}" for modality in ("image", "text") for view in both})
        self.needs |= {"logit_scale"}

    def columns(self, pairs: int, dimension: int) -> frozenset[str]:
        in_modal = {"image_augmented", "text_augmented"} if self.in_modal else set[str]()
        return frozenset({f"text{view}" for view in self.views} | in_modal)

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        sums: Sums = {}
        for view in self.views:
            sums |= cross_modal_sums(rows, batch, view, self.precision)
        return sums | in_modal_sums(rows, batch, "", self.precision) if self.in_modal else sums

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its two or four terms."""
        terms: dict[str, Tensor] = {}
        for view in self.views:
            terms |= cross_modal_terms(sums, batch, view)
        if self.in_modal:
            terms |= in_modal_terms(sums, batch)
        return sum_of(terms) / len(terms), terms


def cross_modal_sums(rows: Outputs, batch: GlobalBatch, view: str, precision: Precision) -> Sums:
    """What `cross_modal_terms` takes: L_V2T and L_T2V of one view's embeddings. view: "" or "_augmented".

    row_lse and positive: (N,), zeros where other processes have their rows; column_sums: (2, N).
    """
    row_lse, column_lse, positive = row_and_column_lse(
        rows[f"image{view}"], batch.columns[f"text{view}"], rows["logit_scale"], batch.first, precision
    )
    place = (batch.first, batch.pairs - batch.first - len(row_lse))
    sums = {f"row_lse{view}": F.pad(row_lse, place), f"positive{view}": F.pad(positive, place)}
    # Exponentials of logits to plus and minus 1400, in float64 without a maximum over processes first: those above
    # 0 apart from those below. Unit vectors' lie within the scale, at most 1000 at fusion's lowest temperature.
    lse = column_lse.double()
    above = lse >= 0
    parts = [(lse - SHIFT).exp() * above, (lse.clamp(max=0) + SHIFT).exp() * ~above]
    return sums | {f"column_sums{view}": torch.stack(parts)}


def cross_modal_terms(sums: Sums, batch: GlobalBatch, view: str) -> dict[str, Tensor]:
    above, below = sums[f"column_sums{view}"]
    none = above == 0
    high = above.masked_fill(none, 1.0).log().masked_fill(none, -torch.inf) + SHIFT
    low = below.clamp(min=torch.finfo(torch.float64).tiny).log() - SHIFT  # a batch of one has no negatives
    column_lse = torch.logaddexp(high, low).to(batch.dtype)
    margins = torch.stack((sums[f"row_lse{view}"], column_lse)) - sums[f"positive{view}"]
    losses = softplus(margins).sum(1) / batch.pairs
    return {f"image_to_text{view}": losses[0], f"text_to_image{view}": losses[1]}


def row_losses(rows: Outputs, images: Tensor, texts: Tensor) -> Tensor:
    """CLIP's loss of each of this process's pairs, (B,), without gradient: whose mean over all pairs is the loss.

    images, texts: (N, D) of all processes.
    """
    with torch.no_grad():
        scale, first = rows["logit_scale"].float(), distributed.rank() * len(rows["image"])
        ways = (rows["image"], texts), (rows["text"], images)
        found = [row_and_column_lse(own.float(), all_.float(), scale, first, "float32") for own, all_ in ways]
        return torch.stack([softplus(row_lse - positive) for row_lse, _, positive in found]).mean(0)


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
