"""An engine without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    def summing(self) -> Iterator[Callable[[], None]]:
        sums = GradientSums(self.model)
        yield sums.add
        sums.write()
        self.reductions += 1
