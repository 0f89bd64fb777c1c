"""From a batch to embeddings, and back from the loss to the weights: in one piece, or a micro-batch at a time.

In one piece, the graph of the whole batch is in memory. The gradient cache (Gao et al. 2021, "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup", section 3.2) gives the same gradient in the memory of one micro-batch:
every micro-batch is embedded without a graph, the losses see all embeddings at once, and then every micro-batch is
embedded anew, its random draws repeated, and takes the gradient that the losses gave its embeddings. The towers run
forward twice for it. The gradients are reduced over the processes once.

Exact for float32 up to the order of sums, dropout included. Not so for BatchNorm, whose statistics are those of a
micro-batch; its running averages move in the second pass only. In half precision a sum of many micro-batches' gradients
would lose digits (the towers' gradients are bfloat16 too), so they are summed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modstruct import distributed

Batch = dict[str, Tensor]


class WholeBatch:
    """Embeddings of a batch with their graph."""

    def __init__(self, engine, batch: Batch):
        self.engine, self.batch = engine, on_device(batch)
        self.embeddings = engine.module.outputs(**engine(self.batch))

    def backward(self, total: Tensor) -> dict[str, Tensor]:
        """Gradients of the total, reduced over the processes, to the engine. Returns the terms known only now: none."""
        self.engine.backward(total)
        return {}


class CachedBatch:
    """Embeddings of a batch in parts, as leaves; `backward` goes on from their gradients, part by part.

    parts: at least one, as many on every process, or a collective would wait for ever.
    """

    shared = frozenset({"logit_scale"})
    """What the model makes once and not for each row."""
    constants: frozenset[str] = frozenset()
    """What it makes without a gradient."""

    def __init__(self, engine, parts: list[Batch]):
        self.engine, self.parts = engine, parts
        self.random_states = []
        made = []
        with torch.no_grad(), _statistics_held(engine.module):
            for part in self.parts:
                self.random_states.append(random_state())
                made.append(self.embed_part(on_device(part)))
        rows = {name: torch.cat([part[name] for part in made]) for name in made[0] if name not in self.shared}
        once = {name: made[0][name] for name in made[0] if name in self.shared}
        self.leaves = {
            name: values if name in self.constants else values.requires_grad_()
            for name, values in (rows | once).items()
        }
        self.embeddings = engine.module.outputs(**self.leaves)

    def embed_part(self, part: Batch) -> Batch:
        """What the losses over all pairs need of a part."""
        return self.engine(part)

    def backward(self, total: Tensor) -> dict[str, Tensor]:
        """Gradients of the total, reduced over the processes, to the engine."""
        self.start_backward(total)
        with self.parts_again() as parts:
            for part, first, end in parts:
                self.engine.backward(self.carrier(self.engine(part), first, end))
        return {}

    def start_backward(self, total: Tensor) -> None:
        """The gradients that the losses over all pairs give the embeddings."""
        total.backward()
        self.gradients = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        self.scale_gradient = self.gradients.pop("logit_scale", None)

    @contextmanager
    def parts_again(self) -> Iterator[Iterator[tuple[Batch, int, int]]]:
        """(part, its first row, the row after its last), each with its random draws repeated, to be embedded anew and
        taken backward once; one reduction of all gradients at the end."""
        after = random_state()
        with _one_reduction(self.engine) as sums:

            def again() -> Iterator[tuple[Batch, int, int]]:
                first = 0
                for part, state in zip(self.parts, self.random_states, strict=True):
                    set_random_state(state)
                    end = first + len(next(iter(part.values())))
                    yield on_device(part), first, end
                    sums.add()
                    first = end

            yield again()
        set_random_state(after)

    def carrier(self, made: Batch, first: int, end: int) -> Tensor:
        """A scalar whose gradient with respect to each embedding of these rows is the one that the losses gave it."""
        carrier = sum((made[name] * gradient[first:end]).sum() for name, gradient in self.gradients.items())
        if self.scale_gradient is not None:
            # The scale is one for all parts. Every part has it in its graph: ZeRO-3 waits for its gradient.
            carrier = carrier + (made["logit_scale"] * self.scale_gradient * (first == 0)).sum()
        return carrier


class _GradientSums:
    """Gradients summed over several backwards, in float32 where the parameters are not."""

    def __init__(self, module: nn.Module):
        low = (torch.float16, torch.bfloat16)
        self.parameters = [p for p in module.parameters() if p.requires_grad and p.dtype in low]
        self.sums: dict[int, Tensor] = {}

    def add(self) -> None:
        """After a backward: take its gradients in. float32 ones stay, and torch adds the next to them."""
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if id(parameter) in self.sums:
                self.sums[id(parameter)] += gradient
            else:
                self.sums[id(parameter)] = gradient.float()
            gradient.zero_()

    def write(self) -> None:
        """The sums become the parameters' gradients."""
        for parameter in self.parameters:
            if id(parameter) in self.sums:
                parameter.grad.copy_(self.sums[id(parameter)])


@contextmanager
def _one_reduction(engine) -> Iterator[_GradientSums]:
    """Several backwards, one reduction of their summed gradients at the end.

    DeepSpeed's stage 0 has another way for it than the others. Its own gradient accumulation stays at 1 step.
    """
    sums = _GradientSums(engine.module)
    if engine.zero_optimization_stage() > 0:
        with engine.coalesce_grad_reduction():
            yield sums
            sums.write()
        return
    with engine.no_sync():
        yield sums
    sums.write()
    engine.allreduce_gradients()


@contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of BatchNorm as they were."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
    held = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    yield
    for buffer, before in held:
        buffer.copy_(before)


def on_device(batch: Batch) -> Batch:
    return {name: rows.to(distributed.device(), non_blocking=True) for name, rows in batch.items()}


def random_state() -> tuple[Tensor, ...]:
    """What dropout draws from."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state()) if distributed.on_gpu() else states


def set_random_state(states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
