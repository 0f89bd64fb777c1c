"""DeepSpeed's gradient norm in one operation over all gradients, which also tells whether they are finite.

DeepSpeed 0.19 takes two operations for each parameter's norm, and before that, in half precision, thirteen more for
what is not finite in it, which its norm then shows again: two thirds of all that a step of ZeRO 1 or 2 launches, for
which a GPU waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modstruct import distributed


def measure_at_once(optimizer: Any) -> None:
    """Let one of DeepSpeed's optimizers, of any ZeRO stage, measure so."""
    if hasattr(optimizer, "get_grad_norm_direct"):
        optimizer.get_grad_norm_direct = lambda gradients, _: _norm_of_all_shares(gradients)
        optimizer.check_overflow = lambda **_: None  # its step asks the norm, too
    elif hasattr(optimizer, "overflow_checker"):  # stage 0 in half precision, where every process has whole gradients
        from deepspeed.runtime.fp16 import unfused_optimizer

        unfused_optimizer.get_weight_norm = lambda gradients, mpu: float(_sum_of_squares(gradients).sqrt())
        optimizer.overflow_checker.check = lambda: False


def forget_refused(optimizer: Any) -> None:
    """Let go of the gradients of a step that was not taken.

    DeepSpeed 0.19 keeps them at stage 3 and where the optimizer is offloaded. Those of a weight that has no gradient
    afterwards, and sums of several backwards (`Engine.summing`), would refuse every later step, or move the weight.
    """
    kept = [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        kept += [share.grad for share in getattr(optimizer, name, ())]
    for gradients in kept:
        if gradients is not None:
            gradients.zero_()
    if getattr(optimizer, "cpu_offload", False):  # of stages 1 and 2
        optimizer.averaged_gradients = {}


def _norm_of_all_shares(gradients: list[Tensor]) -> Tensor:
    """Norm over the processes' shares, finite where all are."""
    return distributed.sum_over_processes(_sum_of_squares(gradients)).sqrt().float()


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm([gradient.detach() for gradient in gradients], 2, dtype=torch.float64)
    return torch.stack(norms).to(distributed.device()).square().sum()
