"""The sigmoid loss of SigLIP: every pair of the batch is a binary classification of its own."""

from __future__ import annotations

from torch import Tensor

from modstruct.config.losses import SigmoidConfig
from modstruct.embeddings import Outputs
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, SharedScalar, Sums
from modstruct.pairwise.contrast import sigmoid_contrast_sum


class Sigmoid(Loss):
    """-1/N sum_jk log sigmoid( l_jk (s <zV_j, zT_k> + b) ),  l_jk = 1 for j = k, else -1 (Zhai et al. 2023, eq. 1).

    The scale s is the model's logit scale; the bias b is learnt too.
    """

    needs = frozenset({"image", "text", "logit_scale", "logit_bias"})
    compares = True

    def __init__(self, config: SigmoidConfig, settings: LossSettings):
        self.precision = settings.precision
        self.scalars = (SharedScalar("logit_bias", config.bias_init),)

    def columns(self, pairs: int, dimension: int) -> frozenset[str]:
        return frozenset({"text"})

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        scale, bias, text = rows["logit_scale"], rows["logit_bias"], batch.columns["text"]
        return {"total": sigmoid_contrast_sum(rows["image"], text, scale, bias, batch.first, self.precision)}

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return (sums["total"] / batch.pairs).to(batch.dtype), {}
