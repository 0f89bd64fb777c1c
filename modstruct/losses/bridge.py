"""The Brownian bridge (inter-modality): the augmented image lies on the way from image to text."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from modstruct.config import BridgeConfig
from modstruct.embeddings import Outputs
from modstruct.errors import require
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, Sums

SHORTEST_MEAN = 1e-3  # a shorter one, of near-opposite image and text at t near 1/2, has no direction worth following


class Bridge(Loss):
    """L_Br = 1/N sum_j |zV^a_j - mu_j|^2 (Jiang et al. 2023, section 4.2), with t fixed or drawn at each step."""

    needs = frozenset({"image", "text", "image_augmented"})

    def __init__(self, config: BridgeConfig, settings: LossSettings):
        self.t, self.seed = config.t, settings.seed

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        distances = bridge_distances(rows["image"], rows["text"], rows["image_augmented"], self.t_of(batch.step))
        return {"distance": distances.sum()}

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sums["distance"] / batch.pairs
        return loss, {"t": loss.new_full((), self.t_of(batch.step))}

    def t_of(self, step: int) -> float:
        return drawn_t(self.seed, step) if self.t is None else self.t


def bridge_distances(image: Tensor, text: Tensor, image_augmented: Tensor, t: float) -> Tensor:
    """Squared distance of each augmented image to the bridge's mean, (B,).

      |zV^a_j - mu_j|^2,   mu_j = (t zV_j + (1-t) zT_j) / |t zV_j + (1-t) zT_j|

    (Jiang et al. 2023, section 4.2; the second line printed there, a quotient without root and with the sign reversed,
    would repel.) image, text, image_augmented: (B, D), unit norm. t: weight of the image in the mean, in [0, 1].
    Raises ValueError if t is outside [0, 1].
    """
    require(0 <= t <= 1, "t", t, "must be from 0 to 1")
    return (image_augmented - mean_direction(image, text, t)).square().sum(1)


def mean_direction(image: Tensor, text: Tensor, t: float) -> Tensor:
    """(t zV + (1-t) zT) / |t zV + (1-t) zT|, row by row, (B, D).

    Where image and text cancel, the mean has no direction: below a length of SHORTEST_MEAN it is divided by that
    instead, so that value and gradient stay finite.
    """
    mean = t * image + (1 - t) * text
    return mean / torch.linalg.vector_norm(mean, dim=1, keepdim=True).clamp(min=SHORTEST_MEAN)


def drawn_t(seed: int, step: int) -> float:
    """Uniform in [0, 1), a function of seed and step alone: the same on every process and after a resume."""
    return random.Random(f"bridge {seed} {step}").random()
