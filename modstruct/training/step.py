"""One training step, from a batch to moved weights, and the guard against what is not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.embeddings import Embeddings, FusionOutputs
from modstruct.losses.objective import Objective
from modstruct.training.fusion_cache import CachedFusionBatch
from modstruct.training.gradient_cache import Batch, CachedBatch, WholeBatch
from modstruct.training.step_clock import StepClock


@dataclass
class StepReport:
    """What a step did. Values stay on the device until somebody reads them."""

    total: Tensor
    terms: dict[str, Tensor]
    embeddings: Embeddings
    gradient_norm: float | Tensor | None = None
    skipped: str | None = None
    """Why the weights did not move; None if they did."""
    overflow: bool = False
    """The loss was finite, its gradient was not."""
    stop: bool = False
    """Some process was asked to stop (SIGTERM)."""


def train_step(
    engine,
    objective: Objective,
    parts: list[Batch],
    step: int,
    seed: int,
    learning_rate: float,
    stop_requested: bool = False,
    clock: StepClock | None = None,
) -> StepReport:
    """Forward, losses over the global batch, backward, optimizer, and what follows the weights (momentum copies).

    parts: this process's batch, in one part or in micro-batches, whose second forward pass counts as backward.
    clock: is told how long each phase takes.
    A non-finite loss or gradient leaves the weights and moments as they are, on every process alike.
    """
    clock = clock or StepClock()
    with clock.phase("forward"):
        embedded = embed(engine, parts, objective, step)
    with clock.phase("loss"):
        later = {"pairs_only": True} if isinstance(embedded, CachedFusionBatch) else {}
        total, terms = objective(embedded.embeddings, step, seed, **later)
        report = StepReport(total.detach(), {k: v.detach() for k, v in terms.items()}, embedded.embeddings)
        non_finite, report.stop = _agree(report.total, stop_requested)
    if non_finite:
        names = [name for name, value in report.terms.items() if not torch.isfinite(value)]
        report.skipped = f"the loss is not finite in {', '.join(names) or 'the total'}"
        return report
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    with clock.phase("backward"):
        late = embedded.backward(total)
    report.terms |= late
    report.total = report.total + sum(objective.weights[name] * late[name] for name in late if "/" not in name)
    with clock.phase("optimizer"):
        report.gradient_norm, finite = _step(engine)
    if not finite:
        report.skipped, report.overflow = "the gradient is not finite", True
    elif hasattr(engine.module, "follow"):
        engine.module.follow(report.embeddings, embedded.batch, step)
    return report


def embed(engine, parts: list[Batch], objective: Objective | None = None, step: int = 0) -> WholeBatch | CachedBatch:
    """Embeddings of this process's batch, which comes in parts of at most train.micro_batch pairs."""
    if len(parts) == 1:
        return WholeBatch(engine, parts[0])
    if engine.module.outputs is FusionOutputs:
        return CachedFusionBatch(engine, parts, objective, step)
    return CachedBatch(engine, parts)


def _agree(total: Tensor, stop_requested: bool) -> tuple[bool, bool]:
    """Whether any process's total is not finite, and whether any was asked to stop.

    One small maximum a step, so that all processes skip, and stop, together.
    """
    flags = torch.stack([(~torch.isfinite(total)).float(), torch.full_like(total, float(stop_requested))])
    non_finite, stop = distributed.max_over_processes(flags).tolist()
    return bool(non_finite), bool(stop)


def _step(engine) -> tuple[float | Tensor | None, bool]:
    """Optimizer step; the gradient's norm before clipping, and whether it was finite and the step taken."""
    if _guards_itself(engine):
        # DeepSpeed's optimizer of stage 0 reports the norm of the scaled gradient.
        scaling = getattr(engine.optimizer, "loss_scale_config", None)
        scale = scaling.cur_scale if scaling is not None else 1
        engine.step()
        return engine.get_global_grad_norm() / scale, not engine.optimizer.overflow
    # Stage 0 in float32 is a bare torch optimizer: DeepSpeed neither measures nor checks the gradient.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        engine.zero_grad()
        return norm, False
    engine.step()
    return norm, True


def _guards_itself(engine) -> bool:
    return hasattr(engine.optimizer, "overflow")
