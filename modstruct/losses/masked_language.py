"""Masked language modelling of the fusion model: the blanks of a caption, found with the image's help."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from modstruct.config import MaskedLanguageConfig, Precision
from modstruct.embeddings import FusionOutputs
from modstruct.losses.matching import mean_over_rows
from modstruct.losses.queue_contrast import ramped


class MaskedLanguage:
    """L_MLM of Li et al. 2021, equations 3 and 7, mean over all blanks of the global batch:

    (1 - alpha) CE(y, p) + alpha CE(p_m, p), p being softmax of the logits and p_m the momentum model's.
    """

    needs = frozenset({"masked_logits", "masked_logits_momentum", "masked_labels"})

    def __init__(self, config: MaskedLanguageConfig, precision: Precision = "float32", epoch_steps: int = 0):
        self.alpha = config.alpha
        self.ramp_steps = epoch_steps if config.ramp_steps is None else config.ramp_steps

    def __call__(self, outputs: FusionOutputs, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its terms: against the right words, and against the momentum model."""
        return mean_over_rows(*self.over_rows(outputs, step), outputs.masked_labels)

    def over_rows(self, outputs: FusionOutputs, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The sums over this process's blanks that the loss and its components are the means of."""
        alpha = ramped(self.alpha, step, self.ramp_steps)
        logits = outputs.masked_logits
        targets = outputs.masked_logits_momentum.detach().softmax(dim=-1)
        words = F.cross_entropy(logits, outputs.masked_labels, reduction="sum")
        momentum = F.cross_entropy(logits, targets, reduction="sum")
        return (1 - alpha) * words + alpha * momentum, {"words": words, "momentum": momentum}
