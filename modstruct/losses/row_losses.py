"""Losses that are means over labelled rows: the fusion model's matching (ITM) and masked language modelling (MLM)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from modstruct.config import MaskedLanguageConfig, MatchingConfig
from modstruct.embeddings import Outputs
from modstruct.losses.distillation import ramped
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, Sums


class RowLoss(Loss):
    """Sums over this process's labelled rows, divided by their number in the global batch."""

    row_labels: str

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        count = sums["count"].clamp(min=1)
        means = {name: total / count for name, total in sums.items() if name != "count"}
        return means.pop("total"), means


class Matching(RowLoss):
    """L_ITM of Li et al. 2021, equation 4: cross entropy of two classes, mean over the rows of the global batch.

    Each pair brings itself, a wrong image and a wrong caption; the model draws them (models/fusion/pretraining.py).
    """

    needs = frozenset({"matching_logits", "matching_labels"})
    row_labels = "matching_labels"
    compares = True

    def __init__(self, config: MatchingConfig, settings: LossSettings):
        pass

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        logits, labels = rows["matching_logits"], rows["matching_labels"]
        right = (logits.detach().argmax(1) == labels) & (labels >= 0)
        total = F.cross_entropy(logits, labels, reduction="sum")
        return {"total": total, "accuracy": right.float().sum(), "count": (labels >= 0).float().sum()}


class MaskedLanguage(RowLoss):
    """L_MLM of Li et al. 2021, equations 3 and 7, mean over all masked tokens of the global batch:

    (1 - alpha) CE(y, p) + alpha CE(p_m, p), p being softmax of the logits and p_m the EMA model's.
    """

    needs = frozenset({"masked_logits", "masked_logits_ema", "masked_labels"})
    row_labels = "masked_labels"

    def __init__(self, config: MaskedLanguageConfig, settings: LossSettings):
        self.alpha = config.alpha
        self.ramp_steps = settings.epoch_steps if config.ramp_steps is None else config.ramp_steps

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        alpha = ramped(self.alpha, batch.step, self.ramp_steps)
        logits, labels = rows["masked_logits"], rows["masked_labels"]
        targets = rows["masked_logits_ema"].detach().softmax(dim=-1)
        words = F.cross_entropy(logits, labels, reduction="sum")
        ema = F.cross_entropy(logits, targets, reduction="sum")
        total = (1 - alpha) * words + alpha * ema
        return {"total": total, "words": words, "ema": ema, "count": (labels >= 0).float().sum()}
