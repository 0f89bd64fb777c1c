"""Cross entropy of a downstream task, softened by a momentum model's answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modstruct import distributed
from modstruct.embeddings import TaskOutputs
from modstruct.losses.queue_contrast import ramped


class Distillation:
    """1/N sum_r w_r [ (1 - alpha) CE(y_r, p_r) + alpha CE(p_m_r, p_r) ] over the global batch (Li et al. 2021, code).

    N is the number of entries of all processes; an entry may bring several rows r (the tokens of a VQA question's
    answers). alpha rises over ramp_steps.
    """

    def __init__(self, alpha: float, ramp_steps: int):
        self.alpha, self.ramp_steps = alpha, ramp_steps

    def __call__(self, outputs: TaskOutputs, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its terms: against the labels, against the momentum model, share of right rows."""
        logits, labels = outputs.logits.float(), outputs.labels
        weights = torch.ones_like(logits[:, 0]) if outputs.weights is None else outputs.weights
        entries = distributed.sum_over_processes(outputs.entries.sum())

        def mean(values: Tensor) -> Tensor:
            return distributed.all_sum((weights * values).sum()) / entries

        terms = {"labels": mean(F.cross_entropy(logits, labels, reduction="none"))}
        total = terms["labels"]
        if outputs.logits_momentum is not None:
            targets = outputs.logits_momentum.detach().float().softmax(dim=-1)
            terms["momentum"] = mean(F.cross_entropy(logits, targets, reduction="none"))
            alpha = ramped(self.alpha, step, self.ramp_steps)
            total = (1 - alpha) * terms["labels"] + alpha * terms["momentum"]
        right = weights * (logits.detach().argmax(dim=1) == labels)
        sums = distributed.sum_over_processes(torch.stack([right.sum(), weights.sum()]))
        return total, terms | {"accuracy": sums[0] / sums[1].clamp(min=1e-12)}
