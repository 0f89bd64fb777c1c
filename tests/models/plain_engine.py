"""An engine without DeepSpeed."""

from __future__ import annotations

from contextlib import contextmanager

from torch import Tensor, nn


class PlainEngine:
    """What WholeBatch and the gradient cache ask of DeepSpeed at stage 0, over a bare module in one process."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.reductions = 0

    def __call__(self, batch: dict[str, Tensor], **options) -> dict[str, Tensor]:
        return self.module(batch, **options)

    def backward(self, total: Tensor) -> None:
        total.backward()

    def zero_optimization_stage(self) -> int:
        return 0

    @contextmanager
    def no_sync(self):
        yield

    def allreduce_gradients(self) -> None:
        self.reductions += 1
