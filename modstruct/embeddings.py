"""The one type that travels from the models to the losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Embeddings:
    """What the towers make of one process's part of a batch.

    Every embedding is (B, D), float32, unit norm, row j of each belonging to pair j; None where the recipe's
    losses do not need it. logit_scale: (1,), float32, 1 / temperature, already clamped.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    image_augmented: Tensor | None = None
    text_augmented: Tensor | None = None
    image_independent: Tensor | None = None
    text_independent: Tensor | None = None
    image_independent_augmented: Tensor | None = None
    text_independent_augmented: Tensor | None = None
