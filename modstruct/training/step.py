"""One training step: its batches sent ahead, moved weights, and the guard against what is not finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.data.shards.loader import TrainBatch
from modstruct.embeddings import Outputs
from modstruct.losses.objective import Objective, Terms
from modstruct.models.protocol import Batch
from modstruct.training.deepspeed_adapter import Engine
from modstruct.training.gradient_cache import embed, on_device
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


def sent_ahead(steps: Iterable[list[TrainBatch]]) -> Iterator[list[TrainBatch]]:
    """The batches of one step after the other, on a GPU if there is one, with the views that are made there.

    There each part is copied once, on a stream of its own, while the step before it is computed: two steps' batches are
    then in its memory, until the next is asked for, which empties those that were yielded. The loader is asked for a
    step's batches two steps before, and its errors come so much earlier.
    """

    def to_device(parts: list[TrainBatch]) -> list[TrainBatch]:
        return [replace(part, tensors=on_device(part.tensors)) for part in parts]

    if not distributed.on_gpu():
        yield from map(to_device, steps)
        return
    steps = _pinned(steps)
    copying = torch.cuda.Stream()

    def send(parts: list[TrainBatch] | None) -> tuple[list[TrainBatch], torch.cuda.Event] | None:
        if parts is None:
            return None
        with torch.cuda.stream(copying):
            return to_device(parts), copying.record_event()

    coming = send(next(steps, None))
    while coming is not None:
        (parts, arrived), coming = coming, send(next(steps, None))
        computing = torch.cuda.current_stream()
        computing.wait_event(arrived)
        for part in parts:
            for rows in part.tensors.values():
                rows.record_stream(computing)  # else the next copy could take their memory while it is still read
        yield parts
        for part in parts:
            part.tensors.clear()


def _pinned(steps: Iterable[list[TrainBatch]]) -> Iterator[list[TrainBatch]]:
    """The same in pinned memory, made by a thread while a step is computed.

    Two steps' at most are there; a DataLoader that pins would hold there all that its processes have ready.
    """
    coming: deque[Future[list[TrainBatch]]] = deque()
    this_gpu = torch.cuda.current_device()  # a new thread starts on the first
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(this_gpu,)) as thread:
        for parts in steps:
            coming.append(thread.submit(lambda parts: [part.pinned() for part in parts], parts))
            if len(coming) > 1:
                yield coming.popleft().result()
        for last in coming:
            yield last.result()


def _agree(total: Tensor, stop_requested: int) -> tuple[bool, int]:
    """Whether any process's total is not finite, and the number of the signal that asked any to stop.

    One small maximum a step, so that all processes skip, and stop, together.
    """
    flags = torch.stack([(~torch.isfinite(total)).float(), torch.full_like(total, float(stop_requested))])
    non_finite, stop = distributed.max_over_processes(flags).tolist()
    return bool(non_finite), int(stop)
