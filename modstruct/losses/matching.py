"""Image-text matching of the fusion model: is this the caption of this picture? (ALBEF's ITM)"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from modstruct import distributed
from modstruct.config import MatchingConfig, Precision
from modstruct.embeddings import FusionOutputs


class Matching:
    """L_ITM of Li et al. 2021, equation 4: cross entropy of two classes, mean over all pairs and negatives of the
    global batch. Each pair brings itself, a wrong picture and a wrong caption; the model draws them
    (fusion/negatives.py)."""

    needs = frozenset({"matching_logits", "matching_labels"})

    def __init__(self, config: MatchingConfig, precision: Precision = "float32", epoch_steps: int = 0):
        pass

    def __call__(self, outputs: FusionOutputs, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and the share of right answers."""
        logits, labels = outputs.matching_logits, outputs.matching_labels
        loss = mean_over_labelled(F.cross_entropy(logits, labels, reduction="none"), labels)
        right = (logits.detach().argmax(1) == labels).float()
        return loss, {"accuracy": mean_over_labelled(right * (labels >= 0), labels)}


def mean_over_labelled(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of the values (n,) over all processes, those whose label is below 0 left out (they are 0); a scalar."""
    count = distributed.sum_over_processes((labels >= 0).sum())
    return distributed.all_sum(values.sum()) / count.clamp(min=1)
