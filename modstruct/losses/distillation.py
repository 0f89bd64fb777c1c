"""Cross entropy of a downstream task, softened by an EMA model's answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modstruct.embeddings import Outputs
from modstruct.losses.protocol import GlobalBatch, Loss, Sums


def ramped(alpha: float, step: int, ramp_steps: int) -> float:
    """alpha, risen in a straight line from 0 at step 0 (Li et al. 2021, code: over the first epoch)."""
    return alpha * min(1.0, step / ramp_steps) if ramp_steps > 0 else alpha


class Distillation(Loss):
    """1/N sum_r w_r [ (1 - alpha) CE(y_r, p_r) + alpha CE(p_m_r, p_r) ] over the global batch (Li et al. 2021, code).

    N is the number of entries of all processes; an entry may bring several rows r (the tokens of a VQA question's
    answers). alpha rises over ramp_steps. Components: against the labels, against the EMA model, and the accuracy.
    """

    needs = frozenset({"logits", "labels", "entries"})

    def __init__(self, alpha: float, ramp_steps: int):
        self.alpha, self.ramp_steps = alpha, ramp_steps

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        logits, labels = rows["logits"], rows["labels"]
        weights = rows["weights"] if "weights" in rows else torch.ones_like(logits[:, 0])
        right = weights * (logits.detach().argmax(dim=1) == labels)
        sums = {
            "labels": (weights * F.cross_entropy(logits, labels, reduction="none")).sum(),
            "right": right.sum(),
            "weight": weights.sum(),
            "entries": rows["entries"].sum().to(logits.dtype),
        }
        if "logits_ema" in rows:
            targets = rows["logits_ema"].detach().softmax(dim=-1)
            sums["ema"] = (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
        return sums

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        terms = {name: sums[name] / sums["entries"] for name in ("labels", "ema") if name in sums}
        total = terms["labels"]
        if "ema" in terms:
            alpha = ramped(self.alpha, batch.step, self.ramp_steps)
            total = (1 - alpha) * terms["labels"] + alpha * terms["ema"]
        return total, terms | {"accuracy": sums["right"] / sums["weight"].clamp(min=1e-12)}
