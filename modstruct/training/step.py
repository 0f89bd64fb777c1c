"""One training step, from a batch to moved weights, and the guard against what is not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.embeddings import Outputs
from modstruct.losses.objective import Objective, Terms
from modstruct.models.protocol import Batch
from modstruct.training.deepspeed_adapter import Engine
from modstruct.training.gradient_cache import embed
from modstruct.training.timing import StepClock


@dataclass
class StepReport:
    """What a step did. Values stay on the device until somebody reads them."""

    total: Tensor
    terms: Terms
    outputs: Outputs
    gradient_norm: float | Tensor | None = None
    skipped: str | None = None
    """Why the weights did not move; None if they did."""
    overflow: bool = False
    """The loss was finite, its gradient was not."""
    stop: int = 0
    """Number of the signal by which some process was asked to stop."""


def train_step(
    engine: Engine,
    objective: Objective,
    parts: list[Batch],
    step: int,
    learning_rate: float,
    stop_requested: int = 0,
    clock: StepClock | None = None,
) -> StepReport:
    """Forward, losses over the global batch, backward, optimizer, and the EMA weights.

    parts: this process's batch, in one part or in micro-batches, whose second forward pass counts as backward.
    clock: measures each phase.
    A non-finite loss or gradient leaves the weights and moments as they are, on every process alike.
    """
    clock = clock or StepClock()
    with clock.phase("forward"):
        embedded = embed(engine, parts, objective, step)
    with clock.phase("loss"):
        total, terms = objective(embedded.outputs, step, without=embedded.deferred)
        report = StepReport(total.detach(), terms, embedded.outputs)
        non_finite, report.stop = _agree(report.total, stop_requested)
    if non_finite:
        names = [name for name, value in report.terms.items() if not torch.isfinite(value)]
        report.skipped = f"the loss is not finite in {', '.join(names) or 'the total'}"
        return report
    with clock.phase("backward"):
        deferred = embedded.backward(total)
    report.terms = report.terms | deferred
    for name in embedded.deferred:
        report.total = report.total + objective.weights[name] * deferred[name]
    with clock.phase("optimizer"):
        report.gradient_norm, finite = engine.step(learning_rate, step)
    if not finite:
        report.skipped, report.overflow = "the gradient is not finite", True
    else:
        engine.model.update_ema(embedded.outputs, embedded.batch, step)
    engine.clamp_scalars()
    if finite and engine.ema:
        engine.ema.update()
    return report


def _agree(total: Tensor, stop_requested: int) -> tuple[bool, int]:
    """Whether any process's total is not finite, and the number of the signal that asked any to stop.

    One small maximum a step, so that all processes skip, and stop, together.
    """
    flags = torch.stack([(~torch.isfinite(total)).float(), torch.full_like(total, float(stop_requested))])
    non_finite, stop = distributed.max_over_processes(flags).tolist()
    return bool(non_finite), int(stop)
