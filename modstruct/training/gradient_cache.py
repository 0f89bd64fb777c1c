"""From a batch to embeddings, and back from the loss to the weights: in one piece, or a micro-batch at a time.

In one piece, the graph of the whole batch is in memory. The gradient cache (Gao et al. 2021, "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup", section 3.2) gives the same gradient in the memory of one micro-batch:
every micro-batch is embedded without a graph, the losses see all embeddings at once, and then every micro-batch is
embedded again, its random draws repeated, and takes the gradient that the losses gave its embeddings. The towers run
forward twice for it. The gradients are reduced over the processes once, or, with train.gradient_sums `sharded` at ZeRO
stages 2 and 3, with every micro-batch.

Exact for float32 up to the order of sums, dropout included. Not so for BatchNorm, whose statistics are those of a
micro-batch; its running averages move in the second pass only. In half precision a sum of many micro-batches' gradients
would lose digits (the towers' gradients are bfloat16 too), so they are summed in float32 and rounded once.

The fusion model's matching and masked language modelling are means over rows, so each micro-batch brings its part of
them in the second pass. A hard negative may lie in another micro-batch or on another process; its tokens would have to
be kept with their graph, so its image or caption travels instead and is encoded again beside the rows that want it. The
gradient is the same, a sum over all places where an image's tokens are used; but for dropout, which is drawn twice for
a negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn

from modstruct import distributed
from modstruct.data.transforms.device_views import made_views
from modstruct.losses.objective import Objective, Terms
from modstruct.models.protocol import Batch
from modstruct.training.deepspeed_adapter import Engine


def embed(engine: Engine, parts: list[Batch], objective: Objective, step: int) -> WholeBatch | CachedBatch:
    """Embeddings of this process's batch, which comes in parts of at most train.micro_batch pairs."""
    return WholeBatch(engine, parts[0]) if len(parts) == 1 else CachedBatch(engine, parts, objective, step)


class WholeBatch:
    """What the model makes of a batch, with its graph."""

    deferred: frozenset[str] = frozenset()
    """Names of losses that `backward` computes: none."""

    def __init__(self, engine: Engine, batch: Batch):
        self.engine, self.batch = engine, on_device(batch)
        self.outputs = engine(self.batch)

    def backward(self, total: Tensor) -> Terms:
        """Gradients of the total, reduced over the processes, to the engine. Returns deferred losses' terms: none."""
        self.engine.backward(total)
        return {}


class CachedBatch:
    """Outputs of a batch in parts, as leaves; `backward` continues from their gradients, part by part.

    parts: at least one, as many on every process, or all ranks would wait for ever.
    """

    def __init__(self, engine: Engine, parts: list[Batch], objective: Objective, step: int):
        self.engine, self.parts, self.objective, self.step = engine, parts, objective, step
        self.deferred = objective.row_losses
        model = engine.model
        self.random_states = []
        made = []
        with torch.no_grad(), _statistics_held(model):
            for part in self.parts:
                self.random_states.append(random_state())
                made.append(engine(on_device(part), embed_only=True))
        rows = {name: torch.cat([part[name] for part in made]) for name in made[0] if name not in model.shared_outputs}
        once = {name: made[0][name] for name in made[0] if name in model.shared_outputs}
        self.leaves = {
            name: values if name in model.constants else values.requires_grad_()
            for name, values in (rows | once).items()
        }
        self.outputs = self.leaves
        whole = parts[0].keys() & model.whole_fields
        self.batch = on_device({name: torch.cat([part[name] for part in parts]) for name in whole})

    def backward(self, total: Tensor) -> Terms:
        """Gradients of the total and of the deferred losses, reduced over the processes, to the engine.

        Returns the deferred losses' terms.
        """
        exchange = self.engine.model.exchange(self.leaves, self.batch)
        total.backward()  # meanwhile the exchange's splits come to the host
        gradients = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        exchanged = exchange()
        counts = self.objective.row_counts(self.batch | exchanged)
        sums: Terms = {}
        with self.parts_again() as parts:
            for part, first, end in parts:
                extra = {name: rows[first:end] for name, rows in exchanged.items()}
                outputs = self.engine(part | extra)
                loss = self._carrier(outputs, gradients, first, end)
                if counts:
                    over_rows, terms = self.objective.over_part(outputs, self.step, counts)
                    # As distributed/collectives.py has it: W times this process's share of the global value's gradient.
                    loss = loss + distributed.world_size() * over_rows
                    sums = {name: sums.get(name, 0) + value for name, value in terms.items()}
                self.engine.backward(loss)
        return {name: distributed.sum_over_processes(value) for name, value in sums.items()}

    @contextmanager
    def parts_again(self) -> Iterator[Iterator[tuple[Batch, int, int]]]:
        """(part, its first row, the row after its last), each with its random draws repeated, to be embedded again and
        taken backward once; their gradients are summed."""
        after = random_state()
        with self.engine.summing() as add:

            def again() -> Iterator[tuple[Batch, int, int]]:
                first = 0
                for part, state in zip(self.parts, self.random_states, strict=True):
                    set_random_state(state)
                    end = first + len(next(iter(part.values())))
                    yield on_device(part), first, end
                    add()
                    first = end

            yield again()
        set_random_state(after)

    def _carrier(self, made: Batch, gradients: Batch, first: int, end: int) -> Tensor:
        """A scalar whose gradient with respect to each output of these rows is the one that the losses gave it."""
        shared = self.engine.model.shared_outputs
        parts = [(made[name] * rows[first:end]).sum() for name, rows in gradients.items() if name not in shared]
        # What is made once is one for all parts. Every part has it in its graph: ZeRO-3 waits for its gradient.
        parts += [(made[name] * gradients[name] * (first == 0)).sum() for name in gradients if name in shared]
        return reduce(torch.add, parts)


@contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of BatchNorm as they were."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
    held = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    yield
    for buffer, before in held:
        buffer.copy_(before)


def on_device(batch: Batch) -> Batch:
    """The batch on this process's device, with the views that are made there, if it has none yet."""
    moved = {name: rows.to(distributed.device(), non_blocking=True) for name, rows in batch.items()}
    return made_views(moved, drawn=batch)


def random_state() -> tuple[Tensor, ...]:
    """What dropout draws from."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state()) if distributed.on_gpu() else states


def set_random_state(states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
