"""DeepSpeed with working copies of two dtypes: half precision, and float32 for a few parameters in groups of their own.

DeepSpeed 0.19 casts all parameters (its data_types.keep_in_fp32_modules is for buffers), and stage 3 lays all groups in
one buffer. The rest of it goes by each group's dtype. Gradients travel in communication_data_type, whatever their own.
"""

from __future__ import annotations

from functools import wraps
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


def allow_two_dtypes() -> None:
    """Change DeepSpeed so, for this process; once."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage3

    cast, defragment = DeepSpeedEngine._cast_module_mixed_precision, stage3.defragment
    sharded = stage3.DeepSpeedZeroOptimizer_Stage3
    offload = sharded._create_param_groups_fp16_flat_cpu_memory

    @wraps(cast)
    def cast_unless_done(engine: Any, dtype: torch.dtype | None, *rest: Any) -> None:
        if dtype not in {parameter.dtype for parameter in engine.module.parameters()}:
            cast(engine, dtype, *rest)

    @wraps(defragment)
    def defragment_each(tensors: list[Tensor]) -> Tensor | _Buffers:
        buffers = [defragment(list(group)) for _, group in groupby(tensors, key=lambda tensor: tensor.dtype)]
        return buffers[0] if len(buffers) == 1 else _Buffers(buffers)

    @wraps(offload)
    def offload_each(optimizer: Any) -> None:
        offload(optimizer)
        memory = optimizer.param_groups_fp16_flat_cpu_memory
        for number, group in enumerate(optimizer.trainable_param_groups):
            memory[number] = memory[number].to(group["params"][0].dtype)

    DeepSpeedEngine._cast_module_mixed_precision = cast_unless_done
    stage3.defragment = defragment_each
    sharded._create_param_groups_fp16_flat_cpu_memory = offload_each


class _Buffers:
    """Buffers of several dtypes as stage 3 takes a single one: it cuts off each group's part, in their order."""

    def __init__(self, buffers: list[Tensor]):
        self.buffers = buffers

    def narrow(self, dimension: int, start: int, length: int) -> Tensor:
        for buffer in self.buffers:
            if start < len(buffer):
                return buffer.narrow(dimension, start, length)
            start -= len(buffer)
        raise IndexError(start)
