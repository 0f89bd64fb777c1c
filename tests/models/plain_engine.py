"""An engine without DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from modstruct.models.protocol import TrainableModel
from modstruct.training.deepspeed_adapter import GradientSums


class PlainEngine:
    """What WholeBatch and CachedBatch ask of an Engine, over a bare model in one process."""

    def __init__(self, model: TrainableModel):
        self.model = model
        self.reductions = 0

    def __call__(self, batch: dict[str, Tensor], **options: bool) -> dict[str, Tensor]:
        return self.model(batch, **options)

    def backward(self, total: Tensor) -> None:
        total.backward()

    @contextmanager
    def one_reduction(self) -> Iterator[GradientSums]:
        sums = GradientSums(self.model)
        yield sums
        sums.write()
        self.reductions += 1
