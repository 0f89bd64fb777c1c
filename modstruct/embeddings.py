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


@dataclass
class FusionOutputs(Embeddings):
    """What the fusion model makes: embeddings, of which the augmented ones are the momentum encoders', and more.

    None where the recipe's losses do not need it. What momentum made has no gradient.
    """

    image_queue: Tensor | None = None
    """(Q, D), momentum embeddings of earlier steps; the same on every process."""
    text_queue: Tensor | None = None
    pair_ids: Tensor | None = None
    """(B,) int64, equal where two pairs have the same image."""
    queue_ids: Tensor | None = None
    """(Q,) int64, of the queues."""
    matching_logits: Tensor | None = None
    """(3 B, 2): not matching, matching."""
    matching_labels: Tensor | None = None
    """(3 B,) int64, 1 for a pair, 0 for a negative, -100 where there was none."""
    masked_logits: Tensor | None = None
    """(M, vocabulary) at the M blanks of this process's rows."""
    masked_logits_momentum: Tensor | None = None
    """(M, vocabulary), the momentum model's."""
    masked_labels: Tensor | None = None
    """(M,) int64, the right ids."""


@dataclass
class TaskOutputs:
    """What a downstream model makes of a process's entries: R rows of C classes, one or several of an entry."""

    logits: Tensor
    """(R, C)."""
    labels: Tensor
    """(R,) int64."""
    entries: Tensor
    """(1,) int64, this process's entries."""
    logits_momentum: Tensor | None = None
    """(R, C), the momentum model's, without gradient."""
    weights: Tensor | None = None
    """(R,) float32; None for one each."""
