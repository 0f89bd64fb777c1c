"""Explicit alignment of image and text (inter-modality), the rival of the bridge and of geometric consistency."""

from __future__ import annotations

import math

from torch import Tensor

from modstruct.config.losses import AlignmentConfig
from modstruct.embeddings import Outputs
from modstruct.losses.bridge import mean_direction
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, Sums
from modstruct.pairwise.gaussian import gaussian_potential_sum


class Alignment(Loss):
    """One of two attractions of a pair's embeddings, and optionally uniformity of the pairs' centres.

      inverse_square:  L_Align = 1/N sum_j 1 / <zT_j, zV_j>^2           (Jiang et al. 2023, section 3.1)
      distance:        1/N sum_j |zV_j - zT_j|^2                        (Wang & Isola 2020, section 4.1.1)
      uniformity:      log 1/N^2 sum_jk exp(-t |c_j - c_k|^2),  c = (zV + zT) / |zV + zT|

    The paper prints 1 / <Z_T, Z_V>^2 of the whole embeddings; the mean over pairs is our reading. It is least, 1, for
    equal embeddings and for opposite ones alike, and has a pole between: a pair is drawn to whichever is nearer, and
    pairs near 0 drown all others. So <zT, zV>^2 is at least s^2, s = config.smallest_cosine: a pair below it counts
    1 / s^2 without a gradient (at most 2 / s^3 elsewhere), and the contrast alone decides to which side it moves.

    Uniformity counts config.uniformity_weight times, j = k is in its sum, and a centre of near-opposite embeddings is
    shortened as `mean_direction` says. The terms are those of the loss without their weights.
    """

    needs = frozenset({"image", "text"})

    def __init__(self, config: AlignmentConfig, settings: LossSettings):
        self.config, self.precision = config, settings.precision
        self.form: str = config.form
        self.compares = config.uniformity_weight > 0

    def columns(self, pairs: int, dimension: int) -> frozenset[str]:
        return self.needs if self.compares else frozenset()

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        image, text = rows["image"], rows["text"]
        if self.form == "distance":
            pulls = (image - text).square().sum(1)
        else:
            pulls = 1 / (image * text).sum(1).square().clamp(min=self.config.smallest_cosine**2)
        sums = {self.form: pulls.sum()}
        if self.compares:
            own, every = (mean_direction(of["image"], of["text"], 0.5) for of in (rows, batch.columns))
            sums["potential"] = gaussian_potential_sum(own, every, self.config.uniformity_t, self.precision)
        return sums

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sums[self.form] / batch.pairs
        terms = {self.form: loss}
        if self.compares:
            terms["uniformity"] = (sums["potential"].log() - 2 * math.log(batch.pairs)).to(batch.dtype)
            loss = loss + self.config.uniformity_weight * terms["uniformity"]
        return loss, terms
