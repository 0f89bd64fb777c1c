"""The type that travels from models to losses.

A plain dict of tensors, because ZeRO-3 looks for the tensors whose gradients it must wait for in dicts and tuples only.
A key is missing where the recipe's losses do not need it. B: pairs of this process, D: dimension of the embeddings.

Embeddings, (B, D), float32, unit norm, row j of each belonging to pair j:
  image, text
  image_augmented, text_augmented       of augmented views; the fusion model's are the EMA encoders', without gradient,
                                        of the plain views unless losses.queue_contrast.in_modal
  image_independent, text_independent, image_independent_augmented, text_independent_augmented
Learnt numbers, (1,), float32, between their limits:
  logit_scale                           1 / temperature
  and what losses declare (losses/protocol.py, SharedScalar), by its name
Of the fusion model:
  image_queue, text_queue               (Q, D), EMA embeddings of earlier steps; the same on every process
  pair_ids, queue_ids                   (B,) and (Q,) int64, equal where two pairs have the same image
  matching_logits, matching_labels      (3 B, 2), not matching and matching; (3 B,) int64, 1 for a pair, 0 for a
                                        negative, -100 where there was none
  masked_logits, masked_labels          (M, vocabulary) and (M,) int64, at the M masked tokens of this process's rows
  masked_logits_ema                     (M, vocabulary), the EMA model's, without gradient
Of a downstream task's model, R rows of C classes, one or several of an entry:
  logits, labels                        (R, C) and (R,) int64
  logits_ema                            (R, C), the EMA model's, without gradient
  weights                               (R,) float32; missing for one each
  entries                               (1,) int64, this process's entries
"""

from __future__ import annotations

from torch import Tensor

Outputs = dict[str, Tensor]
EMBEDDINGS = frozenset(
    f"{modality}{head}{view}"
    for modality in ("image", "text")
    for head in ("", "_independent")
    for view in ("", "_augmented")
)
"""Names of the embeddings."""
