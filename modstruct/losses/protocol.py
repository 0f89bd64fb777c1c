"""What a loss is to the objective: it declares what it needs, returns sums of its own rows, and is finished from the
sums of all processes.

So the objective gathers once and reduces once for all losses together, and no loss speaks to another process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from modstruct.config import Precision
from modstruct.embeddings import Outputs

Sums = dict[str, Tensor]
"""What adds up over processes, by name: scalars, vectors over the global batch, D x D products; any floating dtype."""


@dataclass(frozen=True)
class SharedScalar:
    """A learnt number that a loss declares and the model owns, so that ZeRO, checkpoints, exports and the gradient
    cache carry it. The model returns it, between its limits, under its name, (1,)."""

    name: str
    initial: float
    low: float = -inf
    high: float = inf


@dataclass(frozen=True)
class LossSettings:
    """What losses share, besides their sections of the recipe."""

    precision: Precision = "float32"
    """Of products over all pairs."""
    epoch_steps: int = 0
    """Length of an epoch, over which distillation rises by default."""
    seed: int = 0
    """Of random draws, the same on every process."""


@dataclass(frozen=True)
class GlobalBatch:
    """What a loss may know of the global batch."""

    columns: Mapping[str, Tensor]
    """The embeddings that the losses declared, of all processes in order of rank: (N, …), by name."""
    first: int
    """Place of this process's first row among the N."""
    pairs: int
    """N, the pairs of all processes."""
    step: int
    """Step of the run, from 0."""
    dtype: torch.dtype
    """Of the embeddings: float32, or float64 in checks."""


class Loss(ABC):
    """A term of the objective, made from its section of the recipe and LossSettings.

    Gradients reach a process's rows through the sums alone, whose reduction has the scale that
    distributed/collectives.py decides.
    """

    needs: frozenset[str] = frozenset()
    """Outputs of the model that it takes."""
    scalars: tuple[SharedScalar, ...] = ()
    compares: bool = False
    """It compares the pairs of a batch with each other: it needs two, and takes each for a sample of its own."""
    row_labels: str | None = None
    """For a mean over labelled rows (0 or more): the output that holds the labels. Its sums are then `total` and the
    components, the value is their quotient by the number of rows, and micro-batches bring their parts one by one."""

    def columns(self, pairs: int, dimension: int) -> frozenset[str]:
        """Outputs that it needs of all processes, for a global batch of so many pairs in D = dimension."""
        return frozenset()

    @abstractmethod
    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        """This process's part of the sums."""

    @abstractmethod
    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the global batch, a scalar, and its named components, from the sums of all processes."""
