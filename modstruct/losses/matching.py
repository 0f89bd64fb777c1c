"""Image-text matching of the fusion model: is this the caption of this image? (ALBEF's ITM)"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from modstruct import distributed
from modstruct.config import MatchingConfig, Precision
from modstruct.embeddings import FusionOutputs


class Matching:
    """L_ITM of Li et al. 2021, equation 4: cross entropy of two classes, mean over the rows of the global batch.

    Each pair brings itself, a wrong image and a wrong caption; the model draws them (fusion/negatives.py).
    """

    needs = frozenset({"matching_logits", "matching_labels"})

    def __init__(self, config: MatchingConfig, precision: Precision = "float32", epoch_steps: int = 0):
        pass

    def __call__(self, outputs: FusionOutputs, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and the share of right answers."""
        return mean_over_rows(*self.over_rows(outputs, step), outputs.matching_labels)

    def over_rows(self, outputs: FusionOutputs, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The sums over this process's labelled rows that the loss and its components are the means of."""
        logits, labels = outputs.matching_logits, outputs.matching_labels
        right = (logits.detach().argmax(1) == labels) & (labels >= 0)
        return F.cross_entropy(logits, labels, reduction="sum"), {"accuracy": right.float().sum()}


def mean_over_rows(total: Tensor, components: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Means over the labelled rows (label 0 or more) of all processes, of sums over this process's; scalars."""
    count = distributed.sum_over_processes((labels >= 0).sum()).clamp(min=1)
    means = {name: distributed.sum_over_processes(value.detach()) / count for name, value in components.items()}
    return distributed.all_sum(total) / count, means
